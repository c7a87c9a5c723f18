"""The decoder: what a position sees, rows and segments, blocks of videos, the cache, and the ways to compute it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ivcr_jax.models import attention
from ivcr_jax.models.layers import REMAT_POLICIES, Compute, unstack
from ivcr_jax.models.llama import Llama, LlamaConfig, RopeScaling, put, rotary
from ivcr_jax.sharding import MeshConfig, make_mesh
from tests.models.conftest import F32, close, decode_row, host, lively, near, sees

CONFIG = LlamaConfig(vocab_size=40, added_tokens=5, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48)
# A position each: "t" text, a digit a visual token of that block, "." nothing, "|" the border of two dialogues.
ROWS = (
    "tt111222tttt333tt",
    "ttt1..333t|t22.tt11t",
    "111tt",
    "t|tt2222t",
)


def marks(rows):
    """(positions, segments, blocks), each i32[B, S], of rows as above; blocks begin at position 0, text after them."""
    parsed = []
    for row in rows:
        line = []
        for segment, dialogue in enumerate(row.split("|"), start=1):
            blocks = {place for place in dialogue if place.isdigit()}
            text = max((dialogue.count(block) for block in blocks), default=0)
            count = {}
            for place in dialogue:
                if place == ".":
                    line.append((0, 0, 0))
                elif place == "t":
                    line.append((text, segment, 0))
                    text += 1
                else:
                    line.append((count.setdefault(place, 0), segment, int(place)))
                    count[place] += 1
        parsed.append(line)
    longest = max(map(len, parsed))
    padded = np.array([line + [(0, 0, 0)] * (longest - len(line)) for line in parsed], np.int32)
    return tuple(np.moveaxis(padded, -1, 0))


def inputs(rows, width=CONFIG.width, seed=0):
    """x f32[B, S, D] and the marks."""
    positions, segments, blocks = marks(rows)
    x = np.random.default_rng(seed).standard_normal((*segments.shape, width)).astype(np.float32)
    return x, positions, segments, blocks


@pytest.fixture(scope="module")
def model():
    return lively(lambda: Llama(CONFIG, nnx.Rngs(0), F32))


@nnx.jit
def jitted(model, *args):
    return model(*args)


def forward(model, x, positions, segments, blocks=None, cache=None):
    return host(jitted(model, x, positions, segments, blocks, cache))


def states(model, x, positions, segments, blocks=None):
    """The states, zero where there is nothing."""
    hidden = forward(model, x, positions, segments, blocks)[0]
    assert np.isfinite(hidden).all()
    return np.where(np.asarray(segments)[..., None] > 0, hidden, 0)


# What is seen


@pytest.mark.parametrize("with_blocks", [True, False])
def test_visible_is_the_rule_position_by_position(with_blocks):
    _, segments, blocks = marks(ROWS)
    blocks = blocks if with_blocks else None
    order = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
    found = attention.visible((segments, blocks, order), (segments, blocks, order))
    for row in range(len(segments)):
        for i in range(segments.shape[1]):
            for j in range(segments.shape[1]):
                of_row = blocks[row] if with_blocks else None
                assert found[row, i, j] == sees(i, j, segments[row], of_row), (row, i, j)


def test_visible_by_hand():
    """One row, written out: two blocks, text around them, a gap, another dialogue."""
    _, segments, blocks = marks(["t11.2t|t1"])
    order = np.arange(8)[None]
    found = attention.visible((segments, blocks, order), (segments, blocks, order))[0].astype(int)
    assert ["".join(map(str, row)) for row in np.asarray(found)] == [
        "10000000",
        "01100000",
        "01100000",
        "00000000",
        "00001000",
        "11101100",
        "00000010",
        "00000001",
    ]


# Against the formulas


@pytest.mark.parametrize("layout", ["isolated", "inline"])
@pytest.mark.parametrize("sizes", [{}, {"kv_heads": 4}, {"kv_heads": 1, "head_dim": 12, "norm_eps": 0.1}])
def test_the_states_are_those_of_the_formula(sizes, layout):
    config = dataclasses.replace(CONFIG, **sizes)
    model = lively(lambda: Llama(config, nnx.Rngs(0), F32))
    x, positions, segments, blocks = inputs(ROWS)
    blocks = blocks if layout == "isolated" else None
    found = states(model, x, positions, segments, blocks)
    for row in range(len(x)):
        of_row = None if blocks is None else blocks[row]
        close(found[row], decode_row(model, x[row], positions[row], segments[row], of_row), 1e-5)


def test_rotary_scaling_is_the_published_one():
    """Frequency by frequency, by wavelengths, as LLaMA 3.1 states it."""
    positions = np.array([[0, 1, 7, 3000]], np.int32)
    scaling = RopeScaling("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_positions=256)
    base = dataclasses.replace(CONFIG, head_dim=32, rope_theta=500000.0)
    plain = [base.rope_theta ** (-2 * i / 32) for i in range(16)]
    stretched = []
    for frequency in plain:
        wavelength = 2 * np.pi / frequency
        if wavelength < 256 / 4:
            stretched.append(frequency)
        elif wavelength > 256 / 1:
            stretched.append(frequency / 8)
        else:
            smooth = (256 / wavelength - 1) / (4 - 1)
            stretched.append((1 - smooth) * frequency / 8 + smooth * frequency)
    kinds = {(f == p, f == p / 8) for f, p in zip(stretched, plain, strict=True)}
    assert len(kinds) == 3  # some are kept, some divided, some between
    for kind, expected in (("llama3", stretched), ("linear", [f / 8 for f in plain]), ("none", plain)):
        config = dataclasses.replace(base, rope_scaling=dataclasses.replace(scaling, kind=kind))
        cos, sin = rotary(positions, config)
        angles = positions[..., None] * np.array(expected)
        # An angle of thousands keeps four decimals in f32.
        np.testing.assert_allclose(cos, np.cos(angles), atol=1e-3)
        np.testing.assert_allclose(sin, np.sin(angles), atol=1e-3)
        close(np.asarray(cos)[:, :3], np.cos(angles)[:, :3], 1e-5)


def test_added_tokens_have_tables_of_their_own(model):
    tokens = np.array([[0, 39, 40, 44, 7]], np.int32)
    table = np.concatenate([model.embedding[...], model.added_embedding[...]])
    assert table.shape == (45, 32)
    assert (np.asarray(model.embed(tokens)) == table[tokens]).all()
    hidden = np.random.default_rng(0).standard_normal((2, 3, 32)).astype(np.float32)
    kernel = np.concatenate([model.head.kernel[...], model.added_head.kernel[...]], axis=1, dtype=np.float64)
    close(model.logits(hidden), hidden @ kernel, 1e-5)


def test_a_tied_head_is_the_table():
    config = dataclasses.replace(CONFIG, tied=True)
    for added in (5, 0):
        model = lively(lambda: Llama(dataclasses.replace(config, added_tokens=added), nnx.Rngs(0), F32))  # noqa: B023
        tables = [model.embedding[...], *([model.added_embedding[...]] if added else [])]
        hidden = np.random.default_rng(0).standard_normal((3, 32)).astype(np.float32)
        logits = model.logits(hidden)
        assert logits.shape == (3, 40 + added) and logits.dtype == jnp.float32
        close(logits, hidden @ np.concatenate(tables, dtype=np.float64).T, 1e-5)


def test_bfloat16_is_what_it_is_computed_in():
    model = lively(lambda: Llama(CONFIG, nnx.Rngs(0), Compute()))
    x, positions, segments, blocks = inputs(ROWS)
    hidden, cache = forward(model, x, positions, segments, blocks, model.empty_cache(4, 32))
    assert hidden.dtype == cache.k.dtype == cache.v.dtype == model.embed(positions).dtype == jnp.bfloat16
    assert model.logits(hidden).dtype == jnp.float32 and model.embedding[...].dtype == jnp.float32


# Rows


def test_packed_dialogues_are_as_alone(model):
    x, positions, segments, blocks = inputs(ROWS)
    packed = states(model, x, positions, segments, blocks)
    checked = 0
    for row in range(len(x)):
        for segment in range(1, segments[row].max() + 1):
            (here,) = np.nonzero(segments[row] == segment)
            # Alone, at the front of a row of the same length, so that it is compiled once.
            alone = [np.zeros_like(array[:1]) for array in (x, positions, segments, blocks)]
            for array, whole in zip(alone, (x, positions, segments, blocks), strict=True):
                array[0, : len(here)] = whole[row, here]
            alone[2] = np.minimum(alone[2], 1)
            close(states(model, *alone)[0, : len(here)], packed[row, here], 1e-5)
            checked += 1
    assert checked == 6


@pytest.mark.parametrize("layout", ["isolated", "inline"])
def test_where_nothing_is_changes_nothing(model, layout):
    x, positions, segments, blocks = inputs(ROWS)
    empty = segments == 0
    assert empty.sum() > 8
    other = [x.copy(), positions.copy(), segments, blocks.copy()]
    rng = np.random.default_rng(1)
    other[0][empty] = 1e6 * rng.standard_normal((empty.sum(), 32))
    other[1][empty] = rng.integers(0, 9, empty.sum())
    other[3][empty] = rng.integers(0, 4, empty.sum())
    last = slice(None) if layout == "isolated" else slice(3)
    before, after = states(model, *(x, positions, segments, blocks)[last]), states(model, *other[last])
    assert (before == after).all()
    assert np.abs(before[~empty]).min(-1).max() > 0


def test_layouts_differ(model):
    """Or the tests of one would be tests of the other."""
    x, positions, segments, blocks = inputs(ROWS)
    isolated, inline = states(model, x, positions, segments, blocks), states(model, x, positions, segments)
    assert np.abs(isolated[0, :2] - inline[0, :2]).max() < 1e-5  # text before any video
    assert np.abs(isolated[0, 2:17] - inline[0, 2:17]).max(-1).min() > 0.01


# The cache


def units(row, with_blocks):
    """The places of a row in pieces that are read at once: a block whole, everything else one by one."""
    pieces = []
    for place, mark in enumerate(row):
        if with_blocks and mark > 0 and pieces and row[pieces[-1][-1]] == mark:
            pieces[-1].append(place)
        else:
            pieces.append([place])
    return pieces


def read_in_chunks(model, x, positions, segments, blocks, size, cache):
    """States as from one call, but `size` pieces of each row a call, each row's next ones; and the cache."""
    rows, length, width = x.shape
    pieces = [units(blocks[row] if blocks is not None else np.zeros(length), blocks is not None) for row in range(rows)]
    found = np.zeros_like(x)
    widest = max(len(sum(p[i : i + size], [])) for p in pieces for i in range(0, len(p), size))
    for first in range(0, max(map(len, pieces)), size):
        places = [sum(p[first : first + size], []) for p in pieces]
        chunk = [np.zeros((rows, widest, *array.shape[2:]), array.dtype) for array in (x, positions, segments)]
        chunk += [None if blocks is None else np.zeros((rows, widest), np.int32)]
        for row, here in enumerate(places):
            for array, whole in zip(chunk, (x, positions, segments, blocks), strict=True):
                if whole is not None:
                    array[row, : len(here)] = whole[row, here]
        hidden, cache = forward(model, *chunk, cache)
        assert np.isfinite(hidden).all()
        for row, here in enumerate(places):
            found[row, here] = hidden[row, : len(here)]
    return np.where(segments[..., None] > 0, found, 0), cache


