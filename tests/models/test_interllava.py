"""The whole model on batches that the data pipeline makes: both layouts, candidates in any order, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ivcr_jax.data.dialogue import Intent
from ivcr_jax.models.heads import ABSENT
from ivcr_jax.models.interllava import InterLLaVA, InterLLaVAConfig
from ivcr_jax.models.qformer import QFormerConfig
from tests.models.conftest import CHAT, F32, ROWS, VIT, close, decode_row, find, host, near, operations, when


def run(model, batch):
    """The output, as NumPy arrays."""
    return host(_run(model, batch))


@nnx.jit
def _run(model, batch):
    return model(batch)


@pytest.fixture(scope="module")
def isolated(world):
    return world.model(), world.batch()


@pytest.fixture(scope="module")
def inline(world):
    return world.model(layout="inline"), world.batch(layout="inline")


@pytest.fixture(params=["isolated", "inline"])
def either(request):
    return request.getfixturevalue(request.param)


def turns(batch, kind=None):
    """(row, turn) of the turns of a kind that are there."""
    there = np.asarray(batch["turn_mask"])
    if kind is not None:
        there = there & (np.asarray(batch["turn_intents"]) == kind)
    return [tuple(map(int, place)) for place in np.argwhere(there)]


# The whole from its parts


def test_the_output_is_what_the_parts_make_of_the_batch(either):
    """Spliced, decoded and scored one row, turn and candidate at a time; the decoder is that in NumPy."""
    model, batch = either
    out = run(model, batch)
    b = host(batch)
    assert len(turns(batch, Intent.VIDEO)) == 4 and len(turns(batch, Intent.MOMENT)) == 3
    assert out.hidden.shape == (2, 480, 32) and out.scores.shape == (2, 7, 4)
    assert {leaf.shape for leaf in jax.tree.leaves(out.moments)} == {(2, 7, 5)}
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {np.dtype(np.float32)}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))
    videos = host(nnx.jit(lambda model, batch: model.encode(batch))(model, batch))
    assert videos.tokens.shape == (2, 7, 6, 32)
    embedding = np.asarray(model.llama.embed(batch["tokens"]))
    decoder = lora_merged(model).llama
    rank = nnx.jit(lambda head, state, hidden, there: head(state, head.keys(hidden), there))
    ask = nnx.jit(lambda head, state, frames, *rest: head(state, head.keys(frames), *rest))
    for row in range(2):
        there = b["segment_ids"][row] > 0
        x = embedding[row].copy()
        for place in np.flatnonzero(b["video_slots"][row] >= 0):
            slot, offset = b["video_slots"][row, place], b["video_offsets"][row, place]
            x[place] = videos.tokens[row, slot, offset]
            there[place] = videos.mask[row, slot, offset]
        assert (there != (b["segment_ids"][row] > 0)).any()  # short videos lack windows
        segments = np.where(there, b["segment_ids"][row], 0)
        blocks = b["video_slots"][row] + 1 if model.config.layout == "isolated" else None
        hidden = decode_row(decoder, x, b["positions"][row], segments, blocks)
        near(out.hidden[row, there], hidden[there], 1e-5)
        for turn in range(7):
            state = out.hidden[row, b["turn_states"][row, turn]]
            for c, block in enumerate(b["candidate_blocks"][row, turn]):
                if block < 0:
                    assert out.scores[row, turn, c] == ABSENT
                    continue
                here = slice(block, block + 6)
                alone = rank(model.rank, state, out.hidden[row, here][None], there[here][None])
                close(out.scores[row, turn, c], alone[0], 1e-5)
            slot = b["moment_slots"][row, turn]
            if slot >= 0:
                of_video = [b[name][row, slot][None] for name in ("frame_times", "frame_mask", "durations")]
                alone = ask(model.moment, state[None], videos.frames[row, slot][None], *of_video)
                for name in ("start_logits", "end_logits", "starts", "ends"):
                    close(getattr(out.moments, name)[row, turn], getattr(alone, name)[0], 1e-5)


def test_moments_without_the_decoder_are_of_the_texts_alone(world):
    moment = dataclasses.replace(world.config().moment, first_width=8)
    model, batch = world.model(moment=moment), world.batch()
    texts = jnp.asarray(np.random.default_rng(2).standard_normal((2, 7, 8)), jnp.float32)

    @nnx.jit
    def both(model, batch, texts):
        videos = model.encode(batch)
        return model(batch, texts=texts), model(batch, texts=texts, decode=False), videos.frames

    whole, alone, frames = host(both(model, batch, texts))
    assert alone.hidden is None and alone.scores is None
    b = host(batch)
    for row, turn in turns(batch, Intent.MOMENT):
        slot = b["moment_slots"][row, turn]
        of_video = [b[name][row, slot][None] for name in ("frame_times", "frame_mask", "durations")]
        keys, text = model.moment.keys(frames[row, slot][None]), texts[row, turn][None]
        for state, found in (
            (jnp.zeros((1, 32)), alone),
            (whole.hidden[row, b["turn_states"][row, turn]][None], whole),
        ):
            expected = model.moment(state, keys, *of_video, text)
            close(found.moments.start_logits[row, turn], expected.start_logits[0], 1e-5)
            close(found.moments.ends[row, turn], expected.ends[0], 1e-5)
        there = b["frame_mask"][row, slot]
        assert np.abs(whole.moments.start_logits[row, turn] - alone.moments.start_logits[row, turn])[there].max() > 1e-3


def lora_merged(model):
    """A copy with LoRA's additions in the kernels, as the NumPy decoder expects them."""
    copy = nnx.clone(model)
    for name in "qkvo":
        linear = getattr(copy.llama.layers, name)
        a, b, kernel = (np.asarray(value[...], np.float64) for value in (linear.lora.a, linear.lora.b, linear.kernel))
        linear.kernel[...] = jnp.asarray(kernel + np.einsum("lir,lro->lio", a, b) * (1.0 / 2), jnp.float32)
        linear.lora = None
    return copy


