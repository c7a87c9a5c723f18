"""Starts the models of a configuration whose ViT nobody has trained: here it learns to see what the generator draws.

    python -m ivcr_jax.pretrain --config=configs/tiny.py --source=SOURCE --dialogues=DATA/ivcr200k \\
      --videos=DATA/ivcr200k_videos --out=FOLDER

A short training on single frames of the synthetic source stands in for those that EVA, BLIP-2's Q-Former and SigLIP2
went through. It writes a model folder: this ViT in both models, the image Q-Former of the one, the pooling head of the
other, a tokenizer for each, a decoder that can write (`pretrain_text`), all else as new. It must not know what is said
of which video: of the dialogues it takes the words of train, for tokenizers and decoder, and which videos are held out.
It learns from no frame of those.
"""

import concurrent.futures
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from etils import epath
from flax import nnx
from ml_collections import config_flags

from ivcr_jax import bundle, command, pretrain_text
from ivcr_jax.bundle import BundleConfig
from ivcr_jax.data import scenes
from ivcr_jax.data.dialogue import Turn, video_id
from ivcr_jax.data.scenes import COLOURS, SHAPES, SIZES, Scene, Thing
from ivcr_jax.data.store import DatasetNotFound, DialogueStore, VideoStore
from ivcr_jax.data.tokenizer import train_demo
from ivcr_jax.models.interllava import InterLLaVA
from ivcr_jax.models.layers import INIT_STD, Compute, LayerNorm, Linear
from ivcr_jax.models.qformer import QFormer
from ivcr_jax.models.retriever import Retriever
from ivcr_jax.models.video_encoder import FEATURE_NORM_EPS
from ivcr_jax.models.vit import MapHead, ViT, ViTConfig

LOOKS = {"colour": (*COLOURS,), "shape": SHAPES, "size": (*SIZES,)}
BATCH, CROWD = 128, 4
PEAK_LR, WARMUP, B2, WEIGHT_DECAY, CLIP = 4e-3, 0.05, 0.98, 0.02, 1.0
POSITIONS_STD = 0.3
OFFSET_WEIGHT, PLACE_WEIGHT = 2.0, 6.0  # of sides of a patch, and of the picture
SCORED = 200  # held-out videos
# SigLIP's -10 suits its batches: -log of 32,768. Few hundred videos are compared here, and no steps to get there.
LOGIT_BIAS = -5.0

_CODE = np.array([1 << 16, 1 << 8, 1])  # a pixel as one number


@dataclasses.dataclass(frozen=True)
class Frames:
    """Single frames.

    Attributes:
      images: u8[F, H, W, 3].
      pixels: bool[F, H, W], those that show a thing.
      labels: of `label`, with a leading axis F.
    """

    images: np.ndarray
    pixels: np.ndarray
    labels: dict[str, np.ndarray]


