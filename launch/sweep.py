"""Runs all that a config's `sweep(add)` asks for: so many at a time, each from its checkpoint when it is started again.

    python -m launch.sweep --config=configs/sweeps/X.py[:ARGUMENT] --out=OUT [--config.field=value ...]
        [--backend=local|dry_run|slurm|tpu_vm|gke] [--max_parallel=N] [--retries=N] [--select=NAME_OR_GLOB ...]
    python -m launch.sweep --out=OUT --report [--metric=NAME --mode=max|min]

Ctrl-C or SIGTERM stops it: its runs save, and the same command goes on. docs/launch.md says what is in OUT, and what
the other backends need.
"""

import collections
import contextlib
import dataclasses
import fnmatch
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from types import FrameType

from absl import app, flags

from ivcr_jax import command
from ivcr_jax.config import listed
from ivcr_jax.export import revision
from launch import manifest, report
from launch.backends import SUBMIT, Backend
from launch.expand import Run, expand
from launch.manifest import Entry, Lock, Manifest

BACKENDS = ("local", "dry_run", "slurm", "tpu_vm", "gke")
TAIL = 10  # lines of stderr that are kept of a run that failed
LOOK_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class _Job:
    """A run that is going. Attributes: process: None where a sweep before this one started it. lock: the run's, held
    here; None likewise. pid: of its first process."""

    process: subprocess.Popen[bytes] | None
    lock: Lock | None
    pid: int


class Stop:
    """SIGINT and SIGTERM, noted. Attributes: signal: the number of the one that came, or 0."""

    def __init__(self) -> None:
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = self.signal or number


