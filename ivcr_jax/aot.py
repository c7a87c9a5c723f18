"""Compiles a configuration's own train step, and a decoding step, for TPUs that are not there. Needs libtpu.

    python -m ivcr_jax.aot --config=configs/interllava_7b.py:v5e:16x16 --topology=v5e:16x16 [--num_slices=2]

The real XLA:TPU compiler runs on this machine's CPU. The last line printed is a JSON object; the exit status is 1 where
a step does not fit the chips' memory. It makes no array and reads no data. JAX_OPTIMIZATION_LEVEL=O1 in the environment
asks the compiler for less effort: an answer in less time, of a program that takes rather more memory than less.
"""

import collections
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

# Before JAX starts: there is no TPU to look for, and no metadata server to ask.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # several may compile at a time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import config_flags

from ivcr_jax import command, flops
from ivcr_jax.data.batches import BatchShape, empty_batch
from ivcr_jax.models.interllava import InterLLaVA
from ivcr_jax.models.llama import KVCache
from ivcr_jax.sharding import by_rows, make_mesh, row_axes, shardings
from ivcr_jax.training import Program, TrainConfig, read_config

# Bytes of memory of a device, as XLA:TPU's own messages give them (a little under the data sheets').
HBM = {"v4": 30.75 * 2**30, "v5e": 15.75 * 2**30, "v5p": 95.74 * 2**30, "v6e": 31.25 * 2**30}
# Chips that appear as one device each only under this name of their set-up.
ONE_DEVICE_A_CHIP = {"v4": "megacore", "v5p": "megacore"}
# "This frame is sampled at 9999.9 second." with its begin token, in LLaMA-2's tokens.
FRAME_TEXT = 18

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}


def devices_of(topology: str, slices: int) -> list[Any]:
    """The devices of a topology such as "v5e:16x16"; raises ValueError for one the compiler does not know."""
    chip = topology.partition(":")[0]
    if chip not in HBM:
        raise ValueError(f"topology is {topology!r}; expected a chip of {', '.join(HBM)}, a colon, and a shape")
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if chip in ONE_DEVICE_A_CHIP:
        options["chip_config_name"] = ONE_DEVICE_A_CHIP[chip]
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise ValueError(f"topology {topology!r}, {slices} slices: {error}") from None


