"""Reading in pieces and writing, against one pass over the whole dialogue."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ivcr_jax.data.dialogue import video_number
from ivcr_jax.infer import engine, grammar
from ivcr_jax.infer.engine import Engine, Sampling
from ivcr_jax.infer.grammar import Answer, Grammar
from tests.models.conftest import close, host, world  # noqa: F401

WIDTH = 6  # visual tokens of a video


def whole(model, batch):
    """The output of one pass over the batch, as NumPy arrays; before an engine takes the model."""
    return host(nnx.jit(lambda model, batch: model(batch))(model, batch))


@pytest.fixture(scope="module", params=["isolated", "inline"])
def case(world, request):  # noqa: F811
    """(batch, output of one pass, videos, engine) of a layout."""
    model, batch = world.model(layout=request.param), world.batch(layout=request.param)
    out = whole(model, batch)
    videos = host(nnx.jit(lambda model, batch: model.encode(batch))(model, batch))
    return host(batch), out, videos, Engine(model)


@pytest.fixture(scope="module")
def isolated(world):  # noqa: F811
    model, batch = world.model(), world.batch()
    videos = host(nnx.jit(lambda model, batch: model.encode(batch))(model, batch))
    return host(batch), videos, Engine(model)


def dialogues(batch):
    """(row, places) of every dialogue: where in the row it stands."""
    for row, segments in enumerate(batch["segment_ids"]):
        for segment in range(1, segments.max() + 1):
            yield row, np.flatnonzero(segments == segment)


def pieces(batch, row, places):
    """A dialogue cut where a block of videos begins or ends, and behind the last token of each prompt."""
    states = {int(s) for s, there in zip(batch["turn_states"][row], batch["turn_mask"][row], strict=True) if there}
    visual = batch["video_slots"][row, places] >= 0
    cuts = [i for i in range(1, len(places)) if visual[i] != visual[i - 1] or int(places[i - 1]) in states]
    return np.split(places, cuts)


def blocks_of(batch, row, here, found):
    """The blocks of videos that stand here, numbered by slot, from what `encode_blocks` made of the row's videos."""
    slots = batch["video_slots"][row, here][::WIDTH]
    return [(int(slot) + 1, found[slot]) for slot in slots]


def visual_of(batch, videos, row, here):
    """(ids with -1 for what is missing, vectors with NaN at text) of a dialogue in the inline layout."""
    slots, offsets = batch["video_slots"][row, here], batch["video_offsets"][row, here]
    ids, given = batch["tokens"][row, here].copy(), np.full((len(here), 32), np.nan, np.float32)
    for place in np.flatnonzero(slots >= 0):
        given[place] = videos.tokens[row, slots[place], offsets[place]]
        if not videos.mask[row, slots[place], offsets[place]]:
            ids[place] = -1
    return ids, given


@pytest.mark.parametrize("smallest", [256, 16])
def test_reading_in_pieces_is_reading_at_once(case, smallest, monkeypatch):
    """Three dialogues as three rows, of different lengths; the cache grows under way, or holds all from the start."""
    monkeypatch.setattr(engine, "SMALLEST_CACHE", smallest)
    batch, out, videos, model = case
    inline = model.model.config.layout == "inline"
    rows = list(dialogues(batch))
    assert len(rows) == 3
    parts = [collections.deque([places] if inline else pieces(batch, row, places)) for row, places in rows]
    ready = [model.encode_blocks(videos.tokens[row], videos.mask[row]) for row in range(2)]
    context = model.context(3)
    model.counts.clear()

    def take(visual):
        """Each row's next piece where it is of that kind, else nothing."""
        wanted = [
            bool(line) and (not inline and batch["video_slots"][row, line[0][0]] >= 0) == visual
            for (row, _), line in zip(rows, parts, strict=True)
        ]
        return [line.popleft() if want else np.empty(0, int) for line, want in zip(parts, wanted, strict=True)]

    while any(parts):
        text = take(visual=False)
        if any(map(len, text)):
            ids, given = zip(
                *[visual_of(batch, videos, row, p) for (row, _), p in zip(rows, text, strict=True)], strict=True
            )
            hidden = model.read(context, [line.tolist() for line in ids], given if inline else None)
            for i, ((row, _), piece) in enumerate(zip(rows, text, strict=True)):
                there = ids[i] >= 0
                close(hidden[i, : len(piece)][there], out.hidden[row, piece[there]], 1e-5)
                if len(piece):
                    close(context.hidden[i], out.hidden[row, piece[-1]], 1e-5)
        blocks = take(visual=True)
        if any(map(len, blocks)):
            each = zip(rows, blocks, strict=True)
            model.put(context, [blocks_of(batch, row, piece, ready[row]) for (row, _), piece in each])
    present = sum(int((visual_of(batch, videos, row, places)[0] >= 0).sum()) for row, places in rows)
    assert context.lengths.sum() == present
    read = model.counts["text_tokens"] + model.counts["visual_tokens"]
    assert read == present if inline else model.counts["visual_tokens"] == 0


