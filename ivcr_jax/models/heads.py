"""The two heads: which candidate (listwise), and which moment of the current video (over its frames).

Neither knows of slots: a candidate is scored from the turn's state and its own tokens, by the same function for all.
Arrays only. Axis letters: B rows, R turns, C candidates, K visual tokens of a video, T frames, Q queries of a frame, D
the decoder's width, Dr the first stage's, E the head's, F that of frame features.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ivcr_jax.models.layers import Block, Compute, LayerNorm, Linear, RMSNorm, run_stack, stack

NORM_EPS = 1e-6
# Far below any score, yet finite: a softmax over nothing but these has a gradient of zero, not NaN.
ABSENT = -1e9


@dataclasses.dataclass(frozen=True)
class RankHeadConfig:
    """Attributes: width: E, of queries, keys and the hidden layer. heads: of attention over a candidate's tokens.
    first_stage: add what the retriever says of a candidate, times a factor that is learnt."""

    width: int = 512
    heads: int = 8
    first_stage: bool = False


class RankHead(nnx.Module):
    """Scores candidates: the turn's state attends to a candidate's own tokens, and both decide."""

    def __init__(self, config: RankHeadConfig, width: int, rngs: nnx.Rngs) -> None:
        e = config.width
        if e % config.heads:
            raise ValueError(f"rank head: width {e} is not a multiple of heads {config.heads}")
        self.state_norm = RMSNorm(width, NORM_EPS)
        self.state = Linear(rngs, ("embed", "heads"), (width, e))
        self.token_norm = RMSNorm(width, NORM_EPS)
        self.token = Linear(rngs, ("embed", "heads"), (width, 2 * e))
        self.hidden = Linear(rngs, ("embed", "mlp"), (e, e))
        self.hidden_read = Linear(rngs, ("embed", "mlp"), (e, e), bias=False)
        self.hidden_product = Linear(rngs, ("embed", "mlp"), (e, e), bias=False)
        self.score = Linear(rngs, ("mlp", None), (e, 1))
        # At first its scores, which are cosines, decide nearly alone: that of the sigmoid loss at its start.
        self.first_scale = nnx.Param(jnp.full((1,), 10.0), axes=(None,)) if config.first_stage else None
        self.config = config

    def keys(self, tokens: jax.Array) -> jax.Array:
        """Decoder states of visual tokens f[..., D] -> f[..., 2 E], which is all of a candidate the head needs."""
        return self.token(self.token_norm(tokens))

    def __call__(
        self, states: jax.Array, keys: jax.Array, there: jax.Array, first: jax.Array | None = None
    ) -> jax.Array:
        """f32[..., C] scores.

        Args:
          states: f[..., D], the decoder's state at the end of each turn's prompt.
          keys: f[..., C, K, 2 E], from `keys`.
          there: bool[..., C, K], which tokens are there. A candidate without any gets ABSENT.
          first: f32[..., C], the first stage's scores, where the configuration has them.
        """
        if (first is None) != (self.first_scale is None):
            raise ValueError(f"rank head: first_stage is {self.config.first_stage}, and its scores are {first}")
        heads = self.config.heads
        query = self.state(self.state_norm(states))
        key, value = (part.reshape(*part.shape[:-1], heads, -1) for part in jnp.split(keys, 2, axis=-1))
        split = query.reshape(*query.shape[:-1], heads, -1)
        weights = jnp.einsum("...he,...ckhe->...chk", split, key, preferred_element_type=jnp.float32)
        weights = jnp.where(there[..., None, :], weights * split.shape[-1] ** -0.5, ABSENT)
        read = jnp.einsum("...chk,...ckhe->...che", jax.nn.softmax(weights).astype(value.dtype), value)
        read = read.reshape(*read.shape[:-2], -1)
        query = query[..., None, :]
        hidden = self.hidden(query) + self.hidden_read(read) + self.hidden_product(query * read)
        scores = self.score(jax.nn.gelu(hidden))[..., 0].astype(jnp.float32)
        if first is not None and self.first_scale is not None:
            scores += self.first_scale[...] * first
        return jnp.where(there.any(-1), scores, ABSENT)


@dataclasses.dataclass(frozen=True)
class MomentHeadConfig:
    """Attributes: width, layers, heads: of the transformer over frames. first_width: of the first stage's vector of the
    message, which is read beside the decoder's state; 0 for none."""

    width: int = 256
    layers: int = 2
    heads: int = 4
    first_width: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Where a moment may begin and end.

    Attributes:
      start_logits, end_logits: f32[..., T]; ABSENT at missing frames.
      starts, ends: f32[..., T], seconds: where a moment that begins (ends) with this frame begins (ends).
    """

    start_logits: jax.Array
    end_logits: jax.Array
    starts: jax.Array
    ends: jax.Array

    def expected(self) -> jax.Array:
        """f32[..., 2] seconds: the mean start and end, through which a loss on times has a gradient."""
        start = (jax.nn.softmax(self.start_logits) * self.starts).sum(-1)
        end = (jax.nn.softmax(self.end_logits) * self.ends).sum(-1)
        return jnp.stack([start, end], axis=-1)

    def best(self, count: int = 1) -> tuple[jax.Array, jax.Array]:
        """The `count` spans of frames that overlap most with where the moment may be.

        By the expected IoU over all spans whose end frame is not before their start frame, each as likely as its two
        boundaries together (minimum Bayes risk; Kumar and Byrne, HLT-NAACL 2004). The likeliest span alone is a poor
        answer where many are nearly as likely.

        Returns:
          f32[..., count, 2] seconds, and their expected IoU f32[..., count], 0..1; over T (T + 1) / 2 spans the rest is
          repeats at -1.
        """
        frames = self.starts.shape[-1]
        joint = jax.nn.log_softmax(self.start_logits)[..., :, None] + jax.nn.log_softmax(self.end_logits)[..., None, :]
        likely = jnp.where(np.triu(np.ones((frames, frames), bool)), joint, ABSENT)
        share = jax.nn.softmax(likely.reshape(*joint.shape[:-2], -1)).reshape(joint.shape)[..., None, :, :]
        starts, ends = self.starts[..., :, None], jnp.maximum(self.starts[..., :, None], self.ends[..., None, :])

        def of_start(first: jax.Array) -> jax.Array:
            """f32[..., T]: the expected IoU of the spans that begin with this frame, by their last."""
            start = jnp.take(self.starts, first, axis=-1)[..., None, None, None]
            end = jnp.take(ends, first, axis=-2)[..., :, None, None]
            overlap = jnp.maximum(
                jnp.minimum(end, ends[..., None, :, :]) - jnp.maximum(start, starts[..., None, :, :]), 0
            )
            union = (end - start) + (ends - starts)[..., None, :, :] - overlap
            found = (share * overlap / jnp.maximum(union, 1e-6)).sum((-2, -1))
            return jnp.where(np.arange(frames) >= first, found, -1.0)

        # One start at a time: all pairs of spans at once would be T^4.
        gain = jnp.moveaxis(jax.lax.map(of_start, np.arange(frames)), 0, -2)
        there = (self.start_logits > ABSENT)[..., :, None] & (self.end_logits > ABSENT)[..., None, :]
        gain = jnp.where(there, gain, -1.0)
        scores, flat = jax.lax.top_k(gain.reshape(*gain.shape[:-2], -1), count)
        start = jnp.take_along_axis(self.starts, flat // frames, axis=-1)
        end = jnp.take_along_axis(self.ends, flat % frames, axis=-1)
        return jnp.stack([start, jnp.maximum(start, end)], axis=-1), scores


def frame_cells(times: jax.Array, mask: jax.Array, durations: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The stretch of time each frame stands for: halfway to the frames before and after, all of it [0, duration].

    Args:
      times: f32[..., T] seconds, ascending. mask: bool[..., T]; frames that are there come first.
      durations: f32[...] seconds.

    Returns:
      f32[..., T] seconds of where each begins, and of where it ends; at missing frames the duration.
    """
    duration = durations[..., None]
    times = jnp.where(mask, times, duration)
    halfway = (times[..., 1:] + times[..., :-1]) / 2
    last = mask & ~jnp.pad(mask[..., 1:], [(0, 0)] * (mask.ndim - 1) + [(0, 1)])
    begins = jnp.concatenate([jnp.zeros_like(duration), halfway], axis=-1)
    ends = jnp.where(last, duration, jnp.concatenate([halfway, duration], axis=-1))
    return jnp.where(mask, begins, duration), jnp.where(mask, ends, duration)


