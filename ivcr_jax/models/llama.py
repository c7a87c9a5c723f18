"""LLaMA-family decoder (arXiv 2307.09288, 2407.21783): dialogues packed into rows, video blocks, a cache of keys.

One forward pass serves training, prefill and decoding; a cache only adds keys in front. What may see what is said by
two numbers a position: its segment (the dialogue in the row, 0 for nothing) and its block (a video's tokens in the
isolated layout, 0 for text). Arrays only. Axis letters: B rows, S positions, N positions of a cache, H heads, G heads
of keys and values, K head dim, D width, L layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ivcr_jax.models.attention import attend
from ivcr_jax.models.layers import Compute, Linear, RMSNorm, parameter, run_stack, split_heads, split_key, stack
from ivcr_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of pre-training.

    Attributes:
      kind: "none", "linear" (positions divided by `factor`), or "llama3" (long wavelengths divided, short ones kept,
        smooth between; LLaMA 3.1).
      factor: of the stretch.
      low_freq_factor, high_freq_factor, original_positions: of "llama3": wavelengths over original_positions /
        low_freq_factor are stretched, those under original_positions / high_freq_factor kept.
    """

    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_positions: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in ("none", "linear", "llama3"):
            raise ValueError(f"rope_scaling.kind is {self.kind!r}; expected none, linear or llama3")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The defaults are LLaMA-2-7B with the five video tokens.

    Attributes:
      vocab_size: rows of the published embedding table.
      added_tokens: tokens after those, with rows of their own that can be trained while the table is frozen.
      width, layers, heads, kv_heads, mlp_width: of the transformer. kv_heads divides heads.
      head_dim: K; 0 is width / heads.
      norm_eps: of all norms.
      rope_theta, rope_scaling: of the rotary embedding (arXiv 2104.09864), in Hugging Face's half-rotation layout.
      tied: whether the embedding table is the output head too.
    """

    vocab_size: int = 32000
    added_tokens: int = 5
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 0
    mlp_width: int = 11008
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    tied: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")

    @property
    def head_size(self) -> int:
        """K."""
        return self.head_dim or self.width // self.heads


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of what was read so far.

    Attributes:
      k, v: f[L, B, G, N, K], rotary embedding applied; where the decoder's layers are a list, L of f[B, G, N, K]. A
        head's positions lie together, as a product with them reads them: else each token copies the cache.
      segments, blocks: i32[B, N], as of the positions that were read; segment 0 where nothing is.
      lengths: i32[B], positions in use. The caller keeps them at most N; what would be written past N is lost.
    """

    k: Any
    v: Any
    segments: jax.Array
    blocks: jax.Array
    lengths: jax.Array

    def places(self, segments: jax.Array) -> jax.Array:
        """i32[B, S]: where new positions go: at the row's end in their order; those of segment 0 nowhere (at N)."""
        there = segments > 0
        places = self.lengths[:, None] + jnp.cumsum(there, axis=1) - 1
        return jnp.where(there, places, self.segments.shape[1])

    def mark(self, segments: jax.Array, blocks: jax.Array) -> "KVCache":
        """The cache with new positions' segments and blocks i32[B, S] entered, their keys not yet."""
        places = self.places(segments)
        return dataclasses.replace(
            self,
            segments=put(self.segments, places, segments),
            blocks=put(self.blocks, places, blocks),
            lengths=self.lengths + (segments > 0).sum(1),
        )

    def append(self, k: Any, v: Any, segments: jax.Array, blocks: jax.Array) -> "KVCache":
        """The cache with ready keys and values f[L, B, G, S, K] (or L of f[B, G, S, K]) after what it holds.

        In the isolated layout those of a video's block are the same in every context, so they can be computed once
        (by a forward pass over the block alone) and put here.
        """
        places = self.places(segments)

        def write(buffer: jax.Array, new: jax.Array) -> jax.Array:
            if buffer.ndim == 5:
                return jax.vmap(lambda buffer, new: put(buffer, places, new))(buffer, new)
            return put(buffer, places, new)

        k, v = jax.tree.map(write, (self.k, self.v), (k, v))
        return dataclasses.replace(self.mark(segments, blocks), k=k, v=v)


