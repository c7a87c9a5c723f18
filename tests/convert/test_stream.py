"""The checkpoint written from arrays made one at a time: read back by Orbax alone."""

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts

from ivcr_jax.convert import stream


def tree():
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((16, 24)).astype(np.float32)
    return {
        "a": {"f32": wide, "f16": wide.astype(np.float16), "deep": {"bf16": wide.astype(ml_dtypes.bfloat16)}},
        "i32": rng.integers(-(2**31), 2**31, (5,), dtype=np.int32),
        "odd": np.array([np.nan, -0.0, np.inf, 1e-45], np.float32),
        "turned": wide.T,
        "scalar": np.array(2.5, np.float32),
        "step": np.array(7, np.int32),
        "u8": rng.integers(0, 255, (3, 1, 2), dtype=np.uint8),
        "bool": wide > 0,
    }


def lazy(value):
    return stream.Lazy(value.shape, np.dtype(value.dtype), lambda: value)


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for path, value in jax.tree.leaves_with_path(expected):
        other = found
        for key in path:
            other = other[key.key]
        assert (other.shape, other.dtype) == (value.shape, value.dtype), path
        assert np.asarray(other).tobytes() == value.tobytes(), path


def restore(path, like, sharding):
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


def chunk(path, name):
    """The shape of a parameter's chunks, read without Orbax."""
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{path}/"}).result()
    return tuple(json.loads(store.read(f"{name}/.zarray").result().value)["chunks"])


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("piece", [stream.PIECE, 1 << 10, 32])
@pytest.mark.parametrize("kind", ["numpy", "jax"])
def test_orbax_restores_what_was_written(kind, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "PIECE", piece)
    make = {"numpy": lazy, "jax": lambda x: stream.Lazy(x.shape, x.dtype, lambda: jnp.asarray(x))}[kind]
    stream.save(tmp_path / "new" / "checkpoint", jax.tree.map(make, tree()))
    assert sorted(p.name for p in tmp_path.rglob("*") if p.parent.parent == tmp_path) == ["checkpoint"]
    path = tmp_path / "new" / "checkpoint"
    same(restore(path, tree(), jax.sharding.SingleDeviceSharding(jax.devices()[0])), tree())
    with ocp.StandardCheckpointer() as checkpointer:
        same(checkpointer.restore(path), tree())
    with ocp.PyTreeCheckpointer() as checkpointer:
        same(checkpointer.restore(path), tree())
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree())
        same(checkpointer.restore(path, ocp.args.PyTreeRestore(restore_args=as_numpy)), tree())


def test_the_checkpoint_is_like_one_of_orbax(tmp_path):
    stream.save(tmp_path / "ours", jax.tree.map(lazy, tree()))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "theirs", jax.tree.map(jnp.asarray, tree()))
        checkpointer.wait_until_finished()
        ours, theirs = checkpointer.metadata(tmp_path / "ours"), checkpointer.metadata(tmp_path / "theirs")
    assert jax.tree.structure(ours.item_metadata) == jax.tree.structure(theirs.item_metadata)
    for found, expected in zip(jax.tree.leaves(ours.item_metadata), jax.tree.leaves(theirs.item_metadata), strict=True):
        assert (found.shape, found.dtype, found.sharding) == (expected.shape, expected.dtype, expected.sharding)
    described = [json.loads((tmp_path / name / "_METADATA").read_text()) for name in ("ours", "theirs")]
    for description in described:
        for entry in description["tree_metadata"].values():
            entry["value_metadata"].pop("write_shape", None)  # for Orbax's own log; nothing reads it
    assert described[0] == described[1]


