"""Reading and writing: a decoder that keeps what it has read, in rows of one dialogue each.

A `Context` holds rows of keys and values. `Engine.read` puts text behind them, `Engine.put` blocks of videos that were
read before, and `Engine.write` lets the model answer, token by token. Everything on the device is one of a few jitted
functions over buckets of lengths, the cache donated from call to call. It knows tokens and arrays: no corpus, no
wording, no file. Axis letters: B rows, S positions of a call, N positions of a cache, V videos, K visual tokens of a
video, C candidates, T frames, Q queries of a frame, E width of a head, D width of the decoder.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ivcr_jax.models.heads import Moments
from ivcr_jax.models.interllava import InterLLaVA
from ivcr_jax.models.layers import unstack
from ivcr_jax.models.llama import KVCache

SMALLEST_CALL, SMALLEST_CACHE = 8, 256  # positions; every bucket is twice the one before


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Attributes: temperature: 0 is the likeliest. top_p: share of the likeliest tokens to
    choose among (arXiv 1904.09751). seed: of the draws."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature {self.temperature}, top_p {self.top_p}: expected at least 0, and more than 0 up to 1"
            )


GREEDY = Sampling()


class Answer(Protocol):
    """What decides which tokens a row writes; `grammar.Answer` is one."""

    done: bool

    def take(self, free: int, barred: int) -> int:
        """The token to write, given the model's choice among all and among those without digits."""


@dataclasses.dataclass(frozen=True)
class Block:
    """A video in the decoder, the same in every context (isolated layout).

    Attributes:
      k, v: f[L, G, K, H], keys and values, rotary embedding applied.
      there: bool[K].
      keys: f[K, 2 E], from `RankHead.keys`.
    """

    k: jax.Array
    v: jax.Array
    there: np.ndarray
    keys: jax.Array

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return self.k.nbytes + self.v.nbytes + self.keys.nbytes


@dataclasses.dataclass
class Context:
    """What B dialogues have read.

    Attributes:
      cache: their keys and values.
      lengths: i64[B], positions of the cache in use.
      positions: i64[B], of the next text token, for the rotary embedding.
      hidden: f[B, D], the state at each row's last token; None before the first.
    """

    cache: KVCache
    lengths: np.ndarray
    positions: np.ndarray
    hidden: jax.Array | None = None


def bucket(size: int, smallest: int) -> int:
    """The smallest bucket that holds `size`."""
    while smallest < size:
        smallest *= 2
    return smallest


