"""A file of JSON lines: one that says what the others were made from, then one of each result.

It can grow: who is stopped, even by `kill -9`, leaves at most half a line, and the next goes on behind the last whole
one. It knows nothing of what the lines mean.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, TypeVar

from ivcr_jax.config import listed
from ivcr_jax.data import manifest

T = TypeVar("T")
Parse = Callable[[Any, int], T]  # a line's JSON value and its number from 1; raises ValueError


def read(path: str, kind: str, parse: Parse[T]) -> tuple[dict[str, Any], list[T]]:
    """The first line and what became of the others; half a last line is passed over.

    Args:
      path: the file. kind: of lines, a key of the first one. parse: a line's value and number to what it means.

    Raises FileNotFoundError; ValueError, one sentence, where the file is not of the kind or a line is none.
    """
    with open(os.path.expanduser(path), "rb") as file:
        header, rows, _ = _parsed(file, path, kind, parse, None)
    if header is None:
        raise ValueError(f"{path}: found no whole line, expected {kind}")
    return header, rows


def write(path: str, header: dict[str, Any], rows: Iterable[Any]) -> None:
    """Writes a whole file, which appears when it is complete."""
    with manifest.atomic(os.path.expanduser(path)) as temporary, temporary.open("wb") as file:
        file.write(_line(header))
        for row in rows:
            file.write(_line(row))


@contextlib.contextmanager
def growing(
    path: str, header: dict[str, Any], kind: str, parse: Parse[T]
) -> Iterator[tuple[Callable[[Any], None], list[T]]]:
    """A function that writes a line behind the last whole one, and what became of those that are there.

    Args:
      path: the file, to begin or to go on with. header: its first line. kind, parse: as `read`.

    Raises:
      FileNotFoundError: there is no folder to write to.
      ValueError: the file is something else, was made from other things, or is being written. Nothing has been changed.
    """
    file_path = os.path.expanduser(path)
    folder = os.path.dirname(file_path) or "."
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{path}: found no folder {folder}, expected one")
    if os.path.isdir(file_path):
        raise ValueError(f"{path}: found a folder, expected {kind} or nothing")
    with open(file_path, "ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path}: another process writes to it; expected to be the only one") from None
        file.seek(0)
        found, rows, size = _parsed(file, path, kind, parse, header)
        file.truncate(size)

        def append(values: Any) -> None:
            file.write(_line(values))
            file.flush()

        if found is None:
            append(header)
        yield append, rows


def _parsed(
    file: BinaryIO, name: str, kind: str, parse: Parse[T], expected: dict[str, Any] | None
) -> tuple[dict[str, Any] | None, list[T], int]:
    """The first line (None where there is no whole one), the others, and how many bytes whole lines take."""
    wanted = kind if expected is None else f"{kind} or nothing"
    header: dict[str, Any] | None = None
    rows: list[T] = []
    size = 0
    for number, line in enumerate(file, 1):
        if not line.endswith(b"\n"):
            if header is None and expected is not None and not _line(expected).startswith(line):
                raise ValueError(f"{name}: found another file, expected {wanted}")
            break
        try:
            values = json.loads(line)
        except ValueError:
            found = "another file" if number == 1 else f"what is no JSON in line {number}"
            raise ValueError(f"{name}: found {found}, expected {wanted}") from None
        if header is not None:
            try:
                rows.append(parse(values, number))
            except ValueError as error:
                raise ValueError(f"{name}: line {number}: {error}") from None
        elif not isinstance(values, dict) or kind not in values:
            raise ValueError(f"{name}: found another file, expected {wanted}")
        else:
            header = values
            if other := [key for key in expected or () if values.get(key) != expected[key]]:  # type: ignore[index]
                changed = [f"{key} {_short(values.get(key))} and not {_short(expected[key])}" for key in other]  # type: ignore[index]
                raise ValueError(f"{name}: was made with {listed(changed)}; expected the same, or a new file")
        size += len(line)
    return header, rows, size


def _line(values: Any) -> bytes:
    return json.dumps(values).encode() + b"\n"


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)  # SHA-256 have 64 digits
