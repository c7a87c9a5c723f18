"""Model folders made of runs: what was trained, merged and whole, and the card that says what made them."""

import dataclasses
import json
import shutil
import signal
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ivcr_jax import bundle, calibration, card, evaluate, train
from ivcr_jax import export as exporting
from ivcr_jax.checkpoint import FOLDER, Checkpoints
from ivcr_jax.data import prompt
from ivcr_jax.data.dialogue import Intent
from ivcr_jax.data.store import DialogueStore, VideoStore, choose_stored
from ivcr_jax.data.tokenizer import encode_query
from ivcr_jax.export import export
from ivcr_jax.losses import LossConfig
from ivcr_jax.models import lora
from ivcr_jax.sharding import MeshConfig, make_mesh
from tests.models.conftest import close
from tests.training.conftest import STEPS, told

ADAPTED = "model.llama.layers.%s.kernel"


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


def merged_by_hand(unmerged, config):
    """W + alpha / rank A B in f64, and nothing of LoRA."""
    found = {path: value for path, value in unmerged.items() if ".lora." not in path}
    for name in "qkvo":
        a, b = (unmerged[f"model.llama.layers.{name}.lora.{part}"].astype(np.float64) for part in "ab")
        path = ADAPTED % name
        found[path] = found[path] + config.model.lora.alpha / config.model.lora.rank * np.einsum("lir,lro->lio", a, b)
    return found


def merged(found, unmerged, config):
    """That these are those parameters with LoRA merged, all others bit for bit."""
    expected = merged_by_hand(unmerged, config)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        tolerance = 1e-6 if path in [ADAPTED % name for name in "qkvo"] else 0
        np.testing.assert_allclose(found[path], value, rtol=0, atol=tolerance, err_msg=path)
    changed = ADAPTED % "q"
    assert np.abs(found[changed] - unmerged[changed]).max() > 0.01


def begin(world, config, workdir, metrics=()):
    """The folder of a run that ended where it began: at step STEPS, with what is in its `init`."""
    before = signal.getsignal(signal.SIGTERM)
    program = train.Program(config, make_mesh(config.mesh, jax.devices()[:1]))
    checkpoints = Checkpoints(workdir, config.checkpoint)
    state, *_ = train.start(config, workdir, program, checkpoints)
    state = dataclasses.replace(state, step=jax.device_put(jnp.int32(STEPS), state.step.sharding))
    run = {"seed": config.seed, "init": config.init}
    checkpoints.save(STEPS, state, {"rows": 0, "fingerprint": "5eed"}, run)
    checkpoints.close()
    train.write_folder(workdir, config, train.read_tokenizers(config, workdir))
    (workdir / "metrics.jsonl").write_text("".join(metrics))
    signal.signal(signal.SIGTERM, before)
    return workdir


@pytest.fixture(scope="module")
def begun(world, tmp_path_factory):
    """Such a folder, with LoRA that is not zero. Never changed by a test."""
    rows = [
        {"step": 2, "validation/loss": 9.0, "validation/rank_r1": 0.25},
        {"step": 4, "validation/loss": None, "validation/rank_r1": 0.5},
        {"step": 5, "loss": 7.0},
        {"step": STEPS + 2, "validation/rank_r1": 1.0},  # of a run that went on, and then lost its checkpoint
    ]
    lines = [json.dumps(row) + "\n" for row in rows] + ['{"step": 6, "validation/rank']
    config = world.config(mesh=MeshConfig(1, 1, 1))
    return begin(world, config, tmp_path_factory.mktemp("begun") / "run", lines)


@pytest.fixture(scope="module")
def made(begun, tmp_path_factory):
    """Its folder in f32, with a threshold: so few queries allow no share but a tenth."""
    out = tmp_path_factory.mktemp("made") / "export"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "SHARE", 0.1)
        assert export(begun, out, dtype="float32") == STEPS
    return out


@pytest.fixture(scope="module")
def halved(begun, tmp_path_factory):
    """Its folder in bf16."""
    out = tmp_path_factory.mktemp("halved") / "export"
    export(begun, out, dtype="bfloat16", calibrate=False)
    return out


# Parameters


def test_lora_is_merged_and_gone(world, made):
    merged(parameters(made), parameters(world.folder / "init"), world.config())
    assert bundle.load(made).config.model.lora.rank == 0 and lora.adapted(bundle.load(made).model) == {}
    assert sorted(path.name for path in made.iterdir()) == sorted(
        "README.md card.json config.json model retriever retriever_tokenizer.model tokenizer.model".split()
    )