def label(scene: Scene, indices: np.ndarray, side: int) -> dict[str, np.ndarray]:
    """What each patch of some frames shows.

    A patch shows a thing where its middle is no farther from the thing's centre than the thing's half extent, or half
    a patch where that is more, both across and down; of several, the one drawn last.

    Args:
      scene: of the clip.
      indices: i64[T], of the frames.
      side: patches in a row and in a column of the picture; P = side * side, row after row.

    Returns:
      "there" bool[T, P]: whether a patch shows a thing. Of that thing, and else zero: "colour", "shape", "size"
      i32[T, P], places in LOOKS; "offset" f32[T, P, 2], (x, y) from the patch's middle to the thing's centre, in sides
      of a patch; "centre" bool[T, P], whether the centre is in this patch.
    """
    shape = (len(indices), side * side)
    found = {name: np.zeros(shape, np.int32) for name in LOOKS}
    found |= {"there": np.zeros(shape, bool), "centre": np.zeros(shape, bool)}
    found["offset"] = np.zeros((*shape, 2), np.float32)
    y, x = np.divmod(np.arange(side * side), side)
    middles = np.stack([x, y], axis=-1) + 0.5
    patch = np.array([scene.width, scene.height]) / side
    for thing in sorted(reversed(scene.things), key=lambda thing: -SIZES[thing.size]):  # as `scenes.draw` orders them
        inside = scenes.during(scene, thing)[indices]
        visible = {"appears": inside, "leaves": ~inside}.get(thing.event, np.ones_like(inside))
        offset = ((scenes.path(scene, thing)[indices] + 0.5) / patch)[:, None] - middles
        reach = np.maximum(SIZES[thing.size] * min(scene.width, scene.height) / patch, 0.5)
        shown = (abs(offset) <= reach).all(-1) & visible[:, None]
        first, second = (LOOKS["colour"].index(name) for name in (thing.colour, thing.second or thing.colour))
        values = {
            "there": np.True_,
            "centre": ((offset > -0.5) & (offset <= 0.5)).all(-1),  # one patch alone, also on an edge
            "colour": np.where(inside, second, first)[:, None],
            "shape": LOOKS["shape"].index(thing.shape),
            "size": LOOKS["size"].index(thing.size),
        }
        for name, value in values.items():
            found[name] = np.where(shown, value, found[name])
        found["offset"] = np.where(shown[..., None], offset, found["offset"]).astype(np.float32)
    return found


def pixels_of(scene: Scene, indices: np.ndarray) -> np.ndarray:
    """bool[T, H, W]: which pixels of some frames (indices i64[T]) show a thing. No background has a thing's colour."""
    wanted = set(indices.tolist())
    drawn = np.stack([picture for index, picture in enumerate(scenes.draw(scene)) if index in wanted])
    return np.isin(drawn @ _CODE, np.array([*COLOURS.values()]) @ _CODE)


@dataclasses.dataclass(frozen=True)
class Truth:
    """What a line of truth.jsonl tells of a video. `kept_out`: not of train, or showing what train never shows."""

    scene: Scene
    kept_out: bool


def read_truth(source: epath.PathLike) -> dict[str, Truth]:
    """The truth of a synthetic source by video id. Raises FileNotFoundError where there is none."""
    path = epath.Path(source) / "truth.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; expected the folder that `python -m ivcr_jax.data.synth` wrote")
    found = {}
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        things = tuple(Thing(**(thing | {"home": tuple(thing["home"])})) for thing in row["objects"])
        scene = Scene(things, row["width"], row["height"], row["fps"], row["frames"], row["background"])
        found[video_id(row["video"])] = Truth(scene, row["split"] != "train" or row["held_out"])
    return found


def turns_of(directory: epath.PathLike, split: str) -> Iterator[Turn]:
    """Every turn of a split of the dialogues."""
    dialogues = DialogueStore(directory, split)
    return (turn for number in range(len(dialogues)) for turn in dialogues[number].turns)


def divide(truth: Mapping[str, Truth], dialogues: epath.PathLike) -> tuple[list[str], list[str]]:
    """Ids of the videos to learn from, and of those held out: by the source, or as the answer to a turn held out."""
    asked = {turn.video_id for split in ("validation", "test") for turn in turns_of(dialogues, split)}
    held_out = [name for name in truth if truth[name].kept_out or name in asked]
    return sorted({*truth} - {*held_out}), held_out


