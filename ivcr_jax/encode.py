"""Features of every stored frame by a frozen tower, computed once and read in place of frames.

    python -m ivcr_jax.encode --model=FOLDER --tower=model|retriever --videos=DATA/ivcr200k_videos --out=FEATURES
    ... --coordinator=HOST:PORT --processes=N --process_id=I     one of N processes; or --distributed on a TPU pod

What comes out is float16[T, P, D] a video, in the order of the video store: the ViT's patches, before any pooling.
Every process computes whole shards by itself, on its own devices; they only wait for each other at the end, so --out
must lie where all of them see it. A finished shard waits in FEATURES.staging, under a hash of all that decides its
bytes, until all are there and the store appears by one rename: a run that was stopped, even by `kill -9`, and starts
again with any number of processes loses the shards that were under way. `store.VideoStore.made_by` of the result holds
`source` (the video store's fingerprint), `tower`, `vit` (its configuration), `parameters` (`parameters_sha256`) and
`compute` (a dtype). Nothing here knows of dialogues or of training.
"""

import collections
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from ivcr_jax import bundle, command, distributed
from ivcr_jax.ahead import read_ahead
from ivcr_jax.config import json_of
from ivcr_jax.data import store
from ivcr_jax.models.interllava import InterLLaVA
from ivcr_jax.models.layers import Compute
from ivcr_jax.models.retriever import Retriever
from ivcr_jax.models.vit import ViT
from ivcr_jax.sharding import MeshConfig, by_rows, make_mesh, shardings

STORED = np.dtype(np.float16)
# Where a model folder keeps each tower: the checkpoint, and what the paths of its parameters begin with.
TOWERS = {"model": (bundle.MODEL, "encoder.vit."), "retriever": (bundle.RETRIEVER, "vit.")}


def encode(
    model: epath.PathLike,
    tower: str,
    videos: epath.PathLike,
    out: epath.PathLike,
    *,
    videos_per_shard: int = 256,
    batch: int = 32,
    dtype: str = "bfloat16",
) -> str:
    """Writes the feature store `out`, together with the other processes; returns one line that says what was done.

    Args:
      model: a model folder.
      tower: "model" or "retriever": whose ViT.
      videos: a store of frames.
      out: where to. If the very same features are there already, nothing is done.
      videos_per_shard: records of a shard, which is what a stop may cost each process.
      batch: frames at once on each device.
      dtype: of the computation, "bfloat16" or "float32".

    Raises:
      ValueError: the folder lacks the tower, the store does not hold frames of its size, a record cannot be read, a
        feature is beyond float16, another process stopped, or one's shards cannot be seen.
      OSError: there is no model folder, or something else at `out`.
      DatasetNotFound: there is no whole video store.
    """
    source, out = store.VideoStore(videos), epath.Path(out).resolve()
    # This process's devices alone: each holds all parameters and takes its part of the frames.
    mesh = make_mesh(MeshConfig(data=-1, fsdp=1), jax.local_devices())
    vit = abstract_tower(model, tower, Compute(dtype))[1]
    size = vit.config.image_size
    if source.kind != "frames":
        raise ValueError(f"{videos}: found a store of {source.kind}, expected one of frames")
    if source.item_shape != (size, size, 3):
        found = " x ".join(map(str, source.item_shape[:2]))
        raise ValueError(f"{videos}: found frames of {found} pixels, expected the tower's {size} x {size}")
    vit = read_tower(model, tower, mesh, Compute(dtype))
    made_by = {
        "source": source.fingerprint,
        "tower": tower,
        "vit": json_of(vit.config),
        "parameters": parameters_sha256(vit),
        "compute": dtype,
    }
    if out.exists():
        _check_same(out, made_by)
        return f"{out} is whole and made from the same things: nothing to do"

    fingerprint = _hash(made_by, STORED.name)
    staging = out.parent / f"{out.name}.staging" / _hash(fingerprint, videos_per_shard)[:32]
    staging.mkdir(parents=True, exist_ok=True)
    names = list(source.duration)
    parts = [names[first : first + videos_per_shard] for first in range(0, len(names), videos_per_shard)]
    shards = store.feature_shards(staging, len(parts))
    share = slice(jax.process_index(), None, jax.process_count())
    work = [(path, part) for path, part in list(zip(shards, parts, strict=True))[share] if not path.exists()]
    mine = [name for _, part in work for name in part]
    run = _Tower(vit, mesh, batch * jax.local_device_count())
    begun, failure = time.perf_counter(), None
    with tqdm(desc="encode", total=len(mine), unit="video", disable=jax.process_index() != 0) as progress:
        reading = _read_ahead(source, mine)
        try:
            for path, part in work:
                # A batch never reaches over two shards: a shard's bytes do not depend on what was there before.
                features = run.features(itertools.islice(reading, len(part)), progress)
                store.write_feature_shard(path, features, shape=run.shape, dtype=STORED)
        except Exception as error:  # told below: who left now would leave the others waiting, and their shards are good
            if jax.process_count() > 1:
                logging.error("process %d stops: %s", jax.process_index(), error)
            failure = error

    # Gathering the counts is also where all wait until every shard is written.
    count = np.array([sum(source.num_frames[name] for name in mine), failure is not None])
    counts, seconds = multihost_utils.process_allgather(count).reshape(-1, 2), time.perf_counter() - begun
    if failure is not None:
        raise failure
    if failed := np.flatnonzero(counts[:, 1]).tolist():
        raise ValueError(f"processes {failed} stopped and said why; finished shards are kept in {staging}")
    if jax.process_index() == 0:
        if absent := [path.name for path in shards if not path.exists()]:
            raise ValueError(f"{staging}: {len(absent)} shards are not to be seen; expected a folder all processes see")
        for half in staging.glob(".*.tmp"):  # a run that was killed left them
            half.unlink()
        index: dict[str, list[Any]] = {"id": names, "duration": [*source.duration.values()]}
        index["num_frames"] = [*source.num_frames.values()]
        store.describe_features(
            staging,
            index,
            list(map(len, parts)),
            shape=run.shape,
            dtype=STORED,
            fingerprint=fingerprint,
            made_by=made_by,
        )
        staging.rename(out)
        if not any(staging.parent.iterdir()):  # what other settings left is not this run's to remove
            staging.parent.rmdir()
    multihost_utils.sync_global_devices("the feature store is in place")
    computed = counts[:, 0].sum()
    megabytes = sum(path.stat().length for path in out.iterdir()) / 1e6
    return (
        f"{len(names)} videos, {sum(source.num_frames.values())} frames: {computed} computed in {seconds:.1f} s, "
        f"{computed / seconds:.1f} frames/s, {megabytes:.1f} MB in {out}"
    )


