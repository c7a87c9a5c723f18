"""Videos as tokens: windows, frame positions, time sentences, and frames that are not there."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ivcr_jax.models.qformer import QFormer, QFormerConfig
from ivcr_jax.models.video_encoder import VideoEncoder, VideoEncoderConfig
from ivcr_jax.models.vit import ViT, ViTConfig
from tests.models.conftest import F32, QFORMER, VIDEO_QFORMER, VIT, close, host, lively, numbers

WIDTH = 20  # of the decoder
SENTENCE = 4


@functools.cache
def encoder_of(config, qformer=QFORMER):
    return lively(lambda: VideoEncoder(VIT, qformer, VIDEO_QFORMER, config, WIDTH, nnx.Rngs(0), F32))


def videos(count, seed=0):
    """Five videos of `count` normalised frames: all there, the end missing, holes, one frame, none; and sentences."""
    rng = np.random.default_rng(seed)
    frames = rng.standard_normal((5, count, 8, 8, 3)).astype(np.float32)
    mask = np.ones((5, count), bool)
    mask[1, (count + 1) // 2 :] = False
    mask[2, 1::3] = False
    mask[3, :-1] = False
    mask[4] = False
    text = rng.integers(1, QFORMER.vocab_size, (5, count, SENTENCE)).astype(np.int32)
    text[:, ::2, -1] = 0  # shorter ones
    return frames, mask, text


@nnx.jit
def jitted(module, *args):
    return module(*args)


def call(module, *args):
    return host(jitted(module, *args))


# The Q-Former in NumPy: float64, one frame or window at a time, from the papers.


def normed(x, w, eps):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w["scale"] + w["bias"]


def through(x, w):
    return x @ w["kernel"] + w["bias"]


def attended(x, context, w, heads):
    split = ((part, w[name]) for part, name in ((x, "q"), (context, "k"), (context, "v")))
    q, k, v = (through(part, weights).reshape(len(part), heads, -1) for part, weights in split)
    scores = np.einsum("ihe,jhe->hij", q, k) / np.sqrt(q.shape[-1])
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    read = np.einsum("hij,jhe->ihe", shares / shares.sum(-1, keepdims=True), v)
    return through(read.reshape(len(x), -1), w["out"])


def fed_forward(x, w):
    x = through(x, w["up"])
    return through(x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2, w["down"])


def read_by(qformer, context, text=()):
    """The Q-Former's outputs [Q + S, D] for a context [P, E] and words [S], of which id 0 is padding: never seen."""
    c = qformer.config
    weights = numbers(qformer)
    x = weights["queries"]
    seen = np.ones(len(x), bool)
    if len(text):
        x = np.concatenate([x, weights["words"][text] + weights["positions"][: len(text)]])
        seen = np.concatenate([seen, text > 0])
    x = normed(x, weights["norm"], c.norm_eps)
    for number in range(c.layers):
        group = jax.tree.map(lambda leaf: leaf[number // c.cross_every], weights["groups"])  # noqa: B023
        w = group["layers"][number % c.cross_every]
        x = normed(x + attended(x, x[seen], w["attention"], c.heads), w["attention_end"]["norm"], c.norm_eps)
        queries, words = x[: c.queries], x[c.queries :]
        if number % c.cross_every == 0:
            read = attended(queries, context, w["cross"], c.heads)
            queries = normed(queries + read, w["cross_end"]["norm"], c.norm_eps)
        queries = normed(queries + fed_forward(queries, w["query_mlp"]), w["query_mlp_end"]["norm"], c.norm_eps)
        if len(text):
            words = normed(words + fed_forward(words, w["text_mlp"]), w["text_mlp_end"]["norm"], c.norm_eps)
        x = np.concatenate([queries, words])
    return x


def frame_by_frame(model, features, mask, text):
    """What the encoder should make of each video: each frame and each window by itself, nothing masked.

    Returns for each video its windows' tokens, None for a window without frames, and its frames' features.
    """
    c, w = model.config, numbers(model)
    count = mask.shape[1]
    queries = model.qformer.config.queries
    tokens, frames = [], []
    for video in range(len(mask)):
        outputs, handed_on = {}, {}
        for t in np.flatnonzero(mask[video]):
            words = text[video, t] if text is not None else ()
            patches = normed(np.asarray(features[video, t], np.float64), w["vit_norm"], 1e-5)
            read = read_by(model.qformer, patches, words)
            last = np.flatnonzero(mask[video])[-1] + 1
            row = t if last <= c.max_frames else int(t * c.max_frames / last)
            read = read + w["frame_positions"][row]
            outputs[t] = read[:queries]
            kept = range(len(read)) if c.attend_to_pads else [*range(queries), *(queries + np.flatnonzero(words))]
            handed_on[t] = read[kept if c.keep_text_tokens else range(queries)]
        windows = []
        for start in range(0, count, c.stride):
            inside = [handed_on[t] for t in range(start, start + c.window) if t in handed_on]
            read = read_by(model.video_qformer, np.concatenate(inside)) if inside else None
            windows.append(None if read is None else through(read, w["projection"]))
        tokens.append(windows)
        frames.append(outputs)
    return tokens, frames


def check(model, found, mask, text):
    """An EncodedVideo against the same, frame by frame."""
    c = model.config
    count = mask.shape[1]
    queries = VIDEO_QFORMER.queries
    windows = len(range(0, count, c.stride))
    assert c.windows(count) == windows
    assert found.tokens.shape == (5, windows * queries, WIDTH) and found.tokens.dtype == np.float32
    assert found.frames.shape == (5, count, QFORMER.queries, QFORMER.width)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    tokens, frames = frame_by_frame(model, found.intermediates["vit"], mask, text)
    for video in range(5):
        for window in range(windows):
            here = slice(window * queries, (window + 1) * queries)
            expected = tokens[video][window]
            assert (np.asarray(found.mask[video, here]) == (expected is not None)).all()
            if expected is not None:
                close(found.tokens[video, here], expected, 1e-5)
        for t in range(count):
            close(found.frames[video, t], frames[video].get(t, np.zeros_like(found.frames[video, t])), 1e-5)


CASES = [
    (7, VideoEncoderConfig(max_frames=5, window=3, stride=2)),  # windows overlap, frames share positions
    (5, VideoEncoderConfig(max_frames=5, window=2, stride=2)),  # the last window is short
    (6, VideoEncoderConfig(max_frames=9, window=2, stride=4)),  # some frames are in no window
    (1, VideoEncoderConfig(max_frames=4, window=3, stride=2)),
    (4, VideoEncoderConfig(max_frames=3, window=3, stride=2, keep_text_tokens=True)),
    (4, VideoEncoderConfig(max_frames=4, window=3, stride=3, keep_text_tokens=True, attend_to_pads=True)),
]


@pytest.mark.parametrize(("count", "config"), CASES)
def test_every_window_is_as_alone(count, config):
    model = encoder_of(config)
    frames, mask, text = videos(count)
    check(model, call(model, frames, mask, text), mask, text)


def test_without_a_vocabulary_no_sentence_is_read_and_without_a_mask_all_frames_are_there():
    model = encoder_of(CASES[0][1], dataclasses.replace(QFORMER, vocab_size=0, max_text=0, cross_every=1))
    frames, mask, _ = videos(7)
    check(model, call(model, frames), np.ones_like(mask), None)


def test_features_of_the_vit_are_as_good_as_frames_and_pixels_as_normalised_ones():
    model = encoder_of(CASES[0][1])
    frames, mask, text = videos(7)
    expected = call(model, frames, mask, text)
    features = call(model.vit, frames[0])
    close(expected.intermediates["vit"][0], features, 1e-6)
    found = call(model, expected.intermediates["vit"], mask, text)
    assert (found.mask == expected.mask).all()
    close(found.tokens, expected.tokens, 1e-6)
    close(found.frames, expected.frames, 1e-6)
    pixels = np.random.default_rng(1).integers(0, 256, (7, 8, 8, 3)).astype(np.uint8)
    floats = (pixels / 255 - np.array(VIT.pixel_mean)) / np.array(VIT.pixel_std)
    close(call(model.vit, pixels), call(model.vit, floats.astype(np.float32)), 1e-5)


def test_patches_are_read_row_by_row():
    """Each patch's pixels (row, column, channel) times the kernel, the class token in front, in f64."""
    model = lively(lambda: ViT(dataclasses.replace(VIT, layers=1), nnx.Rngs(0), F32))
    for name in ("attention", "mlp"):  # a block that adds nothing: its input comes through
        last = getattr(model.blocks, name)
        for linear in (last.out if name == "attention" else last.down,):
            linear.kernel[...] = jnp.zeros_like(linear.kernel[...])
            linear.bias[...] = jnp.zeros_like(linear.bias[...])
    image = np.random.default_rng(0).standard_normal((8, 8, 3)).astype(np.float32)
    kernel, bias = np.asarray(model.patch.kernel[...], np.float64), np.asarray(model.patch.bias[...])
    patches = [image[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].reshape(-1) @ kernel + bias for i in (0, 1) for j in (0, 1)]
    expected = np.stack([np.asarray(model.cls[...])[0], *patches]) + np.asarray(model.positions[...])
    close(model(image[None])[0], expected, 1e-5)


def test_id_0_is_padding_unless_a_mask_says_otherwise():
    model = encoder_of(CASES[4][1])
    frames, mask, text = videos(4)
    by_id, by_mask = call(model, frames, mask, text), call(model, frames, mask, text, text > 0)
    close(by_id.tokens, by_mask.tokens, 1e-6)
    close(by_id.frames, by_mask.frames, 1e-6)
    all_there = call(model, frames, mask, text, np.ones_like(text, bool))
    assert np.abs(all_there.frames[0, 0] - by_id.frames[0, 0]).max() > 1e-3  # its sentence has a 0
    close(all_there.frames[0, 1], by_id.frames[0, 1], 1e-6)  # this one has none
    # What stands at padding is nothing.
    other = np.where(text > 0, text, 7)
    found = call(model, frames, mask, other, text > 0)
    assert (found.tokens == by_mask.tokens)[found.mask].all() and (found.frames == by_mask.frames).all()


# Frames that are not there


def missing_replaced(count, seed, size):
    """Videos, and the same with other frames (numbers up to `size`) and sentences where frames are missing."""
    frames, mask, text = videos(count)
    rng = np.random.default_rng(seed)
    other = np.where(mask[..., None, None, None], frames, size * rng.uniform(-1, 1, frames.shape)).astype(np.float32)
    sentences = np.where(mask[..., None], text, rng.integers(0, QFORMER.vocab_size, text.shape)).astype(np.int32)
    return (frames, mask, text), (other, mask, sentences)


@pytest.mark.parametrize(("count", "config"), [CASES[0], CASES[4]])
def test_a_missing_frame_changes_nothing(count, config):
    model = encoder_of(config)
    for size in (1, 1e4, 1e30):
        given, other = missing_replaced(count, int(min(size, 9)), size)
        expected, found = call(model, *given), call(model, *other)
        assert (found.mask == expected.mask).all() and found.mask.any(1).tolist() == [True] * 4 + [False]
        assert (found.tokens == expected.tokens)[found.mask].all()
        assert (found.frames == expected.frames).all()
        assert np.isfinite(found.tokens).all()


def test_a_missing_frame_gets_no_gradient_and_changes_none():
    model = encoder_of(CASES[4][1])
    weight = jnp.sin(jnp.arange(WIDTH) + 1.0)

    @nnx.jit
    def gradients(model, frames, mask, text):
        def loss(model, frames):
            found = model(frames, mask, text)
            tokens = jnp.where(found.mask[..., None], found.tokens, 0)
            return (tokens * weight).sum() + jnp.square(found.frames).sum()

        return nnx.grad(loss, argnums=(0, 1))(model, frames)

    given, _ = missing_replaced(4, 0, 1)
    mask = given[1]
    of_model, of_frames = host(gradients(model, *given))
    assert (np.abs(of_frames).max((2, 3, 4)) > 0).tolist() == mask.tolist()
    for size in (1, 1e4, 1e30):
        of_model_too, of_frames_too = host(gradients(model, *missing_replaced(4, int(min(size, 9)), size)[1]))
        assert (of_frames_too == of_frames).all()
        for a, b in zip(jax.tree.leaves(of_model), jax.tree.leaves(of_model_too), strict=True):
            assert np.isfinite(a).all() and (a == b).all()


def test_values_that_are_refused():
    frames, mask, text = videos(2)
    model = encoder_of(CASES[0][1])
    with pytest.raises(ValueError, match="text is None; expected a sentence for each frame"):
        model(frames, mask)
    silent = encoder_of(CASES[0][1], dataclasses.replace(QFORMER, vocab_size=0, max_text=0))
    with pytest.raises(ValueError, match="expected none"):
        silent(frames, mask, text)
    with pytest.raises(ValueError, match=r"images of shape \(6, 8, 3\); expected \(8, 8, 3\)"):
        model(frames[:, :, :6], mask, text)
    with pytest.raises(ValueError, match="text of 33 tokens; expected at most 32"):
        model(frames, mask, np.ones((5, 2, 33), np.int32))
    with pytest.raises(ValueError, match="video_qformer.vocab_size is 40; expected 0"):
        VideoEncoder(VIT, QFORMER, QFORMER, VideoEncoderConfig(), WIDTH, nnx.Rngs(0))
    with pytest.raises(ValueError, match="keep_text_tokens without text"):
        encoder_of(CASES[4][1], dataclasses.replace(QFORMER, vocab_size=0, max_text=0))
    for name in ("max_frames", "window", "stride"):
        with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
            VideoEncoderConfig(**{name: 0})
    with pytest.raises(ValueError, match="attend_to_pads is about text tokens"):
        VideoEncoderConfig(attend_to_pads=True)
    with pytest.raises(ValueError, match="layers 3 is not a multiple of cross_every 2"):
        QFormerConfig(layers=3)
    with pytest.raises(ValueError, match="max_text is 0; expected at least 1"):
        QFormerConfig(max_text=0)
    with pytest.raises(ValueError, match="image_size 15 is not a multiple of patch_size 14"):
        ViTConfig(image_size=15)
    with pytest.raises(ValueError, match="no pooling head"):
        model.vit.pool(jnp.zeros((1, 5, 16)))
    with pytest.raises(ValueError, match="activation is 'relu'; expected one of gelu, gelu_tanh"):
        lively(lambda: ViT(dataclasses.replace(VIT, activation="relu"), nnx.Rngs(0)))
    with pytest.raises(ValueError, match="width 16 is not a multiple of heads 3"):
        lively(lambda: QFormer(dataclasses.replace(QFORMER, heads=3), 16, nnx.Rngs(0)))