def test_frames_are_as_good_as_their_features(world, isolated):
    model, batch = isolated
    pixels = np.random.default_rng(0).integers(0, 256, (2, 7, 5, 8, 8, 3)).astype(np.uint8)
    rest = {name: array for name, array in batch.items() if name != "features"}
    features = np.asarray(nnx.jit(lambda vit, x: vit(x))(model.encoder.vit, pixels.reshape(-1, 8, 8, 3)))
    features = features.reshape(batch["features"].shape)
    expected = run(model, {**rest, "features": jnp.asarray(features)})
    found = run(model, {**rest, "frames": jnp.asarray(pixels)})
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        close(a, b, 1e-5)


# Nothing changes anything


def test_missing_frames_slots_and_places_change_nothing(either):
    """Garbage wherever the batch says there is nothing: the rest is bit by bit as before."""
    model, batch = either
    expected = run(model, batch)
    b = host(batch)
    rng = np.random.default_rng(0)
    missing = ~b["frame_mask"]
    assert missing.any() and not b["video_mask"].all()
    other = dict(b)
    other["features"] = np.where(
        missing[..., None, None], 1e4 * rng.standard_normal(b["features"].shape), b["features"]
    )
    other["frame_text"] = np.where(missing[..., None], rng.integers(0, 99, b["frame_text"].shape), b["frame_text"])
    other["frame_times"] = np.where(missing, rng.uniform(0, 99, missing.shape), b["frame_times"])
    other["durations"] = np.where(b["video_mask"], b["durations"], 50)
    empty = b["segment_ids"] == 0
    other["tokens"] = np.where(empty, rng.integers(0, 99, empty.shape), b["tokens"])
    other["positions"] = np.where(empty, rng.integers(0, 99, empty.shape), b["positions"])
    other = {name: jnp.asarray(array.astype(b[name].dtype)) for name, array in other.items()}
    found = run(model, other)
    assert (found.hidden[~empty] == expected.hidden[~empty])[visible_places(model, b)[~empty]].all()
    for row, turn in turns(batch):
        assert (found.scores[row, turn] == expected.scores[row, turn]).all()
        if b["moment_slots"][row, turn] >= 0:
            assert (found.moments.starts[row, turn] == expected.moments.starts[row, turn]).all()
            assert (found.moments.end_logits[row, turn] == expected.moments.end_logits[row, turn]).all()


def visible_places(model, b):
    """bool[B, S], all but the visual tokens of windows without frames."""
    windows = b["frame_mask"][..., :: model.config.video.stride]  # frames that are there come first
    there = np.repeat(windows, model.config.video_qformer.queries, axis=-1)
    rows = np.arange(len(there))[:, None]
    return (b["video_slots"] < 0) | there[rows, np.maximum(b["video_slots"], 0), b["video_offsets"]]


# The order of candidates


