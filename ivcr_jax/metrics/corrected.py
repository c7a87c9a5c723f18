"""The published scorer's definitions without its defects: what of a result file is right, turn by turn.

docs/evaluation.md says, defect by defect, what is corrected. Answers are read by our reader.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ivcr_jax.data.dialogue import Intent
from ivcr_jax.metrics import answers
from ivcr_jax.metrics.as_published import IOUS, KINDS, METRICS, SHOWN
from ivcr_jax.metrics.matching import match
from ivcr_jax.metrics.published import CANDIDATES, Prediction, kept_of, question_of, retrieved
from ivcr_jax.metrics.raw import INDEPENDENT, Turn, turn_id, turns_of

# What may be amiss, and what becomes of it.
PROBLEMS = {
    "missing": "no prediction, or one without an answer: wrong",
    "unreadable": "the answer names no video, or no span: wrong",
    "out_of_range": "the answer's video is not among those shown: wrong",
    "doubled": "answered twice in the same words: counted once",
    "contradicted": "answered more than once, not in the same words: wrong",
    "reordered": "not in the samples' order: found by the question",
    "ambiguous": "not in the samples' order, and others ask the same and are answered otherwise: wrong",
    "unknown": "predictions for what is no sample: not counted",
    "no_right_answer": "neither the true answer nor the record has one that can be read: wrong",
    "truth_disagrees": "the true answer and the record do not say the same: the answer counts",
    "chat": "samples that ask for no video: not counted",
    "in_no_turn": "messages without question or answer: not counted",
}
NEAR = 0.1  # seconds; a true answer may be rounded


@dataclasses.dataclass(frozen=True)
class Scores:
    """Attributes:
    right: how many turns are, by (number of the turn, metric).
    every: how many there are, by (number of the turn, kind), in the test dialogues.
    scored: the same, in the samples.
    problems: ids by the names of PROBLEMS; only those that occur.
    """

    right: collections.Counter[tuple[int, str]]
    every: collections.Counter[tuple[int, str]]
    scored: collections.Counter[tuple[int, str]]
    problems: dict[str, list[str]]

    def to_json(self) -> dict[str, Any]:
        """Each figure over both denominators; None where there is nothing to divide by."""
        turns = [number for number in range(1, SHOWN + 1) if any(self.every[number, kind] for kind in KINDS)]
        return {
            "overall": self._figures(sorted({number for number, _ in self.every})),
            "per_turn": {str(number): self._figures([number]) for number in turns},
            "problems": {
                name: {"count": len(ids), "what": PROBLEMS[name], "ids": ids} for name, ids in self.problems.items()
            },
        }

    def _figures(self, numbers: Sequence[int]) -> dict[str, Any]:
        figures: dict[str, dict[str, Any]] = {}
        for metric, kind in METRICS.items():
            right = sum(self.right[number, metric] for number in numbers)
            figures[metric] = {"right": right}
            for name, turns in (("all_test_turns", self.every), ("scored_turns", self.scored)):
                count = sum(turns[number, kind] for number in numbers)
                figures[metric][name] = {"value": right / count if count else None, "count": count}
        return figures


@dataclasses.dataclass(frozen=True)
class _Truth:
    """What is right for a turn.

    Attributes: id, number: of the turn. kind: of KINDS, "" for chat. video: its number. span: seconds. shown: how many
    videos are.
    """

    id: str
    number: int
    kind: str
    video: int | None = None
    span: tuple[float, float] | None = None
    shown: int = CANDIDATES


def score(
    predictions: Sequence[Prediction],
    samples: Sequence[Sequence[Mapping[str, str]]],
    rows: Sequence[Mapping[str, Any]],
) -> Scores:
    """Scores a result file.

    Args: as `as_published.score`.

    Raises:
      ValueError: a sample is of none of the rows, or there twice.
    """
    problems: dict[str, list[str]] = collections.defaultdict(list)
    every: collections.Counter[tuple[int, str]] = collections.Counter()
    dialogues = []
    for row in rows:
        turns, alone = turns_of(row)
        problems["in_no_turn"] += [f"{row['id']} message {place}" for place in alone]
        truths = {turn.number: _truth(row["id"], turn, problems) for turn in turns}
        every.update((truth.number, truth.kind) for truth in truths.values() if truth.kind)
        dialogues.append((turns, truths))
        if row["type"] == INDEPENDENT:  # samples have those alone that the first stage found
            dialogues.append((kept_of(turns, independent=True), truths))
    asked = _truths(samples, dialogues)
    found, amiss, unknown = match([question_of(messages[-2]["content"]) for messages in samples], predictions)
    for name, places in amiss.items():
        problems[name] += [asked[place].id for place in places]
    problems["unknown"] += [f"prediction {row}" for row in unknown]
    right: collections.Counter[tuple[int, str]] = collections.Counter()
    scored: collections.Counter[tuple[int, str]] = collections.Counter()
    for truth, place in zip(asked, found, strict=True):
        if not truth.kind:
            problems["chat"].append(truth.id)
            continue
        scored[truth.number, truth.kind] += 1
        output = None if place is None else predictions[place].output
        if place is not None and output is None:
            problems["missing"].append(truth.id)
        if output is not None:
            right.update((truth.number, metric) for metric in _right(truth, output, problems))
    return Scores(right, every, scored, {name: problems[name] for name in PROBLEMS if problems[name]})


def _truth(dialogue: str, turn: Turn, problems: Mapping[str, list[str]]) -> _Truth:
    """What is right is what the true answer says, as published, and else what the record says."""
    name = turn_id(dialogue, turn.number)
    if turn.intent == Intent.CHAT:
        return _Truth(name, turn.number, "")
    if turn.intent == Intent.VIDEO:
        video = answers.video(turn.answer)
        place = turn.candidates.index(turn.video_id) + 1 if retrieved(turn) else None
        if video is None:
            video = place
        elif turn.candidates and video != place:
            problems["truth_disagrees"].append(name)
        truth = _Truth(name, turn.number, "searches", video=video, shown=len(turn.candidates) or CANDIDATES)
    else:
        span, record = answers.span(turn.answer), _span(turn.gt_se)
        if span is None:
            span = record
        elif record is None or max(abs(span[0] - record[0]), abs(span[1] - record[1])) > NEAR:
            problems["truth_disagrees"].append(name)
        truth = _Truth(name, turn.number, "moments", span=span)
    if truth.video is None and truth.span is None:
        problems["no_right_answer"].append(name)
    return truth


def _span(value: Any) -> tuple[float, float] | None:
    if not isinstance(value, list) or len(value) != 2 or not all(type(time) in (int, float) for time in value):
        return None
    start, end = sorted(float(time) for time in value)
    return (start, end) if start >= 0 and math.isfinite(end) else None


def _truths(
    samples: Sequence[Sequence[Mapping[str, str]]], dialogues: Sequence[tuple[Sequence[Turn], Mapping[int, _Truth]]]
) -> list[_Truth]:
    """The turn that each sample ends with, found by all that is said in it. Raises as `score`."""
    nodes: dict[tuple[int, str, str], int] = {}  # (what was said before, question, answer) -> all of it, as a number
    ends: dict[int, list[_Truth]] = collections.defaultdict(list)
    for turns, truths in dialogues:
        node = 0
        for turn in turns:
            node = nodes.setdefault((node, turn.question.strip(), turn.answer.strip()), len(nodes) + 1)
            if truths[turn.number] not in ends[node][-1:]:
                ends[node].append(truths[turn.number])
    used: set[str] = set()
    found = []
    for place, messages in enumerate(samples):
        node = 0
        for user, assistant in zip(messages[1::2], messages[2::2], strict=True):
            said = (node, question_of(user["content"]), assistant["content"].strip())
            if said not in nodes:
                raise ValueError(f"sample {place}: found {said[1][:60]!r}, expected a turn of a raw test dialogue")
            node = nodes[said]
        truth = next((truth for truth in ends[node] if truth.id not in used), None)
        if truth is None:
            raise ValueError(f"sample {place}: found {ends[node][0].id} again, expected each turn once")
        used.add(truth.id)
        found.append(truth)
    return found


def _right(truth: _Truth, output: str, problems: Mapping[str, list[str]]) -> list[str]:
    """The metrics by which an answer is right."""
    if truth.kind == "searches":
        video = answers.video(output)
        if video is None:
            problems["unreadable"].append(truth.id)
        elif not 1 <= video <= truth.shown:
            problems["out_of_range"].append(truth.id)
        elif video == truth.video:
            return ["r1"]
        return []
    span = answers.span(output)
    if span is None:
        problems["unreadable"].append(truth.id)
    iou = 0.0 if span is None or truth.span is None else _iou(truth.span, span)
    return [f"r1_iou_{bar}" for bar in IOUS if iou >= bar]


def _iou(one: tuple[float, float], other: tuple[float, float]) -> float:
    """Of two spans, start <= end; of two equal instants 1."""
    union = max(one[1], other[1]) - min(one[0], other[0])  # of spans that do not meet more, but then the overlap is 0
    return max(min(one[1], other[1]) - max(one[0], other[0]), 0) / union if union else 1.0
