"""The stream of batches: the same rows whatever the processes, workers, threads and restarts."""

import dataclasses
import json

import numpy as np
import pytest

from ivcr_jax.data import pipeline
from tests.data import sources

CONFIG = pipeline.PipelineConfig(pack=sources.PACK, batch_size=4, seed=3, threads=2)


def make(stores, config=CONFIG, **kwargs):
    return pipeline.Pipeline(*stores, config, **kwargs)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def records(batch):
    """The dialogues of each row."""
    return [tuple(dict.fromkeys(row[row >= 0].tolist())) for row in batch["turn_records"]]


def test_shapes_and_dtypes_are_static(stores):
    stream = make(stores)
    spec = {key: (array.shape, array.dtype) for key, array in stream.batch(0).items()}
    for batch in take(iter(stream), stream.steps + 2):
        assert {key: (array.shape, array.dtype) for key, array in batch.items()} == spec


def test_each_pass_holds_every_dialogue_once_in_a_new_order(stores):
    stream = make(stores)
    rows = len(stream.plan)
    assert stream.steps == -(-rows // 4)
    flat = [row for batch in take(iter(stream), 3 * rows // 4 + 1) for row in records(batch)]
    passes = [flat[epoch * rows : (epoch + 1) * rows] for epoch in range(3)]
    for one in passes:
        assert sorted(record for row in one for record in row) == list(range(len(stores[0])))
    assert passes[0] != passes[1] != passes[2]
    assert sorted(passes[0]) == sorted(passes[1])


def test_candidates_and_frames_are_drawn_anew_each_pass(stores):
    config = dataclasses.replace(CONFIG, pack=dataclasses.replace(CONFIG.pack, frames=2))
    stream = make(stores, config)
    seen = {}
    for batch in take(iter(stream), 4 * stream.steps):
        for row, content in enumerate(records(batch)):
            seen.setdefault(content, []).append(
                (batch["candidate_targets"][row].tolist(), batch["frame_times"][row].tolist())
            )
    targets, times = zip(*(zip(*draws, strict=True) for draws in seen.values()), strict=True)
    for kind in (targets, times):
        assert sum(len({str(draw) for draw in draws}) > 1 for draws in kind) > len(kind) / 2


def test_a_resumed_stream_goes_on_exactly(stores):
    middle = 3
    straight = take(iter(make(stores)), middle + make(stores).steps)  # into the second pass
    first = iter(make(stores))
    take(first, middle)
    state = json.loads(json.dumps(first.get_state()))
    resumed = iter(make(stores))
    resumed.set_state(state)
    for expected, batch in zip(straight[middle:], resumed, strict=False):
        assert same(expected, batch)
    # Setting the state of a stream that has read ahead throws its read-ahead away.
    first.set_state({**state, "rows": 4})
    assert same(next(first), straight[1])


def test_any_step_can_be_built_at_once(stores):
    stream = make(stores)
    straight = take(iter(stream), 6)
    assert same(stream.batch(5), straight[5]) and same(stream.batch(2), straight[2])
    far = iter(stream)
    far.set_state({**far.get_state(), "rows": 4 * 10**9})
    assert same(next(far), stream.batch(10**9))


@pytest.mark.parametrize("shares", [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[3], [1], [2], [0]]])
def test_processes_share_the_rows_of_one_global_batch(stores, shares):
    whole = take(iter(make(stores)), 4)
    for rows in shares:
        for found, expected in zip(take(iter(make(stores, rows=rows)), 4), whole, strict=True):
            assert same(found, {key: array[rows] for key, array in expected.items()})


def test_a_state_moves_to_another_number_of_processes(stores):
    straight = take(iter(make(stores)), 5)
    old = iter(make(stores, rows=[2, 3]))
    take(old, 3)
    for index in range(4):
        new = iter(make(stores, rows=[index]))
        new.set_state(old.get_state())
        assert same(next(new), {key: array[index : index + 1] for key, array in straight[3].items()})


@pytest.mark.multiprocess
def test_a_state_moves_to_another_number_of_workers(stores):
    straight = take(iter(make(stores)), 7)
    state = iter(make(stores)).get_state()
    done = 0
    for workers, count in ((2, 3), (3, 2), (0, 2)):
        stream = iter(make(stores, dataclasses.replace(CONFIG, workers=workers)))
        stream.set_state(state)
        assert all(map(same, straight[done : done + count], take(stream, count)))
        done += count
        state = stream.get_state()


def test_threads_and_prefetch_change_nothing(stores):
    straight = take(iter(make(stores)), 5)
    other = take(iter(make(stores, dataclasses.replace(CONFIG, threads=1, prefetch=4))), 5)
    assert all(map(same, straight, other))


def test_the_batch_size_may_change_where_batches_still_line_up(stores):
    old = iter(make(stores))
    straight = take(old, 3)
    halved = iter(make(stores, dataclasses.replace(CONFIG, batch_size=2)))
    halved.set_state({**old.get_state(), "rows": 8})
    assert same(next(halved), {key: array[:2] for key, array in straight[2].items()})
    odd = iter(make(stores, dataclasses.replace(CONFIG, batch_size=5)))
    with pytest.raises(ValueError, match="row 12, inside a batch of 5 rows"):
        odd.set_state(old.get_state())


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"train": False},
        {"keep_chat": False},
        {"pack": dataclasses.replace(sources.PACK, frames=4)},
    ],
)
def test_the_state_of_another_stream_is_refused(stores, change):
    other = iter(make(stores, dataclasses.replace(CONFIG, **change)))
    with pytest.raises(ValueError, match="another stream"):
        iter(make(stores)).set_state(other.get_state())