def test_in_bfloat16_all_but_vectors_are_rounded_once(world, halved):
    config = world.config()
    expected = merged_by_hand(parameters(world.folder / "init"), config)
    axes = {}
    for name, part in (("model", bundle.load(halved).model), ("retriever", bundle.load(halved).retriever)):
        axes |= {f"{name}.{path}": len(v.get_metadata("axes")) for path, v in bundle.parameters(part).items()}
    found = parameters(halved)
    assert found.keys() == expected.keys() == axes.keys()
    for path, value in found.items():
        assert value.dtype == (jnp.float32 if axes[path] == 1 else jnp.bfloat16), path
        bound = 0 if axes[path] == 1 else 2**-8 * np.abs(expected[path]).max()
        np.testing.assert_allclose(value.astype(np.float64), expected[path], rtol=0, atol=bound, err_msg=path)
    assert found["model.llama.layers.mlp_norm.scale"].dtype == np.float32  # of a stack: one axis, and the layers'


@pytest.fixture(scope="module")
def outputs(world):
    """(folder) -> what its models make of a batch of the validation split."""
    config = world.config(mesh=MeshConfig(1, 1, 1), data={"batch_size": 2})
    tokenizers, mesh = train.read_tokenizers(config, world.folder), make_mesh(config.mesh, jax.devices()[:1])
    stream = train.pipeline(config, tokenizers, mesh, "validation", world.folder)
    batch = {name: jnp.asarray(value) for name, value in stream.batch(0).items()}

    @nnx.jit
    def run(model, retriever, batch):
        out = model(batch)
        moments = out.moments
        found = {"logits": model.llama.logits(out.hidden), "scores": out.scores, "starts": moments.start_logits}
        found |= {"ends": moments.end_logits, "spans": moments.best()[0]}
        texts = retriever.embed_text(batch["queries"].reshape(-1, batch["queries"].shape[-1]))
        return found | {"texts": texts}, batch["loss_mask"], batch["candidate_targets"] >= 0, batch["moment_slots"] >= 0

    def of(folder):
        loaded = bundle.load(folder)
        found, tokens, searches, moments = run(loaded.model, loaded.retriever, batch)
        assert tokens.any() and searches.any() and moments.any()
        where = {"logits": tokens, "scores": searches, "texts": np.ones(len(found["texts"]), bool)}
        return {name: np.asarray(value)[np.asarray(where.get(name, moments))] for name, value in found.items()}

    return of


def test_the_merged_model_says_what_the_run_said(world, made, halved, outputs):
    expected, exact, rounded = outputs(world.folder / "init"), outputs(made), outputs(halved)
    for name, value in expected.items():
        close(exact[name], value, 1e-5)
        error = np.abs(rounded[name] - value).max() / np.abs(value).max()
        assert 0 < error < 0.05, name


def test_training_goes_on_from_it(world, made, halved):
    """LoRA begins anew beside the merged matrices: what is trained is f32, and at first the function is the same."""
    for folder, dtype in ((made, np.float32), (halved, jnp.bfloat16)):
        config = world.config(mesh=MeshConfig(1, 1, 1), init=str(folder))
        program = train.Program(config, make_mesh(config.mesh, jax.devices()[:1]))
        wanted = {**program.frozen, **program.state.params}
        given = bundle.read_folder(folder, wanted, program.factors)
        new = {path for path in program.factors if path not in given}
        assert new == {f"model.llama.layers.{name}.lora.{part}" for name in "qkvo" for part in "ab"}
        assert given[ADAPTED % "q"].dtype == dtype and ADAPTED % "q" in program.frozen


# The card


def test_the_card_says_what_made_it(world, begun, made):
    text = (made / "card.json").read_text()
    found, config = json.loads(text), world.config()
    assert found["run"] == {
        "step": STEPS, "steps": STEPS, "seed": 0, "began_with": "init",
        "losses": {"lm": 1, "rank": 1, "moment": 1, "moment_l1": 1, "moment_iou": 1, "contrastive": 1},
    }  # fmt: skip
    train_split, videos = DialogueStore(config.data.dialogues, "train"), VideoStore(config.data.videos)
    assert found["data"] == {
        "dialogues": {"name": "data", "what": "48 dialogues", "fingerprint": train_split.fingerprint},
        "videos": {"name": "features", "what": "12 videos as features", "fingerprint": videos.fingerprint},
        "stream": "5eed",
    }
    assert found["validation"] == {"step": 4, "metrics": {"loss": None, "rank_r1": 0.5}}
    assert found["dtype"] == "float32" and found["lora"] == {"rank": 2, "alpha": 1.0}
    loaded = bundle.load(made)
    assert found["tokenizers"] == {
        "tokenizer.model": loaded.tokenizer.fingerprint,
        "retriever_tokenizer.model": loaded.retriever_tokenizer.fingerprint,
    }
    assert found["versions"]["jax"] == jax.__version__ and set(found["code"]) == {"revision", "changed"}
    for private in (world.folder, begun, made):
        assert str(private.parent) not in text + (made / "README.md").read_text()


