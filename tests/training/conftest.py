"""A run in small: dialogues, features of a tiny tower, both models of one layer, and the command that trains them."""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from flax import nnx

from ivcr_jax import bundle, train
from ivcr_jax.checkpoint import CheckpointConfig
from ivcr_jax.config import to_dict
from ivcr_jax.data.prompt import PromptStyle
from ivcr_jax.data.tokenizer import train_demo
from ivcr_jax.losses import LossConfig
from ivcr_jax.models.heads import MomentHeadConfig, RankHeadConfig
from ivcr_jax.models.interllava import InterLLaVA, InterLLaVAConfig
from ivcr_jax.models.layers import Compute
from ivcr_jax.models.llama import LlamaConfig
from ivcr_jax.models.lora import LoraConfig
from ivcr_jax.models.qformer import QFormerConfig
from ivcr_jax.models.retriever import Retriever, RetrieverConfig, TextConfig
from ivcr_jax.models.video_encoder import VideoEncoderConfig
from ivcr_jax.models.vit import ViTConfig
from ivcr_jax.optim import OptimConfig
from ivcr_jax.sharding import MeshConfig, make_mesh
from ivcr_jax.telemetry import LogConfig
from ivcr_jax.training import DataConfig, EvalConfig, Program, TrainConfig
from tests.data import sources
from tfds_builder.build import build

STEPS = 6
ROOT = pathlib.Path(__file__).resolve().parents[2]
VIT = ViTConfig(image_size=8, patch_size=4, width=16, layers=1, heads=2, mlp_width=24, cls_token=False)
QFORMER = QFormerConfig(queries=2, width=16, layers=1, heads=2, mlp_width=24, cross_every=1, vocab_size=0, max_text=0)
VOCAB = 400
# As published: towers and decoder are frozen, but for the tower's pooling head and LoRA.
RULES = (
    (r".*\.vit\.(?!head).*", 0.0),
    (r"model\.llama\..*\.lora\..*", 1.0),
    (r"model\.llama\.added_.*", 1.0),
    (r"model\.llama\..*", 0.0),
    (".*", 1.0),
)


