"""A pod on one machine: several processes with virtual CPU devices as one job, any of which may be killed on request.

    python -m launch.local_pod --processes=N --devices=M [--kill=PROCESS@STEP] [--restarts=R] [--logs=DIR] [--dry_run]
        -- COMMAND...

Each process is COMMAND with --coordinator, --processes and --process_id behind it. When one dies the others are killed,
and the whole pod starts again, up to R times: a training run goes on where its newest checkpoint stands. What each says
is in DIR/process-I.log; of the first it is shown too. Status: 0, or that of the first that died (128 + N for signal N);
told to stop by a signal, it passes SIGTERM on, waits until the run has saved, and ends with 128 + N.
"""

import ctypes
import dataclasses
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from absl import app, flags

POLL = 0.05  # seconds
PATIENCE = 60.0  # seconds that processes are given to save
STEP = re.compile(r"^step (\d+)\b", re.MULTILINE)  # as ivcr_jax/telemetry.py tells of it


@dataclasses.dataclass(frozen=True)
class Kill:
    """Which process is to be killed, and when: after a step was told of, or so many seconds; the other is None."""

    process: int
    step: int | None
    seconds: float | None

    @classmethod
    def parse(cls, text: str, processes: int) -> "Kill":
        """Of PROCESS@STEP, as 2@5, or PROCESS@SECONDSs, as 2@10s. Raises ValueError for anything else."""
        found = re.fullmatch(r"(\d+)@(?:(\d+)|(\d+(?:\.\d+)?)s)", text)
        if not found:
            raise ValueError(f"--kill is {text!r}; expected PROCESS@STEP, as 2@5, or PROCESS@SECONDSs, as 2@10s")
        process, step, seconds = found.groups()
        if int(process) >= processes:
            raise ValueError(f"--kill names process {process}; expected one of 0 to {processes - 1}")
        return cls(int(process), None if step is None else int(step), None if seconds is None else float(seconds))


class Pod:
    """The processes of one job, and their logs.

    Args:
      command: words. processes, devices: how many, and devices each. logs: the folder of the logs, which are added to.
    """

    def __init__(self, command: Sequence[str], processes: int, devices: int, logs: pathlib.Path) -> None:
        self.command, self.processes, self.devices, self.logs = command, processes, devices, logs
        self.told = 0  # the signal that came last

    def words(self, process: int, port: int) -> list[str]:
        """The command of a process."""
        joined = [f"--coordinator=localhost:{port}", f"--processes={self.processes}", f"--process_id={process}"]
        return [*self.command, *joined]

    def settings(self) -> dict[str, str]:
        """What is set in each process's environment."""
        kept = re.sub(r"--xla_force_host_platform_device_count=\d+\s*", "", os.environ.get("XLA_FLAGS", ""))
        count = f"--xla_force_host_platform_device_count={self.devices}"
        return {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{kept} {count}".strip(),
            # Only the first process finds its programs in the cache; while the others compile its patience may end.
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "PYTHONUNBUFFERED": "1",
        }

    def log(self, process: int) -> pathlib.Path:
        """Where a process's output goes."""
        return self.logs / f"process-{process}.log"

    def lines(self) -> list[str]:
        """What would be run, as shell."""
        port = free_port()
        settings = shlex.join(["env", *(f"{name}={value}" for name, value in self.settings().items())])
        runs = [
            f"{settings} {shlex.join(self.words(process, port))} >> {shlex.quote(str(self.log(process)))} 2>&1 &"
            for process in range(self.processes)
        ]
        return [f"mkdir -p {shlex.quote(str(self.logs))}", *runs, "wait"]

    def run(self, kill: Kill | None = None) -> tuple[int, int] | None:
        """Runs the job once. None where all ended well, else who died first and its return code (-N for signal N).

        Told to stop by a signal, it returns when all have ended.
        """
        begun = time.monotonic()
        waited = None
        before = self.log(0).stat().st_size if self.log(0).exists() else 0
        with self._started() as running, self.log(0).open(errors="replace") as shown:
            shown.seek(before)
            line = ""
            while True:
                codes = [process.poll() for process in running]
                ended = None not in codes
                line += shown.read()
                whole, _, line = line.rpartition("\n")
                if whole:
                    print(whole, flush=True)
                dead = [(index, code) for index, code in enumerate(codes) if code]
                if ended or (dead and not self.told):
                    if kill and not dead:
                        say(f"all ended before process {kill.process} was to be killed")
                    return dead[0] if dead else None
                if self.told and waited is None:
                    waited = time.monotonic()
                    for process in running:
                        process.terminate()
                if waited is not None and time.monotonic() - waited > PATIENCE:
                    say(f"processes still ran {PATIENCE:.0f} s after they were told to stop; killed")
                    return None
                if kill and _due(kill, whole, time.monotonic() - begun):
                    say(f"killing process {kill.process}, as asked")
                    running[kill.process].kill()
                    kill = None
                time.sleep(POLL)

    @contextmanager
    def _started(self) -> Iterator[list[subprocess.Popen[bytes]]]:
        """The processes, each the head of a group of its own; no process of these groups is left in the end."""
        port, running = free_port(), list[subprocess.Popen[bytes]]()
        try:
            for index in range(self.processes):
                with self.log(index).open("ab") as log:
                    running.append(
                        subprocess.Popen(
                            self.words(index, port),
                            env=os.environ | self.settings(),
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,
                            preexec_fn=die_with_parent,
                        )
                    )
            yield running
        finally:
            for process in running:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def tell(self, number: int, _: FrameType | None) -> None:
        """The handler of a signal."""
        self.told = number


