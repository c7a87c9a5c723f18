"""The command that runs all benchmarks: its table, and that the table finds its figures in what they really print."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from ivcr_jax.data import synth
from tests.benchmarks import run
from tests.data.video_fixtures import write_video

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORDED = pathlib.Path(__file__).parent / "golden" / "benchmarks.json"


def made(benchmarks):
    return {
        "machine": {"processor": "Abacus", "cores": 2, "memory_gb": 24.0, "system": "Linux-6"},
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "code": {"revision": "0123456789abcdef", "changed": False},
        "benchmarks": benchmarks,
    }


def test_the_table_says_what_held(monkeypatch):
    monkeypatch.setattr(
        run,
        "ROWS",
        (
            run.Row("dialogues, s", "data/dialogues/seconds", bar=("under", 360)),
            run.Row("at its bar", "data/edge", bar=("under", 360)),
            run.Row("at its other bar", "data/edge", bar=("at least", 360)),
            run.Row("reading", "data/reading/ratio", "a loop", ("at least", 5)),
            run.Row("converting, GB", "convert/peak_gb", bar=("under", "convert/bound_gb")),
            run.Row("its bar is lost", "data/edge", bar=("under", "data/nothing")),
            run.Row("search", "search/1/times as fast", "faiss"),
            run.Row("turn", "inference/turns", bar=("at most", 1.3)),
            run.Row("frames", "inference/frames", bar=("at most", 0)),
            run.Row("scoring", "metrics/seconds", bar=("under", 60)),
            run.Row("clips", "data/real", "PyAV", ("at least", 0.6)),
        ),
    )
    results = made(
        {
            "data": {"result": {"dialogues": {"seconds": 113.4}, "edge": 360, "reading": {"ratio": [4.96, 4.1, 18.1]}}},
            "convert": {"result": {"peak_gb": 3.2, "bound_gb": 4.6}},
            "search": {"result": {"1": {"times as fast": [1.834, 0.5, 2]}}},
            "inference": {"result": {"turns": [1.3, 1.2, 1.65], "frames": 0}},
            "metrics": {"exit": -9, "problem": "ended with -9", "stderr": ["reading", "no memory"]},
        }
    )
    assert run.table(results).splitlines() == [
        "Abacus, 2 cores, 24.0 GB, Linux-6; python 3.11.7, jax 0.10.2; revision 0123456789ab.",
        "",
        "| what | peer | bar | measured: median (smallest to largest) | |",
        "|---|---|---|---|---|",
        "| dialogues, s |  | under 360 | 113 | held |",
        "| at its bar |  | under 360 | 360 | **missed** |",
        "| at its other bar |  | at least 360 | 360 | held |",
        "| reading | a loop | at least 5 | 4.96 (4.1 to 18.1) | **missed** |",
        "| converting, GB |  | under 4.6 | 3.2 | held |",
        "| its bar is lost |  |  |  | not measured |",
        "| search | faiss |  | 1.83 (0.5 to 2) |  |",
        "| turn |  | at most 1.3 | 1.3 (1.2 to 1.65) | held |",
        "| frames |  | at most 0 | 0 | held |",
        "| scoring |  | under 60 |  | not measured |",
        "| clips | PyAV | at least 0.6 |  | not measured |",
        "",
        "metrics failed: ended with -9; the last it said: no memory",
    ]


def places(name):
    """Of the real table: where it looks in a benchmark's JSON."""
    found = [row.at for row in run.ROWS] + [row.bar[1] for row in run.ROWS if row.bar and isinstance(row.bar[1], str)]
    return [place for place in found if place.startswith(f"{name}/")]


def check(name, printed):
    """That all of them are there: numbers, or a median between the smallest and the largest."""
    assert places(name)
    for place in places(name):
        found = run.at(made({name: {"result": printed}}), place)
        assert found is not None, f"{place}: nothing there"
        median, low, high = found if isinstance(found, list) else [found] * 3
        assert low <= median <= high, place


def test_every_benchmark_has_rows_and_every_row_a_benchmark():
    assert sum(len(places(name)) for name in run.BENCHMARKS) == len(run.ROWS) + 1  # one bar is of the benchmark itself
    assert len({row.what for row in run.ROWS}) == len({row.at for row in run.ROWS}) == len(run.ROWS)


def test_the_table_finds_what_data_measures(tmp_path, monkeypatch):
    """All of it runs, over small sources in the place of large ones."""
    from tests.benchmarks import data

    synth.generate(tmp_path / "big", videos=300, interactions=1000, render=False)
    synth.generate(tmp_path / "long", videos=32, interactions=96, seconds=2.0, fps=4)
    (tmp_path / "real" / "clips").mkdir(parents=True)
    write_video(tmp_path / "real" / "clips" / "clip.mp4", count=20)
    monkeypatch.setattr(data, "REALDATA", tmp_path / "real")
    monkeypatch.setattr(data, "ROUNDS", 1)
    check("data", {name: getattr(data, f"bench_{name}")(tmp_path) for name in data.NAMES})


def test_the_table_finds_what_metrics_prints(tmp_path, monkeypatch):
    """The whole command, with few predictions."""
    monkeypatch.setattr(run, "BENCHMARKS", {"metrics": (*run.BENCHMARKS["metrics"], "--predictions=12")})
    found = run.measure("metrics", tmp_path, None)
    assert found["exit"] == 0 and found["result"]["predictions"] == 12
    check("metrics", found["result"])


def test_the_table_finds_what_search_measures():
    """Fewer vectors, under the names that it prints."""
    from tests.benchmarks import search

    check("search", {f"{size} x {width}": search.measure(300, 8, rounds=2) for size, width in search.SIZES})


