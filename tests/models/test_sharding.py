"""Where arrays lie: the one table, and that any mesh gives the numbers of one device."""

import collections
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from configs import interllava_7b
from ivcr_jax import bundle
from ivcr_jax.models.heads import ABSENT
from ivcr_jax.models.interllava import InterLLaVA
from ivcr_jax.models.retriever import Retriever
from ivcr_jax.sharding import MeshConfig, by_rows, constrain, logical_axes, make_mesh, shardings, spec
from tests.models.conftest import CHAT, F32, close, find, host, operations, when


def test_a_mesh_is_of_all_devices():
    assert dict(make_mesh(MeshConfig(2, 2, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(MeshConfig(2, -1, 1)).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    for sizes in ((3, -1, 1), (2, 2, 1), (-1, -1, 1), (0, 8, 1)):
        with pytest.raises(ValueError, match="for 8 devices"):
            make_mesh(MeshConfig(*sizes))


def test_names_become_mesh_axes():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    assert spec(("layers", "embed", "mlp"), (3, 4, 6), mesh) == jax.P(None, ("fsdp",), ("tensor",))
    assert spec(("batch", "seq", None), (4, 3, 5), mesh) == jax.P(("fsdp", "data"), None, None)
    assert spec(("embed", "mlp"), (3, 6), mesh) == jax.P(None, ("tensor",)), "an axis that does not divide stays whole"
    assert spec(("batch",), (2,), mesh) == jax.P(None)
    assert spec(("embed", "mlp"), (4, 6), make_mesh(MeshConfig(8, 1, 1))) == jax.P(None, None)
    for names, shape, message in (
        (("embed", "batch"), (4, 4), "'embed' and 'batch' both go to mesh axis 'fsdp'"),
        (("mlp", "vocab"), (4, 4), "'mlp' and 'vocab' both go to mesh axis 'tensor'"),
        (("embde",), (4,), "logical axis 'embde' is unknown"),
        (("embed",), (4, 4), "name 1 axes of an array of shape (4, 4)"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            spec(names, shape, mesh)


def test_without_a_mesh_nothing_is_constrained():
    x = jnp.ones((2, 3))
    assert constrain(x, "nonsense", "batch") is x
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))), pytest.raises(ValueError, match="nonsense"):
        constrain(x, "nonsense", "batch")


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 4, 2), (2, 2, 2)])
def test_nearly_all_of_the_full_models_is_sharded(sizes):
    config = bundle.BundleConfig.from_values(interllava_7b.get_config().to_dict())
    mesh = make_mesh(MeshConfig(*sizes))
    for make in (lambda: InterLLaVA(config.model, nnx.Rngs(0)), lambda: Retriever(config.retriever, nnx.Rngs(0))):
        shapes = bundle.parameters(nnx.eval_shape(make))
        whole = held = 0
        for variable in shapes.values():
            size = int(np.prod(variable.shape))
            lies = NamedSharding(mesh, spec(logical_axes(variable), variable.shape, mesh))
            whole += size
            held += int(np.prod(lies.shard_shape(variable.shape)))
        # Of a device's share, what is not divided by all of fsdp and tensor is small.
        assert held < 1.05 * whole / (sizes[1] * sizes[2])


@pytest.fixture(scope="module")
def on_one_device(world):
    """Two rows four times, one for each of eight devices, and the whole model's numbers on one."""
    pack = dataclasses.replace(world.pack, seq_len=240, video_slots=4, max_turns=2)
    two = world.batch((((find("a", "b", "c", target=1), when("b")),), ((when("c"),), (CHAT,))), pack)
    batch = {name: jnp.concatenate([array] * 4) for name, array in two.items()}
    one_layer = dataclasses.replace(world.config().qformer, layers=1, cross_every=1)  # half the time to compile
    definition, state = nnx.split(world.model(qformer=one_layer))

    def loss(state, batch):
        out = nnx.merge(definition, state)(batch)
        scores = jnp.where(out.scores > ABSENT, out.scores, 0)
        hidden = jnp.where((batch["segment_ids"] > 0)[..., None], out.hidden, 0)
        moments = jnp.where((batch["moment_slots"] >= 0)[..., None], out.moments.expected(), 0)
        weights = jnp.sin(jnp.arange(hidden.size)).reshape(hidden.shape)
        return (hidden * weights).mean() + jnp.square(scores).mean() + jnp.square(moments).mean(), scores

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return state, batch, step, host(step(state, batch))