def test_scores_and_moments_are_those_of_the_whole(isolated, world):  # noqa: F811
    batch, videos, model = isolated
    out = whole(world.model(), {name: jnp.asarray(array) for name, array in batch.items()})
    checked = [0, 0]
    for row, places in dialogues(batch):
        ready = model.encode_blocks(videos.tokens[row], videos.mask[row])
        context = model.context(1)
        for piece in pieces(batch, row, places):
            if batch["video_slots"][row, piece[0]] >= 0:
                model.put(context, [blocks_of(batch, row, piece, ready)])
                continue
            model.read(context, [batch["tokens"][row, piece].tolist()])
            here = np.flatnonzero(batch["turn_mask"][row] & (batch["turn_states"][row] == piece[-1]))
            if not len(here):
                continue
            turn = int(here[0])
            slots = [int(slot) for slot in batch["candidate_slots"][row, turn] if slot >= 0]
            if slots:
                keys = jnp.stack([ready[slot].keys for slot in slots])[None]
                found = model.scores(context, keys, np.stack([ready[slot].there for slot in slots])[None], None)
                close(found[0], out.scores[row, turn, : len(slots)], 1e-5)
                checked[0] += 1
            slot = int(batch["moment_slots"][row, turn])
            if slot >= 0:
                keys = np.asarray(nnx.jit(lambda head, x: head.keys(x))(model.model.moment, videos.frames[row, slot]))
                of_video = [batch[name][row, slot][None] for name in ("frame_times", "frame_mask", "durations")]
                moments = model.moment(context, keys[None], *of_video, np.zeros((1, 16), np.float32))
                close(moments.start_logits[0], out.moments.start_logits[row, turn], 1e-4)
                close(moments.ends[0], out.moments.ends[row, turn], 1e-5)
                checked[1] += 1
    assert checked == [4, 3]


def likeliest(model, ids):
    """The next token after ids, by one pass without a cache."""
    x = model.llama.embed(jnp.asarray([ids]))
    ones = jnp.ones((1, len(ids)), jnp.int32)
    hidden, _ = model.llama(x, jnp.arange(len(ids))[None], ones, 0 * ones)
    return int(model.llama.logits(hidden[0, -1]).argmax())


class Count:
    """Writes what the model chooses, so many tokens."""

    def __init__(self, count):
        self.left = count

    @property
    def done(self):
        return self.left == 0

    def take(self, free, barred):
        self.left -= 1
        return free


def test_writing_is_choosing_the_likeliest_again_and_again(isolated, world):  # noqa: F811
    """Rows of different lengths that stop at different times, one silent; a plain loop over whole passes beside."""
    _, _, model = isolated
    prompts = [[5, 80, 41], [7], [9, 30, 31, 32, 33, 34, 35, 36, 37, 38]]
    context = model.context(3)
    model.read(context, prompts)
    silent = np.asarray(context.hidden[1])
    barred = np.zeros(world.tokenizer.vocab_size, bool)
    written = [[], [], []]
    for said in model.write(context, [Count(5), None, Count(7)], barred):
        for row, token in enumerate(said):
            if token is not None:
                written[row].append(token)
    assert [len(row) for row in written] == [5, 0, 7]
    other = world.model()
    for row in (0, 2):
        ids = list(prompts[row])
        for token in written[row]:
            assert token == likeliest(other, ids)
            ids.append(token)
    assert context.lengths.tolist() == [8, 1, 17]
    close(context.hidden[1], silent, 0)


