"""Reports on prediction files: what is in them against loops over the records, and what is refused."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from ivcr_jax import score
from ivcr_jax.data.dialogue import Dialogue, Intent, Turn
from ivcr_jax.data.store import DatasetNotFound, DialogueStore
from ivcr_jax.infer.corpus import Contents, CorpusError, Video
from ivcr_jax.metrics import exchange, plots, published, raw, records
from ivcr_jax.metrics.records import Header, Moment, Prediction
from tests.metrics import made_up_records as made_up
from tests.metrics.built import build_of, rows_of

pytestmark = pytest.mark.usefixtures("fewer_resamples")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The raw file, the dataset's folder, its fingerprint and its dialogues."""
    folder = tmp_path_factory.mktemp("score")
    raw_file, dataset = build_of(folder, rows_of(made_up.split(40)))
    store = DialogueStore(dataset, "test")
    return raw_file, dataset, store.fingerprint, [store[number] for number in range(len(store))]


@pytest.fixture(scope="module")
def corpus(data, tmp_path_factory):
    """A corpus.json of all videos, and what it holds."""
    ids = sorted({video for dialogue in data[3] for video in dialogue.videos})
    videos = tuple(Video(name, f"{name}.mp4", "", name, 9.0, 8, 8, 5.0, 4, 0, 1, 1, "r", 1) for name in ids)
    held = Contents("an export", "vectors.npy", videos, ())
    path = tmp_path_factory.mktemp("corpus") / "corpus.json"
    path.write_text(json.dumps({"version": 1, **dataclasses.asdict(held)}))
    return path, held


@pytest.fixture
def write(data, tmp_path):
    """Writes a file of predictions; its path."""

    def write(name, predictions, protocol="gold", *, split="test", dialogues=data[2], export="e" * 64, **settings):
        path = str(tmp_path / f"{name}.jsonl")
        records.write(path, Header(protocol, export, dialogues, split, settings), predictions)
        return path

    return write


def told(folder):
    return json.loads((folder / "report.json").read_text())


def test_one_file_has_a_whole_report(data, write, tmp_path):
    predictions = made_up.run(data[3], 0.7)
    score.score_files(data[1], [("", write("gold", predictions, candidates=10))], tmp_path / "out")
    found = told(tmp_path / "out")
    assert found["about"]["gold"] == f"protocol gold, export {'e' * 12}, candidates 10"
    assert {"bleu_en", "bleu_zh", "dialogues"} <= {*found["about"]} and not found["comparisons"]
    answers = {(p.dialogue, p.turn): p for p in predictions}
    right = [
        (answer := answers.get((dialogue.id, place))) is not None and answer.video == turn.video_id
        for dialogue in data[3]
        for place, turn in enumerate(dialogue.turns)
        if turn.intent == Intent.VIDEO
    ]
    overall = found["protocols"]["gold"]["overall"]
    assert overall["video_accuracy"]["value"] == pytest.approx(np.mean(right)) and overall["video_accuracy"][
        "n"
    ] == len(right)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.json", "report.md", *plots.NAMES} - {
        plots.COMPARISON
    }


def test_a_reports_figures_of_paper_are_of_what_the_published_test_set_keeps(data, write, tmp_path):
    predictions = made_up.run(data[3], 1.0, seed=5)
    score.score_files(data[1], [("", write("p", predictions, "paper"))], tmp_path / "out")
    found = told(tmp_path / "out")["protocols"]["paper"]
    turns = 0
    for dialogue in data[3]:  # of independent turns the first stage's hits, else all behind such a first one
        hits = [
            turn.intent == Intent.CHAT or turn.video_id in (turn.candidates[:1] if turn.span else turn.candidates)
            for turn in dialogue.turns
        ]
        asks = [hit for hit, turn in zip(hits, dialogue.turns, strict=True) if turn.intent != Intent.CHAT]
        kept = sum(hits) if dialogue.type == 7 else len(hits) * bool(asks and asks[0])
        turns += min(kept, 7) * bool(dialogue.type)
    assert found["overall"]["intent_accuracy"]["n"] == turns > 20
    assert found["problems"]["unknown"]["count"] > 0