def abstract_tower(folder: epath.PathLike, tower: str, compute: Compute) -> tuple[dict[str, nnx.Variable], ViT]:
    """The parameters among which a folder keeps a tower, by path, and the tower: all of them shapes without values.

    Raises FileNotFoundError where there is no model folder, and ValueError where it lacks the tower.
    """
    if (part := getattr(bundle.read_config(folder), tower)) is None:
        raise ValueError(f"{folder}: found no {tower} in it; expected another --tower, or another folder")
    kind: Any = InterLLaVA if tower == "model" else Retriever
    whole = nnx.eval_shape(lambda: kind(part, nnx.Rngs(0), compute))
    return bundle.parameters(whole), whole.encoder.vit if tower == "model" else whole.vit


def read_tower(folder: epath.PathLike, tower: str, mesh: Mesh, compute: Compute) -> ViT:
    """Reads a tower, and nothing else of its model. Raises as `abstract_tower` and `bundle.read_parameters` do."""
    expected, vit = abstract_tower(folder, tower, compute)
    part, prefix = TOWERS[tower]
    placed = {
        prefix + ".".join(map(str, where)): value.get_value()
        for where, value in nnx.to_flat_state(shardings(nnx.state(vit), mesh))
    }
    arrays = bundle.read_parameters(epath.Path(folder).resolve() / part, expected, placed)
    for path, variable in bundle.parameters(vit).items():
        variable.set_value(arrays[prefix + path])
    return vit


