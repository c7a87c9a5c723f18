"""Checkpoints that are broken, kept, set aside; the state is a single array, so that files can be told apart."""

import gc
import math
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ivcr_jax.checkpoint import CheckpointConfig, Checkpoints
from ivcr_jax.sharding import MeshConfig, make_mesh
from tests.training.conftest import steps_of

# Where one part of a broken checkpoint cannot be read, Orbax drops the reading of the others half-way.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
RUN = {"seed": 0, "init": ""}
KEEP = CheckpointConfig(keep_last=10, keep_best=0)


@pytest.fixture(autouse=True)
def nothing_left():
    """Else those coroutines end, and say so, in a later test."""
    yield
    gc.collect()


def state(step, mesh=(8, 1, 1)):
    """Four megabytes that tell the step, in eight parts: as with real states, most of a checkpoint is arrays."""
    lies = NamedSharding(make_mesh(MeshConfig(*mesh)), PartitionSpec(("data", "fsdp")))
    numbers = np.random.default_rng(step).standard_normal((1024, 1024), np.float32)
    return {"w": jax.device_put(numbers, lies)}


def wanted(mesh=(8, 1, 1)):
    array = state(0, mesh)["w"]
    return {"w": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)}


def save(workdir, *steps, config=KEEP, metrics=None):
    """Saves these steps as one run; `metrics` by step."""
    checkpoints = Checkpoints(workdir, config)
    for step in steps:
        checkpoints.save(step, state(step), {"rows": step}, RUN, (metrics or {}).get(step))
    checkpoints.close()


def restored(workdir, config=KEEP, mesh=(8, 1, 1), **options):
    """The step that is restored, and what else is."""
    found = Checkpoints(workdir, config, **options).restore(wanted(mesh))
    assert found is not None
    values, data, run = found
    np.testing.assert_array_equal(values["w"], state(data["rows"])["w"])
    assert run == RUN and values["w"].sharding == wanted(mesh)["w"].sharding
    return data["rows"]


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def truncate(folder):
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(folder):
    max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size).unlink()


def garble(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def lose_position(folder):
    shutil.rmtree(folder / "data")


def cut_position(folder):
    path = folder / "data" / "metadata"
    path.write_bytes(path.read_bytes()[:3])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, 2, 4, 6)
    return workdir


def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("damage", [truncate, delete, garble, lose_position, cut_position])
def test_a_broken_checkpoint_is_set_aside_and_the_one_before_taken(saved, tmp_path, damage, caplog):
    workdir = copied(saved, tmp_path)
    damage(workdir / "checkpoints" / "6")
    left = files(workdir / "checkpoints" / "6")
    assert restored(workdir) == 4
    assert "checkpoints/6 cannot be read" in caplog.text and "trying the one before" in caplog.text
    assert steps_of(workdir) == [2, 4]
    assert files(workdir / "broken-checkpoint-6") == left, "nothing is lost"
    save(workdir, 6)  # at the same step again
    assert restored(workdir) == 6
    damage(workdir / "checkpoints" / "6")
    damage(workdir / "checkpoints" / "4")
    assert restored(workdir) == 2 and steps_of(workdir) == [2]
    assert len(list(workdir.glob("broken-checkpoint-*"))) == 3


def test_half_a_checkpoint_is_none(saved, tmp_path):
    workdir = copied(saved, tmp_path)
    whole = workdir / "checkpoints" / "6"
    half = whole.with_name("8.orbax-checkpoint-tmp")
    whole.rename(half)
    delete(half)
    assert restored(workdir) == 4
    save(workdir, 8)
    assert restored(workdir) == 8 and not half.exists()


def test_where_none_can_be_read_nothing_is_moved(saved, tmp_path):
    workdir = copied(saved, tmp_path)
    for step in (2, 4, 6):
        truncate(workdir / "checkpoints" / str(step))
    with pytest.raises(ValueError, match=re.escape(f"{workdir}/checkpoints: none of the checkpoints can be read: 6:")):
        Checkpoints(workdir, KEEP).restore(wanted())
    assert steps_of(workdir) == [2, 4, 6]


