"""The manifest: what is in it is what was written, or a sentence; and the locks."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from launch import manifest
from launch.expand import Run
from launch.manifest import Entry, Manifest

VALUES = {"steps": 6, "seed": 0, "optim": {"peak_lr": 0.1, "rules": [[".*", 1.0]]}}
RUNS = [
    Run("base", "c.py", ("--config=c.py",), {}, VALUES),
    Run("seed=1", "c.py", (), {"seed": 1}, VALUES | {"seed": 1}),
]


@pytest.fixture
def written(tmp_path):
    held = manifest.merged(tmp_path, str(tmp_path), RUNS)
    held.put(dataclasses.replace(held.entries["base"], status="failed", exit_code=-9, metrics={"loss": 0.1, "a": None}))
    return held


def test_what_was_written_is_read(written, tmp_path):
    again = manifest.read(tmp_path)
    assert again.entries["seed=1"] == Entry.of(RUNS[1]) and again.workdir("base") == f"{tmp_path}/base"
    base = again.entries["base"]
    assert (base.status, base.exit_code, base.metrics) == ("failed", -9, {"loss": 0.1, "a": None})
    elsewhere = Manifest(tmp_path, "gs://bucket/x", again.entries)
    elsewhere.write()
    assert manifest.read(tmp_path).workdir("base") == "gs://bucket/x/base"


def test_a_folder_that_is_moved_takes_its_workdirs_with_it(written, tmp_path):
    moved = tmp_path.parent / f"{tmp_path.name}-moved"
    tmp_path.rename(moved)
    assert manifest.read(moved).workdir("base") == f"{moved}/base"
    moved.rename(tmp_path)


def test_cut_off_anywhere_or_edited_it_says_so(written, tmp_path):
    path = tmp_path / "sweep.json"
    whole = path.read_text()
    for size in range(0, len(whole) - 2, 37):
        path.write_text(whole[:size])
        with pytest.raises(ValueError, match="found what is no JSON; was it cut off, or edited") as told:
            manifest.read(tmp_path)
        assert "Move it away and start the sweep again: runs go on" in str(told.value) and "\n" not in str(told.value)
    for before, after in (
        ('"failed"', '"done"'),
        ('"seed=1"', '"seed=2"'),
        ("0.1", "0.2"),
        ('"attempts": 0', '"a": 0'),
    ):
        assert before in whole
        path.write_text(whole.replace(before, after))
        with pytest.raises(ValueError, match="found other contents than were written; was it edited"):
            manifest.read(tmp_path)
    for other in ("[]", '{"sweep": 2}', "3"):
        path.write_text(other)
        with pytest.raises(ValueError, match="found another file, expected a sweep's manifest of version 1"):
            manifest.read(tmp_path)
    path.write_text(json.dumps(json.loads(whole)))  # the same, written otherwise
    assert manifest.read(tmp_path).entries["base"].status == "failed"


def test_a_folder_goes_on_with_the_configuration_it_was_begun_with(written, tmp_path):
    changed = VALUES | {"steps": 8, "optim": {"peak_lr": 0.2, "rules": [[".*", 1.0]]}}
    sentence = "base was begun with optim.peak_lr 0.1 and not 0.2, steps 6 and not 8; expected the same, or a new --out"
    with pytest.raises(ValueError, match=sentence):
        manifest.merged(tmp_path, str(tmp_path), [dataclasses.replace(RUNS[0], values=changed)])
    with pytest.raises(ValueError, match="--workdirs: this sweep's runs are in .*, expected that and not gs://b"):
        manifest.merged(tmp_path, "gs://b", RUNS)
    # More runs, and fewer: none is forgotten.
    third = Run("seed=2", "c.py", (), {"seed": 2}, VALUES | {"seed": 2})
    assert [*manifest.merged(tmp_path, str(tmp_path), [third]).entries] == ["base", "seed=1", "seed=2"]
    # Where the manifest was lost, the workdirs tell.
    (tmp_path / "sweep.json").unlink()
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "train.json").write_text(json.dumps(VALUES))
    anew = manifest.merged(tmp_path, str(tmp_path), RUNS)
    manifest.check_begun(anew, RUNS)
    with pytest.raises(ValueError, match=sentence):
        manifest.check_begun(anew, [dataclasses.replace(RUNS[0], values=changed)])


def test_two_sweeps_do_not_work_on_one_folder(tmp_path):
    with (
        manifest.locked(tmp_path),
        pytest.raises(ValueError, match="another sweep works on it; expected to be the only one"),
        manifest.locked(tmp_path),
    ):
        pass
    with manifest.locked(tmp_path):
        pass


def test_a_lock_outlives_its_taker_in_a_process_that_inherited_it(tmp_path):
    path = tmp_path / "run" / "lock"
    lock = manifest.take(path)
    wait = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.fd])
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lock.note(123456)
    lock.note(wait.pid)
    lock.close()
    assert manifest.take(path) is None and int(path.read_text()) == wait.pid
    wait.communicate(b"\n")
    free = manifest.take(path)
    assert free is not None
    assert not os.get_inheritable(free.fd)
    free.close()
    other.communicate(b"\n")