@pytest.mark.parametrize("layout", ["isolated", "inline"])
@pytest.mark.parametrize("size", [1, 4, 99])
def test_reading_in_chunks_is_reading_at_once(model, size, layout):
    """Down to token by token; rows of different lengths, with gaps, several dialogues in one."""
    x, positions, segments, blocks = inputs(ROWS)
    blocks = blocks if layout == "isolated" else None
    expected = states(model, x, positions, segments, blocks)
    found, cache = read_in_chunks(model, x, positions, segments, blocks, size, model.empty_cache(4, 19))
    close(found, expected, 1e-5)
    # What is in the cache: each row's positions, closed up.
    assert cache.lengths.tolist() == (segments > 0).sum(1).tolist()
    for row, used in enumerate(cache.lengths.tolist()):
        there = segments[row] > 0
        assert cache.segments[row].tolist() == [*segments[row, there], *[0] * (19 - used)]
        if blocks is not None:
            assert cache.blocks[row].tolist() == [*blocks[row, there], *[0] * (19 - used)]


def test_a_list_of_layers_is_the_stack(model):
    """States, and the cache from which the next are read; layers handed over one by one, as for decoding."""
    x, positions, segments, blocks = inputs(ROWS)
    listed = nnx.clone(model)
    listed.layers = unstack(listed.layers)
    found, cache = forward(listed, x, positions, segments, blocks, listed.empty_cache(4, 19))
    expected, stacked = forward(model, x, positions, segments, blocks, model.empty_cache(4, 19))
    close(np.where(segments[..., None] > 0, found, 0), np.where(segments[..., None] > 0, expected, 0), 1e-6)
    close(np.stack(cache.k), stacked.k, 1e-6)
    close(np.stack(cache.v), stacked.v, 1e-6)
    more = tuple(array[:, :2] for array in (x, positions + 20, segments, np.zeros_like(blocks)))
    places = jax.jit(lambda cache, k, v, *marks: cache.append(k, v, *marks))
    ready = forward(model, *more, model.empty_cache(4, 2))[1]
    marks = more[2], more[3]
    joined, other = places(cache, list(ready.k), list(ready.v), *marks), places(stacked, ready.k, ready.v, *marks)
    assert joined.lengths.tolist() == other.lengths.tolist() and joined.lengths.tolist() != cache.lengths.tolist()
    close(np.stack(joined.k), other.k, 0)
    close(np.stack(joined.v), other.v, 0)


