"""From turns and what was answered to figures with intervals: over all, and broken down.

    retrieval_*            VIDEO turns, by the ranking
    video_accuracy         VIDEO turns, by the video that was chosen
    false_refusals         VIDEO turns whose video could be ranked, and that were refused
    refusal_recall         VIDEO turns whose video could not be ranked, and that were refused
    refusal_precision      refused VIDEO turns whose video could not be ranked
    moment_*               MOMENT turns, by the moments in the video of the first one
    vcmr_*                 MOMENT turns, by the moments in all videos, where a run has any in several
    order_changes          VIDEO turns whose candidates were shown in several orders: the first place hangs on the order
    order_spread           of the same, the standard deviation of R@1 over the orders
    intent_accuracy        all turns
    unparsed               VIDEO and MOMENT turns that were come to, whose text does not say what the record says
    latency_p50, _p95      seconds a turn, where they were measured

A turn without a usable prediction is wrong in all that it has part in. docs/evaluation.md defines them.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ivcr_jax.data.dialogue import Intent, corpus_of
from ivcr_jax.metrics import interval, moment, retrieval
from ivcr_jax.metrics.interval import Cell, Comparison
from ivcr_jax.metrics.records import Moment, Pair, Prediction

Cells = dict[str, Cell]
BINS = 10  # of the moments' scores
LATENCIES = {"latency_p50": 0.5, "latency_p95": 0.95}
NOTHING = Prediction("", 0)


@dataclasses.dataclass(frozen=True)
class Bin:
    """Moments whose score lies in [low, high). Attributes: score: their mean score. iou: their mean IoU."""

    low: float
    high: float
    score: float
    iou: Cell


@dataclasses.dataclass(frozen=True)
class Summary:
    """Figures of one protocol.

    Attributes:
      overall: by metric.
      by: what is broken down by ("turn", "intent", "language", "corpus", "type", "stage") -> group -> metric. Turns
        count from 1. Chat turns have no corpus.
      calibration: of the score of a turn's first moment, for those that have one.
      calibration_error: the mean distance of the bins' scores from their IoUs, over moments; None where there is none.
    """

    overall: Cells
    by: dict[str, dict[str, Cells]]
    calibration: tuple[Bin, ...] = ()
    calibration_error: float | None = None


def summarise(pairs: Sequence[Pair], seed: int = 0) -> Summary:
    """All figures of a run, of the pairs that `records.match` gives; `seed` is of the intervals' resampling."""
    clusters = interval.clusters_of(pairs)
    means, ranks = _means(pairs)
    quantiles = [(ranks, {"retrieval_median_rank": 0.5}), (_latency(pairs), LATENCIES)]
    by: dict[str, dict[str, Cells]] = {}
    for name, key in _BREAKDOWNS.items():
        keys = [key(pair) for pair in pairs]
        found = sorted({each for each in keys if each is not None})
        places = {each: place for place, each in enumerate(found)}
        groups = np.array([places.get(each, -1) for each in keys])
        by[name] = {
            each.name if isinstance(each, Intent) else str(each): _cells(
                means, quantiles, clusters, groups == place, seed
            )
            for place, each in enumerate(found)
        }
    stages = dict.fromkeys(stage for pair in pairs if pair.prediction for stage in pair.prediction.latency)
    by["stage"] = {stage: interval.cells({}, clusters, [(_latency(pairs, stage), LATENCIES)], seed) for stage in stages}
    overall = interval.cells(means, clusters, quantiles, seed) | _spread(pairs, clusters, seed)
    return Summary(overall, by, *_calibration(pairs, clusters, seed))


def compare(first: Sequence[Pair], second: Sequence[Pair], seed: int = 0) -> dict[str, Comparison]:
    """Two runs on the same turns, by each metric that is a mean over the same turns in both.

    Raises ValueError where the turns are not the same.
    """
    if [pair.id for pair in first] != [pair.id for pair in second]:
        raise ValueError(f"runs: found {len(first)} and {len(second)} turns, expected the same ones in the same order")
    clusters = interval.clusters_of(first)
    ours, theirs = _means(first)[0], _means(second)[0]
    compared = {}
    for name in ours:
        there = ~np.isnan(ours[name])
        if there.any() and name in theirs and np.array_equal(there, ~np.isnan(theirs[name])):
            compared[name] = interval.compare(ours[name][there], theirs[name][there], clusters[there], seed)
    return compared


