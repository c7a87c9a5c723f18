"""Dialogues held again by each protocol, against conversations held directly; the command against its own files."""

import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from ivcr_jax import evaluate as evaluation
from ivcr_jax import index, protocols, score
from ivcr_jax.data import prompt
from ivcr_jax.data.dialogue import Dialogue, Intent, Turn
from ivcr_jax.evaluate import evaluate
from ivcr_jax.infer.session import Session
from ivcr_jax.infer.turn import Message
from ivcr_jax.metrics import published, records
from ivcr_jax.metrics.judge import Judge
from tests.infer.conftest import IDS
from tests.metrics import built
from tests.metrics.test_judge import endpoint  # noqa: F401 - a server
from tests.models.conftest import close


def search(user, answer, video, candidates=tuple(IDS)):
    return Turn(user, answer, Intent.VIDEO, "en", video, candidates)


def moment(user, answer, video, span):
    return Turn(user, answer, Intent.MOMENT, "en", video, (), span)


CHAT = Turn("你好，你能做什么？", "我可以找视频。", Intent.CHAT, "zh")
LONG = Dialogue(
    "long",
    "test",
    3,
    (
        search("A fish swims.", "The best match is video 4.", IDS[3]),
        moment("When does it turn?", "It is in video 4 at 0.2s-0.8s.", IDS[3], (0.2, 0.8)),
        CHAT,
        search("Not this one, a red one.", "The best match is video 2.", IDS[1], (IDS[0], IDS[1])),
        moment("And then?", "It is in video 2 at 0.0s-0.5s.", IDS[1], (0.0, 0.5)),
    ),
)
DIALOGUES = (LONG, Dialogue("short", "test", 7, (search("它在哪里？", "视频 1。", IDS[0], ()), *LONG.turns[1:2])))


def same(prediction, turn):
    """A prediction and a session's turn, but for the last bits of numbers."""
    assert prediction.intent == turn.intent and prediction.text == turn.text and not prediction.error
    if turn.intent == Intent.VIDEO:
        assert prediction.ranking == tuple(ranked.id for ranked in turn.ranking)
        assert prediction.video == turn.video
    if turn.moment:
        assert prediction.video == turn.moment.video
        for one, other in zip(prediction.moments, (turn.moment, *turn.others), strict=True):
            assert one.video == other.video
            close([one.start, one.end, one.score], [other.start, other.end, other.score], 1e-4)
    else:
        assert prediction.moments == ()


def test_with_true_history_a_turn_is_answered_as_if_it_were_the_first_that_is_answered(helper, corpus):
    """For each turn a conversation that was told all before it, from its beginning."""
    held = protocols.hold(helper, corpus, DIALOGUES, "gold", 3)
    for dialogue, predictions in zip(DIALOGUES, held, strict=True):
        for place, prediction in enumerate(predictions):
            session, shown = Session(helper, corpus, candidates=3), ()
            for turn in dialogue.turns[:place]:
                if turn.intent == Intent.VIDEO:
                    shown = turn.candidates
                    if not shown:  # the first stage's, in its order
                        query = helper.embed(prompt.retrieval_query([turn.user]))
                        shown = tuple(corpus.videos[i].id for i in corpus.search(query[None], 3)[1][0])
                candidates = shown if turn.intent == Intent.VIDEO else None
                session.tell(Message(turn.user, turn.intent, candidates), turn.answer, turn.video_id or None, turn.span)
            turn = dialogue.turns[place]
            video = turn.video_id if turn.intent == Intent.MOMENT else None
            same(prediction, session.say(Message(turn.user, turn.intent, turn.candidates or None, video)))
            assert (prediction.dialogue, prediction.turn, prediction.parsed) == (dialogue.id, place, True)
            if turn.intent == Intent.VIDEO:
                assert prediction.pool == (len(turn.candidates) or len(corpus.videos))


