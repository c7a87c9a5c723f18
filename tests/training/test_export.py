"""Model folders made of runs: bit for bit what was trained, and whole."""

import numpy as np
import pytest

from ivcr_jax import bundle, train
from ivcr_jax.checkpoint import Checkpoints
from ivcr_jax.export import export
from ivcr_jax.losses import LossConfig
from ivcr_jax.sharding import make_mesh
from tests.training.conftest import STEPS, told


def parameters(folder):
    """Every parameter of a model folder, by path, as the run's."""
    found = bundle.load(folder)
    parts = {"model": found.model, "retriever": found.retriever}
    return {
        f"{name}.{path}": np.asarray(value)
        for name, part in parts.items()
        if part is not None
        for path, value in bundle.weights(part).items()
    }


def equal(found, expected):
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_array_equal(found[path], value, err_msg=path)


@pytest.mark.slow
def test_a_run_becomes_a_model_folder(world, undisturbed, program, tmp_path):
    assert export(undisturbed, tmp_path / "made") == STEPS
    config = world.config()
    of = program(config, make_mesh(config.mesh))
    state, frozen, *_ = train.start(
        config, undisturbed, of, Checkpoints(undisturbed, config.checkpoint, read_only=True)
    )
    equal(parameters(tmp_path / "made"), {path: np.asarray(v) for path, v in {**state.params, **frozen}.items()})
    made = bundle.load(tmp_path / "made")
    assert made.config == config.bundle and made.tokenizer.proto == made.retriever_tokenizer.proto
    with pytest.raises(FileExistsError, match="made exists"):
        export(undisturbed, tmp_path / "made")


@pytest.mark.slow
def test_one_run_goes_on_where_another_ended(world, run, tmp_path):
    """The retriever first, then both: what the first run does not train is in its folder as it was."""
    rules = ((r".*\.vit\.(?!head).*", 0.0), (".*", 1.0))
    alone = world.config(losses=LossConfig(0, 0, 0, 0, 0, contrastive=1.0), optim={"rules": rules}, steps=2)
    run(alone, tmp_path / "first")
    export(tmp_path / "first", tmp_path / "made")
    found, before = parameters(tmp_path / "made"), parameters(world.folder / "init")
    assert found.keys() == before.keys()
    equal(*({path: value for path, value in of.items() if path.startswith("model.")} for of in (found, before)))
    assert (found["retriever.text.head.kernel"] != before["retriever.text.head.kernel"]).any()
    run(world.config(init=str(tmp_path / "made"), steps=1), tmp_path / "second")
    (row,) = told(tmp_path / "second")
    assert np.isfinite(row["loss"])


def test_what_is_no_run_is_said(world, tmp_path):
    for folder in (tmp_path / "nothing", world.folder / "init"):
        with pytest.raises(
            FileNotFoundError, match="holds no train.json and checkpoints; expected the workdir of a run"
        ):
            export(folder, tmp_path / "made")