def test_the_table_finds_the_ratios_of_the_scheme(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # which it adds to
    from tests.benchmarks import scheme

    taken = {name: np.array([1.0, 2.0, 4.0]) * (number + 1) for number, name in enumerate(scheme.VARIANTS)}
    taken["items"] = np.array([1.0, 1.0, 8.0])
    found = scheme.ratios(taken)
    check("scheme", found)
    assert found["over_peer"]["peer"] == [1, 1, 1] and found["over_peer"]["blocks"] == [5, 5, 5]
    assert found["over_peer"]["items"] == [1, 0.5, 2] and found["over_items"]["peer"] == [1, 0.5, 2]
    assert {name: what for name, what in scheme.VARIANTS.items() if name != "peer"} == run.SCHEME


@pytest.mark.parametrize("name", ["convert", "inference"])
def test_the_table_finds_what_was_recorded(name):
    """They take minutes at any size: what they printed once, with --layers=1 and --rounds=1."""
    check(name, json.loads(RECORDED.read_text())[name])


def test_the_table_finds_how_inference_names_what_it_compares():
    from tests.benchmarks import inference

    named = inference.compare(lambda: sum(range(20_000)), lambda: sum(range(20_000)), 3)
    for place in places("inference"):
        if "times as fast" in place:
            assert place.split("/")[-1] in named


def programs(monkeypatch, **texts):
    monkeypatch.setattr(run, "BENCHMARKS", {name: ("-c", text) for name, text in texts.items()})


GOOD = "print('a table first')\nprint('{\"figure\": 3}')"


def test_a_benchmark_that_fails_is_told_and_stops_no_other(tmp_path, monkeypatch, capsys):
    programs(
        monkeypatch,
        bad="import sys\nfor n in range(30):\n    print('line', n, file=sys.stderr)\nsys.exit(3)",
        mute="print('all well')",
        empty="",
        good=GOOD,
    )
    assert not run.run(tmp_path, list(run.BENCHMARKS))
    found = json.loads((tmp_path / "results.json").read_text())["benchmarks"]
    assert list(found) == ["bad", "mute", "empty", "good"]
    assert found["good"]["result"] == {"figure": 3} and found["good"]["exit"] == 0
    assert found["good"].keys() == {"seconds", "exit", "result"}
    assert found["bad"]["exit"] == 3 and found["bad"]["stderr"] == [f"line {number}" for number in range(10, 30)]
    assert found["mute"]["problem"] == found["empty"]["problem"] == "its last line is no JSON object"
    shown = (tmp_path / "table.md").read_text()
    assert capsys.readouterr().out == shown
    assert shown.endswith(
        "\nbad failed: ended with 3; the last it said: line 29\n"
        "\nmute failed: its last line is no JSON object; the last it said: nothing\n"
        "\nempty failed: its last line is no JSON object; the last it said: nothing\n"
    )


def test_the_command_fails_with_its_benchmark(tmp_path):
    """A real one, that lacks its peer."""
    (tmp_path / "faiss.py").write_text("raise ImportError('no faiss on this machine')\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])

    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.run", f"--out={tmp_path / 'out'}", "--only=search"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert "search failed: ended with 1; the last it said: ImportError: no faiss on this machine\n" in done.stdout


def test_an_unknown_benchmark_is_refused_before_any_runs(tmp_path):
    with pytest.raises(ValueError, match="only: found speed, expected some of data, convert, scheme, search, metrics"):
        run.run(tmp_path, ["search", "speed"])
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_killed_goes_on(tmp_path, monkeypatch):
    count = f"open({str(tmp_path / 'ran')!r}, 'a').write('{{}} ')\n"
    first, last = count.format("first") + GOOD, count.format("last") + GOOD
    kill = count.format("killer") + "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)"
    texts = {"first": ("-c", first), "killer": ("-c", kill), "last": ("-c", last)}
    out = tmp_path / "out"
    begun = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import pathlib; from tests.benchmarks import run\nrun.BENCHMARKS = {texts!r}\n"
            f"run.run(pathlib.Path({str(out)!r}), list(run.BENCHMARKS))",
        ],
        cwd=ROOT,
        timeout=300,
    )
    assert begun.returncode == -9 and (tmp_path / "ran").read_text() == "first killer "
    programs(monkeypatch, first=first, killer=count.format("failing") + "raise SystemExit(1)", last=last)
    assert not run.run(out, list(run.BENCHMARKS))
    assert (tmp_path / "ran").read_text() == "first killer failing last "
    programs(monkeypatch, first=first, killer=count.format("mended") + GOOD, last=last)
    assert run.run(out, list(run.BENCHMARKS))
    assert (tmp_path / "ran").read_text() == "first killer failing last mended "
    assert "failed" not in (out / "table.md").read_text()


def test_results_of_another_machine_or_file_are_refused(tmp_path, monkeypatch):
    programs(monkeypatch, good=GOOD)
    assert run.run(tmp_path, ["good"])
    path = tmp_path / "results.json"
    before = json.loads(path.read_text())
    path.write_text(json.dumps(before | {"machine": before["machine"] | {"cores": 9999}}))
    with pytest.raises(ValueError, match=r"was measured with machine .*9999.* and not .*; delete its folder, or give"):
        run.run(tmp_path, ["good"])
    for text, told in (("[1]", "found another file"), ("{", "found what is no JSON")):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"results.json: {told}, expected results of benchmarks"):
            run.run(tmp_path, ["good"])
        assert path.read_text() == text


def test_make_runs_this_command():
    assert "\nbenchmark: install\n\t$(BIN)/python -m tests.benchmarks.run\n" in (ROOT / "Makefile").read_text()
