"""Predictions from our form to the published one and back: naive loops over the files, and tables by hand."""

import collections
import dataclasses
import json
import subprocess
import sys

import pytest

from ivcr_jax.data import source
from ivcr_jax.data.dialogue import Intent
from ivcr_jax.data.store import DialogueStore
from ivcr_jax.metrics import corrected, exchange, published, raw, records, summary
from ivcr_jax.metrics.records import Header, Moment, Prediction
from tests.data.video_fixtures import write_video
from tests.metrics import naive
from tests.metrics.built import build_of
from tests.metrics.made_up import Maker, spoken
from tests.metrics.test_published import LIST, chat, dialogue, moment, search

NAMES = [name.removesuffix(".mp4") for name in LIST]


def opened(dataset, split="test"):
    store = DialogueStore(dataset, split)
    return store.fingerprint, [store[number] for number in range(len(store))]


def header_of(dataset, protocol="paper", **settings):
    return Header(protocol, "an export", opened(dataset)[0], "test", settings)


def answered(rng, turn, dialogue, place):
    """A prediction as a session makes one: ordered candidates, a moment, an answer in either language."""
    if turn.intent == Intent.CHAT:
        return Prediction(dialogue, place, Intent.CHAT, text="You are welcome.")
    words = ("It is video {n}{s}.", "与提问相符的是视频 {n}{s}。", "The best match is video {n}{s}, of 10.")[
        int(rng.integers(3))
    ]
    if turn.intent == Intent.MOMENT:
        start = rng.uniform(0, 60)
        end = start + rng.uniform(0, 30) if rng.random() < 0.5 else turn.span[1]
        start, end = sorted((start, end))
        text = words.format(n=int(rng.integers(1, 11)), s=f" at {start:.1f}s-{end:.1f}s")
        found = (Moment(turn.video_id, start, end, 0.5),)
        return Prediction(dialogue, place, Intent.MOMENT, video=turn.video_id, moments=found, text=text)
    ranking = tuple(str(each) for each in rng.permutation(turn.candidates))
    if rng.random() < 0.4 and turn.video_id in ranking:
        ranking = (turn.video_id, *(each for each in ranking if each != turn.video_id))
    common = {"intent": Intent.VIDEO, "ranking": ranking, "pool": len(ranking)}
    if not ranking or rng.random() < 0.1:
        return Prediction(dialogue, place, text="None of the candidate videos matches the query.", **common)
    text = words.format(n=turn.candidates.index(ranking[0]) + 1, s="")
    return Prediction(dialogue, place, video=ranking[0], text=text, **common)


def run(rng, header, dialogues, missing=0.05):
    """A run's predictions: some are not there, and some turns have failed."""
    found = []
    for each in header.truths(dialogues):
        for place, turn in enumerate(each.turns):
            if rng.random() >= missing:
                failed = Prediction(each.id, place, error="it stopped")
                found.append(failed if rng.random() < missing else answered(rng, turn, each.id, place))
    return found


def both_ways(folder, raw_file, dataset, header, predictions):
    """The paths of predictions, of the result.json, and of the predictions made of that; and what was amiss."""
    ours, result, again = (str(folder / name) for name in ("ours.jsonl", "result.json", "again.jsonl"))
    records.write(ours, header, predictions)
    there = exchange.exchange(raw_file, dataset, ours, result)
    back = exchange.exchange(raw_file, dataset, result, again)
    return (ours, result, again), there, back


def amiss(found):
    assert all(len(each["ids"]) == each["count"] for each in found["problems"].values())
    return {name: each["ids"] for name, each in found["problems"].items()}


def official(raw_file, result):
    rows = raw.read_rows(raw_file)
    samples = [sample.messages for sample in published.convert(rows)[0]]
    return corrected.score(published.read_predictions(result), samples, rows)


