"""Q-Former (arXiv 2301.12597, with text as in InstructBLIP, arXiv 2305.06500): learned queries that read a context.

A BERT-style, post-norm transformer over [queries ; text]: all attend to each other, the queries alone to the context,
and queries and text have feed-forward layers of their own. Without a vocabulary there is no text side: the video
Q-Former. Arrays only; axis letters: N items (frames or clips), Q queries, S text tokens, P context tokens, D width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from ivcr_jax.models.layers import (
    Attention,
    Compute,
    LayerNorm,
    Mlp,
    dropout,
    parameter,
    run_stack,
    split_key,
    stack,
)
from ivcr_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """The defaults are InstructBLIP's image Q-Former.

    Attributes:
      queries: Q, learned query tokens.
      width, layers, heads, mlp_width: of the transformer.
      cross_every: layers 0, cross_every, 2 * cross_every, ... attend to the context. Divides `layers`.
      vocab_size: rows of the word table; 0 for no text.
      max_text: text positions; 0 for no text.
      norm_eps: of all layer norms.
      dropout: of embeddings and of each sub-layer's output, in training. (BERT's dropout of attention weights is left
        out.)
    """

    queries: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    cross_every: int = 2
    vocab_size: int = 30523
    max_text: int = 512
    norm_eps: float = 1e-12
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.cross_every < 1 or self.layers % self.cross_every:
            raise ValueError(f"layers {self.layers} is not a multiple of cross_every {self.cross_every}")
        if self.vocab_size and self.max_text < 1:
            raise ValueError(f"max_text is {self.max_text}; expected at least 1 where there is text")
        if self.max_text and not self.vocab_size:
            raise ValueError(f"max_text is {self.max_text}; expected 0 where there is no text")


class _Residual(nnx.Module):
    """norm(x + dropout(y)): what ends each sub-layer of a post-norm transformer."""

    def __init__(self, config: QFormerConfig) -> None:
        self.norm = LayerNorm(config.width, config.norm_eps)
        self.rate = config.dropout

    def __call__(self, x: jax.Array, y: jax.Array, key: jax.Array | None) -> jax.Array:
        return self.norm(x + dropout(y, self.rate, key))


class _Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, config: QFormerConfig, context_width: int) -> None:
        cross = context_width > 0
        c = config
        self.attention = Attention(rngs, c.width, c.heads)
        self.attention_end = _Residual(c)
        self.cross = Attention(rngs, c.width, c.heads, context_width) if cross else None
        self.cross_end = _Residual(c) if cross else None
        self.query_mlp = Mlp(rngs, c.width, c.mlp_width, "gelu")
        self.query_mlp_end = _Residual(c)
        self.text_mlp = Mlp(rngs, c.width, c.mlp_width, "gelu") if c.vocab_size else None
        self.text_mlp_end = _Residual(c) if c.vocab_size else None
        self.queries = c.queries

    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None,
        context: jax.Array,
        context_mask: jax.Array | None,
        key: jax.Array | None,
    ) -> jax.Array:
        keys = split_key(key, 8)
        x = self.attention_end(x, self.attention(x, x, mask, keys[0]), keys[1])
        queries, text = x[:, : self.queries], x[:, self.queries :]
        if self.cross is not None and self.cross_end is not None:
            queries = self.cross_end(queries, self.cross(queries, context, context_mask, keys[2]), keys[3])
        queries = self.query_mlp_end(queries, self.query_mlp(queries, keys[4]), keys[5])
        if self.text_mlp is None or self.text_mlp_end is None or not text.shape[1]:
            return queries
        text = self.text_mlp_end(text, self.text_mlp(text, keys[6]), keys[7])
        return jnp.concatenate([queries, text], axis=1)


class _Group(nnx.Module):
    """A layer that attends to the context and those up to the next such one."""

    def __init__(self, rngs: nnx.Rngs, config: QFormerConfig, context_width: int) -> None:
        widths = [context_width, *[0] * (config.cross_every - 1)]
        self.layers = nnx.List([_Layer(rngs, config, width) for width in widths])


class QFormer(nnx.Module):
    """Context and text -> a vector for each query (and each text token)."""

    def __init__(self, config: QFormerConfig, context_width: int, rngs: nnx.Rngs, compute: Compute = Compute()) -> None:
        c = config
        self.queries = parameter(rngs, (c.queries, c.width), ("queries", "embed"))
        if c.vocab_size:
            self.words = parameter(rngs, (c.vocab_size, c.width), ("vocab", "embed"))
            self.positions = parameter(rngs, (c.max_text, c.width), ("positions", "embed"))
        self.norm = LayerNorm(c.width, c.norm_eps)
        self.groups = stack(lambda rngs: _Group(rngs, c, context_width), c.layers // c.cross_every, rngs)
        self.config, self.compute = config, compute

    def __call__(
        self,
        context: jax.Array,
        context_mask: jax.Array | None = None,
        text: jax.Array | None = None,
        text_mask: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Reads the context.

        Args:
          context: f[N, P, E], E the context_width it was made with.
          context_mask: bool[N, P], which of it is there; None is all. An item of which nothing is there gets a finite
            result without meaning.
          text: i32[N, S] token ids, or None.
          text_mask: bool[N, S]; None is all.
          key: of dropout; None for none.

        Returns:
          f[N, Q + S, D]: the queries, then the text.

        Raises:
          ValueError: for text where the configuration has none, or more of it than positions.
        """
        c = self.config
        keys = split_key(key, 2)
        x = jnp.broadcast_to(self.queries[...], (len(context), c.queries, c.width))
        mask = None
        if text is not None:
            if not c.vocab_size or text.shape[1] > c.max_text:
                raise ValueError(
                    f"text of {text.shape[1]} tokens; expected at most {c.max_text if c.vocab_size else 'none'}"
                )
            words = self.words[...][text] + self.positions[...][: text.shape[1]]
            x = jnp.concatenate([x, words], axis=1)
            there = jnp.ones(text.shape, bool) if text_mask is None else text_mask
            mask = jnp.pad(there, ((0, 0), (c.queries, 0)), constant_values=True)
        x = dropout(self.norm(x.astype(self.compute.dtype)), c.dropout, keys[0])
        context = context.astype(x.dtype)

        def body(group: _Group, x: jax.Array, each: tuple) -> tuple[jax.Array, None]:
            for layer, layer_key in zip(group.layers, split_key(each[1], c.cross_every), strict=True):
                x = layer(x, mask, context, context_mask, layer_key)
            return constrain(x, "batch", "seq", "act_embed"), None

        return run_stack(self.groups, body, x, remat=self.compute.remat, key=keys[1])[0]
