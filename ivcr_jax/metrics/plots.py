"""Figures as pictures: a colour a protocol, bars of 95 % intervals, and n under every place. Labels are in English."""

import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.lines
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ivcr_jax.metrics.interval import Cell, Comparison
from ivcr_jax.metrics.summary import BINS, Summary

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by all (Okabe and Ito)
PERCENT = ("retrieval_r1", "moment_r1_iou_0.5", "moment_miou", "intent_accuracy")
# What of each breakdown is drawn, file by file; of intents only what several have.
BARS = {"intent": ("intent_accuracy", "unparsed"), "language": PERCENT, "corpus": PERCENT}
REFUSALS = {
    "false_refusals": "video there,\nrefused",
    "refusal_recall": "video not there,\nrefused",
    "refusal_precision": "refused,\nvideo not there",
}
LATENCIES = ("latency_p50", "latency_p95")
COMPARISON = "comparison.png"
SHARE = ", %"  # how labels of shares end; those alone are compared in a picture
LESS = ("false_refusals", "unparsed")  # of which less is better
TITLES = {
    "turns.png": "By turn",
    **{f"{by}.png": f"By {by}" for by in BARS},
    "calibration.png": "Calibration",
    "latency.png": "Latency by turn",
    COMPARISON: "Comparison",
}
NAMES = (*TITLES,)
USERS = "users.png"
LONGEST = 16  # letters of a label
MOST = 12  # groups of a panel; the tables have all
STYLE: Any = {
    "font.family": "DejaVu Sans", "font.size": 9, "text.parse_math": False, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#dddddd",
    "axes.axisbelow": True, "figure.dpi": 110, "savefig.dpi": 110, "axes.titlesize": 10,
}  # fmt: skip

Series = Mapping[str, Mapping[str, Cell]]  # protocol -> group -> cell


def draw(
    folder: pathlib.Path,
    summaries: Mapping[str, Summary],
    comparisons: Mapping[str, Mapping[str, Comparison]],
    labels: Mapping[str, str],
) -> dict[str, str]:
    """Writes the plots that there are figures for; their titles by file name. `labels` are the metrics'."""
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for name, figure in (*_figures(summaries, labels), (COMPARISON, _comparison(comparisons, labels))):
            if figure is not None:
                figure.savefig(folder / name, metadata={"Software": None})
                drawn[name] = TITLES[name]
    return drawn


def draw_users(folder: pathlib.Path, users: Mapping[str, Summary], labels: Mapping[str, str]) -> None:
    """Writes what simulated users, by kind, came to by round; nothing where there is none."""
    with matplotlib.rc_context(STYLE):
        figure = _panels(users, "round", ("success", "hit10"), labels, joined=True)
        if figure is not None:
            figure.savefig(folder / USERS, metadata={"Software": None})


def _figures(summaries: Mapping[str, Summary], labels: Mapping[str, str]) -> Iterator[tuple[str, Figure | None]]:
    yield "turns.png", _panels(summaries, "turn", PERCENT, labels, joined=True)
    for by, metrics in BARS.items():
        yield f"{by}.png", _panels(summaries, by, metrics, labels)
    yield "calibration.png", _calibration(summaries)
    yield "latency.png", _panels(summaries, "turn", LATENCIES, labels, factor=1, joined=True)


def _panels(
    summaries: Mapping[str, Summary],
    by: str,
    metrics: Sequence[str],
    labels: Mapping[str, str],
    factor: float = 100,
    joined: bool = False,
) -> Figure | None:
    """A panel a metric that any group has."""
    panels: dict[str, Series] = {}
    for metric in metrics:
        series: Series = {
            name: {group: cells[metric] for group, cells in summary.by.get(by, {}).items() if metric in cells}
            for name, summary in summaries.items()
        }
        if any(series.values()):
            panels[metric] = series
    if not panels:
        return None
    ticks = [tick for series in panels.values() for tick in _ticks(series)]
    each = max(0.35 + 0.2 * len(summaries), 0.2 + 0.075 * max(len(line) for tick in ticks for line in tick.split("\n")))
    wide = max(4.0, each * max(len(_ticks(series)) for series in panels.values()))
    columns = 2 if wide <= 6 and len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    figure = Figure((wide * columns, 2.8 * rows + 0.6), layout="constrained")
    for place, (metric, series) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        _panel(axes, series, by, labels.get(metric, metric), factor, joined)
    _legend(figure, summaries)
    return figure


