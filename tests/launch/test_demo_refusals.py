"""What a user sees where the demo cannot go on: one sentence that says what to do, each time really brought about."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import venv

import pytest

from launch import demo
from tests.data.video_fixtures import write_video
from tests.launch.test_demo import TINY

ROOT = pathlib.Path(__file__).parents[2]
IN_SMALL = f"from launch import demo; small = demo.{TINY}; demo.NEEDED = 0; demo.Size = lambda: small"
SCRIPT = f"{IN_SMALL}; demo._define_flags(); demo.app.run(demo.main)"


def begin(command, folder=ROOT, **more):
    """Begins a command as a user does, not as a part of the `make test` that may run this; `more` is environment."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")} | more
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def refused(command, status=1, folder=ROOT, **environment):
    """The last line that a command says, make's own not counted; it ends with this status and no traceback."""
    process = begin(command, folder, **environment)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == status and "Traceback" not in said, said
    return [line for line in said.splitlines() if not line.startswith("make: *** ")][-1]


@pytest.fixture
def clone(tmp_path):
    """What installing reads of the project, as somebody has it who has just got it."""
    clone = tmp_path / "clone"
    clone.mkdir()
    for name in ("Makefile", "setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, clone)
    return clone


@pytest.fixture
def bare(tmp_path):
    """A Python in which nothing is installed."""
    venv.create(tmp_path / "bare", symlinks=True)
    return tmp_path / "bare" / "bin" / "python"


def old(folder):
    """A stand-in for an old Python: this one, which takes itself for 3.8 and knows no newer syntax in what is asked."""
    path = folder / "python3.8"
    path.write_text(f'#!/bin/sh\nshift\nexec {sys.executable} -c "import sys; sys.version_info = (3, 8, 18); $1"\n')
    path.chmod(0o755)
    return path


@pytest.mark.slow  # makes a .venv
def test_without_a_network(clone):
    """pip may ask a port where nobody answers, and nothing else."""
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull}
    nowhere |= dict.fromkeys(("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"), "")
    said = refused(["make", "demo", f"PYTHON={sys.executable}"], 2, clone, **nowhere)
    assert said == (
        "make: installing failed; it needs a network and 3 GB of disk (the tests 6): see to them, and give the same "
        "command again"
    )
    assert not (clone / ".venv" / "light").exists(), "the same command installs again"


def test_without_anything_installed(bare):
    said = refused([bare, "-m", "launch.demo"])
    assert said.startswith(
        f"demo: {bare} (Python {sys.version.split()[0]}) has no absl; install with Python 3.11 to 3.13"
    )
    assert "pip install -e '.[eval]'" in said


@pytest.mark.parametrize("target", ["demo", "test"])
def test_with_an_old_python(clone, tmp_path, target):
    said = refused(["make", target, f"PYTHON={old(tmp_path)}"], 2, clone)
    assert said == "make: expected Python 3.11 to 3.13; name one that is there: make PYTHON=python3.11"
    assert refused(["make", target, f"PYTHON={tmp_path}/none"], 2, clone) == said
    assert not (clone / ".venv").exists()


def test_installed_by_an_old_python(clone):
    version = "sys.version_info, sys.version = (3, 8, 18), '3.8.18'"
    code = f"import runpy, sys, setuptools; {version}; runpy.run_path('setup.py')"
    said = refused([sys.executable, "-c", code], folder=clone)
    assert said == "found Python 3.8.18, expected 3.11 to 3.13: install with one of these"


def installed(folder):
    """A .venv that make takes for installed: this Python."""
    (folder / "bin").mkdir(parents=True)
    for name, text in (("python", f'#!/bin/sh\nexec {sys.executable} "$@"\n'), ("pip", "#!/bin/sh\nexit 1\n")):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "light").touch()
    return folder


