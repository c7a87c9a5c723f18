"""The losses: each a masked sum over a batch, to be divided by its count over the whole of it.

Sums and counts are kept apart, so that sharding, packing, padding and accumulation change nothing. Arrays only: knows
models by what they hand out. Axis letters: B rows, S positions, R turns, C candidates, V video slots, T frames, D
width, N texts or videos of a device.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from ivcr_jax.models.heads import Moments, frame_cells
from ivcr_jax.models.interllava import Output
from ivcr_jax.models.layers import of_each_row, over_chunks
from ivcr_jax.models.retriever import Retriever
from ivcr_jax.sharding import row_axes

Batch = Mapping[str, jax.Array]
Sums = dict[str, jax.Array]
Videos = tuple[jax.Array, jax.Array]  # vectors and numbers

# Positions whose logits exist at a time: 512 x 32,005 in f32 are 66 MB a row.
LOGITS_AT_ONCE = 512


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The weight of each loss; 0 leaves it out, and with it a model that has no other.

    Attributes:
      lm: cross-entropy of the answers' tokens. The dialogue model's, as the next four are.
      rank: listwise cross-entropy over a turn's candidates.
      moment: cross-entropy of the frames at which the moment begins and ends.
      moment_l1: |error| of its start and end, in units of the video's duration.
      moment_iou: 1 - generalised IoU of the moment.
      contrastive: sigmoid loss of queries and videos (arXiv 2303.15343). The retriever's.
    """

    lm: float = 1.0
    rank: float = 1.0
    moment: float = 1.0
    moment_l1: float = 1.0
    moment_iou: float = 1.0
    contrastive: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if weight < 0:
                raise ValueError(f"{name} is {weight}; expected 0 or more")
        if not any(self.weights.values()):
            raise ValueError("every loss has the weight 0; expected one that has not")

    @property
    def weights(self) -> dict[str, float]:
        """By name."""
        return dataclasses.asdict(self)

    @property
    def of_model(self) -> bool:
        """Whether the dialogue model takes part."""
        return any(weight for name, weight in self.weights.items() if name != "contrastive")

    @property
    def decode(self) -> bool:
        """Whether its decoder does: of a message alone the moment head can learn without, at a fraction of the cost."""
        return bool(self.lm or self.rank)


def counts(batch: Batch) -> Sums:
    """What each loss's sum is divided by: f32[] of learnt tokens, ranked turns, moments, queries."""
    moments = (batch["moment_slots"] >= 0).sum()
    found = {
        "lm": batch["loss_mask"].sum(),
        "rank": (batch["candidate_targets"] >= 0).sum(),
        "moment": moments,
        "moment_l1": moments,
        "moment_iou": moments,
        "contrastive": asked(batch).sum(),
    }
    return {name: count.astype(jnp.float32) for name, count in found.items()}


def asked(batch: Batch) -> jax.Array:
    """bool[B, R]: turns that look for a video; their moments have a slot."""
    return (batch["turn_videos"] >= 0) & (batch["moment_slots"] < 0)


def of_dialogues(out: Output, batch: Batch, logits: Callable[[jax.Array], jax.Array]) -> Sums:
    """The dialogue model's losses as sums f32[]: lm, rank, moment, moment_l1, moment_iou.

    Where no decoder ran, without the first two.

    Args:
      out: of the model. batch: what it was given.
      logits: f[..., D] -> f32[..., vocabulary], of its decoder.
    """
    there = batch["moment_slots"] >= 0
    sums = {name: jnp.where(there, values, 0).sum() for name, values in moment(out.moments, batch).items()}
    if out.hidden is not None and out.scores is not None:
        targets = batch["candidate_targets"]
        sums["lm"] = lm(out.hidden, batch["targets"], batch["loss_mask"], logits)
        sums["rank"] = jnp.where(targets >= 0, rank(out.scores, targets), 0).sum()
    return sums


