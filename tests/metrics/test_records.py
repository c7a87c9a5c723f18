"""Predictions: their file, whole and growing, and which belongs to which turn; each thing that can be wrong by hand."""

import dataclasses
import json
import math

import pytest

from ivcr_jax.data.dialogue import Dialogue, Intent, Turn
from ivcr_jax.metrics import records
from ivcr_jax.metrics.records import Header, Moment, Prediction, Problems, match
from tests.metrics import made_up_records as made_up

HEADER = Header("gold", "export-1", "dialogues-1", "test", {"candidates": 3})
LIST = ("c/a", "c/b", "c/d")
DIALOGUES = [
    Dialogue("one", "test", 1, (
        Turn("q", "video 2", Intent.VIDEO, "en", "c/b", LIST),
        Turn("q", "1s-2s", Intent.MOMENT, "en", "c/b", span=(1.0, 2.0)),
        Turn("q", "a", Intent.CHAT, "en"),
    )),
    Dialogue("two", "test", 1, (Turn("q", "video 1", Intent.VIDEO, "en", "c/z", LIST),)),
]  # fmt: skip
GOOD = Prediction("one", 0, Intent.VIDEO, ("c/b", "c/a"), 3, None, "c/b", (), "video 2", True, {"search": 0.5})
SPAN = Prediction("one", 1, Intent.MOMENT, video="c/b", moments=(Moment("c/b", 1.0, 2.0, 0.5),))


def test_a_file_gives_back_what_was_written(tmp_path):
    predictions = made_up.run(made_up.split(20), 0.7)
    predictions += [GOOD, Prediction("x", 3, error="no video"), dataclasses.replace(SPAN, moments=(Moment("v", 1, 2),))]
    path = str(tmp_path / "p.jsonl")
    records.write(path, HEADER, predictions)
    assert records.read(path) == (HEADER, predictions)
    first, *rows = (tmp_path / "p.jsonl").read_text().splitlines()
    named = {"protocol": HEADER.protocol, "export": HEADER.export, "dialogues": HEADER.dialogues, "split": HEADER.split}
    assert json.loads(first) == {"predictions": 2, **named, "candidates": 3}
    assert len(rows) == len(predictions)
    assert json.loads(rows[-3])["intent"] == "VIDEO" and [*tmp_path.iterdir()] == [tmp_path / "p.jsonl"]


def test_a_file_grows_from_wherever_it_was_stopped(tmp_path):
    predictions = made_up.run(made_up.split(3), 0.7)
    path = tmp_path / "p.jsonl"

    def go_on():
        with records.growing(str(path), HEADER) as (append, there):
            assert there == predictions[: len(there)]
            for prediction in predictions[len(there) :]:
                append(prediction)
        return len(there)

    assert go_on() == 0
    whole = path.read_bytes()
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        assert go_on() == max(0, whole[:size].count(b"\n") - 1)
        assert path.read_bytes() == whole
    assert go_on() == len(predictions) and path.read_bytes() == whole
    path.write_bytes(whole[:-5])  # who reads a file that is being written sees its whole lines
    assert records.read(str(path)) == (HEADER, predictions[:-1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"turn": "1"}, "line 2: turn: found '1', expected a whole number"),
        ({"turn": True}, "line 2: turn: found True, expected a whole number"),
        ({"intent": "FIND"}, "line 2: intent: found 'FIND', expected the name of an intent or null"),
        ({"intent": ["VIDEO"]}, "line 2: intent: found "),
        ({"ranking": ["a", 1]}, "line 2: ranking: found .*, expected a list of ids"),
        ({"moments": [["v", 1, 2]]}, r"line 2: moments: found .*, expected a list of \[video, start, end, score\]"),
        ({"parsed": 1}, "line 2: parsed: found 1, expected true or false"),
        ({"latency": {"search": math.nan}}, "line 2: latency: found .*, expected seconds by stage"),
        ({"latency": {"search": -1}}, "line 2: latency: found "),
        ({"extra": 1}, "line 2: found dialogue, error, extra, .*; expected an object with dialogue, turn, "),
    ],
)
def test_lines_that_are_no_predictions_are_refused(change, said, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps(HEADER.to_json()) + "\n" + json.dumps(GOOD.to_json() | change) + "\n")
    with pytest.raises(ValueError, match=f"p.jsonl: {said}"):
        records.read(str(path))


