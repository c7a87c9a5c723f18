"""Conversations as a person types them and as a program runs them. The weights are random: only the form is known."""

import io
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from ivcr_jax import chat, index
from ivcr_jax.infer import console as consoles
from ivcr_jax.infer import report, terminal
from ivcr_jax.infer.assistant import Assistant
from ivcr_jax.infer.console import Console
from ivcr_jax.infer.corpus import Corpus, CorpusError
from ivcr_jax.infer.session import Session
from tests.infer.conftest import IDS, write_export

ROOT = pathlib.Path(__file__).parents[2]
FIND, WHEN, ZH = "Find a video of a fish.", "When does it jump?", "找一个小狗的视频。"


@pytest.fixture(scope="module")
def assistant(export):
    return Assistant(export)


@pytest.fixture(scope="module")
def corpus(indexed):
    return Corpus.open(indexed)


@pytest.fixture
def begin(assistant, corpus, monkeypatch):
    """A new conversation, by name of its options."""
    monkeypatch.setenv("COLUMNS", "80")
    return lambda **options: Console(assistant, corpus, Session(assistant, corpus, candidates=3), **options)


def run(console, *lines):
    return chat.run_script(console, lines, "s.txt")


def table_of(output):
    """The last list that was printed: its lines behind the titles."""
    lines = output.splitlines()
    first = max(
        place for place, line in enumerate(lines) if re.search(r"no +title +source +length +score +cosine", line)
    )
    return lines[first + 1 : first + 4]


@pytest.mark.slow  # compiles most of the programs
def test_every_command(begin, tmp_path, capsys):
    console = begin(note="Of made-up videos.")
    saved, page = tmp_path / "my talk.json", tmp_path / "page.html"
    assert run(console, "# a comment", "", "/help", FIND, "/list")
    output = capsys.readouterr().out
    assert output.startswith("> /help\nA message asks") and "comment" not in output
    assert all(f"\n  /{name} " in output for name in consoles._COMMANDS)
    # The weights are random, and so are the characters that they write; no terminal may obey them.
    assert f"\n> {FIND}\n{terminal.printable(console.session.turns[0].text)}\n" in output
    ranking = console.session.turns[0].ranking
    shown = table_of(output)
    assert output.count("cosine") == 2 and len(ranking) == 3
    for line, ranked in zip(shown, ranking, strict=True):
        title = corpus_title(ranked.id)
        assert re.fullmatch(
            rf"{terminal.CURRENT if ranked.id == console.session.current else ' '} +{ranked.number}  {title} .*"
            rf" 0:0\d +{ranked.score:.2f} +{ranked.first:.3f}",
            line,
        )

    assert run(console, "/open 2")
    second = next(ranked.id for ranked in ranking if ranked.number == 2)
    video = Corpus.video(console._corpus, second)
    assert console.session.current == second
    assert re.search(rf"\n{video.path}  0:0\d  {video.width}x{video.height}  \d+ kB\n", capsys.readouterr().out)
    assert run(console, "/open 2") and capsys.readouterr().out.count(video.path) == 1  # though it was open

    assert run(console, WHEN, "/like", "/like 1 0 0:00.5", ZH)
    moment, turns = console.session.turns[3].moment, console.session.turns
    output = capsys.readouterr().out
    assert moment is not None and moment.video == second
    assert "\n".join(terminal.timeline(video.duration, moment.start, moment.end, 72)) in output
    assert [turn.ranking != () for turn in turns[4:]] == [True] * 3
    assert second not in [ranked.id for ranked in turns[4].ranking]  # what it is like is no answer

    assert run(console, f"/save {saved}", f"/report {page}", "/undo")
    assert f"Taken back: {ZH}" in capsys.readouterr().out and len(console.session.turns) == 6
    assert report.is_report(page) and page.read_text().count("<section") == 7
    assert '<p class="note">Of made-up videos.</p>' in page.read_text()
    assert run(console, f"/save {saved}", "/reset", f"/report {page}")  # ours, so they may be written again
    assert console.session.turns == [] and page.read_text().count("<section") == 0
    assert run(console, f"/load {saved}", "/quit", FIND)
    assert console.session.turns == turns[:6]
    assert f"{saved}: 6 turns" in capsys.readouterr().out


def corpus_title(name):
    return name.rpartition("/")[2].replace("_", " ")


