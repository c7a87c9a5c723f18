"""Encoding as a user runs it: stores of real JPEG frames, model folders, several processes, stops in the middle."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python import array_record_module
from etils import epath
from flax import nnx

from ivcr_jax import bundle, encode
from ivcr_jax.config import to_dict
from ivcr_jax.data import batches, store, synth
from ivcr_jax.data.encoding import EncodingConfig
from ivcr_jax.data.pipeline import Pipeline, PipelineConfig
from ivcr_jax.data.prompt import PromptStyle
from ivcr_jax.data.tokenizer import train_demo
from ivcr_jax.models.interllava import InterLLaVA, InterLLaVAConfig
from ivcr_jax.models.llama import LlamaConfig
from ivcr_jax.models.qformer import QFormerConfig
from ivcr_jax.models.retriever import Retriever, RetrieverConfig, TextConfig
from ivcr_jax.models.vit import ViTConfig
from tests.data import sources
from tests.data.video_fixtures import write_video
from tfds_builder.build import build
from tfds_builder.ivcr200k_videos.ivcr200k_videos_dataset_builder import VideosConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
VIDEOS, FRAMES, SIZE = 10, 5, 32
SHORT = 1  # this video has three frames
ALL = VIDEOS * FRAMES - 2
# In shards of two videos: five shards of eight or ten frames, which fill one batch of eight and part of a second.
SETTINGS = {"videos_per_shard": 2, "batch": 2, "dtype": "float32"}
DEVICES = 4
VIT = ViTConfig(image_size=SIZE, patch_size=8, width=16, layers=2, heads=2, mlp_width=24)
SEEN = dataclasses.replace(VIT, cls_token=False, final_norm=True, map_head=True)


def write_folder(path, vit=VIT, seed=0, model=True, retriever=True):
    """A model folder of the smallest parts round the towers."""
    small = QFormerConfig(queries=2, width=8, layers=1, heads=1, mlp_width=8, cross_every=1, vocab_size=0, max_text=0)
    of_model = InterLLaVAConfig(
        vit=vit,
        qformer=small,
        video_qformer=small,
        llama=LlamaConfig(vocab_size=20, width=16, layers=1, heads=2, kv_heads=1, mlp_width=16),
    )
    text = TextConfig(vocab_size=20, max_tokens=4, width=16, layers=1, heads=2, mlp_width=16)
    of_retriever = RetrieverConfig(vit=SEEN, text=text, frame_layers=1)
    config = bundle.BundleConfig(of_model if model else None, of_retriever if retriever else None, PromptStyle())
    bundle.save(
        path,
        config,
        model=drawn(lambda: InterLLaVA(of_model, nnx.Rngs(0)), seed) if model else None,
        retriever=drawn(lambda: Retriever(of_retriever, nnx.Rngs(0)), seed) if retriever else None,
        tokenizers={},
    )
    return path


def drawn(make, seed):
    """Parameters of the module that `make` makes, so large that each matters."""
    rng = np.random.default_rng(seed)
    shapes = bundle.parameters(nnx.eval_shape(make))
    return {path: 0.2 * rng.standard_normal(value.shape, np.float32) for path, value in sorted(shapes.items())}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with data/ (dialogues, and videos as frames, one of them shorter) and model/, small but real."""
    folder = tmp_path_factory.mktemp("encode")
    synth.generate(folder / "source", videos=VIDEOS, interactions=20, seconds=3.0, seed=3)
    write_video(sorted((folder / "source" / "videos").rglob("*.*"))[SHORT], count=3)
    build("ivcr200k", manual_dir=folder / "source", data_dir=folder / "data", max_loss=0.5)
    build(
        "ivcr200k_videos",
        manual_dir=folder / "source",
        data_dir=folder / "data",
        config=VideosConfig(frames=FRAMES, size=SIZE),
    )
    write_folder(folder / "model")
    return folder


@pytest.fixture(scope="module")
def encoded(world):
    """The features of the dialogue model's tower, encoded by one undisturbed process."""
    done = command(world, world / "features")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{VIDEOS} videos, {ALL} frames: {ALL} computed in " in done.stdout
    return world / "features"


def arguments(world, out, *more):
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    videos = world / "data" / "ivcr200k_videos"
    return [f"--model={world / 'model'}", "--tower=model", f"--videos={videos}", f"--out={out}", *flags, *more]


ENVIRONMENT = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}"}


