"""An Orbax checkpoint written from arrays that are made one at a time, each when its turn comes.

Orbax by itself takes arrays that are all there. Only the writing differs: the checkpoint is an ordinary one.
"""

import asyncio
import concurrent.futures
import dataclasses
import gc
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tqdm
from etils import epath

# Not public, but only it knows how Orbax would cut an array (`_chunk_bytes`).
from orbax.checkpoint._src.arrays import subchunking

# Bytes: of a chunk on disk, the least a reader can read; and of small parameters that are held and written together,
# since each writing makes two files and the index anew (1500 tiny ones took 50 s and 3000 files; together 4 s, 11).
PIECE = 32 << 20


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A parameter dtype[*shape] that `load` makes: a NumPy array, or a jax.Array, which may be sharded over a mesh."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], jax.Array | np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def save(path: epath.PathLike, tree: Mapping[str, Any]) -> None:
    """Writes a tree as an Orbax PyTree checkpoint, holding about one parameter (at least PIECE bytes) at a time.

    Each parameter is loaded once, in the order of the sorted names, put on JAX's default device unless it is a
    jax.Array, written, and dropped. For one process; several must each write a checkpoint of their own.

    Args:
      path: a folder that must not exist; it appears when all is written. On failure nothing is left.
      tree: nested dicts of Lazy. None may be of size 0, which Orbax refuses.

    Raises FileExistsError where there is something at `path`; ValueError for a parameter that is not what its Lazy
    says, or that JAX cannot hold so (64 bits without jax_enable_x64); and what a `load` raises.
    """
    path = epath.Path(path).resolve()
    if path.exists():
        raise FileExistsError(f"{path} exists; a checkpoint is written to a new folder")
    total = sum(lazy.nbytes for lazy in jax.tree.leaves(tree))
    # Ctrl-C meets this thread. Writing goes on in that of the pool, which has ended before what it wrote is removed.
    pool = concurrent.futures.ThreadPoolExecutor(1)
    pool.submit(int).result()  # its thread has started
    with tqdm.tqdm(total=total, unit="B", unit_scale=True, desc=path.name) as progress:
        # No jax.Array is among the leaves, but Orbax warns where no handler is there for it.
        registry = ocp.type_handlers.create_type_handler_registry((Lazy | jax.Array, _LazyHandler(pool, progress)))
        # Compressing would save a fifth of bfloat16's bytes, half of a float32's that was one, and cost memory: at the
        # peak four times the largest parameter. Now it is twice, where JAX must copy what NumPy made (memory that is
        # not aligned to 64 bytes), and else once.
        writer = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
        with ocp.Checkpointer(writer) as checkpointer:
            try:
                with pool:
                    checkpointer.save(path, args=ocp.args.PyTreeSave(dict(tree)))
            except BaseException:
                if (left := checkpointer.get_temporary_path(path).get()).exists():
                    left.rmtree()
                raise


class _LazyHandler(ocp.type_handlers.ArrayHandler):
    """Orbax's handler of jax.Arrays, its type string included, that gets its arrays one after the other."""

    def __init__(self, pool: concurrent.futures.Executor, progress: tqdm.tqdm):
        # Devices of one process that hold the same shard need not share the work of writing it.
        super().__init__(use_replica_parallel=False)
        self._pool, self._progress = pool, progress

    async def serialize(self, values: Sequence[Lazy], infos: Sequence[Any], args: Any = None) -> Sequence[Any]:
        first, size = 0, 0
        for place, value in enumerate(values):
            if place > first and size + value.nbytes > PIECE:
                self._write(values[first:place], infos[first:place])
                first, size = place, 0
            size += value.nbytes
        self._write(values[first:], infos[first:])
        return []  # nothing is left to wait for

    def _write(self, values: Sequence[Lazy], infos: Sequence[Any]) -> None:
        """Returns when all is on disk. A function of its own, so that nothing keeps the arrays after it."""
        arrays = [_load(value, info.name) for value, info in zip(values, infos, strict=True)]
        self._pool.submit(lambda: asyncio.run(self._finish(arrays, infos))).result()
        self._progress.update(sum(value.nbytes for value in values))

    async def _finish(self, arrays: Sequence[jax.Array], infos: Sequence[Any]) -> None:
        chunks = [ocp.SaveArgs(chunk_byte_size=_chunk_bytes(array)) for array in arrays]
        for future in await super().serialize(arrays, infos, chunks):
            future.result()


def _load(lazy: Lazy, name: str) -> jax.Array:
    gc.collect(0)  # else JAX keeps the NumPy array of before until its next call
    array = jax.block_until_ready(jax.device_put(lazy.load()))
    if array.shape != lazy.shape or array.dtype != lazy.dtype:
        raise ValueError(f"{name}: JAX holds {array.dtype}{array.shape} of it; expected {lazy.dtype}{lazy.shape}")
    return array


def _chunk_bytes(array: jax.Array) -> int:
    """How large a chunk may be: PIECE, or more where Orbax would cut dust.

    It cuts by divisors of the longest axis: a vocabulary of 32003, a prime, into single rows. That stays whole.
    """
    size, shard = PIECE, array.sharding.shard_shape(array.shape)
    while size < math.prod(shard) * array.dtype.itemsize:
        chunk = subchunking.choose_chunk_shape(array.shape, shard, array.dtype, size)
        if math.prod(chunk) * array.dtype.itemsize >= PIECE // 32:
            break
        size *= 2
    return size
