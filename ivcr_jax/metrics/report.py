"""A run's figures for programs and for people: report.json, report.md, and the plots that it shows.

The same figures give the same bytes.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ivcr_jax.config import listed
from ivcr_jax.data.manifest import atomic
from ivcr_jax.metrics import interactive, moment, plots, retrieval
from ivcr_jax.metrics.interval import Cell, Comparison
from ivcr_jax.metrics.records import Problems
from ivcr_jax.metrics.summary import Cells, Summary


@dataclasses.dataclass(frozen=True)
class Report:
    """What is to be told.

    Attributes:
      about: what it was made from, in words, by what that is.
      summaries: by protocol, in the order of the tables' columns. Figures of other metrics may be among them.
      problems: with the predictions, by protocol.
      comparisons: of two runs, by what was compared and metric.
      users: what simulated ones came to.
    """

    about: Mapping[str, str]
    summaries: Mapping[str, Summary]
    problems: Mapping[str, Problems]
    comparisons: Mapping[str, Mapping[str, Comparison]] = dataclasses.field(default_factory=dict)
    users: interactive.Users | None = None


@dataclasses.dataclass(frozen=True)
class Kind:
    """How a metric is shown. Attributes: label. factor: of its values. digits: behind the point."""

    label: str
    factor: float = 1.0
    digits: int = 3


METRICS = {
    **{f"retrieval_r{most}": Kind(f"R@{most}, %", 100, 1) for most in retrieval.RECALLS},
    "retrieval_mrr": Kind("MRR, %", 100, 1),
    "retrieval_ndcg10": Kind("nDCG@10, %", 100, 1),
    "retrieval_median_rank": Kind("Median rank", 1, 1),
    "retrieval_mean_rank": Kind("Mean rank", 1, 1),
    "video_accuracy": Kind("Chosen video right, %", 100, 1),
    "false_refusals": Kind("False refusals, %", 100, 1),
    "refusal_recall": Kind("Refusal recall, %", 100, 1),
    "refusal_precision": Kind("Refusal precision, %", 100, 1),
    **{
        f"{name}_r{most}_iou_{bar}": Kind(f"{title} R@{most}, IoU {bar}, %", 100, 1)
        for name, title, places in (
            ("moment", "Moment", moment.RECALLS),
            ("vcmr", "Corpus moment", moment.CORPUS_RECALLS),
        )
        for most in places
        for bar in moment.IOUS
    },
    "moment_miou": Kind("Moment mean IoU, %", 100, 1),
    "order_changes": Kind("First place hangs on the order shown, %", 100, 1),
    "order_spread": Kind("R@1 over orders, standard deviation, points", 100, 2),
    "intent_accuracy": Kind("Intent right, %", 100, 1),
    "unparsed": Kind("Answers that do not parse, %", 100, 1),
    "bleu_en": Kind("BLEU-4, English", 1, 1),
    "bleu_zh": Kind("BLEU-4, Chinese", 1, 1),
    "judge_en": Kind("Judge, English, 0 to 5", 1, 2),
    "judge_zh": Kind("Judge, Chinese, 0 to 5", 1, 2),
    "success": Kind("Success, %", 100, 1),
    "hit10": Kind("Hit@10, %", 100, 1),
    "rounds": Kind("Rounds to success, mean", 1, 2),
    "rounds_median": Kind("Rounds to success, median", 1, 1),
    "bri": Kind("BRI", 1, 3),
    "r1": Kind("R@1, %", 100, 1),
    "r10": Kind("R@10, %", 100, 1),
    "best_rank": Kind("Best rank, median", 1, 1),
    "latency_p50": Kind("Latency, median, s", 1, 3),
    "latency_p95": Kind("Latency, 95th percentile, s", 1, 3),
}
# What tables of groups show.
SHORT = (
    "retrieval_r1", "retrieval_r10", "moment_r1_iou_0.5", "moment_miou", "intent_accuracy", "unparsed", "latency_p50",
    "latency_p95",
)  # fmt: skip
GROUPS = {
    "turn": "turn", "intent": "intent", "language": "language", "corpus": "corpus", "type": "dialogue type",
    "stage": "stage of a turn", "round": "round",
}  # fmt: skip
NOTE = (
    "Each figure is followed by its 95 % interval (percentile bootstrap, whole videos drawn with all their turns) and "
    "by the number of turns (of users: episodes) it is over. No interval is given where all are about one video. "
    "Whiskers in plots are the same intervals."
)
COMPARED = (
    "Each difference is of the first run less the second, on the same turns, with its 95 % interval; p is of a "
    "sign-flip permutation test over the true videos, and is not corrected for the number of metrics."
)


def write(folder: str, report: Report) -> None:
    """Writes report.json, report.md and plots into a folder, which is made where there is none."""
    out = pathlib.Path(folder).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    for name in (*plots.NAMES, plots.USERS):  # of a report that was here before
        (out / name).unlink(missing_ok=True)
    labels = {name: kind.label for name, kind in METRICS.items()}
    drawn = plots.draw(out, report.summaries, report.comparisons, labels)
    if report.users is not None:
        plots.draw_users(out, report.users.kinds, labels)
    for name, text in (("report.json", _json(report)), ("report.md", _markdown(report, drawn))):
        with atomic(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _json(report: Report) -> str:
    protocols = {
        name: {**dataclasses.asdict(summary), "problems": _counted(report.problems.get(name))}
        for name, summary in report.summaries.items()
    }
    comparisons = {
        name: {metric: dataclasses.asdict(each) for metric, each in compared.items()}
        for name, compared in report.comparisons.items()
    }
    values = {"about": dict(report.about), "protocols": protocols, "comparisons": comparisons}
    if report.users is not None:
        values["users"] = {**dataclasses.asdict(report.users), "problems": _counted(report.users.problems)}
    return json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _counted(problems: Problems | interactive.Problems | None) -> dict[str, Any]:
    found = {} if problems is None else dataclasses.asdict(problems)
    return {kind: {"count": len(turns), "turns": turns} for kind, turns in found.items() if turns}


def _markdown(report: Report, drawn: Mapping[str, str]) -> str:
    parts = ["# Evaluation", _table(["", ""], report.about.items()) if report.about else "", NOTE]
    overall = {name: summary.overall for name, summary in report.summaries.items()}
    parts += ["## All turns", _table(["", *overall], _rows(overall))] if overall else []
    parts += [f"![{title}]({file})" for file, title in drawn.items() if file != plots.COMPARISON]
    for name, summary in report.summaries.items():
        parts.append(f"## {name}")
        for by, groups in summary.by.items():
            parts += _breakdown(by, groups)
        parts += _calibration(summary)
        parts += _problems(report.problems.get(name), "predictions")
    parts += [] if report.users is None else _users(report.users)
    if report.comparisons:
        parts += ["## Comparisons", COMPARED]
        parts += [f"![{drawn[plots.COMPARISON]}]({plots.COMPARISON})"] if plots.COMPARISON in drawn else []
    for name, compared in report.comparisons.items():
        parts += [f"### {name}", _differences(compared)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _breakdown(by: str, groups: Mapping[str, Cells]) -> list[str]:
    metrics = [name for name in SHORT if any(name in cells for cells in groups.values())]
    if not metrics:
        return []
    title = GROUPS.get(by, by)
    rows = [[group, *(_cell(name, cells.get(name)) for name in metrics)] for group, cells in groups.items()]
    return [f"### By {title}", _table([title, *(_kind(name).label for name in metrics)], rows)]


def _users(users: interactive.Users) -> list[str]:
    """Figures of simulated users by kind, then by group and kind, and what their difference is."""
    overall = {name: summary.overall for name, summary in users.kinds.items()}
    parts = ["## Simulated users", _table(["", *overall], _rows(overall))]
    parts += [f"![Simulated users]({plots.USERS})"] if any(overall.values()) else []
    for by in interactive.GROUPS:
        groups = {name: summary.by[by] for name, summary in users.kinds.items()}
        metrics = _ordered(cells for found in groups.values() for cells in found.values())
        rows = [
            [group, name, *(_cell(metric, groups[name][group].get(metric)) for metric in metrics)]
            for group in dict.fromkeys(group for found in groups.values() for group in found)
            for name in groups
            if group in groups[name]
        ]
        parts += [f"### Users by {GROUPS[by]}", _table([GROUPS[by], "user", *(_kind(m).label for m in metrics)], rows)]
    for name, compared in users.comparisons.items():
        parts += [f"### {name}", _differences(compared)]
    return [*parts, *_problems(users.problems, "episodes")]


def _rows(tables: Mapping[str, Cells]) -> list[list[str]]:
    """A row a metric, its label first, a column a table."""
    return [
        [_kind(metric).label, *(_cell(metric, cells.get(metric)) for cells in tables.values())]
        for metric in _ordered(tables.values())
    ]


def _calibration(summary: Summary) -> list[str]:
    if summary.calibration_error is None:
        return []
    rows = [
        [f"{each.low:.1f} to {each.high:.1f}", f"{each.score:.3f}", _shown(each.iou, 1, 3)]
        for each in summary.calibration
    ]
    return [
        "### Expected and true IoU of moments",
        f"Mean distance: {summary.calibration_error:.3f}.",
        _table(["expected", "mean", "true IoU, mean"], rows),
    ]


def _problems(problems: Problems | interactive.Problems | None, what: str) -> list[str]:
    rows = [
        [kind, str(counted["count"]), listed([*counted["turns"]], 5)] for kind, counted in _counted(problems).items()
    ]
    if not rows:
        return []
    return [f"### Problems with the {what}", _table(["", "count", "which (all are in report.json)"], rows)]


def _differences(compared: Mapping[str, Comparison]) -> str:
    rows = [[_kind(metric).label, *_compared(metric, compared[metric])] for metric in _ordered([compared])]
    return _table(["", "difference", "p", "n"], rows)


def _compared(metric: str, found: Comparison) -> list[str]:
    kind = _kind(metric)
    cell = Cell(found.difference, found.low, found.high, found.n, found.clusters)
    return [_shown(cell, kind.factor, kind.digits).rpartition(" (")[0], f"{found.p:.4f}", str(found.n)]


def _kind(metric: str) -> Kind:
    return METRICS.get(metric, Kind(metric))


def _ordered(tables: Iterable[Mapping[str, Any]]) -> list[str]:
    """Names of metrics in all tables, known ones first and in METRICS' order."""
    found = dict.fromkeys(name for table in tables for name in table)
    return [*(name for name in METRICS if name in found), *(name for name in found if name not in METRICS)]


def _cell(metric: str, cell: Cell | None) -> str:
    return "" if cell is None else _shown(cell, _kind(metric).factor, _kind(metric).digits)


def _shown(cell: Cell, factor: float, digits: int) -> str:
    value, *ends = (
        None if each is None else f"{each * factor:.{digits}f}" for each in (cell.value, cell.low, cell.high)
    )
    between = "" if None in ends else f" [{ends[0]}, {ends[1]}]"
    return f"{value}{between} ({cell.n})"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    every = [[each.replace("|", "\\|").replace("\n", " ") for each in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in every]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])