def test_undoing_is_never_having_read(isolated, world):  # noqa: F811
    _, _, model = isolated
    barred = np.zeros(world.tokenizer.vocab_size, bool)
    context = model.context(1)
    model.read(context, [[5, 80, 41]])
    before = context.lengths, context.positions, context.hidden
    first = list(model.write(context, [Count(4)], barred))
    model.read(context, [[9, 9, 9, 9]])
    model.cut(context, *before)
    assert list(model.write(context, [Count(4)], barred)) == first


def test_what_is_drawn_has_the_models_odds(isolated, world):  # noqa: F811
    """At temperature 2 among the likeliest 0.8, against those odds in NumPy; 4,000 places of one state."""
    _, _, model = isolated
    state = np.random.default_rng(0).standard_normal(32).astype(np.float32)
    draws = 4000
    barred = np.zeros(world.tokenizer.vocab_size, bool)
    logits = np.asarray(model.model.llama.logits(jnp.asarray(state)), np.float64) / 2
    odds = np.exp(logits - logits.max())
    odds /= odds.sum()
    order = np.argsort(-odds)
    kept = order[np.cumsum(odds[order]) - odds[order] < 0.8]
    expected = np.zeros_like(odds)
    expected[kept] = odds[kept] / odds[kept].sum()
    barred[kept[0]] = True
    args = (barred, jax.random.key(3), np.arange(draws, dtype=np.int32), np.float32(2), np.float32(0.8))
    free, without = model._choose(np.tile(state, (draws, 1)), *args)
    found = np.bincount(free, minlength=len(odds)) / draws
    assert set(np.unique(free)) <= set(kept.tolist()) and kept[0] not in np.unique(without)
    spread = np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(found - expected) <= 4.5 * spread + 1e-9).all()


def test_a_seed_draws_the_same_alone_and_beside_others(isolated, world):  # noqa: F811
    _, _, model = isolated
    barred = np.zeros(world.tokenizer.vocab_size, bool)

    def written(prompts, seed):
        context = model.context(len(prompts))
        model.read(context, prompts)
        sampling = Sampling(temperature=1.5, top_p=0.95, seed=seed)
        return [said[-1] for said in model.write(context, [Count(12) for _ in prompts], barred, sampling)]

    alone = written([[5, 80, 41]], 0)
    assert alone == written([[7, 8], [5, 80, 41]], 0) and alone != written([[5, 80, 41]], 1)


@pytest.mark.parametrize("values", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_odds_that_mean_nothing_are_refused(values):
    with pytest.raises(ValueError, match="expected at least 0, and more than 0 up to 1"):
        Sampling(**values)


@pytest.mark.slow
def test_many_answers_of_random_weights_all_parse(isolated, world):  # noqa: F811
    """A thousand, in rows of a hundred, in both languages, drawn hot."""
    _, _, model = isolated
    of_tokens = Grammar(world.tokenizer)
    rng = np.random.default_rng(0)
    for batch in range(10):
        context = model.context(100)
        model.read(context, rng.integers(5, 200, (100, 6)).tolist())
        wanted = [(int(rng.integers(1, 12)), (1.5, 20.0) if row % 3 else None) for row in range(100)]
        answers = [
            Answer(of_tokens, ("en", "zh")[row % 2], number=number, span=span, limit=12)
            for row, (number, span) in enumerate(wanted)
        ]
        for _ in model.write(context, answers, of_tokens.barred, Sampling(temperature=2.0, seed=batch)):
            pass
        for answer, (number, span) in zip(answers, wanted, strict=True):
            assert (video_number(answer.text) or [None])[0] == number, answer.text
            assert grammar.span(answer.text) == span, answer.text