def permuted(rows, row, dialogue, turn, order):
    """The rows with one turn's candidates in another order, and the same answer."""
    item = rows[row][dialogue][turn]
    item = dataclasses.replace(
        item, videos=tuple(item.videos[place] for place in order), target=order.index(item.target)
    )
    changed = [*rows[row][dialogue][:turn], item, *rows[row][dialogue][turn + 1 :]]
    dialogues = tuple(tuple(changed) if n == dialogue else d for n, d in enumerate(rows[row]))
    return tuple(dialogues if n == row else r for n, r in enumerate(rows))


@pytest.mark.parametrize(
    ("dialogue", "turn", "flat", "order"),
    [
        (0, 0, 0, [2, 0, 1]),  # new videos
        (0, 2, 2, [1, 2, 0]),  # two new ones and one shown before
        (1, 0, 4, [1, 0]),  # in the second dialogue
    ],
)
def test_the_order_of_candidates_permutes_their_scores_and_changes_nothing_else(
    world, isolated, dialogue, turn, flat, order
):
    model, batch = isolated
    changed = world.batch(permuted(ROWS, 0, dialogue, turn, order))
    assert (np.asarray(changed["tokens"]) == np.asarray(batch["tokens"])).all()
    before, after = run(model, batch), run(model, changed)
    count = len(order)
    assert np.ptp(before.scores[0, flat, :count]) > 1e-3
    near(after.scores[0, flat, :count], before.scores[0, flat, order], 1e-6)
    rest = np.ones((2, 7, 4), bool)
    rest[0, flat, :count] = False
    near(after.scores[rest], before.scores[rest], 1e-6)
    text = np.asarray(batch["video_slots"]) < 0
    assert (text == (np.asarray(changed["video_slots"]) < 0)).all()
    near(after.hidden[text], before.hidden[text], 1e-6)
    for row, item in turns(batch, Intent.MOMENT):
        for name in ("start_logits", "end_logits", "starts", "ends"):
            near(getattr(after.moments, name)[row, item], getattr(before.moments, name)[row, item], 1e-6)
    # And the visual states went with their videos.
    assert np.abs(after.hidden[0] - before.hidden[0])[~text[0]].max() > 0.01


def test_inline_the_order_of_candidates_matters(world, inline):
    """Which is why the test above says something."""
    model, batch = inline
    changed = world.batch(permuted(ROWS, 0, 0, 0, [2, 0, 1]), layout="inline")
    before, after = run(model, batch), run(model, changed)
    assert (np.asarray(changed["positions"]) == np.asarray(batch["positions"])).all()
    text = (np.asarray(batch["video_slots"])[0] < 0) & (np.asarray(batch["segment_ids"])[0] == 1)
    first = np.asarray(batch["candidate_blocks"])[0, 0].max() + 6
    later = np.flatnonzero(text)[np.flatnonzero(text) >= first]
    assert np.abs(after.hidden[0, later] - before.hidden[0, later]).max(-1).min() > 1e-3
    assert np.abs(after.scores[0, 0, :3] - before.scores[0, 0, [2, 0, 1]]).min() > 1e-4
    near(after.hidden[1], before.hidden[1], 1e-6)


@pytest.mark.parametrize("names", ["a", "ab", "abcdefg"])
def test_any_number_of_candidates(world, isolated, names):
    """A candidate's score is the same however many others there are; only what is read before the question counts."""
    model, _ = isolated
    pack = dataclasses.replace(world.pack, seq_len=224, max_turns=2)
    out = run(model, batch := world.batch((((find(*names), CHAT),),), pack, max_candidates=7))
    assert out.scores.shape == (1, 2, 7)
    assert (out.scores[0, 0] != ABSENT).sum() == len(names) and (out.scores[0, 1] == ABSENT).all()
    assert np.isfinite(out.scores).all() and len(turns(batch)) == 2


