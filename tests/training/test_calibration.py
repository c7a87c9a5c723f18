"""The threshold below which nothing fits, on similarities made by hand and on the tiny run's own data."""

import numpy as np
import pytest

from ivcr_jax import calibration
from ivcr_jax.validation import Query

VIDEOS = {10 * n: row for n, row in enumerate(np.eye(5, dtype=np.float32))}  # so a query's numbers are its cosines


def query(own, *cosines, candidates=()):
    """A search whose video is number 0, with this cosine, and those of the others."""
    return Query(0, 0, np.array([own, *cosines, *[-1] * (4 - len(cosines))], np.float32), candidates)


def test_the_threshold_is_that_of_the_rule():
    """Of 120 queries two may be refused (2 % are 2.4), so the third smallest cosine is where fitting begins."""
    own = np.random.default_rng(0).permutation(np.arange(120) / 128)
    found = calibration.measure([query(cosine) for cosine in own], VIDEOS)
    assert found.threshold == 2 / 128 and (found.queries, found.videos) == (120, 5)
    assert found.refused_alone == found.refused_answerable == 2 / 120
    assert found.refused_without_truth == found.refused_without_candidates == 1


def test_rates_are_those_counted_by_hand():
    """The threshold is 0.25: one query's own cosine is under it, all the others' are 0.25 or 0.5."""
    queries = [
        query(0.125, 0.375),  # its own is under the threshold, another video is not
        *[query(0.25, 0.125, candidates=(0, 10))] * 9,  # refused without its own
        *[query(0.5, 0.375, candidates=(0, 10))] * 15,  # a candidate of the data fits, too
        *[query(0.5, 0.125, 0.375, candidates=(0, 10, 999))] * 35,  # what fits is no candidate
    ]
    strangers = [Query(0, 5, np.zeros(5, np.float32), ())] * 30  # their video is in no batch
    found = calibration.measure([*strangers, *queries], VIDEOS)
    assert found.threshold == 0.25 and found.queries == 60
    assert found.refused_answerable == 0 and found.refused_alone == 1 / 60
    assert found.refused_without_truth == 9 / 60
    assert found.refused_without_candidates == 24 / 60


def test_slices_of_queries_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    queries = []
    for own in rng.integers(5, size=101):
        vector = rng.uniform(-1, 1, 5).astype(np.float32)
        vector[own] = rng.uniform(0.5, 1)
        queries.append(Query(0, int(own) * 10, vector, (int(rng.integers(5)) * 10,)))
    whole = calibration.measure(queries, VIDEOS)
    assert 0 < whole.refused_without_truth < whole.refused_without_candidates < 1
    monkeypatch.setattr(calibration, "AT_ONCE", 7)
    assert calibration.measure(queries, VIDEOS) == whole


def test_a_broken_retriever_is_refused():
    queries = [*[query(0.5)] * 60, query(float("nan"))]
    with pytest.raises(calibration.CannotTell, match="found cosines that are not finite"):
        calibration.measure(queries, VIDEOS)


def test_a_share_that_is_less_than_one_query_is_refused():
    queries = [query(0.5)] * 49
    with pytest.raises(calibration.CannotTell, match="found 49 queries of videos that are there, expected at least 50"):
        calibration.measure(queries, VIDEOS)
    assert calibration.measure([*queries, query(-0.5)], VIDEOS).threshold == 0.5
