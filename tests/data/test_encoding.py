"""A dialogue as tokens: hand-made dialogues, checked token by token against the text they should be."""

import dataclasses
import itertools

import numpy as np
import pytest

from ivcr_jax.data import encoding, prompt
from ivcr_jax.data.dialogue import Dialogue, Intent, Turn
from ivcr_jax.data.encoding import EncodingConfig, encode, show
from ivcr_jax.data.tokenizer import train_demo

TRUTH = "c/b"
DIALOGUE = Dialogue(
    "d",
    "train",
    1,
    (
        Turn("Find a dog.", "It is video 2. A dog.", Intent.VIDEO, "en", TRUTH, ("c/a", TRUTH, "c/c")),
        Turn("When?", "In video 2 at 1.0s-2.0s.", Intent.MOMENT, "en", TRUTH, (), (1.0, 2.0)),
        Turn("找一只猫。", "在视频 1。", Intent.VIDEO, "zh", "c/d", ("c/d", "c/a")),
        Turn("Thanks", "Bye", Intent.CHAT, "en"),
    ),
)
TIMES = {TRUTH: [0.5, 1.5], "c/d": [0.5]}
CONFIG = EncodingConfig(tokens_per_video=4)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [turn.user + " " + turn.answer for turn in DIALOGUE.turns]
    wording = [
        q + a for q, a in encoding.turn_texts(show(DIALOGUE, CONFIG, insert_truth=True), prompt.PromptStyle(), TIMES)
    ]
    return train_demo(texts + wording + ["0 1 2 3 4 5 6 7 8 9"], 420)


def whole_text(shown, style=prompt.PromptStyle()):
    return "".join(q + a for q, a in encoding.turn_texts(shown, style, TIMES))


def test_show_without_a_generator_keeps_ranks():
    find, when, cat, thanks = show(DIALOGUE, CONFIG, insert_truth=True)
    assert (find.videos, find.numbers, find.target) == (("c/a", TRUTH, "c/c"), (1, 2, 3), 1)
    assert (when.videos, when.numbers) == ((TRUTH,), (2,))
    assert (cat.videos, cat.target) == (("c/d", "c/a"), 0)
    assert (thanks.videos, thanks.numbers, thanks.target) == ((), (), -1)
    assert [item.turn for item in (find, when, cat, thanks)] == list(DIALOGUE.turns)


def test_show_shuffles_candidates_and_every_number_follows():
    places = set()
    for seed in range(30):
        find, when, cat, _ = show(DIALOGUE, CONFIG, insert_truth=True, rng=np.random.default_rng(seed))
        assert sorted(find.videos) == ["c/a", TRUTH, "c/c"] and find.videos[find.target] == TRUTH
        assert find.turn.answer == f"It is video {find.target + 1}. A dog."
        assert when.numbers == (find.target + 1,)
        assert when.turn.answer == f"In video {find.target + 1} at 1.0s-2.0s."
        assert cat.turn.answer == f"在视频 {cat.target + 1}。"
        places.add(find.target)
    assert places == {0, 1, 2}


def test_candidates_over_the_limit_keep_the_truth():
    turn = Turn("q", "video 5", Intent.VIDEO, "en", "v5", tuple(f"v{n}" for n in range(1, 8)))
    (item,) = show(Dialogue("d", "train", 1, (turn,)), EncodingConfig(max_candidates=3), insert_truth=False)
    assert item.videos == ("v1", "v2", "v5") and item.target == 2 and item.turn.answer == "video 3"


def test_a_first_stage_miss():
    turn = Turn("q", "It is video 1.", Intent.VIDEO, "en", "truth", ("v1", "v2"))
    dialogue = Dialogue("d", "train", 1, (turn,))
    (inserted,) = show(dialogue, CONFIG, insert_truth=True)
    assert inserted.videos == ("v1", "truth") and inserted.turn.answer == "It is video 2."
    (missed,) = show(dialogue, CONFIG, insert_truth=False)
    assert missed.videos == ("v1", "v2") and missed.target == -1 and missed.turn.answer == "It is video 1."


