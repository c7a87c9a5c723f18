"""The best run of a real sweep: exported, indexed with, evaluated; and what is refused before any of it."""

import json
import os
import subprocess
import sys

import pytest

from ivcr_jax import bundle
from tests.data import sources
from tests.data.video_fixtures import write_video
from tests.launch.sweeps.conftest import one_device
from tests.training.conftest import ROOT, lines

pytestmark = pytest.mark.slow


def export_best(sweep, *more, status=0):
    done = subprocess.run(
        [sys.executable, "-m", "launch.export_best", f"--out={sweep.out}", *more],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": one_device(), "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert done.returncode == status and "Traceback" not in done.stdout, done.stdout[-4000:]
    return done.stdout


def test_the_best_run_is_exported_and_evaluated(sweep, world, tmp_path):
    sweep([[None, {"optim.peak_lr": 0.02}], ["1", {}]], "--max_parallel=2", "--config.steps=2")
    losses = {name: lines(sweep.out / name)[-1]["loss"] for name in ("optim.peak_lr=0.02", "arg=1")}
    best = min(losses, key=losses.__getitem__)
    videos = tmp_path / "videos"
    for number in range(sources.VIDEOS):
        path = videos / f"{sources.name_of(number)}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, count=6)
    export, report = tmp_path / "export", tmp_path / "report"
    asked = [f"--export={export}", "--metric=loss", "--mode=min"]
    said = export_best(
        sweep, *asked, "--", f"--videos={videos}", f"--dialogues={world.folder / 'data'}", f"--out={report}",
        "--split=validation", "--dialogues_at_most=2", "--protocols=gold",
    )  # fmt: skip
    assert f"best of 2 runs (min of loss): {best}, {losses[best]:.5g}" in said
    card = json.loads((export / "card.json").read_text())
    assert card["run"]["step"] == 2 and card["run"]["seed"] == (1 if best == "arg=1" else 0)
    assert json.loads((report / "report.json").read_text())
    assert bundle.fingerprint(export)[:12] in (report / "report.md").read_text()

    # The same command again goes on with what is there; another run's export is not taken for this one's.
    assert f"{export}: exported before" in export_best(sweep, *asked)
    said = export_best(sweep, f"--export={export}", "--metric=loss", "--mode=max", status=1)
    assert f"export_best: --export: {export} is there, and not known to be of " in said
    said = export_best(sweep, f"--export={tmp_path / 'x'}", "--metric=lose", "--mode=max", status=1)
    assert "export_best: --metric: no run that is done has a number for 'lose'; they have " in said
    assert not (tmp_path / "x").exists()
