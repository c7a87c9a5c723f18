"""Tiny models whose every parameter matters, a batch of real dialogues, and the decoder in plain NumPy."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ivcr_jax.data import batches, store
from ivcr_jax.data.batches import PackConfig
from ivcr_jax.data.dialogue import Intent, Turn
from ivcr_jax.data.encoding import EncodingConfig, Shown
from ivcr_jax.data.tokenizer import train_demo
from ivcr_jax.models.heads import MomentHeadConfig, RankHeadConfig
from ivcr_jax.models.interllava import InterLLaVA, InterLLaVAConfig
from ivcr_jax.models.layers import Compute
from ivcr_jax.models.llama import LlamaConfig
from ivcr_jax.models.lora import LoraConfig
from ivcr_jax.models.qformer import QFormerConfig
from ivcr_jax.models.video_encoder import VideoEncoderConfig
from ivcr_jax.models.vit import ViTConfig
from tests.data import sources

F32 = Compute(dtype="float32", attention="xla")
VIT = ViTConfig(image_size=8, patch_size=4, width=16, layers=2, heads=2, mlp_width=24)
QFORMER = QFormerConfig(queries=2, width=16, layers=2, heads=2, mlp_width=24, vocab_size=40, max_text=32)
VIDEO_QFORMER = QFormerConfig(
    queries=2, width=12, layers=1, heads=2, mlp_width=24, cross_every=1, vocab_size=0, max_text=0
)


def fill(module, seed=0):
    """Gives an abstract module (of nnx.eval_shape) its parameters: drawn so large that each matters.

    As they begin, many are zero or so small that leaving them out would change nothing a test could see. A draw depends
    on the parameter's path alone, so that of two configurations equal parameters are equal.
    """
    definition, state = nnx.split(module)
    filled = []
    for path, variable in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        value = np.random.default_rng((seed, zlib.crc32(name.encode()))).standard_normal(variable.shape)
        if path[-1] in ("kernel", "a", "b"):
            value *= variable.shape[-2] ** -0.5
        elif path[-1] in ("scale", "bias"):
            value = (path[-1] == "scale") + 0.2 * value
        filled.append((path, variable.replace(jnp.asarray(value, jnp.float32))))
    return nnx.merge(definition, nnx.from_flat_state(filled))


def lively(make, seed=0):
    """The module that `make` makes, filled."""
    return fill(nnx.eval_shape(make), seed)


def host(tree):
    """Arrays as NumPy's, with which a comparison of a hundred shapes is not a hundred programs to compile."""
    return jax.tree.map(np.asarray, tree)


def close(found, expected, tolerance):
    """Every value within `tolerance` of the expected one, or of its share where that is larger than 1."""
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=tolerance, atol=tolerance)


