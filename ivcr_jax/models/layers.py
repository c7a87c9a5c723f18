"""What the towers and the decoder share: projections, norms, attention, stacks of layers.

Arrays only. Parameters are kept in the dtype they were made or loaded in and cast to that of the activations where they
are used; norms, softmax and the sums inside matrix products are f32. Every parameter carries `axes`, its logical axis
names (ivcr_jax/sharding.py says where they go).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from ivcr_jax.sharding import constrain

Module = TypeVar("Module", bound=nnx.Module)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}
REMAT_POLICIES = (
    "none",
    "full",
    "dots_saveable",
    "dots_with_no_batch_dims_saveable",
    "everything_saveable",
    "nothing_saveable",
)
INIT_STD = 0.02  # of tables


def native_dtype() -> str:
    """What models are computed in here where nobody says: bfloat16, but on CPUs, which have no units for it."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a model is computed. It changes speed, memory and rounding, never what is computed.

    Attributes:
      dtype: of activations: "bfloat16" or "float32".
      remat: what a layer keeps for the backward pass: "none" keeps all, "full" only its input, or the name of a
        policy of `jax.checkpoint_policies`.
      attention: of the decoder: "xla", "splash" (the TPU kernel; off TPU it is interpreted, slowly), or "auto":
        splash on TPU.
      videos_at_once: of a row of a batch, how many are encoded at a time; it divides the row's slots. 0 is all.
    """

    dtype: str = "bfloat16"
    remat: str = "none"
    attention: str = "auto"
    videos_at_once: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("dtype", ("bfloat16", "float32")),
            ("remat", REMAT_POLICIES),
            ("attention", ("auto", "xla", "splash")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(allowed)}")
        if self.videos_at_once < 0:
            raise ValueError(f"videos_at_once is {self.videos_at_once}; expected 0 for all, or more")


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float = INIT_STD) -> nnx.Param:
    """A parameter f32[shape], normal with this standard deviation; 0 makes zeros."""
    value = std * jax.random.normal(rngs.params(), shape) if std else jnp.zeros(shape)
    return nnx.Param(value, axes=axes)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a share of `x` and scales the rest up; without a key it is `x`."""
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def split_key(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    """`count` keys, or as many times None."""
    return [None] * count if key is None else list(jax.random.split(key, count))


def of_each_row(x: jax.Array, *index: jax.Array) -> jax.Array:
    """What each row has at its own places: x f[B, N, ...] and i32[B, ...] of each axis -> x[b][index[b]] of every b.

    Rows are a batch axis of this gather. Were they indexed by their numbers too, x[rows, index], XLA would gather the
    rows of all devices on each.
    """
    return jax.vmap(lambda x, *index: x[index])(x, *index)


class Linear(nnx.Module):
    """x f[..., I] -> f[..., O]: x W + b. `lora.add` may put a low-rank addition beside the kernel."""

    def __init__(
        self, rngs: nnx.Rngs, axes: tuple[str | None, str | None], sizes: tuple[int, int], bias: bool = True
    ) -> None:
        self.kernel = parameter(rngs, sizes, axes, std=sizes[0] ** -0.5)  # a small model stands still at INIT_STD
        self.bias = parameter(rngs, sizes[1:], axes[1:], std=0) if bias else None
        self.lora: nnx.Module | None = nnx.data(None)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        y = x @ self.kernel[...].astype(x.dtype)
        if self.bias is not None:
            y += self.bias[...].astype(x.dtype)
        return y if self.lora is None else y + self.lora(x, key)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis, computed in f32, in the dtype of `x`."""

    def __init__(self, width: int, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones(width), axes=("norm",))
        self.bias = nnx.Param(jnp.zeros(width), axes=("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(y.dtype) + self.bias[...].astype(y.dtype)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis (arXiv 1910.07467), computed in f32, in the dtype of `x`."""

    def __init__(self, width: int, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones(width), axes=("norm",))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(y.dtype)).astype(x.dtype)


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """f[..., S, H * K] -> f[..., S, H, K]."""
    return constrain(x.reshape(*x.shape[:-1], heads, -1), "batch", "seq", "act_heads", "head_dim")


class Attention(nnx.Module):
    """Multi-head attention from x f[B, S, D] to a context f[B, N, E].

    Args:
      rngs: of the initial weights.
      width, heads: D and H. context_width: E; D where it is not given.
      key_bias: whether the keys' projection has a bias; EVA's has none.
    """

    def __init__(
        self, rngs: nnx.Rngs, width: int, heads: int, context_width: int | None = None, key_bias: bool = True
    ) -> None:
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        context = context_width or width
        self.heads = heads
        self.q = Linear(rngs, ("embed", "heads"), (width, width))
        self.k = Linear(rngs, ("embed", "heads"), (context, width), bias=key_bias)
        self.v = Linear(rngs, ("embed", "heads"), (context, width))
        self.out = Linear(rngs, ("heads", "embed"), (width, width))

    def __call__(
        self, x: jax.Array, context: jax.Array, mask: jax.Array | None = None, key: jax.Array | None = None
    ) -> jax.Array:
        """f[B, S, D]. `mask` bool[B, N] says which of the context is there; where nothing is, the result is finite."""
        keys = split_key(key, 4)
        q = split_heads(self.q(x, keys[0]), self.heads)
        k = split_heads(self.k(context, keys[1]), self.heads)
        v = split_heads(self.v(context, keys[2]), self.heads)
        y = jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask[:, None, None, :])
        return self.out(y.reshape(x.shape), keys[3])