def test_the_first_run_is_compared_with_each_other_one_by_its_protocol(data, write, corpus, tmp_path):
    ids = [video.id for video in corpus[1].videos]
    runs = {"a": made_up.run(data[3], 0.9), "b": made_up.run(data[3], 0.4, seed=2), "c": made_up.run(data[3], 0.9)}
    files = [(name, write(name, predictions, export=name)) for name, predictions in runs.items()]
    files.insert(1, ("", write("e2e", made_up.run(data[3], 0.5, corpus=ids), "e2e")))
    score.score_files(data[1], files, tmp_path / "out", corpus=corpus[0])
    found = told(tmp_path / "out")
    assert [*found["protocols"]] == ["a", "e2e", "b", "c"]
    assert [*found["comparisons"]] == ["a against b", "a against c"]
    compared = found["comparisons"]["a against b"]
    for metric in ("video_accuracy", "moment_miou", "intent_accuracy"):
        first, second = (found["protocols"][name]["overall"][metric] for name in "ab")
        assert compared[metric]["difference"] == pytest.approx(first["value"] - second["value"])
        assert compared[metric]["n"] == first["n"]
    assert compared["video_accuracy"]["low"] > 0 and compared["video_accuracy"]["p"] < 0.01
    assert all(
        cell["difference"] == cell["low"] == 0 and cell["p"] == 1
        for cell in found["comparisons"]["a against c"].values()
    )
    text = (tmp_path / "out" / "report.md").read_text()
    assert text.index("](comparison.png)") < text.index("### a against b") < text.index("### a against c")
    with Image.open(tmp_path / "out" / "comparison.png") as picture:
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for colour in plots.COLOURS[:2]:
        assert (colours == [int(colour[place : place + 2], 16) for place in (1, 3, 5)]).all(1).sum() > 400


def test_files_of_several_hosts_are_one_run(data, write, tmp_path):
    predictions = made_up.run(data[3], 0.7)
    score.score_files(data[1], [("", write("all", predictions))], tmp_path / "one")
    shares = [("", write(str(share), predictions[share::2])) for share in range(2)]
    score.score_files(data[1], shares, tmp_path / "two")
    assert told(tmp_path / "one") == told(tmp_path / "two")
    missing = sum(len(dialogue.turns) for dialogue in data[3]) - len(predictions)
    assert told(tmp_path / "two")["protocols"]["gold"]["problems"]["missing"]["count"] == missing


def test_what_is_wrong_with_predictions_is_in_the_report(data, write, tmp_path):
    dialogues = data[3]
    moment = next((d, n) for d in dialogues for n, turn in enumerate(d.turns) if turn.intent == Intent.MOMENT)
    searches = [(d, n) for d in dialogues for n, turn in enumerate(d.turns) if turn.intent == Intent.VIDEO]
    truth = moment[0].turns[moment[1]].video_id
    strange = [
        Prediction(moment[0].id, moment[1], Intent.MOMENT, video=truth, moments=(Moment(truth, math.nan, 2.0),)),
        Prediction(searches[0][0].id, searches[0][1], Intent.VIDEO, ("no/such",), 10, video="no/such"),
        Prediction(searches[1][0].id, searches[1][1], error="it stopped"),
        Prediction(searches[2][0].id, searches[2][1], Intent.VIDEO, rank=99, pool=10),
        Prediction("nobody", 0),
        Prediction(searches[0][0].id, 99),
        Prediction("nobody", 0),
    ]
    strange.insert(1, strange[0])
    score.score_files(data[1], [("", write("strange", strange))], tmp_path / "out")
    problems = told(tmp_path / "out")["protocols"]["gold"]["problems"]
    turns = sum(len(dialogue.turns) for dialogue in dialogues)
    assert {name: found["count"] for name, found in problems.items()} == {
        "repeated": 1, "unknown": 2, "missing": turns - 4, "failed": 1, "outside": 1, "spans": 1, "ranks": 1,
    }  # fmt: skip
    assert [*problems["spans"]["turns"]] == [f"{moment[0].id}#{moment[1]}"]