def lm(hidden: jax.Array, targets: jax.Array, mask: jax.Array, logits: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Cross-entropy of next tokens, f32[], summed; LOGITS_AT_ONCE positions at a time.

    Args:
      hidden: f[B, S, D]. targets: i32[B, S]. mask: bool[B, S], which targets are learnt.
      logits: f[..., D] -> f32[..., vocabulary].
    """
    length = hidden.shape[1]
    size = min(length, LOGITS_AT_ONCE)
    short = -length % size

    def sliced(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, short), *[(0, 0)] * (x.ndim - 2)))
        return x.reshape(len(x), -1, size, *x.shape[2:]).swapaxes(0, 1)

    def some(total: jax.Array, each: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden, targets, mask = each
        found = logits(hidden)
        right = jnp.take_along_axis(found, targets[..., None], axis=-1)[..., 0]
        return total + jnp.where(mask, jax.nn.logsumexp(found, axis=-1) - right, 0).sum(), None

    some = jax.checkpoint(some, prevent_cse=False)  # else every slice's logits are kept for the backward pass
    total, _ = jax.lax.scan(some, jnp.float32(0), (sliced(hidden), sliced(targets), sliced(mask)))
    return total


def rank(scores: jax.Array, targets: jax.Array) -> jax.Array:
    """Listwise softmax cross-entropy over however many candidates there are: f32[B, R, C], i32[B, R] -> f32[B, R]."""
    right = jnp.take_along_axis(scores, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(scores, axis=-1) - right


def moment(moments: Moments, batch: Batch) -> Sums:
    """Losses f32[B, R] of each turn's moment; where a turn has none they mean nothing.

    moment: mean of the cross-entropies of the start frame and the end frame, those whose stretch begins (ends)
      nearest to the moment's start (end).
    moment_l1: mean of |error| of start and end, over the duration. moment_iou: 1 - generalised IoU. Both of the
      expected start and end.
    """
    slots = jnp.maximum(batch["moment_slots"], 0)
    times, mask, durations = (of_each_row(batch[name], slots) for name in ("frame_times", "frame_mask", "durations"))
    span = batch["moment_spans"]
    begins, ends = frame_cells(times, mask, durations)
    far = jnp.where(mask, 0, jnp.inf)
    first = (jnp.abs(begins - span[..., :1]) + far).argmin(-1)
    last = jnp.maximum((jnp.abs(ends - span[..., 1:]) + far).argmin(-1), first)
    error = (rank(moments.start_logits, first) + rank(moments.end_logits, last)) / 2
    expected = moments.expected()
    unit = jnp.maximum(durations, 1e-6)
    l1 = jnp.abs(expected - span).mean(-1) / unit
    return {"moment": error, "moment_l1": l1, "moment_iou": 1 - generalised_iou(expected, span, unit)}


def generalised_iou(found: jax.Array, wanted: jax.Array, unit: jax.Array) -> jax.Array:
    """IoU - (hull - union) / hull of spans f32[..., 2] (arXiv 1902.09630 in one dimension), -1..1.

    `unit` f32[...] is a length in which times are measured; a found span that ends before it begins counts as empty.
    """
    overlap = jnp.minimum(found[..., 1], wanted[..., 1]) - jnp.maximum(found[..., 0], wanted[..., 0])
    hull = jnp.maximum(found[..., 1], wanted[..., 1]) - jnp.minimum(found[..., 0], wanted[..., 0])
    lengths = jnp.maximum(found[..., 1] - found[..., 0], 0) + wanted[..., 1] - wanted[..., 0]
    overlap = jnp.maximum(overlap, 0) / unit
    hull = jnp.maximum(hull / unit, 1e-6)
    union = jnp.maximum(lengths / unit - overlap, 1e-6)
    return overlap / union - jnp.maximum(hull - union, 0) / hull


def contrastive(
    texts: jax.Array, wanted: jax.Array, videos: jax.Array, numbers: jax.Array, scale: jax.Array, bias: jax.Array
) -> jax.Array:
    """Sigmoid loss of every text with every video (arXiv 2303.15343), f32[], summed over all pairs.

    On a mesh each device compares its own texts with its own videos, then with its neighbour's, and so on around:
    no device ever holds all similarities, or all videos.

    Args:
      texts: f32[B, R, D] of length 1. wanted: i32[B, R], the number of the video each asks for, -1 for no text.
      videos: f32[B, V, D] of length 1. numbers: i32[B, V], -1 for no video. A number may occur several times.
      scale, bias: f32[]: a pair's logit is scale <text, video> + bias.
    """

    def pairs(texts: jax.Array, wanted: jax.Array, videos: jax.Array, numbers: jax.Array, of: jax.Array) -> jax.Array:
        logits = texts @ videos.T * of[0] + of[1]
        sign = jnp.where(wanted[:, None] == numbers, 1.0, -1.0)
        there = (wanted[:, None] >= 0) & (numbers >= 0)
        return jnp.where(there, jax.nn.softplus(-sign * logits), 0).sum()

    def ring(texts: jax.Array, wanted: jax.Array, videos: jax.Array, numbers: jax.Array, of: jax.Array) -> jax.Array:
        texts, videos = (x.reshape(-1, x.shape[-1]) for x in (texts, videos))
        wanted, here = wanted.reshape(-1), (videos, numbers.reshape(-1))
        total = pairs(texts, wanted, here[0], here[1], of)
        around = [(device, (device + 1) % devices) for device in range(devices)]

        def step(carry: tuple[jax.Array, Videos], _: None) -> tuple[tuple[jax.Array, Videos], None]:
            total, here = carry
            here = jax.lax.ppermute(here, axes, around)
            return (total + pairs(texts, wanted, here[0], here[1], of), here), None

        (total, _), _ = jax.lax.scan(step, (total, here), None, length=devices - 1)
        return jax.lax.psum(total, axes) if axes else total

    mesh = jax.sharding.get_abstract_mesh()
    rows = () if mesh.empty else row_axes(mesh)
    axes = tuple(axis for axis in mesh.axis_names if axis in rows)  # the order ppermute wants; any ring passes all
    devices = math.prod(mesh.shape[axis] for axis in axes)
    of = jnp.stack([jnp.ravel(scale)[0], jnp.ravel(bias)[0]])
    if axes:
        ring = jax.shard_map(ring, in_specs=(*[jax.P(rows)] * 4, jax.P()), out_specs=jax.P())
    return ring(texts, wanted, videos, numbers, of)


def of_retriever(retriever: Retriever, texts: jax.Array, videos: jax.Array, batch: Batch) -> Sums:
    """The retriever's loss as a sum f32[], from its `embeddings`: every query of the batch with every video of it."""
    wanted = jnp.where(asked(batch), batch["turn_videos"], -1)
    scale = jnp.exp(retriever.logit_scale[...])
    total = contrastive(texts, wanted, videos, batch["video_numbers"], scale, retriever.logit_bias[...])
    return {"contrastive": total}


def first_stage(texts: jax.Array, videos: jax.Array, batch: Batch) -> jax.Array:
    """f32[B, R, C]: the cosine of each turn's query f32[B, R, D] and its candidates, of the videos f32[B, V, D]."""
    of_all = jnp.einsum("brd,bvd->brv", texts, videos)
    return jnp.take_along_axis(of_all, jnp.maximum(batch["candidate_slots"], 0), axis=-1)


def embeddings(retriever: Retriever, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """f32[B, R, D] of a batch's queries and f32[B, V, D] of its videos."""
    queries, frames = batch["queries"], batch["features"] if "features" in batch else batch["frames"]
    texts = retriever.embed_text(queries.reshape(-1, queries.shape[-1]))

    def some(each: list[jax.Array], _: jax.Array | None) -> jax.Array:
        flat = [x.reshape(-1, *x.shape[2:]) for x in each]
        return retriever.embed_video(*flat).reshape(*each[0].shape[:2], -1)

    compute = retriever.compute
    videos = over_chunks(some, [frames, batch["frame_mask"]], compute.videos_at_once, compute.remat)
    return texts.reshape(*queries.shape[:2], -1), videos