@pytest.mark.parametrize("protocol", ["paper", "gold"])
@pytest.mark.parametrize("seed", range(3))
def test_there_and_back_every_figure_and_choice_stays(seed, protocol, tmp_path):
    maker = Maker(seed, untidy=(0, 0.01, 0.1)[seed], own_questions=seed == 0)
    data = maker.raw(60)
    for row in data[::7]:
        del row["id"]
    for row in data[1::9]:
        row["id"] = "d1"  # of several, in both splits
    raw_file, dataset = build_of(tmp_path, data)
    dialogues = opened(dataset)[1]
    header = header_of(dataset, protocol)
    predictions = run(maker.rng, header, dialogues)
    files, there, back = both_ways(tmp_path, raw_file, dataset, header, predictions)
    # Straight through the raw file: the number in the output is the place of what was chosen.
    chosen = {(p.dialogue, p.turn): p for p in predictions}
    seen, outputs = collections.Counter(), published.read_predictions(files[1])
    truths = {(d.id, place): turn for d in header.truths(dialogues) for place, turn in enumerate(d.turns)}
    samples, _ = published.convert(raw.read_rows(raw_file))
    for sample, row in zip(samples, outputs, strict=True):
        turn = sample.turns[-1]
        assert row.user_q == sample.messages[-2]["content"]
        same = [
            chosen.get(key) for key, truth in truths.items()
            if key[0] == sample.dialogue and truth.user == turn.question.strip() and truth.answer == turn.answer.strip()
        ]  # fmt: skip
        if len(same) != 1:
            seen["several" if same else "none"] += 1
        elif row.output is None:
            assert same[0] is None or same[0].error
        elif same[0].video and turn.gt_se == [-1, -1]:
            number = naive.video_index(row.output.replace("视频", " video"))
            assert turn.candidates[number - 1] == f"{same[0].video}.mp4"
            seen["searches"] += 1
        else:
            assert row.output == same[0].text
            seen["moments"] += bool(same[0].moments)
    assert min(seen["searches"], seen["moments"]) > 10
    # And back.
    again_header, again = records.read(files[2])
    assert (again_header.protocol, again_header.dialogues, again_header.split) == ("paper", header.dialogues, "test")
    places = {(p.dialogue, p.turn): p for p in again}
    numbers = exchange.align(dialogues, header, raw.read_rows(raw_file))
    paper = exchange.align(dialogues, again_header, raw.read_rows(raw_file))
    of_number = {(key[0], number): places.get(key) for key, number in paper.items()}
    compared = 0
    for key, number in numbers.items():
        before, after = chosen.get(key), of_number.get((key[0], number))
        if after is None:
            continue
        compared += 1
        assert (after.intent, after.video, after.text) == (before.intent, before.video, before.text)
        for one, other in zip(before.moments, after.moments, strict=True):
            assert other[:3] == (one.video, float(spoken(one.start)), float(spoken(one.end)))
    assert compared == len(again) > 20
    third = str(tmp_path / "third.json")
    exchange.exchange(raw_file, dataset, files[2], third)
    before, after = official(raw_file, files[1]), official(raw_file, third)
    assert before == after and sum(before.right.values()) > 20
    # Everything is in one list.
    counts = {name: len(ids) for name, ids in amiss(there).items()}
    nulls = sum(counts.get(name, 0) for name in ("not_in_dataset", "missing", "failed", "not_shown"))
    assert there["written"] + nulls == there["samples"] == len(samples)
    left = sum(counts.get(name, 0) for name in ("no_sample", "not_in_raw", "repeated", "unknown"))
    used = there["written"] + counts.get("failed", 0) + counts.get("not_shown", 0)
    assert used + left == there["predictions"] == len(predictions)
    counts = {name: len(ids) for name, ids in amiss(back).items()}
    assert back["written"] + counts.get("missing", 0) + counts.get("not_in_dataset", 0) == len(samples)
    assert not set(counts) & {"contradicted", "ambiguous", "doubled", "unknown", "reordered"}


