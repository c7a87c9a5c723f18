"""Exact search: the vectors with the largest inner products, over one device or many.

Rows lie on their devices in blocks, each an array of its own, so that no search copies one: a slice of one large array
would be copied before every product. A device keeps the best of its own rows from block to block, and in the end the
devices exchange these alone. Knows nothing of videos or files. Axis letters: B queries, N vectors, D their width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# Of a device's scores of a block, for the largest batch.
SCORES_BYTES = 64 * 2**20
# Numbers of queries that are compiled for. Others are filled up to the next, and more than the last are taken in turn.
BATCHES = (1, 8, 64, 256)
# Of approx_max_k, on TPUs alone: the mean share of the true ones that it finds.
RECALL = 0.999
_AXIS = "rows"


class Index:
    """Vectors f32[N, D] on devices. Attributes: size: N. width: D."""

    def __init__(self, vectors: np.ndarray, mesh: Mesh | None = None) -> None:
        """Puts the vectors in place.

        Args:
          vectors: f32[N, D]; not to be changed afterwards, as a CPU's blocks may be views of it.
          mesh: over whose devices, all of them, the rows are divided. None is one device.

        Raises:
          ValueError: for anything but two axes of f32.
        """
        if vectors.ndim != 2 or vectors.dtype != np.float32:
            raise ValueError(f"vectors are {vectors.dtype}{list(vectors.shape)}; expected float32[N, D]")
        self.size, self.width = vectors.shape
        devices = np.array(jax.local_devices()[:1]) if mesh is None else mesh.devices.reshape(-1)
        self._mesh = Mesh(devices, (_AXIS,))
        share = -(-self.size // len(devices))
        count = -(-share * BATCHES[-1] * 4 // SCORES_BYTES)
        self._rows = -(-share // count) if count else 0  # of a block on one device
        self._share = count * self._rows
        self._blocks = [self._put(self._of_block(vectors, number)) for number in range(count)]
        there = np.ones(self.size, bool)
        # Where all rows of a block are there, no mask is read.
        masks = [self._of_block(there, number) for number in range(count)]
        self._there = [None if all(map(np.all, mask)) else self._put(mask) for mask in masks]

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k vectors with the largest inner product with each query, largest first, of equal ones the lower index.

        Args:
          queries: f32[B, D].
          k: how many, at least 1.
          allowed: bool[N], which vectors may be found; None is all.

        Returns:
          scores f32[B, k'] and indices i32[B, k'], k' = min(k, N). Where fewer are allowed, the rest has the index -1
          and the score -inf. On a TPU each of the k' is found with probability RECALL, elsewhere with certainty.

        Raises:
          ValueError: for another shape, k or mask, or for queries that are not finite.
        """
        if queries.ndim != 2 or queries.shape[1] != self.width:
            raise ValueError(f"queries are of shape {list(queries.shape)}; expected [B, {self.width}]")
        if not np.isfinite(queries).all():
            raise ValueError("queries hold values that are not finite; expected finite ones: no order is defined")
        if k < 1:
            raise ValueError(f"k is {k}; expected at least 1")
        if allowed is not None and (allowed.shape != (self.size,) or allowed.dtype != bool):
            raise ValueError(f"allowed is {allowed.dtype}{list(allowed.shape)}; expected bool[{self.size}]")
        k = min(k, self.size)
        scores, indices = np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int32)
        if not scores.size:
            return scores, indices
        masks = self._there
        if allowed is not None:
            masks = [self._put(self._of_block(allowed, number)) for number in range(len(self._blocks))]
        for first in range(0, len(queries), BATCHES[-1]):
            part = queries[first : first + BATCHES[-1]]
            filled = np.zeros((next(size for size in BATCHES if size >= len(part)), self.width), np.float32)
            filled[: len(part)] = part
            best = self._search(jax.device_put(filled, NamedSharding(self._mesh, P())), k, masks)
            for target, found in zip((scores, indices), best, strict=True):
                target[first : first + len(part)] = np.asarray(found)[: len(part)]
        return scores, indices

    def _search(self, queries: jax.Array, k: int, masks: list[jax.Array | None]) -> tuple[jax.Array, jax.Array]:
        shape, lies = (self._mesh.size * len(queries), k), NamedSharding(self._mesh, P(_AXIS))
        best = jnp.full(shape, -jnp.inf, jnp.float32, device=lies), jnp.full(shape, -1, jnp.int32, device=lies)
        for number, (block, mask) in enumerate(zip(self._blocks, masks, strict=True)):
            start = np.int32(number * self._rows)
            best = _best_of_block(queries, block, mask, start, *best, share=self._share, of=self.size, mesh=self._mesh)
        return _best_of_devices(*best, mesh=self._mesh)

    def _of_block(self, rows: np.ndarray, number: int) -> list[np.ndarray]:
        """[N, ...] -> a block's rows of each device [R, ...], zero where there are none."""
        parts = []
        for device in range(self._mesh.size):
            first = device * self._share + number * self._rows
            part = rows[first : first + self._rows]
            if len(part) < self._rows:
                part = np.concatenate([part, np.zeros((self._rows - len(part), *rows.shape[1:]), rows.dtype)])
            parts.append(part)
        return parts

    def _put(self, parts: list[np.ndarray]) -> jax.Array:
        """One array of all devices' parts, each on its device."""
        lies = NamedSharding(self._mesh, P(_AXIS))
        placed = [jax.device_put(part, device) for part, device in zip(parts, self._mesh.devices, strict=True)]
        shape = (len(parts) * self._rows, *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, lies, placed)


