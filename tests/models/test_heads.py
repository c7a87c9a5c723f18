"""The heads: scores that do not know of places, and moments within the video, against formulas and loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ivcr_jax.models.heads import ABSENT, MomentHead, MomentHeadConfig, Moments, RankHead, RankHeadConfig, frame_cells
from tests.models.conftest import F32, close, host, lively, numbers

WIDTH, FRAME_WIDTH = 12, 10
EPS = 1e-6


@pytest.fixture(scope="module")
def rank():
    return lively(lambda: RankHead(RankHeadConfig(width=16, heads=2), WIDTH, nnx.Rngs(0)))


@pytest.fixture(scope="module")
def moment():
    return lively(lambda: MomentHead(MomentHeadConfig(16, 2, 2), WIDTH, FRAME_WIDTH, nnx.Rngs(0), F32))


def rms_normed(x, w):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * w["scale"]


def layer_normed(x, w):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * w["scale"] + w["bias"]


def through(x, w):
    return x @ w["kernel"] + w["bias"]


def softmax(x):
    shares = np.exp(x - x.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


# Ranking


def candidates(turns, count, tokens=5, seed=0):
    """states f32[N, D], decoder states f32[N, C, K, D], which are there bool[N, C, K]."""
    rng = np.random.default_rng(seed)
    states = rng.standard_normal((turns, WIDTH)).astype(np.float32)
    hidden = rng.standard_normal((turns, count, tokens, WIDTH)).astype(np.float32)
    there = rng.random((turns, count, tokens)) < 0.7
    there[..., 0] = True
    return states, hidden, there


@nnx.jit
def score(head, states, hidden, there):
    return head(states, head.keys(hidden), there)


def one_score(head, state, hidden):
    """A candidate's score from its tokens [K, D], all there, in f64."""
    w, c = numbers(head), head.config
    query = through(rms_normed(state, w["state_norm"]), w["state"])
    key, value = np.split(through(rms_normed(hidden, w["token_norm"]), w["token"]), 2, axis=-1)
    parts = []
    for of_head in np.split(np.arange(c.width), c.heads):
        shares = softmax(key[:, of_head] @ query[of_head] / np.sqrt(len(of_head)))
        parts.append(shares @ value[:, of_head])
    read = np.concatenate(parts)
    x = through(query, w["hidden"]) + read @ w["hidden_read"]["kernel"] + query * read @ w["hidden_product"]["kernel"]
    x = x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2
    return through(x, w["score"])[0]


@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_score_is_of_the_turn_and_that_candidates_own_tokens(rank, count):
    states, hidden, there = candidates(3, count)
    found = np.asarray(score(rank, states, hidden, there))
    assert found.shape == (3, count) and found.dtype == np.float32
    for n in range(3):
        for c in range(count):
            close(found[n, c], one_score(rank, states[n], hidden[n, c, there[n, c]]), 1e-5)


def test_the_first_stages_score_is_added(rank):
    states, hidden, there = candidates(3, 7)
    there[0, 2] = False
    expected = np.asarray(score(rank, states, hidden, there))
    head = lively(lambda: RankHead(RankHeadConfig(16, 2, first_stage=True), WIDTH, nnx.Rngs(0)))
    first = np.random.default_rng(1).uniform(-1, 1, (3, 7)).astype(np.float32)
    nnx.update(head, nnx.state(rank))
    head.first_scale[...] = jnp.array([3.0])
    found = head(states, head.keys(hidden), there, first)
    close(found, np.where(expected == ABSENT, ABSENT, expected + 3 * first), 1e-5)
    for wrong, given in ((head, None), (rank, first)):
        with pytest.raises(ValueError, match="rank head: first_stage is"):
            wrong(states, wrong.keys(hidden), there, given)


def test_permuted_candidates_have_permuted_scores(rank):
    states, hidden, there = candidates(3, 7)
    there[0, 2] = False
    found = np.asarray(score(rank, states, hidden, there))
    order = np.random.default_rng(1).permutation(7)
    close(score(rank, states, hidden[:, order], there[:, order]), found[:, order], 1e-6)
    assert np.abs(np.diff(np.sort(found))).min() > 1e-3  # all differ, so a permutation can be seen


