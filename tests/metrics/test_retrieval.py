"""Metrics of ranking, against ranx and cases by hand."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from ivcr_jax.metrics import retrieval

# Interpreted: compiling its few loops takes a minute.
RANX = """
import json, sys, warnings
warnings.simplefilter("ignore")
from ranx import Qrels, Run, evaluate
given = json.load(sys.stdin)
run = Run(given["run"])
evaluate(Qrels(given["qrels"]), run, given["metrics"], make_comparable=True)
scores = {name: {query: float(score) for query, score in run.scores[name].items()} for name in given["metrics"]}
print(json.dumps(scores))
"""


def ranx(qrels, run, metrics):
    done = subprocess.run(
        [sys.executable, "-c", RANX],
        input=json.dumps({"qrels": qrels, "run": run, "metrics": metrics}),
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    return {name: np.array([scores[query] for query in run]) for name, scores in found.items()}


@pytest.fixture(scope="module")
def searches():
    """Scores f64[Q, N] without ties, and true videos i64[Q]."""
    rng = np.random.default_rng(0)
    return rng.permuted(np.tile(np.linspace(0, 1, 30), (300, 1)), axis=1), rng.integers(0, 30, 300)


@pytest.fixture(scope="module")
def theirs(searches):
    """What ranx finds."""
    scores, truths = searches
    run = {f"q{row}": {f"v{place}": float(s) for place, s in enumerate(line)} for row, line in enumerate(scores)}
    one = {f"q{row}": {f"v{truth}": 1} for row, truth in enumerate(truths)}
    return ranx(one, run, ["hit_rate@1", "hit_rate@5", "hit_rate@10", "mrr", "ndcg@10"])


def test_every_query_has_what_ranx_gives_it(searches, theirs):
    scores, truths = searches
    found = retrieval.per_query(retrieval.ranks(scores, truths), np.full(300, 30))
    names = {"r1": "hit_rate@1", "r5": "hit_rate@5", "r10": "hit_rate@10", "mrr": "mrr", "ndcg10": "ndcg@10"}
    assert found.keys() == {*names, "rank"}
    for name, other in names.items():
        np.testing.assert_allclose(found[name], theirs[other], atol=1e-9)
    assert 0.2 < found["r10"].mean() < 0.5


def test_ties_and_what_is_no_number_count_against_the_truth():
    nan = np.nan
    scores = np.array([[1, 2, 3], [3, 3, 3], [3, 2, 3], [nan, 2, 3], [2, nan, 1], [1, nan, nan]])
    assert retrieval.ranks(scores, np.array([2, 0, 0, 0, 0, 0])).tolist() == [1, 3, 2, 3, 2, 3]


def test_ranks_by_hand():
    found = retrieval.per_query(np.array([1, 5, 6, 10, 11, np.inf]), np.array([20, 20, 20, 20, 20, 10]))
    assert found["r1"].tolist() == [1, 0, 0, 0, 0, 0]
    assert found["r5"].tolist() == [1, 1, 0, 0, 0, 0]
    assert found["r10"].tolist() == [1, 1, 1, 1, 0, 0]
    np.testing.assert_allclose(found["mrr"], [1, 1 / 5, 1 / 6, 1 / 10, 1 / 11, 0])
    np.testing.assert_allclose(found["ndcg10"], [1, 1 / np.log2(6), 1 / np.log2(7), 1 / np.log2(11), 0, 0])
    assert found["rank"].tolist() == [1, 5, 6, 10, 11, 11]
    assert (found["rank"].mean(), np.median(found["rank"])) == (44 / 6, 8)
