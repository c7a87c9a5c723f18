"""How the full-size configurations lie on the chips they were compiled for: mesh, remat, accumulation, batch.

One module a chip. What `python -m ivcr_jax.aot` gave for them is in docs/training.md.
"""

import dataclasses

from configs.hardware import v5e, v5p, v6e
from ivcr_jax.sharding import MeshConfig
from ivcr_jax.training import TrainConfig

CHIPS = {"v5e": v5e.SETTINGS, "v5p": v5p.SETTINGS, "v6e": v6e.SETTINGS}


def on(config: TrainConfig, name: str) -> TrainConfig:
    """The configuration on a topology: "v5e:16x16", "v5e:16x16:2" for two slices of it, each with ":frames" behind it
    where batches hold frames and the ViT is in the step.

    Raises ValueError for one that has no entry.
    """
    chip, _, key = name.partition(":")
    known = CHIPS.get(chip, {})
    if key not in known:
        listed = ", ".join(f"{chip}:{key}" for chip, settings in CHIPS.items() for key in settings)
        raise ValueError(f"no settings for {name!r}; expected one of {listed}")
    settings = known[key]
    mesh = MeshConfig(settings.data, settings.fsdp, settings.tensor, settings.slices)
    compute = dataclasses.replace(
        config.compute, remat=settings.remat, videos_at_once=settings.videos_at_once, attention="auto"
    )
    data = dataclasses.replace(config.data, batch_size=settings.batch_size)
    return dataclasses.replace(config, mesh=mesh, compute=compute, data=data, accumulate=settings.accumulate)