def test_absent_candidates_and_masked_tokens_change_nothing(rank):
    states, hidden, there = candidates(3, 7)
    there[:, 4:6] = False
    expected = np.asarray(score(rank, states, hidden, there))
    assert (expected[:, 4:6] == ABSENT).all() and (np.abs(np.delete(expected, (4, 5), 1)) < 100).all()
    garbage = 1e4 * np.random.default_rng(2).standard_normal(hidden.shape)
    other = np.where(there[..., None], hidden, garbage).astype(np.float32)
    assert (np.asarray(score(rank, states, other, there)) == expected).all()


def test_nothing_to_rank_gives_no_gradient(rank):
    states, hidden, there = candidates(2, 3)
    there[0] = False

    @nnx.jit
    def gradients(head, states, hidden, there):
        def loss(head, states, hidden):
            return -jax.nn.log_softmax(head(states, head.keys(hidden), there))[:, 0].sum()

        return nnx.grad(loss, argnums=(0, 1, 2))(head, states, hidden)

    of_head, of_states, of_hidden = host(gradients(rank, states, hidden, there))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(of_head))
    assert (of_states[0] == 0).all() and (of_hidden[0] == 0).all() and (of_hidden[1][~there[1]] == 0).all()
    assert (of_states[1] != 0).any() and (np.abs(of_hidden[1]).max(-1)[there[1]] > 0).all()
    nothing = host(gradients(rank, states, hidden, np.zeros_like(there)))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(nothing))


def test_rank_heads_divide_its_width():
    with pytest.raises(ValueError, match="rank head: width 16 is not a multiple of heads 3"):
        RankHead(RankHeadConfig(16, 3), WIDTH, nnx.Rngs(0))


# The stretch of time each frame stands for


@pytest.mark.parametrize(
    ("times", "there", "duration", "begins", "ends"),
    [
        ([1, 3, 6], 3, 10, [0, 2, 4.5], [2, 4.5, 10]),
        ([1, 3, 6], 2, 10, [0, 2, 10], [2, 10, 10]),
        ([1, 3, -7], 2, 10, [0, 2, 10], [2, 10, 10]),  # what stands at a missing frame is nothing
        ([4, 0, 0], 1, 10, [0, 10, 10], [10, 10, 10]),
        ([0, 0, 0], 0, 10, [10, 10, 10], [10, 10, 10]),
        ([0, 2, 4], 3, 4, [0, 1, 3], [1, 3, 4]),
        ([0, 0, 0], 0, 0, [0, 0, 0], [0, 0, 0]),
        ([2.5], 1, 5, [0], [5]),
    ],
)
def test_frame_cells_by_hand(times, there, duration, begins, ends):
    mask = np.arange(len(times)) < there
    times = np.array(times, np.float32)
    found = frame_cells(times, mask, np.float32(duration))
    assert [part.tolist() for part in found] == [begins, ends]
    # With others beside it, of other lengths.
    pad = [np.stack([x, np.zeros_like(x), x]) for x in (times, mask)]
    found = frame_cells(*pad, np.array([duration, 3, duration], np.float32))
    assert [part[2].tolist() for part in found] == [begins, ends]


# Moments


def questions(count=4, frames=6, queries=3, seed=0):
    """states f32[N, D], frames f32[N, T, Q, F], times, mask, durations: with fewer frames, with one, with none."""
    rng = np.random.default_rng(seed)
    states = rng.standard_normal((count, WIDTH)).astype(np.float32)
    features = rng.standard_normal((count, frames, queries, FRAME_WIDTH)).astype(np.float32)
    times = np.sort(rng.uniform(0, 20, (count, frames)), axis=-1).astype(np.float32)
    mask = np.arange(frames) < np.array([frames, 4, 1, 0])[:count, None]
    return states, features, times, mask, np.full(count, 21.5, np.float32)


@nnx.jit
def ask(head, states, features, times, mask, durations, texts=None):
    return head(states, head.keys(features), times, mask, durations, texts)