def batch_of(config: TrainConfig, mesh: Mesh, features: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a batch, with features of the ViT or with frames."""
    tower = config.model.vit if config.model is not None else config.retriever.vit  # type: ignore[union-attr]
    if features:
        shape = BatchShape("features", (tower.patches + tower.cls_token, tower.width), np.float16, FRAME_TEXT)
    else:
        shape = BatchShape("frames", (tower.image_size, tower.image_size, 3), np.uint8, FRAME_TEXT)
    rows = config.data.batch_size
    return {
        name: jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype, sharding=by_rows(mesh))
        for name, array in empty_batch(1, config.pack, shape).items()
    }


def lower_train(config: TrainConfig, mesh: Mesh, features: bool) -> Any:
    """The train step, traced for the mesh."""
    program = Program(config, mesh)
    with jax.set_mesh(mesh):
        return program.train_step.lower(program.state, program.frozen, batch_of(config, mesh, features))


def lower_decode(config: TrainConfig, mesh: Mesh) -> Any:
    """One token more in each of `batch_size` dialogues of `seq_len` positions, traced for the mesh."""
    assert config.model is not None
    of_model, compute = config.model, config.compute
    definition, state = nnx.split(nnx.eval_shape(lambda: InterLLaVA(of_model, nnx.Rngs(0), compute)))

    def placed(variable: nnx.Variable, lies: nnx.Variable) -> nnx.Variable:
        array = jax.ShapeDtypeStruct(variable.shape, jnp.dtype(compute.dtype), sharding=lies.get_value())
        return variable.replace(array)

    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    state = jax.tree.map(placed, state, shardings(state, mesh), is_leaf=is_variable)
    rows, size = config.data.batch_size, config.data.seq_len
    heads = ("tensor",) if of_model.llama.kv_heads % mesh.shape["tensor"] == 0 else None
    of_rows = row_axes(mesh) or None

    def lie(*axes: Any) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*axes))

    def cache_shapes() -> KVCache:
        model = nnx.merge(definition, state)
        return model.llama.empty_cache(rows, size)

    marks: Any = lie(of_rows)
    keys: Any = lie(None, of_rows, heads)
    cache = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(cache_shapes),
        KVCache(keys, keys, marks, marks, marks),
    )
    token = jax.ShapeDtypeStruct((rows, 1), jnp.int32, sharding=marks)

    def decode(state: nnx.State, token: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache | None]:
        llama = nnx.merge(definition, state).llama
        zero = jnp.zeros_like(token)
        hidden, after = llama(llama.embed(token), cache.lengths[:, None], zero + 1, zero, cache)
        return llama.logits(hidden[:, 0]).argmax(-1), after

    with jax.set_mesh(mesh):
        return jax.jit(decode, donate_argnums=2).lower(state, token, cache)


def measure(lowered: Any, hbm: float) -> dict[str, Any]:
    """Compiles, and says what came out: whether it fits, bytes of a chip by kind, collectives, seconds."""
    started = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = round(time.monotonic() - started, 1)
        return {"fits": False, "why": " ".join(str(error).split())[:400], "compile_seconds": seconds}
    memory = compiled.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    used = sum(sizes.values())
    return {
        "fits": used <= hbm,
        "bytes": sizes | {"all": used},
        "free_share": round(1 - used / hbm, 4),
        "collectives": collectives(compiled.as_text()),
        "compile_seconds": round(time.monotonic() - started, 1),
    }


def collectives(hlo: str) -> dict[str, Any]:
    """What a program sends, by kind: how often it does and the bytes of the results, a scan's body as often as it runs.

    `outside_scans`: the largest all-gather that is in no scan: its shape and bytes.
    """
    bodies = _computations(hlo)
    entry = next(name for name, (lines, is_entry) in bodies.items() if is_entry)
    runs: collections.Counter[str] = collections.Counter()
    scanned: set[str] = set()

    def trips(line: str, condition: str) -> int:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
        # XLA:TPU does not write it; its loops count up from 0 to the one constant of their condition.
        limits = re.findall(r"= [su]32\[\]\S* constant\((\d+)\)", "\n".join(bodies[condition][0]))
        return int(known.group(1)) if known else int(limits[0]) if len(limits) == 1 else 1

    def walk(name: str, times: int, inside: bool) -> None:
        runs[name] += times
        if inside:
            scanned.add(name)
        for line in bodies[name][0]:
            loop = re.search(r"\bwhile\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line)
            called = (
                [loop.group(2)] if loop else re.findall(r"(?:calls|to_apply|branch_computations)=\{?%?([\w.\-]+)", line)
            )
            for other in called:
                if other in bodies:
                    walk(other, times * trips(line, loop.group(1)) if loop else times, inside or bool(loop))

    walk(entry, 1, False)
    found: dict[str, Any] = {kind: {"count": 0, "bytes": 0} for kind in COLLECTIVES}
    largest: tuple[int, str] = (0, "")
    for name, times in runs.items():
        for line in bodies[name][0]:
            match = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) (" + "|".join(COLLECTIVES) + r")(-start)?\(", line)
            if not match:
                continue
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match.group(1))
            # An asynchronous one hands out its operand and its result, and on TPU words of context.
            sizes = [(_bytes(dtype, dims), f"{dtype}[{dims}]") for dtype, dims in shapes]
            size, shape = max(sizes)
            found[match.group(2)]["count"] += times
            found[match.group(2)]["bytes"] += times * size
            if match.group(2) == "all-gather" and name not in scanned:
                largest = max(largest, (size, shape))
    return found | {"outside_scans": {"bytes": largest[0], "shape": largest[1]}}


def _bytes(dtype: str, dims: str) -> int:
    return BYTES.get(dtype, 4) * math.prod(int(size) for size in dims.split(",") if size)


def _computations(hlo: str) -> dict[str, tuple[list[str], bool]]:
    """The lines of each computation of an HLO text, and whether it is where the program begins."""
    found: dict[str, tuple[list[str], bool]] = {}
    lines: list[str] = []
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$", line)
        if head:
            lines = []
            found[head.group(2)] = (lines, bool(head.group(1)))
        else:
            lines.append(line)
    return found


def report(config: TrainConfig, topology: str, slices: int, features: bool, decode: bool) -> dict[str, Any]:
    """Everything about a configuration on a topology, as plain values."""
    devices = devices_of(topology, slices)
    mesh = make_mesh(config.mesh, devices)
    program = Program(config, mesh)
    hbm = HBM[topology.partition(":")[0]]
    work = flops.train_step(config, program.factors, frame_text=FRAME_TEXT, features=features)
    found: dict[str, Any] = {
        "topology": topology,
        "slices": slices,
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "input": "features" if features else "frames",
        "hbm_bytes": int(hbm),
        "optimization_level": os.environ.get("JAX_OPTIMIZATION_LEVEL", "UNKNOWN"),
        "flops_a_step": work,
        "flops_a_step_and_chip": work / len(devices),
        "train": measure(lower_train(config, mesh, features), hbm),
    }
    if decode:
        found["decode"] = measure(lower_decode(config, mesh), hbm)
    return found | {"fits": all(step["fits"] for step in _steps(found))}


def _steps(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [found[name] for name in ("train", "decode") if name in found]


def main(argv: list[str]) -> None:
    """Compiles as the flags say."""
    command.refuse_arguments(argv)
    args = flags.FLAGS
    command.quiet()
    try:
        found = report(read_config(args.config), args.topology, args.num_slices, args.input == "features", args.decode)
    except ValueError as error:
        sys.exit(f"aot: {error}")
    print(json.dumps(found))
    sys.exit(0 if found["fits"] else 1)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "configs/X.py[:argument].", lock_config=True)
    flags.mark_flag_as_required("config")
    flags.DEFINE_string("topology", None, "Chip and shape of a slice, as in v5e:16x16.", required=True)
    flags.DEFINE_integer("num_slices", 1, "Slices, joined by the data-centre network.")
    flags.DEFINE_enum("input", "features", ["features", "frames"], "What batches hold: the ViT's features, or pixels.")
    flags.DEFINE_bool("decode", True, "Compile the decoding step too.")
    app.run(main)