def test_an_answer_that_none_fits_stays_true_and_is_learnt(tokenizer):
    turn = Turn("q", "None of them.", Intent.VIDEO, "en", "truth", ("v1", "v2"))
    shown = show(Dialogue("d", "train", 1, (turn,)), CONFIG, insert_truth=True)
    assert shown[0].videos == ("v1", "v2") and shown[0].target == -1
    encoded = encode(shown, tokenizer, CONFIG, {})
    assert tokenizer.decode(encoded.tokens[encoded.learnt]).strip() == "None of them. </s>"


def test_a_moment_in_a_video_never_listed_is_video_1():
    turn = Turn("q", "In video 4 at 1.0s-2.0s.", Intent.MOMENT, "en", "v", (), (1.0, 2.0))
    (item,) = show(Dialogue("d", "train", 1, (turn,)), CONFIG, insert_truth=True)
    assert item.numbers == (1,) and item.turn.answer == "In video 1 at 1.0s-2.0s."


def test_inline_is_the_plain_text_with_each_video_token_widened(tokenizer):
    config = dataclasses.replace(CONFIG, layout="inline")
    shown = show(DIALOGUE, config, insert_truth=True)
    encoded = encode(shown, tokenizer, config, TIMES)
    mark = tokenizer.ids[prompt.VIDEO_TOKEN]
    plain = tokenizer.encode(whole_text(shown))
    assert encoded.tokens.tolist() == [t for token in plain for t in [token] * (4 if token == mark else 1)]
    assert encoded.positions.tolist() == list(range(len(encoded.tokens)))
    visual = encoded.video >= 0
    assert (visual == (encoded.tokens == mark)).all()
    assert encoded.offset[visual].tolist() == [0, 1, 2, 3] * 6
    # Six mentions: three candidates, the current video again, two candidates of which one again.
    names = [encoded.videos[place] for place in encoded.video[visual][::4]]
    assert names == ["c/a", TRUTH, "c/c", TRUTH, "c/d", "c/a"]
    assert encoded.turns[1].blocks[0] > encoded.turns[0].blocks[1]


def test_isolated_writes_each_video_once(tokenizer):
    shown = show(DIALOGUE, CONFIG, insert_truth=True)
    encoded = encode(shown, tokenizer, CONFIG, TIMES)
    mark = tokenizer.ids[prompt.VIDEO_TOKEN]
    visual = encoded.video >= 0
    assert [encoded.videos[place] for place in encoded.video[visual][::4]] == ["c/a", TRUTH, "c/c", "c/d"]
    text = [token for token in tokenizer.encode(whole_text(shown)) if token != mark]
    assert encoded.tokens[~visual].tolist() == text
    # Blocks all start at position 0, text follows them and does not count them.
    assert encoded.positions[visual].tolist() == [0, 1, 2, 3] * 4
    assert encoded.positions[~visual].tolist() == list(range(4, 4 + len(text)))
    # Each list's new blocks stand where its last video is mentioned: after "<VIDEO>", which is the last of the turn's.
    runs = np.split(np.arange(len(visual)), np.flatnonzero(np.diff(visual.astype(int))) + 1)[1::2]
    assert [len(run) for run in runs] == [12, 4]
    assert [tokenizer.decode(encoded.tokens[: run[0]]).count("<VIDEO>") for run in runs] == [3, 6]
    # The moment turn and the second list point back at the blocks of the first.
    find, when, cat, _ = encoded.turns
    assert when.blocks == (find.blocks[1],) and cat.blocks[1] == find.blocks[0]
    for turn in encoded.turns:
        for place, block in zip(turn.videos, turn.blocks, strict=True):
            assert (encoded.video[block : block + 4] == place).all() and encoded.offset[block] == 0
            assert block < turn.state


def video_turn(*videos, target=0):
    turn = Turn("Find it.", "It is video 1.", Intent.VIDEO, "en", videos[target], videos)
    return encoding.Shown(turn, videos, tuple(range(1, len(videos) + 1)), target)


def moment_turn(video):
    turn = Turn("When?", "In video 1 at 1.0s-2.0s.", Intent.MOMENT, "en", video, (), (1.0, 2.0))
    return encoding.Shown(turn, (video,), (1,), 0)