def put(buffer: jax.Array, places: jax.Array, new: jax.Array) -> jax.Array:
    """buffer[b, places[b, s]] = new[b, s], or with heads buffer[b, g, places[b, s]] = new[b, g, s]; places past the end
    are dropped."""
    position = (slice(None),) * (buffer.ndim == 4)
    return jax.vmap(lambda row, places, new: row.at[*position, places].set(new, mode="drop"))(
        buffer, places, new.astype(buffer.dtype)
    )


def rotary(positions: jax.Array, config: LlamaConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines f32[B, S, K / 2] of the rotary embedding at i32[B, S]."""
    # Step by step in f32, as the weights were trained: one last place is a turn of 1e-4 at the 4096th position.
    scaling, f32 = config.rope_scaling, np.float32
    exponents = np.arange(0, config.head_size, 2).astype(f32) / f32(config.head_size)
    frequencies = f32(1) / (config.rope_theta ** exponents.astype(np.float64)).astype(f32)
    if scaling.kind == "linear":
        frequencies = frequencies / f32(scaling.factor)
    elif scaling.kind == "llama3":
        wavelengths = 1 / frequencies * f32(2 * np.pi)  # torch's order: a scalar over x is 1 / x times the scalar
        turns = 1 / wavelengths * f32(scaling.original_positions)
        kept = (turns - f32(scaling.low_freq_factor)) / f32(scaling.high_freq_factor - scaling.low_freq_factor)
        kept = np.clip(kept, 0, 1)
        frequencies = (1 - kept) * frequencies / f32(scaling.factor) + kept * frequencies
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """x f[B, S, H, K] turned by `rope`, in f32: the first half of K pairs with the second."""
    cos, sin = (part[:, :, None] for part in rope)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class _Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, config: LlamaConfig) -> None:
        c = config
        q_width, kv_width = c.heads * c.head_size, c.kv_heads * c.head_size
        self.attention_norm = RMSNorm(c.width, c.norm_eps)
        self.q = Linear(rngs, ("embed", "heads"), (c.width, q_width), bias=False)
        self.k = Linear(rngs, ("embed", "heads"), (c.width, kv_width), bias=False)
        self.v = Linear(rngs, ("embed", "heads"), (c.width, kv_width), bias=False)
        self.o = Linear(rngs, ("heads", "embed"), (q_width, c.width), bias=False)
        self.mlp_norm = RMSNorm(c.width, c.norm_eps)
        self.gate = Linear(rngs, ("embed", "mlp"), (c.width, c.mlp_width), bias=False)
        self.up = Linear(rngs, ("embed", "mlp"), (c.width, c.mlp_width), bias=False)
        self.down = Linear(rngs, ("mlp", "embed"), (c.mlp_width, c.width), bias=False)
        self.heads, self.kv_heads = c.heads, c.kv_heads


class Llama(nnx.Module):
    """The decoder: embed -> __call__ -> logits."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, compute: Compute = Compute()) -> None:
        c = config
        self.embedding = parameter(rngs, (c.vocab_size, c.width), ("vocab", "embed"))
        self.added_embedding = parameter(rngs, (c.added_tokens, c.width), (None, "embed")) if c.added_tokens else None
        self.layers: Any = stack(lambda rngs: _Layer(rngs, c), c.layers, rngs)  # or, for decoding, `unstack` of them
        self.norm = RMSNorm(c.width, c.norm_eps)

        def head(size: int, axis: str | None) -> Linear | None:
            return Linear(rngs, ("embed", axis), (c.width, size), bias=False) if size and not c.tied else None

        self.head, self.added_head = head(c.vocab_size, "vocab"), head(c.added_tokens, None)
        self.config, self.compute = config, compute

    def embed(self, tokens: jax.Array) -> jax.Array:
        """i32[B, S] -> f[B, S, D]. Ids from vocab_size on are the added tokens."""
        size = self.config.vocab_size
        x = self.embedding[...][jnp.minimum(tokens, size - 1)]
        if self.added_embedding is not None:
            added = self.added_embedding[...][jnp.maximum(tokens - size, 0)]
            x = jnp.where((tokens < size)[..., None], x, added.astype(x.dtype))
        return x.astype(self.compute.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """f[..., D] -> f32[..., vocab_size + added_tokens]."""

        def product(kernel: jax.Array) -> jax.Array:
            return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)

        if self.head is None:
            tables = (self.embedding, self.added_embedding)
            return jnp.concatenate([product(table[...].T) for table in tables if table is not None], axis=-1)
        parts = []
        for head in (self.head, self.added_head):
            if head is not None:
                y = product(head.kernel[...])
                parts.append(y if head.lora is None else y + head.lora(hidden))
        return jnp.concatenate(parts, axis=-1)

    def empty_cache(self, rows: int, size: int) -> KVCache:
        """A cache of N = size positions that holds nothing."""
        c = self.config
        none = jnp.zeros((rows, size), jnp.int32)

        def empty() -> Any:
            one = (rows, c.kv_heads, size, c.head_size)
            if isinstance(self.layers, nnx.List):
                return [jnp.zeros(one, self.compute.dtype) for _ in range(c.layers)]
            return jnp.zeros((c.layers, *one), self.compute.dtype)

        return KVCache(empty(), empty(), none, jnp.zeros_like(none), jnp.zeros(rows, jnp.int32))

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segments: jax.Array,
        blocks: jax.Array | None = None,
        cache: KVCache | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """The last layer's states, after the final norm.

        Text sees what stands before it in its segment, in the row's order; a block's positions see each other alone.

        Args:
          x: f[B, S, D], embedded tokens and visual tokens.
          positions: i32[B, S], of the rotary embedding.
          segments: i32[B, S], 0 where there is nothing: those change nothing, and their states mean nothing.
          blocks: i32[B, S], a number for each block of visual tokens of a segment, 0 at text; None where all is to be
            read as text (the inline layout). With a cache, a block must be in one call from its first token to its
            last.
          cache: what was read before. The new positions are put behind it; without one nothing is kept.
          key: of LoRA's dropout; None for none.

        Returns:
          f[B, S, D], and the cache with the new positions.

        Raises:
          ValueError: for more positions than the cache has.
        """
        rows, length = segments.shape
        order = jnp.broadcast_to(jnp.arange(length), (rows, length))
        seen_segments, seen_blocks, seen_order = segments, blocks, order
        places = order
        if cache is not None:
            size = cache.segments.shape[1]
            if length > size:
                raise ValueError(f"{length} positions for a cache of {size}")
            places = order = cache.places(segments)
            cache = cache.mark(segments, jnp.zeros_like(segments) if blocks is None else blocks)
            seen_segments, seen_blocks = cache.segments, None if blocks is None else cache.blocks
            seen_order = jnp.broadcast_to(jnp.arange(size), (rows, size))
        sees = (segments, blocks, order)
        seen = (seen_segments, seen_blocks, seen_order)
        rope = rotary(positions, self.config)

        def body(layer: _Layer, x: jax.Array, each: tuple[Any, jax.Array | None]) -> tuple[jax.Array, Any]:
            kv, layer_key = each
            keys = split_key(layer_key, 7)
            y = layer.attention_norm(x)
            q = rotate(split_heads(layer.q(y, keys[0]), layer.heads), rope)
            k = rotate(split_heads(layer.k(y, keys[1]), layer.kv_heads), rope)
            v = split_heads(layer.v(y, keys[2]), layer.kv_heads)
            if kv is not None:
                kv = tuple(put(held, places, new.swapaxes(1, 2)) for held, new in zip(kv, (k, v), strict=True))
                k, v = (held.swapaxes(1, 2) for held in kv)
            y = attend(q, k, v, sees, seen, self.compute.attention if kv is None else "xla" if length == 1 else "cache")
            x = x + layer.o(y.reshape(rows, length, -1), keys[3])
            y = layer.mlp_norm(x)
            y = jax.nn.silu(layer.gate(y, keys[4])) * layer.up(y, keys[5])
            x = x + layer.down(constrain(y, "batch", "seq", "act_mlp"), keys[6])
            return constrain(x, "batch", "seq", "act_embed"), kv

        each = None if cache is None else (cache.k, cache.v)
        x = constrain(x.astype(self.compute.dtype), "batch", "seq", "act_embed")
        x, kv = run_stack(self.layers, body, x, each, remat=self.compute.remat, key=key)
        if cache is not None:
            cache = dataclasses.replace(cache, k=kv[0], v=kv[1])
        return self.norm(x), cache
