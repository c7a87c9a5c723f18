"""What a train step costs against the published scheme: `python -m tests.benchmarks.scheme [--rounds=N]`.

The published system makes one training item of each assistant turn: the dialogue up to it is run again, every video
token of it encodes its video from frames again, however often it was encoded before, and the last answer alone is
learnt. Here it is in PyTorch, of Hugging Face's modules, and in our own, of the same small dimensions and with the same
weights; and from there to our step one change after the other. All learn the same answers' tokens, which is checked, as
is that the losses are equal where the same is computed. Prints tables and, last, one line of JSON. README.md beside
this file says what was found.

Costs are core-seconds, PyTorch with one thread: what else runs on the machine does not count, and threads that wait for
each other do not. `--threads=2` measures seconds of wall time with as many threads instead, and wants a quiet machine.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

if sys.version_info < (3, 12):  # as in tests/models/conftest.py: half the time to compile, and the steps no slower
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers
from absl import app, flags
from flax import nnx

from ivcr_jax import flops, losses
from ivcr_jax.convert import layouts
from ivcr_jax.data import batches, encoding
from ivcr_jax.data.batches import BatchShape, PackConfig
from ivcr_jax.data.dialogue import Dialogue, Intent, Turn, video_number
from ivcr_jax.data.encoding import EncodingConfig
from ivcr_jax.data.prompt import PromptStyle
from ivcr_jax.data.store import StoredVideo
from ivcr_jax.data.tokenizer import Tokenizer, train_demo
from ivcr_jax.models.heads import MomentHeadConfig, RankHeadConfig
from ivcr_jax.models.interllava import InterLLaVA, InterLLaVAConfig
from ivcr_jax.models.layers import Compute
from ivcr_jax.models.llama import LlamaConfig
from ivcr_jax.models.lora import LoraConfig
from ivcr_jax.models.qformer import QFormerConfig
from ivcr_jax.models.video_encoder import VideoEncoderConfig
from ivcr_jax.models.vit import ViTConfig
from ivcr_jax.training import DataConfig, TrainConfig
from tests.models import torch_reference

FLAGS = flags.FLAGS
flags.DEFINE_integer("rounds", 3, "How often everything is timed, in turn.")
flags.DEFINE_integer("threads", 1, "Of PyTorch. With 1, core-seconds are measured; with more, seconds of wall time.")

FRAMES = 16
DIALOGUES = 1  # what is said changes no cost
TURNS = 4  # find, locate, find a similar one, locate
CANDIDATES = 10
AGAIN = 3  # candidates of a later list that were shown before
# Dialogues of so many turns in IVCR-200K, in thousands, read off the paper's figure 4.
PUBLISHED_TURNS = {1: 37.0, 2: 31.0, 3: 20.5, 4: 11.7, 5: 6.0, 6: 5.5, 7: 1.3}

# In the published proportions: of our step's work the ViT's is four fifths (published 83 %), visual positions are about
# as many as text, heads of the decoder are few and wide. The image Q-Former reads the time sentences, on both sides.
CONFIG = InterLLaVAConfig(
    vit=ViTConfig(image_size=112, patch_size=14, width=160, layers=4, heads=4, mlp_width=640),
    qformer=QFormerConfig(queries=8, width=64, layers=2, heads=4, mlp_width=256, cross_every=2, max_text=32),
    video_qformer=QFormerConfig(
        queries=16, width=64, layers=1, heads=4, mlp_width=256, cross_every=1, vocab_size=0, max_text=0
    ),
    video=VideoEncoderConfig(max_frames=FRAMES, window=8, stride=8),
    llama=LlamaConfig(vocab_size=600, width=128, layers=2, heads=2, kv_heads=2, mlp_width=344),
    lora=LoraConfig(rank=8, alpha=8.0),
    rank=RankHeadConfig(width=32, heads=4),
    moment=MomentHeadConfig(width=32, layers=1, heads=4),
)
F32 = Compute(dtype="float32", attention="xla")
STYLE = PromptStyle(localized=False)
FROZEN = r"encoder\.vit(_norm)?\..*|llama\.(?!.*\.lora\.).*"

VARIANTS = {
    "peer": "the published scheme in PyTorch",
    "items": "(0) the published scheme in our modules",
    "whole": "(1) the whole dialogue in one pass",
    "slots": "(2) and each distinct video encoded once",
    "blocks": "(3) and its block once in the decoder",
    "cached": "(4) and the ViT's features computed before",
}
LAYOUTS = {"items": "inline", "whole": "inline", "slots": "inline", "blocks": "isolated", "cached": "isolated"}
PER_VIDEO = (
    "frames",
    "features",
    "frame_times",
    "frame_mask",
    "frame_text",
    "durations",
    "video_mask",
    "video_numbers",
)
PER_TURN = (
    "turn_mask",
    "turn_segments",
    "turn_intents",
    "turn_languages",
    "turn_states",
    "turn_records",
    "turn_numbers",
    "turn_videos",
    "candidate_slots",
    "candidate_blocks",
    "candidate_targets",
    "moment_slots",
    "moment_blocks",
    "moment_spans",
)
Row = dict[str, np.ndarray]


# Dialogues ------------------------------------------------------------------------------------------------------------


def make_dialogues(seed: int) -> list[Dialogue]:
    """As long as any published: find one of ten, locate, find a similar one of ten, three of them shown before, ..."""
    rng = np.random.default_rng(seed)
    things = ["dog", "child", "woman", "man", "chef", "player", "band", "cat", "driver", "teacher"]
    acts = ["runs over the grass", "opens a red door", "cuts an apple", "plays the drums", "falls into the water"]
    made = []
    for number in range(DIALOGUES):
        videos = iter(f"made/{number}-{place}" for place in range(1000))
        shown: list[str] = []
        turns: list[Turn] = []
        for place in range(max(PUBLISHED_TURNS)):
            thing, act = rng.choice(things), rng.choice(acts)
            if place % 2:
                span = (float(rng.integers(1, 9)), float(rng.integers(10, 19)))
                said = f"Query content found in video 1 at {span[0]}s-{span[1]}s. The {thing} {act} there."
                turns.append(
                    Turn(f"When is it that the {thing} {act}?", said, Intent.MOMENT, "en", turns[-1].video_id, (), span)
                )
                continue
            old = rng.choice([name for name in shown if name != turns[-1].video_id], AGAIN, False) if shown else []
            new = [next(videos) for _ in range(CANDIDATES - len(old))]
            candidates = rng.permutation([*old, *new]).tolist()
            truth = str(rng.choice(new))
            shown += new
            asked = f"Find a similar video, but where a {thing} {act}." if place else f"Find where a {thing} {act}."
            said = f"The intent is video retrieval. The query happens in video 1. In it a {thing} {act}, as was asked."
            turns.append(Turn(asked, said, Intent.VIDEO, "en", truth, tuple(candidates)))
        made.append(Dialogue(str(number), "train", 1, tuple(turns)))
    return made


class Videos:
    """Random videos by id, as packing reads them from a store."""

    kind, dtype = "frames", np.dtype(np.uint8)
    item_shape = (CONFIG.vit.image_size, CONFIG.vit.image_size, 3)

    def __init__(self, names: Sequence[str]) -> None:
        self.number = {name: number for number, name in enumerate(names)}

    def read(self, name: str) -> StoredVideo:
        """Its frames u8[T, H, W, 3], one each 1.25 s."""
        rng = np.random.default_rng(self.number[name])
        frames = rng.integers(0, 256, (FRAMES, *self.item_shape), np.uint8)
        return StoredVideo(np.arange(FRAMES, dtype=np.float32) * 1.25 + 0.6, FRAMES * 1.25, frames)

    def decode(self, stored: StoredVideo, chosen: np.ndarray, out: np.ndarray) -> None:
        """Writes the chosen frames."""
        out[: len(chosen)] = stored.payload[chosen]


def make_tokenizer(dialogues: Sequence[Dialogue]) -> Tokenizer:
    """Of the vocabulary's size, trained on what is written in the dialogues."""
    wording = (
        "[INST] <<SYS>>\nYou are an excellent video retrieval AI assistant.\n<</SYS>>\n Candidate videos : , . "
        "Current video : The video contains 16 frames sampled at 0.6, 1.9 seconds. This frame is sampled at 4.4 second."
    )
    texts = [text for dialogue in dialogues for turn in dialogue.turns for text in (turn.user, turn.answer)]
    tokenizer = train_demo([wording, *texts] * 3, CONFIG.llama.vocab_size)
    if tokenizer.vocab_size > CONFIG.llama.vocab_size + CONFIG.llama.added_tokens:
        raise RuntimeError(f"{tokenizer.vocab_size} ids; the model has rows for fewer")
    return tokenizer