def test_lines_that_are_refused_change_nothing(begin, tmp_path, capsys):
    mine = tmp_path / "mine.txt"
    mine.write_text("a thesis")
    (tmp_path / "list.json").write_text("[1]")
    lines = {
        "/nonsense": "found no command /nonsense, expected one of /help, /list",
        "/list": "found no list of videos yet",
        "/open 1": "found no list of videos yet",
        "/like": "/like: found no current video",
        "/undo": "found no turn to take back",
        f"/load {tmp_path / 'none.json'}": "none.json: found nothing, expected a saved conversation",
        f"/load {tmp_path}": "found a folder, expected a saved conversation",
        f"/load {mine}": "saved session: Expecting value",
        f"/save {mine}": "mine.txt: found another file, expected a saved conversation or nothing",
        f"/save {tmp_path / 'list.json'}": "list.json: found another file",
        f"/save {tmp_path}": "found a folder, expected a saved conversation or nothing",
        f"/report {mine}": "mine.txt: found another file, expected a report or nothing",
        "/save": "/save: found 0 arguments, expected /save FILE",
        "/quit now": "/quit: found 1 arguments, expected /quit",
        "/": "found no command /,",
    }
    console = begin()
    assert not run(console, *lines)
    errors = capsys.readouterr().err.splitlines()
    assert [error.partition(": line ")[0] for error in errors] == ["s.txt"] * len(lines)
    for number, (error, expected) in enumerate(zip(errors, lines.values(), strict=True), 1):
        assert error.startswith(f"s.txt: line {number}: ") and expected in error
    assert mine.read_text() == "a thesis" and console.session.turns == []

    lines = {
        "/open": "/open: found 0 arguments, expected /open N",
        "/open 4": "found no candidate '4', expected a number from 1 to 3",
        "/open one": "found no candidate 'one'",
        "/like 2 1": "/like: found 2 arguments, expected /like [N [START END]]",
        "/like 2 1 0:75": "found '0:75', expected a time in seconds or as m:ss",
        "/like 2 5 0:05": "/like: found 5 to 0:05, expected a start before its end",
        "/like 2 100 200": "no frame from 100.0 to 200.0 s",
    }
    assert not run(console, FIND, *lines)
    errors = capsys.readouterr().err.splitlines()
    assert all(expected in error for error, expected in zip(errors, lines.values(), strict=True))
    assert len(console.session.turns) == 1


def test_an_answer_that_is_stopped_has_not_been(begin, monkeypatch, capsys):
    console, other = begin(), begin()
    said, stopped = iter([FIND, ZH, WHEN]), []
    printable = terminal.printable

    def typed():
        line = next(said, None)
        if line is None:
            raise EOFError
        stopped.append(line == ZH)
        return line

    def stop(text):  # the first piece of the second answer
        if stopped[-1] and len(stopped) == 2:
            stopped.append(False)
            raise KeyboardInterrupt
        return printable(text)

    monkeypatch.setattr(terminal, "printable", stop)
    chat.converse(console, typed)
    assert "stopped; the conversation is as it was before" in capsys.readouterr().err
    assert stopped == [False, True, False, False] and [turn.message for turn in console.session.turns] == [FIND, WHEN]
    run(other, FIND, WHEN)
    assert console.session.turns == other.session.turns


def test_what_is_typed(begin, capsys):
    console = begin()
    for ending in (EOFError, KeyboardInterrupt):
        lines = iter(["/nonsense", "  ", "/reset"])

        def typed(lines=lines, ending=ending):
            for line in lines:
                return line
            raise ending

        chat.converse(console, typed)
        output = capsys.readouterr()
        assert output.out == "The conversation begins anew.\n\n" and output.err.startswith("found no command /nonsense")
    chat.converse(console, iter(["/quit"]).__next__)
    console.greet(4)
    console.greet(3)
    assert re.findall(r"^.* videos$", capsys.readouterr().out, re.MULTILINE) == ["4 videos", "3 of 4 videos"]


def test_a_script_can_be_interrupted(begin, monkeypatch):
    def stop(self, text, stream):
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "say", stop)
    with pytest.raises(KeyboardInterrupt):
        run(begin(), FIND)