@pytest.mark.parametrize("seed", range(4))
def test_our_figures_of_a_result_file_are_the_official_ones(seed, tmp_path):
    """Where the dataset keeps every turn: hits by `official` and by `summary` of what was made of it."""
    data = Maker(seed, own_questions=True).raw(40)
    for answer in (message for row in data for message in row["conversations"] if message["from"] == "gpt"):
        if answer["video_id"] == "Corpus/missed.mp4":
            answer["value"] = "None of them."  # else the official truth is the number in it
    raw_file, dataset = build_of(tmp_path, data)
    samples, _ = published.convert(raw.read_rows(raw_file))
    result = str(tmp_path / "result.json")
    published.write_json(result, Maker(seed + 9).result([sample.messages for sample in samples]))
    found = exchange.exchange(raw_file, dataset, result, str(tmp_path / "ours.jsonl"))
    header, ours = records.read(str(tmp_path / "ours.jsonl"))
    pairs, problems = records.match(header.truths(opened(dataset)[1]), ours, given=True)
    overall = summary.summarise(pairs).overall
    theirs = official(raw_file, result)
    hits = collections.Counter(metric for (_, metric), count in theirs.right.items() for _ in range(count))
    for ours_name, name in (
        ("video_accuracy", "r1"), ("retrieval_r1", "r1"), ("moment_r1_iou_0.3", "r1_iou_0.3"),
        ("moment_r1_iou_0.5", "r1_iou_0.5"), ("moment_r1_iou_0.7", "r1_iou_0.7"),
    ):  # fmt: skip
        assert round(overall[ours_name].value * overall[ours_name].n) == hits[name] > 0, name
    kinds = collections.Counter(kind for (_, kind), count in theirs.scored.items() for _ in range(count))
    assert (overall["video_accuracy"].n, overall["moment_miou"].n) == (kinds["searches"], kinds["moments"])
    wrong = amiss(found)
    assert {name: wrong.get(name) for name in ("unreadable", "out_of_range")} == {
        name: theirs.problems.get(name) for name in ("unreadable", "out_of_range")
    }
    unparsed = round(overall["unparsed"].value * overall["unparsed"].n)
    assert unparsed == sum(len(wrong.get(name, ())) for name in ("unreadable", "out_of_range"))
    assert not problems.missing and not problems.outside


def three(kind=1):
    return [dialogue(search(f"q{n}", LIST[n], LIST, f"video {n + 1}"), id=f"d{n}", kind=kind) for n in range(3)]


