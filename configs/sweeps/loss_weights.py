"""What each loss of the dialogue model is worth: the weights of configs/interllava_7b.py, one at a time, and without.

    python -m launch.sweep --config=configs/sweeps/loss_weights.py:v5e:16x16 --out=OUT --config.init=MODEL \\
      --config.data.dialogues=DATA/ivcr200k --config.data.videos=FEATURES

10 runs.
"""

from collections.abc import Callable

from configs.interllava_7b import get_config

__all__ = ["get_config", "sweep"]


def sweep(add: Callable[..., None]) -> None:
    """Half, twice and, but for the text, none of each loss; the moment's two regressions go together."""
    add()
    for loss, weights in {"lm": (0.5, 2.0), "rank": (0.0, 0.5, 2.0), "moment": (0.5, 2.0)}.items():
        for weight in weights:
            add(**{f"losses.{loss}": weight})
    for weight in (0.0, 1.0):
        add(**{"losses.moment_l1": weight, "losses.moment_iou": weight})
