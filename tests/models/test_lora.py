"""LoRA on any projection: beside it, merged into it, taken out again, and trained alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ivcr_jax.models import lora
from ivcr_jax.models.layers import Linear
from ivcr_jax.models.llama import Llama, LlamaConfig
from ivcr_jax.models.lora import LoraConfig
from ivcr_jax.models.video_encoder import VideoEncoder, VideoEncoderConfig
from tests.models.conftest import F32, QFORMER, VIDEO_QFORMER, VIT, close, lively, operations

LLAMA = LlamaConfig(vocab_size=30, width=16, layers=2, heads=2, kv_heads=1, mlp_width=24)
TOKENS = np.random.default_rng(0).integers(0, 30, (2, 7))


def states(model, key=None):
    return np.asarray(jitted(model, key))


@nnx.jit
def jitted(model, key):
    ones = jnp.ones(TOKENS.shape, jnp.int32)
    return model(model.embed(jnp.asarray(TOKENS)), jnp.cumsum(ones, 1) - 1, ones, key=key)[0]


def adapted(config, seed=0):
    """A decoder whose additions are not zero."""

    def make():
        model = Llama(LLAMA, nnx.Rngs(0), F32)
        lora.add(model, config, nnx.Rngs(1))
        return model

    return lively(make, seed)


def test_an_addition_begins_as_nothing():
    model = Llama(LLAMA, nnx.Rngs(0), F32)
    before = states(model)
    lora.add(model, LoraConfig(rank=3, targets=r"layers\.(q|down)"), nnx.Rngs(1))
    assert set(lora.adapted(model)) == {"layers.q", "layers.down"}
    close(states(model), before, 0)
    # But it is no dead end: A is drawn for each layer anew, so B has a gradient.
    a = np.asarray(model.layers.q.lora.a[...])
    assert a.shape == (2, 16, 3) and np.abs(a[0] - a[1]).min() > 0
    assert model.layers.q.lora.b.shape == (2, 3, 16)


def test_what_it_adds_is_the_scaled_product():
    rngs = nnx.Rngs(0)
    linear = Linear(rngs, ("embed", "mlp"), (5, 4))
    holder = nnx.Dict(only=linear)
    lora.add(holder, LoraConfig(rank=2, alpha=3.0, targets="only"), rngs)
    linear.lora.b[...] = jnp.ones((2, 4))
    x = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    kernel, a = np.asarray(linear.kernel[...]), np.asarray(linear.lora.a[...])
    close(linear(jnp.asarray(x)), x @ kernel + 3 / 2 * (x @ a) @ np.ones((2, 4)), 1e-5)


@pytest.mark.parametrize("targets", [r"layers\.(q|k|v|o)", r"layers\..*", r"layers\.gate", "head"])
def test_merged_computes_the_same_and_unmerging_restores(targets):
    model = adapted(LoraConfig(rank=2, alpha=1.0, targets=targets))
    expected = states(model)
    logits = np.asarray(model.logits(jnp.asarray(expected)))
    kernels = {path: np.asarray(linear.kernel[...]) for path, linear in lora.adapted(model).items()}
    assert kernels
    taken = lora.merge(model)
    assert not lora.adapted(model) and set(taken) == set(kernels)
    assert not jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
    close(states(model), expected, 1e-5)
    close(model.logits(jnp.asarray(expected)), logits, 1e-5)
    lora.unmerge(model, taken)
    close(states(model), expected, 1e-5)
    for path, linear in lora.adapted(model).items():
        close(linear.kernel[...], kernels[path], 1e-6)


def test_towers_are_adapted_by_the_same_names():
    def make():
        model = VideoEncoder(VIT, QFORMER, VIDEO_QFORMER, VideoEncoderConfig(4, 2, 2), 8, nnx.Rngs(0), F32)
        lora.add(model, LoraConfig(rank=1, targets=r"(vit\.blocks|qformer\.groups\.layers\.0).*\.(q|up)"), nnx.Rngs(1))
        return model

    model = lively(make)
    mlps = {f"qformer.groups.layers.0.{name}.up" for name in ("query_mlp", "text_mlp")}
    attentions = {f"qformer.groups.layers.0.{name}.q" for name in ("attention", "cross")}
    expected = mlps | attentions | {"vit.blocks.attention.q", "vit.blocks.mlp.up"}
    assert set(lora.adapted(model)) == expected
    frames = jnp.asarray(np.random.default_rng(0).standard_normal((1, 3, 8, 8, 3)), jnp.float32)
    text = jnp.ones((1, 3, 4), jnp.int32)
    tokens = nnx.jit(lambda model: model(frames, text=text).tokens)
    before = tokens(model)
    lora.merge(model)
    close(tokens(model), before, 1e-5)


def test_a_target_that_matches_nothing_is_refused():
    model = Llama(LLAMA, nnx.Rngs(0), F32)
    with pytest.raises(ValueError, match="'layers.qq' match none of the projections .*layers.q"):
        lora.add(model, LoraConfig(targets="layers.qq"), nnx.Rngs(1))
    lora.add(model, LoraConfig(rank=0, targets="layers.qq"), nnx.Rngs(1))
    assert not lora.adapted(model)


def test_dropout_needs_a_key_and_keeps_the_mean():
    config = LoraConfig(rank=2, alpha=1.0, dropout=0.5, targets=r"layers\.(q|v|up)")
    model = adapted(config)
    np.testing.assert_array_equal(states(model), states(model))
    a, b = (states(model, jax.random.key(seed)) for seed in (0, 1))
    assert np.abs(a - b).max() > 1e-3 and np.abs(a - states(model)).max() > 1e-3
    np.testing.assert_array_equal(a, states(model, jax.random.key(0)))
    np.testing.assert_array_equal(
        states(adapted(dataclasses.replace(config, dropout=0.0)), jax.random.key(0)), states(model)
    )
    linear = lora.adapted(model)["layers.up"]
    one_layer = Linear(nnx.Rngs(0), ("embed", "mlp"), (16, 24), bias=False)
    holder = nnx.Dict(only=one_layer)
    lora.add(holder, dataclasses.replace(config, targets="only"), nnx.Rngs(0))
    one_layer.lora.a[...], one_layer.lora.b[...] = linear.lora.a[...][0], linear.lora.b[...][0]
    x = jnp.ones((20000, 16))
    mean = one_layer(x, jax.random.key(2)).mean(0)
    spread = one_layer(x, jax.random.key(2)).std(0)
    # Five standard errors of a mean of 20,000.
    assert (jnp.abs(mean - one_layer(x[:1])[0]) < 5 * spread / 20000**0.5 + 1e-6).all()


def test_the_factors_are_trained_alone():
    model = adapted(LoraConfig(rank=2, alpha=1.0, targets=r"layers\.(q|v)"))
    definition, factors, rest = nnx.split(model, nnx.LoRAParam, ...)
    assert len(jax.tree.leaves(factors)) == 4

    def loss(factors):
        return jnp.square(states_of(nnx.merge(definition, factors, rest))).sum()

    def states_of(model):
        ones = jnp.ones(TOKENS.shape, jnp.int32)
        return model(model.embed(jnp.asarray(TOKENS)), jnp.cumsum(ones, 1) - 1, ones)[0][..., 0]

    gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(factors))
    assert len(gradients) == 4
    assert all(np.abs(np.asarray(gradient)).max() > 0 and gradient.dtype == jnp.float32 for gradient in gradients)


def test_every_projection_of_a_layer_drops_out_with_a_key():
    model = adapted(LoraConfig(rank=2, alpha=1.0, dropout=0.5, targets=r"layers\..*"))
    definition, state = nnx.split(model)
    for key, expected in ((jax.random.key(0), 7), (None, 0)):
        program = jax.make_jaxpr(lambda state: jitted(nnx.merge(definition, state), key))(state)  # noqa: B023
        assert [each.primitive.name for each in operations(program.jaxpr)].count("random_bits") == expected
