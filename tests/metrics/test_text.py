"""BLEU against sacrebleu: its tokens, its counts, whole corpora."""

import random

import numpy as np
import pytest
import sacrebleu
from sacrebleu.metrics.bleu import BLEU

from ivcr_jax.data.dialogue import Dialogue, Intent, Turn
from ivcr_jax.metrics import interval, text
from ivcr_jax.metrics.records import Pair, Prediction
from ivcr_jax.metrics.text import bleu

ENGLISH = (
    ("It is video 3. A red fish swims to the left.", "It is video 3. A red fish swims slowly to the left."),
    ("It happens in video 1 at 5s-10s.", "It happens in video 1 at 6s-10s, before the dog sleeps."),
    ("", "The query is found in video 2."),
    ("Sorry, I don't know that one .", "It is video 7. Two children play with a ball in a garden ."),
    ("It is video 3. A cat sleeps on the sofa.", "It is video 3. A cat sleeps on the sofa."),
)
CHINESE = (
    ("是视频 3。一条红色的鱼向左游。", "是视频 3。一条红色的鱼慢慢地向左游动。"),
    ("在视频 1 的5秒到10秒。", "在视频 1 的6秒到10秒，小狗睡觉之前。"),
    ("抱歉，我不知道。", "是视频 7。两个孩子在花园里玩球。"),
)


def pairs_of(texts, language, first=0):
    """Every two answers are about one video."""
    pairs = []
    for number, (found, wanted) in enumerate(texts, first):
        turn = Turn("Where is it?", wanted, Intent.VIDEO, language, f"c/{language}{number // 2}")
        prediction = Prediction(f"d{number}", 0, text=found) if found else None
        pairs.append(Pair(Dialogue(f"d{number}", "test", 1, (turn,)), 0, True, prediction))
    return pairs


def test_bleu_is_sacrebleus_of_each_language():
    pairs = pairs_of(ENGLISH, "en") + pairs_of(CHINESE, "zh", 10)
    cells, signatures = bleu(pairs)
    for language, texts, tokenizer in (("en", ENGLISH, "13a"), ("zh", CHINESE, "zh")):
        found, wanted = zip(*texts, strict=True)
        expected = sacrebleu.corpus_bleu([*found], [[*wanted]], tokenize=tokenizer)
        cell = cells[f"bleu_{language}"]
        assert cell.value == pytest.approx(expected.score, abs=1e-9) and 5 < cell.value < 95
        assert (cell.n, cell.clusters) == (len(texts), (len(texts) + 1) // 2)
        assert cell.low < cell.value < cell.high
        assert f"|tok:{tokenizer}|" in signatures[f"bleu_{language}"]
        assert signatures[f"bleu_{language}"].endswith(f"|version:{sacrebleu.__version__}")
    assert signatures["bleu_en"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp")
    assert bleu(pairs[:5])[0].keys() == {"bleu_en"}


def test_bleus_interval_is_that_of_corpora_of_whole_videos(monkeypatch):
    monkeypatch.setattr(interval, "RESAMPLES", 60)
    cell = bleu(pairs_of(ENGLISH, "en"), seed=3)[0]["bleu_en"]
    scores = []
    for drawn in np.concatenate([*interval.draws(3, 60, 3)]):
        texts = [pair for video in drawn for pair in ENGLISH[2 * video : 2 * video + 2]]
        found, wanted = zip(*texts, strict=True)
        scores.append(sacrebleu.corpus_bleu([*found], [[*wanted]]).score)
    np.testing.assert_allclose([cell.low, cell.high], np.quantile(scores, (0.025, 0.975)), atol=1e-9)


def test_the_right_answers_have_100():
    pairs = pairs_of([(wanted, wanted) for _, wanted in ENGLISH], "en")
    cell = bleu(pairs)[0]["bleu_en"]
    assert [round(each, 6) for each in (cell.value, cell.low, cell.high)] == [100, 100, 100]
    assert bleu(pairs_of([("", wanted) for _, wanted in ENGLISH], "en"))[0]["bleu_en"].value == 0


# What sacrebleu's tokenizers look at, in characters and in longer pieces; the last are those on both sides of what its
# zh takes for Chinese, where its ranges are not those of its comments, and half a character.
AWKWARD = [
    *"..,,--09a'&;<>()/~^", '"', " ", " ", "  ", "\n", "\t", "\x1c", "\x85", "\xa0", "\u3000", "\u2028", "é", "…", "“",
    "。", "，", "．", "视", "频", "<skipped>", "<skip", "&amp;", "&quot;", "lt;", "-\n", "1,000", "3.5s-12.5s", "U.S.",
    "don't", "\u2000", "\u2001", "\u2a6d", "\u2a6e", "\U00020000", "\ud800",
]  # fmt: skip


def awkward(rng, most):
    return "".join(rng.choices(AWKWARD, k=rng.randrange(most)))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_tokens_are_sacrebleus(language):
    tokenize, own = text.tokenizer(language), BLEU(tokenize=text.TOKENIZERS[language])
    rng = random.Random(0)
    texts = [awkward(rng, 10) for _ in range(5000)]
    texts += [each for pair in ENGLISH + CHINESE for each in pair]
    different = [each for each in texts if tokenize(each) != own._preprocess_segment(each).split()]
    assert not different
    assert len({token for each in texts for token in tokenize(each)}) > 300


def test_counts_of_ngrams_are_sacrebleus(monkeypatch):
    monkeypatch.setattr(text, "_AT_ONCE", 7)  # several blocks, the last one short
    rng = random.Random(0)
    texts = [(" ".join(rng.choices("abc", k=rng.randrange(12))), " ".join(rng.choices("abc", k=9))) for _ in range(60)]
    texts += [("", ""), ("", "a b"), ("a b c", ""), ("a a a a a a", "a a a")] + [("a b c d e", "a b c d e")] * 2
    metric = BLEU(tokenize="13a", force=True)
    expected = [metric.corpus_score([found], [[wanted]]) for found, wanted in texts]
    rows = [[*each.counts, *each.totals, each.sys_len, each.ref_len] for each in expected]
    assert text.ngrams(texts, text.tokenizer("en")).tolist() == rows
    assert text.ngrams([("", "")], text.tokenizer("zh")).tolist() == [[0] * 10]


def test_bleu_of_awkward_texts_is_sacrebleus():
    rng = random.Random(1)
    for language, tokenizer in text.TOKENIZERS.items():
        texts = [(awkward(rng, 30), awkward(rng, 30)) for _ in range(200)]
        found, wanted = zip(*texts, strict=True)
        expected = BLEU(tokenize=tokenizer, force=True).corpus_score([*found], [[*wanted]]).score
        assert bleu(pairs_of(texts, language))[0][f"bleu_{language}"].value == pytest.approx(expected, abs=1e-9)
        assert expected > 0.1
