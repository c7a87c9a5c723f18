"""Where arrays lie: the one table, and that any mesh gives the numbers of one device."""

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
from ivcr_jax.sharding import constrain, logical_axes, make_mesh, shardings, spec
from tests.models.conftest import close, host


def test_a_mesh_is_of_all_devices():
    assert dict(make_mesh(2, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(2, -1, 1).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    for sizes in ((3, -1, 1), (2, 2, 1), (-1, -1, 1), (0, 8, 1)):
        with pytest.raises(ValueError, match="for 8 devices"):
            make_mesh(*sizes)


def test_names_become_mesh_axes():
    mesh = make_mesh(2, 2, 2)
    assert spec(("layers", "embed", "mlp"), (3, 4, 6), mesh) == jax.P(None, ("fsdp",), ("tensor",))
    assert spec(("batch", "seq", None), (4, 3, 5), mesh) == jax.P(("data", "fsdp"), None, None)
    assert spec(("embed", "mlp"), (3, 6), mesh) == jax.P(None, ("tensor",)), "an axis that does not divide stays whole"
    assert spec(("batch",), (2,), mesh) == jax.P(None)
    assert spec(("embed", "mlp"), (4, 6), make_mesh(8, 1, 1)) == jax.P(None, None)
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
    with jax.set_mesh(make_mesh(2, 2, 2)), pytest.raises(ValueError, match="nonsense"):
        constrain(x, "nonsense", "batch")


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 4, 2), (2, 2, 2)])
def test_nearly_all_of_the_full_models_is_sharded(sizes):
    config = bundle.BundleConfig.from_values(interllava_7b.get_config().to_dict())
    mesh = make_mesh(*sizes)
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
    """Two rows twice, so that eight devices have a row or a half each, and the whole model's numbers on one."""
    batch = {name: jnp.concatenate([array] * 4) for name, array in world.batch().items()}
    definition, state = nnx.split(world.model())

    def loss(state, batch):
        out = nnx.merge(definition, state)(batch)
        scores = jnp.where(out.scores > ABSENT, out.scores, 0)
        hidden = jnp.where((batch["segment_ids"] > 0)[..., None], out.hidden, 0)
        moments = jnp.where((batch["moment_slots"] >= 0)[..., None], out.moments.expected(), 0)
        weights = jnp.sin(jnp.arange(hidden.size)).reshape(hidden.shape)
        return (hidden * weights).mean() + jnp.square(scores).mean() + jnp.square(moments).mean(), scores

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return state, batch, step, host(step(state, batch))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 8)])
def test_eight_devices_give_the_numbers_of_one(on_one_device, sizes):
    state, batch, step, ((loss, scores), gradients) = on_one_device
    mesh = make_mesh(*sizes)
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
        (found_loss, found_scores), found = step(placed, rows)
    assert len(found_scores.sharding.device_set) == 8
    close(found_loss, loss, 1e-5)
    close(found_scores, scores, 1e-5)
    for expected, value in zip(jax.tree.leaves(gradients), jax.tree.leaves(found), strict=True):
        close(value, expected, 1e-5)
