"""The report against figures put together by hand, and what it cannot rank."""

import dataclasses
import json
import math

import pytest
from PIL import Image

from ivcr_jax.train import json_of
from launch import manifest, report
from launch.expand import Run
from launch.manifest import Entry
from tests.training.conftest import World

# name -> (rank of LoRA, learning rate, the last loss, the last recall)
RUNS = {
    "a": (8, 1e-3, 0.5, 0.30),
    "b": (8, 1e-2, 0.25, 0.20),
    "c": (32, 1e-3, 0.75, 0.40),
    "d": (32, 1e-2, math.nan, None),
}


@pytest.fixture
def held(tmp_path):
    """Runs with metrics files, each with an earlier line and half a last one; one failed, one has not begun."""
    values = json_of(World(tmp_path).config(checkpoint={"best": "rank_r1", "higher": True}))
    found = manifest.Manifest(tmp_path, str(tmp_path), {})
    for name, (rank, rate, loss, recall) in (RUNS | {"e": (8, 0.5, 0.1, 0.9), "f": (8, 0.7, 0, 0)}).items():
        own = values | {
            "model": values["model"] | {"lora": values["model"]["lora"] | {"rank": rank, "alpha": rank / 2}},
            "optim": values["optim"] | {"peak_lr": rate},
        }
        fields = {"model.lora.rank": rank, "model.lora.alpha": rank / 2, "optim.peak_lr": rate}
        entry = Entry.of(Run(name, "c.py", (), fields, own))
        status = {"e": "failed", "f": "pending"}.get(name, "done")
        error = "a line\ntrain: the last line" if name == "e" else ""
        found.entries[name] = dataclasses.replace(entry, status=status, error=error, attempts=3, exit_code=1)
        if name == "f":
            continue
        (tmp_path / name).mkdir()
        rows = [
            {"step": 3, "time": 1.0, "loss": 9.0, "validation/rank_r1": 0.0},
            {"step": 6, "time": 2.0, "loss": None if math.isnan(loss) else loss},
            {"step": 6, "time": 2.0, "validation/rank_r1": recall},
        ]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(lines + '{"step": 7, "lo')
    found.write()
    return found


@pytest.mark.parametrize(
    "metric, mode, order",
    [(None, None, "cabd"), ("validation/rank_r1", "min", "bacd"), ("loss", "min", "bacd"), ("loss", "max", "cabd")],
)
def test_the_best_is_first_and_what_is_no_number_last(held, metric, mode, order):
    found = report.ranked(held, metric, mode)
    assert "".join(entry.name for entry, _ in found.best) == order
    assert [entry.name for entry in found.rest] == ["e", "f"], "however good their figures look"
    assert (found.metric, found.mode) == (metric or "validation/rank_r1", mode or "max")


def test_the_table_and_the_picture(held, tmp_path):
    said = report.report(held, "loss", "min")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in said.splitlines() if line.startswith("|")]
    assert rows[0] == ["", "run", "status", "step", "loss", "model.lora.alpha", "model.lora.rank", "optim.peak_lr"]
    assert rows[2:] == [
        ["1", "b", "done", "6", "0.25", "4", "8", "0.01"],
        ["2", "a", "done", "6", "0.5", "4", "8", "0.001"],
        ["3", "c", "done", "6", "0.75", "16", "32", "0.001"],
        ["4", "d", "done", "6", "nan", "16", "32", "0.01"],
        ["", "e", "failed", "6", "", "4", "8", "0.5"],
        ["", "f", "pending", "0", "", "4", "8", "0.7"],
    ]
    assert "best (min of loss): b, 0.25" in said and "not compared: 1 failed, 1 pending" in said
    assert "e: 3 attempts, exit code 1: a line\ntrain: the last line" in said
    with Image.open(tmp_path / "report.png") as image:
        assert image.size[0] == 2 * image.size[1] or image.size[0] > image.size[1], (
            "two panels: alpha goes with the rank"
        )
    before = (tmp_path / "report.png").read_bytes()
    report.report(manifest.read(tmp_path), "loss", "min")
    assert (tmp_path / "report.png").read_bytes() == before, "the same figures give the same picture"


def test_what_cannot_be_ranked(held):
    with pytest.raises(ValueError, match="--metric=loss: found no --mode, expected max or min, whichever is better"):
        report.ranked(held, "loss")
    known = r"no run that is done has a number for 'lose'; they have loss, validation/rank_r1"
    with pytest.raises(ValueError, match=known):
        report.ranked(held, "lose", "min")
    for name in RUNS:
        held.entries[name] = dataclasses.replace(held.entries[name], status="running")
    with pytest.raises(ValueError, match="found no run that is done among 6, expected one to compare"):
        report.ranked(held)


def test_a_run_that_a_scheduler_has_is_done_when_its_last_checkpoint_is_there(held, tmp_path):
    held.entries["e"] = dataclasses.replace(held.entries["e"], status="submitted", error="")
    assert held.seen("e").status == "submitted"
    last = tmp_path / "e" / "checkpoints" / str(held.entries["e"].values["steps"])
    (last.parent / f"{last.name}.orbax-checkpoint-tmp").mkdir(parents=True)
    assert held.seen("e").status == "submitted", "half of it"
    last.mkdir()
    assert held.seen("e").status == "done"
    assert report.ranked(held).best[0][0].name == "e"
