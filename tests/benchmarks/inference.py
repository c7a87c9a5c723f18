"""What conversing costs: `python -m tests.benchmarks.inference [--only=decode] [--rounds=N] [--threads=N]`.

decode, prefill: our engine and transformers' LlamaForCausalLM with its cache of keys, of one size and with the same
weights, in turn in one process; that both write the same tokens, and find the same states, is checked. turns, rerank,
batch: ours over a corpus of made-up videos, by an export of random weights. start: from a cold process to the first
answer. Each is seconds of wall time and core-seconds of the process, the median of rounds with the smallest and the
largest. Prints one line of JSON.
"""

import functools
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import torch
from absl import app, flags
from flax import nnx

from ivcr_jax import bundle, command, index
from ivcr_jax.convert import layouts
from ivcr_jax.data.dialogue import Intent
from ivcr_jax.data.prompt import PromptStyle
from ivcr_jax.data.tokenizer import train_demo
from ivcr_jax.infer import generate, grammar
from ivcr_jax.infer.assistant import Assistant
from ivcr_jax.infer.corpus import Corpus
from ivcr_jax.infer.engine import Engine
from ivcr_jax.infer.generate import Script
from ivcr_jax.infer.session import Session
from ivcr_jax.infer.turn import Message
from ivcr_jax.models.heads import MomentHeadConfig, RankHeadConfig
from ivcr_jax.models.interllava import InterLLaVA, InterLLaVAConfig
from ivcr_jax.models.layers import Compute
from ivcr_jax.models.llama import Llama, LlamaConfig
from ivcr_jax.models.qformer import QFormerConfig
from ivcr_jax.models.retriever import Retriever, RetrieverConfig, TextConfig
from ivcr_jax.models.video_encoder import VideoEncoderConfig
from ivcr_jax.models.vit import ViT, ViTConfig
from tests.data.video_fixtures import write_video
from tests.models import torch_reference

FLAGS = flags.FLAGS
F32 = Compute(dtype="float32")
BATCHES = (1, 8)
WRITTEN, PROMPT, PREFILL = 32, 16, 512  # tokens
LLAMA = LlamaConfig(vocab_size=32000, added_tokens=0, width=512, layers=8, heads=8, kv_heads=8, mlp_width=1408)
SMALL = LlamaConfig(width=256, layers=4, heads=4, kv_heads=4, mlp_width=704)
WIDE = LlamaConfig(width=1024, layers=4, heads=16, kv_heads=16, mlp_width=2816)
VIT = ViTConfig(image_size=32, patch_size=16, width=32, layers=1, heads=2, mlp_width=64, map_head=True)
QFORMER = QFormerConfig(queries=16, width=32, layers=1, heads=2, mlp_width=64, cross_every=1, vocab_size=0, max_text=0)
FRAMES, VIDEOS = 16, 12
WORDS = ["Find a video of a fish that swims to the left.", "When does it jump?", "The best match is video 1 at 2.0s."]
SAID = "It is in video 1, and at 1.0s-2.0s it turns, as you can see there and in the frames before."


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of wall time, core-seconds."""
    wall, core = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - core


def spread(values: Sequence[float]) -> list[float]:
    """Median, smallest, largest."""
    return [float(f"{value:.3g}") for value in (np.median(values), min(values), max(values))]


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> dict[str, list[float]]:
    """Times of both in turn, and how many times as fast ours is. Both have been run once."""
    seconds = np.array([[timed(ours), timed(theirs)] for _ in range(rounds)])  # [rounds, 2, 2]
    found = {}
    for kind, name in enumerate(("wall", "core")):
        found[f"times as fast, {name}"] = spread(seconds[:, 1, kind] / seconds[:, 0, kind])
        for side, of in enumerate(("ours", "theirs")):
            found[f"{name} seconds, {of}"] = spread(seconds[:, side, kind])
    return found


class Count:
    """Writes what the model chooses, WRITTEN tokens."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    @property
    def done(self) -> bool:
        return len(self.ids) == WRITTEN

    def take(self, free: int, barred: int) -> int:
        del barred
        self.ids.append(free)
        return free


