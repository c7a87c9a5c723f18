"""LoRA (arXiv 2106.09685): a low-rank addition to any named projection, put beside it, merged into it, taken out again.

Arrays only. Works on a single projection and on a stack of layers alike. The two factors are `nnx.LoRAParam`s in f32,
so that a trainer differentiates and keeps optimiser state for them alone.
"""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ivcr_jax.models.layers import Linear, dropout


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What is adapted.

    Attributes:
      rank: r; 0 adapts nothing.
      alpha: the addition is scaled by alpha / rank.
      dropout: of the addition's input, in training.
      targets: a regular expression that a projection's whole path in the model must match, such as
        "llama.layers.q".
    """

    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.1
    targets: str = r"llama\.layers\.(q|k|v|o)"


class Lora(nnx.Module):
    """x f[..., I] -> f[..., O]: x A B alpha / rank. B begins at zero, so the addition does too."""

    def __init__(self, rngs: nnx.Rngs, linear: Linear, config: LoraConfig) -> None:
        *layers, width_in, width_out = linear.kernel.shape
        axes = linear.kernel.get_metadata("axes")
        a = jax.random.normal(rngs.params(), (*layers, width_in, config.rank)) * width_in**-0.5
        self.a = nnx.LoRAParam(a, axes=(axes[0], "lora"))
        self.b = nnx.LoRAParam(jnp.zeros((*layers, config.rank, width_out)), axes=("lora", axes[1]))
        self.scale = config.alpha / config.rank
        self.dropout = config.dropout

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        x = dropout(x, self.dropout, key)
        return (x @ self.a[...].astype(x.dtype)) @ self.b[...].astype(x.dtype) * self.scale

    def product(self) -> jax.Array:
        """What it adds to the kernel: f32[..., I, O]."""
        return self.scale * (self.a[...].astype(jnp.float32) @ self.b[...].astype(jnp.float32))


def adapted(model: nnx.Module) -> dict[str, Linear]:
    """The projections that carry an addition, by path."""
    return {path: linear for path, linear in _projections(model).items() if linear.lora is not None}


def add(model: nnx.Module, config: LoraConfig, rngs: nnx.Rngs) -> None:
    """Puts an addition beside every projection whose path `config.targets` matches.

    Raises ValueError where none matches: a misspelt target would train nothing.
    """
    if config.rank == 0:
        return
    projections = _projections(model)
    chosen = [linear for path, linear in projections.items() if re.fullmatch(config.targets, path)]
    if not chosen:
        raise ValueError(f"LoRA targets {config.targets!r} match none of the projections {', '.join(projections)}")
    for linear in chosen:
        linear.lora = Lora(rngs, linear, config)


def merge(model: nnx.Module, dtype: Any = None) -> dict[str, Lora]:
    """Adds every addition into its kernel, in f32, and takes it off. Returns them by path, for `unmerge`.

    Args:
      model: to change.
      dtype: of the kernels that carried one; None leaves each in its own.
    """
    taken = {}
    for path, linear in adapted(model).items():
        lora = linear.lora
        assert isinstance(lora, Lora)
        taken[path] = lora
        kernel = linear.kernel[...]
        linear.kernel[...] = (kernel.astype(jnp.float32) + lora.product()).astype(dtype or kernel.dtype)
        linear.lora = None
    return taken


def unmerge(model: nnx.Module, taken: dict[str, Lora]) -> None:
    """Undoes `merge`: the model computes the same, with the additions beside the kernels again.

    The kernels come back up to rounding in their dtype.
    """
    projections = _projections(model)
    for path, lora in taken.items():
        linear = projections[path]
        kernel = linear.kernel[...]
        linear.kernel[...] = (kernel.astype(jnp.float32) - lora.product()).astype(kernel.dtype)
        linear.lora = lora


def _projections(model: nnx.Module) -> dict[str, Linear]:
    found = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, Linear):
            found[".".join(map(str, path))] = node
    return found