def test_over_a_folder_in_which_nothing_can_be_read(tmp_path):
    videos = tmp_path / "my videos"
    videos.mkdir()
    (videos / "a.mp4").write_text("not a video")
    (videos / "b.MOV").touch()
    for name in ("Makefile", "setup.py", "configs", "ivcr_jax", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = ["make", "demo", f"VENV={installed(tmp_path / 'venv')}", f"VIDEOS={videos}"]
    assert refused(command, 2, tmp_path) == (
        f"demo: {videos}: found no video that can be read among 2 (a.mp4, b.MOV: 11 bytes of which libav says "
        "'Invalid data found when processing input', expected a video); give a folder of others"
    )
    assert not any((tmp_path / "build" / "demo-own").iterdir()), "another folder may be given next"


def test_of_a_folder_what_can_be_read_is_taken(tmp_path, capsys):
    for number in range(5):
        (tmp_path / f"{number}.mp4").write_text("not a video")
    write_video(tmp_path / "whole.mp4", count=4)
    demo._probe(tmp_path)
    assert capsys.readouterr().out == (
        f"{tmp_path}: 5 of 6 videos cannot be read and are left out: 0.mp4, 1.mp4, 2.mp4 and 2 more\n"
    )


def on_a_disk_of(size, out, script):
    """A command that runs a script with OUT on a small file system of its own."""
    out.mkdir()
    mount = f'mount -t tmpfs -o size={size} none "$0" && exec "$@"'
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount, out, "true"], capture_output=True).returncode:
        pytest.skip("mounting needs a privilege that is lacking here")
    return ["unshare", "-rm", "sh", "-c", mount, out, sys.executable, "-c", script, f"--out={out}"]


def test_on_a_disk_that_is_too_small(tmp_path):
    script = "from launch import demo; demo._define_flags(); demo.app.run(demo.main)"
    said = refused(on_a_disk_of("3m", tmp_path / "out", script))
    assert said == f"demo: {tmp_path / 'out'}: found 0.0 GiB of free disk, expected 2; free some"


@pytest.mark.parametrize("size", ["200k", "2100k"])  # in the first stage, and in a later one
def test_on_a_disk_that_runs_full(tmp_path, size):
    said = refused(on_a_disk_of(size, tmp_path / "out", SCRIPT))
    assert said.endswith(
        f"failed, as the disk is full; free 0 GiB where {tmp_path / 'out'} lies, and the same command goes on from here"
    )
    assert said.startswith("demo: drawing") == (size == "200k"), said


def test_stopped_while_it_installs(clone, tmp_path):
    """Ctrl-C goes to all processes at the terminal; what is begun is not taken for done."""
    slow = tmp_path / "python"
    slow.write_text('#!/bin/sh\ncase "$2" in venv) touch begun; sleep 60;; esac\n')
    slow.chmod(0o755)
    process = begin(["make", "demo", f"PYTHON={slow}"], clone)
    while not (clone / "begun").exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=20)
    assert process.returncode and said.splitlines()[-2] == "make: stopped; the same command goes on from here"
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize("work", [["timeit", "-n1", "-r1", "-s", "import time", "time.sleep(60)"], "a function"])
def test_stopped_in_a_stage(tmp_path, work):
    """One that is a command, and one that is a function; Ctrl-C at the terminal."""
    script = f"""
import pathlib, sys, time
from launch import demo

def wait():
    time.sleep(60)

work = {work!r} if {isinstance(work, list)} else wait
demo.check = lambda *_: None
demo.stages = lambda *_: [demo.Stage("one", "counting", lambda: None), demo.Stage("two", "waiting", work)]
demo._define_flags()
demo.app.run(demo.main)
"""
    process = begin([sys.executable, "-c", script, f"--out={tmp_path}"])
    while "waiting" not in (line := process.stdout.readline()):
        assert line, "it ended"
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 130 and said.splitlines()[-1] == "demo: stopped; the same command goes on from here"
    assert (tmp_path / "log" / "one.done").exists() and not (tmp_path / "log" / "two.done").exists()
    assert [*json.loads((tmp_path / "times.json").read_text())] == ["one", "two"]
