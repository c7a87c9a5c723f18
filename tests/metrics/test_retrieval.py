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
    """Scores f64[Q, N] without ties, true videos i64[Q], grades i64[Q, N] in which the true video has the best."""
    rng = np.random.default_rng(0)
    scores = rng.permuted(np.tile(np.linspace(0, 1, 30), (300, 1)), axis=1)
    grades = rng.integers(0, 3, scores.shape) * (rng.random(scores.shape) < 0.3)
    truths = rng.integers(0, 30, 300)
    grades[np.arange(300), truths] = 3
    return scores, truths, grades


@pytest.fixture(scope="module")
def theirs(searches):
    """What ranx finds: with one relevant video a query, and with grades."""
    scores, truths, grades = searches
    run = {f"q{row}": {f"v{place}": float(s) for place, s in enumerate(line)} for row, line in enumerate(scores)}
    one = {f"q{row}": {f"v{truth}": 1} for row, truth in enumerate(truths)}
    many = {f"q{row}": {f"v{p}": int(g) for p, g in enumerate(line) if g} for row, line in enumerate(grades)}
    both = {
        "qrels": {**{f"one-{q}": v for q, v in one.items()}, **{f"many-{q}": v for q, v in many.items()}},
        "run": {**{f"one-{q}": v for q, v in run.items()}, **{f"many-{q}": v for q, v in run.items()}},
    }
    metrics = ["hit_rate@1", "hit_rate@5", "hit_rate@10", "mrr", "ndcg@10"]
    found = ranx(both["qrels"], both["run"], metrics)
    return {name: values[:300] for name, values in found.items()}, found["ndcg@10"][300:]


def test_every_query_has_what_ranx_gives_it(searches, theirs):
    scores, truths, _ = searches
    found = retrieval.per_query(retrieval.ranks(scores, truths), np.full(300, 30))
    names = {"r1": "hit_rate@1", "r5": "hit_rate@5", "r10": "hit_rate@10", "mrr": "mrr", "ndcg10": "ndcg@10"}
    assert found.keys() == {*names, "rank"}
    for name, other in names.items():
        np.testing.assert_allclose(found[name], theirs[0][other], atol=1e-9)
    assert 0.2 < found["r10"].mean() < 0.5


def test_grades_count_as_in_ranx(searches, theirs):
    scores, _, grades = searches
    rankings = [[f"v{place}" for place in np.argsort(-line)] for line in scores]
    relevance = [{f"v{place}": float(grade) for place, grade in enumerate(line) if grade} for line in grades]
    np.testing.assert_allclose(retrieval.graded_ndcg(rankings, relevance), theirs[1], atol=1e-9)


def test_grades_by_hand():
    rankings = [["a", "b", "c"], ["a"], [], ["a"], [f"v{n}" for n in range(11)]]
    relevance = [{"c": 3, "a": 1}, {"a": 2}, {"a": 2}, {}, {"v10": 1}]
    expected = [(1 + 3 / 2) / (3 + 1 / np.log2(3)), 1, 0, 0, 0]
    np.testing.assert_allclose(retrieval.graded_ndcg(rankings, relevance), expected, atol=1e-12)


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
