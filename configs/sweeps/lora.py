"""How much of the decoder to adapt, and how fast: LoRA's rank by the learning rate, 9 runs around the published ones.

    python -m launch.sweep --config=configs/sweeps/lora.py:v5e:16x16 --out=OUT --config.init=MODEL \\
      --config.data.dialogues=DATA/ivcr200k --config.data.videos=FEATURES
"""

from collections.abc import Callable

from configs.interllava_7b import get_config

__all__ = ["get_config", "sweep"]


def sweep(add: Callable[..., None]) -> None:
    """alpha goes with the rank, so that the addition's scale alpha / rank is always the published one, 1."""
    for rank in (8, 32, 128):
        for rate in (1e-5, 3e-5, 1e-4):
            add(**{"model.lora.rank": rank, "model.lora.alpha": float(rank), "optim.peak_lr": rate})