def test_a_block_alone_has_the_keys_it_has_in_a_dialogue(model):
    x, positions, segments, blocks = inputs(ROWS)
    together, joint = forward(model, x, positions, segments, blocks, model.empty_cache(4, 24))
    checked = 0
    for row in range(len(x)):
        for segment, block in {(int(s), int(b)) for s, b in zip(segments[row], blocks[row], strict=True) if b}:
            (here,) = np.nonzero((blocks[row] == block) & (segments[row] == segment))
            alone = [np.zeros((1, 4, *array.shape[2:]), array.dtype) for array in (x, positions, segments, blocks)]
            for array, whole in zip(alone, (x, positions, segments, blocks), strict=True):
                array[0, : len(here)] = whole[row, here]
            hidden, cache = forward(model, *alone, model.empty_cache(1, 4))
            at = np.cumsum(segments[row] > 0)[here] - 1  # the cache leaves no gaps
            close(cache.k[:, 0, :, : len(here)], joint.k[:, row][:, :, at], 1e-6)
            close(cache.v[:, 0, :, : len(here)], joint.v[:, row][:, :, at], 1e-6)
            close(hidden[0, : len(here)], together[row, here], 1e-6)
            checked += 1
    assert checked == 9


@jax.jit
def append(cache, *ready):
    return cache.append(*ready)