@pytest.mark.parametrize("rows", [4, 8])
def test_two_layers_that_nothing_constrains_have_the_gradients_of_one_device(rows):
    """With rows over ("data", "fsdp") XLA sums what belongs to other rows into these gradients: wrong by their size."""
    mesh = make_mesh(MeshConfig(2, 2, 2))
    rng = np.random.default_rng(0)
    x, first, second = (rng.standard_normal(shape, np.float32) for shape in ((rows, 4, 32), (32, 16), (16, 16)))

    def loss(first, second, x):
        return jnp.tanh(jnp.tanh(x @ first) @ second).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    whole = gradient(first, second, x)
    lies = NamedSharding(mesh, spec(("embed", "mlp"), (32, 16), mesh))
    divided = gradient(*jax.device_put((first, second), lies), jax.device_put(x, by_rows(mesh)))
    for found, expected in zip(divided, whole, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


# Where each part's activations are laid out, counted by hand: layers once, as the body of their scan.
LAID_OUT = {
    "vit": {"x": 2, "heads": 3, "mlp": 1},
    "qformer": {"x": 1, "heads": 9, "mlp": 4},  # a layer with cross-attention and one without; queries and text
    "video_qformer": {"x": 1, "heads": 6, "mlp": 1},
    "llama": {"x": 2, "heads": 3, "mlp": 1},
    "moment": {"x": 1, "heads": 3, "mlp": 1},
}


@pytest.mark.parametrize("name", LAID_OUT)
def test_activations_are_laid_out_by_rows_and_heads(world, name):
    """Left to itself XLA may lay out a layer anyhow, and no number would tell."""
    model = nnx.eval_shape(lambda: InterLLaVA(world.config(), nnx.Rngs(0), F32))
    ones = jnp.ones((4, 6), jnp.int32)
    x = jnp.ones((4, 6, 32))
    calls = {
        "vit": lambda m: m.encoder.vit(jnp.ones((4, 8, 8, 3))),
        "qformer": lambda m: m.encoder.qformer(x[..., :16], None, ones),
        "video_qformer": lambda m: m.encoder.video_qformer(x[..., :16]),
        "llama": lambda m: m.llama(x, ones, ones)[0],
        "moment": lambda m: m.moment(x[:, 0], jnp.ones((4, 6, 2, 32)), x[..., 0], ones > 0, x[:, 0, 0]).starts,
    }
    definition, state = nnx.split(model)
    rows = ("fsdp", "data")
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        program = jax.make_jaxpr(lambda state: calls[name](nnx.merge(definition, state)))(state)
    found = collections.Counter(
        operation.params["sharding"].spec
        for operation in operations(program.jaxpr)
        if operation.primitive.name == "sharding_constraint" and operation.params["sharding"].spec[0] == rows
    )
    kinds = {
        "x": jax.P(rows, None, None),
        "heads": jax.P(rows, None, ("tensor",), None),
        "mlp": jax.P(rows, None, ("tensor",)),
    }
    assert found == {kinds[kind]: count for kind, count in LAID_OUT[name].items()}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 8)])
def test_eight_devices_give_the_numbers_of_one(on_one_device, sizes):
    state, batch, step, ((loss, scores), gradients) = on_one_device
    mesh = make_mesh(MeshConfig(*sizes))
    lies = shardings(state, mesh)
    placed = jax.tree.map(
        lambda value, where: value.replace(jax.device_put(value.get_value(), where.get_value())),
        state,
        lies,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    rows = {
        name: jax.device_put(array, NamedSharding(mesh, spec(("batch",), array.shape[:1], mesh)))
        for name, array in batch.items()
    }
    with jax.set_mesh(mesh):
        compiled = step.lower(placed, rows).compile()
    if sizes[2] == 1:  # rows are divided by all devices, so none makes numbers for those of all: 8 rows, 160 frames
        found = re.findall(r"= f32\[(?:8,240|160),([0-9,]+)\]", compiled.as_text())
        # A device may look up an eighth of a width (16, 32, 48) for all rows and then exchange it for its own rows.
        whole = [shape for shape in found if int(shape.split(",")[-1]) not in (2, 4, 6)]
        assert not whole, whole
    (found_loss, found_scores), found = compiled(placed, rows)
    assert len(found_scores.sharding.device_set) == 8
    close(found_loss, loss, 1e-5)
    close(found_scores, scores, 1e-5)
    for expected, value in zip(jax.tree.leaves(gradients), jax.tree.leaves(found), strict=True):
        close(value, expected, 1e-5)
