"""How sure a figure is: 95 % intervals by the percentile bootstrap over clusters, and the comparison of two runs.

Many queries ask for the same video and are right or wrong together, so whole videos are drawn, with all their queries:
drawing queries alone gives intervals that are too narrow. Clusters are any whole numbers, the same in one cluster.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ivcr_jax.metrics.records import Pair

RESAMPLES = 2000
FLIPS = 10_000
SHARES = (0.025, 0.975)
_AT_ONCE = 500_000  # numbers of a block of resamples


@dataclasses.dataclass(frozen=True)
class Cell:
    """A figure of a table.

    Attributes:
      value: the estimate. low, high: its interval, None of fewer than two clusters.
      n: queries. clusters: how many these are in.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    clusters: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The first run against the second on the same turns.

    Attributes:
      difference: of the means, the first less the second. low, high: its interval, None of fewer than two clusters.
      p: how often as large a difference, of either sign, comes of exchanging the runs in whole clusters at random.
      n: turns. clusters: how many these are in.
    """

    difference: float
    low: float | None
    high: float | None
    p: float
    n: int
    clusters: int


def clusters_of(pairs: Sequence[Pair]) -> np.ndarray:
    """The cluster of each turn, i64[N]: its true video, or, in chat turns, the dialogue."""
    names = [(pair.turn.video_id, "" if pair.turn.video_id else pair.dialogue.id) for pair in pairs]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], np.int64)


def draws(clusters: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Clusters drawn with replacement: blocks i64[b, clusters], `resamples` rows in all."""
    rng = np.random.default_rng(seed)
    most = max(1, _AT_ONCE // clusters)
    for first in range(0, resamples, most):
        yield rng.integers(clusters, size=(min(most, resamples - first), clusters))


def _weights(clusters: int, seed: int) -> Iterator[np.ndarray]:
    """How often each cluster was drawn: blocks i64[b, clusters]."""
    for drawn in draws(clusters, RESAMPLES, seed):
        drawn += np.arange(len(drawn))[:, None] * clusters
        yield np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)


def _counted(clusters: np.ndarray) -> tuple[np.ndarray, int]:
    """The same clusters as numbers from 0, and how many there are."""
    names, numbers = np.unique(clusters, return_inverse=True)
    return numbers, len(names)


def sums(values: np.ndarray, clusters: np.ndarray, seed: int = 0) -> np.ndarray:
    """Totals of values f64[N, M] in each resample of clusters i64[N]: f64[RESAMPLES, M]."""
    clusters, count = _counted(clusters)
    totals = np.stack([np.bincount(clusters, column, count) for column in values.T], 1)
    return np.concatenate([weights @ totals for weights in _weights(count, seed)])


def cells(
    means: Mapping[str, np.ndarray],
    clusters: np.ndarray,
    quantiles: Sequence[tuple[np.ndarray, Mapping[str, float]]] = (),
    seed: int = 0,
) -> dict[str, Cell]:
    """Figures of the same turns, each with its interval, by name.

    Args:
      means: f64[N] each, NaN for the turns that have no part in it; one that none has part in is left out.
      clusters: i64[N].
      quantiles: f64[N] as above, and which of its quantiles by name, linear between order statistics as NumPy's.
    """
    clusters, count = _counted(clusters)
    known = {name: values for name, values in means.items() if not np.isnan(values).all()}
    sorts = [(*_sorted(values, clusters), shares) for values, shares in quantiles if not np.isnan(values).all()]
    found: dict[str, list[np.ndarray]] = collections.defaultdict(list)
    totals = {name: np.bincount(clusters, np.nan_to_num(values), count) for name, values in known.items()}
    counts = {name: np.bincount(clusters, ~np.isnan(values), count) for name, values in known.items()}
    # Few sets of turns have part in all of these, so each is counted once.
    sets = {each.tobytes(): each for each in counts.values()}
    table = np.stack([*totals.values(), *sets.values()], 1) if known else np.zeros((count, 0))
    columns = {name: len(totals) + [*sets].index(each.tobytes()) for name, each in counts.items()}
    for weights in _weights(count, seed) if count > 1 else ():
        drawn = weights @ table
        with np.errstate(invalid="ignore"):  # a resample may lack all turns of a figure
            for place, name in enumerate(known):
                found[name].append(drawn[:, place] / drawn[:, columns[name]])
        for ordered, own, shares in sorts:
            for name, column in zip(shares, _quantiles(ordered, own, [*shares.values()], weights).T, strict=True):
                found[name].append(column)
    cells: dict[str, Cell] = {}
    for name, values in known.items():
        there = ~np.isnan(values)
        cells[name] = _cell(float(values[there].mean()), found[name], clusters[there])
    for ordered, own, shares in sorts:
        cells |= {name: _cell(float(np.quantile(ordered, share)), found[name], own) for name, share in shares.items()}
    return cells


def _sorted(values: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values that there are, in order, and the cluster of each."""
    order = np.argsort(values, kind="stable")[: np.count_nonzero(~np.isnan(values))]  # NaN come last
    return values[order], clusters[order]


def _quantiles(ordered: np.ndarray, own: np.ndarray, shares: Sequence[float], weights: np.ndarray) -> np.ndarray:
    """Quantiles in each resample of i64[b, clusters] weights: f64[b, shares], NaN where it has no value."""
    found = []
    most = max(1, _AT_ONCE // len(ordered))
    for first in range(0, len(weights), most):
        # How many of a resample's values come up to each one.
        reached = np.cumsum(np.take(weights[first : first + most], own, 1), 1, np.int32)
        places = np.maximum(reached[:, -1:] - 1, 0) * np.array(shares)
        edges = np.concatenate([np.floor(places), np.ceil(places)], 1).astype(np.int32)
        values = np.stack([row.searchsorted(edge, "right") for row, edge in zip(reached, edges, strict=True)])
        below, above = np.split(ordered[np.minimum(values, len(ordered) - 1)], 2, 1)
        some = below + (places - np.floor(places)) * (above - below)
        found.append(np.where(reached[:, -1:] > 0, some, np.nan))
    return np.concatenate(found)


def _cell(value: float, resampled: list[np.ndarray], clusters: np.ndarray) -> Cell:
    several = len(np.unique(clusters))
    low, high = map(float, np.nanquantile(np.concatenate(resampled), SHARES)) if several > 1 else (None, None)
    return Cell(value, low, high, len(clusters), several)


def compare(first: np.ndarray, second: np.ndarray, clusters: np.ndarray, seed: int = 0) -> Comparison:
    """Two runs' values f64[N] of the same turns; p is by a sign-flip permutation test over clusters."""
    differences = first - second
    cell = cells({"": differences}, clusters, seed=seed)[""]
    totals = np.bincount(_counted(clusters)[0], differences)
    rng = np.random.default_rng(seed)
    least = abs(totals.sum()) - 1e-9 * np.abs(totals).sum()  # sums in another order differ in their last bits
    most = max(1, _AT_ONCE // len(totals))
    as_large = 0
    for begin in range(0, FLIPS, most):
        signs = rng.integers(0, 2, (min(most, FLIPS - begin), len(totals)), np.int8)
        as_large += int((np.abs((2.0 * signs - 1) @ totals) >= least).sum())
    # The runs as they are count as one of the permutations: p is never 0 (Phipson and Smyth, 2010).
    return Comparison(cell.value, cell.low, cell.high, (as_large + 1) / (FLIPS + 1), cell.n, cell.clusters)
