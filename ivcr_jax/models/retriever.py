"""The first stage: a dual encoder of texts and videos, shaped like SigLIP2 (arXiv 2502.14786), whose weights fit.

Arrays only. Axis letters: B texts or videos, S text positions, T frames, D width of the shared space.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from ivcr_jax.models.layers import Block, Compute, LayerNorm, Linear, parameter, run_stack, stack
from ivcr_jax.models.video_encoder import position_rows
from ivcr_jax.models.vit import ViT, ViTConfig

SIGLIP2_B = ViTConfig(
    patch_size=16,
    width=768,
    layers=12,
    heads=12,
    mlp_width=3072,
    activation="gelu_tanh",
    cls_token=False,
    key_bias=True,
    final_norm=True,
    map_head=True,
    pixel_mean=(0.5, 0.5, 0.5),
    pixel_std=(0.5, 0.5, 0.5),
)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The text tower. The defaults are SigLIP2-B's.

    Attributes:
      vocab_size: rows of the token table (Gemma's).
      max_tokens: S; texts are padded to it, and the last position is the text's vector.
      width, layers, heads, mlp_width, activation, norm_eps: of the transformer.
    """

    vocab_size: int = 256000
    max_tokens: int = 64
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6


@dataclasses.dataclass(frozen=True)
class RetrieverConfig:
    """Attributes: vit: a tower with a pooling head, of the text tower's output width. text: of the text tower.
    frame_layers: transformer layers over a video's frames before they are averaged, which start as the identity; 0 is
    SigLIP2 on each frame. max_frames: frame positions of those layers; a longer video shares them."""

    vit: ViTConfig = SIGLIP2_B
    text: TextConfig = TextConfig()
    frame_layers: int = 0
    max_frames: int = 64


class TextTower(nnx.Module):
    """i32[B, S] -> f[B, D]."""

    def __init__(self, config: TextConfig, out_width: int, rngs: nnx.Rngs, compute: Compute = Compute()) -> None:
        c = config
        self.words = parameter(rngs, (c.vocab_size, c.width), ("vocab", "embed"))
        self.positions = parameter(rngs, (c.max_tokens, c.width), ("positions", "embed"))
        self.blocks = stack(
            lambda rngs: Block(rngs, c.width, c.heads, c.mlp_width, c.activation, c.norm_eps), c.layers, rngs
        )
        self.norm = LayerNorm(c.width, c.norm_eps)
        self.head = Linear(rngs, ("embed", None), (c.width, out_width))
        self.config, self.compute = config, compute

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Token ids i32[B, S], padded to the configured S as in training (SigLIP masks no padding) -> f[B, D]."""
        if tokens.shape[1] != self.config.max_tokens:
            raise ValueError(f"texts of {tokens.shape[1]} tokens; expected {self.config.max_tokens}, padding included")
        x = (self.words[...][tokens] + self.positions[...]).astype(self.compute.dtype)
        x, _ = run_stack(self.blocks, lambda block, x, _: (block(x), None), x, remat=self.compute.remat)
        return self.head(self.norm(x)[:, -1])


class Retriever(nnx.Module):
    """Texts and videos in one space, where the inner product says how well they go together."""

    def __init__(self, config: RetrieverConfig, rngs: nnx.Rngs, compute: Compute = Compute()) -> None:
        width = config.vit.width
        self.text = TextTower(config.text, width, rngs, compute)
        self.vit = ViT(config.vit, rngs, compute)
        if config.frame_layers:
            v = config.vit
            self.frame_positions = parameter(rngs, (config.max_frames, width), ("positions", "embed"))
            self.frame_blocks = stack(
                lambda rngs: Block(rngs, width, v.heads, v.mlp_width, v.activation, v.norm_eps),
                config.frame_layers,
                rngs,
            )
            for last in (self.frame_blocks.attention.out, self.frame_blocks.mlp.down):
                last.kernel[...] = jnp.zeros_like(last.kernel[...])
        # Of the sigmoid loss (arXiv 2303.15343), with its initial values: the logit is exp(scale) <a, b> + bias.
        self.logit_scale = nnx.Param(jnp.log(jnp.full((1,), 10.0)), axes=(None,))
        self.logit_bias = nnx.Param(jnp.full((1,), -10.0), axes=(None,))
        self.config, self.compute = config, compute

    def embed_text(self, tokens: jax.Array) -> jax.Array:
        """i32[B, S] -> f32[B, D] of length 1."""
        return _unit(self.text(tokens))

    def embed_frames(self, frames: jax.Array) -> jax.Array:
        """Frames u8[B, T, H, W, 3] (or f32, normalised), or the tower's features of them f[B, T, P, D], computed before
        -> f[B, T, D], each frame by itself, of any length."""
        videos, count = frames.shape[:2]
        flat = frames.reshape(videos * count, *frames.shape[2:])
        features = self.vit(flat) if frames.ndim == 5 else flat.astype(self.compute.dtype)
        return self.vit.pool(features).reshape(videos, count, -1)

    def pool(self, frames: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Frames' vectors f[B, T, D] and which are there bool[B, T] -> f32[B, D] of length 1; zero where none is."""
        mask = jnp.ones(frames.shape[:2], bool) if mask is None else mask
        x = frames
        if self.config.frame_layers:
            rows = position_rows(mask, self.config.max_frames)
            place = self.frame_positions[...][rows].astype(x.dtype)

            def body(block: Block, x: jax.Array, _: tuple) -> tuple[jax.Array, None]:
                y = block(x + place, mask)
                return y - place, None

            x, _ = run_stack(self.frame_blocks, body, x, remat=self.compute.remat)
        x = jnp.where(mask[..., None], x.astype(jnp.float32), 0)
        return _unit(x.sum(1) / jnp.maximum(mask.sum(1), 1)[:, None])

    def embed_video(self, frames: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Frames as `embed_frames` takes them, bool[B, T] -> f32[B, D] of length 1."""
        return self.pool(self.embed_frames(frames), mask)

    def logits(self, texts: jax.Array, videos: jax.Array) -> jax.Array:
        """f32[B, D], f32[N, D] -> f32[B, N], of the sigmoid loss."""
        return texts @ videos.T * jnp.exp(self.logit_scale[...]) + self.logit_bias[...]


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))