def test_given_candidates_are_ranked_in_other_orders_too(helper, corpus):
    """Whose states hang on nothing but themselves: the same order comes of all; and a turn is answered as without."""
    held = protocols.hold(helper, corpus, DIALOGUES, "gold", 3, shuffles=3)
    for dialogue, predictions, others in zip(
        DIALOGUES, held, protocols.hold(helper, corpus, DIALOGUES, "gold", 3), strict=True
    ):
        for turn, prediction, other in zip(dialogue.turns, predictions, others, strict=True):
            shown = turn.intent == Intent.VIDEO and turn.video_id in turn.candidates
            places = (prediction.ranking.index(turn.video_id) + 1,) * 3 if shown else ()
            assert prediction.shuffled == places
            assert dataclasses.replace(prediction, shuffled=(), latency={}) == dataclasses.replace(other, latency={})
    for each in protocols.hold(helper, corpus, DIALOGUES, "cascade", 3, shuffles=3):
        assert not any(prediction.shuffled for prediction in each)


def test_by_the_words_alone_it_is_a_conversation(helper, corpus):
    held = protocols.hold(helper, corpus, DIALOGUES, "e2e", 2)
    for dialogue, predictions in zip(DIALOGUES, held, strict=True):
        session, asked = Session(helper, corpus, candidates=2), []
        for turn, prediction in zip(dialogue.turns, predictions, strict=True):
            said = session.say(turn.user)
            same(prediction, said)
            if said.intent != Intent.VIDEO:
                continue
            asked.append(turn.user)
            assert prediction.pool == len(IDS)
            if turn.intent == Intent.VIDEO and turn.video_id in prediction.ranking:
                assert prediction.rank == prediction.ranking.index(turn.video_id) + 1
            elif turn.intent == Intent.VIDEO:
                query = helper.embed(prompt.retrieval_query(asked))
                better = [float(vector @ query) for vector in corpus.vectors]
                own = better[IDS.index(turn.video_id)]
                assert prediction.rank == max(sum(score >= own for score in better), 3)
    assert any(p.rank and p.rank > 2 for each in held for p in each), "a video behind those that were handed on"


def test_a_cascade_ends_with_the_first_turn_that_fails(helper, corpus, monkeypatch):
    """It answers as a conversation with given candidates does, as long as no turn has failed."""
    session = Session(helper, corpus)
    expected = [session.say(Message(turn.user, turn.intent, turn.candidates or None)) for turn in LONG.turns]
    monkeypatch.setattr(protocols, "failed", lambda turn, prediction: False)
    for prediction, turn in zip(protocols.hold(helper, corpus, [LONG], "cascade", 10)[0], expected, strict=True):
        same(prediction, turn)
    monkeypatch.setattr(protocols, "failed", lambda turn, said: turn.intent == Intent.CHAT or bool(said.error))
    held = protocols.hold(helper, corpus, [LONG], "cascade", 10)[0]
    for prediction, turn in zip(held[:3], expected, strict=False):
        same(prediction, turn)
    assert [prediction.error for prediction in held[3:]] == ["an earlier turn failed"] * 2


def test_when_a_turn_has_failed():
    find, when = LONG.turns[:2]
    answer = records.Prediction("long", 0, Intent.VIDEO, tuple(IDS), 4, video=IDS[3])
    assert not protocols.failed(find, answer)
    assert protocols.failed(find, dataclasses.replace(answer, video=IDS[0]))
    assert protocols.failed(find, dataclasses.replace(answer, video=None))
    assert protocols.failed(find, dataclasses.replace(answer, error="it stopped"))
    for start, end, fails in ((0.2, 0.8, False), (0.2, 0.51, False), (0.2, 0.49, True), (0.9, 1.0, True)):
        said = dataclasses.replace(answer, moments=(records.Moment(IDS[3], start, end),))
        assert protocols.failed(when, said) == fails
    assert protocols.failed(when, answer), "it has no moment"
    elsewhere = records.Moment(IDS[0], 0.2, 0.8)
    assert protocols.failed(when, dataclasses.replace(answer, video=IDS[0], moments=(elsewhere,)))
    assert not protocols.failed(CHAT, dataclasses.replace(answer, video=None))


