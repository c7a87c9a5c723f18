"""The published scorer's figures, its defects included: what `metrics/eval.py` of the IVCR-200K code would print.

The defects are named B1 to B12 as in docs/evaluation.md. Where the original stops with an exception, what it was
computing is None here, and `Stop` says which defect and where.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ivcr_jax.metrics import answers
from ivcr_jax.metrics.published import CANDIDATES, Prediction
from ivcr_jax.metrics.raw import SEARCH

IOUS = (0.3, 0.5, 0.7)
KINDS = ("searches", "moments")
METRICS = {"r1": "searches", **{f"r1_iou_{bar}": "moments" for bar in IOUS}}  # a share of which turns each is
SHOWN = 7  # turns of the table

Figures = dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class Stop:
    """Attributes: figures: those that are None because of it. defect: its name. where: it strikes. what: happens."""

    figures: str
    defect: str
    where: str
    what: str


@dataclasses.dataclass(frozen=True)
class Scores:
    """What the released scorer computes from a set of files.

    Attributes:
      overall: by METRICS, 0..1.
      counts: of all searches and of all moments, which `overall` is divided by.
      per_turn: the same by the number of the turn, in the order they are printed; of those that occur.
      turn_counts: searches and moments by the number of the turn.
      stops: where it raises, in the order of its run. It computes the table, prints it, and only then computes and
        prints what is overall, so from the first of them on it prints nothing.
    """

    overall: Figures
    counts: dict[str, int]
    per_turn: dict[int, Figures]
    turn_counts: dict[int, dict[str, int]]
    stops: tuple[Stop, ...]


class _Stopped(Exception):
    def __init__(self, defect: str, where: str, what: str) -> None:
        self.stop = (defect, where, what)


def score(
    predictions: Sequence[Prediction],
    samples: Sequence[Sequence[Mapping[str, str]]],
    rows: Sequence[Mapping[str, Any]],
) -> Scores:
    """Scores a result file. Args: predictions: of `read_predictions`. samples: of `read_samples`, compared with them by
    place. rows: of `read_rows`."""
    stops: list[Stop] = []
    per_turn: dict[int, Figures] = {}
    turn_counts: dict[int, dict[str, int]] = {}
    try:
        table = _table(predictions, rows)
    except _Stopped as error:
        stops.append(Stop("per_turn", *error.stop))
    else:
        for turn, hits in table.items():
            if turn > SHOWN:
                continue
            turn_counts[turn] = {kind: hits[kind] for kind in KINDS}
            per_turn[turn] = {metric: hits[metric] / hits[of] if hits[of] else None for metric, of in METRICS.items()}
            lacking = [kind for kind in KINDS if not hits[kind]]
            stops += [Stop(f"per_turn {turn}", "B3", f"turn {turn}", f"no {kind} to divide by") for kind in lacking]
    overall: Figures = dict.fromkeys(METRICS)
    counts: dict[str, int] = {}
    try:
        hits = _overall(predictions, samples, rows)
        counts = {kind: hits[kind] for kind in KINDS}
        overall = {metric: hits[metric] / hits[of] for metric, of in METRICS.items()}
    except _Stopped as error:
        stops.append(Stop("overall", *error.stop))
    return Scores(overall, counts, per_turn, turn_counts, tuple(stops))


def _overall(
    predictions: Sequence[Prediction],
    samples: Sequence[Sequence[Mapping[str, str]]],
    rows: Sequence[Mapping[str, Any]],
) -> collections.Counter[str]:
    hits: collections.Counter[str] = collections.Counter()
    begun = set()
    for place, messages in enumerate(samples):
        is_search = messages[-2]["content"].count("VIDEOTOKEN") == CANDIDATES
        kind = "searches" if is_search else "moments"
        if kind not in begun:  # B1: the first of each kind makes the counters and is not counted
            begun.add(kind)
            continue
        if place >= len(predictions):
            raise _Stopped("missing", f"sample {place}", f"there are {len(predictions)} predictions")
        output = predictions[place].output
        if output is None:
            raise _Stopped("missing", f"sample {place}", "the prediction has no answer")
        _add(hits, is_search, messages[-1]["content"], output, f"sample {place}")
    for row in rows:
        for place, message in enumerate(row["conversations"]):
            if message["from"] == "gpt":
                kind = "searches" if _is_search(message, row, place) else "moments"
                if kind not in begun:
                    raise _Stopped("B6", f"{row['id']} message {place}", f"no sample is among the {kind}")
                hits[kind] += 1
    for kind in KINDS:
        if kind not in begun:
            raise _Stopped("B6", "overall", f"no sample is among the {kind}")
        if not hits[kind]:
            raise _Stopped("B3", "overall", f"no {kind} to divide by")
    return hits


def _table(predictions: Sequence[Prediction], rows: Sequence[Mapping[str, Any]]) -> dict[int, collections.Counter[str]]:
    first: dict[str, str | None] = {}  # B4: whoever asks the same is given the first answer to it
    for prediction in predictions:
        first.setdefault(prediction.user_q, prediction.output)
    table: dict[int, collections.Counter[str]] = {}
    for row in rows:
        messages = row["conversations"]
        for place, message in enumerate(messages):
            if message["from"] != "human":
                continue
            hits = table.setdefault(place // 2 + 1, collections.Counter())
            output = first.get(message["value"])  # B2: the predictions' questions have the videos before them
            if place + 1 == len(messages):
                raise _Stopped("B6", f"{row['id']} message {place + 1}", "there is none")
            is_search = _is_search(messages[place + 1], row, place + 1)
            if output is not None:
                _add(hits, is_search, messages[place + 1]["value"], output, f"{row['id']} message {place + 1}")
            hits["searches" if is_search else "moments"] += 1
    return table


def _is_search(message: Mapping[str, Any], row: Mapping[str, Any], place: int) -> bool:
    if "gt_se" not in message:
        raise _Stopped("B6", f"{row['id']} message {place}", "no gt_se")
    return bool(message["gt_se"] == SEARCH)


def _add(hits: collections.Counter[str], is_search: bool, truth: str, output: str, where: str) -> None:
    """Counts what an answer gets right."""
    if is_search:
        # B11: two answers without a number are the same
        hits["r1"] += answers.published_video(truth) == answers.published_video(output)
        return
    iou = _hull_iou(answers.published_truth(truth), answers.published_span(output), where)
    for bar in IOUS:
        hits[f"r1_iou_{bar}"] += iou >= bar


def _hull_iou(truth: Sequence[float], found: tuple[float, float], where: str) -> float:
    """The overlap over all that lies between the first start and the last end."""
    if not truth:
        raise _Stopped("B5", where, "the true answer has no range")
    (start, end), (found_start, found_end) = truth[:2], found
    hull = max(end, found_end) - min(start, found_start)
    if hull == 0:
        raise _Stopped("B5", where, f"the ranges {truth[:2]} and {[*found]} are degenerate")
    return max(min(end, found_end) - max(start, found_start), 0) / hull