def test_another_runs_checkpoints_are_left_as_they_are(saved, tmp_path):
    workdir = copied(saved, tmp_path)
    truncate(workdir / "checkpoints" / "6")
    assert restored(workdir, read_only=True) == 4
    assert steps_of(workdir) == [2, 4, 6] and not list(workdir.glob("broken*"))


def test_any_mesh_takes_a_checkpoint(saved):
    assert restored(saved, mesh=(2, 2, 2)) == 6
    assert restored(saved, mesh=(1, 1, 8)) == 6


def test_broken_metrics_cost_a_checkpoint_nothing_else(saved, tmp_path, caplog):
    workdir = copied(saved, tmp_path)
    garble(workdir / "checkpoints" / "6" / "metrics")
    assert restored(workdir) == 6 and not Checkpoints(workdir, KEEP).judged(6)
    assert "metrics cannot be read" in caplog.text and "judged no more" in caplog.text
    save(workdir, 8, config=CheckpointConfig(keep_last=1, keep_best=0))
    assert steps_of(workdir) == [8]


def test_an_empty_folder_has_none(tmp_path):
    assert Checkpoints(tmp_path, KEEP).restore(wanted()) is None


@pytest.mark.parametrize("higher", [False, True])
def test_the_last_and_the_best_are_kept_over_restarts(tmp_path, higher):
    sign = 1 if higher else -1
    config = CheckpointConfig(keep_last=2, keep_best=2, best="score", higher=higher)
    scores = {1: 3, 2: 9, 3: 8, 4: math.nan, 5: 1, 7: 2, 8: 0}  # step 6 has none
    metrics = {step: {"score": sign * value, "loss": 0.0} for step, value in scores.items()}
    save(tmp_path, 1, 2, 3, 4, config=config, metrics=metrics)
    assert steps_of(tmp_path) == [2, 3, 4]
    save(tmp_path, 5, 6, 7, 8, config=config, metrics=metrics)
    assert steps_of(tmp_path) == [2, 3, 7, 8]
    checkpoints = Checkpoints(tmp_path, config)
    assert checkpoints.judged(3) and not checkpoints.judged(4711)


def test_only_the_last_are_kept(tmp_path):
    save(tmp_path, *range(1, 6), config=CheckpointConfig(keep_last=3, keep_best=0))
    assert steps_of(tmp_path) == [3, 4, 5]
    assert not Checkpoints(tmp_path, KEEP).judged(5)


def test_a_metric_that_validation_does_not_find_is_named(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(best="rank_r1"))
    with pytest.raises(ValueError, match="checkpoint.best is 'rank_r1', and validation found lm, loss"):
        checkpoints.save(1, state(1), {}, RUN, {"loss": 1.0, "lm": 1.0})


def test_many_small_arrays_are_written_at_once(tmp_path):
    """Else the first save compiles a program for every shape: seconds that who is told to stop does not have."""
    lies = NamedSharding(make_mesh(MeshConfig(2, 2, 2)), PartitionSpec())
    checkpoints = Checkpoints(tmp_path, KEEP)
    arrays = {f"{size}": jax.device_put(np.ones((8, size), np.float32), lies) for size in range(16, 40)}
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    checkpoints.save(1, arrays, {}, RUN)
    checkpoints.close()
    assert not compiled


def test_nonsense_is_refused():
    with pytest.raises(ValueError, match="keep_last is 0; expected at least 1"):
        CheckpointConfig(keep_last=0)


def test_a_folder_that_cannot_be_written_is_an_error_with_the_newest_whole_step(saved, tmp_path, monkeypatch):
    workdir = copied(saved, tmp_path)
    checkpoints = Checkpoints(workdir, KEEP)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(OSError, match="saving at step 8 failed .*No space left.*newest whole checkpoint is of step 6"):
        checkpoints.save(8, state(8), {}, RUN)
    assert pathlib.Path(workdir / "checkpoints" / "6").exists()
