"""The manifest: one JSON line for every row or video that a build rejected, cut, repaired or flagged.

Nothing is lost silently: builders write every such case here, count them by reason, and refuse to finish when
too much was lost. It knows nothing of what the rows mean.
"""

import collections
import contextlib
import dataclasses
import json
import uuid
from collections.abc import Iterable, Iterator

from etils import epath

# rejected: the whole row or video is gone. cut: some turns are gone. repaired: kept, with a value changed.
# flagged: kept as it is, but a reader may care.
ACTIONS = ("rejected", "cut", "repaired", "flagged")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One case: `id` of the row, the `field` at fault, a `reason` to count by, what was done, what was found."""

    id: str
    field: str
    reason: str
    action: str
    detail: str = ""

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise ValueError(f"action {self.action!r} of manifest entry {self.id!r}: expected one of {ACTIONS}")


class TooMuchLost(Exception):
    """A build lost more than the share it may lose. The message holds the counts."""


def write(path: epath.PathLike, entries: Iterable[Entry]) -> collections.Counter[str]:
    """Writes entries as JSON lines, atomically. Returns counts by "action: reason"."""
    counts: collections.Counter[str] = collections.Counter()
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for entry in entries:
            counts[f"{entry.action}: {entry.reason}"] += 1
            file.write(json.dumps(dataclasses.asdict(entry), ensure_ascii=False) + "\n")
    return counts


def read(path: epath.PathLike) -> Iterator[Entry]:
    """Yields the entries of a manifest file."""
    with epath.Path(path).open("r", encoding="utf-8") as file:
        for line in file:
            yield Entry(**json.loads(line))


def check_loss(*, lost: int, seen: int, what: str, max_loss: float, counts: dict[str, int], path: str) -> None:
    """Raises TooMuchLost where `lost` of `seen` exceeds the share `max_loss`, or where nothing is left.

    Args:
      lost: units that will not be in the dataset.
      seen: units the source holds.
      what: the unit's name in the plural, for the message.
      max_loss: share in [0, 1].
      counts: manifest counts by reason.
      path: where the whole manifest lies.
    """
    if seen and lost < seen and lost / seen <= max_loss:
        return
    listed = "; ".join(f"{reason} × {count}" for reason, count in sorted(counts.items(), key=lambda kv: -kv[1]))
    share = f"{100 * lost / seen:.1f} %" if seen else "all"
    raise TooMuchLost(
        f"{lost} of {seen} {what} lost ({share}; at most {100 * max_loss:g} % may be, see max_loss): "
        f"{listed or 'the source is empty'}. Every case is in {path}"
    )


@contextlib.contextmanager
def atomic(path: epath.PathLike) -> Iterator[epath.Path]:
    """A path to write to, a file or a folder; it becomes `path` when the block ends well, else it is removed."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: several processes may write the same file at a time.
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield temporary
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            temporary.rmtree()
        elif temporary.exists():
            temporary.unlink()
