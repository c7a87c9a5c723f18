"""Runs that are killed, stopped, moved: all goes on as it would have, bit for bit where the mesh is the same."""

import resource
import shutil
import signal
import socket
import time

import numpy as np
import pytest

from ivcr_jax.sharding import MeshConfig
from tests.training.conftest import STEPS, at_step_four, finish, start, steps_of, told, wait_for

LOSSES = ("loss", "lm", "rank", "moment", "moment_l1", "moment_iou", "contrastive")


def near(found, expected, tolerance, names=(*LOSSES, "gradient_norm", "parameter_norm", "tokens", "frames")):
    """Other sums in another order: Adam, which divides by the gradient's size, makes more of it with every step."""
    for row, of in zip(found, expected, strict=True):
        for name in names:
            np.testing.assert_allclose(row[name], of[name], rtol=tolerance, err_msg=f"{name} of step {of['step']}")


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(world, undisturbed, tmp_path):
    workdir, config = tmp_path / "run", world.config()
    step = int(np.random.default_rng(5).integers(2, STEPS - 1))
    process = start(config, workdir)
    wait_for(process, workdir, step, saved=True)
    process.send_signal(signal.SIGKILL)
    finish(process, -signal.SIGKILL)
    # As a kill in the middle of writing would leave it.
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    said = finish(start(config, workdir))
    assert f"of {STEPS}: resumed from {workdir}" in said and f"step {STEPS}: done" in said
    assert told(workdir) == told(undisturbed)


@pytest.mark.slow
def test_a_run_told_to_stop_saves_and_goes_on_bit_for_bit(world, undisturbed, run, tmp_path, capsys):
    workdir = tmp_path / "run"
    process = start(world.config(checkpoint={"every": 100}), workdir)
    wait_for(process, workdir, 2)
    process.send_signal(signal.SIGTERM)
    begun = time.monotonic()
    said = finish(process)
    assert time.monotonic() - begun < 30  # what a machine that is taken away is given
    (step,) = steps_of(workdir)
    assert 2 <= step < STEPS and f"step {step}: told to stop; saved" in said
    assert len(told(workdir)) == step
    run(world.config(), workdir)
    assert f"step {step} of {STEPS}: resumed from {workdir}" in capsys.readouterr().out
    assert told(workdir) == told(undisturbed)


@pytest.mark.slow
def test_a_run_moves_to_another_mesh(world, undisturbed, run, tmp_path):
    workdir = tmp_path / "run"
    at_step_four(undisturbed, workdir)
    run(world.config(mesh=MeshConfig(8, 1, 1)), workdir)
    found, expected = told(workdir), told(undisturbed)
    assert found[:4] == expected[:4] and found[4:] != expected[4:]
    near(found[4:5], expected[4:5], 1e-5)
    near(found[5:], expected[5:], 2e-4, LOSSES)


def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start_two(config, workdir):
    """Two processes with four devices each, the first of which writes."""
    where = f"--coordinator=localhost:{port()}"
    return [start(config, workdir, where, "--processes=2", f"--process_id={n}", devices=4) for n in range(2)]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_are_as_one_and_stop_together(world, undisturbed, run, tmp_path):
    workdir = tmp_path / "run"
    config = world.config(checkpoint={"every": 100})
    expected = told(undisturbed)
    processes = start_two(config, workdir)
    wait_for(processes[0], workdir, 2)
    processes[1].send_signal(signal.SIGTERM)  # the one that writes nothing
    said = [finish(process) for process in processes]
    (step,) = steps_of(workdir)
    assert 2 <= step < STEPS and f"step {step}: told to stop; saved" in said[0]
    near(told(workdir)[:1], expected[:1], 1e-6)
    near(told(workdir)[1:], expected[1:step], 2e-4, LOSSES)
    run(config, workdir)  # one process with eight devices
    near(told(workdir)[1:], expected[1:], 2e-4, LOSSES)
    # And from one process to two.
    shutil.rmtree(workdir)
    at_step_four(undisturbed, workdir)
    said = [finish(process) for process in start_two(config, workdir)]
    assert f"step 4 of {STEPS}: resumed from {workdir}" in said[0] and f"step {STEPS}: done" in said[0]
    near(told(workdir)[4:5], expected[4:5], 1e-6)
    near(told(workdir)[5:], expected[5:], 2e-4, LOSSES)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_loses_nothing(world, undisturbed, run, tmp_path):
    workdir, config = tmp_path / "run", world.config()
    at_step_four(undisturbed, workdir)

    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))

    said = finish(start(config, workdir, before=full), 1)
    # Orbax's threads, whose loop the failure closed, may say so before and after, and within the same line.
    (last,) = (line for line in said.splitlines() if f"train: {workdir}" in line)
    assert "saving at step 6 failed" in last and "File too large" in last, said[-6000:]
    assert "the newest whole checkpoint is of step 4, and starting again resumes" in last
    assert steps_of(workdir) == [2, 4]
    run(config, workdir)
    assert told(workdir) == told(undisturbed)
    assert steps_of(workdir) == [2, 4, 6]
