"""The small run of tests/training, for what launches it."""

from tests.training.conftest import world

__all__ = ["world"]
