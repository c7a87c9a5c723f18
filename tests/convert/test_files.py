"""Weight files, against the arrays they were written from; and what must be refused."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch as safetensors_torch
import torch

from ivcr_jax.convert import files

pytestmark = pytest.mark.torch


def arrays():
    """What the files hold; bfloat16 by another library's rounding than torch's."""
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((7, 5, 3)).astype(np.float32)
    return {
        "f32": wide,
        "f16": wide[:, 0].astype(np.float16),
        "bf16": wide.astype(ml_dtypes.bfloat16),
        "f64": rng.standard_normal(11),
        "i64": rng.integers(-(2**60), 2**60, (4, 2)),
        "u8": rng.integers(0, 255, (30, 100), dtype=np.uint8),
        "bool": wide[0] > 0,
        "scalar": np.array(3.5, np.float32),
        "bf16_scalar": np.array(-0.25, ml_dtypes.bfloat16),
        "empty": np.zeros((0, 4), np.float32),
    }


def tensor(array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.astype(np.float32)).bfloat16()
    return torch.from_numpy(array.copy())


def state():
    return {key: tensor(array) for key, array in arrays().items()}


def bare(folder, suffix):
    torch.save(state(), folder / f"w.{suffix}")
    return folder / f"w.{suffix}"


def nested(folder):
    others = {"epoch": 3, "optimizer": {"state": {0: torch.ones(3)}}, "scaler": None, "step": torch.tensor(7)}
    torch.save({**others, "model": {**state(), "version": "1.0"}}, folder / "w.pth")
    return folder / "w.pth"


def single(folder):
    safetensors_torch.save_file(state(), folder / "w.safetensors")
    return folder / "w.safetensors"


def hub(folder, stem="model.safetensors"):
    write(state(), folder / stem)
    (folder / "config.json").write_text("{}")
    return folder


def shards(folder, stem="model.safetensors"):
    """A model in three shards, with its index."""
    parts = [{}, {}, {}]
    for number, (key, value) in enumerate(state().items()):
        parts[number % 3][key] = value
    name, suffix = stem.split(".")
    weight_map = {}
    for number, part in enumerate(parts):
        file = f"{name}-{number + 1:05}-of-00003.{suffix}"
        write(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return folder


def write(tensors, path):
    (safetensors_torch.save_file if path.suffix == ".safetensors" else torch.save)(tensors, path)


KINDS = {
    "pth": lambda folder: bare(folder, "pth"),
    "pt": lambda folder: bare(folder, "pt"),
    "bin": lambda folder: bare(folder, "bin"),
    "under model": nested,
    "safetensors": single,
    "hub": hub,
    "hub, bin": lambda folder: hub(folder, "pytorch_model.bin"),
    "shards": shards,
    "shards, bin": lambda folder: shards(folder, "pytorch_model.bin"),
}


def same(found, expected):
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("reopen", [256 << 20, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_read(kind, reopen, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "REOPEN", reopen)  # 64: every read takes several mappings
    path = KINDS[kind](tmp_path)
    weights = files.open_weights(path)
    assert weights.name == str(path)
    assert set(weights.entries) == set(arrays())
    for key, expected in arrays().items():
        assert (weights.entries[key].shape, weights.entries[key].dtype) == (expected.shape, expected.dtype)
        found = weights.read(key)
        same(found, expected)
        found[...] = 0  # a copy: neither the file nor a later read may see it
        same(weights.read(key), expected)
        if expected.ndim:
            for rows in (slice(1, 3), slice(None, 2), slice(2, None), slice(-2, None), slice(3, 99), slice(3, 2)):
                same(weights.read(key, rows), expected[rows])
    same(files.open_weights(str(path)).read("f32"), arrays()["f32"])


def test_a_file_is_mapped_anew_after_so_many_bytes(tmp_path, monkeypatch):
    torch.save({"a": torch.arange(1000), "b": torch.arange(10)}, tmp_path / "w.pth")
    mapped = []
    original = files._map
    monkeypatch.setattr(files, "_map", lambda path: mapped.append(path) or original(path))
    monkeypatch.setattr(files, "REOPEN", 2000)
    weights = files.open_weights(tmp_path / "w.pth")
    mapped.clear()
    same(weights.read("a"), np.arange(1000))
    assert len(mapped) == 4  # 8000 bytes, 2000 at a time
    same(weights.read("b"), np.arange(10))
    same(weights.read("b"), np.arange(10))
    assert len(mapped) == 5


def test_a_folder_gives_safetensors_before_pickles(tmp_path):
    torch.save({"old": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert list(files.open_weights(tmp_path).entries) == ["old"]
    assert set(files.open_weights(shards(tmp_path)).entries) == set(arrays())
    safetensors_torch.save_file({"new": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list(files.open_weights(tmp_path).entries) == ["new"]


def test_views_and_parameters_are_read_as_they_look(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    torch.save(
        {
            "turned": base.t(),
            "strided": base[1::2, ::3],
            "tied": base,
            "wide": torch.tensor([1.0, 2.0])[:, None].expand(2, 5),
            "turned_bf16": base.bfloat16().t(),
            "parameter": torch.nn.Parameter(base + 1),
        },
        tmp_path / "w.pth",
    )
    weights = files.open_weights(tmp_path / "w.pth")
    expected = np.arange(24, dtype=np.float32).reshape(4, 6)
    same(weights.read("turned"), np.ascontiguousarray(expected.T))
    same(weights.read("turned", slice(1, 3)), np.ascontiguousarray(expected.T[1:3]))
    same(weights.read("strided"), np.ascontiguousarray(expected[1::2, ::3]))
    same(weights.read("tied"), expected)
    same(weights.read("wide"), np.repeat(np.float32([[1], [2]]), 5, axis=1))
    same(weights.read("turned_bf16"), np.ascontiguousarray(expected.T).astype(ml_dtypes.bfloat16))
    same(weights.read("parameter"), expected + 1)


def test_what_is_no_tensor_is_listed_and_not_given(tmp_path):
    weights = files.open_weights(nested(tmp_path))
    assert weights.skipped == {
        "epoch": "int",
        "optimizer": "dict",
        "scaler": "NoneType",
        "step": "Tensor",
        "version": "str",
    }
    with pytest.raises(KeyError, match="w.pth: no tensor version"):
        weights.read("version")


def test_a_wrong_question_is_refused(tmp_path):
    weights = files.open_weights(single(tmp_path))
    with pytest.raises(KeyError, match="w.safetensors: no tensor f33"):
        weights.read("f33")
    with pytest.raises(ValueError, match=r"slice\(0, 1, None\) of scalar, shape \(\); expected a range"):
        weights.read("scalar", slice(0, 1))
    with pytest.raises(ValueError, match="of f32, .* expected a range of its first axis"):
        weights.read("f32", slice(0, 4, 2))


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])
    return path


def flip(path, where):
    content = bytearray(path.read_bytes())
    content[where] ^= 0x10
    path.write_bytes(content)
    return path


def text(path, content):
    path.write_text(content)
    return path


def saved(path, value, **options):
    torch.save(value, path, **options)
    return path


def deflated(path):
    with zipfile.ZipFile(path) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return path


def reindexed(folder, change):
    index = shards(folder) / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))
    return folder


def doubled(folder):
    shards(folder)
    write({"f32": torch.ones(2), "bf16": torch.ones(1)}, folder / "model-00003-of-00003.safetensors")
    return folder


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
BAD = {
    "absent": (lambda d: d / "w.pth", "w.pth: no such file; expected weights"),
    "absent folder": (lambda d: d / "model", "model: no such file"),
    "empty pth": (lambda d: text(d / "w.pth", ""), r"w.pth: empty \(0 bytes\)"),
    "empty safetensors": (lambda d: text(d / "w.safetensors", ""), r"w.safetensors: empty"),
    "pointer": (lambda d: text(d / "w.bin", LFS), "w.bin: a pointer of git-lfs, not the weights; `git lfs pull`"),
    "pointer in a folder": (lambda d: text(d / "model.safetensors", LFS).parent, "model.safetensors: a pointer of git"),
    "pointer for an index": (lambda d: text(d / "model.safetensors.index.json", LFS).parent, "json: a pointer of git"),
    "other kind": (lambda d: text(d / "w.npz", "PK"), "w.npz: unknown kind of file; expected .safetensors, .pth"),
    "text": (lambda d: text(d / "w.pth", "hello"), r"w.pth: cut off or changed \(File is not a zip file\)"),
    "pth cut by 100": (lambda d: cut(bare(d, "pth"), -100), "w.pth: cut off or changed"),
    "pth cut to 1000": (lambda d: cut(bare(d, "pth"), 1000), "w.pth: cut off or changed .*expected a whole zip file"),
    "safetensors cut by 1": (lambda d: cut(single(d), -1), "w.safetensors: cut off or changed .*not fully covered"),
    "safetensors cut to 5": (lambda d: cut(single(d), 5), "w.safetensors: cut off or changed .*header too small"),
    "safetensors cut to 99": (lambda d: cut(single(d), 99), "cut off or changed .*expected a whole .safetensors file"),
    "safetensors, long": (lambda d: text(d / "w.safetensors", "x" * 99), "cut off or changed .*header too large"),
    "compressed": (lambda d: deflated(bare(d, "pth")), "data.pkl and [0-9]+ more are compressed"),
    "old format": (
        lambda d: saved(d / "w.pth", state(), _use_new_zipfile_serialization=False),
        r"w.pth: the format of torch before 1.6; expected a zip file: torch.save\(torch.load\(",
    ),
    "a tensor": (lambda d: saved(d / "w.pth", torch.ones(2)), "w.pth: holds a Tensor; expected a state dict"),
    "a list": (lambda d: saved(d / "w.pth", [torch.ones(2)]), "w.pth: holds a list; expected a state dict"),
    "no tensors": (lambda d: saved(d / "w.pth", {"epoch": 1, "lr": 2.0}), r"no tensors in it \(found: epoch, lr\)"),
    "empty model": (lambda d: saved(d / "w.pth", {"model": {}}), r"no tensors in it \(found: nothing\)"),
    "sparse": (lambda d: saved(d / "w.pth", {"s": torch.eye(3).to_sparse()}), "w.pth: s: a tensor NumPy cannot hold"),
    "sparse rows": (lambda d: saved(d / "w.pth", {"s": torch.eye(3).to_sparse_csr()}), "w.pth: s: a tensor NumPy"),
    "no data": (lambda d: saved(d / "w.pth", {"m": torch.empty(3, device="meta")}), "w.pth: m: a tensor NumPy cannot"),
    "quantized": (
        lambda d: saved(d / "w.pth", {"q": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}),
        "w.pth: q: a tensor NumPy cannot hold",
    ),
    "8 bits": (lambda d: saved(d / "w.pth", {"e": torch.ones(3).to(torch.float8_e4m3fn)}), "w.pth: e: a tensor NumPy"),
    "no weights": (
        lambda d: text(d / "config.json", "{}").parent,
        r"no weights in it \(found: config.json\); expected model.safetensors or pytorch_model.bin",
    ),
    "nothing": (lambda d: d, r"no weights in it \(found: nothing\)"),
    "index, no JSON": (lambda d: text(d / "model.safetensors.index.json", "{").parent, "index.json: not an index"),
    "index, no map": (lambda d: text(d / "model.safetensors.index.json", "{}").parent, "not an index .*weight_map"),
    "index, a list": (lambda d: text(d / "model.safetensors.index.json", "[]").parent, "index.json: not an index"),
    "index, no names": (
        lambda d: text(d / "model.safetensors.index.json", '{"weight_map": {"a": [1]}}').parent,
        "index.json: not an index",
    ),
    "index, empty map": (
        lambda d: text(d / "model.safetensors.index.json", '{"weight_map": {}}').parent,
        "no tensors in it",
    ),
    "no such shard": (
        lambda d: reindexed(d, lambda places: places.update(f32="model-00009.safetensors")),
        "index.json: model-00009.safetensors is not there; expected the 4 shards it names",
    ),
    "no such key": (
        lambda d: reindexed(d, lambda places: places.update(new="model-00001-of-00003.safetensors")),
        "index.json: new is not in the shard it names, model-00001-of-00003.safetensors",
    ),
    "another shard": (
        lambda d: reindexed(d, lambda places: places.update(f32="model-00002-of-00003.safetensors")),
        "index.json: f32 is not in the shard it names, model-00002-of-00003.safetensors",
    ),
    "unnamed keys": (
        lambda d: reindexed(d, lambda places: (places.pop("f32"), places.pop("f64"))),
        "index.json: f32 and 1 more are not named, but in model-00001-of-00003.safetensors",
    ),
    "a key twice": (doubled, "00003-of-00003.safetensors: f32 is in model-00001-of-00003.safetensors, too"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about sparse and quantized tensors
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence(case, tmp_path):
    make, message = BAD[case]
    path = make(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        files.open_weights(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


class Evil:
    """Pickled, a call of os.system."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("wrap", [lambda evil: evil, lambda evil: {"w": torch.ones(2), "x": evil}])
