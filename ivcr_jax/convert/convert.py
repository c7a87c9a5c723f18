"""The two ways through the converter: published files -> a model folder, and back. Prints what it did."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from ivcr_jax import bundle
from ivcr_jax.convert import layouts, read, stream, write
from ivcr_jax.convert.files import open_weights
from ivcr_jax.data.manifest import atomic
from ivcr_jax.models.interllava import InterLLaVA
from ivcr_jax.models.retriever import Retriever
from ivcr_jax.sharding import logical_axes, spec

# Parts of the models by path, and what the published ones count.
PARTS: tuple[tuple[str, str, int | None], ...] = (
    ("ViT", r"encoder\.vit\..*", 985_894_528),
    ("ViT norm", r"encoder\.vit_norm\..*", 2_816),
    ("image Q-Former", r"encoder\.qformer\.(?!queries).*", 185_660_160),
    ("video Q-Former", r"encoder\.video_qformer\.(?!queries).*", 18_905_088),
    ("query tokens", r"encoder\.(video_)?qformer\.queries", 49_152),
    ("frame positions", r"encoder\.frame_positions", 49_152),
    ("projection", r"encoder\.projection\..*", 3_149_824),
    ("LLaMA", r"llama\.(?!added)(?!.*\.lora\.).*", 6_738_415_616),
    ("added tokens", r"llama\.added_.*", 40_960),
    ("LoRA", r".*\.lora\..*", 33_554_432),
    ("rank head", r"rank\..*", None),
    ("moment head", r"moment\..*", None),
    ("text tower", r"text\..*", 282_303_744),
    ("image tower", r"vit\..*", 92_884_224),
    ("logit scale and bias", r"logit_(scale|bias)", 2),
    ("frame layers", r"frame_(blocks\..*|positions)", None),
)


def forward(config: bundle.BundleConfig, files: Mapping[str, str], out: epath.Path, mesh: Mesh | None) -> None:
    """Converts published files.

    Args:
      config: of the models.
      files: path by flag name.
      out: the folder to write.
      mesh: over which parameters are spread while they are written, or None.

    Raises:
      ValueError: with every problem found, a line each.
    """
    of_model = {name: path for name, path in files.items() if name != "siglip"}
    of_retriever = {name: path for name, path in files.items() if name == "siglip"}
    config = dataclasses.replace(
        config,
        model=config.model if of_model else None,
        retriever=config.retriever if of_retriever else None,
    )
    plans: dict[str, read.Plan] = {}
    problems: list[str] = []
    tokenizers: dict[str, epath.Path] = {}
    if (model := config.model) is not None:
        known = layouts.of_model(model)
        sources = [(layout, open_weights(files[layout.name])) for layout in known if layout.name in files]
        plans[bundle.MODEL] = _plan(sources, lambda: InterLLaVA(model, nnx.Rngs(0)), mesh)
        if "llama" in files:
            problems += read.llama_config_problems(epath.Path(files["llama"]), model.llama)
            tokenizers[bundle.TOKENIZER] = epath.Path(files["llama"]) / "tokenizer.model"
    if (retriever := config.retriever) is not None:
        sources = [(layouts.siglip(retriever), open_weights(files["siglip"]))]
        plans[bundle.RETRIEVER] = _plan(sources, lambda: Retriever(retriever, nnx.Rngs(0)), mesh)
        problems += read.siglip_config_problems(epath.Path(files["siglip"]), retriever)
        tokenizers[bundle.RETRIEVER_TOKENIZER] = epath.Path(files["siglip"]) / "tokenizer.model"
    tokenizers = {name: path for name, path in tokenizers.items() if path.exists()}
    for plan in plans.values():
        problems += plan.problems
    for name, path in tokenizers.items():
        try:
            bundle.read_tokenizer(path, config, name)
        except ValueError as error:
            problems.append(str(error))
    for given, part in ((of_model, bundle.MODEL), (of_retriever, bundle.RETRIEVER)):
        if given and part not in plans:
            problems.append(f"--{next(iter(given))}: the configuration has no config.{part} for it")
    if problems or not plans:
        raise ValueError("\n".join(problems) or "no weights are given: see --help for --eva and the others")
    for plan in plans.values():
        for note in plan.notes:
            print(note)
        _print_counts({path: lazy.shape for path, lazy in plan.parameters.items()}, set(plan.new))
    trees = {name: plan.parameters for name, plan in plans.items()}
    bundle.save(
        out,
        config,
        model=trees.get(bundle.MODEL),
        retriever=trees.get(bundle.RETRIEVER),
        tokenizers={name: path.read_bytes() for name, path in tokenizers.items()},
        write=stream.save,
    )
    print(f"wrote {out}")


def _plan(sources: Any, make: Callable[[], nnx.Module], mesh: Mesh | None) -> read.Plan:
    expected = bundle.parameters(nnx.eval_shape(make))

    def place(path: str, array: np.ndarray) -> jax.Array:
        if mesh is None:
            return jax.device_put(array)
        lies = NamedSharding(mesh, spec(logical_axes(expected[path]), array.shape, mesh))
        return jax.make_array_from_callback(array.shape, lies, lambda index: array[index])

    def initial(paths: Sequence[str]) -> dict[str, jax.Array]:
        def values() -> dict[str, jax.Array]:
            every = bundle.parameters(make())
            return {path: every[path].get_value() for path in paths}

        return jax.jit(values)()  # under jit nothing else of the whole model is computed

    return read.plan(sources, expected, place, initial)


def _print_counts(shapes: Mapping[str, tuple[int, ...]], new: set[str]) -> None:
    for part, pattern, published in PARTS:
        paths = [path for path in shapes if re.fullmatch(pattern, path)]
        if not paths:
            continue
        count = sum(int(np.prod(shapes[path])) for path in paths)
        if published is None:
            remark = "not in published files"
        elif count == published:
            remark = "as published"
        else:
            remark = f"published: {published:,}"
        fresh = " starts as new" if new.issuperset(paths) else ""
        print(f"{part:22}{count:>15,}  {remark}{fresh and ','}{fresh}")
    total = sum(int(np.prod(shape)) for shape in shapes.values())
    print(f"{'all':22}{total:>15,}")


def back(folder: epath.Path, to: str, merged: bool, out: epath.Path) -> None:
    """Writes a model folder's parameters as published files."""
    config = bundle.read_config(folder)
    with atomic(out) as aside:
        aside.mkdir()
        if to == "hf":
            write.to_hf(folder, config, aside, merged)
        else:
            write.to_ivcr(folder, config, aside)
    print(f"wrote {out}")
