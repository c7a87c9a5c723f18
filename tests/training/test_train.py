"""Whole runs in this process: where they begin, what they refuse before the first step, what ends them."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

from ivcr_jax import bundle, encode, train
from ivcr_jax.config import to_dict
from ivcr_jax.data.store import DatasetNotFound
from ivcr_jax.losses import LossConfig
from ivcr_jax.models.layers import Compute
from ivcr_jax.sharding import MeshConfig, make_mesh
from tests.training.conftest import VIT, at_step_four, finish, lines, start, steps_of, told, write_init, write_videos


@pytest.mark.slow
def test_a_run_begins_with_the_first_that_is_there(world, run, undisturbed, tmp_path, capsys):
    """Its own checkpoint, that of `resume`, the model folder, random weights."""
    first, other = at_step_four(undisturbed, tmp_path / "first"), tmp_path / "other"
    for origin in (first, other):
        run(world.config(resume=str(first)), other)
        assert f"step 4 of 6: resumed from {origin}\n" in capsys.readouterr().out
        assert [row["loss"] for row in lines(other)] == [row["loss"] for row in told(undisturbed)][4:]
        assert steps_of(other) == [4, 6] and steps_of(first) == [2, 4]
        shutil.rmtree(other / "checkpoints" / "6")

    half = tmp_path / "half"
    words = (world.folder / "init" / bundle.TOKENIZER).read_bytes()
    write_init(
        half, dataclasses.replace(world.config(), retriever=None, losses=LossConfig()), {bundle.TOKENIZER: words}
    )
    tokens = str(world.folder / "init" / bundle.RETRIEVER_TOKENIZER)
    data = {"tokenizer": tokens, "retriever_tokenizer": tokens}
    run(world.config(init=str(half), data=data), tmp_path / "from_half")
    assert f"step 0 of 6: weights of {half}, but for retriever." in capsys.readouterr().out
    run(world.config(init="", data=data), tmp_path / "from_nothing")
    assert "step 0 of 6: random weights" in capsys.readouterr().out
    whole, part, nothing = (told(path)[0] for path in (undisturbed, tmp_path / "from_half", tmp_path / "from_nothing"))
    assert whole["lm"] == part["lm"] != nothing["lm"]
    assert whole["contrastive"] != part["contrastive"] == nothing["contrastive"]


def made_by(world, path, *, tower="model", **changes):
    """A store like the world's that says what it was made by: the tower of the model folder, but for changes."""
    write_videos(path)
    vit = encode.read_tower(world.folder / "init", tower, make_mesh(MeshConfig()), Compute("float32"))
    said = {"source": "x", "tower": tower, "vit": json.loads(json.dumps(to_dict(vit.config)))}
    said |= {"parameters": encode.parameters_sha256(vit), "compute": "bfloat16"} | changes
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | {"made_by": said}))
    return {"videos": str(path)}


def test_features_must_be_of_the_runs_own_towers(world, program, tmp_path):
    config = world.config()
    factors = program(config, make_mesh(config.mesh)).factors
    for number, tower in enumerate(("model", "retriever")):  # the same tower twice
        data = made_by(world, tmp_path / f"right{number}", tower=tower)
        train.check_features(world.config(data=data), factors)
    words = {
        name: (world.folder / "init" / name).read_bytes() for name in (bundle.TOKENIZER, bundle.RETRIEVER_TOKENIZER)
    }
    write_init(tmp_path / "other", config, words, seed=1)
    other = json.loads(json.dumps(to_dict(VIT))) | {"layers": 2, "final_norm": True}
    wrong = made_by(world, tmp_path / "wrong", vit=other)
    for changes, message in (
        ({"data": data, "init": str(tmp_path / "other")}, "its parameters are [0-9a-f]{12}, those of .*other [0-9a-f]"),
        ({"data": data, "init": ""}, "which is drawn from the seed; expected config.init"),
        ({"data": wrong}, "another ViT than config.model.vit: final_norm is True, layers is 2"),
    ):
        with pytest.raises(ValueError, match=message) as told_so:
            train.check_features(world.config(**changes), factors)
        assert "\n" not in str(told_so.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"mesh": MeshConfig(3, 1, 1)}, ValueError, "a mesh of {'data': 3, 'fsdp': 1, 'tensor': 1} for 8 devices"),
        ({"data": {"videos": "SHAPE"}}, ValueError, "holds features of (9, 16); expected (4, 16) for config.model.vit"),
        ({"data": {"videos": "nowhere"}}, DatasetNotFound, "nowhere: no such folder; expected a built dataset"),
        ({"data": {"videos": "OTHER"}}, ValueError, "the saved position is of another stream"),
        ({"data": {"batch_size": 12}, "mesh": MeshConfig(2, 2, 2)}, ValueError, "the saved position is row 32, inside"),
        ({"data": {"seq_len": 8}}, ValueError, "none of the 48 dialogues fits a row of 8 positions"),
        ({"optim": {"rules": ((".*", 1.0),)}}, ValueError, "optim.rules train the ViT they are of (model.encoder.vit."),
        ({"init": "nowhere"}, FileNotFoundError, "found none of nowhere/tokenizer.model, "),
        ({"init": "BARE"}, FileNotFoundError, "/tokenizer.model; expected one, or data.tokenizer"),
        ({"init": "COPY"}, ValueError, "was trained on frozen weights of {'seed': 0, 'init': '"),
        ({"seed": 1}, ValueError, "this configuration has {'seed': 1, 'init': '"),
        (
            {"eval": {"every": 1}, "checkpoint": {"best": "recall", "keep_best": 1}},
            ValueError,
            "checkpoint.best is 'recall'; expected one of contrastive, lm, loss, moment, ",
        ),
        (
            {"resume": "nowhere"},
            FileNotFoundError,
            "resume: nowhere holds no checkpoints; expected the workdir of a run",
        ),
        ({"resume": "EMPTY"}, ValueError, "EMPTY holds no checkpoint"),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_first_step(
    world, run, undisturbed, tmp_path, changes, error, message
):
    words = {
        name: (world.folder / "init" / name).read_bytes() for name in (bundle.TOKENIZER, bundle.RETRIEVER_TOKENIZER)
    }
    make = {
        "SHAPE": lambda path: write_videos(path, shape=(9, 16)),
        "OTHER": lambda path: write_videos(path, seed=1),
        "BARE": lambda path: write_init(path, world.config(), {}),
        "COPY": lambda path: write_init(path, world.config(), words),
        "EMPTY": lambda path: (path / "checkpoints").mkdir(parents=True),
    }

    def real(value):
        if isinstance(value, dict):
            return {name: real(each) for name, each in value.items()}
        if isinstance(value, str) and value in make:
            make[value](tmp_path / value)
            return str(tmp_path / value)
        return value

    workdir = tmp_path / "run"
    if not {"resume", "eval", "optim"} & {*changes} and changes.get("init") not in ("nowhere", "BARE"):
        at_step_four(undisturbed, workdir)
    before = lines(workdir)
    with pytest.raises(error, match=re.escape(message)) as told_so:
        run(world.config(**real(changes)), workdir)
    assert "\n" not in str(told_so.value)
    assert lines(workdir) == before


