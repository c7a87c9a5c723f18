"""A picture of a sweep: each parameter against the metric; runs that differ in nothing else are joined."""

import collections
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ivcr_jax.data.manifest import atomic
from ivcr_jax.metrics.plots import COLOURS, STYLE
from launch.report import Ranked, shown

COLUMNS = 3
LOG_FROM = 20  # largest over smallest value from which an axis is logarithmic
REST = "#999999"


def draw(path: pathlib.Path, found: Ranked, swept: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the picture.

    Args:
      path: of the PNG.
      found: the runs by the metric.
      swept: parameters by path, each with the value of every run by name.
    """
    values = {entry.name: value for entry, value in found.best if not math.isnan(value)}
    swept = _together(swept)
    panels = list(swept) or [""]
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure((0.6 + 4.2 * columns, 0.6 + 3.4 * rows), layout="constrained")
        figure.suptitle(f"{found.metric} ({'more' if found.mode == 'max' else 'less'} is better)", fontsize=11)
        for place, name in enumerate(panels, 1):
            axes = figure.add_subplot(rows, columns, place)
            _panel(axes, name, swept, values, found.best[0][0].name)
            axes.set_ylabel(found.metric if place % columns == 1 or columns == 1 else "")
        with atomic(path) as aside:
            figure.savefig(str(aside), format="png", metadata={"Software": None})


def _together(swept: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Parameters that only ever change together as one, with the values of the first."""
    found: dict[tuple[int, ...], list[str]] = collections.defaultdict(list)
    for path, of in swept.items():
        distinct = list(dict.fromkeys(map(repr, of.values())))
        found[tuple(distinct.index(repr(value)) for value in of.values())].append(path)
    return {", ".join(paths): swept[paths[0]] for paths in found.values()}


def _panel(
    axes: Axes, name: str, swept: Mapping[str, Mapping[str, Any]], values: Mapping[str, float], best: str
) -> None:
    of = swept.get(name, {})
    places = _places(axes, [of.get(run) for run in values])
    others = [other for other in swept if other != name]
    groups: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
    for run in values:
        groups[tuple(shown(swept[other][run]) for other in others)].append(run)
    joined = {rest: runs for rest, runs in groups.items() if len({repr(of.get(run)) for run in runs}) > 1}
    coloured = len(joined) <= len(COLOURS)
    for place, (rest, runs) in enumerate(sorted(joined.items())):
        line = sorted((places[repr(of.get(run))], values[run]) for run in runs)
        differing = [index for index in range(len(others)) if len({each[index] for each in joined}) > 1]
        label = ", ".join(f"{_short(others[index])} {rest[index]}" for index in differing)
        colour = COLOURS[place] if coloured else REST
        axes.plot(*zip(*line, strict=True), "o-", color=colour, markersize=5, linewidth=1.2, label=label)
    for rest, runs in groups.items():
        if rest not in joined:
            axes.plot([places[repr(of.get(run))] for run in runs], [values[run] for run in runs], "o", color=REST)
    axes.plot(
        [places[repr(of.get(best))]], [values[best]], "*", color="#000000", markersize=12, markerfacecolor="#ffd700",
        label="best",
    )  # fmt: skip
    axes.set_xlabel(name)
    if coloured:
        axes.legend(frameon=False, fontsize=8)


def _places(axes: Axes, values: Sequence[Any]) -> dict[str, float]:
    """Where each value of a parameter is on the axis, by its repr: numbers where they are, others side by side."""
    distinct = {repr(value): value for value in values}
    if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct.values()):
        axes.set_xticks(range(len(distinct)), [shown(value) for value in distinct.values()])
        axes.set_xlim(-0.5, len(distinct) - 0.5)
        return {name: float(place) for place, name in enumerate(distinct)}
    numbers = sorted(distinct.values())
    if numbers[0] > 0 and numbers[-1] / numbers[0] >= LOG_FROM:
        axes.set_xscale("log")
    axes.set_xticks(numbers, [shown(number) for number in numbers])
    axes.set_xticks([], minor=True)
    return {name: float(value) for name, value in distinct.items()}


def _short(path: str) -> str:
    return path.rpartition(".")[2]
