"""Which prediction answers which sample. result.json has no ids: what it has is an order, and the question."""

import collections
from collections.abc import Sequence

from ivcr_jax.metrics.published import Prediction, question_of


def match(
    questions: Sequence[str], predictions: Sequence[Prediction]
) -> tuple[list[int | None], dict[str, list[int]], list[int]]:
    """Finds the prediction of each sample.

    As far as the questions agree from the front, and then from the back, the order says it; between, the question does.
    If it shows that the order is lost, the questions alone do. Where several samples ask the same, only answers that
    are all the same can be given to them; where there are more predictions than samples, nobody knows which was meant,
    unless they say the same.

    Args:
      questions: of the samples, without what stands before them.
      predictions: in the order of their file.

    Returns:
      of each sample the place of its prediction, or None; the places of samples that are amiss, by "missing",
      "doubled", "contradicted", "ambiguous" and "reordered" (an earlier sample's prediction comes later); the
      places of predictions that ask what no sample asks.
    """
    theirs = [question_of(prediction.user_q) for prediction in predictions]
    shorter = min(len(theirs), len(questions))
    front = next((i for i in range(shorter) if theirs[i] != questions[i]), shorter)
    back = next((i for i in range(shorter - front) if theirs[-1 - i] != questions[-1 - i]), shorter - front)
    found, amiss, unknown = _align(questions, theirs, predictions, front, back)
    if amiss["reordered"] and front + back:
        found, amiss, unknown = _align(questions, theirs, predictions, 0, 0)
    return found, {name: places for name, places in amiss.items() if places}, unknown


def _align(
    questions: Sequence[str], theirs: Sequence[str], predictions: Sequence[Prediction], front: int, back: int
) -> tuple[list[int | None], dict[str, list[int]], list[int]]:
    """As `match`, with so many from the front and the back in order."""
    found: list[int | None] = [None] * len(questions)
    found[:front] = range(front)
    found[len(questions) - back :] = range(len(theirs) - back, len(theirs))
    rows = _places(theirs)
    amiss: dict[str, list[int]] = collections.defaultdict(list)
    for question, here in _places(questions).items():
        there = rows.pop(question, [])
        same = len({predictions[row].output for row in there}) <= 1
        given = {found[place] for place in here}
        free = [place for place in here if found[place] is None]
        spare = [row for row in there if row not in given]
        if len(there) > len(here) and not same:
            amiss["contradicted"] += here
            for place in here:
                found[place] = None
        elif spare and len(free) > 1 and not same:
            amiss["ambiguous"] += free
        else:
            amiss["doubled"] += here if len(there) > len(here) else []
            amiss["missing"] += free[len(spare) :]
            for place, row in zip(free, spare, strict=False):
                found[place] = row
    last = -1
    amiss["reordered"] = []
    for place, its in enumerate(found):
        if its is not None:
            if its < last:
                amiss["reordered"].append(place)
            last = max(last, its)
    return found, amiss, sorted(row for left in rows.values() for row in left)


def _places(questions: Sequence[str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for place, question in enumerate(questions):
        places.setdefault(question, []).append(place)
    return places