def test_json_is_one_object_a_turn_and_nothing_else(begin, tmp_path, capsys):
    lines = [
        FIND,
        "/help",
        "/open 2",
        WHEN,
        "/list",
        "/like 1",
        "/nonsense",
        f"/save {tmp_path / 's.json'}",
        ZH,
        "/undo",
    ]
    outputs = []
    for _ in range(2):
        console = begin(as_json=True)
        assert not run(console, *lines)
        output = capsys.readouterr()
        assert output.err.count("\n") == 1 and "line 7" in output.err
        outputs.append([json.loads(line) for line in output.out.splitlines()])
    for objects in outputs:
        for turn in objects:
            assert {*turn.pop("timings")} <= {"search", "read", "rank", "write"}
    assert outputs[0] == outputs[1]
    first, opened, moment, like, last = outputs[0]
    assert [turn["intent"] for turn in outputs[0]] == ["VIDEO", "CHAT", "MOMENT", "VIDEO", "VIDEO"]
    assert first["message"] == FIND and (first["language"], last["language"]) == ("en", "zh")
    assert {*first["ranking"][0]} == {"id", "number", "score", "first"} and moment["moment"]["video"] == opened["video"]
    assert len(first["evidence"][0]) == 2 and {ranked["id"] for ranked in like["ranking"]} < {*IDS}


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("setting", "value", "coloured"), [("X", "", True), ("NO_COLOR", "1", False), ("TERM", "dumb", False)]
)
def test_colours_are_for_terminals(begin, monkeypatch, setting, value, coloured):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(setting, value)
    console = begin()
    for stream, expected in ((Terminal(), coloured), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stdout", stream)
        run(console, FIND)
        text = stream.getvalue()
        assert ("\x1b[" in text) == expected
        # What stood there until the first word has been wiped away.
        assert text.count("…\x1b[0m\r\x1b[K") == expected


def test_what_cannot_begin(export, indexed, corpus, tmp_path):
    def refused(kind, expected, export=export, corpus=indexed, **options):
        with pytest.raises(kind, match=expected):
            chat.begin(export, corpus, **options)

    refused(CorpusError, "found no corpus.json, expected a folder that python -m ivcr_jax.index wrote", corpus=tmp_path)
    refused(FileNotFoundError, "found no config.json", export=tmp_path)
    refused(ValueError, "source: found 'films', expected one of '', '2024', 'cooking'", source="films")
    refused(ValueError, "found no video of 60 to inf s, expected at least one", duration=(60, float("inf")))
    refused(ValueError, "candidates is 0; expected at least 1", candidates=0)
    empty = shutil.copytree(indexed, tmp_path / "empty")
    index.remove(empty, IDS)
    refused(CorpusError, "empty: found no videos, expected at least one", corpus=empty)
    other = write_export(tmp_path / "export", scale=2.0)
    refused(ValueError, "the corpus was made with the export .*expected the same", export=other)


def test_a_part_of_the_corpus(export, indexed, capsys):
    console, allowed = chat.begin(export, indexed, source="cooking", duration=(0.0, 0.5))
    assert allowed == 1 and run(console, FIND)
    assert [ranked.id for ranked in console.session.turns[0].ranking] == [IDS[0]]


def command(*arguments, **options):
    run = [sys.executable, "-m", "ivcr_jax.chat", *map(str, arguments)]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


@pytest.mark.slow
def test_the_command(export, indexed, tmp_path):
    script, page, cache = (tmp_path / name for name in ("s.txt", "page.html", "cache"))
    script.write_bytes(b"\xef\xbb\xbf# \xe9\r\n" + f"{FIND}\r\n/open 9\r\n{ZH}\r\n".encode())
    folders = f"--export={export}", f"--corpus={indexed}"
    done = command(*folders, f"--script={script}", "--json", f"--report={page}", f"--cache={cache}", "--candidates=2")
    assert done.returncode == 1, done.stderr
    turns = [json.loads(line) for line in done.stdout.splitlines()]
    assert [turn["message"] for turn in turns] == [FIND, ZH] and len(turns[0]["ranking"]) == 2
    assert done.stderr == f"{script}: line 3: found no candidate '9', expected a number from 1 to 2\n"
    assert page.read_text().count("<section") == 2 and list(cache.iterdir())

    done = command(*folders, f"--cache={cache}", input=f"{FIND}\n/quit\n{ZH}\n")  # a pipe: no greeting, no prompt
    assert (done.returncode, done.stderr) == (0, "") and ZH not in done.stdout and ">" not in done.stdout
    assert len(table_of(done.stdout)) == 3

    for wrong, said in (
        ([folders[0], f"--corpus={tmp_path}"], f"chat: {tmp_path}: found no corpus.json"),
        ([*folders, f"--script={tmp_path / 'none'}"], f"chat: {tmp_path / 'none'}: found nothing, expected a script"),
        ([*folders, f"--report={script}"], f"chat: {script}: found another file, expected a report or nothing"),
        ([*folders, "--top_p=0"], "chat: temperature 0.0, top_p 0.0: expected"),
    ):
        done = command(*wrong)
        assert (
            (done.returncode, done.stdout) == (1, "") and done.stderr.startswith(said) and done.stderr.count("\n") == 1
        )
