"""OUT/sweep.json: what became of each run of a sweep; and the locks that keep two programs off one sweep or one run.

    OUT/sweep.json            the manifest, rewritten whole at every change
    OUT/lock                  held while a sweep works on it
    OUT/NAME/                 stdout.txt, stderr.txt, lock: held by a run's own process as long as it lives
    WORKDIRS/NAME/            the run's workdir; WORKDIRS is OUT where nothing else is said

A run's process inherits its lock, so a sweep that was killed leaves runs that the next one finds going, and waits for.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from ivcr_jax import checkpoint, telemetry
from ivcr_jax.config import flat, listed
from ivcr_jax.data.manifest import atomic
from ivcr_jax.train import CONFIG
from launch.expand import Run

FILE = "sweep.json"
VERSION = 1
# pending: not started yet. running. submitted: handed to a scheduler. stopped: with its sweep, to go on. failed: ended
# otherwise than done; tried again as long as it may be. done: its last step's checkpoint is there.
STATUSES = ("pending", "running", "submitted", "stopped", "failed", "done")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A run, and what became of it.

    Attributes:
      name, config, overrides, values: as `expand.Run` has them.
      status: one of STATUSES.
      attempts: how often it was started. failures: how often it ended otherwise than done, or stopped with its sweep.
      exit_code: of its last process; negative is a signal's number; None where there is none, or nobody saw it.
      error: how it failed: the last lines it wrote to stderr, or a sentence.
      step: of the newest metrics. metrics: the last of each, by name; None where it was no number.
      backend, command: that it was started with last. revision: of this code then (`ivcr_jax.export.revision`).
    """

    name: str
    config: str
    overrides: Mapping[str, Any]
    values: Mapping[str, Any]
    status: str = "pending"
    attempts: int = 0
    failures: int = 0
    exit_code: int | None = None
    error: str = ""
    step: int = 0
    metrics: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    backend: str = ""
    command: tuple[str, ...] = ()
    revision: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, run: Run) -> "Entry":
        """Of a run that nobody started yet."""
        return cls(run.name, run.config, run.overrides, run.values)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Attributes: out: the sweep's folder. workdirs: the folder of the runs' workdirs. entries: by name."""

    out: pathlib.Path
    workdirs: str
    entries: dict[str, Entry]

    def workdir(self, name: str) -> str:
        """Where a run is kept."""
        return f"{self.workdirs}/{name}"

    def seen(self, name: str) -> Entry:
        """An entry with what its workdir tells now: metrics, and whether the run is done."""
        entry, workdir = self.entries[name], self.workdir(name)
        if rows := telemetry.rows(workdir):
            metrics = {key: value for row in rows for key, value in row.items() if key not in ("step", "time")}
            entry = dataclasses.replace(entry, step=rows[-1]["step"], metrics=metrics)
        done = entry.status == "done" or entry.values["steps"] in checkpoint.saved(workdir)
        return dataclasses.replace(entry, status="done", error="") if done else entry

    def put(self, entry: Entry) -> None:
        """Changes an entry, and writes the manifest."""
        self.entries[entry.name] = entry
        self.write()

    def write(self) -> None:
        """Writes the manifest, whole or not at all."""
        body = self._body()
        with atomic(self.out / FILE) as aside:
            aside.write_text(json.dumps({"sweep": VERSION, "sha256": _sha256(body), **body}, indent=1) + "\n")

    def _body(self) -> dict[str, Any]:
        # Workdirs below OUT are wherever OUT is, should it be moved.
        own = "" if self.workdirs == str(self.out) else self.workdirs
        return {"workdirs": own, "runs": [dataclasses.asdict(entry) for entry in self.entries.values()]}


def read(out: pathlib.Path) -> Manifest:
    """The manifest of a sweep's folder.

    Raises FileNotFoundError; ValueError, one sentence, where it is not as it was written.
    """
    path = out / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{out}: found no {FILE}, expected the folder of a sweep")
    mend = f"Move it away and start the sweep again: runs go on from what is in their own folders below {out}"
    try:
        found = json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path}: found what is no JSON; was it cut off, or edited? {mend}") from None
    if not isinstance(found, dict) or found.get("sweep") != VERSION:
        raise ValueError(f"{path}: found another file, expected a sweep's manifest of version {VERSION}")
    body = {name: value for name, value in found.items() if name not in ("sweep", "sha256")}
    if found.get("sha256") != _sha256(body):
        raise ValueError(f"{path}: found other contents than were written; was it edited? {mend}")
    entries = [Entry(**values | {"command": tuple(values["command"])}) for values in body["runs"]]
    return Manifest(out, body["workdirs"] or str(out), {entry.name: entry for entry in entries})


def merged(out: pathlib.Path, workdirs: str, runs: Iterable[Run]) -> Manifest:
    """The manifest that a sweep of these runs begins or goes on with. Writes nothing, and looks at no workdir.

    Raises ValueError where the folder's runs were begun with another configuration, or are kept elsewhere.
    """
    before = read(out) if (out / FILE).exists() else Manifest(out, workdirs, {})
    if before.workdirs != workdirs:
        raise ValueError(f"--workdirs: this sweep's runs are in {before.workdirs}, expected that and not {workdirs}")
    entries = dict(before.entries)
    for run in runs:
        _same(run, entries.setdefault(run.name, Entry.of(run)).values, out)
    return Manifest(out, workdirs, entries)


def check_begun(held: Manifest, runs: Iterable[Run]) -> None:
    """Raises ValueError where a run's workdir was begun with another configuration: the manifest may have been lost."""
    for run in runs:
        path = epath.Path(held.workdir(run.name)) / CONFIG
        if path.exists():
            _same(run, json.loads(path.read_text()), held.out)


def _same(run: Run, values: Mapping[str, Any], out: pathlib.Path) -> None:
    then, now = flat(values), flat(run.values)
    if other := sorted(path for path in {*then} | {*now} if then.get(path) != now.get(path)):
        changed = listed([f"{path} {then.get(path)!r} and not {now.get(path)!r}" for path in other], 3)
        raise ValueError(f"{out}: {run.name} was begun with {changed}; expected the same, or a new --out")


@contextlib.contextmanager
def locked(out: pathlib.Path) -> Iterator[None]:
    """Nobody else's sweep works on a folder meanwhile. Raises ValueError where one does."""
    out.mkdir(parents=True, exist_ok=True)
    lock = take(out / "lock")
    if lock is None:
        raise ValueError(f"{out}: another sweep works on it; expected to be the only one")
    with contextlib.closing(lock):
        yield


class Lock:
    """A file that is locked until all who inherited it are gone. Attributes: fd: its descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Lets go of it here; a process that inherited it goes on holding it."""
        os.close(self.fd)

    def note(self, pid: int | None) -> None:
        """Writes whose it will be; None takes back what was written before."""
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, str(pid or "").encode(), 0)


def take(path: pathlib.Path) -> Lock | None:
    """Locks a file, or None where it is locked."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return Lock(fd)


def _sha256(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