def test_the_card_counts_parameters(world, made):
    found = json.loads((made / "card.json").read_text())["parameters"]
    values = parameters(made)
    for part, counted in found.items():
        mine = [value.size for path, value in values.items() if f"{path}.".startswith(f"{part}.")]
        assert mine and counted["count"] == sum(mine)
    assert sum(counted["count"] for counted in found.values()) == sum(value.size for value in values.values())
    # Of the decoder: A and B of four projections (width 32, of keys and values 16 wide), and the added tokens' rows.
    added = sum(value.size for path, value in values.items() if path.startswith("model.llama.added_"))
    assert added > 0
    assert found["model.llama"]["trained"] == added + 2 * (2 * (32 + 32) + 2 * (32 + 16))
    assert found["model.rank"]["trained"] == found["model.rank"]["count"] > 0
    assert 0 < found["retriever.vit"]["trained"] < found["retriever.vit"]["count"], "the pooling head alone"


def test_the_threshold_is_that_of_the_runs_own_data(world, made):
    """By loops over the stores of the validation split, one text and one video at a time."""
    config, loaded = world.config(), bundle.load(made)
    retriever = loaded.retriever
    dialogues, videos = DialogueStore(config.data.dialogues, "validation"), VideoStore(config.data.videos)
    embed_text = nnx.jit(lambda retriever, ids: retriever.embed_text(ids))
    embed_video = nnx.jit(lambda retriever, frames, mask: retriever.embed_video(frames, mask))
    vectors = {}
    for name in videos.number:
        stored = videos.read(name)
        chosen = choose_stored(len(stored.times), config.data.frames, None)
        frames, mask = np.zeros((1, config.data.frames, *videos.item_shape), np.float32), np.arange(config.data.frames)
        videos.decode(stored, chosen, frames[0])
        vectors[name] = np.asarray(embed_video(retriever, frames, mask[None] < len(chosen))[0])
    own, best, without = [], [], []
    for number in range(len(dialogues)):
        for turn in dialogues[number].turns:
            if turn.intent != Intent.VIDEO:
                continue
            length = config.retriever.text.max_tokens
            ids = encode_query(prompt.retrieval_query([turn.user]), loaded.retriever_tokenizer, length)
            text = np.asarray(embed_text(retriever, np.array([ids], np.int32))[0])
            cosines = {name: float(vector @ text) for name, vector in vectors.items()}
            own.append(cosines[turn.video_id])
            best.append(max(cosines.values()))
            without.append(max(value for name, value in cosines.items() if name != turn.video_id))
    found = json.loads((made / "card.json").read_text())["calibration"]
    count = len(own)
    assert (found["queries"], found["videos"]) == (count, len(vectors))
    close(found["threshold"], sorted(own)[int(0.1 * count)], 1e-5)
    bar = found["threshold"] - 1e-6
    assert found["refused_alone"] == np.mean([value < bar for value in own])
    assert found["refused_answerable"] == np.mean([value < bar for value in best])
    assert found["refused_without_truth"] == np.mean([value < bar for value in without])
    assert card.threshold(made) == found["threshold"]


