"""Sweeps of the smallest runs there are: of the world of tests/training the first stage alone, on one device."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from configs.retriever import CONTRASTIVE
from ivcr_jax.config import to_dict
from ivcr_jax.sharding import MeshConfig
from launch import manifest
from tests.training.conftest import ROOT, world  # noqa: F401

STEPS = 12  # so many that one can be caught in the middle of them


@pytest.fixture(scope="session")
def file(world, tmp_path_factory):  # noqa: F811
    """A config of runs of a few seconds. Its sweep is what SWEEP holds: one JSON [argument, overrides] a run."""
    path = tmp_path_factory.mktemp("configs") / "small.py"
    config = world.config(
        losses=CONTRASTIVE,
        optim={"rules": ((r".*\.vit\.(?!head).*", 0.0), (".*", 1.0))},
        mesh=MeshConfig(),
        data={"batch_size": 2},
        checkpoint={"every": 1},
        steps=STEPS,
    )
    path.write_text(
        "import json\nimport os\n\nfrom ml_collections import ConfigDict\n\n\n"
        f"def get_config(arg=''):\n    values = {to_dict(config)!r}\n"
        "    if arg:\n        values['seed'] = int(arg)\n"
        "    return ConfigDict(values)\n\n\n"
        "def sweep(add):\n    for own, overrides in json.loads(os.environ['SWEEP']):\n        add(own, **overrides)\n"
    )
    return path


class Command:
    """`python -m launch.sweep` on a folder. Attributes: file: of the config. out: the sweep's folder."""

    def __init__(self, file: pathlib.Path, out: pathlib.Path) -> None:
        self.file, self.out = file, out
        self._started, self._logs = [], []

    def start(self, runs, *more):
        """Starts it. `runs` are the sweep's."""
        self._logs.append(self.out.with_name(f"said{len(self._logs)}.txt"))
        with self._logs[-1].open("w") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "launch.sweep", f"--config={self.file}", f"--out={self.out}", *more],
                cwd=ROOT,
                env=os.environ | {"SWEEP": json.dumps(runs), "XLA_FLAGS": one_device(), "TF_CPP_MIN_LOG_LEVEL": "3"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._started.append(process)
        return process

    def said(self, process):
        """What one that was started has said so far."""
        return self._logs[self._started.index(process)].read_text()

    def finish(self, process, *statuses):
        """What it says until it ends, with one of these statuses."""
        process.wait(timeout=400)
        said = self.said(process)
        assert process.returncode in statuses and "Traceback" not in said, (process.returncode, said[-4000:])
        return said

    def __call__(self, runs, *more, status=0):
        """What it says until it ends, with this status."""
        return self.finish(self.start(runs, *more), status)

    def until(self, condition, process):
        """Waits for something while one goes on."""
        last = time.monotonic() + 300
        while not condition():
            assert process.poll() is None, self.said(process)[-4000:]
            assert time.monotonic() < last, "it never came to that"
            time.sleep(0.02)

    def entries(self):
        """The manifest's, by name."""
        return {each["name"]: each for each in json.loads((self.out / "sweep.json").read_text())["runs"]}

    def pid(self, name):
        """Of a run that is going."""
        return int((self.out / name / "lock").read_text())

    def end(self):
        """Kills what a test that failed has left going."""
        for process in self._started:
            process.kill()
            process.wait()
        for path in self.out.glob("*/lock"):
            lock = manifest.take(path)
            if lock is not None:
                lock.close()
            elif path.read_text():
                kill(int(path.read_text()))


@pytest.fixture
def sweep(file, tmp_path):
    command = Command(file, tmp_path / "out")
    yield command
    command.end()


def one_device():
    return os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")


def kill(pid, number=signal.SIGKILL):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