def test_what_the_published_test_set_keeps():
    hit, miss = search("a", "video 1", "x", ("y", "x")), search("a", "video 1", "z", ("y", "x"))
    first = dataclasses.replace(moment("b", "video 1", "x", (0.0, 1.0)), candidates=("x", "y"))
    second = dataclasses.replace(first, candidates=("y", "x"))

    def kept(kind, *turns):
        found = published.of_dialogue(Dialogue("d", "test", kind, turns))
        return None if found is None else found.turns

    assert kept(1, hit, miss, first) == (hit, miss, first)
    assert kept(1, miss, hit) is None and kept(0, hit) is None
    assert kept(1, CHAT, hit) == (CHAT, hit) and kept(1, CHAT, miss, hit) is None
    assert kept(2, first, miss) == (first, miss) and kept(2, second) is None
    assert kept(7, hit, miss, second, first) == (hit, first)
    assert kept(3, *[hit] * 9) == (hit,) * 7


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The dialogues as a dataset."""
    return built.build_of(tmp_path_factory.mktemp("dialogues"), built.rows_of(DIALOGUES))[1]


@pytest.fixture
def run(helper, export, indexed, data, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "Assistant", lambda *_, **__: helper)

    def run(**options):
        return evaluate(export, indexed, data, tmp_path / "out", **{"batch": 2, **options})

    return run


def test_a_report_of_every_protocol(run, tmp_path, capsys):
    run(note="Of made-up dialogues.")
    out = tmp_path / "out"
    told = json.loads((out / "report.json").read_text())
    assert told["about"]["note"] == "Of made-up dialogues."
    assert [*told["protocols"]] == ["paper", "gold", "cascade", "e2e"]
    for name in ("gold", "e2e"):
        overall = told["protocols"][name]["overall"]
        assert overall["intent_accuracy"]["n"] == sum(len(dialogue.turns) for dialogue in DIALOGUES)
        assert overall["moment_miou"]["n"] == 3 and overall["retrieval_r1"]["n"] == 3
        assert overall["unparsed"]["value"] == 0
    _, said = records.read(str(out / "predictions-gold-0.jsonl"))
    ious = [
        float(np.clip(min(e, wanted[1]) - max(s, wanted[0]), 0, None) / (max(e, wanted[1]) - min(s, wanted[0])))
        for dialogue in DIALOGUES
        for place, turn in enumerate(dialogue.turns)
        if (wanted := turn.span)
        for prediction in said
        if (prediction.dialogue, prediction.turn) == (dialogue.id, place)
        for _, s, e, _ in prediction.moments[:1]
    ]
    close(told["protocols"]["gold"]["overall"]["moment_miou"]["value"], np.mean(ious), 1e-6)
    assert (out / "report.md").read_text() in capsys.readouterr().out


def test_a_run_that_was_stopped_goes_on(run, tmp_path, monkeypatch):
    run(names=["e2e"])
    file = tmp_path / "out" / "predictions-e2e-0.jsonl"
    whole = file.read_bytes()
    held = [dataclasses.replace(prediction, latency={}) for prediction in records.read(str(file))[1]]
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for size in (0, ends[0], ends[2] + 5, ends[-2]):
        file.write_bytes(whole[:size])
        run(names=["e2e"])
        again = [dataclasses.replace(prediction, latency={}) for prediction in records.read(str(file))[1]]
        assert [(p.id, p.text, p.ranking) for p in again] == [(p.id, p.text, p.ranking) for p in held]
    monkeypatch.setattr(protocols, "hold", None)  # nothing is left to hold
    run(names=["e2e"])
    with pytest.raises(ValueError, match="predictions-e2e-0.jsonl: was made with"):
        run(names=["e2e"], candidates=3)


@pytest.fixture
def command(export, data, tmp_path):
    """The command of OUT, as its arguments; with another OUT or others."""

    def command(out, *arguments):
        return [
            sys.executable, "-m", "ivcr_jax.evaluate", f"--export={export}", f"--dialogues={data}", f"--out={out}",
            f"--cache={tmp_path / 'cache'}", "--batch=1", *arguments,
        ]  # fmt: skip

    return command


def answered(*files):
    """What was said and ranked, by turn."""
    found = [prediction for file in files for prediction in records.read(str(file))[1]]
    return {each.id: (each.text, each.ranking, each.rank, each.shuffled, each.video) for each in found}


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_hold_a_share_each_and_report_as_one(command, indexed, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    joined = f"--coordinator=localhost:{port}", "--processes=2"
    started = [
        subprocess.Popen(
            command(shared, f"--corpus={indexed}", *joined, f"--process_id={number}"),
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], said
    assert ["# Evaluation" in out for out, _ in said] == [True, False], "the first reports"
    done = subprocess.run(command(alone, f"--corpus={indexed}"), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in protocols.PROTOCOLS:
        files = [shared / f"predictions-{name}-{number}.jsonl" for number in range(2)]
        assert [len(answered(file)) for file in files] == ([5, 0] if name == "paper" else [5, 2])
        assert answered(*files) == answered(alone / f"predictions-{name}-0.jsonl")
    one, two = (json.loads((out / "report.json").read_text())["protocols"] for out in (alone, shared))
    for name in protocols.PROTOCOLS:
        for metric, cell in one[name]["overall"].items():
            assert "latency" in metric or two[name]["overall"][metric] == cell


@pytest.mark.slow
def test_a_folder_of_videos_becomes_a_corpus_of_what_the_dialogues_name(command, videos, tmp_path):
    """Of four videos and one more, which no dialogue names."""
    folder, out = tmp_path / "videos", tmp_path / "out"
    shutil.copytree(videos, folder)
    shutil.copy(folder / "d.avi", folder / "another.avi")
    for _ in range(2):  # again, it is there
        whole = command(out, f"--videos={folder}", "--protocols=e2e")
        done = subprocess.run(whole, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "| corpus | 4 videos |" in done.stdout
    refused = subprocess.run(command(out, "--protocols=e2e"), capture_output=True, text=True)
    assert refused.returncode == 1 and "videos" in refused.stderr and "Traceback" not in refused.stderr


def test_a_judge_scores_each_protocol(run, endpoint, tmp_path):  # noqa: F811
    """The server gives every answer 5."""
    for _ in range(2):
        run(names=["gold", "cascade"], judged_by=Judge(endpoint.url, "judge-1"))
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    texts = 0
    for name in ("gold", "cascade"):
        said = records.read(str(tmp_path / "out" / f"predictions-{name}-0.jsonl"))[1]
        answered = {prediction.id: bool(prediction.text and not prediction.error) for prediction in said}
        found = told["protocols"][name]
        cells = [found["overall"][f"judge_{language}"] for language in ("en", "zh")]
        close(sum(cell["value"] * cell["n"] for cell in cells), 5 * sum(answered.values()), 1e-9)
        unjudged = found["problems"].get("unjudged", {"turns": {}})["turns"]
        assert unjudged.keys() == {turn for turn, there in answered.items() if not there}
        assert told["about"][f"judge, {name}"].startswith("judge-1 (says it is judge-2), prompt ")
        texts += sum(answered.values())
    assert len(endpoint.asked) == texts > 8
    assert "|tok:13a|" in told["about"]["bleu_en"] and "|tok:zh|" in told["about"]["bleu_zh"]


def test_what_cannot_be_evaluated(run, tmp_path, export, indexed, data, videos):
    with pytest.raises(ValueError, match="protocols: found paperr, expected some of paper, gold, cascade"):
        run(names=["paperr"])
    fewer = tmp_path / "fewer"
    index.add(export, videos, fewer, batch=1)
    index.remove(fewer, [IDS[3]])
    with pytest.raises(ValueError, match="found none of the 2 dialogues' videos whole"):
        evaluate(export, fewer, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_report_can_be_made_again_without_a_model(run, tmp_path, data, indexed):
    run()
    files = [("", str(tmp_path / "out" / f"predictions-{name}-0.jsonl")) for name in protocols.PROTOCOLS]
    score.score_files(data, files, tmp_path / "again", corpus=indexed)
    first, again = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("out", "again"))
    assert again["protocols"] == first["protocols"] and [*first["protocols"]] == [*protocols.PROTOCOLS]
    with pytest.raises(ValueError, match="gold: found searches without candidates, expected --corpus"):
        score.score_files(data, files[1:2], tmp_path / "again")