def _panel(axes: Axes, series: Series, by: str, title: str, factor: float, joined: bool = False) -> None:
    groups = _union(series)
    left_out = len(groups) - MOST
    axes.set_title(title + (f" ({left_out} more in the table)" if left_out > 0 else ""))
    groups = groups[:MOST]
    step = 0.8 / len(series)
    for place, (colour, cells) in enumerate(zip(_colours(series), series.values(), strict=True)):
        there = [(x, cells[group]) for x, group in enumerate(groups) if group in cells]
        if not there:
            continue
        where = np.array([x for x, _ in there]) + (place - (len(series) - 1) / 2) * step
        values = factor * np.array([cell.value for _, cell in there])
        if joined:
            axes.plot(where, values, "o-", color=colour, markersize=4, linewidth=1)
        else:
            axes.bar(where, values, step * 0.92, color=colour)
        _whiskers(axes, where, [cell for _, cell in there], factor, colour if joined else "#222222")
    axes.set_xticks(range(len(groups)), _ticks(series))
    axes.set_xlim(-0.6, len(groups) - 0.4)
    axes.set_xlabel(by)
    axes.set_ylim(0, 103 if factor == 100 else None)


def _whiskers(axes: Axes, where: np.ndarray, cells: Sequence[Cell], factor: float, colour: str) -> None:
    ends = np.array([(cell.low, cell.high) for cell in cells], float)  # None becomes NaN, and is not drawn
    values = np.array([cell.value for cell in cells])
    below, above = np.maximum(values - ends[:, 0], 0), np.maximum(ends[:, 1] - values, 0)
    axes.errorbar(
        where, factor * values, factor * np.stack([below, above]), fmt="none", ecolor=colour, elinewidth=1, capsize=2
    )


def _calibration(summaries: Mapping[str, Summary]) -> Figure | None:
    """Expected IoU against the true one, with the moments in each bin, and what of refusals is right."""
    scored = any(summary.calibration for summary in summaries.values())
    refusals: Series = {
        name: {label: summary.overall[metric] for metric, label in REFUSALS.items() if metric in summary.overall}
        for name, summary in summaries.items()
    }
    refused = any(refusals.values())
    if not scored and not refused:
        return None
    columns = scored + refused
    figure = Figure((4.8 * columns, 4.8), layout="constrained")
    grid = figure.add_gridspec(2, columns, height_ratios=(3, 1))
    if scored:
        axes, below = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
        axes.plot([0, 1], [0, 1], color="#888888", linestyle=":", linewidth=1)
        step = 0.8 / BINS / len(summaries)
        for place, (colour, summary) in enumerate(zip(_colours(summaries), summaries.values(), strict=True)):
            if not summary.calibration:
                continue
            where = np.array([each.score for each in summary.calibration])
            cells = [each.iou for each in summary.calibration]
            axes.plot(where, [cell.value for cell in cells], "o-", color=colour, markersize=4, linewidth=1)
            _whiskers(axes, where, cells, 1, colour)
            middles = np.array([(each.low + each.high) / 2 for each in summary.calibration])
            offset = (place - (len(summaries) - 1) / 2) * step
            below.bar(middles + offset, [cell.n for cell in cells], step * 0.92, color=colour)
        axes.set(xlim=(0, 1), ylim=(0, 1.03), title="Moments: expected and true IoU", ylabel="true IoU, mean")
        below.set(xlim=(0, 1), xlabel="expected IoU", ylabel="moments (n)")
    if refused:
        _panel(figure.add_subplot(grid[:, -1]), refusals, "searches", "Refusals, %", 100)
    _legend(figure, summaries)
    return figure