@functools.cache
def pair() -> tuple[Engine, Any]:
    """Our engine, and Hugging Face's model with the same weights."""
    theirs = torch_reference.hf_llama(LLAMA, seed=1).eval()
    config = model_config(LLAMA)
    ours = nnx.eval_shape(lambda: InterLLaVA(config, nnx.Rngs(0), F32))
    llama = nnx.eval_shape(lambda: Llama(LLAMA, nnx.Rngs(0), F32))
    ours.llama = torch_reference.fill(llama, [(layouts.llama(LLAMA), theirs.state_dict())], prefix="llama.")
    definition, state = nnx.split(ours)  # of the rest nothing is run
    nothing = jax.tree.map(lambda x: x if isinstance(x, jax.Array) else np.zeros(x.shape, x.dtype), state)
    return Engine(nnx.merge(definition, nothing)), theirs


def model_config(llama: LlamaConfig) -> InterLLaVAConfig:
    """The dialogue model with this decoder."""
    return InterLLaVAConfig(
        vit=ViTConfig(image_size=32, patch_size=16, width=32, layers=1, heads=2, mlp_width=64),
        qformer=QFORMER,
        video_qformer=QFORMER,
        video=VideoEncoderConfig(max_frames=FRAMES, window=8, stride=8),
        llama=llama,
        rank=RankHeadConfig(width=32, heads=2),
        moment=MomentHeadConfig(width=32, layers=1, heads=2, first_width=VIT.width),
    )