class MomentHead(nnx.Module):
    """Where in a video: each frame's queries, read with the turn's question, then frames among each other."""

    def __init__(
        self, config: MomentHeadConfig, width: int, frame_width: int, rngs: nnx.Rngs, compute: Compute = Compute()
    ) -> None:
        e = config.width
        self.frame_norm = LayerNorm(frame_width, NORM_EPS)
        self.frame = Linear(rngs, ("embed", "heads"), (frame_width, 2 * e))
        self.state_norm = RMSNorm(width, NORM_EPS)
        self.state = Linear(rngs, ("embed", "heads"), (width, 2 * e))
        if config.first_width:
            # At first the message alone is the question, which the decoder's state says nothing of for long.
            self.state.kernel[...] = jnp.zeros_like(self.state.kernel[...])
            self.text_norm = RMSNorm(config.first_width, NORM_EPS)
            self.text = Linear(rngs, ("embed", "heads"), (config.first_width, 2 * e), bias=False)
        self.time = Linear(rngs, (None, "embed"), (4, e))
        self.blocks = stack(lambda rngs: Block(rngs, e, config.heads, 4 * e, "gelu", NORM_EPS), config.layers, rngs)
        self.norm = LayerNorm(e, NORM_EPS)
        self.boundary = Linear(rngs, ("embed", None), (e, 4))
        self.config, self.compute = config, compute

    def keys(self, frames: jax.Array) -> jax.Array:
        """f[..., T, Q, F] -> f[..., T, Q, 2 E], which is all of the frames the head needs."""
        return self.frame(self.frame_norm(frames))

    def __call__(
        self,
        states: jax.Array,
        keys: jax.Array,
        times: jax.Array,
        mask: jax.Array,
        durations: jax.Array,
        texts: jax.Array | None = None,
    ) -> Moments:
        """Boundaries of a moment, one for each of N questions.

        Args:
          states: f[N, D], the decoder's state at the end of the turn's prompt.
          keys: f[N, T, Q, 2 E], from `keys`, of the turn's video.
          times: f32[N, T] seconds. mask: bool[N, T]. durations: f32[N] seconds.
          texts: f32[N, Dr], the first stage's vectors of the turns' messages, where the configuration has them.
        """
        if (texts is None) != (not self.config.first_width):
            raise ValueError(f"moment head: first_width is {self.config.first_width}, and its vectors are {texts}")
        asked = self.state(self.state_norm(states))
        if texts is not None:
            asked += self.text(self.text_norm(texts.astype(states.dtype)))
        question, offset = jnp.split(asked, 2, axis=-1)
        key, value = jnp.split(keys, 2, axis=-1)
        weights = jnp.einsum("ne,ntqe->ntq", question, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(weights * question.shape[-1] ** -0.5).astype(value.dtype)
        x = jnp.einsum("ntq,ntqe->nte", weights, value)
        begins, ends = frame_cells(times, mask, durations)
        share = jnp.stack([begins, ends], axis=-1) / jnp.maximum(durations, 1e-6)[:, None, None]
        place = jnp.concatenate([share, 1 - share], axis=-1).astype(x.dtype)  # from the start and from the end
        x = x * question[:, None] + offset[:, None] + self.time(place)
        x, _ = run_stack(self.blocks, lambda block, x, _: (block(x, mask), None), x, remat=self.compute.remat)
        start, end, start_shift, end_shift = jnp.moveaxis(self.boundary(self.norm(x)).astype(jnp.float32), -1, 0)
        # A boundary may move by half its frame's stretch: spans are not bound to the sampling.
        half = (ends - begins) / 2
        return Moments(
            start_logits=jnp.where(mask, start, ABSENT),
            end_logits=jnp.where(mask, end, ABSENT),
            starts=jnp.clip(begins + half * jnp.tanh(start_shift), 0, durations[:, None]),
            ends=jnp.clip(ends + half * jnp.tanh(end_shift), 0, durations[:, None]),
        )
