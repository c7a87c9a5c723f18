"""Sweeps: a `sweep(add)` beside `get_config`, for `python -m launch.sweep` (docs/launch.md)."""