class Engine:
    """Jitted reading and writing with one model.

    Attributes:
      model: its decoder's layers are a list from here on.
      rank_keys: states of visual tokens f[..., D] -> f[..., 2 E], see `RankHead.keys`.
      counts: text_tokens, visual_tokens: that went through the decoder; blocks: put ready into a context.
    """

    def __init__(self, model: InterLLaVA) -> None:
        if not isinstance(model.llama.layers, nnx.List):
            model.llama.layers = unstack(model.llama.layers)
        self.model = model
        self.counts: collections.Counter[str] = collections.Counter()
        definition, state = nnx.split(model)
        self._leaves, structure = jax.tree.flatten(state)

        def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
            def run(leaves: list[jax.Array], *args: Any) -> Any:
                return function(nnx.merge(definition, jax.tree.unflatten(structure, leaves)), *args)

            # A list of arrays is taken apart in C++; a module's state, in Python, at every token.
            return functools.partial(jax.jit(run, **options), self._leaves)

        self._empty = jit(lambda model, rows, size: model.llama.empty_cache(rows, size), static_argnums=(1, 2))
        self._read = jit(_read, donate_argnums=1)
        self._step = jit(_step, donate_argnums=1)
        self._choose = jit(_choose)
        self._blocks = jit(_blocks)
        self._scores = jit(lambda model, *args: model.rank(*args))
        self._moment = jit(lambda model, *args: model.moment(*args))
        self.rank_keys = jit(lambda model, hidden: model.rank.keys(hidden))

    def context(self, rows: int) -> Context:
        """Rows that have read nothing. Text begins after the positions that every block has."""
        cache = self._empty(rows, SMALLEST_CACHE)
        return Context(cache, np.zeros(rows, np.int64), np.full(rows, self._first_position, np.int64))

    @property
    def _first_position(self) -> int:
        encoder = self.model.encoder
        windows = encoder.config.windows(encoder.config.max_frames)
        return windows * encoder.video_qformer.config.queries if self.model.config.layout == "isolated" else 0

    def read(
        self,
        context: Context,
        tokens: Sequence[Sequence[int]],
        visual: Sequence[np.ndarray | None] | None = None,
    ) -> jax.Array:
        """Puts tokens behind what the rows have read; `context.hidden` is of the last then.

        Args:
          context: is changed.
          tokens: ids of each row; none leaves the row as it is. In the place of -1 nothing is read, and what follows
            stands one further.
          visual: (inline layout) of each row f[n, D], in the place of the tokens' embeddings, NaN where they are to
            stay; or None.

        Returns:
          f[B, S, D], states of what was read; S is at least the longest row.
        """
        count = np.array([len(row) for row in tokens])
        size = bucket(int(count.max(initial=1)), SMALLEST_CALL)
        self._make_room(context, size)
        rows = len(tokens)
        ids = np.zeros((rows, size), np.int32)
        for row, line in enumerate(tokens):
            ids[row, : len(line)] = line
        order = np.arange(size)
        there = (order < count[:, None]) & (ids >= 0)
        positions = (context.positions[:, None] + order).astype(np.int32)
        extra: tuple[jax.Array, ...] = ()
        seen = 0
        if visual is not None:
            width = self.model.config.llama.width
            given = np.full((rows, size, width), np.nan, np.float32)
            for row, array in enumerate(visual):
                if array is not None:
                    given[row, : len(array)] = array
            seen = int((there & ~np.isnan(given[..., 0])).sum())
            extra = (jnp.asarray(given),)
        segments = there.astype(np.int32)
        hidden, context.cache = self._read(context.cache, np.maximum(ids, 0), positions, segments, *extra)
        last = hidden[np.arange(rows), np.maximum(count - 1, 0)]
        if context.hidden is not None:
            last = jnp.where((count > 0)[:, None], last, context.hidden)
        context.hidden = last
        context.lengths, context.positions = context.lengths + there.sum(1), context.positions + count
        self.counts["visual_tokens"] += seen
        self.counts["text_tokens"] += int(there.sum()) - seen
        return hidden

    def encode_blocks(self, tokens: np.ndarray, there: np.ndarray) -> list[Block]:
        """Videos through the decoder, each alone, for `put`.

        Args:
          tokens: f[V, K, D], from the video encoder. there: bool[V, K].
        """
        self.counts["visual_tokens"] += int(there.sum())
        blocks = []
        for video in range(len(tokens)):
            # By itself, or its last bits would depend on how many others are not at hand.
            k, v, keys = self._blocks(tokens[video : video + 1], there[video : video + 1])
            blocks.append(Block(k[0], v[0], there[video], keys[0]))
        return blocks

    def put(self, context: Context, blocks: Sequence[Sequence[tuple[int, Block]]]) -> None:
        """Puts ready blocks behind what the rows have read (isolated layout).

        Args:
          context: is changed.
          blocks: of each row, with a number above 0 that no other block of the row has.
        """
        one = next(block for row in blocks for _, block in row)
        width, most = len(one.there), bucket(max(map(len, blocks)), 1)
        self._make_room(context, most * width)
        segments = np.zeros((len(blocks), most * width), np.int32)
        numbers = np.zeros_like(segments)
        for row, line in enumerate(blocks):
            for place, (number, block) in enumerate(line):
                here = slice(place * width, (place + 1) * width)
                segments[row, here] = block.there
                numbers[row, here] = number
        # Where a row has fewer, any block fills: its segment is 0, and it goes nowhere.
        lines = [[block for _, block in row] + [one] * (most - len(row)) for row in blocks]
        k, v = ([[getattr(block, kind) for block in line] for line in lines] for kind in ("k", "v"))
        context.cache = _append(context.cache, k, v, segments, numbers)
        context.lengths = context.lengths + (segments > 0).sum(1)
        self.counts["blocks"] += sum(map(len, blocks))

    def cut(self, context: Context, lengths: np.ndarray, positions: np.ndarray, hidden: jax.Array | None) -> None:
        """Takes a context back to where its rows had `lengths` i64[B] positions, and so on; for undoing a turn."""
        kept = np.arange(context.cache.segments.shape[1]) < lengths[:, None]
        segments = jnp.where(kept, context.cache.segments, 0)
        context.cache = dataclasses.replace(context.cache, segments=segments, lengths=jnp.asarray(lengths, jnp.int32))
        context.lengths, context.positions, context.hidden = lengths.copy(), positions.copy(), hidden

    def scores(self, context: Context, keys: jax.Array, there: np.ndarray, first: np.ndarray | None) -> np.ndarray:
        """f32[B, C], the rank head's, from the rows' last states; see `RankHead`.

        Args:
          keys: f[B, C, K, 2 E]. there: bool[B, C, K]. first: f32[B, C], where the head takes the first stage's scores.
        """
        count = there.shape[1]
        spare = bucket(count, 2) - count
        wide = [(0, 0), (0, spare), (0, 0)]
        padded = [jnp.pad(keys, [*wide, (0, 0)]), np.pad(there, wide)]
        if self.model.config.rank.first_stage:
            if first is None:
                raise ValueError("the rank head takes the first stage's scores: found none")
            padded.append(np.pad(first, wide[:2]))
        return np.asarray(self._scores(context.hidden, *padded))[:, :count]

    def moment(
        self,
        context: Context,
        keys: np.ndarray,
        times: np.ndarray,
        there: np.ndarray,
        durations: np.ndarray,
        texts: np.ndarray,
    ) -> Moments:
        """The moment head's, from the rows' last states; see `MomentHead`.

        Args:
          keys: f[B, T, Q, 2 E]. times: f32[B, T] seconds. there: bool[B, T]. durations: f32[B] seconds.
          texts: f32[B, Dr], the first stage's vectors of the messages, for a head that takes them.
        """
        asked = texts if self.model.config.moment.first_width else None
        return self._moment(context.hidden, keys, times, there, durations, asked)

    def write(
        self, context: Context, answers: Sequence[Answer | None], barred: np.ndarray, sampling: Sampling = GREEDY
    ) -> Iterator[list[int | None]]:
        """Lets every row write until its answer is done; yields what each wrote, None where it writes no more.

        Args:
          context: is changed: what was written is read.
          answers: one a row; None for a row that is silent.
          barred: bool[ids], the ids without which each row's second choice is made.
          sampling: how.
        """
        rows = len(answers)
        key = jax.random.key(sampling.seed)
        drawn = (np.float32(sampling.temperature), np.float32(sampling.top_p))
        banned = jnp.asarray(barred)
        # By place in the dialogue, so that a conversation that goes on from a saved one draws the same.
        at = context.positions.astype(np.int32)
        free, without = (np.asarray(x) for x in self._choose(context.hidden, banned, key, at, *drawn))
        while True:
            said: list[int | None] = [None] * rows
            for row, answer in enumerate(answers):
                if answer is not None and not answer.done:
                    said[row] = answer.take(int(free[row]), int(without[row]))
            if all(token is None for token in said):
                return
            self._make_room(context, 1)
            alive = np.array([token is not None for token in said])
            ids = np.array([token or 0 for token in said], np.int32)
            at = context.positions.astype(np.int32)
            context.cache, context.hidden, chosen = self._step(
                context.cache, context.hidden, ids, at, alive, banned, key, at + alive, *drawn
            )
            context.lengths, context.positions = context.lengths + alive, context.positions + alive
            self.counts["text_tokens"] += int(alive.sum())
            yield said
            free, without = (np.asarray(x) for x in chosen)

    def write_together(
        self, contexts: Sequence[Context], answers: Sequence[Answer], barred: np.ndarray, sampling: Sampling = GREEDY
    ) -> Iterator[list[int | None]]:
        """As `write`, of contexts of one row each that have read something, at least one. They are put together
        before, and apart when all is written."""
        if len(contexts) == 1:
            yield from self.write(contexts[0], answers, barred, sampling)
            return
        spare = bucket(len(contexts), 1) - len(contexts)  # silent rows, so that few numbers of rows are compiled for
        rows = [*contexts, *[self.context(1)] * spare]
        size = max(row.cache.segments.shape[1] for row in rows)
        caches = [_grow(row.cache, size - row.cache.segments.shape[1]) for row in rows]
        states = [row.hidden for row in rows if row.hidden is not None]
        joined = Context(
            _join(caches),
            np.concatenate([row.lengths for row in rows]),
            np.concatenate([row.positions for row in rows]),
            jnp.concatenate([*states, *states[:1] * spare]),
        )
        del caches
        yield from self.write(joined, [*answers, *[None] * spare], barred, sampling)
        states = jnp.split(jnp.asarray(joined.hidden), len(rows))
        for place, (context, cache) in enumerate(zip(contexts, _part(joined.cache), strict=False)):
            here = slice(place, place + 1)
            context.cache, context.hidden = cache, states[place]
            context.lengths, context.positions = joined.lengths[here], joined.positions[here]

    def _make_room(self, context: Context, more: int) -> None:
        size = context.cache.segments.shape[1]
        wanted = bucket(int(context.lengths.max()) + more, size)
        if wanted > size:
            context.cache = _grow(context.cache, wanted - size)


