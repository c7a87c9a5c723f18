"""Each loss against plain loops over NumPy numbers, or cases worked out by hand."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ivcr_jax import losses
from ivcr_jax.losses import LOGITS_AT_ONCE, LossConfig
from ivcr_jax.models.heads import ABSENT, Moments
from ivcr_jax.sharding import MeshConfig, by_rows, make_mesh


def draw(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("length", [7, LOGITS_AT_ONCE, 2 * LOGITS_AT_ONCE + 100])
def test_lm_is_the_cross_entropy_of_all_positions_at_once(length):
    words, width = 11, 4
    hidden, table = draw(2, length, width), draw(width, words)
    rng = np.random.default_rng(0)
    targets, mask = rng.integers(words, size=(2, length)), rng.random((2, length)) < 0.4

    def plain(hidden, table):
        each = optax.softmax_cross_entropy_with_integer_labels(hidden @ table, targets)
        return (each * mask).sum()

    def ours(hidden, table):
        return losses.lm(hidden, jnp.asarray(targets), jnp.asarray(mask), lambda x: x @ table)

    expected, wanted = jax.value_and_grad(plain, (0, 1))(hidden, table)
    value, gradients = jax.value_and_grad(ours, (0, 1))(hidden, table)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, of in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(found, of, rtol=1e-4, atol=1e-5)


def test_lm_never_holds_more_logits_than_a_slice():
    shape = jax.make_jaxpr(
        lambda x: losses.lm(x, jnp.zeros((2, 2000), int), jnp.ones((2, 2000), bool), lambda x: x @ jnp.ones((4, 999)))
    )(jnp.ones((2, 2000, 4)))
    assert {int(n) for n in re.findall(r"f32\[2,(\d+),999\]", str(shape))} == {LOGITS_AT_ONCE}


def test_rank_is_listwise_over_the_candidates_that_are_there():
    scores = draw(2, 3, 5)
    there = np.array([[5, 3, 1], [2, 4, 0]])  # the last turn has none
    targets = np.array([[4, 0, 0], [1, 3, -1]])
    scores[np.arange(5) >= there[..., None]] = ABSENT
    found = losses.rank(jnp.asarray(scores), jnp.asarray(targets))
    for row, turn in np.ndindex(2, 3):
        if targets[row, turn] < 0:
            continue
        own = np.exp(scores[row, turn, : there[row, turn]].astype(np.float64))
        assert found[row, turn] == pytest.approx(-math.log(own[targets[row, turn]] / own.sum()), rel=1e-5, abs=1e-6)
    gradient = jax.grad(lambda x: losses.rank(x, jnp.asarray(targets)).sum())(jnp.asarray(scores))
    assert np.isfinite(gradient).all() and (np.asarray(gradient)[0, 1, 3:] == 0).all()


# A video of ten seconds with frames at 1, 3, 5, 7 and 9, each of which stands for two seconds.
TIMES = (1.0, 3.0, 5.0, 7.0, 9.0)


def one_moment(span, starts, ends, start_logits=None, end_logits=None, times=TIMES, duration=10.0):
    """The losses of one turn. `starts` and `ends` are numbers, or one for each frame."""
    count = len(times)
    slots = 2  # the moment's video is the second of the row, and has fewer frames than fit
    frame_times = np.zeros((1, slots, count + 2), np.float32)
    frame_times[0, 1, :count] = times
    mask = np.zeros((1, slots, count + 2), bool)
    mask[0, 1, :count] = True

    def padded(values, fill):
        values = np.broadcast_to(np.asarray(values, np.float32), count)
        return jnp.asarray(np.concatenate([values, np.full(2, fill, np.float32)])[None, None])

    moments = Moments(
        padded(0.0 if start_logits is None else start_logits, ABSENT),
        padded(0.0 if end_logits is None else end_logits, ABSENT),
        padded(starts, 99),
        padded(ends, 99),
    )
    batch = {
        "moment_slots": jnp.array([[1]]),
        "moment_spans": jnp.asarray(span, jnp.float32)[None, None],
        "frame_times": jnp.asarray(frame_times),
        "frame_mask": jnp.asarray(mask),
        "durations": jnp.array([[77.0, duration]]),
    }
    return {name: float(value[0, 0]) for name, value in losses.moment(moments, batch).items()}


@pytest.mark.parametrize(
    "span, first, last",
    [
        ((0.0, 10.0), 0, 4),
        ((2.2, 5.9), 1, 2),  # stretches begin at 0, 2, 4, 6, 8 and end at 2, 4, 6, 8, 10
        ((6.9, 7.0), 3, 3),  # the nearest begin is 6, the nearest end 6 or 8: never a frame before the first
        ((7.4, 7.5), 4, 4),  # the nearest begin is 8, the nearest end 8, of the frame before it
        ((0.1, 0.2), 0, 0),
    ],
)
def test_a_moments_frames_are_those_whose_stretch_begins_and_ends_nearest(span, first, last):
    start, end = draw(5), draw(5, seed=1)
    expected = -(start[first] - np.log(np.exp(start).sum()) + end[last] - np.log(np.exp(end).sum())) / 2
    assert one_moment(span, 0, 10, start, end)["moment"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "found, span, l1, iou",
    [
        ((2, 6), (2, 6), 0.0, 0.0),  # equal
        ((3, 5), (2, 6), 0.1, 1 - 0.5),  # inside: overlap 2, union 4, hull 4
        ((0, 2), (6, 8), 0.6, 1 - (0 - 4 / 8)),  # disjoint: union 4 of a hull of 8
        ((4, 8), (2, 6), 0.2, 1 - 2 / 6),  # astride
        ((6, 2), (2, 6), 0.4, 1 - (0 - 0 / 4)),  # reversed: an empty span, in a hull of 4 that the wanted one fills
        ((9, 7), (2, 6), (7 + 1) / 2 / 10, 1 - (0 - 1 / 5)),  # reversed and elsewhere: union 4, hull 2..7
        ((4, 4), (4, 4), 0.0, 1.0),  # two points: no overlap of nothing
    ],
)
def test_l1_and_generalised_iou(found, span, l1, iou):
    values = one_moment(span, *found)
    assert values["moment_l1"] == pytest.approx(l1, abs=1e-6)
    assert values["moment_iou"] == pytest.approx(iou, abs=1e-5)


def test_times_are_the_means_over_the_frames_that_are_there():
    starts, ends, logits = np.array([0, 2, 4, 6, 8.0]), np.array([2, 4, 6, 8, 10.0]), draw(5)
    shares = np.exp(logits) / np.exp(logits).sum()
    start, end = shares @ starts, ends.mean()
    values = one_moment((1, 7), starts, ends, logits)
    assert values["moment_l1"] == pytest.approx((abs(start - 1) + abs(end - 7)) / 20, rel=1e-4)


def test_a_video_of_one_frame_has_one_moment_at_most():
    values = one_moment((0.5, 1.5), 0, 3, times=(0.0,), duration=3.0)
    assert values["moment"] == pytest.approx(0, abs=1e-6)
    assert values["moment_l1"] == pytest.approx((0.5 + 1.5) / 2 / 3, rel=1e-5)
    assert values["moment_iou"] == pytest.approx(1 - 1 / 3, rel=1e-5)


def pairs(texts, wanted, videos, numbers, scale, bias):
    """The sigmoid loss in plain loops."""
    total = 0.0
    for text, video in zip(texts.reshape(-1, texts.shape[-1]), wanted.reshape(-1), strict=True):
        for other, number in zip(videos.reshape(-1, videos.shape[-1]), numbers.reshape(-1), strict=True):
            if video >= 0 and number >= 0:
                logit = float(scale * (text.astype(np.float64) @ other) + bias)
                total += math.log1p(math.exp(-logit if video == number else logit))
    return total


ROWS, TURNS, SLOTS, WIDTH = 8, 3, 4, 6


@pytest.fixture(scope="module")
def contrasted():
    """Texts and videos of eight rows with gaps; several videos stand in several rows."""
    rng = np.random.default_rng(0)
    wanted = rng.integers(-1, 9, (ROWS, TURNS)).astype(np.int32)
    numbers = np.stack([rng.permutation(9)[:SLOTS] for _ in range(ROWS)]).astype(np.int32)
    numbers[rng.random(numbers.shape) < 0.2] = -1
    return draw(ROWS, TURNS, WIDTH), wanted, draw(ROWS, SLOTS, WIDTH), numbers, np.float32(1.3), np.float32(-0.7)


def test_contrastive_is_the_sum_over_all_pairs(contrasted):
    texts, wanted, videos, numbers, *_ = contrasted
    assert max(np.unique(numbers[numbers >= 0], return_counts=True)[1]) > 1
    assert float(losses.contrastive(*contrasted)) == pytest.approx(pairs(*contrasted), rel=1e-5)
    # A video in two rows is what its text looks for in both.
    twice = (texts[:2, :1], np.array([[5], [-1]]), videos[:2, :1], np.array([[5], [5]]), 1.0, 0.0)
    expected = sum(math.log1p(math.exp(-float(texts[0, 0] @ videos[row, 0]))) for row in (0, 1))
    assert float(losses.contrastive(*twice)) == pytest.approx(expected, rel=1e-5)


def test_contrastive_takes_any_division_into_rows(contrasted):
    """Packing changes nothing, where no video is shared by two of the rows that become one."""
    texts, wanted, videos, numbers, *of = contrasted

    def fewer(x):
        return x.reshape(ROWS // 2, -1, *x.shape[2:])

    packed = losses.contrastive(fewer(texts), fewer(wanted), fewer(videos), fewer(numbers), *of)
    assert float(packed) == pytest.approx(pairs(*contrasted), rel=1e-5)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (8, 1, 1), (1, 8, 1), (1, 1, 8)])
def test_contrastive_on_a_mesh_is_that_of_one_device(contrasted, sizes):
    texts, wanted, videos, numbers, scale, bias = contrasted

    def loss(texts, videos, scale, bias):
        return losses.contrastive(texts, wanted, videos, numbers, scale, bias)

    def dense(texts, videos, scale, bias):
        logits = texts.reshape(-1, WIDTH) @ videos.reshape(-1, WIDTH).T * scale + bias
        of, have = wanted.reshape(-1)[:, None], numbers.reshape(-1)
        each = optax.sigmoid_binary_cross_entropy(logits, of == have)
        return jnp.where((of >= 0) & (have >= 0), each, 0).sum()

    mesh = make_mesh(MeshConfig(*sizes))
    with jax.set_mesh(mesh):
        rows, whole = by_rows(mesh), NamedSharding(mesh, PartitionSpec())
        given = [jax.device_put(x, lies) for x, lies in ((texts, rows), (videos, rows), (scale, whole), (bias, whole))]
        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)), out_shardings=(whole, (rows, rows, whole, whole)))
        compiled = step.lower(*given).compile()
        value, gradients = compiled(*given)
    assert float(value) == pytest.approx(pairs(*contrasted), rel=1e-5)
    for found, expected in zip(gradients, jax.grad(dense, (0, 1, 2, 3))(texts, videos, scale, bias), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    parts = sizes[0] * sizes[1]
    hlo = compiled.as_text()
    assert "all-gather" not in hlo
    # Similarities there are of a device's texts and as many videos, never of all.
    matrices = {(int(a), int(b)) for a, b in re.findall(r"f32\[(\d+),(\d+)\]", hlo)}
    assert (ROWS * TURNS // parts, ROWS * SLOTS // parts) in matrices
    if parts > 1:
        assert not [shape for shape in matrices if max(shape) >= ROWS * min(TURNS, SLOTS)]
        assert ("collective-permute" in hlo) and f"f32[{ROWS * SLOTS}," not in hlo


def test_counts_are_of_what_the_sums_are_over():
    batch = {
        "loss_mask": jnp.array([[1, 1, 0], [1, 0, 0]], bool),
        "candidate_targets": jnp.array([[2, -1, -1], [0, -1, -1]]),
        "moment_slots": jnp.array([[-1, 0, -1], [-1, -1, -1]]),
        "turn_videos": jnp.array([[7, 7, -1], [4, 3, -1]]),  # the fourth asks for a video and its list lacks it
    }
    found = {name: float(value) for name, value in losses.counts(batch).items()}
    assert found == {"lm": 3, "rank": 2, "moment": 1, "moment_l1": 1, "moment_iou": 1, "contrastive": 3}


def test_weights_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match="rank is -1; expected 0 or more"):
        LossConfig(rank=-1)
    with pytest.raises(ValueError, match="every loss has the weight 0"):
        LossConfig(lm=0, rank=0, moment=0, moment_l1=0, moment_iou=0)