def test_files_of_something_else_are_refused_and_left_alone(tmp_path):
    path = tmp_path / "p.jsonl"
    for text, said in (
        ("", "found no whole line, expected predictions"),
        ("[1]\n", "found another file, expected predictions"),
        ('{"results": 1}\n', "found another file, expected predictions"),
        (json.dumps(HEADER.to_json() | {"predictions": 9}) + "\n", "line 1: found .*; expected version 2"),
        ('{"predictions": 2}\n', "line 1: found .*; expected version 2 and protocol, export, dialogues, split"),
        (json.dumps(HEADER.to_json()) + "\n{\n", "found what is no JSON in line 2, expected predictions"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"p.jsonl: {said}"):
            records.read(str(path))
    records.write(str(path), HEADER, [GOOD])
    whole = path.read_bytes()
    other = dataclasses.replace(HEADER, protocol="e2e", export="export-2")
    said = "was made with protocol gold and not e2e, export export-1 and not export-2; expected the same"
    with pytest.raises(ValueError, match=said), records.growing(str(path), other):
        pass
    with (
        records.growing(str(path), HEADER),
        pytest.raises(ValueError, match="another process writes to it"),
        records.growing(str(path), HEADER),
    ):
        pass
    assert path.read_bytes() == whole


def matched(*predictions, pool=None):
    pairs, problems = match(DIALOGUES, predictions, pool)
    assert [pair.id for pair in pairs] == ["one#0", "one#1", "one#2", "two#0"]
    return {pair.id: pair for pair in pairs}, {k: v for k, v in dataclasses.asdict(problems).items() if v}


def test_predictions_find_their_turns_in_any_order():
    chat, last = Prediction("one", 2, Intent.CHAT), Prediction("two", 0, Intent.VIDEO, LIST, 3)
    pairs, problems = matched(last, SPAN, chat, GOOD)
    assert problems == {}
    assert [pair.prediction for pair in pairs.values()] == [GOOD, SPAN, chat, last]
    assert [pair.there for pair in pairs.values()] == [True, False, False, False]
    assert pairs["one#1"].turn is DIALOGUES[0].turns[1]


def test_what_is_missing_doubled_or_unknown_is_counted_and_named():
    second = dataclasses.replace(GOOD, video=None)
    strangers = [Prediction("one", 3), Prediction("one", -1), Prediction("zero", 0)]
    pairs, problems = matched(*strangers, GOOD, second, SPAN, SPAN)
    assert pairs["one#0"].prediction is GOOD and pairs["one#1"].prediction is SPAN
    assert pairs["one#2"].prediction is None and pairs["two#0"].prediction is None
    few = "the dialogue has 3 turns"
    assert problems == {
        "repeated": {"one#0": "another answer", "one#1": "the same answer"},
        "unknown": {"one#3": few, "one#-1": few, "zero#0": "no such dialogue"},
        "missing": {"one#2": "no prediction", "two#0": "no prediction"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("base", "change", "kind", "said"),
    [
        (GOOD, {"error": "no room"}, "failed", "no room"),
        (GOOD, {"ranking": ("c/b", "c/z")}, "outside", "ranking: c/z"),
        (GOOD, {"video": "c/q"}, "outside", "video: c/q"),
        (SPAN, {"moments": (Moment("c/b", 1, 2), Moment("c/q", 1, 2))}, "outside", "moments: c/q"),
        (SPAN, {"moments": (Moment("c/b", 1, 2), Moment("c/b", 3, 2))}, "spans", "[3, 2] s, score None"),
        (SPAN, {"moments": (Moment("c/b", math.nan, 2, 0.5),)}, "spans", "[nan, 2] s, score 0.5"),
        (SPAN, {"moments": (Moment("c/b", 1, math.inf, 0.5),)}, "spans", "[1, inf] s, score 0.5"),
        (SPAN, {"moments": (Moment("c/b", 1, 2, math.nan),)}, "spans", "[1, 2] s, score nan"),
        (SPAN, {"moments": (Moment("c/b", 1, 2, 1.5),)}, "spans", "[1, 2] s, score 1.5"),
        (GOOD, {"ranking": ("c/a", "c/a")}, "ranks", "ranking: a video twice"),
        (GOOD, {"pool": 1}, "ranks", "pool: 1, but 2 are ranked"),
        (GOOD, {"ranking": ("c/a", "c/b"), "rank": 1}, "ranks", "rank: 1, expected 2 to 3"),
        (GOOD, {"ranking": ("c/a", "c/d"), "rank": 2}, "ranks", "rank: 2, expected 3 to 3"),
        (GOOD, {"rank": 4}, "ranks", "rank: 4, expected 1 to 3"),
        (GOOD, {"ranking": (), "rank": 0}, "ranks", "rank: 0, expected 1 to 3"),
    ],
)
def test_what_cannot_be_scored_is_wrong_and_named(base, change, kind, said):
    pairs, problems = matched(dataclasses.replace(base, **change))
    assert all(pair.prediction is None for pair in pairs.values())
    assert problems.pop(kind) == {base.id: said}
    assert problems.keys() == {"missing"} and base.id not in problems["missing"]


@pytest.mark.parametrize(
    "change", [{"rank": 3}, {"ranking": ("c/a",), "rank": 2}, {"ranking": ()}, {"moments": (Moment("c/d", 2, 2, 0.0),)}]
)
def test_what_can_be_scored_is(change):
    prediction = dataclasses.replace(GOOD, **change)
    assert matched(prediction)[0]["one#0"].prediction is prediction


def test_a_corpus_takes_the_place_of_the_candidates():
    far = Prediction("one", 0, Intent.VIDEO, ("c/z", "c/a"), 4, 4, "c/z")
    assert matched(far)[1]["outside"] == {"one#0": "ranking: c/z"}
    pairs, problems = matched(far, pool=[*LIST, "c/z"])
    assert pairs["one#0"].prediction is far and problems.keys() == {"missing"}
    assert [pair.there for pair in pairs.values()] == [True, True, False, True]
    assert not matched(far, pool=["c/a", "c/z"])[0]["one#0"].there
    assert matched(far, pool=["c/z"])[1]["outside"] == {"one#0": "ranking: c/a"}


def test_a_split_without_turns_or_with_a_dialogue_twice_is_refused():
    for dialogues in ([], [Dialogue("a", "test", 1, ())]):
        with pytest.raises(ValueError, match="found no turn in . dialogues, expected at least one"):
            match(dialogues, [GOOD])
    with pytest.raises(ValueError, match="found 'one' twice, expected each once"):
        match([*DIALOGUES, DIALOGUES[0]], [])


def test_every_prediction_of_a_large_run_is_matched():
    dialogues = made_up.split(200)
    predictions = made_up.run(dialogues, 0.5)
    pairs, problems = match(dialogues, predictions[::-1])
    assert problems == Problems(missing=problems.missing)
    assert len(pairs) == sum(len(dialogue.turns) for dialogue in dialogues)
    assert [pair.prediction for pair in pairs if pair.prediction] == predictions
    assert len(problems.missing) == len(pairs) - len(predictions) > 10