READY = "1112233333"  # three blocks, in one row


@pytest.fixture(scope="module")
def ready(model):
    """x, positions, segments, blocks of three blocks, and the cache that holds them, read alone."""
    arrays = inputs([READY], seed=5)
    return arrays, forward(model, *arrays, model.empty_cache(1, len(READY)))[1]


@pytest.mark.parametrize("order", ["q123r", "q3r21r", "2q13", "31q2r"])
def test_ready_keys_are_as_good_as_the_block_itself(model, ready, order):
    """Digits are blocks, appended or read; letters are text, read, its states compared."""
    (block_x, block_positions, _, block_ids), made = ready
    text = inputs(["tttt", "tttt"], seed=6)
    longest = block_positions.max() + 1
    appended = read = host(model.empty_cache(2, 22))
    texts = 0
    for step in order:
        if step.isdigit():
            here = np.nonzero(block_ids[0] == int(step))[0]
            # The second row does not get block 2.
            segments = np.ones((2, len(here)), np.int32) * np.array([[1], [step != "2"]])
            ids = np.full_like(segments, int(step))
            both = [np.repeat(array[:, here], 2, axis=0) for array in (block_x, block_positions)]
            _, read = forward(model, *both, segments, ids, read)
            k, v = (np.repeat(array[:, :, :, here], 2, axis=1) for array in (made.k, made.v))
            appended = append(appended, k, v, segments, ids)
        else:
            x, positions, segments, ids = text
            positions = positions + longest + 4 * texts
            texts += 1
            by_block, read = forward(model, x, positions, segments, ids, read)
            by_keys, appended = forward(model, x, positions, segments, ids, appended)
            close(by_keys, by_block, 1e-6)
        assert appended.lengths.tolist() == read.lengths.tolist()
        assert (appended.segments == read.segments).all() and (appended.blocks == read.blocks).all()
        close(appended.k, read.k, 1e-6)
        close(appended.v, read.v, 1e-6)
    assert read.lengths.tolist() == [10 + 4 * texts, 8 + 4 * texts]


def test_put_writes_by_row_and_drops_what_is_past_the_end():
    buffer = np.zeros((2, 4, 1), np.float32)
    new = np.arange(1, 7, dtype=np.float32).reshape(2, 3, 1)
    found = put(jnp.asarray(buffer), jnp.array([[2, 3, 4], [4, 0, 1]]), jnp.asarray(new))
    assert found[..., 0].tolist() == [[0, 0, 1, 2], [5, 6, 0, 0]]


