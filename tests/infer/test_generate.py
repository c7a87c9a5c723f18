"""Dialogues of a file against conversations held directly, stopped runs against whole ones."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ivcr_jax import index
from ivcr_jax.data.dialogue import Intent
from ivcr_jax.infer import generate as generation
from ivcr_jax.infer.corpus import Corpus, CorpusError
from ivcr_jax.infer.engine import Sampling
from ivcr_jax.infer.generate import generate, read_scripts
from ivcr_jax.infer.session import Session
from ivcr_jax.infer.turn import Message
from ivcr_jax.lines import growing
from tests.infer.conftest import IDS, write_export
from tests.models.conftest import close

DIALOGUES = [
    {"id": "one", "turns": ["A fish swims.", "When does it turn?", "你好"]},
    {"id": "two", "turns": [{"message": "It jumps.", "intent": "MOMENT", "video": IDS[2]}]},
    {"id": "three", "turns": [{"message": "Red.", "candidates": [IDS[3], IDS[0]]}, "Do you have a similar one?"]},
    {"id": "four", "turns": ["Thanks!", "\u200b", "A fish."]},
    {"id": "five", "turns": ["找一个小狗的视频。"]},
]
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}


def lines(dialogues):
    return "".join(json.dumps(dialogue) + "\n" for dialogue in dialogues)


@pytest.fixture
def run(helper, export, indexed, tmp_path, monkeypatch):
    """Runs a file into tmp_path / "out.jsonl", with models that are there already; its blocks are not."""

    def load(*args, **options):
        helper._blocks.clear()
        return helper

    def run(dialogues=DIALOGUES, corpus=indexed, **options):
        file = tmp_path / "dialogues.jsonl"
        file.write_text(dialogues if isinstance(dialogues, str) else lines(dialogues))
        return generate(export, corpus, str(file), str(tmp_path / "out.jsonl"), **{"batch": 2, **options})

    monkeypatch.setattr(generation, "Assistant", load)
    return run


def held(helper, corpus, messages, **options):
    """What a conversation gives that is held directly, as JSON values."""
    session, turns = Session(helper, corpus, **options), []
    for message in messages:
        turn = dataclasses.asdict(session.say(message))
        turn["intent"] = Intent(turn["intent"]).name
        del turn["timings"]
        turns.append(json.loads(json.dumps(turn)))
    return turns


def messages_of(dialogue):
    """The messages of a dialogue above."""
    for turn in dialogue["turns"]:
        known = {"message": turn} if isinstance(turn, str) else dict(turn)
        intent, candidates = known.get("intent"), known.get("candidates")
        yield Message(known["message"], intent and Intent[intent], candidates and tuple(candidates), known.get("video"))


def alike(found, expected):
    """The same, but for the last bits of numbers."""
    if isinstance(expected, float):
        close(found, expected, 1e-4)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            alike(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            alike(one, other)
    else:
        assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_files_dialogues_are_conversations(batch, run, helper, indexed, tmp_path):
    """Alone to the last bit; beside others the same words, and the same numbers but for rounding."""
    corpus = Corpus.open(indexed)
    failed = run(batch=batch, candidates=3)
    assert failed == {"four": "turn 2: the message holds nothing; expected some words"}
    header, *rows = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert header["batch"] == batch and header["candidates"] == 3 and header["export"] == helper.fingerprint
    assert [row["id"] for row in rows] == [dialogue["id"] for dialogue in DIALOGUES]
    for row, dialogue in zip(rows, DIALOGUES, strict=True):
        messages = [*messages_of(dialogue)]
        if dialogue["id"] == "four":  # what was said before it failed is kept
            assert row.pop("error").startswith("turn 2: ")
            messages = messages[:1]
        expected = held(helper, corpus, messages, candidates=3)
        if batch == 1:
            assert row == {"id": dialogue["id"], "turns": expected}
        alike(row["turns"], expected)
    assert [turn["intent"] for turn in rows[0]["turns"]] == ["VIDEO", "MOMENT", "CHAT"]
    assert len(rows[2]["turns"]) == 2


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(run, tmp_path):
    """Stopped behind any byte: within the header, a line, a group, or between them."""
    out = tmp_path / "out.jsonl"
    options = {"sampling": Sampling(1.2, 0.9, seed=4), "candidates": 3}
    failed = run(**options)
    whole = out.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    assert len(ends) == 6
    for size in (0, 5, ends[0], ends[1] - 1, ends[1], ends[3] + 9, ends[4]):
        out.write_bytes(whole[:size])
        assert run(**options) == failed
        assert out.read_bytes() == whole
    assert run(**options) == failed and out.read_bytes() == whole  # there is nothing left to do


def test_results_of_something_else_are_left_alone(run, export, indexed, videos, tmp_path):
    talk = [{"id": "a", "turns": ["你好"]}]
    out = tmp_path / "out.jsonl"
    assert run(talk) == {}
    whole = out.read_bytes()
    for options, said in (
        ({"candidates": 9}, "was made with candidates 10 and not 9; expected the same, or a new file"),
        ({"batch": 1, "sampling": Sampling(seed=2)}, "was made with seed 0 and not 2, batch 2 and not 1"),
        ({"dialogues": [*talk, {"id": "b", "turns": ["x"]}]}, "was made with dialogues "),
    ):
        with pytest.raises(ValueError, match=f"out.jsonl: {said}"):
            run(**{"dialogues": talk, **options})
    fewer = tmp_path / "fewer"
    index.add(export, videos, fewer, batch=1)
    index.remove(fewer, ["d"])
    with pytest.raises(ValueError, match="was made with corpus "):
        run(talk, corpus=fewer)
    other = write_export(tmp_path / "other", scale=0.5)
    with pytest.raises(CorpusError, match="was made with the export"):
        generate(other, indexed, str(tmp_path / "dialogues.jsonl"), str(out))
    # The same parameters, so the same fingerprint and corpus, and yet another answer.
    calibrated = tmp_path / "calibrated"
    shutil.copytree(export, calibrated)
    (calibrated / "card.json").write_text(json.dumps({"version": 1, "calibration": {"threshold": 0.5}}))
    with pytest.raises(ValueError, match="out.jsonl: was made with fits None and not 0.5; expected the same"):
        generate(calibrated, indexed, str(tmp_path / "dialogues.jsonl"), str(out), batch=2)
    assert out.read_bytes() == whole
    for held in (b"mine", b"mine\n", b"[1]\n", b'{"a": 1}\n'):
        out.write_bytes(held)
        with pytest.raises(ValueError, match="out.jsonl: found another file, expected results or nothing"):
            run(talk)
        assert out.read_bytes() == held
    out.write_bytes(whole)
    with (
        growing(str(out), json.loads(whole.splitlines()[0]), "results", lambda row, number: row),
        pytest.raises(ValueError, match="another process writes to it"),
    ):
        run(talk)
    assert out.read_bytes() == whole


GOOD = '{"id": "a", "turns": ["x"]}\n'


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "d.jsonl: found no dialogue, expected one a line"),
        ("\n \n", "d.jsonl: found no dialogue"),
        (GOOD + "{", "line 2: found what is no JSON .*, expected an object with id and turns"),
        (GOOD + "\n[1]", "line 3: found list, expected an object with id and turns"),
        ("{}", "line 1: found nothing, expected an object with id and turns"),
        ('{"id": "a", "turn": ["x"]}', "line 1: found id, turn, expected an object with id and turns"),
        ('{"id": 3, "turns": ["x"]}', "line 1: id: found 3, expected a string"),
        ('{"id": "a", "turns": []}', r"line 1: turns: found \[\], expected a list of at least one"),
        (GOOD + GOOD, "line 2: found the id 'a' of line 1 again"),
        ('{"id": "a", "turns": ["x", 3]}', "line 1: turn 2: found 3, expected words, or an object with message"),
        ('{"id": "a", "turns": [{"message": "x", "vidoe": "d"}]}', "turn 1: found message, vidoe, expected words"),
        ('{"id": "a", "turns": [{"message": 3}]}', "turn 1: message: found 3, expected words"),
        ('{"id": "a", "turns": [{"message": "x", "intent": "FIND"}]}', "intent: found 'FIND', expected one of CHAT, V"),
        ('{"id": "a", "turns": [{"message": "x", "candidates": [1]}]}', r"candidates: found \[1\], expected a list"),
        ('{"id": "a", "turns": [{"message": "x", "candidates": []}]}', "candidates: found none; expected at least one"),
        ('{"id": "a", "turns": [{"message": "x", "candidates": ["d", "d"]}]}', "candidates: found d, d; expected at"),
        (
            '{"id": "a", "turns": [{"message": "x", "intent": "CHAT", "candidates": ["d"]}]}',
            "turn 1: candidates of a message with the intent CHAT; expected VIDEO, or no intent",
        ),
    ],
)
def test_files_that_are_wrong_are_told_by_line(text, said):
    with pytest.raises(ValueError, match=said):
        read_scripts(text.encode(), "d.jsonl")


def test_what_is_wrong_is_told_before_the_models_are_read(export, indexed, tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "Assistant", None)
    file, out = tmp_path / "d.jsonl", tmp_path / "out.jsonl"
    for turn in ({"message": "x", "candidates": ["d", "e"]}, {"message": "x", "video": "e"}):
        file.write_text(GOOD + lines([{"id": "b", "turns": ["y", turn]}]))
        with pytest.raises(ValueError, match="d.jsonl: line 2: turn 2: found no video e in the corpus, expected ids"):
            generate(export, indexed, str(file), str(out))
    file.write_text(GOOD)
    with pytest.raises(FileNotFoundError, match="found no folder .*/none, expected one"):
        generate(export, indexed, str(file), str(tmp_path / "none" / "out.jsonl"))
    with pytest.raises(ValueError, match="found a folder, expected results or nothing"):
        generate(export, indexed, str(file), str(tmp_path))
    with pytest.raises(FileNotFoundError, match="found nothing, expected a file of dialogues"):
        generate(export, indexed, str(tmp_path / "none.jsonl"), str(out))
    assert not out.exists()


def test_what_is_known_of_a_message(helper, indexed):
    """Given candidates are shown in their order, whatever was turned down; a given video is the current one."""
    corpus = Corpus.open(indexed)
    session = Session(helper, corpus, candidates=3)
    given = (IDS[3], IDS[0], IDS[1])
    turn = session.say(Message("When does it jump?", Intent.VIDEO, given))
    assert turn.intent == Intent.VIDEO
    assert tuple(ranked.id for ranked in sorted(turn.ranking, key=lambda ranked: ranked.number)) == given
    number = {video.id: place for place, video in enumerate(corpus.videos)}
    cosines = corpus.vectors @ helper.embed("When does it jump?")
    for ranked in turn.ranking:
        close(ranked.first, cosines[number[ranked.id]], 1e-5)
    turn = session.say(Message("Not this one, a red one.", candidates=(turn.video,), video=turn.video))
    assert [ranked.id for ranked in turn.ranking] == [turn.video]
    turn = session.say(Message("A fish.", Intent.MOMENT, video=IDS[2]))
    assert turn.intent == Intent.MOMENT and turn.moment.video == turn.video == session.current == IDS[2]
    assert session.say(Message("A fish.", Intent.CHAT)).intent == Intent.CHAT
    for message in (Message("x", video="e"), Message("x", candidates=("e",))):
        with pytest.raises(ValueError, match="found no video 'e'"):
            session.say(message)
    assert len(session.turns) == 4
    again, differ = Session.load(helper, corpus, session.to_json())
    assert again.turns == session.turns and differ == []


def test_a_block_is_the_same_bits_beside_others(helper, indexed):
    corpus = Corpus.open(indexed)
    helper._blocks.clear()
    alone = [helper.blocks(corpus, [name])[0] for name in IDS]
    helper._blocks.clear()
    for one, other in zip(alone, helper.blocks(corpus, IDS), strict=True):
        for part in ("k", "v", "keys"):
            np.testing.assert_array_equal(getattr(one, part), getattr(other, part))


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_command_killed_and_begun_again(run, export, indexed, tmp_path):
    assert [*run()] == ["four"]  # in one piece, by this process
    whole, out = (tmp_path / "out.jsonl").read_bytes(), tmp_path / "killed.jsonl"
    command = [sys.executable, "-m", "ivcr_jax.infer.generate", f"--export={export}", f"--corpus={indexed}"]
    command += [f"--dialogues={tmp_path / 'dialogues.jsonl'}", f"--out={out}", "--batch=2", f"--cache={tmp_path / 'c'}"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was stopped on its way"
    assert out.read_bytes().count(b"\n") < 6 and whole.startswith(out.read_bytes())
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1 and "1 dialogues failed" in done.stdout
    assert "four: turn 2: the message holds nothing; expected some words" in done.stderr
    assert out.read_bytes() == whole
