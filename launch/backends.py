"""What is run for one run of a sweep: `ivcr_jax.train` itself, or a script of this folder that runs it elsewhere.

It makes command lines; it starts nothing.
"""

import dataclasses
import hashlib
import pathlib
import re
import sys
from collections.abc import Sequence

FOLDER = pathlib.Path(__file__).resolve().parent
SUBMIT = ("slurm", "gke")  # whose command ends when a scheduler has the job, long before the run is done
LONGEST_JOB = 40  # letters; Kubernetes allows a pod 63, and puts numbers behind


@dataclasses.dataclass(frozen=True)
class Backend:
    """Where runs are done.

    Attributes:
      name: "local", "slurm", "tpu_vm" or "gke".
      args: of its script, for every run.
    """

    name: str
    args: tuple[str, ...] = ()

    @property
    def dry(self) -> bool:
        """Whether its script was asked to print what it would run, and to run nothing."""
        return "--dry_run" in self.args

    @property
    def at_once(self) -> int | None:
        """How many runs it can do at a time; None for any number. A TPU VM that is named does one."""
        return 1 if self.name == "tpu_vm" and self._named else None

    @property
    def _named(self) -> bool:
        return any(arg.startswith("--name=") for arg in self.args)

    def command(self, flags: Sequence[str], workdir: str) -> list[str]:
        """The command line of a run.

        Args:
          flags: of `ivcr_jax.train`, but for the workdir.
        """
        train = ["-m", "ivcr_jax.train", *flags, f"--workdir={workdir}"]
        if self.name == "local":
            return [sys.executable, *train]
        job, there = job_name(workdir), ["--", "python", *train]
        if self.name == "slurm":  # whose script tells the processes of each other
            return [str(FOLDER / "slurm.sh"), f"--job_name={job}", *self.args, *there]
        there.append("--distributed")
        if self.name == "gke":
            return [sys.executable, "-m", "launch.gke", f"--name={job}", *self.args, *there]
        if self._named:
            return [str(FOLDER / "run_tpu.sh"), *self.args, *there]
        return [str(FOLDER / "queued_resource.sh"), f"--name={job}", *self.args, *there]


def job_name(workdir: str) -> str:
    """A name that Kubernetes, Google Cloud and Slurm allow, the same for the same workdir."""
    name = re.sub(r"[^a-z0-9]+", "-", workdir.rpartition("/")[2].lower()).strip("-")
    return f"r-{name[: LONGEST_JOB - 11]}".rstrip("-") + "-" + hashlib.sha256(workdir.encode()).hexdigest()[:8]
