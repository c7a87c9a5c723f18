"""The README's commands, run as written, in an empty folder."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_the_sample_commands_work_one_after_the_other(tmp_path):
    commands = re.findall(r"^\.venv/bin/python (-m .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command.split()],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert '"wasted":' in done.stdout and "turn 0: state" in done.stdout


def test_make_sample_runs_the_same_commands():
    commands = re.findall(r"^\.venv/bin/python (-m .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert re.findall(r"^\t\$\(BIN\)/python (-m .*data/.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE) == commands