# A block read once


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_ready_blocks_give_the_states_and_scores_of_the_whole(isolated, order):
    """Text is read token by token where it stands, blocks come from `encode_block`, in any order."""
    model, batch = isolated
    b = host(batch)
    whole = run(model, batch)
    state = int(b["turn_states"][0, 0])
    videos = nnx.jit(lambda model, batch: model.encode(batch))(model, batch)
    slots = [int(slot) for slot in b["candidate_slots"][0, 0, :3]]
    tokens, mask = videos.tokens[0, jnp.array(slots)], videos.mask[0, jnp.array(slots)]
    assert not np.asarray(mask).all()  # one of them is short
    hidden, ready = nnx.jit(lambda model, *x: model.encode_block(*x))(model, tokens, mask)
    text = np.flatnonzero(b["video_slots"][0, : state + 1] < 0)
    border = int(b["candidate_blocks"][0, 0].max())
    read = nnx.jit(lambda llama, *x: llama(*x))

    def read_text(places, cache):
        x = model.llama.embed(b["tokens"][:1, places])
        ones = np.ones((1, len(places)), np.int32)
        return read(model.llama, x, b["positions"][:1, places], ones, 0 * ones, cache)

    append = jax.jit(lambda cache, *x: cache.append(*x))
    _, cache = read_text(text[text < border], model.llama.empty_cache(1, state + 1))
    for place in order:
        here = mask[place][None].astype(jnp.int32)
        cache = append(cache, ready.k[:, place][:, None], ready.v[:, place][:, None], here, here * (place + 1))
    states, cache = read_text(text[text > border], cache)
    assert cache.lengths.tolist() == [len(text) + int(mask.sum())]
    close(states[0], whole.hidden[0, text[text > border]], 1e-5)
    scores = nnx.jit(lambda head, *x: head(x[0], head.keys(x[1]), x[2]))(
        model.rank, states[:, -1], hidden[None], mask[None]
    )
    close(scores[0], whole.scores[0, 0, :3], 1e-5)
    for place in range(3):
        there = np.asarray(mask[place])
        start = b["candidate_blocks"][0, 0, place]
        close(hidden[place, there], whole.hidden[0, start : start + 6][there], 1e-5)


# Gradients


def rank_loss(out, batch):
    """Cross-entropy over the candidates of the first dialogue of the first row."""
    mine = (batch["candidate_targets"] >= 0) & (batch["turn_segments"] == 1)
    mine = mine.at[1:].set(False)
    likely = jax.nn.log_softmax(out.scores)
    target = jnp.maximum(batch["candidate_targets"], 0)[..., None]
    return -jnp.where(mine, jnp.take_along_axis(likely, target, -1)[..., 0], 0).sum()


def moment_loss(out, batch):
    """Cross-entropy of the second and third frame, and the error of the expected times in seconds."""
    mine = batch["moment_slots"] >= 0
    likely = jax.nn.log_softmax(out.moments.start_logits)[..., 1] + jax.nn.log_softmax(out.moments.end_logits)[..., 2]
    error = jnp.abs(out.moments.expected() - batch["moment_spans"]).sum(-1)
    usable = mine & batch["frame_mask"][jnp.arange(len(mine))[:, None], jnp.maximum(batch["moment_slots"], 0), 2]
    return jnp.where(usable, error - likely, 0).sum()


@nnx.jit
def losses(model, batch, features):
    out = model({**batch, "features": features})
    return jnp.stack([rank_loss(out, batch), moment_loss(out, batch)])


@pytest.fixture(scope="module")
def gradients(isolated):
    """Both losses' gradients for the features."""
    model, batch = isolated

    @nnx.jit
    def gradient(model, features, which):
        return nnx.grad(lambda m, x: losses(m, batch, x) @ which, argnums=1)(model, features)

    return [np.asarray(gradient(model, batch["features"], which)) for which in np.eye(2, dtype=np.float32)]


def test_gradients_reach_the_videos_of_the_dialogue_and_no_other(isolated, gradients):
    """And of these only the frames that are there. In the isolated layout a dialogue sees its own videos alone."""
    _, batch = isolated
    b = host(batch)
    of_rank, of_moment = (np.abs(gradient).max((-1, -2)) > 0 for gradient in gradients)  # [B, V, T]
    shown = {slot for slot, segment in zip(b["video_slots"][0], b["segment_ids"][0], strict=True) if segment == 1}
    of_dialogue = np.zeros((2, 7), bool)
    of_dialogue[0, sorted(shown - {-1})] = True
    assert of_dialogue.sum() == 5 and b["video_mask"].sum() == 8
    assert (of_rank == (of_dialogue[..., None] & b["frame_mask"])).all()
    # The question of the other row sees its one video; its frames are too few for the loss.
    assert (of_moment == of_rank).all()


def test_gradients_are_finite_differences(isolated, gradients):
    """Along random directions: of all videos, of the one whose moment is asked for, and of another candidate."""
    model, batch = isolated
    rng = np.random.default_rng(0)
    step = 5e-3
    for slots in (range(7), [1], [3]):
        here = np.isin(np.arange(7), slots)[None, :, None, None, None]
        for loss, gradient in enumerate(gradients):
            # Up the slope, or what changes is lost in rounding.
            direction = np.abs(rng.standard_normal(gradient.shape)) * np.sign(gradient) * here
            ahead, behind = (
                float(losses(model, batch, batch["features"] + jnp.float32(sign * step * direction))[loss])
                for sign in (1, -1)
            )
            expected = (gradient * direction).sum(dtype=np.float64)
            assert expected > 0.05
            np.testing.assert_allclose((ahead - behind) / (2 * step), expected, rtol=1e-2)