@dataclasses.dataclass(frozen=True)
class Content:
    """What rows are made of."""

    dialogues: Sequence[Dialogue]
    videos: Videos
    tokenizer: Tokenizer

    def rows(self, turns: int, layout: str) -> list[Row]:
        """The first turns of each dialogue, in a row of its own, all rows of the shape that the longest needs."""
        cut = [dataclasses.replace(dialogue, turns=dialogue.turns[:turns]) for dialogue in self.dialogues]
        width = CONFIG.video.windows(FRAMES) * CONFIG.video_qformer.queries
        config = PackConfig(EncodingConfig(layout, width, CANDIDATES, STYLE), 4096, 64, turns, FRAMES)
        shape = BatchShape.of(self.videos, self.tokenizer, config)

        def fill(config: PackConfig) -> list[Row]:
            made = []
            for number, dialogue in enumerate(cut):
                row = batches.empty_batch(1, config, shape)
                content = [(number, dialogue)]
                for work in batches.fill_row(row, 0, content, self.videos, self.tokenizer, config, None):
                    self.videos.decode(*work)
                made.append(row)
            return made

        ample = fill(config)
        length = max(int((row["segment_ids"] > 0).sum()) for row in ample)
        slots = max(int(row["video_mask"].sum()) for row in ample)
        return fill(dataclasses.replace(config, seq_len=length, video_slots=slots))


