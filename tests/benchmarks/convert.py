"""Memory and time of converting: `python -m tests.benchmarks.convert [--layers=32]`. Prints one line of JSON.

A made-up set of the published files at their true widths, with as many decoder layers as asked; 32 is all of LLaMA-2-7B
and needs about 40 GB of disk. Peaks are of child processes. The peer reads all files into memory at once, as the usual
script does, and writes nothing. README.md beside this file says what was found.
"""

import dataclasses
import json
import pathlib
import tempfile

import numpy as np
import torch
from absl import app, flags

from tests.benchmarks.data import in_child
from tests.convert import made_up

FLAGS = flags.FLAGS
flags.DEFINE_integer("layers", 32, "Decoder layers of the made-up LLaMA.")

FIRST_SHARD = 9_980_000_000  # bytes, as of Hugging Face's LLaMA-2-7b


def write_safetensors(path: pathlib.Path, shapes: dict[str, tuple[int, ...]], block: np.ndarray) -> None:
    """A .safetensors file in half precision whose tensors repeat one block of bytes: nothing large is in memory."""
    header, at = {}, 0
    for key, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for first in range(0, at, block.nbytes):
            file.write(block.tobytes()[: at - first])


def write_llama(folder: pathlib.Path, sizes: made_up.Sizes) -> int:
    """LLaMA in two shards. Returns the bytes of the larger."""
    folder.mkdir(parents=True, exist_ok=True)
    block = (np.random.default_rng(0).standard_normal(1 << 24) * 0.02).astype(np.float16)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    total = sum(2 * int(np.prod(shape)) for shape in made_up.llama(sizes).values())
    limit = min(FIRST_SHARD, total * 3 // 4)
    for key, shape in made_up.llama(sizes).items():
        size += 2 * int(np.prod(shape))
        if size > limit and len(shards) == 1:
            shards.append({})
        shards[-1][key] = shape
    index = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, block)
        index |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(made_up.llama_config(sizes)))
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def write_files(folder: pathlib.Path, layers: int) -> None:
    """The set, with this many decoder layers, under the names of the converter's flags."""
    sizes = dataclasses.replace(made_up.PUBLISHED, llama_layers=layers)
    torch.save(made_up.eva_values(sizes, 1), folder / "eva.pth")
    torch.save({"model": made_up.values(made_up.instructblip(sizes), 2)}, folder / "instructblip.pth")
    torch.save({"model": made_up.values(made_up.timechat(sizes, 96), 3)}, folder / "timechat.pth")
    write_llama(folder / "llama", sizes)


def main(argv: list[str]) -> None:
    del argv
    with tempfile.TemporaryDirectory(dir=FLAGS.work) as work:
        folder = pathlib.Path(work)
        # In a process of its own: a child's peak begins at what its parent holds.
        in_child(
            "import pathlib; from tests.benchmarks import convert\n"
            f"convert.write_files(pathlib.Path({work!r}), {FLAGS.layers})"
        )
        files = {name: str(folder / f"{name}.pth") for name in ("eva", "instructblip", "timechat")}
        files["llama"] = str(folder / "llama")
        shards = [path.stat().st_size for path in folder.rglob("*") if path.suffix in (".safetensors", ".pth")]
        arguments = ["convert", "--config=configs/interllava_7b.py", f"--config.model.llama.layers={FLAGS.layers}"]
        arguments += [f"--{name}={path}" for name, path in files.items()] + [f"--out={folder / 'out'}"]
        # Run as a module in a fresh process, whose peak is then its own.
        ours = in_child(
            f"import runpy, sys; sys.argv = {arguments!r}\n"
            "try:\n    runpy.run_module('ivcr_jax.convert', run_name='__main__')\n"
            "except SystemExit as end:\n    assert not end.code, end.code"
        )
        peer = in_child(
            "import pathlib, torch; from safetensors.torch import load_file\n"
            f"held = [load_file(path) for path in pathlib.Path({files['llama']!r}).glob('*.safetensors')]\n"
            f"held += [torch.load(path, weights_only=True) for path in {[files['eva'], files['timechat']]!r}]\n"
            "total = [t.float().sum() for part in held[:-2] for t in part.values()]"
        )
        bound = 1.3 * max(shards) + 2e9
        print(
            json.dumps(
                {
                    "decoder_layers": FLAGS.layers,
                    "source_gb": round(sum(shards) / 1e9, 2),
                    "largest_file_gb": round(max(shards) / 1e9, 2),
                    "bound_gb": round(bound / 1e9, 2),
                    "peak_gb": round(ours["peak_rss_mb"] * 2**20 / 1e9, 2),
                    "seconds": ours["seconds"],
                    "peer_peak_gb": round(peer["peak_rss_mb"] * 2**20 / 1e9, 2),
                    "peer_seconds": peer["seconds"],
                }
            )
        )


if __name__ == "__main__":
    app.run(main)
