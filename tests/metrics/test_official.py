"""The published figures against a naive scorer, and the corrected ones against what was planned."""

import collections
import copy
import json
import subprocess
import sys

import numpy as np
import pytest

from ivcr_jax.metrics import as_published, corrected, official, published, raw
from tests.metrics import naive
from tests.metrics.made_up import Maker, spoken
from tests.metrics.test_published import LIST, chat, dialogue, moment, search, write

ERRORS = {
    "B3": ZeroDivisionError,
    "B5": (IndexError, ZeroDivisionError),
    "B6": (KeyError, IndexError),
    "missing": (IndexError, TypeError, AttributeError),
}


def files(tmp_path, data, predictions, samples):
    return [
        write(tmp_path / f"{name}.json", value) for name, value in zip("psr", (predictions, samples, data), strict=True)
    ]


def read(paths):
    return published.read_predictions(paths[0]), published.read_samples(paths[1]), raw.read_rows(paths[2])


def naive_figures(counts):
    pairs = {"r1": ("vr_right", "vr_all"), **{f"r1_iou_0.{n}": (f"r{n}", "vmr_all") for n in (3, 5, 7)}}
    return {name: counts[part] / counts[of] if counts[of] else None for name, (part, of) in pairs.items()}


def compare(seed, tmp_path, seen):
    """Compares every figure of one random set, and counts what it met."""
    few = seed % 17 == 0
    maker = Maker(seed, untidy=(0, 0, 0.003, 0.03, 0.3)[seed % 5], most_turns=2 if few else 12)
    data = maker.raw(int(maker.rng.integers(3, 6 if few else 40)))
    try:
        samples, _ = naive.convert(data, 10 if seed % 7 == 0 else 7)
    except (KeyError, IndexError):  # other samples will do
        rows = raw.read_rows(write(tmp_path / "raw.json", data))
        samples = [sample.messages for sample in published.convert(rows)[0]]
    if not samples:
        with pytest.raises(ValueError, match="found no sample"):
            read(files(tmp_path, data, [], samples))
        return
    predictions = maker.result(samples, raw_questions=(0, 0.5, 1)[seed % 3])
    if seed % 11 == 0:  # the unfiltered samples beside predictions for the shorter ones
        predictions = [p for p, sample in zip(predictions, samples, strict=False) if len(sample) <= 7]
    if seed % 13 == 0:  # from here on questions have odd places
        data[0]["conversations"].insert(0, data[0]["conversations"][1])
    found = as_published.score(*read(files(tmp_path, data, predictions, samples)))
    stops = {stop.figures: stop for stop in found.stops}
    scorer = naive.Scorer(predictions, samples, data)
    for name, compute in (("per_turn", scorer.table), ("overall", scorer.overall)):
        try:
            expected = compute()
        except (KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError) as error:
            stop = stops.pop(name)
            assert stop.where == scorer.at and isinstance(error, ERRORS[stop.defect]), seed
            seen[name, stop.defect] += 1
            expected = {} if name == "per_turn" else dict.fromkeys(expected_names())
        else:
            seen[name] += 1
            if name == "per_turn":
                expected = {turn: naive_figures(counts) for turn, counts in expected.items() if turn <= 7}
                empty = [turn for turn, figures in expected.items() if None in figures.values()]
                assert sorted(empty) == sorted(int(stops.pop(f"per_turn {turn}").figures[9:]) for turn in empty)
                seen["B2"] += not any(any(figures.values()) for figures in expected.values())
        assert getattr(found, name) == expected, seed
    assert not stops, seed


def expected_names():
    return ["r1", "r1_iou_0.3", "r1_iou_0.5", "r1_iou_0.7"]


def test_every_figure_is_the_naive_scorers(tmp_path):
    seen = collections.Counter()
    for seed in range(200):
        compare(seed, tmp_path, seen)
    assert seen["overall"] > 100 and seen["per_turn"] > 100 and seen["B2"] > 20, seen
    met = {key for key in seen if isinstance(key, tuple)}
    assert met >= {
        ("overall", "B5"),
        ("overall", "B6"),
        ("overall", "missing"),
        ("per_turn", "B5"),
        ("per_turn", "B6"),
    }, seen


