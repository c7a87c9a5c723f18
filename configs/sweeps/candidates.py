"""How many candidates a turn brings in training: the true video and 1, 4 or 9 others, 3 runs.

    python -m launch.sweep --config=configs/sweeps/candidates.py:v5e:16x16 --out=OUT --config.init=MODEL \\
      --config.data.dialogues=DATA/ivcr200k --config.data.videos=FEATURES

Compare them by what all are asked alike, which validation in the loop is not, as it takes the run's own number of
candidates: export each, and `python -m ivcr_jax.evaluate`.
"""

from collections.abc import Callable

from configs.interllava_7b import get_config

__all__ = ["get_config", "sweep"]


def sweep(add: Callable[..., None]) -> None:
    """Candidates a turn."""
    for candidates in (2, 5, 10):
        add(**{"data.max_candidates": candidates})