def test_the_command_says_in_a_line_what_is_wrong(world, tmp_path):
    cases = {
        "--config.optim.nonsense=1": "train: --config.optim.nonsense=1: the configuration has no 'nonsense'",
        "--config.steps=many": "flag --config.steps=many: invalid literal for int()",
        "--config.mesh.data=3": "train: a mesh of {'data': 3, 'fsdp': 2, 'tensor': 2} for 8 devices",
        "--processes=2": "train: found --processes without --coordinator and --process_id; expected all three, or none",
        "more": "unknown argument 'more'; options are written --name=value",
    }
    started = [start(world.config(), tmp_path / f"run{number}", flag) for number, flag in enumerate(cases)]
    for process, (flag, message) in zip(started, cases.items(), strict=True):
        said = finish(process, 1)
        assert message in said and "Traceback" not in said, (flag, said[-2000:])


@pytest.mark.slow
def test_a_run_whose_numbers_are_none_ends(world, run, tmp_path):
    write_videos(tmp_path / "features", nan=3)
    workdir = tmp_path / "run"
    config = world.config(data={"videos": str(tmp_path / "features")}, max_skipped=3, checkpoint={"every": 2})
    sentence = r"not finite 3 times in a row \(loss nan, gradient norm nan\); the newest checkpoint is of before"
    with pytest.raises(FloatingPointError, match=sentence):
        run(config, workdir)
    rows = lines(workdir)
    assert [(row["loss"], row["skipped_in_a_row"]) for row in rows][-1] == (None, rows[-1]["skipped"])
    assert rows[-1]["skipped"] >= 3


@pytest.mark.slow
def test_validation_in_the_loop(world, run, tmp_path, capsys):
    config = world.config(
        eval={"every": 4, "batches": 0}, checkpoint={"every": 2, "keep_last": 1, "keep_best": 1, "best": "lm"}
    )
    workdir = tmp_path / "run"
    run(config, workdir)
    found = {row["step"]: row for row in lines(workdir) if "validation/loss" in row}
    assert sorted(found) == [4, 6], "after the last step too"
    assert steps_of(workdir) == sorted({min(found, key=lambda step: found[step]["validation/lm"]), 6})
    assert "step 6  validation  loss" in capsys.readouterr().out
    before = lines(workdir)
    run(config, workdir)  # there is nothing to do, and nothing is done twice
    assert lines(workdir) == before
    row = found[6]
    assert (row["validation/queries"], row["validation/ranked_turns"], row["validation/retrieval_pool"]) == (24, 24, 12)
    weighted = sum(row[f"validation/{name}"] * weight for name, weight in config.losses.weights.items())
    assert row["validation/loss"] == pytest.approx(weighted, rel=1e-6)


@pytest.mark.slow
def test_the_folder_tells_what_is_trained(world, undisturbed, run, tmp_path, caplog):
    read = bundle.BundleConfig.from_json((undisturbed / "config.json").read_text())
    assert read == world.config().bundle
    for name in (bundle.TOKENIZER, bundle.RETRIEVER_TOKENIZER):
        assert (undisturbed / name).read_bytes() == (world.folder / "init" / name).read_bytes()
    whole = json.loads((undisturbed / "train.json").read_text())
    assert whole["optim"]["peak_lr"] == 1e-2 and whole["data"]["seq_len"] == 320
    shutil.copytree(undisturbed, tmp_path / "run")
    run(world.config(max_skipped=7), tmp_path / "run")
    assert "max_skipped was 10 when this run began, and is 7" in caplog.text
    assert "steps was" not in caplog.text
    jax.tree.map(np.testing.assert_array_equal, told(tmp_path / "run"), told(undisturbed))
