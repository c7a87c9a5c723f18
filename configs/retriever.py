"""The first stage. `configs/retriever.py`: SigLIP2-B/16 at 224 pixels, multilingual; `:tiny`: for a CPU.

    python -m ivcr_jax.train --config=configs/retriever.py --workdir=RUN --config.init=SIGLIP \\
      --config.data.dialogues=DATA/ivcr200k --config.data.videos=DATA/ivcr200k_videos
"""

import dataclasses

from ml_collections import ConfigDict

from configs import tiny
from ivcr_jax.checkpoint import CheckpointConfig
from ivcr_jax.config import to_dict
from ivcr_jax.data.prompt import PromptStyle
from ivcr_jax.losses import LossConfig
from ivcr_jax.models.layers import Compute
from ivcr_jax.models.retriever import RetrieverConfig
from ivcr_jax.optim import OptimConfig
from ivcr_jax.training import DataConfig, TrainConfig

CONTRASTIVE = LossConfig(lm=0.0, rank=0.0, moment=0.0, moment_l1=0.0, moment_iou=0.0, contrastive=1.0)


def get_config(arg: str = "") -> ConfigDict:
    """The configuration; `arg` is "" or "tiny"."""
    if arg == "tiny":
        config = dataclasses.replace(tiny.config(), model=None, losses=CONTRASTIVE)
    elif arg:
        raise ValueError(f"configs/retriever.py:{arg}; expected nothing or :tiny after the colon")
    else:
        config = TrainConfig(
            model=None,
            retriever=RetrieverConfig(),
            style=PromptStyle(),
            compute=Compute(remat="full"),
            data=DataConfig(video_slots=48, frames=16, batch_size=64),
            losses=CONTRASTIVE,
            # The text tower and the pooling head; the image tower itself is what SigLIP2 made it.
            optim=OptimConfig(rules=((r"retriever\.vit\.(?!head).*", 0.0), (".*", 1.0)), peak_lr=1e-4, warmup=0.05),
            checkpoint=CheckpointConfig(best="retrieval_r10", higher=True),
            steps=10_000,
        )
    return ConfigDict(to_dict(config))