def test_a_pickle_that_calls_is_refused_and_not_run(wrap, tmp_path):
    path, target = tmp_path / "w.pth", tmp_path / "made"
    torch.save(wrap(Evil(target)), path)
    with pytest.raises(ValueError, match="w.pth: torch.load refuses it .it asks for posix.system, which was not run"):
        files.open_weights(path)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists()  # it would have worked


def test_changed_bytes_are_found(tmp_path):
    values = torch.arange(1000.0)
    torch.save({"w": values}, tmp_path / "good.pth")
    place = (tmp_path / "good.pth").read_bytes().index(values.numpy().tobytes())
    for where in (place, place + 1234, place + 3999):
        path = flip(pathlib.Path(shutil.copy(tmp_path / "good.pth", tmp_path / "w.pth")), where)
        with pytest.raises(ValueError, match="w.pth: cut off or changed .Bad CRC-32 for file 'good/data/0'"):
            files.open_weights(path)
        assert not torch.equal(torch.load(path, mmap=True)["w"], values)  # torch itself does not look


def test_no_single_changed_byte_gives_other_values(tmp_path):
    """Flips one bit of a small file, at one place after the other: it is refused, or the values are the true ones."""
    torch.save({"w": torch.arange(6.0), "v": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "w.pth")
    content = (tmp_path / "w.pth").read_bytes()
    refused = 0
    for where in range(0, len(content), 5):
        path = tmp_path / "w.pth"
        path.write_bytes(content)
        flip(path, where)
        try:
            weights = files.open_weights(path)
            found = weights.read("w"), weights.read("v")
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
        else:
            same(found[0], np.arange(6, dtype=np.float32))
            same(found[1], np.ones(2, ml_dtypes.bfloat16))
    assert refused > 100


def test_a_file_without_sums_is_read(tmp_path):
    before = torch.serialization.get_crc32_options()
    assert before, "torch writes sums by default"
    torch.serialization.set_crc32_options(False)
    try:
        path = bare(tmp_path, "pth")
    finally:
        torch.serialization.set_crc32_options(before)
    with zipfile.ZipFile(path) as archive:
        assert {part.CRC for part in archive.infolist()} == {0}
    same(files.open_weights(path).read("f32"), arrays()["f32"])


@pytest.mark.parametrize("library", ["torch", "safetensors"])
def test_an_absent_library_is_named(library, tmp_path, monkeypatch):
    path = single(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=rf"needs {library}, which pip install 'ivcr_jax\[convert\]' brings"):
        files.open_weights(path)


READ_ALL = """
import sys
import safetensors, torch
from ivcr_jax.convert import files

def peak():
    # Not ru_maxrss: a new process starts with its parent's.
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) >> 10

torch.ones(3).numpy()
before = peak()
weights = files.open_weights(sys.argv[1])
for key in weights.entries:
    array = weights.read(key)
    assert array.min() == array.max() == int(key)
    del array
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_reading_600_mb_takes_little_memory(suffix, tmp_path):
    sizes = (400, 50, 50, 50, 50)
    write({str(n): torch.full((size, 250, 1000), float(n)) for n, size in enumerate(sizes)}, tmp_path / f"w.{suffix}")
    command = [sys.executable, "-c", READ_ALL, tmp_path / f"w.{suffix}"]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"{suffix}: grown by {grown} MiB")
    assert 381 <= grown < 381 + 256  # the largest array is of 400 MB, or 381 MiB; a mapping is of no more than 256 MiB
