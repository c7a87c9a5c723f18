"""The dual encoder: lengths, masks, and layers over frames that begin as nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ivcr_jax.models.retriever import Retriever, RetrieverConfig, TextConfig
from tests.models.conftest import F32, VIT, close, lively

TOWER = dataclasses.replace(VIT, cls_token=False, key_bias=True, final_norm=True, map_head=True)
TEXT = TextConfig(vocab_size=50, max_tokens=6, width=12, layers=2, heads=2, mlp_width=20)
CONFIG = RetrieverConfig(vit=TOWER, text=TEXT, frame_layers=0, max_frames=4)
FRAMES = jnp.asarray(np.random.default_rng(0).integers(0, 256, (3, 5, 8, 8, 3)), jnp.uint8)
MASK = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)


@nnx.jit
def embed_video(model, frames, mask):
    return model.embed_video(frames, mask)


@nnx.jit
def embed_frames(model, frames):
    return model.embed_frames(frames)


@nnx.jit
def pool(model, frames, mask=None):
    return model.pool(frames, mask)


@pytest.fixture(scope="module")
def model():
    return lively(lambda: Retriever(CONFIG, nnx.Rngs(0), F32))


def with_layers(seed=0):
    config = dataclasses.replace(CONFIG, frame_layers=2)
    return lively(lambda: Retriever(config, nnx.Rngs(0), F32), seed)


def test_vectors_have_length_one_and_a_video_without_frames_has_none(model):
    videos = embed_video(model, FRAMES, MASK)
    close(jnp.linalg.norm(videos, axis=-1), [1, 1, 0], 1e-6)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 50, (4, 6)))
    texts = nnx.jit(lambda model, tokens: model.embed_text(tokens))(model, tokens)
    assert texts.dtype == videos.dtype == jnp.float32
    close(jnp.linalg.norm(texts, axis=-1), np.ones(4), 1e-6)
    expected = np.asarray(texts) @ np.asarray(videos).T * np.exp(np.asarray(model.logit_scale[...])) + np.asarray(
        model.logit_bias[...]
    )
    close(model.logits(texts, videos), expected, 1e-5)


def test_a_video_is_the_mean_of_its_frames(model):
    frames = np.asarray(embed_frames(model, FRAMES))
    mean = np.stack([frames[0].mean(0), frames[1, :2].mean(0)])
    close(np.asarray(embed_video(model, FRAMES, MASK))[:2], mean / np.linalg.norm(mean, axis=-1, keepdims=True), 1e-5)
    close(pool(model, frames), pool(model, frames, np.ones((3, 5), bool)), 1e-6)


@pytest.mark.parametrize("layers", [False, True])
def test_missing_frames_have_no_effect(model, layers):
    model = with_layers() if layers else model
    other = jnp.where(MASK[..., None, None, None], FRAMES, 255 - FRAMES)
    found, expected = (np.asarray(embed_video(model, frames, MASK)) for frames in (other, FRAMES))
    np.testing.assert_array_equal(found[:2], expected[:2])

    @nnx.jit
    def gradient_of(model, frames):
        return jax.grad(lambda frames: model.embed_video(frames, MASK)[1].sum())(frames)

    gradient = np.asarray(gradient_of(model, FRAMES.astype(jnp.float32)))
    assert np.abs(gradient[1, :2]).max() > 0 and not gradient[1, 2:].any() and np.isfinite(gradient).all()


def test_layers_over_frames_begin_as_the_identity():
    config = dataclasses.replace(CONFIG, frame_layers=2)
    model = Retriever(config, nnx.Rngs(0), F32)
    frames = embed_frames(model, FRAMES)
    mean = np.asarray(frames)[0].mean(0)
    close(np.asarray(pool(model, frames, MASK))[0], mean / np.linalg.norm(mean), 1e-5)


def test_layers_over_frames_see_their_order():
    model = with_layers()
    frames = np.asarray(embed_frames(model, FRAMES))
    expected = np.asarray(pool(model, frames))
    assert np.abs(np.asarray(pool(model, frames[:, ::-1])) - expected).max() > 1e-2
    # Five frames share four rows of positions: the first two have the same.
    close(pool(model, frames[:, [1, 0, 2, 3, 4]]), expected, 1e-5)


def test_a_text_of_another_length_is_refused(model):
    with pytest.raises(ValueError, match="texts of 5 tokens; expected 6"):
        model.embed_text(jnp.zeros((1, 5), jnp.int32))
    headless = dataclasses.replace(CONFIG, vit=dataclasses.replace(TOWER, map_head=False))
    with pytest.raises(ValueError, match="expected a configuration with map_head=True"):
        Retriever(headless, nnx.Rngs(0), F32).embed_video(FRAMES)


def test_padding_a_batch_does_not_move_a_videos_frames():
    """Three frames of a table of four rows, in a batch of five."""
    model = with_layers()
    frames = model.embed_frames(FRAMES)
    mask = jnp.arange(5) < jnp.array([[3]] * 3)
    close(model.pool(frames, mask), model.pool(frames[:, :3]), 1e-5)