def _cells(
    means: Mapping[str, np.ndarray],
    quantiles: Sequence[tuple[np.ndarray, Mapping[str, float]]],
    clusters: np.ndarray,
    chosen: np.ndarray,
    seed: int,
) -> Cells:
    """Of the turns bool[N] that are chosen."""
    return interval.cells(
        {name: values[chosen] for name, values in means.items()},
        clusters[chosen],
        [(values[chosen], shares) for values, shares in quantiles],
        seed,
    )


def _means(pairs: Sequence[Pair]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Of each metric that is a mean, one value a turn, NaN in those that have no part in it; and ranks: f64[N]."""
    answers = [pair.prediction or NOTHING for pair in pairs]
    usable = np.array([pair.prediction is not None for pair in pairs])
    intents = np.array([pair.turn.intent for pair in pairs])
    there = np.array([pair.there for pair in pairs])
    reached = np.array([pair.reached for pair in pairs])
    understood = np.array([-1 if answer.intent is None else answer.intent for answer in answers])
    refused = (understood == Intent.VIDEO) & np.array([answer.video is None for answer in answers])
    parsed = usable & np.array([answer.parsed for answer in answers])
    searches, moments = intents == Intent.VIDEO, intents == Intent.MOMENT
    searched, ranks = _searches(pairs, np.flatnonzero(searches))
    means = {name: _column(searches, values) for name, values in searched.items()}
    means |= {
        "false_refusals": np.where(searches & there, refused | ~usable, np.nan),
        "refusal_recall": np.where(searches & ~there, refused, np.nan),
        "refusal_precision": np.where(searches & refused, ~there, np.nan),
    }
    means |= {name: _column(moments, values) for name, values in _found_moments(pairs, np.flatnonzero(moments)).items()}
    means |= {
        "intent_accuracy": (understood == intents).astype(np.float64),
        "unparsed": np.where((searches | moments) & reached, ~parsed, np.nan),
    }
    return means, _column(searches, ranks)


def _column(chosen: np.ndarray, values: np.ndarray) -> np.ndarray:
    """f64[N]: the values at the places bool[N] that are chosen, NaN at others."""
    column = np.full(len(chosen), np.nan)
    column[chosen] = values
    return column


def _searches(pairs: Sequence[Pair], turns: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """f64[M] by metric of VIDEO turns i64[M], and their ranks f64[M]."""
    largest = max((pair.prediction.pool for pair in pairs if pair.prediction), default=0)
    ranks, pools, chosen = [], [], []
    for pair in (pairs[turn] for turn in turns):
        answer, truth = pair.prediction or NOTHING, pair.turn.video_id
        listed = answer.ranking.index(truth) + 1 if truth in answer.ranking else np.inf
        ranks.append(listed if answer.rank is None else answer.rank)
        pools.append(answer.pool or largest or len(pair.turn.candidates))
        chosen.append(answer.video == truth)
    found = retrieval.per_query(np.array(ranks, np.float64), np.array(pools, np.int64))
    rank = found.pop("rank")
    means = {f"retrieval_{name}": values for name, values in found.items()}
    return means | {"retrieval_mean_rank": rank, "video_accuracy": np.array(chosen, np.float64)}, rank


def _found_moments(pairs: Sequence[Pair], turns: np.ndarray) -> dict[str, np.ndarray]:
    """f64[M] by metric of MOMENT turns i64[M]."""
    found, videos, spans = _moments(pairs, turns)
    own = moment.ious([moment.in_first_video(moments) for moments in found], videos, spans)
    means = {f"moment_{name}": values for name, values in moment.per_query(own).items()}
    if any(each.video != moments[0].video for moments in found for each in moments):
        everywhere = moment.per_corpus_query(moment.ious(found, videos, spans))
        means |= {f"vcmr_{name}": values for name, values in everywhere.items()}
    return means


def _moments(pairs: Sequence[Pair], turns: np.ndarray) -> tuple[list[tuple[Moment, ...]], list[str], np.ndarray]:
    """What was answered in MOMENT turns i64[M], and the true videos and spans f64[M, 2]."""
    some = [pairs[turn] for turn in turns]
    spans = np.array([pair.turn.span for pair in some], np.float64).reshape(-1, 2)
    return [(pair.prediction or NOTHING).moments for pair in some], [pair.turn.video_id for pair in some], spans


def _orders(pairs: Sequence[Pair]) -> tuple[np.ndarray, np.ndarray]:
    """Turns i64[M] whose candidates were shown in several orders, and f64[M, S] whether the true video came first in
    each, the order of the data before all others."""
    found = [
        (place, (answer.ranking.index(pair.turn.video_id) + 1, *answer.shuffled))
        for place, pair in enumerate(pairs)
        if (answer := pair.prediction) and answer.shuffled and pair.turn.video_id in answer.ranking
    ]
    fewest = min((len(ranks) for _, ranks in found), default=0)
    hits = np.array([[rank == 1 for rank in ranks[:fewest]] for _, ranks in found], np.float64)
    return np.array([place for place, _ in found], np.int64), hits


def _spread(pairs: Sequence[Pair], clusters: np.ndarray, seed: int) -> Cells:
    """How R@1 hangs on the order in which candidates are shown, where they were shown in several."""
    turns, hits = _orders(pairs)
    if not len(turns):
        return {}
    clusters = clusters[turns]
    changes = hits.min(1) != hits.max(1)
    cells = interval.cells({"order_changes": changes.astype(np.float64)}, clusters, seed=seed)
    whole = cells["order_changes"]
    low = high = None
    if whole.clusters > 1:
        drawn = interval.sums(np.concatenate([hits, np.ones((len(hits), 1))], 1), clusters, seed)
        spreads = (drawn[:, :-1] / drawn[:, -1:]).std(1, ddof=1)
        low, high = map(float, np.quantile(spreads, interval.SHARES))
    spread = float(hits.mean(0).std(ddof=1))
    return cells | {"order_spread": Cell(spread, low, high, whole.n, whole.clusters)}


def _latency(pairs: Sequence[Pair], stage: str | None = None) -> np.ndarray:
    """Seconds of each turn, or of one of its stages: f64[N], NaN where nothing was measured."""
    seconds = np.full(len(pairs), np.nan)
    for place, pair in enumerate(pairs):
        latency = pair.prediction.latency if pair.prediction else {}
        measured = [each for name, each in latency.items() if stage in (None, name)]
        if measured:
            seconds[place] = sum(measured)
    return seconds


def _calibration(pairs: Sequence[Pair], clusters: np.ndarray, seed: int) -> tuple[tuple[Bin, ...], float | None]:
    scored = np.array([_is_scored(pair) for pair in pairs])
    turns = np.flatnonzero(scored)
    if not len(turns):
        return (), None
    found, videos, spans = _moments(pairs, turns)
    firsts = [moments[0] for moments in found]
    scores = np.array([first.score for first in firsts], np.float64)
    ious = moment.ious([[first] for first in firsts], videos, spans)[:, 0]
    numbers = np.minimum((scores * BINS).astype(np.int64), BINS - 1)
    bins = []
    for number in np.unique(numbers):
        here = numbers == number
        cell = interval.cells({"iou": ious[here]}, clusters[turns[here]], seed=seed)["iou"]
        bins.append(Bin(number / BINS, (number + 1) / BINS, float(scores[here].mean()), cell))
    return tuple(bins), sum(abs(each.score - each.iou.value) * each.iou.n for each in bins) / len(scores)


def _is_scored(pair: Pair) -> bool:
    moments = pair.prediction.moments if pair.prediction and pair.turn.intent == Intent.MOMENT else ()
    return bool(moments) and moments[0].score is not None


_BREAKDOWNS: dict[str, Callable[[Pair], Any]] = {
    "turn": lambda pair: pair.place + 1,
    "intent": lambda pair: pair.turn.intent,
    "language": lambda pair: pair.turn.language,
    "corpus": lambda pair: (corpus_of(pair.turn.video_id) or "(root)") if pair.turn.video_id else None,
    "type": lambda pair: pair.dialogue.type,
}