def test_signatures_are_of_all_languages_that_any_run_has(tmp_path):
    def talk(name, language):
        return Dialogue(name, "test", 1, (Turn("q", "an answer", Intent.CHAT, language),))

    runs = {
        "both": score.Run("gold", [talk("a", "en"), talk("b", "zh")], []),
        "english": score.Run("paper", [talk("a", "en")], []),
    }
    score.score(tmp_path, runs, None, {})
    assert {*told(tmp_path)["about"]} == {"bleu_en", "bleu_zh"}


def test_a_result_file_is_compared_with_our_own_run(data, write, tmp_path):
    """From a published result file to the report, beside predictions of our own."""
    samples, _ = published.convert(raw.read_rows(data[0]))
    published.write_predictions(str(tmp_path / "result.json"), samples, [each.turns[-1].answer for each in samples])
    exchange.exchange(data[0], data[1], str(tmp_path / "result.json"), str(tmp_path / "theirs.jsonl"))
    files = [("ours", write("p", made_up.run(data[3], 0.5), "paper")), ("theirs", str(tmp_path / "theirs.jsonl"))]
    score.score_files(data[1], files, tmp_path / "out")
    found = told(tmp_path / "out")
    assert [*found["comparisons"]] == ["ours against theirs"]
    assert found["about"]["theirs"].startswith("protocol paper, export ")
    assert found["protocols"]["theirs"]["overall"]["bleu_en"]["n"] > 0


def test_what_is_refused(data, write, corpus, tmp_path):
    dataset, good = data[1], made_up.run(data[3], 0.7)
    out = tmp_path / "out"

    def refused(message, *files, error=ValueError, **options):
        with pytest.raises(error, match=message):
            score.score_files(dataset, files, out, **options)
        assert not out.exists()

    refused("found predictions for train of the dialogues", ("", write("a", good, split="train")))
    refused(
        "a.jsonl: found predictions for test of the dialogues others, exp", ("", write("a", good, dialogues="others"))
    )
    refused("no split 'absent'", ("", write("a", good)), split="absent", error=DatasetNotFound)
    refused("found no file|No such file", ("", "absent"), error=FileNotFoundError)
    two = [("", write(name, good, export=name)) for name in "ab"]
    refused("b.jsonl: found another run than gold is, expected NAME=FILE with a name for each", *two)
    refused("e2e: found searches without candidates, expected --corpus", ("", write("a", good, "e2e")))
    held = corpus[1].digest
    assert not any(turn.intent == Intent.VIDEO and not turn.candidates for d in data[3] for turn in d.turns)
    score.score_files(dataset, [("", write("a", good, corpus=held))], tmp_path / "without", corpus=None)
    score.score_files(dataset, [("", write("a", good, corpus=held))], tmp_path / "with", corpus=corpus[0].parent)
    refused(
        "found another corpus than x was made with, expected other",
        ("x", write("a", good, corpus="other")),
        corpus=corpus[0],
    )
    refused("found no corpus.json", ("", write("a", good)), corpus=tmp_path, error=CorpusError)
    some = [(name, write(name, good, export=name, dialogues_at_most=most)) for name, most in (("a", 0), ("b", 5))]
    refused("b: found other dialogues than a has, expected the same by gold", *some)
    refused("dialogues_at_most: found -1, expected a whole number", ("", write("a", good, dialogues_at_most=-1)))


def test_a_run_of_the_first_dialogues_is_scored_over_those(data, write, tmp_path):
    five = data[3][:5]
    score.score_files(data[1], [("", write("a", made_up.run(five, 0.7), dialogues_at_most=5))], tmp_path / "out")
    found = told(tmp_path / "out")["protocols"]["gold"]["overall"]["intent_accuracy"]
    assert found["n"] == sum(len(dialogue.turns) for dialogue in five)


def test_the_command(data, write, tmp_path):
    files = ",".join(f"{name}={write(name, made_up.run(data[3][:6], 0.7), dialogues_at_most=6)}" for name in "ab")
    command = [sys.executable, "-m", "ivcr_jax.score", f"--dialogues={data[1]}", f"--out={tmp_path}/out"]
    done = subprocess.run([*command, f"--predictions={files}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "### a against b" in done.stdout and (tmp_path / "out" / "report.md").read_text() in done.stdout
    refused = subprocess.run([*command, "--predictions=absent"], capture_output=True, text=True)
    assert refused.returncode == 1 and "score: " in refused.stderr and "Traceback" not in refused.stderr
