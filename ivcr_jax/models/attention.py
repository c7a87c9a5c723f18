"""Attention of the decoder: what a position may see, and three ways to compute it.

A position sees what stands before it in its segment; one of a video's block sees its block alone, all of it. Arrays
only. Axis letters: B rows, S positions that look, N positions looked at, H heads, G heads of keys and values, K head
dim.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from ivcr_jax.sharding import RULES

# Of each position: its segment (0: nothing is there), its block (0: text; None: all is text), its place in the row.
Marks = tuple[jax.Array, jax.Array | None, jax.Array]
UNSEEN = -1e30  # a score; finite, so that a position that sees nothing has no NaN
TILE = 128  # the kernel's sequence lengths are multiples of it
MAX_BLOCKS = 1 << 12  # of a row, so that a segment and a block make one number


def visible(sees: Marks, seen: Marks) -> jax.Array:
    """bool[B, S, N]: which of the second each of the first sees."""
    segment = sees[0][:, :, None]
    before = seen[2][:, None, :] <= sees[2][:, :, None]
    if sees[1] is not None and seen[1] is not None:
        block = sees[1][:, :, None]
        before = jnp.where(block > 0, block == seen[1][:, None, :], before)
    return (segment > 0) & (segment == seen[0][:, None, :]) & before


def attend(q: jax.Array, k: jax.Array, v: jax.Array, sees: Marks, seen: Marks, how: str) -> jax.Array:
    """Softmax attention.

    Args:
      q: f[B, S, H, K]. k, v: f[B, N, G, K]; G divides H.
      sees, seen: marks of the S and the N positions.
      how: see Compute.attention. Splash is for positions that look at each other (S = N, the same marks); "cache" is
        for others, "xla" but on a CPU.

    Returns:
      f[B, S, H, K]. Where nothing is seen it is finite and means nothing.
    """

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, mask=visible(sees, seen)[:, None])

    def splash(interpret: bool) -> Callable[..., jax.Array]:
        return functools.partial(_splash, segments=sees[0], blocks=sees[1], interpret=interpret)

    def by_rows(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return _call(q, k, v, visible(sees, seen), _by_rows)

    if how == "xla":
        return plain(q, k, v)
    if how == "splash":
        return jax.lax.platform_dependent(q, k, v, tpu=splash(False), default=splash(True))
    # By the platform that is compiled for, which need not be the one compiled on.
    if how == "cache":
        return jax.lax.platform_dependent(q, k, v, cpu=by_rows, default=plain)
    return jax.lax.platform_dependent(q, k, v, tpu=splash(False), cpu=by_rows, default=plain)


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, blocks: jax.Array | None, interpret: bool
) -> jax.Array:
    """Two calls of the kernel, chosen from by position: a causal one for text, one within blocks for visual tokens."""
    length = q.shape[1]
    short = -length % TILE

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, short), *[(0, 0)] * (x.ndim - 2)))

    q, k, v, segments = (pad(x) for x in (q * q.shape[-1] ** -0.5, k, v, segments))
    y = _call(q, k, v, segments, functools.partial(_kernel, causal=True, interpret=interpret))
    if blocks is not None:
        blocks = pad(blocks)
        # Text positions look too, among themselves, for nothing: the kernel has no way to leave rows out.
        kernel = functools.partial(_kernel, causal=False, interpret=interpret)
        within = _call(q, k, v, segments * MAX_BLOCKS + blocks, kernel)
        y = jnp.where((blocks > 0)[:, :, None, None], within, y)
    return y[:, :length]


def _call(q: jax.Array, k: jax.Array, v: jax.Array, marks: jax.Array, run: Callable[..., jax.Array]) -> jax.Array:
    """`run` over rows and heads, with marks [B, ...]; on a mesh each device runs its own rows and heads."""
    group = q.shape[2] // k.shape[2]
    q = q.reshape(*q.shape[:2], k.shape[2], group, q.shape[3]).transpose(0, 2, 3, 1, 4)  # [B, G, H / G, S, K]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        # Axes of one device too: over one that is not named the backward pass sums, and XLA keeps a sum over one.
        def share(name: str, size: int) -> tuple[str, ...] | None:
            axes = tuple(axis for axis in RULES[name] if axis in mesh.shape)
            return axes if axes and size % np.prod([mesh.shape[axis] for axis in axes]) == 0 else None

        rows, heads = share("batch", len(q)), share("act_heads", k.shape[1])
        lie = jax.P(rows, heads)
        # check_vma: the kernel's outputs carry no marks of what varies over the mesh.
        run = jax.shard_map(run, in_specs=(lie, lie, lie, jax.P(rows)), out_specs=lie, check_vma=False)
    y = run(q, k, v, marks)
    return y.transpose(0, 3, 1, 2, 4).reshape(q.shape[0], q.shape[3], -1, q.shape[4])


def _by_rows(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array) -> jax.Array:
    """As `_kernel`, of S positions that look at N, with what is seen, bool[B, S, N]. One row's scores are there at a
    time, and again in the backward pass: in a CPU's cache, where this takes less than half the time that all rows at
    once do."""

    def row(each: tuple[jax.Array, ...]) -> jax.Array:
        q, k, v, seen = each
        group, length = q.shape[1:3]
        q = q.reshape(len(q), group * length, -1) * q.shape[-1] ** -0.5
        scores = jnp.einsum("gsk,gtk->gst", q, k, preferred_element_type=jnp.float32)
        scores = jnp.where(jnp.tile(seen, (group, 1)), scores, UNSEEN)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        y = jnp.einsum("gst,gtk->gsk", weights.astype(v.dtype), v) / weights.sum(-1, keepdims=True).astype(v.dtype)
        return y.reshape(len(q), group, length, -1)

    return jax.lax.map(jax.checkpoint(row), (q, k, v, seen))


def _kernel(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, *, causal: bool, interpret: bool) -> jax.Array:
    """q f[B, G, H / G, S, K], k, v f[B, G, S, K], ids i32[B, S] -> f[B, G, H / G, S, K]."""
    length = q.shape[3]
    mask = splash_mask.CausalMask((length, length)) if causal else splash_mask.FullMask((length, length))
    kernel = splash_kernel.make_splash_mqa(
        splash_mask.MultiHeadMask([mask] * q.shape[2]),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    segment_ids = splash_kernel.SegmentIds(ids, ids)
    over_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    return jax.vmap(over_heads)(q, k, v, segment_ids)
