"""Intervals against loops over the same draws, scipy, and how often they cover the truth; p against all sign flips."""

import itertools

import numpy as np
import pytest
import scipy.stats

from ivcr_jax.data.dialogue import Dialogue, Intent, Turn
from ivcr_jax.metrics import interval
from ivcr_jax.metrics.records import Pair

NAMES = np.array([7, 3, 3, 9, 7, 7, 3, 5, 5, 11, 7])  # of clusters: 3, 5, 7, 9, 11


@pytest.fixture
def values():
    return np.random.default_rng(0).normal(size=(len(NAMES), 2))


def resamples(seed):
    """The queries of each resample, by its draws."""
    members = [np.flatnonzero(name == NAMES) for name in sorted(set(NAMES.tolist()))]
    for block in interval.draws(len(members), interval.RESAMPLES, seed):
        for drawn in block:
            yield np.concatenate([members[cluster] for cluster in drawn])


def test_intervals_of_means_are_those_of_a_loop(values):
    cells = interval.cells({"a": values[:, 0], "b": values[:, 1]}, NAMES, seed=3)
    means = np.array([values[chosen].mean(0) for chosen in resamples(3)])
    assert len(means) == 2000
    for name, column in (("a", 0), ("b", 1)):
        ends = np.quantile(means[:, column], (0.025, 0.975))
        expected = (values[:, column].mean(), *ends)
        np.testing.assert_allclose([cells[name].value, cells[name].low, cells[name].high], expected, rtol=1e-12)
        assert (cells[name].n, cells[name].clusters) == (11, 5)


def test_totals_are_those_of_a_loop(values):
    expected = np.array([values[chosen].sum(0) for chosen in resamples(1)])
    np.testing.assert_allclose(interval.sums(values, NAMES, 1), expected, atol=1e-12)
    assert not np.allclose(interval.sums(values, NAMES, 2), expected)


def test_intervals_of_quantiles_are_those_of_a_loop(values):
    column = np.round(values[:, 0], 1)
    column[:3] = column[3]  # ties
    shares = {"median": 0.5, "high": 0.95, "low": 0.1}
    cells = interval.cells({}, NAMES, [(column, shares)], seed=3)
    found = np.array([np.quantile(column[chosen], [*shares.values()]) for chosen in resamples(3)])
    for place, (name, share) in enumerate(shares.items()):
        expected = (np.quantile(column, share), *np.quantile(found[:, place], (0.025, 0.975)))
        np.testing.assert_allclose([cells[name].value, cells[name].low, cells[name].high], expected, atol=1e-12)


def test_figures_of_some_of_the_turns_are_resampled_with_all(values):
    """Turns without a part are drawn with their clusters and not counted; a resample may lack all others."""
    column, rare = values[:, 0].copy(), np.full(len(NAMES), np.nan)
    column[[0, 4, 9]] = np.nan
    rare[[7, 9]] = 1, 2  # of clusters 5 and 11
    means = {"whole": values[:, 1], "column": column, "rare": rare, "none": np.full(len(NAMES), np.nan)}
    found = interval.cells(means, NAMES, [(column, {"median": 0.5, "high": 0.9}), (rare, {"least": 0.0})], seed=2)
    expected = {name: [] for name in found}
    for chosen in resamples(2):
        there = [place for place in chosen if not np.isnan(column[place])]
        scarce = [rare[place] for place in chosen if not np.isnan(rare[place])]
        expected["whole"].append(values[chosen, 1].mean())
        for name, of in (("column", np.mean), ("median", np.median), ("high", lambda each: np.quantile(each, 0.9))):
            if there:
                expected[name].append(of(column[there]))
        if scarce:
            expected["rare"].append(np.mean(scarce))
            expected["least"].append(min(scarce))
    assert [*found] == ["whole", "column", "rare", "median", "high", "least"]
    assert len(expected["rare"]) < 1900 < len(expected["column"])
    for name, cell in found.items():
        np.testing.assert_allclose([cell.low, cell.high], np.quantile(expected[name], (0.025, 0.975)), atol=1e-12)
    assert (found["column"].n, found["column"].clusters, found["rare"].n, found["rare"].clusters) == (8, 4, 2, 2)
    values = found["median"].value, found["column"].value
    assert values == pytest.approx((np.nanmedian(column), np.nanmean(column)))


