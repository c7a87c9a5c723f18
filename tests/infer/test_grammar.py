"""Answers whose numbers are the heads' own, whatever a model would write."""

import numpy as np
import pytest

from ivcr_jax.data.dialogue import video_number
from ivcr_jax.data.tokenizer import Tokenizer, train_demo
from ivcr_jax.infer import grammar
from ivcr_jax.infer.grammar import Answer, Grammar

TEXTS = (
    "The intent is video retrieval. The best match is video 3. It shows a red circle.",
    "The query happens in video 7 at 4.5s-12.0s. In that part we see a dog.",
    "意图是视频检索。最符合的是视频 3。其中可以看到一个红色的圆。",
    "这一段出现在第 2 个视频的 1.0s-9.5s。",
    "Here are some points: 1. Opening. 2. Main part.",
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_demo(TEXTS * 3, 420)


@pytest.fixture(scope="module")
def demo(tokenizer):
    return Grammar(tokenizer)


def run(answer, grammar, wishes):
    """Lets an answer be written by one who wishes for these ids; where it may have no digits, for "x"."""
    tokenizer, barred = grammar.tokenizer, grammar.barred
    other = tokenizer.encode("x")[-1]
    taken, wishes = [], list(wishes)
    while not answer.done:
        wish = wishes.pop(0) if wishes and not answer._queue else tokenizer.eos_id
        taken.append(answer.take(wish, other if barred[wish] else wish))
    assert taken[-1] == tokenizer.eos_id and tokenizer.eos_id not in taken[:-1]
    return tokenizer.decode(taken, skip_special_tokens=True).strip()


def wished(tokenizer, text):
    return tokenizer.encode("<s>" + text)[1:]


@pytest.mark.parametrize(
    ("number", "span", "wish", "expected"),
    [
        (12, None, "The best match is video 3. Good.", "The best match is video 12. Good."),
        (
            12,
            None,
            "The best match is video 345. Good.",
            "The best match is video 12x. Good. The best match is video 12.",
        ),
        (4, None, "最符合的是视频 3。好", "最符合的是视频 4。好"),
        (4, None, "是第3个视频", "是第4个视频"),
        (2, (1.0, 9.5), "It is video 7 at 4s.", "It is video 2 at 1.0s-9.5ss."),
        (2, (1.0, 9.5), "It is video 7.", "It is video 2. It is at 1.0s-9.5s."),
        (2, (1.0, 9.5), "视频 7 的 4.5s-12.0s", "视频 2 的 1.0s-9.5s.xs-xx.xs"),
        (2, (1.0, 9.5), "Where?", "Where? It is in video 2 at 1.0s-9.5s."),
        (2, None, "Two 2s in video, not video 3", "Two xs in video, not video 2"),
        (2, None, "", "The best match is video 2."),
    ],
)
def test_numbers_are_the_heads(demo, number, span, wish, expected):
    found = run(Answer(demo, "en", number=number, span=span), demo, wished(demo.tokenizer, wish))
    assert found.replace("x", "") == expected.replace("x", ""), found
    assert video_number(found)[0] == number and grammar.span(found) == span


@pytest.mark.parametrize("wish", ["The best match is video 3. Good.", "最符合的是视频 3。好"])
def test_a_model_need_not_wish_for_the_number(demo, wish):
    """In the isolated layout it has not learnt that digit, and wishes for anything there."""
    ids = wished(demo.tokenizer, wish)
    place = next(place for place, token in enumerate(ids) if demo.digits[token])
    for other in (*demo.tokenizer.encode("x")[-1:], demo.tokenizer.eos_id, demo.tokenizer.ids["<VIDEO>"]):
        answer = Answer(demo, "en", number=12)
        assert run(answer, demo, [*ids[:place], other, *ids[place + 1 :]]) == wish.replace("3", "12")
    assert run(Answer(demo, "en"), demo, ids) == wish, "talk is free"


def test_talk_is_free(demo):
    text = "Here are some points: 1. Opening. 2. Main part."
    assert run(Answer(demo, "en"), demo, wished(demo.tokenizer, text)) == text


def test_a_fixed_answer_is_said_whatever_the_model_wishes(demo):
    for language, text in grammar.NOTHING_FITS.items():
        answer = Answer(demo, language, fixed=text)
        assert run(answer, demo, wished(demo.tokenizer, "video 3")) == text
        assert video_number(text) is None


def test_an_answer_ends_at_its_limit_with_all_it_has_to_say(demo):
    answer = Answer(demo, "zh", number=5, span=(0.0, 2.0), limit=10)
    found = run(answer, demo, [demo.tokenizer.encode("x")[-1]] * 50)
    assert found.endswith("它在视频 5 中，时间是 0.0s-2.0s。") and found.count("x") <= 10


def test_a_special_token_ends_an_answer(demo):
    tokenizer = demo.tokenizer
    wishes = [*wished(tokenizer, "Good"), tokenizer.ids["<VIDEO>"], *wished(tokenizer, "never")]
    assert run(Answer(demo, "en"), demo, wishes) == "Good"


@pytest.mark.parametrize("real", [False, True])
def test_every_answer_parses_whatever_is_wished_for(demo, real, request):
    if real:
        folder = request.getfixturevalue("realdata") / "tokenizer"
        demo = Grammar(Tokenizer.load(folder / "mistral_v1.tokenizer.model"))
    tokenizer = demo.tokenizer
    rng = np.random.default_rng(0)
    pieces = [wished(tokenizer, text) for text in TEXTS]
    for case in range(500):
        number, language = int(rng.integers(1, 30)), ("en", "zh")[case % 2]
        start = round(float(rng.uniform(0, 500)), 1)
        span = (start, round(start + float(rng.uniform(0, 60)), 1)) if case % 3 else None
        wishes = []  # ids at random, and pieces of answers with their numbers
        for _ in range(rng.integers(1, 6)):
            noise = rng.integers(0, tokenizer.vocab_size, rng.integers(0, 12)).tolist()
            piece = pieces[rng.integers(len(pieces))]
            begin = int(rng.integers(len(piece)))
            wishes += [i for i in noise if i not in tokenizer.ids.values()] + piece[begin : begin + 12]
        found = run(Answer(demo, language, number=number, span=span, limit=60), demo, wishes)
        assert (video_number(found) or [found])[0] == number, found
        assert grammar.span(found) == span, found


def test_what_does_not_go_together_is_refused(demo, realdata):
    with pytest.raises(ValueError, match="without the number of its video"):
        Answer(demo, "en", span=(0.0, 1.0))
    joined = Tokenizer.load(realdata / "tokenizer" / "spm_test_model.model")
    with pytest.raises(ValueError, match="expected one that splits digits"):
        Grammar(joined)


def test_ids_without_which_no_number_can_be_written(demo):
    tokenizer = demo.tokenizer
    barred = set(np.flatnonzero(demo.barred).tolist())
    for text in ("0", "9", "٣", "３", "𝟙"):
        for i in wished(tokenizer, "a" + text)[-len(text.encode()) :][:1]:
            assert i in barred
    assert not barred & {*wished(tokenizer, "视频。 video x"), tokenizer.eos_id}