@dataclasses.dataclass(frozen=True)
class World:
    """What is trained on. Attributes: folder: with data/, features/ and the model folder init/."""

    folder: pathlib.Path

    def config(self, **changes):
        """A run of STEPS steps on the mesh (2, 2, 2). A change `part={...}` is one of a part."""
        config = TrainConfig(
            model=InterLLaVAConfig(
                vit=VIT,
                qformer=QFORMER,
                video_qformer=dataclasses.replace(QFORMER, width=12),
                video=VideoEncoderConfig(max_frames=3, window=2, stride=2),
                llama=LlamaConfig(vocab_size=VOCAB, width=32, layers=1, heads=4, kv_heads=2, mlp_width=48),
                lora=LoraConfig(rank=2, alpha=1.0),  # of full scale it would make attention all or nothing
                rank=RankHeadConfig(width=16, heads=2),
                moment=MomentHeadConfig(width=16, layers=1, heads=2),
            ),
            retriever=RetrieverConfig(
                vit=dataclasses.replace(VIT, map_head=True),
                text=TextConfig(vocab_size=VOCAB, max_tokens=16, width=16, layers=1, heads=2, mlp_width=24),
                frame_layers=1,
                max_frames=3,
            ),
            style=PromptStyle(frame_times=False),
            compute=Compute(dtype="float32"),
            mesh=MeshConfig(2, 2, 2),
            data=DataConfig(
                dialogues=str(self.folder / "data"),
                videos=str(self.folder / "features"),
                seq_len=320,
                video_slots=8,
                max_turns=4,
                max_candidates=4,
                frames=3,
                batch_size=8,
                threads=1,
            ),
            losses=LossConfig(contrastive=1.0),
            optim=OptimConfig(rules=RULES, peak_lr=1e-2, initial_lr=1e-3, final_lr=1e-3),
            eval=EvalConfig(every=0),
            checkpoint=CheckpointConfig(every=2, keep_last=10, keep_best=0),
            log=LogConfig(every=1, tensorboard=False),
            steps=STEPS,
            init=str(self.folder / "init"),
        )
        parts = {
            name: dataclasses.replace(getattr(config, name), **change) if isinstance(change, dict) else change
            for name, change in changes.items()
        }
        return dataclasses.replace(config, **parts)

    def without_dropout(self, **changes):
        """The same, and nothing random in a step."""
        model = self.config().model
        model = dataclasses.replace(
            model,
            qformer=dataclasses.replace(model.qformer, dropout=0.0),
            video_qformer=dataclasses.replace(model.video_qformer, dropout=0.0),
            lora=dataclasses.replace(model.lora, dropout=0.0),
        )
        return self.config(model=model, **changes)

    def pipeline(self, config, split="train"):
        """The batches of a split; plans are kept, as they depend on nothing but the rows' shape."""
        tokenizers = train.read_tokenizers(config, self.folder)
        return train.pipeline(config, tokenizers, make_mesh(config.mesh), split, self.folder)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Dialogues over 12 videos in three splits, the videos as features of a tower like VIT, and the tokenizers."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "manual").mkdir()
    rows = [sources.raw_dialogue(n, ("train", "train", "validation")[n % 3]) for n in range(72)]
    (folder / "manual" / "IVCR-200K.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    build("ivcr200k", manual_dir=folder / "manual", data_dir=folder / "data")
    write_videos(folder / "features")
    words = (
        "[INST] <<SYS>> You are an excellent video retrieval AI assistant. <</SYS>> Candidate videos : Current [/INST]"
    )
    texts = [message["value"] for row in rows for message in row["conversations"]]
    tokenizer = train_demo([words, "0123456789 frames sampled at seconds", *texts] * 3, VOCAB)
    world = World(folder)
    names = (bundle.TOKENIZER, bundle.RETRIEVER_TOKENIZER)
    write_init(folder / "init", world.config(), dict.fromkeys(names, tokenizer.proto))
    return world


def write_init(path, config, tokenizers, seed=0):
    """A model folder to train from, its parameters drawn so large that each matters."""
    models = {
        "model": config.model and (lambda: InterLLaVA(config.model, nnx.Rngs(0))),
        "retriever": config.retriever and (lambda: Retriever(config.retriever, nnx.Rngs(0))),
    }
    drawn = {name: make and _drawn(make, seed) for name, make in models.items()}
    bundle.save(path, config.bundle, **drawn, tokenizers=tokenizers)


def _drawn(make, seed):
    found = {}
    for path, variable in bundle.parameters(nnx.eval_shape(make)).items():
        # By the path alone, so that the same tower in two models has the same parameters.
        name = path.removeprefix("encoder.")
        value = np.random.default_rng((seed, zlib.crc32(name.encode()))).standard_normal(variable.shape, np.float32)
        last = path.rpartition(".")[2]
        found[path] = value * variable.shape[-2] ** -0.5 if last in ("kernel", "a", "b") else 0.2 * value
        if last == "scale":
            found[path] += 1
    # Frames that differ: of frames nearly alike, what attention among them has for gradients is a rest of sums that
    # cancel, and mostly rounding.
    if "moment.time.kernel" in found:
        found["moment.time.kernel"] *= 8
    return found


def write_videos(path, shape=(VIT.patches, VIT.width), seed=0, nan=None):
    """A feature store of random numbers; `nan` is the number of a video with one that is none."""
    rng = np.random.default_rng(seed)
    videos = []
    for number in range(sources.VIDEOS):
        frames = 2 if number == 0 else 4
        features = rng.standard_normal((frames, *shape), np.float32)
        if number == nan:
            features[:, 1] = np.nan
        videos.append((sources.name_of(number), 5.0 + number, np.arange(frames, dtype=np.float32), features))
    sources.write_features(path, videos, shape=shape, dtype=np.float32, fingerprint=f"random {shape} {seed} {nan}")


@pytest.fixture(scope="session")
def program():
    """(config, mesh) -> Program, made once for all runs that differ in what it does not know of."""
    made = {}

    def make(config, mesh):
        paths = dict.fromkeys(("dialogues", "videos", "tokenizer", "retriever_tokenizer"), "")
        parts = {"eval": EvalConfig(), "checkpoint": CheckpointConfig(), "log": LogConfig(), "init": "", "resume": ""}
        key = dataclasses.replace(config, data=dataclasses.replace(config.data, **paths), max_skipped=1, **parts), mesh
        if key not in made:
            made[key] = Program(*key)
        return made[key]

    return make


@pytest.fixture
def run(program, monkeypatch):
    """Trains in this process: (config, workdir)."""
    monkeypatch.setattr(train, "Program", program)
    return train.train


@pytest.fixture(scope="session")
def undisturbed(world, program, tmp_path_factory):
    """The folder of a run that nothing disturbed: six steps, with a checkpoint at every second."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Program", program)
        before = signal.getsignal(signal.SIGTERM)
        train.train(world.config(), workdir)
        signal.signal(signal.SIGTERM, before)
    found = told(workdir)
    assert len(found) == STEPS and all(np.isfinite(row["loss"]) for row in found)
    assert len({row["loss"] for row in found}) == STEPS and steps_of(workdir) == [2, 4, 6]
    return workdir


def at_step_four(undisturbed, workdir):
    """A copy of that run whose last checkpoint is of step four."""
    shutil.copytree(undisturbed, workdir)
    shutil.rmtree(workdir / "checkpoints" / "6")
    return workdir


@pytest.fixture(autouse=True)
def can_be_stopped():
    """Gives back the handler of SIGTERM that checkpoints take, or nobody could stop the tests."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def start(config, workdir, *more, devices=8, before=None):
    """Starts the command. `before` is called in the child, ahead of everything."""
    file = workdir.parent / f"{workdir.name}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({to_dict(config)!r})\n"
    )
    xla = re.sub(r"device_count=\d+", f"device_count={devices}", os.environ["XLA_FLAGS"])
    return subprocess.Popen(
        [sys.executable, "-m", "ivcr_jax.train", f"--config={file}", f"--workdir={workdir}", *more],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": xla, "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=before,
    )


def finish(process, status=0):
    """What a process said until it ended, with this status."""
    said, _ = process.communicate(timeout=300)
    assert process.returncode == status, said[-4000:]
    return said


def wait_for(process, workdir, step, saved=False):
    """Waits until a run has written of that step, and has a whole checkpoint if it is to have `saved` one."""
    while not lines(workdir) or lines(workdir)[-1]["step"] < step or saved and not steps_of(workdir):
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.02)


def lines(workdir):
    """The whole lines of metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def told(workdir):
    """What a step computed, by step; each must be there once, and in order."""
    rows = [row for row in lines(workdir) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    timed = ("time", "step_seconds", "memory_bytes", "loader_wait_share")
    return [{k: v for k, v in row.items() if k not in timed and not k.endswith("_per_second")} for row in rows]


def steps_of(workdir):
    """The whole checkpoints that are there."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit())