class Mlp(nnx.Module):
    """f[..., D] -> f[..., D] through one hidden layer of `hidden` units."""

    def __init__(self, rngs: nnx.Rngs, width: int, hidden: int, activation: str) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        self.up = Linear(rngs, ("embed", "mlp"), (width, hidden))
        self.down = Linear(rngs, ("mlp", "embed"), (hidden, width))
        self.activation = activation

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        keys = split_key(key, 2)
        y = ACTIVATIONS[self.activation](self.up(x, keys[0]))
        return self.down(constrain(y, "batch", *[None] * (y.ndim - 2), "act_mlp"), keys[1])


class Block(nnx.Module):
    """A pre-norm transformer layer: x f[B, S, D] -> f[B, S, D]; every position sees all that `mask` bool[B, S] has."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        width: int,
        heads: int,
        mlp_width: int,
        activation: str,
        norm_eps: float,
        key_bias: bool = True,
    ) -> None:
        self.attention_norm = LayerNorm(width, norm_eps)
        self.attention = Attention(rngs, width, heads, key_bias=key_bias)
        self.mlp_norm = LayerNorm(width, norm_eps)
        self.mlp = Mlp(rngs, width, mlp_width, activation)

    def __call__(self, x: jax.Array, mask: jax.Array | None = None, key: jax.Array | None = None) -> jax.Array:
        keys = split_key(key, 2)
        y = self.attention_norm(x)
        x = x + self.attention(y, y, mask, keys[0])
        x = x + self.mlp(self.mlp_norm(x), keys[1])
        return constrain(x, "batch", "seq", "act_embed")


def stack(make: Callable[[nnx.Rngs], Module], count: int, rngs: nnx.Rngs) -> Module:
    """`count` layers as one module, whose parameters have a leading axis of that size."""
    return nnx.vmap(lambda key: make(nnx.Rngs(key)))(jax.random.split(rngs.params(), count))


def unstack(layers: Module) -> nnx.List:
    """The layers of a stack as a list, each with arrays of its own.

    For decoding: a step of a scan first copies its layer's parameters out of the stack, which on a CPU takes longer
    than multiplying one token with them.
    """
    definition, state = nnx.split(layers)
    count = jax.tree.leaves(state)[0].shape[0]
    apart = jax.tree.map(list, state)

    def layer(number: int) -> Module:
        return nnx.merge(definition, jax.tree.map(lambda x: x[number], apart, is_leaf=lambda x: isinstance(x, list)))

    return nnx.List([layer(number) for number in range(count)])


def checkpointed(function: Callable[..., Any], remat: str) -> Callable[..., Any]:
    """The body of a scan as the remat policy of this name would have it (see Compute)."""
    if remat == "none":
        return function
    policy = jax.checkpoint_policies.nothing_saveable if remat == "full" else getattr(jax.checkpoint_policies, remat)
    return jax.checkpoint(function, policy=policy, prevent_cse=False)  # a scan's body cannot be merged with another


def over_chunks(
    function: Callable[[Any, jax.Array | None], Any], batch: Any, chunk: int, remat: str, key: jax.Array | None = None
) -> Any:
    """`function` over slices of a batch, one after the other, so that only one slice's activations are there at a time.

    Args:
      function: (arrays [B, chunk, ...], a key or None) -> arrays [B, chunk, ...].
      batch: a tree of arrays [B, V, ...].
      chunk: how many of V at a time; 0 is all at once.
      remat: see Compute.
      key: split over the slices.

    Raises ValueError where the chunk does not divide V.
    """
    size = jax.tree.leaves(batch)[0].shape[1]
    if chunk in (0, size):
        return function(batch, key)
    if size % chunk:
        raise ValueError(f"videos_at_once is {chunk}; expected a divisor of the {size} videos of a row")
    keys = None if key is None else jax.random.split(key, size // chunk)

    def body(_: None, each: tuple[jax.Array, jax.Array | None]) -> tuple[None, Any]:
        number, key = each
        # Cut out where it lies: to scan over slices themselves would first copy the whole batch into their order.
        some = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, number * chunk, chunk, axis=1), batch)
        return None, function(some, key)

    body = checkpointed(body, "none" if remat == "none" else "full")
    _, out = jax.lax.scan(body, None, (jnp.arange(size // chunk), keys))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[1], size, *x.shape[3:]), out)


def run_stack(
    layers: Module,
    body: Callable[[Module, Any, Any], tuple[Any, Any]],
    x: Any,
    each: Any = None,
    *,
    remat: str,
    key: jax.Array | None = None,
) -> tuple[Any, Any]:
    """Runs a stack of layers in one `jax.lax.scan`, so that compile time does not grow with depth.

    Args:
      layers: from `stack`; or from `unstack`, which are run one after the other, without remat.
      body: (layer, x, (each layer's slice, the layer's key or None)) -> (x, what the layer hands out).
      x: what goes from layer to layer.
      each: arrays with a leading axis of layers, or None; with a list of layers a tree of lists as long.
      remat: see Compute.
      key: split over the layers.

    Returns:
      x after the last layer, and what the layers handed out: stacked, or a tree of lists.
    """
    if isinstance(layers, nnx.List):
        own_keys = split_key(key, len(layers))
        handed = []
        for number, layer in enumerate(layers):
            own = jax.tree.map(lambda x: x[number], each, is_leaf=lambda x: isinstance(x, list))  # noqa: B023
            x, out = body(layer, x, (own, own_keys[number]))
            handed.append(out)
        return x, jax.tree.map(lambda *outs: list(outs), *handed)
    definition, state = nnx.split(layers)

    def step(x: Any, slices: Any) -> tuple[Any, Any]:
        layer_state, *rest = slices
        return body(nnx.merge(definition, layer_state), x, tuple(rest))

    count = jax.tree.leaves(state)[0].shape[0]
    keys = None if key is None else jax.random.split(key, count)
    return jax.lax.scan(checkpointed(step, remat), x, (state, each, keys))
