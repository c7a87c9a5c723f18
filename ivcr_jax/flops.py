"""How much arithmetic a train step is, from the configuration alone. The formula, which every MFU here is by:

A product of f[M, K] and f[K, N] is 2 M K N; attention of S positions over N is 4 S N D (half of it where it is causal).
All positions, frames and slots of a batch count, empty ones too; norms, activations and recomputing do not. The
backward pass adds once the forward's for the gradient of the inputs, where anything before is trained, and once for
that of the weights, where they are. XLA's own count is no use: it counts a scanned layer once.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping

from ivcr_jax.models.qformer import QFormerConfig
from ivcr_jax.models.vit import ViTConfig
from ivcr_jax.training import TrainConfig

# Peak bf16 FLOP/s of a device, by its kind as JAX names it (the vendors' data sheets; dense).
PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


@dataclasses.dataclass(frozen=True)
class _Part:
    """FLOPs of a part's forward pass: through weights, through attention scores; and which parameters are its own.

    `paths` is a regular expression, as in optim.rules. Of a `shallow` part no weights come after other weights of it.
    """

    paths: str
    weights: float
    scores: float = 0
    shallow: bool = False


def _transformer(tokens: int, length: int, width: int, mlp: int, layers: int) -> tuple[float, float]:
    """(weights, scores) of layers of self-attention and a two-matrix MLP, over `tokens` in sequences of `length`."""
    return layers * tokens * 2 * (4 * width**2 + 2 * width * mlp), layers * tokens * 4 * length * width


def _vit(prefix: str, config: ViTConfig, images: int) -> list[_Part]:
    """The patches' projection and the layers; the pooling head is none of it."""
    length = config.patches + config.cls_token
    widths, pixels = (3, *config.stem), config.image_size**2
    stem = [2 * 9 * a * b * pixels / 4**n for n, (a, b) in enumerate(itertools.pairwise(widths), start=1)]
    first, *more = (images * each for each in (*stem, 2 * widths[-1] * pixels / 4 ** len(stem) * config.width))
    layers = _transformer(images * length, length, config.width, config.mlp_width, config.layers)
    return [
        _Part(rf"{prefix}\.(stem|patch|cls|positions).*", first, shallow=True),
        *(_Part(rf"{prefix}\.(stem|patch|cls|positions).*", each) for each in more),
        _Part(rf"{prefix}\.(?!head\.).*", *layers),
    ]


def _qformer(config: QFormerConfig, calls: int, context: int, context_width: int, text: int) -> tuple[float, float]:
    """Of `calls` runs over `context` positions of `context_width`, with `text` positions beside the queries."""
    q, d = config.queries, config.width
    weights, scores = _transformer(calls * (q + text), q + text, d, config.mlp_width, config.layers)
    crossing = -(-config.layers // config.cross_every)
    weights += crossing * calls * 2 * (2 * q * d**2 + 2 * context * context_width * d)
    return weights, scores + crossing * calls * 4 * q * context * d


def _parts(config: TrainConfig, frame_text: int, features: bool) -> list[list[_Part]]:
    """The parts of each model, from its input on."""
    data, found = config.data, []
    videos = data.batch_size * data.video_slots
    frames, turns = videos * data.frames, data.batch_size * data.max_turns
    if config.model is not None and config.losses.of_model:
        m = config.model
        q, v, c = m.text_qformer, m.video_qformer, m.llama
        text = frame_text if q.vocab_size else 0
        windows = videos * m.video.windows(data.frames)
        per_frame = q.queries + (text if m.video.keep_text_tokens else 0)
        s, d, k = data.seq_len, c.width, c.head_size
        tokens = data.batch_size * s
        layer = 2 * d * k * (c.heads + c.kv_heads) + 3 * d * c.mlp_width
        adapted = 4 if m.lora.rank else 0  # the four projections of attention, by the default targets
        e, f = m.rank.width, m.moment.width
        frame_states = turns * data.frames
        head, scores = _transformer(frame_states, data.frames, f, 4 * f, m.moment.layers)
        head += frames * q.queries * 2 * q.width * 2 * f + turns * 2 * (d + m.moment.first_width) * 2 * f
        rank = tokens * 2 * d * 2 * e + turns * 2 * (d + e) * e + turns * data.max_candidates * 2 * 2 * e * e
        projection = windows * v.queries * 2 * v.width * d
        lora = c.layers * tokens * adapted * 2 * 2 * d * m.lora.rank
        decoder = c.layers * tokens * 2 * layer, c.layers * tokens * 2 * s * k * c.heads
        words = tokens * 2 * d * (c.vocab_size + c.added_tokens)
        of_frames = [
            *_vit(r"model\.encoder\.vit", m.vit, 0 if features else frames),
            _Part(
                r"model\.encoder\.qformer\..*",
                *_qformer(q, frames, m.vit.patches + m.vit.cls_token, m.vit.width, text),
            ),
        ]
        decoded = []
        if config.losses.decode:
            decoded = [
                _Part(
                    r"model\.encoder\.video_qformer\..*",
                    *_qformer(v, windows, m.video.window * per_frame, q.width, 0),
                ),
                _Part(r"model\.encoder\.projection\..*", projection, shallow=True),
                _Part(r"model\.llama\.layers\..*\.lora\..*", lora),
                _Part(r"model\.llama\.layers\.(?!.*\.lora\.).*", *decoder),
                _Part(r"model\.llama\.head.*", words, shallow=True),
                _Part(r"model\.rank\..*", rank),
            ]
        found.append([*of_frames, *decoded, _Part(r"model\.moment\..*", head, scores)])
    if config.retriever is not None and config.losses.contrastive:
        r, vit = config.retriever, config.retriever.vit
        t, w = r.text, vit.width
        pool_patches = frames * vit.patches * 2 * 2 * w**2 * vit.map_head  # their keys and values
        pool = frames * 2 * (2 * w**2 + 2 * w * vit.mlp_width) * vit.map_head
        pool_scores = frames * 4 * vit.patches * w * vit.map_head
        layers, layer_scores = _transformer(frames, data.frames, w, vit.mlp_width, r.frame_layers)
        tower, tower_scores = _transformer(turns * t.max_tokens, t.max_tokens, t.width, t.mlp_width, t.layers)
        found += [
            [
                *_vit(r"retriever\.vit", vit, 0 if features else frames),
                _Part(r"retriever\.vit\.head\..*", pool_patches, shallow=True),
                _Part(r"retriever\.(vit\.head\.|frame_).*", pool + layers, pool_scores + layer_scores),
            ],
            [_Part(r"retriever\.text\..*", tower + turns * 2 * t.width * w, tower_scores)],
        ]
    return found


def train_step(config: TrainConfig, factors: Mapping[str, float], *, frame_text: int, features: bool) -> float:
    """FLOPs of a train step over all devices.

    Args:
      config: of the run.
      factors: on the learning rate, of each parameter by path: what is not 0 is trained.
      frame_text: L of a batch, tokens of a frame's sentence.
      features: whether batches hold features of the ViT, not frames.
    """
    learnt = [path for path, factor in factors.items() if factor]
    total = 0.0
    for parts in _parts(config, frame_text, features):
        before = False
        for part in parts:
            trained = any(re.fullmatch(part.paths, path) for path in learnt)
            inputs = before or (trained and not part.shallow)
            total += part.weights * (1 + inputs + trained) + part.scores * (3 if inputs else 1)
            before = before or trained
    return total