def test_more_positions_than_the_cache_has(model):
    x, positions, segments, blocks = inputs(["ttttt"])
    with pytest.raises(ValueError, match="5 positions for a cache of 4"):
        model(x, positions, segments, blocks, model.empty_cache(1, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dataclasses.replace(CONFIG, kv_heads=3), "heads 4 is not a multiple of kv_heads 3"),
        (lambda: RopeScaling("yarn"), "kind is 'yarn'; expected none, linear or llama3"),
        (lambda: Compute(dtype="float16"), "dtype is 'float16'; expected one of bfloat16, float32"),
        (lambda: Compute(remat="some"), "remat is 'some'; expected one of none, full"),
        (lambda: Compute(attention="flash"), "attention is 'flash'; expected one of auto, xla, splash"),
    ],
)
def test_values_that_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Ways to compute it


def test_every_remat_policy_computes_the_same():
    x, positions, segments, blocks = inputs(ROWS)
    weight = np.random.default_rng(2).standard_normal(x.shape) * (segments > 0)[..., None]
    expected = None
    for policy in REMAT_POLICIES:
        model = lively(lambda: Llama(CONFIG, nnx.Rngs(0), Compute("float32", remat=policy)))  # noqa: B023

        def loss(model, x):
            return (model(x, positions, segments, blocks)[0] * weight).sum()

        found = jax.tree.leaves(host(nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1)))(model, x)))
        expected = expected or found
        for a, b in zip(found, expected, strict=True):
            near(a, b, 1e-6)


def attention_case(rows, groups, heads, size, seed=0):
    """q, k, v and marks of rows as above, and where something is."""
    _, segments, blocks = marks(rows)
    rng = np.random.default_rng(seed)
    length = segments.shape[1]
    q = rng.standard_normal((len(rows), length, heads, size), np.float32)
    k, v = (rng.standard_normal((len(rows), length, groups, size), np.float32) for _ in range(2))
    return q, k, v, segments, blocks


def attended(*args):
    return host(_attended(*args))


@functools.partial(jax.jit, static_argnames="how")
def _attended(q, k, v, segments, blocks, how):
    """What is attended to, zero where nothing is, and its gradients for q, k and v."""
    order = jnp.broadcast_to(jnp.arange(q.shape[1]), segments.shape)
    sees = (segments, blocks, order)
    there = (segments > 0)[..., None, None]
    weight = jnp.sin(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)

    def run(q, k, v):
        y = jnp.where(there, attention.attend(q, k, v, sees, sees, how), 0)
        return (y * weight).sum(), y

    gradients, y = jax.grad(run, (0, 1, 2), has_aux=True)(q, k, v)
    return y, gradients


LONG = ("t" * 60 + "1" * 30 + "." * 3 + "2" * 40 + "t" * 30 + "|" + "t" * 9 + "1" * 20 + "t" * 9, "t" * 150)
SPLASH = [
    (LONG, 2, 4, 16, True),
    (LONG, 1, 2, 128, False),
    (("t" * 50 + "1" * 28 + "t" * 50,), 1, 2, 64, True),  # 128 positions, nothing to pad
]


@pytest.mark.parametrize(("rows", "groups", "heads", "size", "with_blocks"), SPLASH)
def test_splash_is_attention(rows, groups, heads, size, with_blocks):
    q, k, v, segments, blocks = attention_case(rows, groups, heads, size)
    blocks = blocks if with_blocks else None
    expected, expected_gradients = attended(q, k, v, segments, blocks, "xla")
    found, gradients = attended(q, k, v, segments, blocks, "splash")
    close(found, expected, 1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert np.abs(b).max() > 0.1
        close(a, b, 1e-4)


@pytest.mark.parametrize("rows", [ROWS, ROWS[:3]])  # three rows are not divided
def test_splash_is_attention_on_a_mesh(rows):
    q, k, v, segments, blocks = attention_case(rows, 2, 4, 16)
    expected, expected_gradients = attended(q, k, v, segments, blocks, "xla")
    with jax.set_mesh(make_mesh(MeshConfig(2, 2, 2))):
        found, gradients = attended(q, k, v, segments, blocks, "splash")
    close(found, expected, 1e-5)
    for a, b in zip(gradients, expected_gradients, strict=True):
        close(a, b, 1e-4)


def test_the_decoder_with_splash(model):
    x, positions, segments, blocks = inputs(ROWS)
    other = lively(lambda: Llama(CONFIG, nnx.Rngs(0), Compute("float32", attention="splash")))
    close(states(other, x, positions, segments, blocks), states(model, x, positions, segments, blocks), 1e-5)
    # With a cache it is not asked: queries and keys are not the same positions there.
    cache = other.empty_cache(4, 24)
    hidden, _ = forward(other, x, positions, segments, blocks, cache)
    expected, _ = forward(model, x, positions, segments, blocks, cache)
    there = segments > 0
    close(hidden[there], expected[there], 1e-5)
