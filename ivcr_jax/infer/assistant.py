"""The models of an export, ready to converse: both tokenizers, the engine, and videos' blocks as they are needed."""

import collections
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from ivcr_jax import bundle, card
from ivcr_jax.config import listed
from ivcr_jax.data.tokenizer import encode_query
from ivcr_jax.infer.corpus import Corpus, Record
from ivcr_jax.infer.engine import Block, Context, Engine
from ivcr_jax.infer.grammar import Grammar
from ivcr_jax.metrics.moment import apart
from ivcr_jax.models.heads import ABSENT, Moments
from ivcr_jax.models.layers import Compute

APART = 0.5  # IoU above which two spans are the same answer
BLOCK_BYTES = 2**30  # of keys and values of videos that are kept at hand
QUERIES = 256  # whose vectors are kept: candidates in several orders, and ranks, ask for one more than once


class Assistant:
    """What sessions share.

    Attributes:
      fingerprint: of the export; a corpus must have been made with the same.
      tokenizer: of the decoder. style: of its prompts. frames: T, at most, of a video. isolated: whether a video's keys
        and values are the same in every context. engine, grammar: to read and write with.
      fits: the first stage's score below which nothing fits, or None where the export's card states none.
    """

    def __init__(
        self,
        export: epath.PathLike,
        *,
        compute: Compute = Compute(dtype="float32"),
        fingerprint: str | None = None,
    ) -> None:
        """Loads an export.

        Args:
          export: the folder. compute: how the models are computed.
          fingerprint: its `bundle.fingerprint` where that is known, as reading all weights for it takes long.

        Raises:
          FileNotFoundError: there is none.
          ValueError: it lacks a model or a tokenizer, its tokenizer cannot be constrained, or its card cannot be read.
        """
        loaded = bundle.load(export, compute=compute)
        model, retriever = loaded.model, loaded.retriever
        tokenizer, queries = loaded.tokenizer, loaded.retriever_tokenizer
        if model is None or retriever is None or tokenizer is None or queries is None:
            parts = {"model": model, "retriever": retriever, "tokenizer": tokenizer, "retriever tokenizer": queries}
            lacking = listed([name for name, part in parts.items() if part is None])
            raise ValueError(f"{export}: found no {lacking}, expected both models with their tokenizers")
        self.fingerprint = fingerprint or bundle.fingerprint(export)
        self.tokenizer, self.style, self.frames = tokenizer, loaded.config.style, model.config.video.max_frames
        # Then a video's keys and values are the same in every context.
        self.isolated = model.config.layout == "isolated"
        self.engine, self.grammar = Engine(model), Grammar(tokenizer)
        self.fits = card.threshold(export)
        self._queries, self._longest = queries, retriever.config.text.max_tokens
        definition, self._retriever = nnx.split(retriever)
        self._run_retriever = jax.jit(lambda state, tokens: nnx.merge(definition, state).embed_text(tokens))
        self._embed = functools.lru_cache(QUERIES)(self._embed_anew)
        self._best = jax.jit(Moments.best, static_argnums=1)
        self._blocks: collections.OrderedDict[tuple[str, str], Block] = collections.OrderedDict()

    def embed(self, query: str) -> np.ndarray:
        """f32[Dr], of length 1, not to be changed: a query for the first stage."""
        return self._embed(query)

    def _embed_anew(self, query: str) -> np.ndarray:
        ids = np.array([encode_query(query, self._queries, self._longest)], np.int32)
        return np.asarray(self._run_retriever(self._retriever, ids)[0])

    def blocks(self, corpus: Corpus, names: Sequence[str]) -> list[Block]:
        """Videos of a corpus in the decoder: those at hand as they are, the others computed, all at once."""
        keys = [(corpus.video(name).record, name) for name in names]  # a record's name tells its contents
        if missing := [key for key in dict.fromkeys(keys) if key not in self._blocks]:
            records = [corpus.read(name) for _, name in missing]
            tokens, there = (np.stack([getattr(r, part) for r in records]) for part in ("tokens", "token_mask"))
            self._blocks |= zip(missing, self.engine.encode_blocks(tokens, there), strict=True)
        for key in keys:
            self._blocks.move_to_end(key)
        found = [self._blocks[key] for key in keys]
        size = sum(block.nbytes for block in self._blocks.values())
        while size > BLOCK_BYTES and len(self._blocks) > len(names):
            size -= self._blocks.popitem(last=False)[1].nbytes
        return found

    def moments(
        self, context: Context, record: Record, duration: float, vector: np.ndarray, after: float, most: int
    ) -> list[tuple[tuple[float, float], float]]:
        """Where in a video, by the context's last state: seconds (start, end) and its expected IoU, best first.

        Args:
          record: the video's. duration: its seconds. vector: f32[Dr], the message's, from `embed`.
          after: seconds before which it may not begin.
          most: how many at most, at least 1; each has an IoU of at most APART with every one before it.
        """
        frames = len(record.times)
        spare = self.frames - frames
        keys, times = (np.pad(x, [(0, spare)] + [(0, 0)] * (x.ndim - 1)) for x in (record.moment_keys, record.times))
        there = np.arange(frames + spare) < frames
        length = np.array([duration], np.float32)
        found = self.engine.moment(context, keys[None], times[None], there[None], length, vector[None])
        later = found.starts >= after
        if bool((later & there).any()):
            starts = jnp.where(later, found.start_logits, ABSENT)
            found = dataclasses.replace(found, start_logits=starts)
        spans, scores = (np.asarray(each)[0] for each in self._best(found, self.frames * (self.frames + 1) // 2))
        spans = np.minimum(spans.astype(np.float64), duration)  # as f32 a duration may be a little more than it is
        chosen = apart(spans[scores >= 0], most, APART)  # what is below are repeats
        return [((float(spans[place, 0]), float(spans[place, 1])), float(scores[place])) for place in chosen]
