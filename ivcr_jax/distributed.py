"""Several processes as one machine: the flags that join them, the same for every program that runs on a pod."""

import jax
from absl import flags


def define_flags() -> None:
    """Called by a program's own entry point, not at import: another may have flags of the same names."""
    flags.DEFINE_bool("distributed", False, "Join the processes of a TPU pod, Slurm or Kubernetes job by themselves.")
    flags.DEFINE_string("coordinator", None, "host:port of the first process, to join processes by hand.")
    flags.DEFINE_integer("processes", None, "How many processes, with --coordinator.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, with --coordinator.")


def start() -> None:
    """Joins the processes as the flags say, before anything touches a device. Nothing where they say nothing.

    Raises ValueError for flags that need another: without it each process would train a model of its own.
    """
    args = flags.FLAGS
    by_hand = {name: args[name].value for name in ("coordinator", "processes", "process_id")}
    lacking = [f"--{name}" for name, value in by_hand.items() if value is None]
    if lacking and len(lacking) < len(by_hand):
        given = [f"--{name}" for name, value in by_hand.items() if value is not None]
        raise ValueError(f"found {' and '.join(given)} without {' and '.join(lacking)}; expected all three, or none")
    if args.coordinator:
        jax.distributed.initialize(args.coordinator, args.processes, args.process_id)
    elif args.distributed:
        jax.distributed.initialize()