def test_a_pass_without_training_reads_each_row_once_and_pads_the_last(stores):
    config = dataclasses.replace(CONFIG, train=False, batch_size=8)
    stream = make(stores, config)
    batches = list(stream)
    assert len(batches) == stream.steps and len(stream.plan) % 8
    flat = [row for batch in batches for row in records(batch)]
    filled = len(stream.plan)
    assert sorted(record for row in flat[:filled] for record in row) == list(range(len(stores[0])))
    assert flat[filled:] == [()] * (8 * stream.steps - filled)
    last = {key: array[filled % 8 :] for key, array in batches[-1].items()}
    assert not any(
        last[key].any() for key in ("tokens", "segment_ids", "loss_mask", "turn_mask", "video_mask", "frame_mask")
    )
    # As stored: candidates in the first stage's order.
    for batch in batches:
        for row, turn in zip(*np.nonzero(batch["candidate_targets"] >= 0), strict=True):
            source = stores[0][int(batch["turn_records"][row, turn])].turns[batch["turn_numbers"][row, turn]]
            place = min(source.candidates.index(source.video_id), sources.PACK.encoding.max_candidates - 1)
            assert batch["candidate_targets"][row, turn] == place


def test_a_cached_plan_is_used(stores, tmp_path, monkeypatch):
    fresh = make(stores, cache_dir=tmp_path)
    assert len(list(tmp_path.glob("plan-*.json"))) == 1
    monkeypatch.setattr("ivcr_jax.data.packing.make_plan", None)
    assert same(make(stores, cache_dir=tmp_path).batch(1), fresh.batch(1))


@pytest.mark.parametrize("rows", [[], [3, 4], [-1]])
def test_rows_that_a_batch_does_not_have(stores, rows):
    with pytest.raises(ValueError, match=f"rows {', '.join(map(str, rows))} of a batch of 4"):
        make(stores, rows=rows)


@pytest.mark.parametrize(("field", "value"), [("batch_size", 0), ("threads", 0), ("prefetch", 0), ("workers", -1)])
def test_bad_config(field, value):
    with pytest.raises(ValueError, match=f"{field} is {value}; expected"):
        dataclasses.replace(CONFIG, **{field: value})
