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
from launch.report import Ranked, parameters, shown

COLUMNS = 3
LOG_FROM = 8  # largest over smallest value from which an axis is logarithmic
REST = "#999999"


def draw(path: pathlib.Path, found: Ranked) -> None:
    """Writes the picture, a PNG, of the runs that are compared."""
    values = {entry.name: value for entry, value in found.best if not math.isnan(value)}
    swept = _together(parameters([entry for entry, _ in found.best if entry.name in values]))
    panels = list(swept) or [""]
    columns = 2 if len(panels) == 4 else min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure((0.6 + 4.2 * columns, 0.6 + 3.4 * rows), layout="constrained")
        figure.suptitle(f"{found.metric} ({'more' if found.mode == 'max' else 'less'} is better)", fontsize=11)
        for place, name in enumerate(panels):
            axes = figure.add_subplot(rows, columns, place + 1)
            _panel(axes, name, swept, values, found.best[0][0].name)
            axes.set_ylabel("" if place % columns else found.metric)
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
    for run in sorted(values, key=lambda run: [_order(swept[other][run]) for other in others]):
        groups[tuple(shown(swept[other][run]) for other in others)].append(run)
    joined = {rest: runs for rest, runs in groups.items() if len({repr(of.get(run)) for run in runs}) > 1}
    differing = [index for index in range(len(others)) if len({each[index] for each in joined}) > 1]
    coloured = len(joined) <= len(COLOURS)
    for place, (rest, runs) in enumerate(joined.items()):
        line = sorted((places[repr(of.get(run))], values[run]) for run in runs)
        label = ", ".join(f"{_short(others[index])} {rest[index]}" for index in differing)
        colour = COLOURS[place] if coloured else REST
        axes.plot(*zip(*line, strict=True), "o-", color=colour, markersize=5, linewidth=1.2, label=label)
    if alone := [run for rest, runs in groups.items() if rest not in joined for run in runs]:
        where = [places[repr(of.get(run))] for run in alone]
        axes.plot(where, [values[run] for run in alone], "o", color=REST, markersize=5, label="other runs")
    where = [places[repr(of.get(best))]]
    axes.plot(
        where, [values[best]], "*", color="#000000", markersize=12, markerfacecolor="#ffd700", label="best", zorder=3
    )
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


def _order(value: Any) -> tuple[bool, float, str]:
    """Numbers in their order, before all else."""
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, str(value)


def _short(path: str) -> str:
    return path.rpartition(".")[2]
