"""Whole sweeps of real runs: killed, interrupted, damaged; all go on, and none is started twice."""

import json
import os
import re
import shutil
import signal
import subprocess

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from launch import manifest
from tests.launch.sweeps.conftest import STEPS, kill, one_device
from tests.training.conftest import ROOT, lines, steps_of, told

pytestmark = pytest.mark.slow
RATES = (0.003, 0.02, 0.005)
SIX = [*([None, {"optim.peak_lr": rate}] for rate in RATES), [None, {}], ["1", {}], [None, {"mesh.data": 3}]]
KILLED, BAD = "optim.peak_lr=0.003", "mesh.data=3"


def state(workdir, step=STEPS):
    """The state of a run's checkpoint, as NumPy arrays."""
    path = workdir / "checkpoints" / str(step) / "state"
    return jax.tree.map(np.asarray, ocp.PyTreeCheckpointer().restore(path))


def undisturbed(entry, workdir):
    """Trains by the command that a sweep had for a run, in a workdir of its own."""
    command = [f"--workdir={workdir}" if arg.startswith("--workdir=") else arg for arg in entry["command"]]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"XLA_FLAGS": one_device()}, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]


def attempts(sweep, name):
    """How often a run was really started."""
    return (sweep.out / name / "stderr.txt").read_text().count("--- attempt ")


def test_of_six_runs_one_is_killed_and_one_is_bad(sweep, tmp_path):
    """Of the bad value nothing is known before a run looks at its devices."""
    process = sweep.start(SIX, "--max_parallel=2", "--retries=1")
    workdir = sweep.out / KILLED
    sweep.until(lambda: len(steps_of(workdir)) >= 2, process)
    kill(sweep.pid(KILLED))
    busy = len([name for name in sweep.entries() if sweep.entries()[name]["status"] == "running"])
    said = sweep.finish(process, 1)
    assert 1 <= busy <= 2
    assert f"{KILLED}: failed: killed by SIGKILL" in said and "5 done" in said and "1 failed" in said

    entries = sweep.entries()
    good = [name for name in entries if name != BAD]
    assert {entries[name]["status"] for name in good} == {"done"} and len(good) == 5
    assert {name: entries[name]["attempts"] for name in entries} == {name: 1 for name in good} | {KILLED: 2, BAD: 2}
    assert all(attempts(sweep, name) == entries[name]["attempts"] for name in entries)
    assert all(entry["revision"] == entries["base"]["revision"] for entry in entries.values())
    bad = entries[BAD]
    assert (bad["status"], bad["exit_code"], bad["failures"], bad["step"]) == ("failed", 1, 2, 0)
    assert "train: a mesh of {'data': 3, 'fsdp': -1, 'tensor': 1} for 1 devices" in bad["error"]

    # The killed one resumed, and ends with the very bits of one that nothing disturbed.
    assert f"of {STEPS}: resumed from {workdir}" in (workdir / "stdout.txt").read_text()
    undisturbed(entries[KILLED], tmp_path / "alone")
    assert told(workdir) == told(tmp_path / "alone")
    jax.tree.map(np.testing.assert_array_equal, state(workdir), state(tmp_path / "alone"))
    other = jax.tree.leaves(state(sweep.out / "base"))
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state(workdir)), other, strict=True))

    # The report ranks the others, by what their own metrics files say.
    said = sweep([], "--report", "--metric=loss", "--mode=min")
    ranks = re.findall(r"^\| (\d+) +\| (\S+) +\| done +\| 12 +\| (\S+)", said, re.MULTILINE)
    truth = {name: lines(sweep.out / name)[-1]["loss"] for name in good}
    assert [name for _, name, _ in ranks] == sorted(truth, key=truth.__getitem__)
    assert [place for place, _, _ in ranks] == list("12345")
    assert all(float(value) == pytest.approx(truth[name], rel=1e-4) for _, name, value in ranks)
    assert f"best (min of loss): {ranks[0][1]}" in said and "not compared: 1 failed" in said
    assert f"{BAD}: 2 attempts, exit code 1: " in said and "train: a mesh of" in said
    assert (sweep.out / "report.png").stat().st_size > 5_000

    # Nothing is left to do but what failed for good; asked again, that too.
    before = {name: attempts(sweep, name) for name in entries}
    sweep(SIX, "--max_parallel=2", "--retries=1", status=1)
    assert {name: attempts(sweep, name) for name in entries} == before
    sweep(SIX, "--retries=0", "--again", f"--select={BAD}", status=1)
    assert {name: attempts(sweep, name) for name in entries} == before | {BAD: 3}

    # The manifest is damaged: a sentence. Moved away, the runs' own folders tell what is done.
    path = sweep.out / "sweep.json"
    path.write_text(path.read_text()[:-200])
    said = sweep(SIX, status=1)
    assert f"sweep: {path}: found what is no JSON; was it cut off, or edited? Move it away" in said
    path.unlink()
    said = sweep(SIX, f"--select=[!{BAD[0]}]*")
    assert "5 done" in said and {name: attempts(sweep, name) for name in entries} == before | {BAD: 3}