def test_blocks_hold_all_resamples_whatever_their_size(values, monkeypatch):
    whole = interval.cells({}, NAMES, [(values[:, 0], {"m": 0.5})], seed=3)
    monkeypatch.setattr(interval, "_AT_ONCE", 7)
    assert sum(len(block) for block in interval.draws(5, 2000, 0)) == 2000
    drawn = np.concatenate([*interval.draws(5, 2000, 0)])
    assert drawn.shape == (2000, 5) and {*drawn.ravel()} == {0, 1, 2, 3, 4}
    small = interval.cells({}, NAMES, [(values[:, 0], {"m": 0.5})], seed=3)
    assert small["m"].value == whole["m"].value and small["m"].low == pytest.approx(whole["m"].low, abs=0.3)


def test_one_query_a_cluster_agrees_with_scipy():
    """Both are random; their ends differ by what 2,000 resamples leave open."""
    sample = np.random.default_rng(1).gamma(2.0, size=120)
    cell = interval.cells({"a": sample}, np.arange(120))["a"]
    theirs = scipy.stats.bootstrap(
        (sample,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert abs(cell.low - theirs.low) < 0.05 * width and abs(cell.high - theirs.high) < 0.05 * width


def test_clustered_intervals_cover_and_naive_ones_do_not():
    """40 videos of five queries that are right and wrong together; 300 such sets."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(40), 5)
    covered = np.zeros(2)
    for _ in range(300):
        sample = rng.normal(size=40)[clusters] + rng.normal(scale=0.7, size=200)
        for place, names in enumerate((clusters, np.arange(200))):
            cell = interval.cells({"a": sample}, names, seed=int(rng.integers(1 << 30)))["a"]
            covered[place] += cell.low <= 0 <= cell.high
    clustered, naive = covered / 300
    assert 0.91 < clustered < 0.98
    assert naive < 0.75


def test_one_cluster_has_no_interval():
    cell = interval.cells({"a": np.array([1.0, 2.0])}, np.array([4, 4]))["a"]
    assert cell == interval.Cell(1.5, None, None, 2, 1)
    assert interval.cells({}, np.array([4, 4]), [(np.array([1.0, 2.0]), {"a": 0.5})])["a"] == cell


def test_the_comparison_is_that_of_all_sign_flips():
    rng = np.random.default_rng(5)
    clusters = np.repeat(np.arange(9), (1, 2, 3, 4, 1, 2, 3, 4, 5))
    first = (rng.random(25) < 0.8).astype(float)
    second = (rng.random(25) < 0.45).astype(float)
    found = interval.compare(first, second, clusters)
    totals = np.array([(first - second)[clusters == cluster].sum() for cluster in range(9)])
    flips = np.array([abs(np.dot(signs, totals)) for signs in itertools.product((-1, 1), repeat=9)])
    exact = (flips >= abs(totals.sum()) - 1e-9).mean()
    assert 0.02 < exact < 0.5
    assert found.p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / interval.FLIPS))
    assert found.difference == pytest.approx(first.mean() - second.mean())
    cell = interval.cells({"d": first - second}, clusters)["d"]
    assert (found.low, found.high, found.n, found.clusters) == (cell.low, cell.high, 25, 9)
    other = interval.compare(second, first, clusters)
    assert (other.p, other.difference) == (found.p, -found.difference)


def test_equal_runs_do_not_differ_and_p_is_fair():
    same = np.random.default_rng(0).random(30)
    assert interval.compare(same, same, np.arange(30) // 3).p == 1
    rng = np.random.default_rng(1)
    clusters = np.repeat(np.arange(20), 3)
    runs = (rng.normal(size=(2, 20))[:, clusters] + rng.normal(size=(2, 60)) for _ in range(150))
    found = [interval.compare(first, second, clusters).p for first, second in runs]
    assert 0.005 < np.mean(np.array(found) < 0.05) < 0.11  # of runs that are alike, one in twenty
    assert 0.38 < np.mean(np.array(found) < 0.5) < 0.62


def test_clusters_are_true_videos_and_the_chat_of_a_dialogue():
    search, talk = Turn("q", "a", Intent.VIDEO, "en", "c/a"), Turn("q", "a", Intent.CHAT, "en")
    one, two = (Dialogue(name, "test", 1, (search, talk, talk)) for name in ("one", "c/a"))
    pairs = [Pair(dialogue, place, False, None) for dialogue in (one, two) for place in range(3)]
    assert interval.clusters_of(pairs).tolist() == [0, 1, 1, 0, 2, 2]