def own_slots(row: Row) -> Row:
    """The inline row with a slot for each mention of a video, so that each mention is encoded."""
    visual = row["video_slots"] >= 0
    begins = visual & (row["video_offsets"] == 0)
    mention = np.cumsum(begins, axis=1, dtype=np.int32) - 1
    shown = row["video_slots"][begins]
    out = {name: array[:, shown] if name in PER_VIDEO else array for name, array in row.items()}
    out["video_slots"] = np.where(visual, mention, -1)
    for slots, blocks in (("candidate_slots", "candidate_blocks"), ("moment_slots", "moment_blocks")):
        out[slots] = np.where(row[blocks] >= 0, mention[0][np.maximum(row[blocks], 0)], -1)
    return out


def last_turn_only(row: Row) -> Row:
    """The row of which the last turn alone is learnt, by all losses."""
    out = {name: array[:, -1:] if name in PER_TURN else array for name, array in row.items()}
    before = np.arange(row["loss_mask"].shape[1]) < out["turn_states"]
    return out | {"loss_mask": row["loss_mask"] & ~before}


# The peer -------------------------------------------------------------------------------------------------------------


class Peer(torch.nn.Module):
    """The published model, of Hugging Face's modules: one item, batch 1, its last answer learnt."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = torch_reference.Vision(CONFIG, seed=1)
        self.llama = torch_reference.hf_llama(CONFIG.llama, seed=2)
        c = CONFIG.lora
        self.factors = torch_reference.adapt(self.llama, "qkvo", c.rank, c.alpha / c.rank, seed=3)
        for module in (self.vision.vit, self.vision.ln_vision, self.llama):
            module.requires_grad_(False)
        self.trained = [p for p in self.parameters() if p.requires_grad]
        self.trained += [factor.requires_grad_() for factor in self.factors.values()]
        self.mean, self.std = (torch.tensor(x) for x in (CONFIG.vit.pixel_mean, CONFIG.vit.pixel_std))

    def ours(self) -> InterLLaVA:
        """Our model with these weights."""
        adapters = {f"llama_model.base_model.model.{key}.default.weight": x for key, x in self.factors.items()}
        # The image Q-Former is in both files; here it is read from the first.
        first = layouts.instructblip(CONFIG)
        rest = {key: pieces for key, pieces in layouts.timechat(CONFIG).tensors.items() if key not in first.tensors}
        return torch_reference.fill(
            nnx.eval_shape(lambda: InterLLaVA(CONFIG, nnx.Rngs(0), F32)),
            [
                (layouts.eva(CONFIG.vit), self.vision.eva()),
                (first, self.vision.instructblip()),
                (layouts.Layout("timechat", rest), self.vision.video_side() | adapters),
                (layouts.llama(CONFIG.llama), self.llama.state_dict()),
            ],
            unused=torch_reference.eva_unused(CONFIG.vit),
            new=r"(rank|moment)\..*",
        )

    def drop_unused(self) -> None:
        """Takes out the last block and the last norm of the tower, which EVA's file has and nobody runs."""
        self.vision.vit.encoder.layers = self.vision.vit.encoder.layers[:-1]
        self.vision.vit.post_layernorm = torch.nn.Identity()

    def encode(self, frames: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """A video's u8[T, H, W, 3] and its frames' sentences i64[T, L] -> visual tokens f32[K, D]."""
        vision, queries = self.vision, CONFIG.qformer.queries
        with torch.no_grad():
            pixels = (frames / 255 - self.mean) / self.std
            seen = vision.ln_vision(vision.vit(pixels.permute(0, 3, 1, 2)).last_hidden_state)
        read = vision.qformer(
            input_ids=text,
            attention_mask=torch.cat([torch.ones(FRAMES, queries, dtype=torch.long), (text > 0).long()], dim=1),
            query_embeds=vision.query_tokens.expand(FRAMES, -1, -1),
            encoder_hidden_states=seen,
        ).last_hidden_state[:, :queries]
        placed = read + vision.frame_positions.weight[:, None]
        windows = placed.reshape(FRAMES // CONFIG.video.window, -1, placed.shape[-1])
        tokens = vision.video_qformer(
            input_ids=None,
            query_embeds=vision.video_query_tokens.expand(len(windows), -1, -1),
            encoder_hidden_states=windows,
        ).last_hidden_state
        return vision.llama_proj(tokens).flatten(0, 1)

    def step(self, item: Mapping[str, Any]) -> float:
        """Forward and backward. Returns the mean loss of the answer's tokens."""
        for parameter in self.trained:
            parameter.grad = None
        videos = [self.encode(frames, text) for frames, text in item["videos"]]
        x = self.llama.model.embed_tokens(item["tokens"])
        x[item["visual"]] = torch.cat(videos)
        loss = self.llama(inputs_embeds=x, labels=item["labels"], use_cache=False).loss
        loss.backward()
        return float(loss.detach())


def peer_item(row: Row) -> dict[str, Any]:
    """A row of `own_slots` and `last_turn_only` as the peer reads it, without padding."""
    length = int((row["segment_ids"] > 0).sum())
    visual = row["video_slots"][:, :length] >= 0
    labels = np.full((1, length), -100)
    labels[:, 1:] = np.where(row["loss_mask"], row["targets"], -100)[:, : length - 1]
    text = row["frame_text"][0][:, :, : row["frame_text"][0].any((0, 1)).sum()]
    return {
        "tokens": torch.from_numpy(row["tokens"][:, :length].astype(np.int64)),
        "visual": torch.from_numpy(visual),
        "labels": torch.from_numpy(labels),
        "videos": list(zip(torch.from_numpy(row["frames"][0]), torch.from_numpy(text.astype(np.int64)), strict=True)),
    }


# Ours -----------------------------------------------------------------------------------------------------------------


class Ours:
    """Forward and backward of our model, compiled once for each shape and layout."""

    def __init__(self, model: InterLLaVA) -> None:
        def trained(path: tuple[Any, ...], _: Any) -> bool:
            return not re.fullmatch(FROZEN, ".".join(map(str, path)))

        _, self.trained, self.frozen = nnx.split(model, trained, ...)
        self._steps = {layout: self._step(layout, trained) for layout in ("inline", "isolated")}
        self.features = jax.jit(lambda frames: jax.lax.map(model.encoder.vit, frames))

    def _step(self, layout: str, trained: Callable[..., bool]) -> Callable[..., Any]:
        config = dataclasses.replace(CONFIG, layout=layout)
        definition, *_ = nnx.split(nnx.eval_shape(lambda: InterLLaVA(config, nnx.Rngs(0), F32)), trained, ...)

        def loss(trained: Any, frozen: Any, batch: losses.Batch) -> tuple[jax.Array, losses.Sums]:
            model = nnx.merge(definition, trained, frozen)
            sums = losses.of_dialogues(model(batch), batch, model.llama.logits)
            return jnp.sum(jnp.stack(list(sums.values()))), sums

        return jax.jit(jax.grad(loss, has_aux=True))

    def step(self, layout: str, row: Mapping[str, jax.Array]) -> tuple[Any, losses.Sums]:
        """The gradients of the trained parameters, and the losses as sums."""
        return jax.block_until_ready(self._steps[layout](self.trained, self.frozen, row))

    def cached(self, row: Row) -> Row:
        """The row with the ViT's features in the place of the frames."""
        rest = {name: array for name, array in row.items() if name != "frames"}
        return rest | {"features": np.asarray(self.features(row["frames"][0]))[None]}


# Counting -------------------------------------------------------------------------------------------------------------


def positions(rows: Sequence[Row]) -> np.ndarray:
    """Of rows together: frames, visual positions, text positions."""
    found = np.zeros(3, int)
    for row in rows:
        there, visual = row["segment_ids"] > 0, row["video_slots"] >= 0
        found += row["frame_mask"].sum(), visual.sum(), (there & ~visual).sum()
    return found


def arithmetic(config: InterLLaVAConfig, content: Content, frames: int) -> dict[str, dict[int, float]]:
    """FLOPs of the first turns of a dialogue at a model's sizes: by variant, by number of turns.

    By the formula of `flops.train_step`, without padding.
    """
    width = config.video.windows(frames) * config.video_qformer.queries
    abstract = nnx.state(nnx.eval_shape(lambda: InterLLaVA(config, nnx.Rngs(0))), nnx.Param)
    paths = [".".join(map(str, path)) for path, _ in nnx.to_flat_state(abstract)]
    factors = {f"model.{path}": 0.0 if re.fullmatch(FROZEN, path) else 1.0 for path in paths}
    sentence = encoding.frame_text_length(content.tokenizer, STYLE)
    times = dict.fromkeys(content.videos.number, [12.3] * frames)
    (dialogue, *_) = content.dialogues
    found: dict[str, dict[int, float]] = {variant: {0: 0.0} for variant in VARIANTS if variant != "peer"}
    for turns in range(1, len(dialogue.turns) + 1):
        for variant, by_turns in found.items():
            layout = LAYOUTS[variant]
            style = EncodingConfig(layout, width, CANDIDATES, STYLE)
            shown = encoding.show(
                dataclasses.replace(dialogue, turns=dialogue.turns[:turns]), style, insert_truth=False
            )
            mentions = [name for turn in shown for name in turn.videos]
            data = DataConfig(
                seq_len=len(encoding.encode(shown, content.tokenizer, style, times).tokens),
                video_slots=len(mentions if variant in ("items", "whole") else set(mentions)),
                max_turns=1 if variant == "items" else turns,
                frames=frames,
                batch_size=1,
            )
            run = TrainConfig(dataclasses.replace(config, layout=layout), None, STYLE, data=data)
            work = flops.train_step(run, factors, frame_text=sentence, features=variant == "cached")
            by_turns[turns] = work + (by_turns[turns - 1] if variant == "items" else 0)
    return found


# The run --------------------------------------------------------------------------------------------------------------


def prepare(content: Content) -> tuple[dict[str, list[Row]], dict[str, list[Callable[[], Any]]]]:
    """By variant: the rows of all dialogues, and the steps over them. Of items: all first turns, all second, ..."""
    peer = Peer()
    ours = Ours(peer.ours())
    peer.drop_unused()
    inline = content.rows(TURNS, "inline")
    items = [row for turns in range(1, TURNS + 1) for row in content.rows(turns, "inline")]
    items = [last_turn_only(own_slots(row)) for row in items]
    isolated = content.rows(TURNS, "isolated")
    rows = {
        "peer": items,
        "items": items,
        "whole": [own_slots(row) for row in inline],
        "slots": inline,
        "blocks": isolated,
        "cached": [ours.cached(row) for row in isolated],
    }

    def step(variant: str, row: Row) -> Callable[[], Any]:
        if variant == "peer":
            return functools.partial(peer.step, peer_item(row))
        return functools.partial(ours.step, LAYOUTS[variant], jax.device_put(row))

    return rows, {variant: [step(variant, row) for row in some] for variant, some in rows.items()}


def check(content: Content, rows: Mapping[str, list[Row]], results: Mapping[str, list[Any]]) -> dict[str, float]:
    """That all variants learn the same tokens and, where they compute the same, find the same losses and gradients.

    Returns the largest relative differences. Raises AssertionError where there is more than rounding.
    """
    worst = {"lm": 0.0, "gradient": 0.0}
    norm = optax.global_norm

    def learnt(variant: str, number: int) -> int:
        return sum(int(row["loss_mask"].sum()) for row in rows[variant][number::DIALOGUES])

    for number, dialogue in enumerate(content.dialogues):
        items = results["items"][number::DIALOGUES]
        expected = learnt("items", number)
        # In the isolated layout the digits of the video's number are the rank head's to learn.
        shown = encoding.show(dialogue, EncodingConfig(), insert_truth=False)[:TURNS]
        digits = sum(end - start for _, start, end in (video_number(item.turn.answer) or (0, 0, 0) for item in shown))
        for variant in ("whole", "slots", "blocks", "cached"):
            found = learnt(variant, number)
            wanted = expected - (digits if LAYOUTS[variant] == "isolated" else 0)
            assert found == wanted, f"{variant} learns {found} tokens; expected {wanted}"
        # The peer gives an item's mean.
        means = results["peer"][number::DIALOGUES]
        counts = [int(row["loss_mask"].sum()) for row in rows["peer"][number::DIALOGUES]]
        lm = {
            "peer": sum(mean * count for mean, count in zip(means, counts, strict=True)),
            "items": sum(float(sums["lm"]) for _, sums in items),
            "whole": float(results["whole"][number][1]["lm"]),
            "slots": float(results["slots"][number][1]["lm"]),
        }
        for variant, loss in lm.items():
            error = abs(loss / lm["items"] - 1)
            assert error < 1e-4, f"{variant} loses {loss}; expected {lm['items']}"
            worst["lm"] = max(worst["lm"], error)
        gradient = functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), (gradients for gradients, _ in items))
        for variant in ("whole", "slots"):
            apart = jax.tree.map(jnp.subtract, results[variant][number][0], gradient)
            error = float(norm(apart) / norm(gradient))
            assert error < 1e-3, f"{variant}: the gradient is {error:.1e} of its norm off the items'"
            worst["gradient"] = max(worst["gradient"], error)
    return worst