def one_moment(head, state, features, times, duration, text=None):
    """(start logits, end logits, starts, ends) of a video [T, Q, F], all of whose frames are there, in f64."""
    w, c = numbers(head), head.config
    asked = through(rms_normed(state, w["state_norm"]), w["state"])
    if text is not None:
        asked = asked + rms_normed(text, w["text_norm"]) @ w["text"]["kernel"]
    question, offset = np.split(asked, 2)
    key, value = np.split(through(layer_normed(features, w["frame_norm"]), w["frame"]), 2, axis=-1)
    read = np.stack([softmax(k @ question / np.sqrt(c.width)) @ v for k, v in zip(key, value, strict=True)])
    borders = [0, *(times[1:] + times[:-1]) / 2, duration]
    begins, ends = np.array(borders[:-1]), np.array(borders[1:])
    place = np.stack([begins / duration, ends / duration, 1 - begins / duration, 1 - ends / duration], axis=-1)
    x = read * question + offset + through(place, w["time"])
    for number in range(c.layers):
        block = jax.tree.map(lambda leaf: leaf[number], w["blocks"])  # noqa: B023
        y = layer_normed(x, block["attention_norm"])
        split = (through(y, block["attention"][name]).reshape(len(y), c.heads, -1) for name in "qkv")
        q, k, v = (part.swapaxes(0, 1) for part in split)
        y = softmax(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])) @ v
        x = x + through(y.swapaxes(0, 1).reshape(x.shape), block["attention"]["out"])
        y = through(layer_normed(x, block["mlp_norm"]), block["mlp"]["up"])
        x = x + through(y * (1 + np.vectorize(math.erf)(y / np.sqrt(2))) / 2, block["mlp"]["down"])
    start, end, start_shift, end_shift = through(layer_normed(x, w["norm"]), w["boundary"]).T
    half = (ends - begins) / 2
    return start, end, begins + half * np.tanh(start_shift), ends + half * np.tanh(end_shift)


def test_a_moment_is_of_the_question_and_the_frames_that_are_there(moment):
    given = questions()
    found = host(ask(moment, *given))
    mask = given[3]
    for name in ("start_logits", "end_logits"):
        assert (getattr(found, name)[~mask] == ABSENT).all()
    for n in range(3):
        here = mask[n]
        expected = one_moment(moment, given[0][n], given[1][n, here], given[2][n, here], given[4][n])
        for name, value in zip(("start_logits", "end_logits", "starts", "ends"), expected, strict=True):
            assert getattr(found, name).dtype == np.float32
            # Seconds up to 21.5 are as exact as logits of 1 where the tolerance is a share.
            close(
                getattr(found, name)[n, here], np.clip(value, *((0, 21.5) if "logits" not in name else (-99, 99))), 1e-5
            )


def test_the_first_stages_vector_is_read_beside_the_state(moment):
    head = lively(lambda: MomentHead(MomentHeadConfig(16, 2, 2, first_width=6), WIDTH, FRAME_WIDTH, nnx.Rngs(0), F32))
    given = questions()
    texts = np.random.default_rng(5).standard_normal((4, 6)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
    found = host(ask(head, *given, texts))
    for n in range(3):
        here = given[3][n]
        expected = one_moment(head, given[0][n], given[1][n, here], given[2][n, here], given[4][n], texts[n])
        for name, value in zip(("start_logits", "end_logits"), expected[:2], strict=True):
            close(getattr(found, name)[n, here], value, 1e-5)
    for wrong, text in ((head, None), (moment, texts)):
        with pytest.raises(ValueError, match="moment head: first_width is"):
            wrong(given[0], wrong.keys(given[1]), *given[2:], text)


def test_missing_frames_change_no_moment(moment):
    states, features, times, mask, durations = questions()
    expected = host(ask(moment, states, features, times, mask, durations))
    rng = np.random.default_rng(3)
    other = np.where(mask[..., None, None], features, 1e4 * rng.standard_normal(features.shape)).astype(np.float32)
    when = np.where(mask, times, 1e4 * rng.standard_normal(mask.shape)).astype(np.float32)
    found = host(ask(moment, states, other, when, mask, durations))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a == b).all() and np.isfinite(a).all()


def test_spans_are_in_the_video_and_in_order(moment):
    """Also where the shifts are as large as they get."""
    wild = lively(lambda: MomentHead(MomentHeadConfig(16, 2, 2), WIDTH, FRAME_WIDTH, nnx.Rngs(0), F32))
    wild.boundary.kernel[...] = 1e3 * wild.boundary.kernel[...]
    for head in (moment, wild):
        for seed in range(3):
            given = questions(seed=seed)
            found = ask(head, *given)
            starts, ends = np.asarray(found.starts), np.asarray(found.ends)
            assert (starts >= 0).all() and (starts <= ends).all() and (ends <= 21.5).all()
            spans = np.asarray(found.best(8)[0])
            assert (spans >= 0).all() and (spans[..., 0] <= spans[..., 1]).all() and (spans <= 21.5).all()
            expected = np.asarray(found.expected())[given[3].any(1)]
            assert (expected >= 0).all() and (expected <= 21.5).all()