class Sweep:
    """The runs of a folder, on one backend. The folder must be locked (`manifest.locked`)."""

    def __init__(self, held: Manifest, runs: Iterable[Run], backend: Backend, say: Callable[[str], None]) -> None:
        self._held, self._backend, self._say = held, backend, say
        self._flags = {run.name: run.flags for run in runs}
        self._jobs: dict[str, _Job] = {}

    def run(self, names: Sequence[str], *, max_parallel: int, retries: int, again: bool, stop: Stop) -> None:
        """Does these runs, until each is done, failed or submitted, or the sweep is told to stop.

        Args:
          names: of the runs, in the order they are started in.
          max_parallel: at a time. retries: how often a run that failed is started again.
          again: whether those that failed for good, or were submitted, are started once more.
        """
        waiting = collections.deque(name for name in names if self._to_do(name, retries, again))
        told = False
        try:
            while waiting or self._jobs:
                if stop.signal and not told:
                    told = True
                    waiting.clear()
                    self._say(f"told to stop: {len(self._jobs)} runs save, and end")
                    self._stop_all()
                while waiting and len(self._jobs) < max_parallel and not stop.signal:
                    self._start(waiting.popleft())
                for name in [name for name, job in self._jobs.items() if _ended(job, self._lock_of(name))]:
                    entry = self._conclude(name, told)
                    if not told and (entry.status == "stopped" or _may_again(entry, retries)):
                        waiting.append(name)
                time.sleep(LOOK_SECONDS)
        except BaseException:  # such as a full disk: nobody will look after them, and the next sweep finds them
            self._stop_all()
            raise

    def _to_do(self, name: str, retries: int, again: bool) -> bool:
        """Whether a run is to be started. One that is going already, of a sweep that was killed, is taken over."""
        entry = self._held.seen(name)
        lock = manifest.take(self._lock_of(name))
        if lock is None:
            self._take_over(name)
            return False
        lock.close()
        if entry.status == "running":  # it ended while no sweep looked
            entry = dataclasses.replace(entry, status=_unseen(entry))
        if again and entry.status in ("failed", "submitted"):
            entry = dataclasses.replace(entry, status="pending", failures=0)
        if entry != self._held.entries[name]:
            self._held.put(entry)
        return entry.status in ("pending", "stopped") or _may_again(entry, retries)

    def _take_over(self, name: str) -> None:
        pid = int(self._lock_of(name).read_text() or 0)
        self._jobs[name] = _Job(None, None, pid)
        self._say(f"{name}: a process of before still goes{f', {pid}' if pid else ''}; waiting for it")

    def _start(self, name: str) -> None:
        lock = manifest.take(self._lock_of(name))
        if lock is None:
            self._take_over(name)
            return
        lock.note(None)
        line = self._backend.command(self._flags[name], self._held.workdir(name))
        before = self._held.entries[name]
        entry = dataclasses.replace(
            before,
            status="running",
            attempts=before.attempts + 1,
            backend=self._backend.name,
            command=tuple(line),
            revision=revision(),
        )
        # First the manifest: a process that nobody knows of is worse than an attempt that never began.
        self._held.put(entry)
        folder = self._held.out / name
        with (folder / "stdout.txt").open("ab") as out, (folder / "stderr.txt").open("ab") as err:
            err.write(f"{_head(entry)}\n".encode())
            err.flush()
            try:
                process = subprocess.Popen(
                    line,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    pass_fds=[lock.fd],
                    start_new_session=True,  # Ctrl-C is the sweep's: a run is told by SIGTERM, and saves
                )
            except OSError:  # no run is to blame where the script is not there
                self._held.put(before)
                raise
        lock.note(process.pid)
        self._jobs[name] = _Job(process, lock, process.pid)
        self._say(f"{name}: started" + (f", attempt {entry.attempts}" if entry.attempts > 1 else ""))

    def _stop_all(self) -> None:
        """Tells all runs to save and end; to hand a job to a scheduler takes seconds, and is left to end by itself."""
        for name, job in [*self._jobs.items()]:
            if self._held.entries[name].backend in SUBMIT or _ended(job, self._lock_of(name)):
                continue
            if not job.pid:  # its sweep was killed before it could note whom it had started
                self._say(f"{name}: goes on, as nobody knows its process; the next sweep waits for it")
                del self._jobs[name]
                continue
            with contextlib.suppress(ProcessLookupError):
                os.kill(job.pid, signal.SIGTERM)  # and not to its group: it ends its own children when it has saved

    def _conclude(self, name: str, told: bool) -> Entry:
        """Notes how a run ended."""
        job = self._jobs.pop(name)
        if job.lock is not None:
            job.lock.close()
        code = None if job.process is None else job.process.returncode
        entry = dataclasses.replace(self._held.seen(name), exit_code=code)
        submits = entry.backend in SUBMIT
        if entry.status == "done":
            words = f"done, step {entry.step}"
        elif code is None or (code == 0 if submits else told):
            status = _unseen(entry)
            entry = dataclasses.replace(entry, status=status, error="")
            words = f"{status}, step {entry.step}"
        else:
            entry = dataclasses.replace(
                entry, status="failed", failures=entry.failures + 1, error=self._error(code, entry)
            )
            words = f"failed: {report.last_line(entry.error)}"
        self._held.put(entry)
        self._say(f"{name}: {words}")
        return entry

    def _error(self, code: int, entry: Entry) -> str:
        """What a run said last on stderr, or what its exit status says where it said nothing of its own."""
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        if code == 0:
            where, last = self._held.workdir(entry.name), entry.values["steps"]
            return f"told to stop by another, or not seen from here: no checkpoint of step {last} in {where}"
        text = (self._held.out / entry.name / "stderr.txt").read_text(errors="replace")
        said = [line for line in text.rpartition(_head(entry))[2].splitlines() if line.strip()]
        return "\n".join(said[-TAIL:]) or f"exit status {code}"

    def _lock_of(self, name: str) -> pathlib.Path:
        return self._held.out / name / "lock"


def _unseen(entry: Entry) -> str:
    """The status of a run whose process is gone, and that is not done: a scheduler may have the job."""
    return "submitted" if entry.backend in SUBMIT else "stopped"


def _may_again(entry: Entry, retries: int) -> bool:
    return entry.status == "failed" and entry.failures <= retries


def _ended(job: _Job, lock: pathlib.Path) -> bool:
    if job.process is not None:
        return job.process.poll() is not None
    free = manifest.take(lock)
    if free is not None:
        free.close()
    return free is not None


def _head(entry: Entry) -> str:
    return f"--- attempt {entry.attempts}: {shlex.join(entry.command)}"