def _read(
    model: InterLLaVA,
    cache: KVCache,
    tokens: jax.Array,
    positions: jax.Array,
    there: jax.Array,
    visual: jax.Array | None = None,
) -> tuple[jax.Array, KVCache | None]:
    x = model.llama.embed(tokens)
    if visual is not None:
        x = jnp.where(jnp.isnan(visual), x, visual.astype(x.dtype))
    blocks = jnp.zeros_like(there) if model.config.layout == "isolated" else None
    return model.llama(x, positions, there, blocks, cache)


def _step(
    model: InterLLaVA,
    cache: KVCache,
    before: jax.Array,
    tokens: jax.Array,
    positions: jax.Array,
    alive: jax.Array,
    *choice: jax.Array,
) -> tuple[KVCache | None, jax.Array, tuple[jax.Array, jax.Array]]:
    """Reads a token of each row that is alive, and chooses the next."""
    hidden, after = _read(model, cache, tokens[:, None], positions[:, None], alive[:, None].astype(jnp.int32))
    state = jnp.where(alive[:, None], hidden[:, 0], before)
    return after, state, _choose(model, state, *choice)


def _choose(
    model: InterLLaVA,
    hidden: jax.Array,
    barred: jax.Array,
    key: jax.Array,
    at: jax.Array,
    temperature: jax.Array,
    top_p: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Two i32[B]: a token of each row, and one that is not barred."""
    logits = model.llama.logits(hidden)
    keys = jax.vmap(lambda at: jax.random.fold_in(key, at))(at)

    def pick(logits: jax.Array) -> jax.Array:
        def drawn() -> jax.Array:
            scaled = logits / temperature
            order = jnp.argsort(-scaled, axis=-1)
            likely = jax.nn.softmax(jnp.take_along_axis(scaled, order, axis=-1))
            # Those before which less than top_p is: the first is always among them.
            among = jnp.cumsum(likely, axis=-1) - likely < top_p
            kept = jnp.where(among, jnp.take_along_axis(scaled, order, axis=-1), -jnp.inf)
            place = jax.vmap(jax.random.categorical)(keys, kept)
            return jnp.take_along_axis(order, place[:, None], axis=-1)[:, 0]

        return jax.lax.cond(temperature > 0, drawn, lambda: jnp.argmax(logits, axis=-1)).astype(jnp.int32)

    return pick(logits), pick(jnp.where(barred, -jnp.inf, logits))


def _blocks(model: InterLLaVA, tokens: jax.Array, there: jax.Array) -> tuple[Any, Any, jax.Array]:
    hidden, cache = model.encode_block(tokens.astype(model.compute.dtype), there)
    # The cache closes up what is missing; a block keeps each token's place.
    order = jnp.maximum(jnp.cumsum(there, axis=1) - 1, 0)

    def of_videos(layers: list[jax.Array]) -> jax.Array:
        return jnp.stack([jnp.take_along_axis(x, order[:, None, :, None], axis=2) for x in layers], axis=1)

    return of_videos(cache.k), of_videos(cache.v), model.rank.keys(hidden)


@functools.partial(jax.jit, donate_argnums=0)
def _append(cache: KVCache, k: Any, v: Any, segments: jax.Array, numbers: jax.Array) -> KVCache:
    """k, v: of each row the blocks f[L, G, K, H]."""
    k, v = (list(jnp.stack([jnp.concatenate(row, axis=2) for row in kind], axis=1)) for kind in (k, v))
    return cache.append(k, v, segments, numbers)


@functools.partial(jax.jit, static_argnums=1)
def _grow(cache: KVCache, more: int) -> KVCache:
    def longer(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, more if place == axis else 0) for place in range(x.ndim)])

    k, v = jax.tree.map(lambda x: longer(x, 2), (cache.k, cache.v))
    return dataclasses.replace(cache, k=k, v=v, segments=longer(cache.segments, 1), blocks=longer(cache.blocks, 1))


@jax.jit
def _join(caches: list[KVCache]) -> KVCache:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), *caches)


@jax.jit
def _part(cache: KVCache) -> list[KVCache]:
    """A cache of each row."""
    return [jax.tree.map(lambda x: x[row : row + 1], cache) for row in range(len(cache.lengths))]  # noqa: B023
