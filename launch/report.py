"""What the runs of a sweep have come to: a table, best first, and each parameter against the metric as a picture.

It reads the manifest and the runs' metrics files, of a sweep that goes on too, and changes nothing but the picture.
"""

import collections
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from ivcr_jax.config import flat, listed
from launch.manifest import Entry, Manifest

PICTURE = "report.png"
MODES = ("max", "min")


class Ranked(NamedTuple):
    """Runs by a metric.

    Attributes:
      metric, mode: its name, and whether "max" or "min" of it is best.
      best: the runs that are done and have it, best first, each with its value; one that is no number comes last.
      rest: all others.
    """

    metric: str
    mode: str
    best: list[tuple[Entry, float]]
    rest: list[Entry]


def ranked(held: Manifest, metric: str | None = None, mode: str | None = None) -> Ranked:
    """The runs that are done, by the last value of a metric.

    Args:
      metric: a name in metrics.jsonl; None is that of validation by which the runs judge their checkpoints.
      mode: "max" or "min"; needed with a metric.

    Raises ValueError where no run that is done has a number for the metric, or the mode is not known.
    """
    entries = [held.seen(name) for name in held.entries]
    judge = entries[0].values["checkpoint"]
    if metric is None:
        metric, mode = f"validation/{judge['best']}", mode or MODES[not judge["higher"]]
    elif mode is None:
        raise ValueError(f"--metric={metric}: found no --mode, expected max or min, whichever is better")
    done = [entry for entry in entries if entry.status == "done"]
    if not done:
        raise ValueError(f"{held.out}: found no run that is done among {len(entries)}, expected one to compare")
    having = [entry for entry in done if metric in entry.metrics]
    if not any(entry.metrics[metric] is not None for entry in having):
        known = sorted({name for entry in done for name in entry.metrics})
        raise ValueError(f"--metric: no run that is done has a number for {metric!r}; they have {listed(known, 60)}")
    best = [(entry, math.nan if (value := entry.metrics[metric]) is None else value) for entry in having]
    best.sort(key=lambda pair: (math.isnan(pair[1]), pair[1] if mode == "min" else -pair[1]))
    return Ranked(metric, mode, best, [entry for entry in entries if entry not in having])


def parameters(entries: Iterable[Entry]) -> dict[str, dict[str, Any]]:
    """What differs between runs: by path, each run's value by its name. The config's argument is "argument"."""
    entries = list(entries)
    swept = sorted({path for entry in entries for path in entry.overrides})
    fields = {entry.name: flat(entry.values) for entry in entries}
    found = {"argument": {entry.name: entry.config.partition(":")[2] or "none" for entry in entries}} | {
        path: {name: values.get(path) for name, values in fields.items()} for path in swept
    }
    return {path: of for path, of in found.items() if len({repr(value) for value in of.values()}) > 1}


def report(held: Manifest, metric: str | None = None, mode: str | None = None) -> str:
    """The table, for a terminal and for Markdown; writes the picture. Raises ValueError as `ranked` does."""
    from launch import plot  # matplotlib is of the "eval" extra, and a sweep runs without it

    found = ranked(held, metric, mode)
    swept = parameters([entry for entry, _ in found.best] + found.rest)
    plot.draw(held.out / PICTURE, found)
    rows = [
        [str(place), entry.name, entry.status, str(entry.step), f"{value:.5g}", *_values(swept, entry)]
        for place, (entry, value) in enumerate(found.best, 1)
    ] + [["", entry.name, entry.status, str(entry.step), "", *_values(swept, entry)] for entry in found.rest]
    lines = [*_table(["", "run", "status", "step", found.metric, *swept], rows), ""]
    best, value = found.best[0]
    lines.append(f"best ({found.mode} of {found.metric}): {best.name}, {value:.5g}")
    counts = collections.Counter(entry.status for entry in found.rest)
    if counts:
        lines.append("not compared: " + ", ".join(f"{count} {status}" for status, count in sorted(counts.items())))
    for entry in found.rest:
        if entry.error:
            lines.append(f"{entry.name}: {entry.attempts} attempts, exit code {entry.exit_code}: {entry.error}")
    lines.append(f"picture: {held.out / PICTURE}")
    return "\n".join(lines)


def last_line(error: str) -> str:
    """Of an error of several lines the last, which says what it was."""
    return error.rpartition("\n")[2]


def shown(value: Any) -> str:
    """A parameter's value for a person."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _values(swept: Mapping[str, Mapping[str, Any]], entry: Entry) -> list[str]:
    return [shown(of[entry.name]) for of in swept.values()]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    every = [list(header), *map(list, rows)]
    wide = [max(3, *(len(row[column]) for row in every)) for column in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(size) for cell, size in zip(row, wide, strict=True)) + " |" for row in every]
    return [lines[0], "|" + "|".join("-" * (size + 2) for size in wide) + "|", *lines[1:]]


def define_flags() -> None:
    """Called by a program's own entry point."""
    flags.DEFINE_string("metric", None, "A name in metrics.jsonl; by default what checkpoint.best says, of validation.")
    flags.DEFINE_enum("mode", None, [*MODES], "Whether more or less of it is better; needed with --metric.")