@functools.partial(jax.jit, static_argnames=("share", "of", "mesh"))
def _best_of_block(
    queries: jax.Array,
    block: jax.Array,
    mask: jax.Array | None,
    start: jax.Array,
    scores: jax.Array,
    indices: jax.Array,
    *,
    share: int,
    of: int,
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
    """The best of a block and of the blocks before, for each device by itself: nothing is exchanged.

    Args:
      queries: f32[B, D]. block: f32[devices R, D]. mask: bool[devices R], or None for all.
      start: i32[], where the block begins among a device's rows. share: how many these are.
      scores, indices: f32[devices B, k], i32[devices B, k], the best of the blocks before.
      of: how many vectors there are in all.

    Returns:
      scores and indices with this block's.
    """

    def local(
        queries: jax.Array,
        block: jax.Array,
        mask: jax.Array | None,
        start: jax.Array,
        scores: jax.Array,
        indices: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        # HIGHEST: a TPU would round to bfloat16, and change the order.
        over_width = (((1,), (1,)), ((), ()))
        products = jax.lax.dot_general(queries, block, over_width, precision=jax.lax.Precision.HIGHEST)
        if mask is not None:
            products = jnp.where(mask, products, -jnp.inf)
        few = min(scores.shape[1], len(block))
        found, at = jax.lax.platform_dependent(
            products,
            tpu=functools.partial(
                jax.lax.approx_max_k, k=few, recall_target=RECALL, reduction_input_size_override=max(of, len(block))
            ),
            default=functools.partial(jax.lax.top_k, k=few),
        )
        at += start + share * jax.lax.axis_index(_AXIS)
        # Those before in front: of equal scores the first wins.
        return _first(jnp.concatenate([scores, found], 1), jnp.concatenate([indices, at], 1), scores.shape[1])

    lie = P(_AXIS)
    specs = (P(), lie, lie, P(), lie, lie)
    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=lie)
    return run(queries, block, mask, start, scores, indices)


@functools.partial(jax.jit, static_argnames="mesh")
def _best_of_devices(scores: jax.Array, indices: jax.Array, *, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """Each device's best f32[devices B, k], i32[devices B, k] -> f32[B, k], i32[B, k], the same on all devices."""

    def merge(scores: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        k = scores.shape[1]
        # In order of devices, and so of indices.
        scores, indices = (jax.lax.all_gather(x, _AXIS, axis=1, tiled=True) for x in (scores, indices))
        scores, indices = _first(scores, indices, k)
        return scores, jnp.where(scores == -jnp.inf, -1, indices)

    # check_vma: what is gathered is the same everywhere, which it cannot see.
    return jax.shard_map(merge, mesh=mesh, in_specs=P(_AXIS), out_specs=P(), check_vma=False)(scores, indices)


def _first(scores: jax.Array, indices: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    scores, at = jax.lax.top_k(scores, k)
    return scores, jnp.take_along_axis(indices, at, axis=1)