def read_frames(videos: VideoStore, truth: Mapping[str, Truth], names: Sequence[str], config: ViTConfig) -> Frames:
    """Every stored frame of some videos, video after video.

    Raises:
      ValueError: there are no videos, one of them is not in the store, or frames or scenes are not of the tower's size.
    """
    size = config.image_size
    wrong = [name for name in names if name not in videos]
    if wrong or not names:
        raise ValueError(f"videos: found none for {len(wrong)} of {len(names)} ids of the source, such as {wrong[:3]}")
    if videos.kind != "frames" or videos.item_shape != (size, size, 3):
        raise ValueError(
            f"videos: found {videos.kind} of shape {videos.item_shape}, expected frames ({size}, {size}, 3)"
        )
    wrong = [name for name in names if {truth[name].scene.width, truth[name].scene.height} != {size}]
    if wrong:
        raise ValueError(f"source: found videos that are not {size} x {size} pixels, the tower's size: {wrong[:3]}")
    ends = np.cumsum([videos.num_frames[name] for name in names])
    images = np.empty((ends[-1], *videos.item_shape), np.uint8)

    def read(name: str, end: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        stored, scene = videos.read(name), truth[name].scene
        count = len(stored.times)
        videos.decode(stored, np.arange(count), images[end - count : end])
        indices = np.rint(stored.times * scene.fps).astype(int)
        return pixels_of(scene, indices), label(scene, indices, size // config.patch_size)

    read(names[0], ends[0])  # opens the store, before there are threads
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        pixels, labels = zip(*pool.map(read, names, ends), strict=True)
    return Frames(
        images, np.concatenate(pixels), {name: np.concatenate([each[name] for each in labels]) for name in labels[0]}
    )


class Seer(nnx.Module):
    """A ViT and what reads its features in the models, and what is told from all of these: linearly, so that the
    features themselves have to hold it."""

    def __init__(self, config: BundleConfig, rngs: nnx.Rngs) -> None:
        """Raises ValueError where the models of the configuration have not one tower."""
        vit, compute = tower(config), Compute(dtype="float32")
        self.vit = ViT(vit, rngs, compute)
        # Patches come in as numbers about one; a table's usual small ones would leave them all but without a place.
        self.vit.positions[...] *= POSITIONS_STD / INIT_STD
        looks = {name: len(values) for name, values in LOOKS.items()}
        self.of_patch = {"there": 1, "offset": 2} | looks
        self.of_colour = {"there": 1, "place": 2, "shape": looks["shape"], "size": looks["size"]}

        def head(width: int, count: int) -> Linear:
            return Linear(rngs, ("embed", None), (width, count))

        self.head = head(vit.width, sum(self.of_patch.values()))
        self.readers: Any = nnx.Dict()
        told = len(COLOURS) * sum(self.of_colour.values())
        if config.model is not None and not config.model.qformer.vocab_size:  # else it reads sentences too
            q = config.model.qformer
            norm, qformer = LayerNorm(vit.width, FEATURE_NORM_EPS), QFormer(q, vit.width, rngs, compute)
            self.readers["qformer"] = nnx.List([norm, qformer, head(q.queries * q.width, told)])
        if config.retriever is not None and config.retriever.vit.map_head:
            self.readers["pool"] = nnx.List([MapHead(rngs, config.retriever.vit), head(vit.width, told)])

    def __call__(self, images: jax.Array) -> dict[str, dict[str, jax.Array]]:
        """u8[B, H, W, 3] -> what is told of "patch", f32[B, P, n] each: logits of "there" and of LOOKS, and "offset" as
        `label` has it; and from what "qformer" and "pool" read of the frame, of each colour, f32[B, 6, n] each: logits
        of "there", "shape" and "size", and "place" as `by_colour` has it."""
        features = self.vit(images)
        parts = {"patch": (self.head(features[:, int(self.vit.config.cls_token) :]), self.of_patch)}
        for reader, (*steps, head) in self.readers.items():
            x = features
            for step in steps:
                x = step(x)
            told = head(x.reshape(len(images), -1))
            parts[reader] = told.reshape(len(images), len(COLOURS), -1), self.of_colour
        return {
            reader: dict(zip(sizes, jnp.split(told, np.cumsum([*sizes.values()])[:-1], axis=-1), strict=True))
            for reader, (told, sizes) in parts.items()
        }

    def learnt(self) -> dict[str, dict[str, jax.Array]]:
        """Parameters by path in each model."""
        model: dict[str, Any] = {"encoder.vit.": self.vit}
        retriever: dict[str, Any] = {"vit.": self.vit}
        if "qformer" in self.readers:
            model["encoder.vit_norm."], model["encoder.qformer."], _ = self.readers["qformer"]
        if "pool" in self.readers:
            retriever["vit.head."], _ = self.readers["pool"]
        return {
            name: {prefix + path: value for prefix, part in of.items() for path, value in bundle.weights(part).items()}
            for name, of in (("model", model), ("retriever", retriever))
        }


def by_colour(labels: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What frames show of each colour, from labels [B, P]: "there" bool[B, 6]; where it is one thing alone, "one"
    bool[B, 6], "shape" and "size" i32[B, 6] and "place" f32[B, 6, 2], its centre (x, y) in sides of the picture."""
    of = labels["centre"][..., None] & (labels["colour"][..., None] == np.arange(len(COLOURS)))
    count, patch = of.sum(1), of.argmax(1)
    side = math.isqrt(of.shape[1])
    middle = jnp.stack([patch % side, patch // side], axis=-1) + 0.5
    found = {name: jnp.take_along_axis(jnp.asarray(labels[name]), patch, axis=1) for name in ("shape", "size")}
    offset = jnp.take_along_axis(jnp.asarray(labels["offset"]), patch[..., None], axis=1)
    return found | {"there": count > 0, "one": count == 1, "place": (middle + offset) / side}


def crowd(
    images: jax.Array, pixels: jax.Array, labels: Mapping[str, jax.Array]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Pastes what some frames show into others, where it covers nothing (after arXiv 2012.07177).

    A frame has one or two things to learn from, and costs the same with twice as many.

    Args:
      images: u8[K, B, H, W, 3].
      pixels, labels: as of Frames, with leading axes [K, B].

    Returns:
      u8[B, H, W, 3]: the first of each K frames with the things of those others that fit in; and its labels.
    """
    image, shown = images[0], {name: values[0] for name, values in labels.items()}
    for other in range(1, len(images)):
        there = labels["there"][other]
        fits = ~(there & shown["there"]).any(-1, keepdims=True)
        image = jnp.where((fits[..., None] & pixels[other])[..., None], images[other], image)
        for name, values in labels.items():
            pasted = (fits & there)[..., None] if values.ndim == 4 else fits & there
            shown[name] = jnp.where(pasted, values[other], shown[name])
    return image, shown


def loss(told: Mapping[str, Mapping[str, jax.Array]], labels: Mapping[str, jax.Array]) -> jax.Array:
    """f32[]: of whether a patch shows a thing, and a frame one of each colour, over all; and of how that looks and
    where it is, over those that do."""

    frame = by_colour(labels)
    total = _told_loss(told["patch"], labels, ("offset", OFFSET_WEIGHT), [*LOOKS], labels["there"])
    for reader in sorted({*told} - {"patch"}):
        total += _told_loss(told[reader], frame, ("place", PLACE_WEIGHT), ["shape", "size"], frame["one"])
    return total


def _told_loss(
    told: Mapping[str, jax.Array],
    labels: Mapping[str, Any],
    where: tuple[str, float],
    looks: Sequence[str],
    of: jax.Array,
) -> jax.Array:
    """f32[]: "there" over all; over those `of` marks, looks and a place by name and weight."""
    name, weight = where
    each = sum(optax.softmax_cross_entropy_with_integer_labels(told[look], labels[look]) for look in looks)
    each += weight * abs(told[name] - labels[name]).sum(-1)
    shown = optax.sigmoid_binary_cross_entropy(told["there"][..., 0], labels["there"])
    return shown.mean() + jnp.where(of, each, 0).sum() / jnp.maximum(of.sum(), 1)


def train(config: BundleConfig, frames: Frames, steps: int, seed: int) -> Seer:
    """Trains what is new on frames drawn at random; the same arguments give the same weights."""
    definition, parameters = nnx.split(nnx.jit(lambda: Seer(config, nnx.Rngs(seed)))())
    rate = optax.warmup_cosine_decay_schedule(0, PEAK_LR, math.ceil(WARMUP * steps), max(2, steps))
    rule = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(rate, b2=B2, weight_decay=WEIGHT_DECAY))

    @jax.jit
    def step(parameters: Any, state: Any, batch: tuple[jax.Array, jax.Array, dict[str, jax.Array]]) -> Any:
        image, shown = crowd(*batch)
        value, gradients = jax.value_and_grad(lambda it: loss(nnx.merge(definition, it)(image), shown))(parameters)
        updates, state = rule.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    state, started = rule.init(parameters), time.monotonic()
    for number in range(1, steps + 1):
        chosen = np.random.default_rng((seed, number)).integers(len(frames.images), size=(CROWD, BATCH))
        labels = {name: values[chosen] for name, values in frames.labels.items()}
        parameters, state, value = step(parameters, state, (frames.images[chosen], frames.pixels[chosen], labels))
        if number % 50 == 0 or number == steps:
            print(f"step {number}/{steps}: loss {value:.3f}, {time.monotonic() - started:.1f} s", flush=True)
    return nnx.merge(definition, parameters)


def score(seer: Seer, frames: Frames) -> dict[str, float]:
    """Shares of things told right at the patch with their centre ("there": of all patches), and the mean distance in
    pixels by which the centre is missed; and of the things that are alone of their colour, those whose shape is told
    right by what a reader hands on of the whole frame."""
    run = nnx.jit(lambda seer, images: seer(images))
    count = len(frames.images)
    padded = np.resize(frames.images, (math.ceil(count / BATCH) * BATCH, *frames.images.shape[1:]))
    parts = [run(seer, padded[first : first + BATCH]) for first in range(0, len(padded), BATCH)]
    whole = jax.tree.map(lambda *each: np.concatenate(each)[:count], *parts)
    told = whole.pop("patch")
    labels, at = frames.labels, frames.labels["centre"]
    right = {name: (told[name].argmax(-1) == labels[name])[at].mean() for name in LOOKS}
    right["there"] = ((told["there"][..., 0] > 0) == labels["there"]).mean()
    missed = np.linalg.norm((told["offset"] - labels["offset"])[at], axis=-1).mean() * seer.vit.config.patch_size
    frame = jax.tree.map(np.asarray, by_colour(labels))
    for reader, of in whole.items():
        right[f"{reader}_shape"] = (of["shape"].argmax(-1) == frame["shape"])[frame["one"]].mean()
    return {name: round(float(value), 4) for name, value in (right | {"offset_pixels": missed}).items()}


def tower(config: BundleConfig) -> ViTConfig:
    """The ViT of a configuration, without a pooling head; raises ValueError where its models have two or none."""
    towers = [dataclasses.replace(part.vit, map_head=False) for part in (config.model, config.retriever) if part]
    if not towers:
        raise ValueError("config: found neither a model nor a retriever, expected one or both")
    if towers[0] != towers[-1]:
        differing = [f.name for f in dataclasses.fields(ViTConfig) if len({getattr(t, f.name) for t in towers}) > 1]
        raise ValueError(
            f"config.model.vit and config.retriever.vit differ in {differing}; expected one tower for both"
        )
    return towers[0]


def make_tokenizers(config: BundleConfig, dialogues: epath.PathLike) -> dict[str, bytes]:
    """A SentencePiece model for each model of a configuration, from the words of train, by its file's name.

    Raises ValueError where the words give fewer pieces than the configuration has rows for.
    """
    texts = [text for turn in turns_of(dialogues, "train") for text in (turn.user, turn.answer)]
    texts += [text.lower() for text in texts]  # the first stage reads lower case
    rows = {} if config.model is None else {bundle.TOKENIZER: config.model.llama.vocab_size}
    rows |= {} if config.retriever is None else {bundle.RETRIEVER_TOKENIZER: config.retriever.text.vocab_size}
    protos = {size: train_demo(texts, size).proto for size in {*rows.values()}}
    return {name: bundle.make_tokenizer(protos[size], config, name).proto for name, size in rows.items()}


def pretrain(
    config: BundleConfig,
    *,
    source: epath.PathLike,
    dialogues: epath.PathLike,
    videos: epath.PathLike,
    out: epath.PathLike,
    steps: int,
    text_steps: int,
    seed: int = 0,
) -> dict[str, float]:
    """Writes a model folder to start training from.

    Args:
      config: of the models.
      source: the synthetic source's folder.
      dialogues, videos: the datasets built from it.
      out: the folder to write.
      steps: of learning to see.
      text_steps: of learning to write, where there is a dialogue model; 0 leaves its decoder as new.
      seed: of everything random.

    Returns:
      what `score` says of frames held out.

    Raises:
      ValueError: the configuration has not one tower, or does not fit the videos or the words.
      OSError: there is something at `out`, or no truth at `source`.
      DatasetNotFound: there is no whole dataset.
    """
    if epath.Path(out).exists():
        raise FileExistsError(f"{out} exists; a model folder is written to a new one")
    vit = tower(config)
    truth, store = read_truth(source), VideoStore(videos)
    chosen, held_out = divide(truth, dialogues)
    tokenizers = make_tokenizers(config, dialogues)
    test = read_frames(store, truth, held_out[:: math.ceil(len(held_out) / SCORED) or 1], vit)
    frames = read_frames(store, truth, chosen, vit)
    print(f"{len(frames.images)} frames of {len(chosen)} videos; {len(held_out)} are held out", flush=True)
    seer = train(config, frames, steps, seed)
    learnt = seer.learnt()

    def begin(kind: Any, part: Any, name: str) -> dict[str, jax.Array] | None:
        if part is None:
            return None
        return jax.jit(lambda: bundle.weights(kind(part, nnx.Rngs(seed))))() | learnt[name]

    model, retriever = begin(InterLLaVA, config.model, "model"), begin(Retriever, config.retriever, "retriever")
    if config.model is not None and model is not None and text_steps:
        tokenizer = bundle.make_tokenizer(tokenizers[bundle.TOKENIZER], config, bundle.TOKENIZER)
        words = pretrain_text.texts(turns_of(dialogues, "train"), config.style)
        llama = pretrain_text.train(config.model.llama, tokenizer, words, text_steps, seed)
        model |= {f"llama.{path}": value for path, value in bundle.weights(llama).items()}
    if retriever is not None:
        retriever["logit_bias"] = jnp.full_like(retriever["logit_bias"], LOGIT_BIAS)
    bundle.save(out, config, model=model, retriever=retriever, tokenizers=tokenizers)
    return score(seer, test)


def _define_flags() -> None:
    # Not at import: another program may import this module and have flags of the same names.
    config_flags.DEFINE_config_file("config", None, "Sizes of the models.", lock_config=True)
    flags.mark_flag_as_required("config")
    flags.DEFINE_string("source", None, "The synthetic source.", required=True)
    flags.DEFINE_string("dialogues", None, "Its ivcr200k, built.", required=True)
    flags.DEFINE_string("videos", None, "Its ivcr200k_videos, built.", required=True)
    flags.DEFINE_string("out", None, "The folder to write. It must not exist.", required=True)
    flags.DEFINE_integer("steps", 700, "Of learning to see.", lower_bound=1)
    flags.DEFINE_integer("text_steps", 250, "Of learning to write.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Of everything random.", lower_bound=0)


def main(argv: list[str]) -> None:
    command.refuse_arguments(argv)
    command.quiet()
    args = flags.FLAGS
    try:
        scores = pretrain(
            BundleConfig.from_values(args.config.to_dict()),
            source=args.source, dialogues=args.dialogues, videos=args.videos, out=args.out,
            steps=args.steps, text_steps=args.text_steps, seed=args.seed,
        )  # fmt: skip
    except (ValueError, OSError, DatasetNotFound) as error:
        sys.exit(f"error: {error}")
    print(json.dumps(scores))


if __name__ == "__main__":
    _define_flags()
    app.run(main)
