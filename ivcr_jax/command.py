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


def keep_programs(folder: str | None) -> None:
    """Keeps compiled programs in a folder, where one is named, so that the next start need not compile them."""
    if folder:
        import jax  # commands that need none are here too

        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
