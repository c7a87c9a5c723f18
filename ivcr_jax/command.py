"""What the commands have in common, before their work begins."""

from collections.abc import Sequence

from absl import app, flags, logging


def refuse_arguments(argv: Sequence[str]) -> None:
    """Raises app.UsageError where something was given that is no flag."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; options are written --name=value")


def quiet() -> None:
    """Warnings alone, as Orbax tells of every file; not where --verbosity was given."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
