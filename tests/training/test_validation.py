"""Metrics of validation, against loops over made-up answers of the models."""

import numpy as np
import pytest

from ivcr_jax.losses import LossConfig
from ivcr_jax.validation import Validation, names

ROWS, TURNS, CANDIDATES, SLOTS, VIDEOS, WIDTH = 10, 4, 5, 3, 14, 2
ALL = LossConfig(rank=0.5, contrastive=2.0)
LANGUAGE = ("en", "zh")


@pytest.fixture(scope="module")
def answers():
    """What the validation step finds of ten rows. Some vectors are of the same few, so that similarities are equal."""
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, (ROWS, TURNS))  # 0 chat, 1 video, 2 moment
    spans = np.sort(rng.uniform(0, 20, (ROWS, TURNS, 2, 2)), -1).astype(np.float32)
    spans[kind == 0] = 0
    places = np.array([[1, 0], [0, 1], [-1, 0]], np.float32)
    angles = rng.uniform(0, 6, VIDEOS - 6)
    vectors = np.concatenate([places, places, np.stack([np.cos(angles), np.sin(angles)], -1)]).astype(np.float32)
    asked = rng.integers(0, VIDEOS, (ROWS, TURNS))
    near = np.where(rng.random((ROWS, TURNS)) < 0.5, asked, rng.integers(0, VIDEOS, (ROWS, TURNS)))
    numbers = np.stack([rng.permutation(VIDEOS)[:SLOTS] for _ in range(ROWS)])
    numbers[rng.random(numbers.shape) < 0.2] = -1
    names = ("lm", "rank", "moment", "moment_l1", "moment_iou", "contrastive")
    return {
        "sums": {name: rng.uniform(1, 9, ROWS) for name in names},
        "counts": {name: rng.integers(1, 9, ROWS) for name in names},
        "ranked": rng.integers(0, 3, (ROWS, TURNS)),
        "candidate_targets": np.where(kind == 1, rng.integers(0, 3, (ROWS, TURNS)), -1),
        "moment_slots": np.where(kind == 2, 0, -1),
        "spans": spans[:, :, 0],
        "moment_spans": spans[:, :, 1],
        "turn_languages": rng.integers(0, 2, (ROWS, TURNS)),
        "turn_videos": np.where(kind > 0, asked, -1),
        "candidate_slots": rng.integers(-1, SLOTS, (ROWS, TURNS, CANDIDATES)),
        "texts": vectors[near],
        "videos": vectors[numbers],
        "video_numbers": numbers,
    }


def collected(answers, rows, config=ALL, leave_out=()):
    """The metrics where the rows come in these batches; an empty row is None."""
    validation = Validation(config)
    for batch in rows:
        there = [row for row in batch if row is not None]
        found = {}
        for name, value in answers.items():
            if name in leave_out:
                continue
            if isinstance(value, dict):  # summed by the step
                found[name] = {each: np.float32(number[there].sum()) for each, number in value.items()}
                continue
            empty = -np.ones_like(value[0]) if value.dtype.kind == "i" else np.zeros_like(value[0])
            empty = np.zeros_like(empty) if name in ("ranked", "turn_languages") else empty
            found[name] = np.stack([empty if row is None else value[row] for row in batch])
        validation.add(found)
    return validation.metrics()