def made_up(frames, there, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(frames) < there
    logits = [np.where(mask, rng.standard_normal(frames), ABSENT).astype(np.float32) for _ in range(2)]
    starts = np.arange(frames, dtype=np.float32)
    return Moments(*(jnp.asarray(x) for x in (*logits, starts, starts + 0.75)))


@pytest.mark.parametrize(("frames", "there"), [(1, 1), (5, 5), (6, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_best_is_a_loop_over_spans(frames, there, seed):
    """The expected IoU of every span, by every span that the moment may be."""
    moments = made_up(frames, there, seed)
    start = softmax(np.asarray(moments.start_logits, np.float64)[:there])
    end = softmax(np.asarray(moments.end_logits, np.float64)[:there])
    possible = [(start[i] * end[j], i, j + 0.75) for i in range(there) for j in range(i, there)]
    total = sum(share for share, *_ in possible)

    def expected(a, b):
        overlaps = [(share, max(0, min(b, d) - max(a, c)), b - a + d - c) for share, c, d in possible]
        return sum(share * both / (lengths - both) for share, both, lengths in overlaps) / total

    spans = sorted(([expected(a, b), [a, b]] for _, a, b in possible), key=lambda item: -item[0])
    count = len(possible)
    found, scores = moments.best(count)
    assert found.tolist() == [span for _, span in spans]
    close(scores, [score for score, _ in spans], 1e-5)
    first, score = moments.best()
    assert first.shape == (1, 2) and first[0].tolist() == spans[0][1] and score[0] == scores[0]
    if count < frames**2:  # after the last there are only repeats, known by their scores
        more, rest = moments.best(count + 1)
        assert more[:count].tolist() == found.tolist() and rest[-1] == -1
        assert more[-1, 0] <= more[-1, 1]


def test_best_where_two_boundaries_are_likely_is_what_overlaps_most():
    """By hand: two starts and two ends as likely as each other; no single pair is better than the middle."""
    logits = jnp.log(jnp.array([0.4, 0.2, 0.4, 1e-9])), jnp.log(jnp.array([1e-9, 0.4, 0.2, 0.4]))
    times = jnp.arange(4.0)
    (span,), _ = Moments(*logits, times, times + 1).best()
    assert span.tolist() == [0, 4], "which overlaps with all"
    sure = Moments(jnp.array([0.0, 50, 0, 0]), jnp.array([0.0, 0, 50, 0]), times, times + 1)
    (span,), (score,) = sure.best()
    assert span.tolist() == [1, 3] and score == pytest.approx(1)


def test_best_of_several_questions_is_each_ones_own():
    each = [made_up(5, 4, seed) for seed in range(6)]
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves).reshape(2, 3, -1), *each)
    spans, scores = together.best(4)
    assert spans.shape == (2, 3, 4, 2) and scores.shape == (2, 3, 4)
    for n, one in enumerate(each):
        assert spans[n // 3, n % 3].tolist() == one.best(4)[0].tolist()


def test_expected_times_are_means_over_the_frames():
    moments = made_up(6, 4)
    start, end = (softmax(np.asarray(x, np.float64)[:4]) for x in (moments.start_logits, moments.end_logits))
    close(moments.expected(), [start @ np.arange(4), end @ (np.arange(4) + 0.75)], 1e-6)


def test_a_question_without_frames_gives_no_gradient(moment):
    given = questions()

    @nnx.jit
    def gradients(head, states, features, times, mask, durations):
        def loss(head, states, features):
            found = head(states, head.keys(features), times, mask, durations)
            likely = jax.nn.log_softmax(found.start_logits)[:, 0] + jax.nn.log_softmax(found.end_logits)[:, 1]
            return jnp.abs(found.expected() - 3).sum() - likely.sum()

        return nnx.grad(loss, argnums=(0, 1, 2))(head, states, features)

    of_head, of_states, of_features = host(gradients(moment, *given))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(of_head))
    assert (of_states[3] == 0).all() and (of_states[:3] != 0).any(-1).all()
    assert (of_features[~given[3]] == 0).all() and (of_features[given[3]] != 0).any((-1, -2)).all()
    nothing = host(gradients(moment, *given[:3], np.zeros_like(given[3]), np.zeros_like(given[4])))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(nothing))