def measure(steps: Mapping[str, list[Callable[[], Any]]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds a supervised turn, f64[rounds], by variant. In each round all are run in turn."""
    clock = time.process_time if FLAGS.threads == 1 else time.perf_counter
    taken = {variant: np.zeros(rounds) for variant in steps}
    for number in range(rounds):
        for variant, some in steps.items():
            start = clock()
            for step in some:
                step()
            taken[variant][number] = (clock() - start) / (TURNS * DIALOGUES)
    return taken


def ratios(taken: Mapping[str, np.ndarray]) -> dict[str, dict[str, list[float]]]:
    """Of rounds, each variant's cost over the peer's and over the items': median, smallest, largest."""
    found: dict[str, dict[str, list[float]]] = {}
    for base in ("peer", "items"):
        over = {variant: cost / taken[base] for variant, cost in taken.items()}
        found[f"over_{base}"] = {
            variant: [round(float(value), 3) for value in (np.median(each), each.min(), each.max())]
            for variant, each in over.items()
        }
    return found


def spread(values: np.ndarray) -> str:
    """Median, smallest and largest."""
    return f"{np.median(values):.3f} ({values.min():.3f} to {values.max():.3f})"


def main(argv: list[str]) -> None:
    del argv
    begun = time.perf_counter()
    jax.config.update("jax_platforms", "cpu")
    torch.set_num_threads(FLAGS.threads)
    dialogues = make_dialogues(0)
    names = [name for dialogue in dialogues for name in dialogue.videos]
    content = Content(dialogues, Videos(names), make_tokenizer(dialogues))
    rows, steps = prepare(content)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # one is traced while another is compiled
        results = {
            variant: list(pool.map(lambda step: step(), some)) if variant != "peer" else [step() for step in some]
            for variant, some in steps.items()
        }
    worst = check(content, rows, results)
    del results
    prepared = time.perf_counter() - begun
    taken = measure(steps, FLAGS.rounds)
    load = os.getloadavg()[0]

    here, published = arithmetic(CONFIG, content, FRAMES), arithmetic(InterLLaVAConfig(), content, 64)
    turns = TURNS * DIALOGUES
    print(f"A supervised turn in dialogues of {TURNS}:\n")
    head = ("ms", "over the peer", "over (0)", "GFLOP", "frames", "visual", "text")
    print(f"{'':45} {head[0]:>5} {head[1]:>22} {head[2]:>22} {head[3]:>6} {head[4]:>6} {head[5]:>6} {head[6]:>5}")
    for variant, what in VARIANTS.items():
        frames, visual, text = positions(rows[variant]) / turns
        work = here["items" if variant == "peer" else variant][TURNS] / TURNS / 1e9
        over = [spread(taken[variant] / taken[base]) for base in ("peer", "items")]
        print(
            f"{what:45} {1e3 * np.median(taken[variant]):5.0f} {over[0]:>22} {over[1]:>22} {work:6.1f} "
            f"{0 if variant == 'cached' else frames:6.0f} {visual:6.0f} {text:5.0f}"
        )

    print("\nOver (0) by arithmetic, here and at the published sizes; mix: dialogues as long as IVCR-200K's.\n")
    print(f"{'turns':5} {'(3) here':>9} {'published':>9} {'(4) here':>9} {'published':>9}")
    counted: dict[str, dict[str, list[float]]] = {}
    for name, mix in ({str(n): {n: 1.0} for n in PUBLISHED_TURNS} | {"mix": PUBLISHED_TURNS}).items():
        counted[name] = {}
        for variant in ("blocks", "cached"):
            counted[name][variant] = [
                round(
                    sum(many * work[variant][n] for n, many in mix.items())
                    / sum(many * work["items"][n] for n, many in mix.items()),
                    3,
                )
                for work in (here, published)
            ]
        print(f"{name:5} " + " ".join(f"{ratio:9.3f}" for ratios in counted[name].values() for ratio in ratios))

    seconds = time.perf_counter() - begun
    print(f"\n{prepared:.0f} s to prepare and compile, {seconds - prepared:.0f} s for {FLAGS.rounds} rounds.\n")
    report = {
        **ratios(taken),
        "counted_over_items_here_and_published": counted,
        "largest_difference": {name: float(f"{value:.1e}") for name, value in worst.items()},
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "load": round(load, 1),
            "threads": FLAGS.threads,
            "jax": jax.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    print(json.dumps(report))


if __name__ == "__main__":
    app.run(main)