# Dropout


@pytest.mark.parametrize(("part", "sites"), [("encoder", 12), ("decoder", 4), ("both", 16)])
def test_a_key_drops_out_in_the_encoder_and_in_the_decoder(world, part, sites):
    """Random numbers are drawn at the published places, counted by hand, and nowhere without a key.

    Image Q-Former: the embeddings; in a layer with cross-attention four sub-layers, in one without three. Video
    Q-Former: the embeddings and three. LoRA: the inputs of q, k, v and o.
    """
    config = world.config()
    if part == "encoder":
        config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, dropout=0.0))
    elif part == "decoder":
        still = (dataclasses.replace(each, dropout=0.0) for each in (config.qformer, config.video_qformer))
        config = dataclasses.replace(config, **dict(zip(("qformer", "video_qformer"), still, strict=True)))
    definition, state = nnx.split(nnx.eval_shape(lambda: InterLLaVA(config, nnx.Rngs(0), F32)))
    batch = world.batch()
    for key, expected in ((jax.random.key(0), sites), (None, 0)):
        program = jax.make_jaxpr(lambda state, batch: nnx.merge(definition, state)(batch, key).scores)  # noqa: B023
        names = [operation.primitive.name for operation in operations(program(state, batch).jaxpr)]
        assert names.count("random_bits") == expected


# Configuration


def test_the_word_table_has_a_row_for_each_token_of_the_decoder(world):
    config = world.config()
    assert config.text_qformer.vocab_size == config.llama.vocab_size
    published = dataclasses.replace(config, llama_ids_for_qformer=True)
    assert published.text_qformer == config.qformer
    silent = dataclasses.replace(config, qformer=dataclasses.replace(config.qformer, vocab_size=0, max_text=0))
    assert silent.text_qformer.vocab_size == 0
    with pytest.raises(ValueError, match="layout is 'mixed'; expected isolated or inline"):
        InterLLaVAConfig(layout="mixed")
    assert InterLLaVAConfig().qformer == QFormerConfig() and VIT.cls_token


def test_a_model_without_sentences_reads_none(world):
    config = world.config()
    model = world.model(qformer=dataclasses.replace(config.qformer, vocab_size=0, max_text=0))
    batch = world.batch((((when("c"),),),), dataclasses.replace(world.pack, seq_len=160))
    encoded = nnx.jit(lambda model, batch: model.encode(batch))(model, {**batch, "frame_text": None})
    assert np.isfinite(encoded.tokens).all()


def test_videos_one_after_the_other_give_what_all_at_once_do(world):
    """Values and gradients, with layers recomputed and without; and only a few videos' activations are there."""
    batch = world.batch(pack=dataclasses.replace(world.pack, video_slots=8))

    def loss(state, definition):
        encoded = nnx.merge(definition, state).encode(batch)
        weights = jnp.sin(jnp.arange(encoded.tokens.size)).reshape(encoded.tokens.shape)
        return (encoded.tokens * weights).sum() + jnp.square(encoded.frames).sum(), encoded.mask

    found = {}
    for name, compute in {
        "all": F32,
        "two": dataclasses.replace(F32, videos_at_once=2),
        "two, recomputed": dataclasses.replace(F32, videos_at_once=2, remat="full"),
    }.items():
        definition, state = nnx.split(world.model(compute))
        program = jax.value_and_grad(lambda state: loss(state, definition), has_aux=True)  # noqa: B023
        found[name] = host(jax.jit(program)(state))
        if name != "all":
            scans = [each for each in operations(jax.make_jaxpr(program)(state).jaxpr) if each.primitive.name == "scan"]
            assert any(each.params["length"] == 4 for each in scans)
    (value, mask), gradients = found.pop("all")
    for (other, other_mask), other_gradients in found.values():
        close(other, value, 1e-5)
        assert (other_mask == mask).all()
        for ours, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(other_gradients), strict=True):
            near(theirs, ours, 1e-5)
    uneven = world.model(dataclasses.replace(F32, videos_at_once=3))
    with pytest.raises(ValueError, match="videos_at_once is 3; expected a divisor of the 8 videos of a row"):
        uneven.encode(batch)