CHAT = encoding.Shown(Turn("Thanks", "Bye", Intent.CHAT, "en"), (), (), -1)
DIALOGUES = {
    "new and repeated": [video_turn("a", "b", "c"), moment_turn("b"), video_turn("d", "b", "e"), moment_turn("e")],
    "the last mention is a repeat": [video_turn("a", "b"), video_turn("c", "d", "a"), video_turn("d", "c", "b")],
    "a moment first": [moment_turn("a"), CHAT, video_turn("b", "a"), moment_turn("c"), moment_turn("c")],
    "one video each": [video_turn("a"), video_turn("b"), video_turn("a"), CHAT],
    "chat first and between": [CHAT, video_turn("a", "b", target=1), CHAT, video_turn("b", "a"), CHAT],
    "chat alone": [CHAT, CHAT],
}


def one_by_one(shown, tokenizer, config, times):
    """Each place's (token, position, (video, which of its tokens) or None, in an answer); turns' states and blocks."""
    mark, width = tokenizer.ids[prompt.VIDEO_TOKEN], config.tokens_per_video
    isolated = config.layout == "isolated"
    text = width if any(item.videos for item in shown) else 0  # position of the next word in the isolated layout
    places, states, blocks, block_of = [], [], [], {}
    for item, (question, answer) in zip(shown, encoding.turn_texts(shown, config.style, times), strict=True):
        new = [name for name in item.videos if name not in block_of]
        left = list(item.videos)
        read = []
        answering = False
        for token in tokenizer.encode(question + answer):
            if token != mark:
                places.append((token, text if isolated else len(places), None, answering))
                text += 1
                read.append(token)
                if not answering and tokenizer.decode(read).endswith("[/INST]"):
                    answering = True
                    states.append(len(places) - 1)
                continue
            name = left.pop(0)
            for video in ([] if left else new) if isolated else [name]:
                block_of[video] = len(places)
                for k in range(width):
                    places.append((mark, k if isolated else len(places), (video, k), False))
            if not isolated:
                blocks.append(block_of[name])
        if isolated:
            blocks += [block_of[name] for name in item.videos]
    return places, states, blocks


@pytest.mark.parametrize("layout", ["isolated", "inline"])
@pytest.mark.parametrize("name", DIALOGUES)
def test_every_place_is_as_written_one_by_one(tokenizer, name, layout):
    config = dataclasses.replace(CONFIG, layout=layout, tokens_per_video=3)
    shown = DIALOGUES[name]
    times = {video: [0.5, 1.5] for item in shown for video in item.videos}
    encoded = encode(shown, tokenizer, config, times)
    places, states, blocks = one_by_one(shown, tokenizer, config, times)
    tokens, positions, visuals, answers = (list(column) for column in zip(*places, strict=True))
    assert encoded.tokens.tolist() == tokens
    assert encoded.positions.tolist() == positions
    found = zip(encoded.video, encoded.offset, strict=True)
    assert [(encoded.videos[v], k) if v >= 0 else None for v, k in found] == visuals
    assert not encoded.offset[encoded.video < 0].any()
    assert [turn.state for turn in encoded.turns] == states
    assert [block for turn in encoded.turns for block in turn.blocks] == blocks
    assert [tuple(encoded.videos[v] for v in turn.videos) for turn in encoded.turns] == [item.videos for item in shown]
    # All of the answers is learnt, and in the isolated layout all but a video's number; never a visual token.
    unlearnt = encoded.tokens[answers & ~encoded.learnt]
    numbers = sum(bool(item.videos) for item in shown) if layout == "isolated" else 0
    assert tokenizer.decode(unlearnt) == "1" * numbers
    assert not encoded.learnt[~np.array(answers)].any()


