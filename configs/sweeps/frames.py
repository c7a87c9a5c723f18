"""How many frames of a video the dialogue model needs: 8 to 64 of the stored ones, 4 runs.

    python -m launch.sweep --config=configs/sweeps/frames.py:v5e:16x16 --out=OUT --config.init=MODEL \\
      --config.data.dialogues=DATA/ivcr200k --config.data.videos=FEATURES

The windows of the video Q-Former are as published, 32 frames, so up to 32 a video has 32 visual tokens and with 64 it
has 64. Rows are as long for all: with fewer tokens a video more dialogues share one.
"""

from collections.abc import Callable

from configs.interllava_7b import get_config

__all__ = ["get_config", "sweep"]


def sweep(add: Callable[..., None]) -> None:
    """Frames a video."""
    for frames in (8, 16, 32, 64):
        add(**{"data.frames": frames})