def selected(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that any pattern matches; all where there is none. Raises ValueError for one that matches nothing."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"--select={pattern} fits no run; the runs are {listed(names, 30)}")
    return [name for name in names if not patterns or any(fnmatch.fnmatchcase(name, each) for each in patterns)]


def main(argv: list[str]) -> None:
    """Runs a sweep, or reports on one."""
    args = flags.FLAGS
    given = [arg for arg in argv[1:] if arg.startswith("--config.")]
    command.refuse_arguments([arg for arg in argv if arg not in given])
    command.quiet()
    try:
        out = _out(args.out)
        if args.report:
            print(report.report(manifest.read(out), args.metric, args.mode))
            return
        stop = Stop()
        code = _sweep(out, given, stop)
    except (ValueError, OSError) as error:
        sys.exit(f"sweep: {error}")
    sys.exit(code)


def _sweep(out: pathlib.Path, given: Sequence[str], stop: Stop) -> int:
    """Does as the flags say. Returns the exit status: 0 where all that was selected is done or submitted."""
    args = flags.FLAGS
    if not args.config:
        raise ValueError("found no --config, expected configs/sweeps/X.py[:argument]; --report alone needs none")
    dry = args.backend == "dry_run"
    backend = Backend("local" if dry else args.backend, tuple(shlex.split(args.backend_args)))
    if backend.args and backend.name == "local":
        raise ValueError(f"--backend_args={args.backend_args}: {args.backend} has no script that takes them")
    if backend.at_once and args.max_parallel > backend.at_once:
        raise ValueError(
            f"--max_parallel={args.max_parallel} on the one TPU VM that is named; expected 1, or no --name= in "
            "--backend_args, for a TPU VM of its own for each run"
        )
    runs = expand(args.config, given)
    workdirs = args.workdirs.rstrip("/") if args.workdirs else str(out)
    if not args.workdirs or "://" not in workdirs:
        workdirs = str(pathlib.Path(workdirs).resolve())
    names = selected([run.name for run in runs], args.select)
    if dry or backend.dry:
        held = manifest.merged(out, workdirs, runs)
        return _print(held, [run for run in runs if run.name in names], backend, shown=not dry)
    with manifest.locked(out):
        held = manifest.merged(out, workdirs, runs)
        manifest.check_begun(held, runs)
        held.write()
        left = [name for name in held.entries if name not in {run.name for run in runs}]
        if left:
            print(f"no longer in the sweep, and left as they are: {listed(left)}", flush=True)
        sweep = Sweep(held, runs, backend, lambda line: print(line, flush=True))
        sweep.run(names, max_parallel=args.max_parallel, retries=args.retries, again=args.again, stop=stop)
        counts = collections.Counter(held.entries[name].status for name in names)
    print(f"{out}: " + ", ".join(f"{counts[status]} {status}" for status in manifest.STATUSES if counts[status]))
    if stop.signal:
        print("stopped; the same command goes on")
        return 128 + stop.signal
    return int(bool(counts["failed"]))


def _print(held: Manifest, runs: Iterable[Run], backend: Backend, *, shown: bool) -> int:
    """Prints the commands of runs, but for those that the manifest has as done or submitted, and with `shown` what
    their script would run. Workdirs are not looked at: where these are, a laptop may have no access.
    """
    for run in runs:
        if held.entries[run.name].status in ("done", "submitted"):
            continue
        line = backend.command(run.flags, held.workdir(run.name))
        print(shlex.join(line), flush=True)
        if shown and (code := subprocess.run(line, check=False).returncode):
            return code
    return 0


def parse(argv: list[str]) -> list[str]:
    """Reads the flags as absl does; the configuration's own, which a run's command gets, are arguments."""
    of_runs = [arg for arg in argv if arg.startswith("--config.")]
    return [*app.parse_flags_with_usage([arg for arg in argv if arg not in of_runs]), *of_runs]


def _out(path: str) -> pathlib.Path:
    if "://" in path:
        raise ValueError(f"--out: found {path}, expected a folder of this machine; --workdirs may be elsewhere")
    return pathlib.Path(path).resolve()


if __name__ == "__main__":
    flags.DEFINE_string("config", None, "configs/sweeps/X.py[:argument]. --config.field=value is for every run.")
    flags.DEFINE_string("out", None, "The folder of the sweep.", required=True)
    flags.DEFINE_string("workdirs", None, "Where the runs are kept, if not in --out: of all hosts, as gs://BUCKET/X.")
    flags.DEFINE_enum("backend", "local", [*BACKENDS], "Where runs are done; dry_run prints the commands.")
    flags.DEFINE_string("backend_args", "", "For the backend's script, as a shell would read them.")
    flags.DEFINE_integer("max_parallel", 1, "Runs at a time.", lower_bound=1)
    flags.DEFINE_integer("retries", 2, "How often a run that failed or was killed is started again.", lower_bound=0)
    flags.DEFINE_multi_string("select", [], "Names of runs, or globs. May be given several times.")
    flags.DEFINE_bool("again", False, "Also those that failed for good, or were submitted and are not done.")
    flags.DEFINE_bool("report", False, "Prints and draws what the runs have come to, and starts nothing.")
    report.define_flags()
    app.run(main, flags_parser=parse)