def test_interrupted_at_any_time_the_same_command_goes_on(sweep, tmp_path):
    """At its start, when a run was just started, when one has steps and checkpoints, and by all signals there are."""
    runs, names = [[None, {}], [None, {"optim.peak_lr": 0.02}]], ["base", "optim.peak_lr=0.02"]
    # So many that the runs outlast the start of the sweep that waits for them.
    steps, flags = 30, ("--max_parallel=2", "--config.steps=30")

    def begun():
        return sum("parameters trained" in path.read_text() for path in sweep.out.glob("*/stdout.txt"))

    def saved():
        return sum(len(steps_of(sweep.out / name)) for name in names)

    moments = (
        (signal.SIGINT, lambda said: sweep.out.exists()),
        (signal.SIGTERM, lambda said: "started" in said),
        (signal.SIGKILL, lambda said: "started" in said and begun()),
        (signal.SIGINT, lambda said: said and saved()),
        (signal.SIGTERM, lambda said: ": done" in said),
    )
    for number, condition in moments:
        process = sweep.start(runs, *flags)
        sweep.until(lambda: process.poll() is not None or condition(sweep.said(process)), process)  # noqa: B023
        if process.poll() is not None:  # on a fast machine the runs of the one that was killed are done before
            sweep.finish(process, 0)
            break
        process.send_signal(number)
        if number == signal.SIGKILL:
            sweep.finish(process, -number)
            continue  # its runs go on by themselves
        said = sweep.finish(process, 128 + number)
        assert "stopped; the same command goes on" in said
        for entry in sweep.entries().values():
            assert entry["status"] in ("pending", "stopped", "done") and entry["failures"] == 0
    sweep(runs, *flags)
    entries = sweep.entries()
    assert all(
        entry["status"] == "done" and entry["attempts"] == attempts(sweep, name) for name, entry in entries.items()
    )
    assert [*entries] == names
    for name, entry in entries.items():
        undisturbed(entry, tmp_path / name)
        assert told(sweep.out / name) == told(tmp_path / name)
        jax.tree.map(np.testing.assert_array_equal, state(sweep.out / name, steps), state(tmp_path / name, steps))
        shutil.rmtree(tmp_path / name)


def test_runs_of_a_sweep_that_was_killed_are_waited_for(sweep):
    runs = [[None, {}], ["1", {}]]
    process = sweep.start(runs, "--config.steps=400")
    sweep.until(lambda: len(lines(sweep.out / "base")) >= 2, process)
    pid = sweep.pid("base")
    process.kill()
    sweep.finish(process, -signal.SIGKILL)
    os.kill(pid, 0)  # it goes on
    second = sweep.start(runs, "--config.steps=400")
    sweep.until(lambda: f"base: a process of before still goes, {pid}; waiting for it" in sweep.said(second), second)
    third = sweep(runs, "--config.steps=400", status=1)
    assert f"sweep: {sweep.out}: another sweep works on it; expected to be the only one" in third
    second.send_signal(signal.SIGINT)
    sweep.finish(second, 130)
    lock = manifest.take(sweep.out / "base" / "lock")
    assert lock is not None, "its process is gone"
    lock.close()
    assert sweep.entries()["base"]["status"] == "stopped" and attempts(sweep, "base") == 1
    assert len(told(sweep.out / "base")) == steps_of(sweep.out / "base")[-1] < 400


def test_a_run_that_another_told_to_stop_goes_on(sweep):
    """As a machine that is taken away does."""
    process = sweep.start([[None, {}]], "--config.steps=30", "--retries=1")
    sweep.until(lambda: steps_of(sweep.out / "base"), process)
    os.kill(sweep.pid("base"), signal.SIGTERM)
    said = sweep.finish(process, 0)
    assert "base: failed: told to stop by another, or not seen from here: no checkpoint of step 30" in said
    entry = json.loads((sweep.out / "sweep.json").read_text())["runs"][0]
    assert (entry["status"], entry["attempts"], entry["failures"], entry["error"]) == ("done", 2, 1, "")
    assert len(told(sweep.out / "base")) == 30