def recount(answers):
    """The same by loops over turns."""
    rows = {}

    def note(name, language, value):
        for group in (name, f"{name}_{LANGUAGE[language]}"):
            rows.setdefault(group, []).append(value)

    pool = {}
    for row, slot in np.ndindex(ROWS, SLOTS):
        if answers["video_numbers"][row, slot] >= 0:
            pool[int(answers["video_numbers"][row, slot])] = answers["videos"][row, slot]
    for row, turn in np.ndindex(ROWS, TURNS):
        language, video = answers["turn_languages"][row, turn], int(answers["turn_videos"][row, turn])
        if answers["candidate_targets"][row, turn] >= 0:
            note("rank_r1", language, answers["ranked"][row, turn] == answers["candidate_targets"][row, turn])
        if answers["moment_slots"][row, turn] >= 0:
            (a, b), (c, d) = answers["spans"][row, turn], answers["moment_spans"][row, turn]
            overlap = max(0, min(b, d) - max(a, c))
            iou = overlap / (b - a + d - c - overlap)
            note("moment_miou", language, iou)
            for bar in (0.3, 0.5, 0.7):
                note(f"moment_r1_iou_{bar}", language, iou >= bar)
        elif video >= 0 and video in pool:
            text = answers["texts"][row, turn]
            nearer = sum(text @ other >= text @ pool[video] for number, other in pool.items() if number != video)
            for recall in (1, 5, 10):
                note(f"retrieval_r{recall}", language, nearer < recall)
    found = {name: float(np.mean(values)) for name, values in rows.items()}
    weights = {"lm": 1, "rank": 0.5, "moment": 1, "moment_l1": 1, "moment_iou": 1, "contrastive": 2}
    means = {name: answers["sums"][name].sum() / answers["counts"][name].sum() for name in weights}
    found |= means | {"loss": sum(means[name] * weight for name, weight in weights.items())}
    counts = {"ranked_turns": "rank_r1", "moments": "moment_miou", "queries": "retrieval_r1"}
    return found | {name: len(rows[of]) for name, of in counts.items()} | {"retrieval_pool": len(pool)}


def test_metrics_are_those_counted_by_hand(answers):
    expected = recount(answers)
    assert 0 < expected["retrieval_r1"] < expected["retrieval_r5"] < 1 and 0 < expected["rank_r1"] < 1
    found = collected(answers, [range(ROWS)])
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_searches_are_kept_with_their_candidates(answers):
    validation = Validation(ALL)
    validation.add(answers | {"sums": {}, "counts": {}})
    expected = []
    for row, turn in np.ndindex(ROWS, TURNS):
        if answers["turn_videos"][row, turn] >= 0 and answers["moment_slots"][row, turn] < 0:
            slots = [slot for slot in answers["candidate_slots"][row, turn] if slot >= 0]
            listed = tuple(answers["video_numbers"][row, slot] for slot in slots)
            language, video = answers["turn_languages"][row, turn], answers["turn_videos"][row, turn]
            expected.append((language, video, tuple(answers["texts"][row, turn]), listed))
    assert len(expected) > 5
    assert [(q.language, q.video, tuple(q.vector), q.candidates) for q in validation.queries] == expected


def test_batches_and_empty_rows_change_nothing(answers):
    whole = collected(answers, [range(ROWS)])
    for rows in (
        [range(4), range(4, 8), (8, 9, None, None)],
        [(None, None), *([row] for row in range(ROWS))],
        [range(ROWS)[::-1]],
    ):
        assert collected(answers, rows) == pytest.approx(whole, rel=1e-6)


def test_equal_scores_count_as_if_the_others_came_first():
    same = {"texts": np.ones((1, 1, 2)), "videos": np.ones((1, 7, 2)), "video_numbers": np.arange(7)[None]}
    validation = Validation(LossConfig(lm=0, rank=0, moment=0, moment_l1=0, moment_iou=0, contrastive=1))
    turn = {"turn_videos": np.array([[3]]), "moment_slots": np.array([[-1]]), "turn_languages": np.array([[1]])}
    turn["candidate_slots"] = np.array([[[-1, 3]]])
    validation.add({"sums": {"contrastive": 1.0}, "counts": {"contrastive": 1.0}, **same, **turn})
    found = validation.metrics()
    assert (found["retrieval_r1"], found["retrieval_r5"], found["retrieval_r10"]) == (0, 0, 1)


def test_a_split_without_moments_has_no_metric_of_them(answers):
    without = answers | {"moment_slots": np.full((ROWS, TURNS), -1)}
    assert not [name for name in collected(without, [range(ROWS)]) if "iou" in name and name != "moment_iou"]
    alone = collected(answers, [range(ROWS)], LossConfig(), leave_out=("texts", "videos"))
    assert not [name for name in alone if "retrieval" in name or name in ("queries", "contrastive")]


def test_every_metric_a_checkpoint_may_be_judged_by_is_found(answers):
    assert names(ALL) <= {*collected(answers, [range(ROWS)])}
    assert "retrieval_r1" not in names(LossConfig()) and "contrastive" not in names(LossConfig())