def _comparison(comparisons: Mapping[str, Mapping[str, Comparison]], labels: Mapping[str, str]) -> Figure | None:
    """Differences of shares with their intervals, a row a metric, around a line at 0."""
    metrics = [
        name
        for name, label in labels.items()
        if label.endswith(SHARE) and any(name in found for found in comparisons.values())
    ]
    if not metrics:
        return None
    high = 1 + 0.2 * len(comparisons) + len(metrics) * (0.24 + 0.11 * len(comparisons))
    figure = Figure((7.5, high), layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="#222222", linewidth=1)
    axes.hlines(
        np.arange(1, len(metrics)) - 0.5, 0, 1, color="#dddddd", linewidth=0.8, transform=axes.get_yaxis_transform()
    )
    step = 0.8 / len(comparisons)
    for place, (colour, found) in enumerate(zip(_colours(comparisons), comparisons.values(), strict=True)):
        there = [(row, found[name]) for row, name in enumerate(metrics) if name in found]
        where = np.array([row for row, _ in there]) + (place - (len(comparisons) - 1) / 2) * step
        values = 100 * np.array([each.difference for _, each in there])
        ends = 100 * np.array([(each.low, each.high) for _, each in there], float)  # None becomes NaN
        spread = np.maximum(np.stack([values - ends[:, 0], ends[:, 1] - values]), 0)
        axes.errorbar(values, where, xerr=spread, fmt="o", color=colour, markersize=4, elinewidth=1.5, capsize=2)
    shown = []
    for name in metrics:
        less = ", less is better" if name in LESS else ""
        counts = _counted(found[name].n for found in comparisons.values() if name in found)
        shown.append(f"{labels[name].removesuffix(SHARE)}{less}\n{counts}")
    axes.set_yticks(range(len(metrics)), shown)
    axes.set_ylim(len(metrics) - 0.5, -0.5)
    axes.set_xlabel("first run less the second, percentage points")
    axes.grid(axis="x")
    axes.grid(axis="y", visible=False)
    _legend(figure, comparisons, longest=80, columns=1)
    return figure


def _legend(figure: Figure, names: Mapping[str, object], longest: int = LONGEST, columns: int = 4) -> None:
    handles = [matplotlib.lines.Line2D([], [], color=colour, linewidth=5) for colour in _colours(names)]
    shown = [_name(name, place, longest) for place, name in enumerate(names)]
    figure.legend(handles, shown, loc="outside lower center", ncols=min(columns, len(shown)), frameon=False)


def _colours(names: Mapping[str, object]) -> list[str]:
    return [COLOURS[place % len(COLOURS)] for place in range(len(names))]


def _union(series: Series) -> list[str]:
    """All groups; numbers in their order, others as they come."""
    groups = list(dict.fromkeys(group for cells in series.values() for group in cells))
    return sorted(groups, key=int) if all(group.isdecimal() for group in groups) else groups


def _ticks(series: Series) -> list[str]:
    """A label for each group that is drawn, with its n in all protocols."""
    groups = _union(series)[:MOST]
    names = [_name(group, place) for place, group in enumerate(groups)]
    ticks = []
    for place, group in enumerate(groups):
        name = names[place] if names.count(names[place]) == 1 else _numbered(place)
        ticks.append(f"{name}\n{_counted(cells[group].n for cells in series.values() if group in cells)}")
    return ticks


def _counted(turns: Iterable[int]) -> str:
    counts = {*turns}
    return f"n={min(counts)}" + (f"-{max(counts)}" if len(counts) > 1 else "")


def _name(label: str, place: int, longest: int = LONGEST) -> str:
    """A label, cut to fit; its place in the table where the font may lack its letters."""
    if not label.isascii():
        return _numbered(place)
    lines = label.split("\n")
    return "\n".join(line if len(line) <= longest else f"{line[: longest - 7]}...{line[-4:]}" for line in lines)


def _numbered(place: int) -> str:
    return f"no. {place + 1}"