def test_where_the_data_are_gone_the_folder_is_written_without_a_threshold(begun, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(begun, workdir)
    recipe = json.loads((workdir / "train.json").read_text())
    recipe["data"] |= {"dialogues": "/pod/data", "videos": "/pod/features"}
    (workdir / "train.json").write_text(json.dumps(recipe))
    assert export(workdir, tmp_path / "made") == STEPS
    text = (tmp_path / "made" / "card.json").read_text()
    found = json.loads(text)
    assert found["calibration"] == {"threshold": None, "why": "the run's data led to a DatasetNotFound"}
    assert found["data"]["videos"] == {"name": "features", "what": None, "fingerprint": None}
    assert "/pod" not in text and card.threshold(tmp_path / "made") is None
    assert bundle.load(tmp_path / "made").model is not None
    assert found["dtype"] == "float32", "of the run's computation"


def test_a_folder_without_a_threshold_says_why(world, begun, halved):
    config = world.config()
    asked = {"threshold": None, "why": "nobody asked for one"}
    assert json.loads((halved / "card.json").read_text())["calibration"] == asked
    nothing = {"threshold": None, "why": "the folder holds no retriever"}
    assert exporting.calibrated(config, begun, None, True) == nothing
    retriever = bundle.weights(bundle.load(halved).retriever)
    few = exporting.calibrated(config, begun, retriever, True)
    assert few == {"threshold": None, "why": "found 24 queries of videos that are there, expected at least 50"}


def test_the_card_is_no_part_of_the_fingerprint(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    before = bundle.fingerprint(made)
    (tmp_path / "copy" / "card.json").unlink()
    (tmp_path / "copy" / "README.md").write_text("another")
    assert bundle.fingerprint(tmp_path / "copy") == before
    config = json.loads((made / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config))
    assert bundle.fingerprint(tmp_path / "copy") != before


def test_the_revision_is_of_the_checkout_that_holds_the_code(tmp_path, monkeypatch):
    code = tmp_path / "export.py"
    code.write_text("one")
    monkeypatch.setattr(exporting, "__file__", str(code))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    unknown = {"revision": "unknown", "changed": None}
    assert exporting.revision() == unknown

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    git("init")
    git("commit", "--allow-empty", "-m", "x")
    assert exporting.revision() == unknown, "installed below another project's checkout"
    git("add", "export.py")
    git("commit", "-m", "y")
    head = git("rev-parse", "HEAD").stdout.strip()
    assert exporting.revision() == {"revision": head, "changed": False}
    code.write_text("two")
    assert exporting.revision() == {"revision": head, "changed": True}
    monkeypatch.setenv("PATH", "")
    assert exporting.revision() == unknown


# Whole runs


@pytest.mark.slow
def test_a_run_becomes_a_model_folder(world, undisturbed, program, tmp_path):
    assert export(undisturbed, tmp_path / "made", calibrate=False) == STEPS
    config = world.config()
    of = program(config, make_mesh(config.mesh))
    state, frozen, *_ = train.start(
        config, undisturbed, of, Checkpoints(undisturbed, config.checkpoint, read_only=True)
    )
    trained = {path: np.asarray(v) for path, v in {**state.params, **frozen}.items()}
    merged(parameters(tmp_path / "made"), trained, config)
    made = bundle.load(tmp_path / "made")
    unadapted = dataclasses.replace(config.model, lora=dataclasses.replace(config.model.lora, rank=0))
    assert made.config == dataclasses.replace(config.bundle, model=unadapted)
    assert made.tokenizer.proto == made.retriever_tokenizer.proto
    with pytest.raises(FileExistsError, match="made exists"):
        export(undisturbed, tmp_path / "made")


@pytest.mark.slow
def test_one_run_goes_on_where_another_ended(world, run, tmp_path):
    """The retriever first, then both: what the first run does not train is in its folder as it was, LoRA merged."""
    rules = ((r".*\.vit\.(?!head).*", 0.0), (".*", 1.0))
    alone = world.config(losses=LossConfig(0, 0, 0, 0, 0, contrastive=1.0), optim={"rules": rules}, steps=2)
    run(alone, tmp_path / "first")
    export(tmp_path / "first", tmp_path / "made")
    found, before = parameters(tmp_path / "made"), parameters(world.folder / "init")
    untrained = ({path: value for path, value in of.items() if path.startswith("model.")} for of in (found, before))
    merged(*untrained, world.config())
    assert (found["retriever.text.head.kernel"] != before["retriever.text.head.kernel"]).any()
    run(world.config(init=str(tmp_path / "made"), steps=1), tmp_path / "second")
    (row,) = told(tmp_path / "second")
    assert np.isfinite(row["loss"])


def test_a_run_is_evaluated_as_it_was_exported(begun, tmp_path):
    """The newest checkpoint is written once, and never taken for that of another step."""
    folder = evaluate.exported(begun, tmp_path)
    before = bundle.fingerprint(folder)
    assert evaluate.exported(begun, tmp_path) == folder and bundle.fingerprint(folder) == before
    later = tmp_path / "later"
    shutil.copytree(begun, later)
    (newest,) = (later / FOLDER).iterdir()
    newest.rename(newest.with_name(str(int(newest.name) + 1)))
    with pytest.raises(ValueError, match=r"export: found step \d+, and .*later is at \d+; expected another --out"):
        evaluate.exported(later, tmp_path)


def test_what_is_no_run_is_said(world, begun, tmp_path):
    for folder in (tmp_path / "nothing", world.folder / "init"):
        with pytest.raises(
            FileNotFoundError, match="holds no train.json and checkpoints; expected the workdir of a run"
        ):
            export(folder, tmp_path / "made")
    with pytest.raises(ValueError, match="dtype is 'float16'; expected one of bfloat16, float32"):
        export(begun, tmp_path / "made", dtype="float16")