ON_EIGHT = """
import sys
import jax, ml_dtypes, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from ivcr_jax.convert import stream
from tests.convert import test_stream

assert len(jax.devices()) == 8
mesh = jax.make_mesh((4, 2), ("x", "y"))
wide = np.arange(64 * 48, dtype=np.float32).reshape(64, 48)
like = {f"{d}-{i}": wide.astype(d) for d in ("float32", ml_dtypes.bfloat16) for i in range(4)}
specs = [P("x", "y"), P(None, "x"), P(), P(("y", "x"))]
tree = {
    key: stream.Lazy(x.shape, x.dtype, lambda x=x, s=specs[int(key[-1])]: jax.device_put(x, NamedSharding(mesh, s)))
    for key, x in like.items()
} | {"plain": test_stream.lazy(wide)}
stream.save(sys.argv[1], tree)
for spec in (P("y", "x"), P("x"), P(None, ("x", "y")), P()):
    sharding = NamedSharding(mesh, spec)
    restored = test_stream.restore(sys.argv[1], like | {"plain": wide}, sharding)
    test_stream.same(restored, like | {"plain": wide})
    assert all(x.sharding == sharding for x in restored.values())
shards = [(16, 24), (64, 12), (64, 48), (8, 48)]
for number, shape in enumerate(shards):
    assert test_stream.chunk(sys.argv[1], f"float32-{number}") == shape
"""


def test_shards_of_eight_devices_are_written_and_restored_otherwise(tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", ON_EIGHT, tmp_path / "checkpoint"]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    wide = np.arange(64 * 48, dtype=np.float32).reshape(64, 48)
    like = {f"{d}-{i}": wide.astype(d) for d in ("float32", ml_dtypes.bfloat16) for i in range(4)} | {"plain": wide}
    same(restore(tmp_path / "checkpoint", like, jax.sharding.SingleDeviceSharding(jax.devices()[0])), like)


def test_chunks_are_bounded_and_no_dust(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "PIECE", 1 << 20)
    shapes = {
        "even": (1024, 2048),
        "prime": (1013, 512),
        "vocabulary": (3 * 1009, 512),
        "long": (1 << 21,),
        "small": (7, 9),
    }
    values = {name: np.full(shape, 1, np.float32) for name, shape in shapes.items()}
    stream.save(tmp_path / "c", {name: lazy(value) for name, value in values.items()})
    size = {name: 4 * np.prod(chunk(tmp_path / "c", name)) for name in shapes}
    assert chunk(tmp_path / "c", "small") == (7, 9)
    assert all(1 << 15 <= size[name] <= 1 << 20 for name in ("even", "long"))
    # No divisor lies between a row and the whole, or a third: larger pieces are the better of two evils.
    assert chunk(tmp_path / "c", "prime") == (1013, 512)
    assert chunk(tmp_path / "c", "vocabulary") == (1009, 512)
    same(restore(tmp_path / "c", values, jax.sharding.SingleDeviceSharding(jax.devices()[0])), values)


@pytest.mark.parametrize(("piece", "together"), [(4096, 1), (3 * 4096, 3)])
@pytest.mark.parametrize("kind", ["numpy", "jax"])
def test_each_is_loaded_once_and_dropped_before_the_next(kind, piece, together, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "PIECE", piece)
    loaded, alive, most = [], [], 0

    def load(name):
        nonlocal most
        array = (np if kind == "numpy" else jnp).full((1024,), len(loaded), np.float32)
        loaded.append(name)
        alive.append(weakref.ref(array))
        most = max(most, sum(reference() is not None for reference in alive))
        return array

    names = [f"p{number}" for number in range(10)]
    stream.save(tmp_path / "c", {n: stream.Lazy((1024,), np.dtype(np.float32), lambda n=n: load(n)) for n in names})
    assert loaded == names
    assert most == together if kind == "jax" else 1 <= most <= together  # JAX may let go of NumPy's earlier
    gc.collect()
    assert all(reference() is None for reference in alive)


@pytest.mark.parametrize("error", [OSError("the disk is gone"), KeyboardInterrupt("Ctrl-C")])
@pytest.mark.parametrize("piece", [64, stream.PIECE])
def test_a_failure_leaves_nothing(error, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "PIECE", piece)
    made = []

    def load(number, fails):
        if fails and number == 3:
            assert piece > 64 or list(tmp_path.rglob("ocdbt*")), "nothing was written before: the test tests nothing"
            raise error
        made.append(number)
        return np.full((4, 4), number, np.float32)

    def tree(fails):
        return {f"p{n}": stream.Lazy((4, 4), np.dtype(np.float32), lambda n=n: load(n, fails)) for n in range(6)}

    (tmp_path / "other").write_text("stays")
    with pytest.raises(type(error), match=str(error)):
        stream.save(tmp_path / "c", tree(True))
    assert [p.name for p in tmp_path.iterdir()] == ["other"]
    assert made == [0, 1, 2]
    stream.save(tmp_path / "c", tree(False))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "other"]


