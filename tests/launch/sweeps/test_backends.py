"""Command lines of the backends, and what the command refuses of them before anything starts."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys

import pytest

from launch import manifest
from launch.backends import FOLDER, Backend, job_name

FLAGS = ("--config=configs/sweeps/tiny.py:both", "--config.init=a b", "--config.seed=1")
TRAIN = ["-m", "ivcr_jax.train", *FLAGS, "--workdir=gs://bucket/s/seed=1"]
JOB = job_name("gs://bucket/s/seed=1")


@pytest.mark.parametrize(
    "name, args, expected",
    [
        ("local", (), [sys.executable, *TRAIN]),
        ("slurm", ("--nodes=2",), [f"{FOLDER}/slurm.sh", f"--job_name={JOB}", "--nodes=2", "--", "python", *TRAIN]),
        (
            "tpu_vm",
            ("--name=mine", "--zone=z"),
            [f"{FOLDER}/run_tpu.sh", "--name=mine", "--zone=z", "--", "python", *TRAIN, "--distributed"],
        ),
        (
            "tpu_vm",
            ("--zone=z",),
            [f"{FOLDER}/queued_resource.sh", f"--name={JOB}", "--zone=z", "--", "python", *TRAIN, "--distributed"],
        ),
        (
            "gke",
            ("--image=i",),
            [sys.executable, "-m", "launch.gke", f"--name={JOB}", "--image=i", "--", "python", *TRAIN, "--distributed"],
        ),
    ],
)
def test_command_lines(name, args, expected):
    backend = Backend(name, args)
    assert backend.command(FLAGS, "gs://bucket/s/seed=1") == expected
    assert backend.at_once == (1 if "--name=mine" in args else None) and not backend.dry


def test_names_of_jobs_are_allowed_everywhere_and_differ():
    workdirs = [
        f"/out/{name}" for name in ("base", "optim.peak_lr=1e-05", "optim.peak_lr=1e-06", "x" * 200, "=", "A,b")
    ]
    names = [job_name(workdir) for workdir in [*workdirs, "/other/base"]]
    assert len({*names}) == len(names)
    for name in names:
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) and len(name) <= 40, name
    assert job_name("/out/base") == names[0]


ARGS = {
    "slurm": ("--nodes=2 --gpus_per_node=8", "sbatch"),
    "tpu_vm": ("--zone=z --project=p --accelerator=v5litepod-16 --runtime=r", "gcloud"),
    "gke": ("--image=i --accelerator=tpu-v5-lite-podslice --topology=4x4", "JobSet"),
}


@pytest.mark.parametrize("backend", ARGS)
def test_the_other_backends_print_what_they_would_run(sweep, backend):
    args, word = ARGS[backend]
    said = sweep(
        [[None, {"seed": 1}], [None, {"seed": 2}]], f"--backend={backend}", f"--backend_args={args} --dry_run",
        "--workdirs=gs://bucket/s",
    )  # fmt: skip
    assert word in said
    for seed in (1, 2):
        assert f"--config.seed={seed}" in said and job_name(f"gs://bucket/s/seed={seed}") in said
    assert not sweep.out.exists(), "nothing is written where nothing is run"


@pytest.mark.slow
def test_what_a_scheduler_has_is_not_submitted_twice(sweep, tmp_path, monkeypatch):
    """Of Slurm there is only its command, which notes what it was given."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(
        f"#!/bin/sh\n[ ! -e {tmp_path}/full ] || {{ echo no place >&2; exit 1; }}\ncat >>{tmp_path}/jobs\n"
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    runs, flags = (
        [[None, {"seed": 1}], [None, {"seed": 2}]],
        ("--backend=slurm", "--backend_args=--nodes=1 --gpus_per_node=0"),
    )

    def jobs():
        return re.findall("--config.seed=([12])", (tmp_path / "jobs").read_text())

    said = sweep(runs, *flags)
    assert "seed=1: submitted" in said and "2 submitted" in said and jobs() == ["1", "2"]
    sweep(runs, *flags)
    assert jobs() == ["1", "2"]
    sweep(runs, *flags, "--again", "--select=seed=2")
    assert jobs() == ["1", "2", "2"]
    (tmp_path / "full").touch()
    said = sweep(runs, *flags, "--again", "--select=seed=1", "--retries=1", status=1)
    assert said.count("seed=1: failed: no place") == 2 and "1 failed" in said and jobs() == ["1", "2", "2"]
    # A sweep that was killed while it submitted: whether Slurm has the job nobody knows.
    held = manifest.read(sweep.out)
    held.put(dataclasses.replace(held.entries["seed=1"], status="running"))
    assert "seed=1" not in sweep(runs, *flags) and sweep.entries()["seed=1"]["status"] == "submitted"


def test_a_dry_run_prints_the_very_commands(sweep):
    said = sweep([[None, {}], ["3", {"init": "it's a folder"}]], "--backend=dry_run", "--config.steps=4")
    lines = [shlex.split(line) for line in said.splitlines()]
    common = ["-m", "ivcr_jax.train"]
    assert lines[0] == [
        sys.executable, *common, f"--config={sweep.file}", "--config.steps=4", f"--workdir={sweep.out}/base"
    ]  # fmt: skip
    assert lines[1][:6] == [
        sys.executable, *common, f"--config={sweep.file}:3", "--config.steps=4", "--config.init=it's a folder"
    ]  # fmt: skip
    assert len(lines) == 2 and not sweep.out.exists()


def test_the_command_says_in_a_line_what_is_wrong(sweep):
    runs = [[None, {}], [None, {"seed": 1}]]
    cases = {
        ("--config.nix=1",): "sweep: --config.nix=1: the configuration has no 'nix'",
        ("--select=nix*",): "sweep: --select=nix* fits no run; the runs are base, seed=1",
        (
            "--backend=tpu_vm",
            "--backend_args=--name=a",
            "--max_parallel=2",
        ): "on the one TPU VM that is named; expected 1",
        ("more",): "unknown argument 'more'; options are written --name=value",
        ("--out=gs://bucket/x",): "--out: found gs://bucket/x, expected a folder of this machine",
    }
    started = [sweep.start(runs, *flags) for flags in cases]
    for process, (flags, sentence) in zip(started, cases.items(), strict=True):
        said = sweep.finish(process, 1)
        assert sentence in said, (flags, said[-2000:])
    assert not sweep.out.exists()


def test_the_sweep_leaves_the_devices_to_its_runs():
    code = "import launch.sweep, launch.export_best\nfrom jax._src import xla_bridge\nassert not xla_bridge._backends"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=FOLDER.parent)