def numbers(module):
    """The module's parameters as nested dicts of f64."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), nnx.to_pure_dict(nnx.state(module)))


def near(found, expected, tolerance):
    """Every value within `tolerance` of the expected one, as a share of the largest, or of 1: rounding of sums."""
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


def operations(jaxpr):
    """Every operation of a program and of those within it."""
    for operation in jaxpr.eqns:
        yield operation
        for value in operation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from operations(inner)


# The decoder in NumPy: float64, position by position, from the papers.


def sees(i, j, segments, blocks):
    """Whether position i of a row sees position j."""
    if segments[i] == 0 or segments[i] != segments[j]:
        return False
    if blocks is not None and blocks[i] > 0:
        return blocks[i] == blocks[j]
    return j <= i


def turned(x, position, config):
    """x [H, K] turned by the rotary embedding, as complex numbers: the first half of K with the second."""
    half = x.shape[-1] // 2
    angles = position * config.rope_theta ** (-np.arange(half) / half)
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angles)
    return np.concatenate([z.real, z.imag], axis=-1)


def decode_row(model, x, positions, segments, blocks=None):
    """One row x [S, D] through the decoder: states [S, D], zero where there is nothing."""
    c = model.config
    weights = numbers(model)
    group = c.heads // c.kv_heads

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps) * scale

    x = np.asarray(x, np.float64)
    seen = [[j for j in range(len(x)) if sees(i, j, segments, blocks)] for i in range(len(x))]
    for number in range(c.layers):
        w = jax.tree.map(lambda leaf: leaf[number], weights["layers"])  # noqa: B023
        y = norm(x, w["attention_norm"]["scale"])
        q, k, v = ((y @ w[name]["kernel"]).reshape(len(y), -1, c.head_size) for name in "qkv")
        read = np.zeros_like(q)
        q, k = (np.stack([turned(*each, c) for each in zip(part, positions, strict=True)]) for part in (q, k))
        for i in range(len(y)):
            for head in range(c.heads if seen[i] else 0):
                scores = k[seen[i], head // group] @ q[i, head] / np.sqrt(c.head_size)
                shares = np.exp(scores - scores.max())
                read[i, head] = shares / shares.sum() @ v[seen[i], head // group]
        x = x + read.reshape(len(y), -1) @ w["o"]["kernel"]
        y = norm(x, w["mlp_norm"]["scale"])
        gate = y @ w["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ w["up"]["kernel"])) @ w["down"]["kernel"]
    return norm(x, weights["norm"]["scale"]) * (np.asarray(segments) > 0)[:, None]


# Real dialogues as a batch.

VIDEOS = {"a": 5, "b": 5, "c": 2, "d": 5, "e": 4, "f": 1, "g": 5}  # frames of each; a row takes T = 5
ENCODING = EncodingConfig(tokens_per_video=6, max_candidates=4)  # two queries for each of three windows
PACK = PackConfig(ENCODING, seq_len=480, video_slots=7, max_turns=7, frames=5)


def find(*videos, target=0):
    """A turn that asks for a video. The answer does not name its number, so that any order has the same text."""
    turn = Turn("Find it.", "It is video 1.", Intent.VIDEO, "en", videos[target], videos)
    return Shown(turn, videos, tuple(range(1, len(videos) + 1)), target)


def when(video):
    """A turn that asks for a moment."""
    return Shown(
        Turn("When?", "In video 1 at 1.0s-2.0s.", Intent.MOMENT, "en", video, (), (1.0, 2.0)), (video,), (1,), 0
    )


CHAT = Shown(Turn("Thanks", "Bye", Intent.CHAT, "en"), (), (), -1)
# Rows of dialogues: lists of new and of repeated videos, videos that two dialogues share, short and single ones.
ROWS = (
    (
        (find("a", "b", "c", target=1), when("b"), find("d", "b", "e"), when("e")),
        (find("b", "f", target=1), CHAT),
    ),
    ((CHAT, when("c"), find("g")),),
)


@dataclasses.dataclass(frozen=True)
class World:
    """What a batch is made from."""

    videos: store.VideoStore
    tokenizer: object
    pack: PackConfig = PACK

    def batch(self, rows=ROWS, pack=PACK, **encoding):
        """The rows' dialogues as the data pipeline writes them, as jax arrays."""
        config = dataclasses.replace(pack, encoding=dataclasses.replace(pack.encoding, **encoding))
        batch = batches.empty_batch(len(rows), config, batches.BatchShape.of(self.videos, self.tokenizer, config))
        with pytest.MonkeyPatch.context() as patch:
            # The order of candidates and the answers are ours.
            patch.setattr(batches, "show", lambda dialogue, *_, **__: dialogue)
            for row, dialogues in enumerate(rows):
                content = list(enumerate(dialogues))
                for work in batches.fill_row(batch, row, content, self.videos, self.tokenizer, config, None):
                    self.videos.decode(*work)
        return {name: jnp.asarray(array) for name, array in batch.items()}

    def config(self, **changes):
        """A dialogue model for these batches."""
        config = InterLLaVAConfig(
            vit=VIT,
            qformer=QFORMER,
            video_qformer=VIDEO_QFORMER,
            video=VideoEncoderConfig(max_frames=5, window=2, stride=2),
            llama=LlamaConfig(
                vocab_size=self.tokenizer.vocab_size - 5, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48
            ),
            lora=LoraConfig(rank=2, alpha=1.0),  # a lively addition of full scale would make attention all or nothing
            rank=RankHeadConfig(width=16, heads=2),
            moment=MomentHeadConfig(width=16, layers=1, heads=2),
        )
        return dataclasses.replace(config, **changes)

    def model(self, compute=F32, **changes):
        """A lively model of that configuration."""
        return lively(lambda: InterLLaVA(self.config(**changes), nnx.Rngs(0), compute))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Videos as features of a ViT like VIT (patches and class token of 16 numbers), and a tokenizer."""
    rng = np.random.default_rng(0)
    shape = ((VIT.image_size // VIT.patch_size) ** 2 + 1, VIT.width)
    folder = tmp_path_factory.mktemp("features") / "store"
    videos = (
        (name, 6.0 + frames, np.arange(frames, dtype=np.float32), rng.standard_normal((frames, *shape)))
        for name, frames in VIDEOS.items()
    )
    sources.write_features(folder, videos, shape=shape, dtype=np.float32, fingerprint="random")
    wording = (
        "[INST] <<SYS>> You are an excellent video retrieval AI assistant. <</SYS>> Candidate videos : Current [/INST]"
    )
    times = "The video contains 5 frames sampled at 0.1, 2.3 seconds. This frame is sampled at 4.5 second. 6 7 8 9"
    texts = [text for turn in (find("a").turn, when("a").turn, CHAT.turn) for text in (turn.user, turn.answer)]
    return World(store.VideoStore(folder), train_demo([wording, times, *texts] * 3, 500))