@pytest.mark.parametrize("turn", [0, 2])
def test_the_order_of_candidates_moves_their_blocks_and_nothing_else(tokenizer, turn):
    """In a list of new videos and in one that repeats a video. The answer stays as it is."""
    shown = DIALOGUES["new and repeated"]
    times = {name: [0.5, 1.5] for item in shown for name in item.videos}
    before = encode(shown, tokenizer, CONFIG, times)
    names = np.array([*before.videos, ""])
    for order in itertools.permutations(range(3)):
        videos = tuple(shown[turn].videos[place] for place in order)
        item = dataclasses.replace(shown[turn], videos=videos, target=order.index(shown[turn].target))
        after = encode([*shown[:turn], item, *shown[turn + 1 :]], tokenizer, CONFIG, times)
        for array in ("tokens", "positions", "offset", "learnt"):
            assert (getattr(after, array) == getattr(before, array)).all(), array
        assert ((after.video == -1) == (before.video == -1)).all()
        # Where a block stood, one stands; of new videos in their new order.
        new = [name for name in videos if name not in {v for past in shown[:turn] for v in past.videos}]
        old = [name for name in shown[turn].videos if name in new]
        renamed = dict(zip(old, new, strict=True))
        expected = [renamed.get(name, name) for name in names[before.video]]
        assert np.array([*after.videos, ""])[after.video].tolist() == expected
        # Every pointer of every turn is to the video it was to.
        block_of = {name: expected.index(name) for name in before.videos}
        for place, (found, was) in enumerate(zip(after.turns, before.turns, strict=True)):
            listed = videos if place == turn else shown[place].videos
            assert tuple(after.videos[v] for v in found.videos) == listed
            assert found.blocks == tuple(block_of[name] for name in listed)
            assert (found.state, found.span, found.intent) == (was.state, was.span, was.intent)


@pytest.mark.parametrize("layout", ["isolated", "inline"])
def test_what_is_learnt_is_the_answers_and_their_ends(tokenizer, layout):
    config = dataclasses.replace(CONFIG, layout=layout)
    encoded = encode(show(DIALOGUE, config, insert_truth=True), tokenizer, config, TIMES)
    runs = np.split(encoded.tokens, np.flatnonzero(np.diff(encoded.learnt.astype(int))) + 1)
    learnt = [tokenizer.decode(run).strip() for run in runs[int(not encoded.learnt[0]) :: 2]]
    if layout == "inline":
        assert learnt == [
            "It is video 2. A dog. </s>",
            "In video 2 at 1.0s-2.0s. </s>",
            "在视频 1。 </s>",
            "Bye </s>",
        ]
    else:  # the video's number is the rank head's
        assert learnt == [
            "It is video", ". A dog. </s>", "In video", "at 1.0s-2.0s. </s>", "在视频", "。 </s>", "Bye </s>",
        ]  # fmt: skip


def test_state_is_the_last_token_before_the_answer(tokenizer):
    encoded = encode(show(DIALOGUE, CONFIG, insert_truth=True), tokenizer, CONFIG, TIMES)
    for turn in encoded.turns:
        assert tokenizer.decode(encoded.tokens[: turn.state + 1]).endswith("[/INST]")
        assert not encoded.learnt[turn.state] and encoded.learnt[turn.state + 1]


def test_a_turn_whose_truth_is_not_shown_is_not_learnt(tokenizer):
    turn = Turn("q", "It is video 1.", Intent.VIDEO, "en", "truth", ("v1", "v2"))
    shown = show(Dialogue("d", "train", 1, (turn,)), CONFIG, insert_truth=False)
    encoded = encode(shown, tokenizer, CONFIG, {})
    assert not encoded.learnt.any() and encoded.turns[0].target == -1


@pytest.mark.parametrize("layout", ["isolated", "inline"])
def test_chat_alone_starts_at_position_zero(tokenizer, layout):
    config = dataclasses.replace(CONFIG, layout=layout)
    dialogue = Dialogue("d", "train", 0, (Turn("Hi", "Hello", Intent.CHAT, "en"),))
    encoded = encode(show(dialogue, config, insert_truth=True), tokenizer, config, {})
    assert encoded.positions.tolist() == list(range(len(encoded.tokens))) and encoded.videos == ()


def test_tokens_of_a_turn_do_not_depend_on_the_turns_before(tokenizer):
    """A turn is encoded by itself; that must equal the ids of the whole text, or packed and plain would differ."""
    shown = show(DIALOGUE, CONFIG, insert_truth=True)
    apart = [token for q, a in encoding.turn_texts(shown, CONFIG.style, TIMES) for token in tokenizer.encode(q + a)]
    assert apart == tokenizer.encode(whole_text(shown))