def _due(kill: Kill, said: str, seconds: float) -> bool:
    if kill.seconds is not None:
        return seconds >= kill.seconds
    return any(int(step) >= (kill.step or 0) for step in STEP.findall(said))


def die_with_parent() -> None:
    """Asks Linux to kill this process when the one that started it is gone, even by kill -9."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def say(sentence: str) -> None:
    """For the person at the terminal."""
    print(f"local_pod: {sentence}", file=sys.stderr, flush=True)


def keep_running(pod: Pod, kill: Kill | None, restarts: int) -> int:
    """Runs a pod, again where it dies, and returns the exit status."""
    for start in range(restarts + 1):
        failed = pod.run(kill if start == 0 else None)
        if pod.told:
            say(f"told to stop by {signal.Signals(pod.told).name}; all processes have ended")
            return 128 + pod.told
        if failed is None:
            return 0
        process, code = failed
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        left = (
            f"start {start + 2} of {restarts + 1}"
            if start < restarts
            else f"after {start + 1} starts, no more are left"
        )
        say(f"process {process} {how}, and the others were killed ({pod.log(process)}); {left}")
    return code if code > 0 else 128 - code


def main(argv: list[str]) -> None:
    """Runs the pod."""
    args = flags.FLAGS
    try:
        if not (command := argv[1:]):
            raise ValueError("the command is missing; it follows --")
        if not shutil.which(command[0]):
            raise ValueError(f"found no program {command[0]!r} to run")
        kill = Kill.parse(args.kill, args.processes) if args.kill else None
    except ValueError as error:
        sys.exit(f"local_pod: {error}")
    logs = pathlib.Path(args.logs or ("local_pod_logs" if args.dry_run else tempfile.mkdtemp(prefix="local_pod_")))
    pod = Pod(command, args.processes, args.devices, logs)
    if args.dry_run:
        print("\n".join(pod.lines()))
        return
    logs.mkdir(parents=True, exist_ok=True)
    say(f"logs in {logs}")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pod.tell)
    sys.exit(keep_running(pod, kill, args.restarts))


if __name__ == "__main__":
    flags.DEFINE_integer("processes", None, "How many processes.", lower_bound=1, required=True)
    flags.DEFINE_integer("devices", None, "Virtual CPU devices of each.", lower_bound=1, required=True)
    flags.DEFINE_string("kill", None, "PROCESS@STEP or PROCESS@SECONDSs: kill -9 it then, at the first start only.")
    flags.DEFINE_integer("restarts", 0, "How often the pod starts again when a process dies.", lower_bound=0)
    flags.DEFINE_string("logs", None, "Folder of the processes' output; a new one below /tmp otherwise.")
    flags.DEFINE_bool("dry_run", False, "Print what would be run, run nothing.")
    app.run(main)
