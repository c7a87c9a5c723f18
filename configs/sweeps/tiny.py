"""A sweep for a CPU: the tiny first stage by learning rate and weight of its contrastive loss, 6 runs of 5 minutes.

    python -m launch.sweep --config=configs/sweeps/tiny.py:retriever --out=OUT --config.init=INIT \\
      --config.data.dialogues=DATA/ivcr200k --config.data.videos=FEATURES

with INIT and FEATURES of docs/training.md.
"""

from collections.abc import Callable

from configs.tiny import get_config

__all__ = ["get_config", "sweep"]


def sweep(add: Callable[..., None]) -> None:
    """Peak learning rate by the weight of the contrastive loss."""
    for rate in (1e-3, 2e-3, 4e-3):
        for weight in (0.5, 1.0):
            add(**{"optim.peak_lr": rate, "losses.contrastive": weight})
