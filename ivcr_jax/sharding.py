"""Where arrays lie on a mesh: one table from logical axis names to mesh axes.

Models name the axes of their parameters and activations and know nothing of meshes; this module alone turns names into
shardings. Nothing here starts devices or reads files.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> mesh axes. What is not sharded has no row. Parameters: `embed` is a tower's width, the others
# what a projection makes of it. Activations begin with `act_`, and `batch` counts rows, videos or frames.
RULES: Mapping[str, tuple[str, ...]] = {
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    # In this order: with fsdp last, XLA (jaxlib 0.10, 0.12) gives wrong gradients on meshes that divide all three axes
    # (tests/models/test_sharding.py).
    "batch": ("fsdp", "data"),
    "act_heads": ("tensor",),
    "act_mlp": ("tensor",),
}
# Names a model may use that no rule shards.
WHOLE = frozenset({"layers", "lora", "seq", "act_embed", "head_dim", "norm", "positions", "queries"})


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh's axes. One may be -1: what is left of the devices.

    Attributes:
      data: copies of the model. With several slices they are what the copies are spread over first.
      fsdp: devices among which each copy's parameters are divided.
      tensor: devices among which each layer's work is divided.
      slices: TPU slices, joined by the data-centre network; they divide `data`.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    slices: int = 1


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh (data, fsdp, tensor) over all devices, or over these.

    Raises ValueError where the sizes do not multiply to the number of devices, or slices do not divide `data`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    known = int(np.prod([size for size in sizes if size > 0]))
    if sizes.count(-1) == 1 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if min(sizes) < 1 or np.prod(sizes) != len(devices):
        raise ValueError(f"a mesh of {dict(zip(MESH_AXES, sizes, strict=True))} for {len(devices)} devices")
    if config.slices < 1 or sizes[0] % config.slices:
        raise ValueError(f"mesh: data is {sizes[0]} for {config.slices} slices; expected a multiple of them")
    if config.slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // config.slices, *sizes[1:]),
            (config.slices, 1, 1),
            devices,
            allow_split_physical_axes=True,
        )
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # Auto: XLA propagates shardings. By default axes are explicit, which the models are not written for.
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


def spec(names: Sequence[str | None], shape: Sequence[int], mesh: Any) -> PartitionSpec:
    """The partition of an array whose axes have these logical names.

    An axis that the mesh axes do not divide stays whole.

    Raises:
      ValueError: for an unknown name, a wrong number of names, or two axes on one mesh axis.
    """
    if len(names) != len(shape):
        raise ValueError(f"axes {tuple(names)} name {len(names)} axes of an array of shape {tuple(shape)}")
    parts: list[tuple[str, ...] | None] = []
    taken: dict[str, str] = {}
    for name, size in zip(names, shape, strict=True):
        if name is not None and name not in RULES and name not in WHOLE:
            raise ValueError(f"logical axis {name!r} is unknown; expected one of {sorted({*RULES, *WHOLE})}")
        wanted = tuple(axis for axis in RULES.get(name or "", ()) if mesh.shape.get(axis, 1) > 1)
        for axis in wanted:
            if axis in taken:
                raise ValueError(f"axes {tuple(names)}: {taken[axis]!r} and {name!r} both go to mesh axis {axis!r}")
            taken[axis] = name or ""
        parts.append(wanted if wanted and size % np.prod([mesh.shape[axis] for axis in wanted]) == 0 else None)
    return PartitionSpec(*parts)


def logical_axes(variable: nnx.Variable) -> tuple[str | None, ...]:
    """The logical names of a parameter's axes. A stack of layers has one more axis, in front, than a layer says."""
    axes = variable.get_metadata("axes")
    return axes if len(axes) == len(variable.shape) else ("layers", *axes)


def shardings(state: nnx.State, mesh: Mesh) -> nnx.State:
    """The NamedSharding of each parameter of a state, in the state's structure."""

    def of(variable: nnx.Variable) -> nnx.Variable:
        partition = spec(logical_axes(variable), variable.shape, mesh)
        return variable.replace(NamedSharding(mesh, partition))

    return jax.tree.map(of, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def row_axes(mesh: Any) -> tuple[str, ...]:
    """The mesh axes over which the rows of a batch are divided, those of one device left out."""
    return tuple(axis for axis in RULES["batch"] if mesh.shape.get(axis, 1) > 1)


def by_rows(mesh: Mesh) -> NamedSharding:
    """Where a batch's arrays lie: divided by rows, their leading axis."""
    return NamedSharding(mesh, PartitionSpec(row_axes(mesh) or None))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Asks XLA to lay an activation out by the rules, under `jax.set_mesh`; without a mesh it is `x`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh))
