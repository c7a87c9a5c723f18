"""What is shown of a conversation as lines of text: times, the list of candidates, a moment in its video.

Pure functions of values. Widths are columns of a terminal, of which a Chinese character takes two.
"""

import re
import unicodedata
from collections.abc import Sequence

from ivcr_jax.infer.corpus import Video
from ivcr_jax.infer.turn import Ranked

CURRENT = "▸"  # before the current video
_TITLES = ("", "no", "title", "source", "length", "score", "cosine")
_GAP = 2  # between the columns of the list
_NARROWEST, _SHORTEST = 8, 4  # of a title; of a source, which is left out where it would be shorter
_TIME = re.compile(r"(?:(?:(\d{1,3}):)?(\d{1,3}):(?=[0-5]\d(?:\D|$)))?(\d{1,6}(?:\.\d{1,6})?)")


def printable(text: str) -> str:
    """The text without what a terminal would obey instead of showing it; names of files may hold anything."""
    shown = (c for c in text if unicodedata.category(c) != "Cf")
    return "".join(c if c.isprintable() else " " for c in shown)


def clock(seconds: float, decimals: int = 0) -> str:
    """Seconds as m:ss, from an hour on as h:mm:ss."""
    units = 10**decimals
    minutes, rest = divmod(round(seconds * units), 60 * units)
    hours, minutes = divmod(minutes, 60)
    last = f"{rest / units:0{3 + decimals if decimals else 2}.{decimals}f}"
    return f"{hours}:{minutes:02}:{last}" if hours else f"{minutes}:{last}"


def seconds_of(text: str) -> float:
    """The seconds of a time as a person writes it: 9.4, 0:09.4, 1:02:03. Raises ValueError for anything else."""
    found = _TIME.fullmatch(text)
    if found is None:
        raise ValueError(f"found {text!r}, expected a time in seconds or as m:ss")
    hours, minutes, rest = found.groups()
    return 3600 * int(hours or 0) + 60 * int(minutes or 0) + float(rest)


def width_of(text: str) -> int:
    """Columns that a text takes."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in ("W", "F") else 1 for c in text
    )


def fit(text: str, width: int) -> str:
    """The text in exactly so many columns: cut, with a sign that it is, or filled with spaces."""
    if width_of(text) > width:
        kept = ""
        for c in text:
            if width_of(kept + c) > width - 1:
                break
            kept += c
        text = f"{kept}…" if width else ""
    return text + " " * (width - width_of(text))


def table(rows: Sequence[tuple[Ranked, Video]], current: str | None, width: int) -> list[str]:
    """The list of candidates, a line of titles before it. Titles and sources are cut where the terminal is narrow.

    Args:
      rows: candidates with their videos, in the order to show.
      current: the id of the current video, which gets a mark.
      width: of the terminal.
    """
    cells = [_TITLES]
    for ranked, video in rows:
        mark = CURRENT if video.id == current else ""
        names = printable(video.title), printable(video.source)
        scores = f"{ranked.score:.2f}", f"{ranked.first:.3f}"
        cells.append((mark, str(ranked.number), *names, clock(video.duration), *scores))
    widths = [max(map(width_of, column)) for column in zip(*cells, strict=True)]
    widths[0] = 1  # where there is no mark too, so that lists look alike
    if not any(video.source for _, video in rows):
        widths[3] = 0
    title, source = widths[2], widths[3]
    left = width - sum(widths) + title + source - _GAP * (len(widths) - 1)
    if title + source > left:
        source = max(min(source, left - title), min(source, left // 3))
        widths[3] = source if source >= _SHORTEST else 0
        widths[2] = max(left - widths[3], _NARROWEST)
    lines = []
    for row in cells:
        parts = [
            fit(cell, size) if place in (0, 2, 3) else cell.rjust(size)
            for place, (cell, size) in enumerate(zip(row, widths, strict=True))
            if size > 0
        ]
        lines.append((" " * _GAP).join(parts).rstrip())
    return lines


def timeline(duration: float, start: float, end: float, width: int) -> list[str]:
    """A bar of a whole video with a moment marked, and below it when that is.

    Args:
      duration, start, end: seconds.
      width: of the two lines, at most; the bar is never shorter than 10 columns.
    """
    left, right = "0:00", clock(duration)
    cells = max(width - len(left) - len(right) - 2, 10)
    scale = cells / (duration or 1.0)
    # Rounded first: 0.55 s of 1 s are 55 of 100 cells, though 0.55 * 100 is a little more than 55.
    first = min(int(round(start * scale, 6)), cells - 1)
    last = min(max(-int(-round(end * scale, 6) // 1), first + 1), cells)
    bar = "─" * first + "█" * (last - first) + "─" * (cells - last)
    times = f"{clock(start, 1)}-{clock(end, 1)}"
    middle = len(left) + 1 + (first + last) / 2
    total = len(left) + len(right) + 2 + cells
    indent = max(min(int(middle - len(times) / 2), total - len(times)), 0)
    return [f"{left} {bar} {right}", " " * indent + times]