def decode(rounds: int) -> dict[str, Any]:
    """Greedy writing, both behind a short prompt."""
    engine, model = pair()
    barred = np.zeros(LLAMA.vocab_size, bool)

    def ours(ids: np.ndarray) -> np.ndarray:
        context, answers = engine.context(len(ids)), [Count() for _ in ids]
        engine.read(context, ids.tolist())
        for _ in engine.write(context, answers, barred):
            pass
        return np.array([answer.ids for answer in answers])

    @torch.no_grad()
    def theirs(ids: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(ids)
        options = {"max_new_tokens": WRITTEN, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        return model.generate(given, attention_mask=torch.ones_like(given), **options)[:, PROMPT:].numpy()

    found = {}
    for batch in BATCHES:
        ids = np.random.default_rng(batch).integers(5, LLAMA.vocab_size, (batch, PROMPT))
        assert (ours(ids) == theirs(ids)).all(), "the same tokens"
        found[f"{batch} rows"] = compare(lambda: ours(ids), lambda: theirs(ids), rounds)  # noqa: B023
        per_second = WRITTEN * batch / found[f"{batch} rows"]["wall seconds, ours"][0]
        found[f"{batch} rows"]["tokens a second, ours"] = spread([per_second])[:1]
    return found


def prefill(rounds: int) -> dict[str, Any]:
    """Reading, to the state of the last token."""
    engine, model = pair()

    def ours(ids: np.ndarray) -> np.ndarray:
        context = engine.context(len(ids))
        engine.read(context, ids.tolist())
        return np.asarray(context.hidden)

    @torch.no_grad()
    def theirs(ids: np.ndarray) -> np.ndarray:
        return model.model(torch.from_numpy(ids), use_cache=True).last_hidden_state[:, -1].numpy()

    found = {}
    for batch in BATCHES:
        ids = np.random.default_rng(batch).integers(5, LLAMA.vocab_size, (batch, PREFILL))
        np.testing.assert_allclose(ours(ids), theirs(ids), rtol=1e-3, atol=1e-3)
        found[f"{batch} rows"] = compare(lambda: ours(ids), lambda: theirs(ids), rounds)  # noqa: B023
    return found


def made(folder: pathlib.Path, llama: LlamaConfig) -> tuple[pathlib.Path, pathlib.Path]:
    """An export of random weights and a corpus of made-up videos."""
    tokenizer = train_demo([*WORDS, SAID, "This frame is sampled at 0123456789. second."] * 3, 400)
    words = tokenizer.vocab_size - len(tokenizer.special_tokens)
    model = model_config(LlamaConfig(**{**llama.__dict__, "vocab_size": words, "added_tokens": 5}))
    retriever = RetrieverConfig(
        vit=VIT,
        text=TextConfig(vocab_size=words, max_tokens=32, width=32, layers=1, heads=2, mlp_width=64),
        frame_layers=1,
        max_frames=FRAMES,
    )
    export, videos, corpus = (folder / name for name in ("export", "videos", "corpus"))
    videos.mkdir(parents=True)
    bundle.save(
        export,
        bundle.BundleConfig(model, retriever, PromptStyle()),
        model=bundle.weights(InterLLaVA(model, nnx.Rngs(0))),
        retriever=bundle.weights(Retriever(retriever, nnx.Rngs(0))),
        tokenizers=dict.fromkeys((bundle.TOKENIZER, bundle.RETRIEVER_TOKENIZER), tokenizer.proto),
    )
    for number in range(VIDEOS):
        write_video(videos / f"{number}.mp4", count=20 + number)
    index.add(export, videos, corpus)
    return export, corpus


class Talk:
    """An assistant over a made corpus, with answers of one length. Attributes: frames: that went through its ViTs."""

    def __init__(self, folder: pathlib.Path, llama: LlamaConfig = SMALL) -> None:
        export, corpus = made(folder, llama)
        self.frames = 0
        real_vit = ViT.__call__

        def counted(vit: ViT, images: jax.Array) -> jax.Array:
            self.frames += len(images)  # where a program is compiled, which the first round does with all
            return real_vit(vit, images)

        ViT.__call__ = counted  # type: ignore[method-assign]
        self.assistant = Assistant(export)
        self.corpus = Corpus.open(corpus, self.assistant.fingerprint)
        real = grammar.Answer
        grammar.Answer = lambda of, language, **_: real(of, language, fixed=SAID)  # type: ignore[assignment, misc]

    def turns(self, rounds: int) -> dict[str, Any]:
        """A search and six moments; the seventh turn against the second."""
        seconds, tokens = [], []
        for _ in range(rounds + 1):
            session, taken, read = Session(self.assistant, self.corpus), [], []
            for place in range(7):
                message = Message("When does it jump?", Intent.MOMENT if place else Intent.VIDEO)
                self.assistant.engine.counts.clear()
                taken.append(timed(lambda: session.say(message)))  # noqa: B023
                read.append(self.assistant.engine.counts["text_tokens"])
            seconds.append(taken)
            tokens.append(read)
        assert len({line[1] for line in tokens} | {line[6] for line in tokens}) == 1, "as many new tokens"
        times = np.array(seconds[1:])  # the first round compiles
        return {
            "turn 7 over turn 2, wall": spread(times[:, 6, 0] / times[:, 1, 0]),
            "turn 7 over turn 2, core": spread(times[:, 6, 1] / times[:, 1, 1]),
            "wall seconds, turn 2": spread(times[:, 1, 0]),
            "tokens of a turn": tokens[0][1],
        }

    def rerank(self, rounds: int) -> dict[str, Any]:
        """A search among ten, whose blocks are at hand or not."""
        found: dict[str, Any] = {}
        self.frames = 0
        seconds: dict[str, list[tuple[float, float]]] = {"at hand": [], "not at hand": []}
        for number in range(rounds + 1):
            for name, taken in seconds.items():
                if name == "not at hand":
                    self.assistant._blocks.clear()
                self.assistant.engine.counts.clear()
                session = Session(self.assistant, self.corpus)
                message = Message(WORDS[0], Intent.VIDEO)
                once = timed(lambda: session.say(message))  # noqa: B023
                if number:  # the first round compiles
                    taken.append(once)
                    found[f"visual tokens, {name}"] = self.assistant.engine.counts["visual_tokens"]
                    assert len(session.turns[0].ranking) == 10
        found["frames"] = self.frames
        for kind, unit in enumerate(("wall", "core")):
            for name, taken in seconds.items():
                found[f"{unit} seconds, {name}"] = spread([each[kind] for each in taken])
        ready = [turn.timings for turn in (Session(self.assistant, self.corpus).say(WORDS[0]) for _ in range(rounds))]
        stages = ("search", "read", "rank", "write")
        found["wall seconds by stage, at hand"] = {stage: spread([each[stage] for each in ready]) for stage in stages}
        return found

    def batch(self, rounds: int) -> dict[str, Any]:
        """Dialogues of three turns, eight of them one at a time and at once."""
        messages = (Message(WORDS[0], Intent.VIDEO), *[Message(WORDS[1], Intent.MOMENT)] * 2)
        scripts = [Script(str(number), messages, number) for number in range(8)]

        def run(batch: int) -> list[Any]:
            rows = []
            for first in range(0, len(scripts), batch):
                group = scripts[first : first + batch]
                rows += generate._converse([Session(self.assistant, self.corpus) for _ in group], group)
            return rows

        alone, together = run(1), run(8)
        same = [turn["text"] == other["text"] and turn["video"] == other["video"]
                for row, others in zip(alone, together, strict=True)
                for turn, other in zip(row["turns"], others["turns"], strict=True)]  # fmt: skip
        found = compare(lambda: run(8), lambda: run(1), rounds)
        named = {
            name.replace("ours", "at once").replace("theirs", "one by one"): value for name, value in found.items()
        }
        return {**named, "dialogues": len(scripts), "share of turns alike": float(np.mean(same))}


def start(folder: pathlib.Path, rounds: int) -> dict[str, Any]:
    """A cold process, its compiled programs kept from the one before."""
    export, corpus = made(folder, LlamaConfig(width=32, layers=2, heads=2, kv_heads=2, mlp_width=64))
    (folder / "s.txt").write_text(f"{WORDS[0]}\n")
    line = [sys.executable, "-m", "ivcr_jax.chat", f"--export={export}", f"--corpus={corpus}", "--json"]
    line += [f"--script={folder / 's.txt'}", f"--cache={folder / 'cache'}"]
    seconds = []
    for _ in range(rounds + 1):
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL) as process:
            answer = process.stdout.readline() if process.stdout else ""
            wall = time.perf_counter() - begun
        assert json.loads(answer)["video"] and process.returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append((wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
    return {
        "wall seconds": spread([wall for wall, _ in seconds[1:]]),
        "core seconds, to the end": spread([core for _, core in seconds[1:]]),
        "wall seconds, nothing kept": seconds[0][0],
    }


def main(argv: list[str]) -> None:
    """Prints what was measured."""
    command.refuse_arguments(argv)
    command.quiet()
    rounds, found = FLAGS.rounds, {}
    torch.set_num_threads(FLAGS.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        talk = functools.cache(lambda: Talk(folder / "talk"))
        parts: dict[str, Callable[[], Any]] = {
            "decode": lambda: decode(rounds),
            "prefill": lambda: prefill(rounds),
            "start": lambda: start(folder / "start", rounds),
            # What grows is attention, and the narrower the decoder, the larger its share.
            "turns": lambda: {
                f"width {llama.width}": Talk(folder / str(llama.width), llama).turns(rounds) for llama in (SMALL, WIDE)
            },
            "rerank": lambda: talk().rerank(rounds),
            "batch": lambda: talk().batch(rounds),
        }
        for name in [name for name in parts if not FLAGS.only or name in FLAGS.only]:
            found[name] = parts[name]()
            print(f"{name}: {json.dumps(found[name])}", file=sys.stderr, flush=True)
    print(json.dumps({"cores": os.cpu_count(), "threads of PyTorch": FLAGS.threads, **found}))


if __name__ == "__main__":
    flags.DEFINE_multi_enum("only", None, ["decode", "prefill", "turns", "rerank", "batch", "start"], "These alone.")
    flags.DEFINE_integer("rounds", 3, "How often everything is timed, in turn.")
    flags.DEFINE_integer("threads", 2, "Of PyTorch.")
    app.run(main)
