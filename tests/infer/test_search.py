"""Search against a stable sort of all scores, over blocks, devices, ties and filters."""

import ast
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from ivcr_jax.infer import search
from ivcr_jax.infer.search import Index
from ivcr_jax.sharding import MeshConfig, make_mesh


def brute_force(vectors, queries, k, allowed=None):
    """The answer by sorting everything. On whole numbers the sums are exact, so ties are ties."""
    scores = queries.astype(np.float64) @ vectors.astype(np.float64).T
    if allowed is not None:
        scores[:, ~allowed] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(scores, order, 1)
    return scores, np.where(np.isinf(scores), -1, order)


def same(found, expected):
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])
    assert found[0].dtype == np.float32 and found[1].dtype == np.int32


def drawn(seed, size, queries, width=6):
    """Small whole numbers: of a hundred rows many score the same."""
    rng = np.random.default_rng(seed)
    return (rng.integers(-2, 3, (count, width)).astype(np.float32) for count in (size, queries))


@pytest.fixture(params=["one device", "eight devices"])
def mesh(request):
    return None if request.param == "one device" else make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2))


@pytest.fixture(params=["one block", "blocks of 7 rows"])
def blocks(request, monkeypatch):
    if request.param != "one block":
        monkeypatch.setattr(search, "SCORES_BYTES", 7 * 4 * search.BATCHES[-1])


@pytest.mark.parametrize(("size", "k"), [(1, 3), (5, 5), (97, 4), (97, 1), (160, 30), (160, 500)])
def test_it_is_the_stable_sort(mesh, blocks, size, k):
    vectors, queries = drawn(size, size, 5)
    index = Index(vectors, mesh)
    same(index.search(queries, k), brute_force(vectors, queries, k))
    rng = np.random.default_rng(k)
    for share in (0.5, 0.03, 0.0):
        allowed = rng.random(size) < share
        same(index.search(queries, k, allowed), brute_force(vectors, queries, k, allowed))


def test_equal_vectors_come_in_order(mesh, blocks):
    vectors = np.ones((60, 4), np.float32)
    scores, indices = Index(vectors, mesh).search(np.ones((2, 4), np.float32), 60)
    np.testing.assert_array_equal(indices, [np.arange(60)] * 2)
    assert (scores == 4).all()


def test_a_block_is_no_larger_than_said(monkeypatch):
    monkeypatch.setattr(search, "SCORES_BYTES", 1000 * 4 * search.BATCHES[-1])
    index = Index(np.zeros((2500, 3), np.float32))
    assert [block.shape for block in index._blocks] == [(834, 3)] * 3
    assert [mask is None for mask in index._there] == [True, True, False]


@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 9, 300])
def test_any_number_of_queries(count):
    vectors, queries = drawn(1, 50, count)
    same(Index(vectors).search(queries, 7), brute_force(vectors, queries, 7))


def test_numbers_of_queries_share_programs():
    vectors, queries = drawn(2, 50, 8)
    index = Index(vectors)
    index.search(queries[:2], 3)
    before = search._best_of_block._cache_size(), search._best_of_devices._cache_size()
    for count in (3, 5, 8):
        index.search(queries[:count], 3)
    assert (search._best_of_block._cache_size(), search._best_of_devices._cache_size()) == before


def test_real_numbers_are_found_too(mesh, blocks):
    rng = np.random.default_rng(0)
    vectors, queries = (rng.standard_normal((count, 32)).astype(np.float32) for count in (300, 70))
    scores, indices = Index(vectors, mesh).search(queries, 10)
    expected, order = brute_force(vectors, queries, 10)
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_nothing_is_found_in_nothing(mesh):
    scores, indices = Index(np.zeros((0, 4), np.float32), mesh).search(np.zeros((3, 4), np.float32), 5)
    assert scores.shape == indices.shape == (3, 0)
    assert Index(np.zeros((9, 4), np.float32), mesh).search(np.zeros((0, 4), np.float32), 5)[0].shape == (0, 5)


def test_devices_exchange_the_best_alone():
    """All-gathers of k a device and a query; no program exchanges scores or vectors."""
    vectors, queries = drawn(3, 4000, 8)
    k, mesh = 5, make_mesh(MeshConfig(data=8, fsdp=1))
    index = Index(vectors, mesh)
    best = np.full((8 * 8, k), -np.inf, np.float32), np.full((8 * 8, k), -1, np.int32)
    block = queries, index._blocks[0], None, np.int32(0), *best
    lowered = search._best_of_block.lower(*block, share=index._share, of=4000, mesh=index._mesh)
    scores = lowered.compile().as_text()
    exchange = r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
    assert "f32[8,500]" in scores and not re.search(exchange, scores)  # eight queries, a device's 500 rows
    merge = search._best_of_devices.lower(*best, mesh=index._mesh).compile().as_text()
    gathered = re.findall(r"= (?:\()?[a-z0-9]+\[([\d,]*)\]\S* all-gather", merge)
    assert gathered and all(np.prod(list(map(int, shape.split(",")))) <= 8 * 8 * k for shape in gathered)
    assert {operation for operation in re.findall(exchange, merge)} == {"all-gather"}


FOR_TPU = r"""
import re
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from ivcr_jax.aot import devices_of
from ivcr_jax.infer import search

mesh = Mesh(np.array(devices_of("v5e:2x4", 1)), ("rows",))

def array(shape, dtype=np.float32, lies=P("rows")):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, lies))

best = array((8 * 64, 10)), array((8 * 64, 10), np.int32)
block = array((64, 512), lies=P()), array((8 * 65536, 512)), None, array((), np.int32, P())
program = search._best_of_block.lower(*block, *best, share=65536, of=8 * 65536, mesh=mesh)
print(re.findall(r'custom_call_target="(PartialReduce)"', program.compile().as_text()))
merge = search._best_of_devices.lower(*best, mesh=mesh).compile().as_text()
print(re.findall(r"= (\w+)\[([\d,]+)\]\S* all-gather", merge))
"""


@pytest.mark.aot
@pytest.mark.slow
def test_it_compiles_for_tpus():
    """With the kernel for TPUs, and k a device and a query exchanged."""
    root = pathlib.Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", FOR_TPU],
        env={**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    kernel, gathered = map(ast.literal_eval, run.stdout.splitlines())
    assert kernel == ["PartialReduce"]
    assert [dtype for dtype, _ in gathered] == ["f32", "s32"]
    assert all(np.prod(list(map(int, shape.split(",")))) == 8 * 64 * 10 for _, shape in gathered)


def test_rows_lie_on_all_devices():
    index = Index(np.zeros((4000, 6), np.float32), make_mesh(MeshConfig()))
    assert [shard.data.shape for shard in index._blocks[0].addressable_shards] == [(500, 6)] * jax.device_count()


def test_what_does_not_fit_is_said():
    index = Index(np.zeros((5, 4), np.float32))
    queries = np.zeros((1, 4), np.float32)
    with pytest.raises(ValueError, match=r"vectors are float64\[5, 4\]; expected float32\[N, D\]"):
        Index(np.zeros((5, 4)))
    with pytest.raises(ValueError, match=r"queries are of shape \[1, 3\]; expected \[B, 4\]"):
        index.search(queries[:, :3], 1)
    with pytest.raises(ValueError, match="queries hold values that are not finite"):
        index.search(queries * np.nan, 1)
    with pytest.raises(ValueError, match="k is 0; expected at least 1"):
        index.search(queries, 0)
    with pytest.raises(ValueError, match=r"allowed is float64\[5\]; expected bool\[5\]"):
        index.search(queries, 1, np.ones(5))
