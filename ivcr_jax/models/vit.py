"""Vision transformers over single images: EVA ViT-g/14 (arXiv 2211.07636) and SigLIP / SigLIP2 (arXiv 2502.14786).

Arrays only. Axis letters as in docs/architecture.md: B images, P patches (with the class token where there is one), D
width.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from ivcr_jax.models.layers import (
    ACTIVATIONS,
    Attention,
    Block,
    Compute,
    LayerNorm,
    Linear,
    Mlp,
    parameter,
    run_stack,
    stack,
)
from ivcr_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """A tower. The defaults are EVA ViT-g/14 without its last block, as BLIP-2 and the published system use it.

    Attributes:
      image_size, patch_size: pixels; images are square.
      stem: widths of 3x3 convolutions of stride 2 in front (arXiv 2106.14881), whose outputs are cut into patches in
        the place of pixels: a small tower sees shapes far sooner with one. The published towers have none.
      width, layers, heads, mlp_width: of the transformer.
      activation: "gelu" (exact) or "gelu_tanh".
      norm_eps: of all layer norms.
      cls_token: a learned token in front of the patches.
      key_bias: whether keys have a bias, as queries and values do.
      final_norm: a layer norm after the last block.
      map_head: attention pooling into one vector an image (SigLIP).
      pixel_mean, pixel_std: by which pixels, as shares of 255, are normalised.
    """

    image_size: int = 224
    patch_size: int = 14
    stem: tuple[int, ...] = ()
    width: int = 1408
    layers: int = 39
    heads: int = 16
    mlp_width: int = 6144
    activation: str = "gelu"
    norm_eps: float = 1e-6
    cls_token: bool = True
    key_bias: bool = False
    final_norm: bool = False
    map_head: bool = False
    pixel_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.patch_size % 2 ** len(self.stem):
            raise ValueError(f"patch_size {self.patch_size} is not a multiple of {2 ** len(self.stem)}, stem's stride")

    @property
    def patches(self) -> int:
        """Patches of an image, the class token not counted."""
        return (self.image_size // self.patch_size) ** 2


def _windows(x: jax.Array) -> jax.Array:
    """f[B, H, W, C] -> f[B, H / 2, W / 2, 9 C]: the 3x3 windows around every second pixel, zero past the edge."""
    height, width = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)))
    parts = [x[:, row : row + height : 2, column : column + width : 2] for row in range(3) for column in range(3)]
    return jnp.concatenate(parts, axis=-1)


class MapHead(nnx.Module):
    """f[B, P, D] -> f[B, D]: one learned query attends to all patches (SigLIP's multi-head attention pooling)."""

    def __init__(self, rngs: nnx.Rngs, config: ViTConfig) -> None:
        self.probe = parameter(rngs, (1, 1, config.width), (None, None, "norm"))
        self.attention = Attention(rngs, config.width, config.heads)
        self.norm = LayerNorm(config.width, config.norm_eps)
        self.mlp = Mlp(rngs, config.width, config.mlp_width, config.activation)

    def __call__(self, x: jax.Array) -> jax.Array:
        probe = jnp.broadcast_to(self.probe[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
        y = self.attention(probe, x)
        return (y + self.mlp(self.norm(y)))[:, 0]


class ViT(nnx.Module):
    """Images -> a feature for each patch."""

    def __init__(self, config: ViTConfig, rngs: nnx.Rngs, compute: Compute = Compute()) -> None:
        c = config
        widths = (3, *c.stem)
        # Not a convolution of XLA's: its backward pass is slow on CPUs, and products of windows are as quick elsewhere.
        self.stem = nnx.List([Linear(rngs, (None, "embed"), (9 * a, b)) for a, b in itertools.pairwise(widths)])
        size = c.patch_size // 2 ** len(c.stem)
        self.patch = Linear(rngs, (None, "embed"), (size**2 * widths[-1], c.width))
        self.cls = parameter(rngs, (1, c.width), (None, "norm")) if c.cls_token else None
        self.positions = parameter(rngs, (c.patches + c.cls_token, c.width), ("positions", "embed"))

        def block(rngs: nnx.Rngs) -> Block:
            return Block(rngs, c.width, c.heads, c.mlp_width, c.activation, c.norm_eps, c.key_bias)

        self.blocks = stack(block, c.layers, rngs)
        self.norm = LayerNorm(c.width, c.norm_eps) if c.final_norm else None
        self.head = MapHead(rngs, c) if c.map_head else None
        self.config, self.compute = config, compute

    def normalise(self, pixels: jax.Array) -> jax.Array:
        """u8[..., 3] pixels 0..255 -> f32[..., 3] as the weights expect them. Floats are taken as normalised."""
        if jnp.issubdtype(pixels.dtype, jnp.floating):
            return pixels
        mean, std = (jnp.array(value) for value in (self.config.pixel_mean, self.config.pixel_std))
        return (pixels.astype(jnp.float32) / 255 - mean) / std

    def __call__(self, images: jax.Array) -> jax.Array:
        """Features of patches.

        Args:
          images: u8[B, H, W, 3] pixels, or f32 of that shape already normalised. H = W = image_size.

        Returns:
          f[B, P, D] in the compute dtype; the class token, where there is one, first.

        Raises:
          ValueError: for images of another size.
        """
        c = self.config
        if images.shape[1:] != (c.image_size, c.image_size, 3):
            raise ValueError(f"images of shape {images.shape[1:]}; expected ({c.image_size}, {c.image_size}, 3)")
        side = c.image_size // c.patch_size
        x = self.normalise(images).astype(self.compute.dtype)
        for convolution in self.stem:
            x = ACTIVATIONS[c.activation](convolution(_windows(x)))
        size = c.patch_size // 2 ** len(c.stem)
        x = x.reshape(-1, side, size, side, size, x.shape[-1]).swapaxes(2, 3)
        x = self.patch(x.reshape(len(images), side * side, -1))  # a convolution whose stride is its size
        if self.cls is not None:
            cls = jnp.broadcast_to(self.cls[...].astype(x.dtype), (len(x), 1, c.width))
            x = jnp.concatenate([cls, x], axis=1)
        x = constrain(x + self.positions[...].astype(x.dtype), "batch", "seq", "act_embed")
        x, _ = run_stack(self.blocks, lambda block, x, _: (block(x), None), x, remat=self.compute.remat)
        return x if self.norm is None else self.norm(x)

    def pool(self, features: jax.Array) -> jax.Array:
        """f[B, P, D] -> f[B, D], through the head; raises ValueError where the configuration has none."""
        if self.head is None:
            raise ValueError("this tower has no pooling head; expected a configuration with map_head=True")
        return self.head(features)
