"""Episodes by hand and against loops written from the definitions; their file, cut off at every byte."""

import dataclasses
import json
import math

import numpy as np
import pytest
from scipy.integrate import trapezoid

from ivcr_jax.metrics import interactive, interval
from ivcr_jax.metrics.interactive import Episode, Round

WANTED = "x/1"
LIST = tuple(f"x/{number}" for number in range(20, 30))


def search(rank=None, video="x/9", shown=LIST, **fields):
    return Round("Find it.", "Video 1.", "VIDEO", video, shown, (), rank, **fields)


def episode(*rounds, dialogue="d", language="en", video=WANTED, pool=100):
    return Episode(dialogue, language, video, pool, rounds)


FOUND = episode(search(40), search(4, shown=(*LIST[:3], WANTED)), search(1, WANTED, (WANTED,)))
LOST = episode(search(8, shown=(*LIST[:7], WANTED)), search(20), Round("And now?", error="it stopped"))
GAVE_UP = episode(Round("Hello.", "Hello.", "CHAT"), search(50, None), language="zh", video="x/2")
EPISODES = (FOUND, LOST, GAVE_UP)


def test_rounds_by_hand():
    assert [each.success for each in EPISODES] == [3, None, None]
    found = interactive.per_round(EPISODES, 4)
    assert found["success"].tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert found["hit10"].tolist() == [[0, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert found["r1"].tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert found["r10"].tolist() == [[0, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert found["best_rank"].tolist() == [[40, 4, 1, 1], [8, 8, 8, 8], [101, 50, 50, 50]]


def test_episodes_by_hand():
    values, needed = interactive.per_episode(EPISODES, 3)
    assert values["success"].tolist() == [1, 0, 0] and values["hit10"].tolist() == [1, 1, 0]
    assert values["rounds"].tolist() == needed.tolist() == [3, 4, 4]
    by_hand = [
        ((math.log(40) + math.log(4)) / 2 + (math.log(4) + math.log(1)) / 2) / 2,
        math.log(8),
        ((math.log(101) + math.log(50)) / 2 + math.log(50)) / 2,
    ]
    np.testing.assert_allclose(values["bri"], by_hand, rtol=1e-12)
    assert "bri" not in interactive.per_episode(EPISODES, 1)[0], "one round has no change of rank"


def test_what_was_chosen_without_a_search_is_found():
    """The user's words pointed at it: it is the current video, and nothing was ranked."""
    pointed = episode(search(7, shown=(WANTED,)), Round("Video 7.", "Video 7.", "CHAT", WANTED))
    found = interactive.per_round([pointed], 3)
    assert found["success"].tolist() == [[0, 1, 1]] and found["best_rank"].tolist() == [[7, 1, 1]]


def test_a_list_has_ten_places():
    late = episode(search(11, shown=(*LIST, WANTED)))
    assert interactive.per_round([late], 1)["hit10"].tolist() == [[0]]


@pytest.fixture(scope="module")
def many():
    """Episodes of all kinds: ended by success, failed and given up rounds, few videos, both languages."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(80):
        wanted, rounds = f"v/{rng.integers(25)}", []
        for _ in range(int(rng.integers(1, 6))):
            if rng.random() < 0.15:
                rounds.append(Round("?", error="it stopped"))
                continue
            others = [f"w/{each}" for each in rng.permutation(30)[:12]]
            rank = int(rng.integers(1, 40))
            if rank <= 12:
                others.insert(rank - 1, wanted)
            rounds.append(search(rank, others[0], tuple(others[:12]), latency={"search": rng.random(), "write": 1.0}))
            if others[0] == wanted:
                break
        made.append(
            episode(*rounds, dialogue=f"d{number}", language="en" if number % 3 else "zh", video=wanted, pool=60)
        )
    return made


def slow(each, rounds):
    """An episode's values straight from the definitions."""
    ranks, hits, found = [], [], []
    standing = each.pool + 1
    for place in range(rounds):
        held = each.rounds[: place + 1]
        done = any(one.video == each.video for one in held)
        for one in held[place:]:
            if one.rank is not None:
                standing = one.rank
        ranks.append(1 if done else standing)
        hits.append(any(each.video in one.shown[:10] for one in held) or done)
        found.append(done)
    best = [min(ranks[: place + 1]) for place in range(rounds)]
    return {"ranks": ranks, "best_rank": best, "hit10": hits, "success": found,
            "bri": trapezoid(np.log(best)) / (rounds - 1),
            "rounds": found.index(True) + 1 if True in found else rounds + 1}  # fmt: skip


@pytest.mark.parametrize("rounds", [2, 5, 7])
def test_figures_are_those_of_a_loop(many, rounds, fewer_resamples):
    expected = [slow(each, rounds) for each in many]
    summary = interactive.summarise(many, rounds)
    assert [*summary.by["round"]] == [str(number) for number in range(1, rounds + 1)]
    for place, cells in enumerate(summary.by["round"].values()):
        for name in ("success", "hit10"):
            assert cells[name].value == pytest.approx(np.mean([each[name][place] for each in expected]))
        for most in (1, 10):
            wanted = np.mean([each["ranks"][place] <= most for each in expected])
            assert cells[f"r{most}"].value == pytest.approx(wanted)
        assert cells["best_rank"].value == np.median([each["best_rank"][place] for each in expected])
        timed = [sum(each.rounds[place].latency.values()) for each in many
                 if place < len(each.rounds) and each.rounds[place].latency]  # fmt: skip
        assert ("latency_p50" in cells) == bool(timed)
        if timed:
            assert cells["latency_p50"].value == pytest.approx(np.median(timed)) and cells["latency_p50"].n == len(
                timed
            )
    for language in (None, "en", "zh"):
        cells = summary.overall if language is None else summary.by["language"][language]
        some = [e for e, each in zip(expected, many, strict=True) if language in (None, each.language)]
        assert {cell.n for cell in cells.values()} == {len(some)}
        assert cells["bri"].value == pytest.approx(np.mean([each["bri"] for each in some]), rel=1e-12)
        assert cells["success"].value == pytest.approx(np.mean([each["success"][-1] for each in some]))
        assert cells["hit10"].value == pytest.approx(np.mean([each["hit10"][-1] for each in some]))
        assert cells["rounds"].value == pytest.approx(np.mean([each["rounds"] for each in some]))
        assert cells["rounds_median"].value == np.median([each["rounds"] for each in some])


def test_intervals_draw_videos(many, fewer_resamples):
    summary = interactive.summarise(many, 5)
    videos = sorted({each.video for each in many})
    clusters = np.array([videos.index(each.video) for each in many])
    hits = np.array([slow(each, 5)["hit10"][1] for each in many], np.float64)
    assert summary.by["round"]["2"]["hit10"] == interval.cells({"": hits}, clusters)[""]
    assert summary.overall["bri"].clusters == len(videos) < len(many)


def test_two_users_of_the_same_dialogues(many, fewer_resamples):
    others = [dataclasses.replace(each, rounds=each.rounds[:1]) for each in many]
    compared = interactive.compare(many, others, 5)
    ours, theirs = (np.array([slow(each, 5)["bri"] for each in group]) for group in (many, others))
    assert compared["bri"].difference == pytest.approx(ours.mean() - theirs.mean())
    assert [*compared] == ["success", "hit10", "rounds", "bri"]
    with pytest.raises(ValueError, match="users: found 80 and 79 episodes, expected the same dialogues"):
        interactive.compare(many, others[1:], 5)


def test_no_episode_has_no_figure():
    summary = interactive.summarise([], 3)
    assert summary.overall == {} and not any(summary.by["round"].values()) and summary.by["language"] == {}


def test_a_file_goes_on_wherever_it_was_cut_off(tmp_path):
    path, episodes = tmp_path / "episodes.jsonl", [episode(search(2, shown=LIST[:2])), episode(Round("好", error="它"))]
    with interactive.growing(str(path), {"user": "terse", "rounds": 3}) as (append, before):
        assert before == []
        for each in episodes:
            append(each)
    whole = path.read_bytes()
    assert interactive.read(str(path)) == ({"episodes": 1, "user": "terse", "rounds": 3}, episodes)
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with interactive.growing(str(path), {"user": "terse", "rounds": 3}) as (append, before):
            assert before == episodes[: max(0, whole[:size].count(b"\n") - 1)]
            for each in episodes[len(before) :]:
                append(each)
        assert path.read_bytes() == whole
    another = interactive.growing(str(path), {"user": "terse", "rounds": 4})
    with pytest.raises(ValueError, match="was made with rounds 3 and not 4"), another:
        pass


def test_what_is_no_episode(tmp_path):
    path = tmp_path / "episodes.jsonl"
    for row in ({"rounds": []}, [], {**FOUND.to_json(), "rounds": [{"said": "?"}]}, {**FOUND.to_json(), "more": 1}):
        path.write_text(json.dumps({"episodes": 1}) + "\n" + json.dumps(row) + "\n")
        with pytest.raises(ValueError, match="line 2: .*; expected the fields of an episode"):
            interactive.read(str(path))