def toy():
    return [
        dialogue(search("Find the dog.", "c/c.mp4", LIST), moment("When does it bark?", 5, 10), id="one"),
        dialogue(search("Find the cat.", "c/d.mp4", LIST), moment("When does it sleep?", 1, 3), id="two"),
    ]


def perfect(samples):
    return [{"user_q": sample[-2]["content"], "output": sample[-1]["content"]} for sample in samples]


def test_perfect_answers_to_two_dialogues_have_half_and_nothing_per_turn_as_published(tmp_path):
    samples, _ = naive.convert(toy(), 7)
    table, found = official.evaluate(*files(tmp_path, toy(), perfect(samples), samples), released=True)
    assert found["overall"] == {"r1": 0.5, "r1_iou_0.3": 0.5, "r1_iou_0.5": 0.5, "r1_iou_0.7": 0.5}
    nothing = {"r1_iou_0.3": None, "r1_iou_0.5": None, "r1_iou_0.7": None}
    assert found["per_turn"] == {1: {"r1": 0.0} | nothing, 2: {"r1": None} | dict.fromkeys(nothing, 0.0)}
    assert [(stop["defect"], stop["where"]) for stop in found["stops"]] == [("B3", "turn 1"), ("B3", "turn 2")]
    assert "it prints nothing from here on" in table
    mixed = [toy()[0], dialogue(moment("When?", 1, 3), search("Find the cat.", "c/d.mp4", LIST), id="two")]
    samples, _ = naive.convert(mixed, 7)
    _, found = official.evaluate(*files(tmp_path, mixed, perfect(samples), samples), released=True)
    assert found["overall"]["r1"] == 0.5 and not found["stops"]
    assert found["per_turn"] == {turn: dict.fromkeys(expected_names(), 0.0) for turn in (1, 2)}


@pytest.mark.parametrize("language", ["as they are", "zh"])
@pytest.mark.parametrize("seed", range(20))
def test_perfect_answers_have_all_overall_and_per_turn_when_corrected(seed, language, tmp_path):
    data = Maker(seed, misses=0, most_turns=7).raw(30)
    if language == "zh":
        for each in data:
            for message in each["conversations"][1::2]:
                message["value"] = message["value"].replace("Video ", "视频 ").replace("video ", "视频 ")
    samples, left_out = published.convert(raw.read_rows(write(tmp_path / "raw.json", data)))
    samples = [sample.messages for sample in samples]
    assert not left_out
    _, found = official.evaluate(*files(tmp_path, data, perfect(samples), samples))
    for figures in (found["overall"], *found["per_turn"].values()):
        for metric in figures.values():
            assert metric["all_test_turns"] == metric["scored_turns"]
            assert metric["scored_turns"]["value"] in ((1.0,) if metric["right"] else (None,))
    assert {"r1", "r1_iou_0.7"} <= {name for name, metric in found["overall"].items() if metric["right"] > 10}
    assert not found["problems"]


def planned(rng, sample):
    """An answer to a sample, and by which metrics it is meant to be right."""
    turn, truth = sample.turns[-1], sample.turns[-1].answer
    if turn.gt_se == [-1, -1]:
        number = naive.video_index(truth)
        outcome = rng.choice(["right", "wrong", "unreadable", "out_of_range"])
        number = {"wrong": number % 10 + 1, "out_of_range": 11 + int(rng.integers(50))}.get(outcome, number)
        words = rng.choice(
            ["It is video {n}.", "视频 {n} 最符合", "是第{n}个视频。", "The {n}th video, from 3 to 5 seconds"]
        )
        return (
            "None of them." if outcome == "unreadable" else words.format(n=number),
            outcome,
            ["r1"] * (outcome == "right"),
        )
    start, end = (10 * time for time in naive.true_times(truth))  # tenths
    length = end - start
    share = rng.choice([0.2, 0.4, 0.6, 0.8, 1.0])
    kept = round(length * share)
    words = rng.choice(["at {s}s-{e}s", "{e}s to {s}s", "从{s}秒到{e}秒", "from {s} to {e} seconds", "{s} - {e} s"])
    text = words.format(s=spoken(start / 10), e=spoken((start + kept) / 10))
    right = [f"r1_iou_{bar}" for bar in (0.3, 0.5, 0.7) if kept / length >= bar]
    return text, "moment", right