def start(world, out, *more, script=("-m", "ivcr_jax.encode")):
    return subprocess.Popen(
        [sys.executable, *script, *map(str, arguments(world, out, *more))],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def command(world, out, *more):
    """The command, to its end."""
    process = start(world, out, *more)
    stdout, stderr = process.communicate(timeout=200)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def frames_of(videos, name):
    stored = videos.read(name)
    out = np.empty((len(stored.times), *videos.item_shape), np.uint8)
    videos.decode(stored, np.arange(len(out)), out)
    return stored, out


def files(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


def staged(out):
    """Finished shards in staging: path -> (inode, time of change)."""
    found = pathlib.Path(f"{out}.staging").glob("*/features-corpus*")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


@pytest.mark.parametrize("tower", ["model", "retriever"])
def test_features_are_the_towers_own(world, encoded, tmp_path, tower):
    videos = world / "data" / "ivcr200k_videos"
    changed = {"batch": 1, "videos_per_shard": 3}
    encode.encode(world / "model", tower, videos, tmp_path / "features", **SETTINGS | changed)
    loaded = bundle.load(world / "model")
    vit = loaded.model.encoder.vit if tower == "model" else loaded.retriever.vit
    frames, features = store.VideoStore(videos), store.VideoStore(tmp_path / "features")
    assert features.kind == "features" and features.dtype == np.float16
    assert features.item_shape == ((17, 16) if tower == "model" else (16, 16))  # patches, and the class token
    assert list(features.duration.items()) == list(frames.duration.items())  # in the same order, too
    assert features.num_frames == frames.num_frames and len(features) == VIDEOS
    for name in frames.duration:
        stored, images = frames_of(frames, name)
        read = features.read(name)
        assert read.duration == stored.duration and (read.times == stored.times).all()
        expected = np.asarray(vit(jnp.asarray(images)))
        np.testing.assert_allclose(read.payload, expected, rtol=2**-10, atol=1e-4)  # float16 has 10 bits
        assert np.abs(expected).max() > 0.1
    assert features.made_by == {
        "source": frames.fingerprint,
        "tower": tower,
        "vit": json.loads(json.dumps(to_dict(VIT if tower == "model" else SEEN))),
        "parameters": encode.parameters_sha256(vit),
        "compute": "float32",
    }
    if tower == "retriever":  # what training does with them
        pooled = loaded.retriever.vit.pool(jnp.asarray(read.payload, jnp.float32))
        np.testing.assert_allclose(pooled, loaded.retriever.embed_frames(images[None])[0], rtol=0.01, atol=1e-4)
    # How the work was cut up decides nothing; whose tower it is does.
    assert (features.fingerprint == store.VideoStore(encoded).fingerprint) == (tower == "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features"]


@pytest.mark.slow
def test_what_the_features_depend_on_is_in_their_fingerprint(world, encoded, tmp_path):
    videos = world / "data" / "ivcr200k_videos"
    write_folder(tmp_path / "other", seed=1)
    write_folder(tmp_path / "eps", vit=dataclasses.replace(VIT, norm_eps=1e-5), retriever=False)
    fewer = tmp_path / "fewer"
    build("ivcr200k_videos", manual_dir=world / "source", data_dir=fewer, config=VideosConfig(frames=3, size=SIZE))
    made = [
        (world / "model", "model", videos, {"dtype": "bfloat16"}),
        (tmp_path / "other", "model", videos, {}),
        (tmp_path / "eps", "model", videos, {}),
        (world / "model", "model", fewer, {}),
    ]
    found = [store.VideoStore(encoded).fingerprint]
    for number, (model, tower, source, changes) in enumerate(made):
        encode.encode(model, tower, source, tmp_path / str(number), **SETTINGS | changes)
        found.append(store.VideoStore(tmp_path / str(number)).fingerprint)
    assert len({*found}) == 1 + len(made)


def test_a_trained_pooling_head_leaves_features_valid(world):
    retriever = bundle.load(world / "model").retriever
    before = encode.parameters_sha256(retriever.vit)
    retriever.vit.head.probe[...] += 1
    assert encode.parameters_sha256(retriever.vit) == before
    retriever.vit.positions[...] += 1
    assert encode.parameters_sha256(retriever.vit) != before


def test_the_pipeline_reads_features_in_place_of_frames(world, encoded):
    dialogues = store.DialogueStore(world / "data" / "ivcr200k", "train")
    texts = [text for i in range(len(dialogues)) for turn in dialogues[i].turns for text in (turn.user, turn.answer)]
    tokenizer = train_demo([*texts, "[INST] <<SYS>> <</SYS>> [/INST] 0123456789"], 600)
    pack = batches.PackConfig(
        EncodingConfig(tokens_per_video=4, max_candidates=8), seq_len=1500, video_slots=10, max_turns=8, frames=3
    )
    config = PipelineConfig(pack=pack, batch_size=2, train=False)
    videos = store.VideoStore(encoded)
    batch = Pipeline(dialogues, videos, tokenizer, config).batch(0)
    mask = batch["frame_mask"]
    assert batch["features"].shape == (*mask.shape, 17, 16) and batch["features"].dtype == np.float16 and mask.any()
    held = {frame.tobytes() for name in videos.duration for frame in videos.read(name).payload}
    assert {frame.tobytes() for frame in batch["features"][mask]} <= held


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_in_the_middle_it_goes_on_where_it_was(world, encoded, tmp_path):
    """Killed with SIGKILL in its third shard of five: the first two stay as they are, and nobody sees a half store."""
    script = """
import itertools, sys, time
from absl import app
from ivcr_jax import encode
real = encode._Tower.features
shards = itertools.count()
def slow(self, videos, progress):
    number = next(shards)
    for video in real(self, videos, progress):
        yield video
        if number == 2:
            print("in the third", flush=True)
            time.sleep(60)
encode._Tower.features = slow
encode._define_flags()
app.run(encode.main)
"""
    out = tmp_path / "features"
    process = start(world, out, script=("-c", script))
    try:
        assert process.stdout.readline() == "in the third\n"
        time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    before = staged(out)
    assert sorted(before) == [f"features-corpus.array_record-{n:05d}-of-00005" for n in (0, 1)]
    assert not out.exists()
    half = list(pathlib.Path(f"{out}.staging").glob("*/.*.tmp"))
    assert len(half) == 1  # the third, as far as it came
    done = command(world, out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{VIDEOS} videos, {ALL} frames: {6 * FRAMES} computed in " in done.stdout
    after = {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("*array_record*")}
    assert len(after) == 5 and before.items() <= after.items()
    assert files(out) == files(encoded)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features"]


def test_what_was_left_at_the_last_step_is_taken_up(world, encoded, tmp_path, monkeypatch):
    """Stopped when the metadata stands and the rename does not: the next run computes nothing."""
    out = tmp_path / "features"
    videos = world / "data" / "ivcr200k_videos"

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(epath.Path(out)), "rename", stop)
        encode.encode(world / "model", "model", videos, out, **SETTINGS)
    assert not out.exists() and len(staged(out)) == 5
    line = encode.encode(world / "model", "model", videos, out, **SETTINGS)
    assert "frames: 0 computed" in line
    assert {name: data for name, data in files(out).items() if name.endswith(".json")} == {
        name: data for name, data in files(encoded).items() if name.endswith(".json")
    }
    read = store.VideoStore(out)
    assert [len(read.read(name).payload) for name in read.duration] == [*read.num_frames.values()]


def test_staging_of_other_settings_is_not_used(world, tmp_path):
    out = tmp_path / "features"
    videos = world / "data" / "ivcr200k_videos"
    other = pathlib.Path(f"{out}.staging") / "of_another_tower"
    other.mkdir(parents=True)
    for path in store.feature_shards(other, 5):
        path.write_bytes(b"something else")
    assert f"{ALL} computed" in encode.encode(world / "model", "model", videos, out, **SETTINGS)
    assert len(staged(out)) == 5  # nor removed: it is another run's


def test_a_whole_store_is_left_alone(world, encoded, tmp_path):
    before = files(encoded)
    done = command(world, encoded)
    assert (done.returncode, done.stdout.strip()) == (
        0, f"{encoded} is whole and made from the same things: nothing to do",
    )  # fmt: skip
    assert files(encoded) == before


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def together(world, out, *more):
    """Two processes to their end, as one job."""
    flags = [f"--coordinator=localhost:{free_port()}", "--processes=2"]
    processes = [start(world, out, *flags, f"--process_id={index}", *more) for index in (0, 1)]
    return [(process, *process.communicate(timeout=200)) for process in processes]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_write_what_one_does(world, encoded, tmp_path):
    (first, line, first_errors), (second, nothing, second_errors) = together(world, tmp_path / "features")
    assert (first.returncode, second.returncode) == (0, 0), first_errors[-2000:] + second_errors[-2000:]
    assert f"{VIDEOS} videos, {ALL} frames: {ALL} computed in " in line
    assert "computed" not in nothing and "video/s" in first_errors and "video/s" not in second_errors
    assert files(tmp_path / "features") == files(encoded)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features"]


def break_record(world, copy, record=2):
    """A copy of the world whose video number `record` has no JPEG in it; returns its id."""
    shutil.copytree(world, copy, ignore=shutil.ignore_patterns("features", "source"))
    name = list(store.VideoStore(copy / "data" / "ivcr200k_videos").duration)[record]
    (shard,) = (copy / "data" / "ivcr200k_videos").rglob("*array_record*")
    reader = array_record_module.ArrayRecordReader(str(shard))
    records = reader.read_all()
    reader.close()
    writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1")
    for number, data in enumerate(records):
        writer.write(data.replace(b"\xff\xd9", b"\x00\x00") if number == record else data)
    writer.close()
    return name


@pytest.mark.slow
@pytest.mark.multiprocess
def test_one_bad_video_stops_its_process_and_keeps_the_work_of_the_other(world, tmp_path):
    name = break_record(world, tmp_path / "copy")
    (first, *said), (second, _, why) = together(tmp_path / "copy", tmp_path / "features")
    assert (first.returncode, second.returncode) == (1, 1)
    assert f"error: {name}: its record cannot be read: jpeg 0 of {FRAMES}" in why
    assert "error: processes [1] stopped and said why; finished shards are kept in " in said[1]
    assert len(staged(tmp_path / "features")) == 3 and not (tmp_path / "features").exists()


def test_a_bad_video_is_named(world, tmp_path):
    name = break_record(world, tmp_path / "copy", record=5)
    videos = tmp_path / "copy" / "data" / "ivcr200k_videos"
    with pytest.raises(ValueError, match=rf"^{name}: its record cannot be read: .* no JPEG file"):
        encode.encode(world / "model", "model", videos, tmp_path / "features", **SETTINGS)
    assert len(staged(tmp_path / "features")) == 2 and not (tmp_path / "features").exists()


def test_features_too_large_for_float16_are_refused(world, tmp_path):
    loaded = bundle.load(world / "model")
    loaded.model.encoder.vit.positions[...] += 1e5
    huge = dataclasses.replace(loaded.config, retriever=None)
    bundle.save(tmp_path / "huge", huge, model=bundle.weights(loaded.model), tokenizers={})
    videos = world / "data" / "ivcr200k_videos"
    first = next(iter(store.VideoStore(videos).duration))
    with pytest.raises(ValueError, match=rf"^{first}: the tower's features are beyond float16's range"):
        encode.encode(tmp_path / "huge", "model", videos, tmp_path / "features", **SETTINGS)


def test_refusals_before_any_work(world, encoded, tmp_path):
    model, videos, out = world / "model", world / "data" / "ivcr200k_videos", tmp_path / "features"
    write_folder(tmp_path / "first_stage", model=False)
    write_folder(tmp_path / "larger", vit=dataclasses.replace(VIT, image_size=48))
    sources.build_features(tmp_path / "no_frames")
    (tmp_path / "file").mkdir()
    refused = [
        ((tmp_path / "gone", "model", videos, out), FileNotFoundError, r"gone: found no config\.json, expected"),
        ((tmp_path / "first_stage", "model", videos, out), ValueError, r"first_stage: found no model in it; expected"),
        ((model, "model", tmp_path / "gone", out), store.DatasetNotFound, "gone: no such folder"),
        ((model, "model", world / "data", out), store.DatasetNotFound, "expected one built dataset at or below it"),
        ((model, "model", encoded, out), ValueError, "found a store of features, expected one of frames"),
        ((tmp_path / "larger", "model", videos, out), ValueError, "of 32 x 32 pixels, expected the tower's 48 x 48"),
        ((model, "retriever", videos, encoded), FileExistsError, "features of another tower, vit, parameters; exp"),
        ((model, "model", videos, tmp_path / "file"), FileExistsError, "something else than features of this command"),
        ((model, "model", videos, tmp_path / "no_frames" / "features"), FileExistsError, "holds something else than"),
    ]  # fmt: skip
    for inputs, kind, message in refused:
        with pytest.raises(kind, match=message):
            encode.encode(*inputs, **SETTINGS)
    assert not out.exists() and not list(tmp_path.glob("*.staging"))


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (["extra"], 1, "unknown argument 'extra'"),
        (["--tower=text"], 1, "--tower=text: value should be one of <model|retriever>"),
        (
            ["--model=/nowhere"],
            1,
            "error: /nowhere: found no config.json, expected a folder that convert or export wrote",
        ),
    ],
)
def test_bad_commands(world, tmp_path, more, status, message):
    done = command(world, tmp_path / "features", *more)
    assert done.returncode == status and message in done.stderr + done.stdout
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())