RIGHT = [Prediction(f"d{n}", 0, Intent.VIDEO, (NAMES[n],), 10, None, NAMES[n], (), f"video {n + 1}") for n in range(3)]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Three dialogues of one search each, and one that ends with a moment and thanks."""
    talk = dialogue(
        search("Find it.", LIST[3], LIST), moment("When?", 5.0, 9.5, LIST[3]), chat("Thanks"), id="talk", kind=2
    )
    return build_of(tmp_path_factory.mktemp("small"), [*three(), talk])


def changed(name, **fields):
    return [dataclasses.replace(each, **fields) if each.dialogue == name else each for each in RIGHT]


NOTHING = {"video": None, "ranking": (), "parsed": False}


@pytest.mark.parametrize(
    ("change", "found", "problems"),
    [
        (lambda rows: rows, RIGHT, {}),
        (lambda rows: rows[1:], RIGHT[1:], {"missing": ["d0 turn 1"]}),
        (lambda rows: [rows[0] | {"output": None}, *rows[1:]], RIGHT[1:], {"missing": ["d0 turn 1"]}),
        (
            lambda rows: [rows[0], rows[1] | {"output": "第三个视频"}, rows[2]],
            changed("d1", video=NAMES[2], ranking=(NAMES[2],), text="第三个视频"),
            {},
        ),
        (
            lambda rows: [rows[0], rows[1] | {"output": "video 11"}, rows[2]],
            changed("d1", text="video 11", **NOTHING),
            {"out_of_range": ["d1 turn 1"]},
        ),
        (
            lambda rows: [rows[0], rows[1] | {"output": "video 0"}, rows[2]],
            changed("d1", text="video 0", **NOTHING),
            {"out_of_range": ["d1 turn 1"]},
        ),
        (
            lambda rows: [rows[0], rows[1] | {"output": "none"}, rows[2]],
            changed("d1", text="none", **NOTHING),
            {"unreadable": ["d1 turn 1"]},
        ),
        (lambda rows: [*rows[:2], *rows[1:]], RIGHT, {"doubled": ["d1 turn 1"]}),
        (
            lambda rows: [*rows[:2], rows[1] | {"output": "video 3"}, *rows[2:]],
            [RIGHT[0], Prediction("d1", 0, error=exchange.TO_OURS["contradicted"]), RIGHT[2]],
            {"contradicted": ["d1 turn 1"]},
        ),
        (lambda rows: [{"user_q": "what?", "output": "video 2"}, *rows], RIGHT, {"unknown": ["prediction 0"]}),
        (lambda rows: [rows[1], rows[0], *rows[2:]], RIGHT, {"reordered": ["d1 turn 1"]}),
    ],
)
def test_a_result_file_is_read_as_the_corrected_scorer_reads_it(small, change, found, problems, tmp_path):
    raw_file, dataset = small
    samples, _ = published.convert(raw.read_rows(raw_file))
    rows = [{"user_q": sample.messages[-2]["content"], "output": sample.turns[-1].answer} for sample in samples]
    rows = change(rows[:3]) + [rows[3] | {"output": "video 4"}, rows[4] | {"output": "从5秒到8.5秒"}]
    published.write_json(str(tmp_path / "result.json"), rows)
    told = exchange.exchange(raw_file, dataset, str(tmp_path / "result.json"), str(tmp_path / "ours.jsonl"))
    header, ours = records.read(str(tmp_path / "ours.jsonl"))
    assert ours[:-2] == found and amiss(told) == problems
    assert ours[-1] == Prediction(
        "talk", 1, Intent.MOMENT, video=NAMES[3], moments=(Moment(NAMES[3], 5.0, 8.5),), text="从5秒到8.5秒"
    )
    assert told["predictions"] == len(rows) and told["samples"] == 5 and told["written"] == len(ours)


def test_a_moment_without_a_span_is_none(small, tmp_path):
    raw_file, dataset = small
    samples, _ = published.convert(raw.read_rows(raw_file))
    published.write_predictions(str(tmp_path / "r.json"), samples, [None] * 4 + ["nans-nans"])
    told = exchange.exchange(raw_file, dataset, str(tmp_path / "r.json"), str(tmp_path / "o.jsonl"))
    assert records.read(str(tmp_path / "o.jsonl"))[1] == [
        Prediction("talk", 1, Intent.MOMENT, text="nans-nans", parsed=False)
    ]
    assert {name: len(ids) for name, ids in amiss(told).items()} == {"missing": 4, "unreadable": 1}


def test_what_has_no_place_in_a_result_file_is_listed(small, tmp_path):
    raw_file, dataset = small
    talk = [
        Prediction("talk", 0, Intent.VIDEO, (NAMES[3],), 10, None, NAMES[3], (), "视频 4"),
        Prediction("talk", 1, Intent.MOMENT, video=NAMES[3], moments=(Moment(NAMES[3], 1.0, 2.0),), text="1.0s-2.0s"),
        Prediction("talk", 2, Intent.CHAT, text="Welcome."),
    ]
    given = [
        RIGHT[0],
        dataclasses.replace(RIGHT[0], text="again"),
        dataclasses.replace(RIGHT[2], text="", error="it stopped"),
        dataclasses.replace(RIGHT[1], dialogue="nobody"),
        *talk,
        dataclasses.replace(talk[0], turn=9),
    ]
    (_, result, _), there, _ = both_ways(tmp_path, raw_file, dataset, header_of(dataset), given)
    outputs = [row.output for row in published.read_predictions(result)]
    assert outputs == ["video 1", None, None, "视频 4", "1.0s-2.0s"]
    assert amiss(there) == {
        "missing": ["d1 turn 1"], "failed": ["d2 turn 1"], "no_sample": ["talk#2"], "repeated": ["d0#0"],
        "unknown": ["nobody#0", "talk#9"],
    }  # fmt: skip


def test_ids_are_the_datasets(tmp_path):
    """Doubles within a split and across, in rows that are left out too, numbers, blanks, none."""
    turns = search("q", LIST[0], LIST)
    ids = ["a", "a", " a ", 4, "4", "", None, "b", "c", "c", True, "row-0000012", ""]
    splits = ["train", "test", "test", "test", "train", "test", "test", "test", "test", "test", "test", "test", "test"]
    kinds = [1, 1, 1, 1, 1, 1, 1, 0, 0, 2, 7, 3, 4]
    data = [
        dialogue(turns, id=name, split=split, kind=kind) for name, split, kind in zip(ids, splits, kinds, strict=True)
    ]
    data.insert(8, dialogue(turns, id="b"))
    raw_file, dataset = build_of(tmp_path, data)
    built = [each.id for each in opened(dataset)[1] if each.type]
    assert [row["id"] for row in raw.read_rows(raw_file)] == built
    assert "a@row-0000001" in built and "b@row-0000008" in built and "row-0000005" in built


def numbers_of(dialogues, protocol="gold"):
    """What `align` finds for rows, and the dialogues as the dataset has them."""
    reader = source.RowReader()
    read = [each for each in map(reader.read, json.loads(json.dumps(dialogues))) if each is not None]
    rows = [row | {"id": row["id"]} for row in dialogues]
    found = exchange.align(read, Header(protocol, "", "", "test"), rows)
    return {f"{name}#{place}": number for (name, place), number in found.items()}


def test_turns_are_found_past_all_that_the_dataset_repairs_and_cuts():
    first, second, third = (search(f" q{n}\n", LIST[n], LIST) for n in range(3))
    lost = search("lost", LIST[0], LIST)
    lost[1]["gt_se"] = [3]
    token = search("Which <VIDEO> is it?", LIST[0], LIST)
    answerless, speaker = [second[0]], [{"from": "system", "value": "..."}]
    assert numbers_of([dialogue(first, token, third, id="d")]) == {"d#0": 1, "d#1": 2, "d#2": 3}
    assert numbers_of([dialogue(first, lost, third, id="d")]) == {"d#0": 1}  # what follows is cut
    assert numbers_of([dialogue(first, lost, third, id="d", kind=7)]) == {"d#0": 1, "d#1": 3}
    assert numbers_of([dialogue(first, answerless, third, id="d")]) == {"d#0": 1, "d#1": 2}
    # A remark between question and answer: the dataset passes over it, the published code knows no such turn.
    assert numbers_of([dialogue(first, second[:1], speaker, second[1:], third, id="d")]) == {
        "d#0": 1, "d#1": None, "d#2": 3,
    }  # fmt: skip


def test_turns_that_are_alike_are_told_apart_by_their_order_where_it_says():
    alike = [search("again", LIST[1], LIST) for _ in range(3)]
    assert numbers_of([dialogue(*alike, id="d")]) == {"d#0": 1, "d#1": 2, "d#2": 3}
    alike[1][1]["gt_se"] = [3]
    assert numbers_of([dialogue(*alike, id="d")]) == {"d#0": 1}
    other = search("other", LIST[0], LIST)
    found = numbers_of([dialogue(*alike, other, id="d", kind=7)])
    assert found == {"d#0": None, "d#1": None, "d#2": 4}
    alike[1][1] |= {"gt_se": [-1, -1], "value": "It is video 7."}
    assert numbers_of([dialogue(*alike, id="d", kind=7)]) == {"d#0": 1, "d#1": 2, "d#2": 3}


def test_by_the_paper_places_are_of_the_turns_that_it_keeps():
    missed, hit = search("q0", "c/x.mp4", LIST), search("q1", LIST[1], LIST)
    found = numbers_of([dialogue(missed, hit, search("q2", LIST[0], LIST), id="d", kind=7)], "paper")
    assert found == {"d#0": 2, "d#1": 3}
    again = [search("q", LIST[1], LIST), search("q", LIST[1], LIST[2:])]
    assert numbers_of([dialogue(*again[::-1], id="d", kind=7)], "paper") == {"d#0": 2}


def test_numbers_are_places_in_the_published_list(tmp_path):
    """The dataset leaves out candidates that are there twice or whose file is missing."""
    videos = tmp_path / "videos" / "c"
    videos.mkdir(parents=True)
    for letter in "abef":
        write_video(videos / f"{letter}.mp4", count=5)
    listed = [f"c/{letter}.mp4" for letter in "dbabefgh"]
    data = [dialogue(search("q", "c/e.mp4", listed, "video 5"), search("r", "c/b.mp4", listed, "video 2"), id="d")]
    raw_file, dataset = build_of(tmp_path, data)
    assert opened(dataset)[1][0].turns[0].candidates == ("c/b", "c/a", "c/e", "c/f")
    ours = [
        Prediction("d", 0, Intent.VIDEO, ("c/e", "c/a"), 4, None, "c/e", (), "是第3个视频。"),
        Prediction("d", 1, Intent.VIDEO, ("c/b", "c/a"), 4, None, "c/b", (), "The 1st video, not video 2."),
    ]
    (_, result, again), there, back = both_ways(tmp_path, raw_file, dataset, header_of(dataset), ours)
    outputs = [row.output for row in published.read_predictions(result)]
    assert outputs == ["是第5个视频。", "The 2nd video, not video 2."]
    assert amiss(there) == {"renumbered": ["d turn 1", "d turn 2"]} and not back["problems"]
    assert [(p.video, p.pool, p.text) for p in records.read(again)[1]] == [
        ("c/e", 8, outputs[0]), ("c/b", 8, outputs[1]),
    ]  # fmt: skip
    assert official(raw_file, result).right == {(1, "r1"): 1, (2, "r1"): 1}
    # A number that is that of the video already, in words that are not changed; and what was never shown.
    kept = [
        dataclasses.replace(ours[0], text="video 5"),
        dataclasses.replace(ours[1], text="video 1", video="c/z", ranking=("c/z",)),
    ]
    (_, result, _), there, _ = both_ways(tmp_path, raw_file, dataset, header_of(dataset), kept)
    assert [row.output for row in published.read_predictions(result)] == ["video 5", None]
    assert amiss(there) == {"not_shown": ["d turn 2"]}
    # One that the dataset has not, chosen by another system: it is named, and wrong.
    published.write_predictions(result, published.convert(raw.read_rows(raw_file))[0], ["video 1", "video 4"])
    exchange.exchange(raw_file, dataset, result, again)
    header, back = records.read(again)
    assert [p.video for p in back] == ["c/d", "c/b"]
    _, problems = records.match(header.truths(opened(dataset)[1]), back, given=True)
    assert problems.outside == {"d#0": "ranking: c/d"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "e2e"}, "found the protocol e2e, expected one with given candidates"),
        ({"split": "train"}, "found predictions for train of the dialogues .*, expected test of "),
        ({"dialogues": "others:test"}, "found predictions for test of the dialogues others:test, expected test of "),
        ({"settings": {"dialogues_at_most": "x"}}, "dialogues_at_most: found 'x', expected a whole number"),
    ],
)
def test_predictions_that_no_result_file_can_hold_are_refused(small, change, message, tmp_path):
    raw_file, dataset = small
    path, out = tmp_path / "ours.jsonl", tmp_path / "result.json"
    records.write(str(path), dataclasses.replace(header_of(dataset), **change), RIGHT)
    with pytest.raises(ValueError, match=message):
        exchange.exchange(raw_file, dataset, str(path), str(out))
    assert not out.exists()


def test_other_files_are_refused(small, tmp_path):
    raw_file, dataset = small
    for text, message in (("", "found no whole line"), ("{}\n", "found another file"), ("[1]", "expected user_q and")):
        (tmp_path / "file").write_text(text)
        with pytest.raises(ValueError, match=message):
            exchange.exchange(raw_file, dataset, str(tmp_path / "file"), str(tmp_path / "out"))
    other, _ = build_of(tmp_path / "other", [dialogue(search("else", LIST[0], LIST), id="else")])
    records.write(str(tmp_path / "file"), header_of(dataset), RIGHT)
    with pytest.raises(
        ValueError, match=r"found no turn of .*IVCR-200K.json in test, expected a dataset that was built"
    ):
        exchange.exchange(other, dataset, str(tmp_path / "file"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_command_goes_both_ways_and_needs_no_jax(small, tmp_path):
    raw_file, dataset = small
    ours, result = str(tmp_path / "ours.jsonl"), str(tmp_path / "result.json")
    records.write(ours, header_of(dataset), RIGHT[:2])
    script = (
        "import sys; from absl import app; from ivcr_jax.metrics import exchange; import runpy\n"
        "try: runpy.run_module('ivcr_jax.metrics.exchange', run_name='__main__')\n"
        "finally: assert 'jax' not in sys.modules, 'jax'"
    )
    command = [sys.executable, "-c", script, f"--raw={raw_file}", f"--dialogues={dataset}", "--split=test"]
    done = subprocess.run([*command, f"--predictions={ours}", f"--out={result}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *words, last = done.stdout.splitlines()
    assert words == ["missing (samples without a prediction: null): 3, d2 turn 1, talk turn 1, talk turn 2"]
    assert json.loads(last)["written"] == 2
    done = subprocess.run([*command, f"--predictions={result}", f"--out={ours}.2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [each.video for each in records.read(f"{ours}.2")[1]] == NAMES[:2]
    refused = subprocess.run([*command, "--predictions=absent", f"--out={result}"], capture_output=True, text=True)
    assert refused.returncode == 1 and "exchange: " in refused.stderr and "Traceback" not in refused.stderr