@pytest.mark.parametrize("seed", range(40))
def test_corrected_figures_are_those_that_were_planned(seed, tmp_path):
    rng = np.random.default_rng(seed)
    data = Maker(seed, misses=0.3, own_questions=seed % 2 == 0).raw(30)
    rows = raw.read_rows(write(tmp_path / "raw.json", data))
    samples, _ = published.convert(rows)
    right, outcomes, output = collections.Counter(), collections.Counter(), []
    for sample in samples:
        text, outcome, metrics = planned(rng, sample)
        output.append(text)
        outcomes[outcome] += 1
        right.update((sample.turns[-1].number, metric) for metric in metrics)
    published.write_predictions(str(tmp_path / "p.json"), samples, output)
    predictions = published.read_predictions(str(tmp_path / "p.json"))
    if seed % 2 == 0:  # each asks something of its own: the order is not needed
        rng.shuffle(predictions)
    found = corrected.score(predictions, [sample.messages for sample in samples], rows)
    assert found.right == right and sum(right.values())
    every = collections.Counter(
        (place // 2 + 1, "searches" if message["gt_se"] == [-1, -1] else "moments")
        for row in rows
        for place, message in enumerate(row["conversations"])
        if message["from"] == "gpt"
    )
    assert found.every == every
    last = [sample.turns[-1] for sample in samples]
    assert found.scored == collections.Counter(
        (turn.number, "searches" if turn.gt_se == [-1, -1] else "moments") for turn in last
    )
    counted = {name: len(ids) for name, ids in found.problems.items()}
    assert counted.get("unreadable", 0) == outcomes["unreadable"]
    assert counted.get("out_of_range", 0) == outcomes["out_of_range"]
    assert bool(counted.get("reordered")) == (seed % 2 == 0 and len(samples) > 1)
    assert set(counted) <= {"unreadable", "out_of_range", "reordered", "truth_disagrees"}
    values = found.to_json()["overall"]["r1"]
    hits = sum(count for (_, metric), count in right.items() if metric == "r1")
    searches = sum(count for (_, kind), count in every.items() if kind == "searches")
    assert values["all_test_turns"] == {"value": hits / searches, "count": searches}


def scored(tmp_path, data, predictions, samples=None):
    if samples is None:
        samples, _ = published.convert(raw.read_rows(write(tmp_path / "raw.json", data)))
        samples = [sample.messages for sample in samples]
    return corrected.score(*read(files(tmp_path, data, predictions(samples), samples)))


def hits(found, metric="r1"):
    return sum(count for (_, name), count in found.right.items() if name == metric)


def three():
    return [dialogue(search(f"q{n}", "c/b.mp4", LIST, f"video 2, {n}"), id=f"d{n}") for n in range(3)]


@pytest.mark.parametrize(
    ("change", "right", "problems"),
    [
        (lambda rows: rows, 3, {}),
        (lambda rows: rows[:2], 2, {"missing": ["d2 turn 1"]}),
        (lambda rows: [rows[0], rows[2]], 2, {"missing": ["d1 turn 1"]}),
        (lambda rows: [], 0, {"missing": ["d0 turn 1", "d1 turn 1", "d2 turn 1"]}),
        (lambda rows: [rows[0], rows[1] | {"output": None}, rows[2]], 2, {"missing": ["d1 turn 1"]}),
        (lambda rows: [rows[0], rows[1] | {"output": " "}, rows[2]], 2, {"unreadable": ["d1 turn 1"]}),
        (lambda rows: [rows[0], rows[1] | {"output": "video 11"}, rows[2]], 2, {"out_of_range": ["d1 turn 1"]}),
        (lambda rows: [rows[0], rows[1] | {"output": "video 0"}, rows[2]], 2, {"out_of_range": ["d1 turn 1"]}),
        (lambda rows: [*rows[:2], *rows[1:]], 3, {"doubled": ["d1 turn 1"]}),
        (lambda rows: [*rows, *rows], 3, {"doubled": ["d0 turn 1", "d1 turn 1", "d2 turn 1"]}),
        (lambda rows: [*rows, rows[1] | {"output": "video 3"}], 2, {"contradicted": ["d1 turn 1"]}),
        (lambda rows: [rows[2], rows[0], rows[1]], 3, {"reordered": ["d2 turn 1"]}),
        (lambda rows: [rows[0], {"user_q": "what?", "output": "video 2"}, *rows[1:]], 3, {"unknown": ["prediction 1"]}),
        (
            lambda rows: [{"user_q": "what?", "output": "video 2"}] * 3,
            0,
            {"missing": ["d0 turn 1", "d1 turn 1", "d2 turn 1"], "unknown": [f"prediction {n}" for n in range(3)]},
        ),
    ],
)
def test_predictions_that_are_amiss_are_listed_by_id(change, right, problems, tmp_path):
    found = scored(tmp_path, three(), lambda samples: change(perfect(samples)))
    assert found.scored == {(1, "searches"): 3}
    assert hits(found) == right and found.problems == problems


def test_those_who_ask_the_same_are_told_apart_by_their_order_alone(tmp_path):
    data = [dialogue(search("Find it.", truth, LIST), id=truth) for truth in ("c/a.mp4", "c/b.mp4", "c/c.mp4")]
    data.insert(1, dialogue(search("And this?", "c/d.mp4", LIST), id="c/d.mp4"))
    found = scored(tmp_path, data, perfect)
    assert hits(found) == 4 and not found.problems
    found = scored(tmp_path, data, lambda samples: perfect(samples)[1:])  # the order is clear from the back
    assert hits(found) == 3 and found.problems == {"missing": ["c/a.mp4 turn 1"]}
    found = scored(tmp_path, data[1:], lambda samples: perfect(samples)[:2])
    assert hits(found) == 2 and found.problems == {"missing": ["c/c.mp4 turn 1"]}
    found = scored(tmp_path, data, lambda samples: perfect(samples)[::-1])
    same = ["c/a.mp4 turn 1", "c/b.mp4 turn 1", "c/c.mp4 turn 1"]
    assert hits(found) == 1 and found.problems == {"ambiguous": same}  # not by place: the order is lost


def test_what_is_asked_may_be_the_question_alone_or_have_the_frames_times(tmp_path):
    def told(samples):
        rows = perfect(samples)
        for number, row in enumerate(rows):
            shown, question = row["user_q"].split("</VIDEO>.")[-2:]
            times = ". The video contains 2 frames sampled at 0.1, 9.5 seconds" * (number % 3)
            row["user_q"] = f"{shown}</VIDEO>{times}.{question}" if "Current" in shown else question
        return rows

    found = scored(tmp_path, toy(), told)
    assert hits(found) == hits(found, "r1_iou_0.7") == 2 and not found.problems


def test_two_answers_without_a_number_are_no_hit_but_the_record_has_one(tmp_path):
    data = [
        dialogue(search("one", "c/b.mp4", LIST, "It is the best."), id="one"),
        dialogue(search("two", "c/b.mp4", LIST, "It is the best."), id="two"),
    ]
    samples, _ = naive.convert(data + toy(), 7)
    rows = perfect(samples)
    rows[1]["output"] = "video 2"
    found = scored(tmp_path, data + toy(), lambda _: rows, samples)
    assert hits(found) == 3 and found.problems == {"unreadable": ["one turn 1"]}
    rows[1]["output"] = "no number"
    released = as_published.score(*read(files(tmp_path, data + toy(), rows, samples)))
    assert released.overall["r1"] == 3 / 4  # all but the first, which is never counted: B11 and B1


def test_degenerate_and_missing_ranges_are_scored(tmp_path):
    data = [
        dialogue(moment("instant", 5.0, 5.0), id="instant"),
        dialogue(moment("wordless", 2.0, 6.0), id="wordless"),
        dialogue(moment("nothing", 2.0, 6.0), id="nothing"),
        dialogue(moment("rounded", 2.04, 6.0), id="rounded"),
        dialogue(moment("other", 2.0, 6.0), id="other"),
    ]
    answers = {1: "It is there.", 2: "It is there.", 3: "2s-6s", 4: "20s-60s"}
    for number, answer in answers.items():
        data[number]["conversations"][1]["value"] = answer
    data[2]["conversations"][1]["gt_se"] = ["2", "6"]
    said = ["5s-5s", "from 2 to 6 seconds", "2s-6s", "2s-6s", "20s-60s"]
    found = scored(
        tmp_path,
        data,
        lambda samples: [row | {"output": text} for row, text in zip(perfect(samples), said, strict=True)],
    )
    assert hits(found, "r1_iou_0.7") == 4
    assert found.problems == {"no_right_answer": ["nothing turn 1"], "truth_disagrees": ["other turn 1"]}
    paths = files(tmp_path, data, [], naive.convert(data, 7)[0])
    stops = as_published.score(*read(paths)).stops
    assert stops[-1].defect == "missing" and "overall" in stops[-1].figures


def test_talk_is_not_scored_and_not_counted(tmp_path):
    data = [dialogue(search("q", "c/a.mp4", LIST), chat("Thanks"), search("And?", "c/b.mp4", LIST), id="d")]
    found = scored(tmp_path, data, perfect)
    assert hits(found) == 2 and found.every == found.scored == {(1, "searches"): 1, (3, "searches"): 1}


def test_samples_must_be_of_the_raw_file_and_each_there_once(tmp_path):
    samples, _ = naive.convert(three(), 7)
    with pytest.raises(ValueError, match=r"s.json: sample 1: found d0 turn 1 again, expected each turn once"):
        official.evaluate(*files(tmp_path, three(), perfect(samples), samples[:1] * 2))
    with pytest.raises(ValueError, match=r"s.json: sample 2: found 'q2', expected a turn of a raw test dialogue"):
        official.evaluate(*files(tmp_path, three()[:2], perfect(samples), samples))
    twice = [*three(), *copy.deepcopy(three())]
    for number, each in enumerate(twice):
        each["id"] = f"d{number}"
    samples, _ = naive.convert(twice, 7)
    _, found = official.evaluate(*files(tmp_path, twice, perfect(samples), samples))
    assert found["overall"]["r1"]["all_test_turns"] == {"value": 1.0, "count": 6}


@pytest.mark.parametrize("flag", [[], ["--as_published"]])
def test_the_command_prints_tables_and_json_last_and_needs_no_jax(flag, tmp_path):
    samples, _ = naive.convert(toy(), 7)
    paths = files(tmp_path, toy(), perfect(samples), samples)
    arguments = [f"--{name}={path}" for name, path in zip(("predictions", "dialogues", "raw"), paths, strict=True)]
    block = "import runpy, sys; sys.modules.update(dict.fromkeys(['jax', 'av', 'grain', 'tensorflow_datasets']));"
    run = f"{block} runpy.run_module('ivcr_jax.metrics.official', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", run, *arguments, *flag], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last == json.loads(json.dumps(official.evaluate(*paths, released=bool(flag))[1]))
    assert "R@1 IoU 0.5" in done.stdout and last["samples"] == 4
    for wrong in (["--raw=absent.json"], [f"--raw={paths[0]}"], ["more"]):
        refused = subprocess.run([sys.executable, "-c", run, *arguments, *wrong], capture_output=True, text=True)
        assert refused.returncode == 1 and "Traceback" not in refused.stderr and refused.stderr