def test_a_disk_that_fails_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "PIECE", 64)

    def load(number):
        if number == 3:
            folder = next(tmp_path.rglob("ocdbt*"))
            shutil.rmtree(folder)
            folder.write_text("a file where the next piece wants to go")
        return np.full((4, 4), number, np.float32)

    with pytest.raises(ValueError, match="Error .*p3"):
        stream.save(
            tmp_path / "c",
            {f"p{n}": stream.Lazy((4, 4), np.dtype(np.float32), lambda n=n: load(n)) for n in range(6)},
        )
    assert not list(tmp_path.iterdir())


INTERRUPTED = """
import os, pathlib, signal, sys, time
import numpy as np
from ivcr_jax.convert import stream

signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts tests in the background has it ignored
stream.PIECE = 64
original = stream._LazyHandler._finish

async def slow(self, arrays, infos):
    os.kill(os.getpid(), signal.SIGINT)  # Python hands it to the main thread, which waits for this one
    time.sleep(0.5)
    await original(self, arrays, infos)
    (infos[0].parent_dir / "late").mkdir(parents=True, exist_ok=True)

def load(number):
    if number == 2:
        stream._LazyHandler._finish = slow
    assert number < 3, "it was not interrupted"
    return np.full((4, 4), number, np.float32)

try:
    stream.save(
        sys.argv[1], {f"p{n}": stream.Lazy((4, 4), np.dtype(np.float32), lambda n=n: load(n)) for n in range(6)}
    )
except KeyboardInterrupt:
    time.sleep(1)
    sys.exit(bool(list(pathlib.Path(sys.argv[1]).parent.iterdir())))
raise AssertionError("it was not interrupted")
"""


def test_ctrl_c_waits_for_the_writing_and_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, tmp_path / "c"]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert not done.returncode, done.stderr


def test_a_wrong_array_is_refused(tmp_path):
    for declared, made, found in (
        (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32), r"float32\(3, 2\)"),
        (np.zeros(2, ml_dtypes.bfloat16), np.zeros(2, np.float32), r"float32\(2,\)"),
        (np.zeros(2, np.int64), np.zeros(2, np.int64), r"int32\(2,\)"),  # JAX cuts 64 bits without a word
    ):
        bad = stream.Lazy(declared.shape, declared.dtype, lambda made=made: made)
        with pytest.raises(ValueError, match=rf"b\.w: JAX holds {found} of it; expected {declared.dtype}\("):
            stream.save(tmp_path / "c", {"a": lazy(np.ones(2, np.float32)), "b": {"w": bad}})
        assert not list(tmp_path.iterdir())


def test_what_is_there_is_kept(tmp_path):
    (tmp_path / "c").mkdir()
    never = stream.Lazy((2,), np.dtype(np.float32), lambda: pytest.fail("loaded"))
    with pytest.raises(FileExistsError, match="c exists; a checkpoint is written to a new folder"):
        stream.save(tmp_path / "c", {"a": never})
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stream.save("c", jax.tree.map(lazy, tree()))
    same(restore(tmp_path / "c", tree(), jax.sharding.SingleDeviceSharding(jax.devices()[0])), tree())


WRITE = """
import sys
import jax, numpy as np
from ivcr_jax.convert import stream

def peak():
    # Not ru_maxrss: a new process starts with its parent's.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) >> 10

rng = np.random.default_rng(0)
shape = (25_000, 1000)
load = lambda: rng.standard_normal(shape, dtype=np.float32)
jax.device_put(np.ones(3)).block_until_ready()
before = peak()
stream.save(sys.argv[1], {f"p{n}": stream.Lazy(shape, np.dtype(np.float32), load) for n in range(12)})
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_writing_1200_mb_takes_the_memory_of_two_parameters(tmp_path):
    command = [sys.executable, "-c", WRITE, tmp_path / "c"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    grown = int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    print(f"grown by {grown} MiB")
    assert 95 <= grown < 2.5 * 95  # a parameter is of 100 MB, or 95 MiB; JAX holds a copy of what NumPy made