def parameters_sha256(vit: ViT) -> str:
    """Names the parameters that features depend on, by their paths, dtypes, shapes and bytes.

    The pooling head comes after the features: one that was trained on them leaves them valid.
    """
    digest = hashlib.sha256()
    for path, value in sorted(bundle.parameters(vit).items()):
        if not path.startswith("head."):
            array = np.asarray(value[...])
            digest.update(f"{path} {array.dtype} {array.shape}\n".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


class _Tower:
    """The compiled tower. Attributes: shape: (P, D) of a frame's features."""

    def __init__(self, vit: ViT, mesh: Mesh, batch: int) -> None:
        self._batch, self._mesh, c = batch, mesh, vit.config
        self._size, self.shape = c.image_size, (c.patches + c.cls_token, c.width)
        definition, self._state = nnx.split(vit)

        def run(state: nnx.State, frames: jax.Array) -> jax.Array:
            features = nnx.merge(definition, state)(frames).astype(STORED)
            # A frame with a value beyond float16 becomes NaN as a whole, so that one number of it tells.
            return jnp.where(jnp.isfinite(features).all((1, 2), keepdims=True), features, jnp.nan)

        self._run = jax.jit(run, out_shardings=by_rows(mesh))

    def features(
        self, videos: Iterable[tuple[str, store.StoredVideo, np.ndarray]], progress: tqdm
    ) -> Iterator[tuple[str, float, np.ndarray, np.ndarray]]:
        """(id, record, frames u8[T, H, W, 3]) -> what `store.write_feature_shard` takes, with features f16[T, P, D]."""
        waiting: collections.deque[tuple[str, store.StoredVideo, int]] = collections.deque()

        def frames() -> Iterator[np.ndarray]:
            for name, stored, images in videos:
                waiting.append((name, stored, len(images)))
                yield from images

        ready = np.empty((0, *self.shape), STORED)
        for block in self._compute(frames()):
            ready = np.concatenate([ready, block])
            while waiting and waiting[0][2] <= len(ready):
                name, stored, count = waiting.popleft()
                features, ready = ready[:count], ready[count:]
                if np.isnan(features[:, 0, 0]).any():
                    raise ValueError(f"{name}: the tower's features are beyond {STORED}'s range, or not finite")
                yield name, stored.duration, stored.times, features
                progress.update()

    def _compute(self, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """Frames one by one -> f16[batch, P, D]; the last block is filled up with features of nothing."""
        flying: collections.deque[jax.Array] = collections.deque()
        while chunk := list(itertools.islice(frames, self._batch)):
            images = np.zeros((self._batch, self._size, self._size, 3), np.uint8)
            np.stack(chunk, out=images[: len(chunk)])
            with jax.set_mesh(self._mesh):
                flying.append(self._run(self._state, jax.device_put(images, by_rows(self._mesh))))
            flying[-1].copy_to_host_async()
            if len(flying) == 2:  # the device works on the one while the other is written
                yield np.asarray(flying.popleft())
        yield from map(np.asarray, flying)


def _read_ahead(videos: store.VideoStore, names: list[str]) -> Iterator[tuple[str, store.StoredVideo, np.ndarray]]:
    """Videos with all their frames u8[T, H, W, 3], in order, decoded in threads before they are asked for."""

    def read(name: str) -> tuple[str, store.StoredVideo, np.ndarray]:
        try:
            stored = videos.read(name)
            frames = np.empty((len(stored.payload), *videos.item_shape), np.uint8)
            videos.decode(stored, np.arange(len(frames)), frames)
        except Exception as error:  # of whatever kind: what a reader meets in broken bytes is not ours to list
            raise ValueError(f"{name}: its record cannot be read: {error}") from error
        return name, stored, frames

    return read_ahead(read, names)


def _check_same(out: epath.Path, made_by: dict[str, Any]) -> None:
    try:
        found = store.VideoStore(out).made_by or {}
    except store.DatasetNotFound:
        found = {}
    if other := [name for name, value in made_by.items() if found.get(name) != value]:
        what = f"features of another {', '.join(other)}" if found else "something else than features of this command"
        raise FileExistsError(f"--out: {out} exists and holds {what}; expected a new folder")


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _define_flags() -> None:
    # Not at import: another program may import this module and have flags of the same names.
    flags.DEFINE_string("model", None, "A model folder.", required=True)
    flags.DEFINE_enum("tower", None, list(TOWERS), "Whose ViT.", required=True)
    flags.DEFINE_string("videos", None, "A built ivcr200k_videos.", required=True)
    flags.DEFINE_string("out", None, "The feature store to write.", required=True)
    flags.DEFINE_integer("videos_per_shard", 256, "What a stop may cost.", lower_bound=1)
    flags.DEFINE_integer("batch", 32, "Frames at once on each device.", lower_bound=1)
    flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the computation; float16 is stored.")
    distributed.define_flags()


def main(argv: list[str]) -> None:
    command.refuse_arguments(argv)
    command.quiet()
    args = flags.FLAGS
    try:
        distributed.start()
        done = encode(
            args.model, args.tower, args.videos, args.out,
            videos_per_shard=args.videos_per_shard, batch=args.batch, dtype=args.dtype,
        )  # fmt: skip
    except (ValueError, OSError, store.DatasetNotFound) as error:
        sys.exit(f"error: {error}")
    if jax.process_index() == 0:
        print(done)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
