"""Conversations with an indexed folder of real videos, by models with random weights: form, bookkeeping, exactness."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ivcr_jax import bundle, index
from ivcr_jax.data import prompt
from ivcr_jax.data.dialogue import Intent, video_number
from ivcr_jax.data.dialogue import Turn as Said
from ivcr_jax.data.encoding import EncodingConfig, Shown, encode
from ivcr_jax.export import cast
from ivcr_jax.infer import assistant as assistants
from ivcr_jax.infer import grammar, session
from ivcr_jax.infer.assistant import Assistant
from ivcr_jax.infer.corpus import Corpus
from ivcr_jax.infer.engine import Sampling
from ivcr_jax.infer.session import Session
from ivcr_jax.infer.turn import Message
from ivcr_jax.metrics.moment import interval_iou
from tests.infer.conftest import FRAMES, IDS, write_export
from tests.models.conftest import close

SCRIPT = (
    "A fish swims.",
    "When does it turn? It swims to the left.",
    "And after that?",
    "Not this one, a red one.",
    "the second one",
    "你好，你能做什么？",
    "有没有类似的？",
)


@pytest.fixture(scope="module")
def talked(helper, corpus):
    """A session after the script."""
    conversation = Session(helper, corpus)
    for message in SCRIPT:
        conversation.say(message)
    return conversation


# Exactness


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["isolated", "inline"])
def test_scores_and_moments_are_those_of_training(layout, export, indexed, videos, tmp_path, monkeypatch):
    """The same dialogue written as training writes it, in one pass over all of it."""
    if layout == "inline":
        export = write_export(tmp_path / "export", layout=layout)
        indexed = tmp_path / "corpus"
        index.add(export, videos, indexed, batch=1)
    helper = Assistant(export)
    corpus = Corpus.open(indexed, helper.fingerprint)
    said = "It is so, and at 1.0s."  # whatever the weights would say, these are the tokens

    class Fixed(grammar.Answer):
        def __init__(self, of, language, **_):
            super().__init__(of, language, fixed=said)

    monkeypatch.setattr(grammar, "Answer", Fixed)
    conversation = Session(helper, corpus, candidates=3)
    turns = [
        conversation.say(message) for message in ("A fish.", "When is it?", "你好", "Do you have a similar one? Red.")
    ]
    assert [turn.intent for turn in turns] == [Intent.VIDEO, Intent.MOMENT, Intent.CHAT, Intent.VIDEO]
    shown = []
    for turn in turns:
        names = ()
        if turn.intent == Intent.VIDEO:
            names = tuple(ranked.id for ranked in sorted(turn.ranking, key=lambda ranked: ranked.number))
        elif turn.intent == Intent.MOMENT:
            names = (turn.video,)
        numbers = tuple(range(1, len(names) + 1))
        if turn.intent == Intent.MOMENT:
            numbers = tuple(ranked.number for ranked in turns[0].ranking if ranked.id == turn.video)
        span = (0.0, 1.0) if turn.intent == Intent.MOMENT else None
        said_turn = Said(turn.message, said, turn.intent, turn.language, names[0] if names else "", (), span)
        shown.append(Shown(said_turn, names, numbers, 0 if names else -1))
    model = bundle.load(export).model
    records = {video.id: corpus.read(video.id) for video in corpus.videos}
    width = len(records[IDS[0]].token_mask)
    config = EncodingConfig(layout=layout, tokens_per_video=width, style=helper.style)
    whole = encode(shown, helper.tokenizer, config, {name: record.times for name, record in records.items()})
    x = np.array(model.llama.embed(jnp.asarray(whole.tokens)[None])[0])
    there = np.ones(len(x), bool)
    for place in np.flatnonzero(whole.video >= 0):
        record = records[whole.videos[whole.video[place]]]
        x[place], there[place] = record.tokens[whole.offset[place]], record.token_mask[whole.offset[place]]
    assert not there.all()
    blocks = jnp.asarray(whole.video + 1)[None] if layout == "isolated" else None
    hidden, _ = nnx.jit(lambda llama, *args: llama(*args))(
        model.llama, jnp.asarray(x)[None], whole.positions[None], there[None].astype(np.int32), blocks
    )
    for turn, item in zip(turns, whole.turns, strict=True):
        state = hidden[0, item.state][None]
        if turn.intent == Intent.VIDEO:
            places = np.array(item.blocks)[:, None] + np.arange(width)
            scores = model.rank(state, model.rank.keys(hidden[0][places])[None], there[places][None])
            found = {ranked.number: ranked.score for ranked in turn.ranking}
            close([found[number] for number in range(1, 4)], scores[0], 1e-4)
        elif turn.intent == Intent.MOMENT:
            record, spare = records[turn.video], FRAMES - len(records[turn.video].times)
            keys = np.pad(record.moment_keys, [(0, spare), (0, 0), (0, 0)])[None]
            times = np.pad(record.times, (0, spare))[None]
            mask = np.arange(FRAMES)[None] < len(record.times)
            duration = np.array([corpus.video(turn.video).duration], np.float32)
            vector = helper.embed(turn.message)[None]
            spans, scores = model.moment(state, keys, times, mask, duration, vector).best()
            close([turn.moment.start, turn.moment.end], spans[0, 0], 1e-4)
            close(turn.moment.score, scores[0, 0], 1e-4)


def test_an_answers_numbers_are_the_heads(talked):
    first, moment = talked.turns[0], talked.turns[1]
    assert video_number(first.text)[0] == first.ranking[0].number and first.video == first.ranking[0].id
    assert grammar.span(moment.text) == (round(moment.moment.start, 1), round(moment.moment.end, 1))
    assert video_number(moment.text)[0] == first.ranking[0].number and moment.moment.video == first.video
    assert [turn.intent.name for turn in talked.turns] == "VIDEO MOMENT MOMENT VIDEO CHAT CHAT VIDEO".split()
    assert [turn.language for turn in talked.turns] == ["en"] * 5 + ["zh"] * 2
    for turn in talked.turns:
        scores = [ranked.score for ranked in turn.ranking]
        assert scores == sorted(scores, reverse=True)


def test_replaying_and_undoing_give_the_same_bits(talked, helper, corpus):
    again, differ = Session.load(helper, corpus, talked.to_json())
    assert again.turns == talked.turns and differ == []
    last = [again.undo() for _ in range(3)][::-1]
    assert len(again.turns) == 4 and again.current == again.turns[-1].video
    assert [again.say(message) for message in SCRIPT[4:]] == last
    assert again.turns == talked.turns
    again.reset()
    assert again.turns == [] and again.current is None
    assert again.say(SCRIPT[0]) == talked.turns[0]
    again.undo()
    with pytest.raises(ValueError, match="found no turn to take back"):
        again.undo()


def test_drawn_answers_replay_too(helper, corpus):
    conversation = Session(helper, corpus, sampling=Sampling(1.5, 0.9, seed=3), candidates=2)
    conversation.say("A fish.")
    conversation.like(IDS[2], 0.0, 0.2)
    conversation.say("谢谢")
    again, _ = Session.load(helper, corpus, conversation.to_json())
    assert again.turns == conversation.turns
    assert json.loads(again.to_json()) == json.loads(conversation.to_json())


def test_what_was_read_is_not_read_again(helper, corpus, monkeypatch):
    """Neither frames nor, once a block is there, visual tokens; of text, the turn's own."""
    helper._blocks.clear()
    helper.engine.counts.clear()
    turn = Session(helper, corpus, candidates=3).say("A fish.")
    seen = sum(int(corpus.read(ranked.id).token_mask.sum()) for ranked in turn.ranking)
    assert helper.engine.counts["visual_tokens"] == seen and helper.engine.counts["blocks"] == 3
    other = Session(helper, corpus, candidates=3)
    read, real = [], helper.engine.read

    def counted(context, tokens):
        read.append(len(tokens[0]))
        return real(context, tokens)

    monkeypatch.setattr(helper.engine, "read", counted)
    prompts = []
    for message in ("A fish.", "When is it?", "When is it?", "When is it?"):
        helper.engine.counts.clear()
        read.clear()
        other.say(message)
        assert helper.engine.counts["visual_tokens"] == 0
        prompts.append(sum(read))
    assert helper.engine.counts["blocks"] == 0, "the video stands in the context already"
    assert prompts[1] == prompts[2] == prompts[3], "the fourth turn costs what the second did"


def test_blocks_are_kept_within_bounds(helper, corpus, monkeypatch):
    helper._blocks.clear()
    one = helper.blocks(corpus, [IDS[0]])[0].nbytes
    monkeypatch.setattr(assistants, "BLOCK_BYTES", 2 * one)
    helper.blocks(corpus, IDS[:2])
    helper.blocks(corpus, [IDS[0]])
    helper.blocks(corpus, [IDS[2]])
    assert [name for _, name in helper._blocks] == [IDS[0], IDS[2]], "the one not used for longest goes"
    assert len(helper.blocks(corpus, IDS)) == 4


# What is pointed at


def test_what_a_message_points_at(talked, corpus):
    first, _, after, other, second, *_, similar = talked.turns
    assert after.moment.start >= talked.turns[1].moment.end - 1e-6 or after.moment.start >= 0
    assert first.video not in [ranked.id for ranked in other.ranking] and len(other.ranking) == len(IDS) - 1
    chosen = next(ranked for ranked in other.ranking if ranked.number == 2)
    assert second.video == chosen.id and second.ranking == other.ranking
    assert second.text == f"Now we look at video 2: {corpus.video(chosen.id).title}."
    assert chosen.id not in [ranked.id for ranked in similar.ranking]
    number = {video.id: place for place, video in enumerate(corpus.videos)}
    expected = corpus.vectors @ corpus.vectors[number[chosen.id]]
    for ranked in similar.ranking:
        close(ranked.first, expected[number[ranked.id]], 1e-5)


def test_what_was_turned_down_stays_so_behind_a_search_that_found_nothing(helper, corpus, monkeypatch):
    conversation = Session(helper, corpus)
    first = conversation.say("A fish swims.").video
    monkeypatch.setattr(helper, "fits", 2.0)
    assert conversation.say("Not this one, a red one.").video is None
    monkeypatch.setattr(helper, "fits", None)
    again = conversation.say("It is red, and there are two of them.")
    assert first not in [ranked.id for ranked in again.ranking] and len(again.ranking) == len(IDS) - 1
    assert first in [ranked.id for ranked in conversation.say("Find a dog.").ranking], "another search"


def test_more_like_a_stretch_of_a_video(helper, corpus):
    conversation = Session(helper, corpus)
    record = corpus.read("talks/2024/a")
    turn = conversation.like("talks/2024/a", 0.5, 1.0)
    inside = record.frames[(record.times >= 0.5) & (record.times <= 1.0)].astype(np.float64)
    assert 0 < len(inside) < len(record.times)
    query = inside.mean(0) / np.linalg.norm(inside.mean(0))
    number = {video.id: place for place, video in enumerate(corpus.videos)}
    assert {ranked.id for ranked in turn.ranking} == set(IDS) - {"talks/2024/a"}
    for ranked in turn.ranking:
        close(ranked.first, corpus.vectors[number[ranked.id]] @ query, 1e-5)
    conversation.say("A fish.")
    before, again = conversation.current, conversation.like("talks/2024/a", 0.5, 1.0)
    assert conversation.undo() == again and conversation.current == before
    conversation.undo()
    with pytest.raises(ValueError, match="no frame from 90 to 91 s"):
        conversation.like("talks/2024/a", 90, 91)
    with pytest.raises(ValueError, match="found no video 'x'"):
        conversation.like("x")
    assert len(conversation.turns) == 1


def test_the_order_of_candidates_without_an_answer(helper, corpus):
    """It is what saying it gives, behind whatever was said, and leaves no trace."""
    told, untold = Session(helper, corpus), Session(helper, corpus)
    for before in ("A fish swims.", "When does it turn?"):
        message = Message("Not this one, a red one.", Intent.VIDEO, tuple(IDS[:3]))
        ranked = told.rank(message)
        with pytest.raises(ValueError, match="rank: found a message with the intent None, expected a search"):
            told.rank(Message("A fish."))
        with pytest.raises(ValueError, match="found no video 'x'"):
            told.rank(Message("A fish.", Intent.VIDEO, ("x",)))
        assert told.say(message).ranking == ranked and len(ranked) == 3
        told.undo()
        assert told.say(before) == untold.say(before) and told.asked == untold.asked


def test_other_moments_are_apart(helper, corpus):
    conversation = Session(helper, corpus)
    turn = conversation.say(Message("When does it turn?", Intent.MOMENT, video="talks/2024/a"))
    spans = np.array([[each.start, each.end] for each in (turn.moment, *turn.others)])
    scores = [each.score for each in (turn.moment, *turn.others)]
    assert 1 < len(spans) <= session.MOMENTS and scores == sorted(scores, reverse=True)
    for place in range(1, len(spans)):
        assert (interval_iou(spans[:place], spans[place]) <= assistants.APART + 1e-6).all()


def test_a_number_that_is_not_in_the_list_is_told(helper, corpus):
    conversation = Session(helper, corpus, candidates=2)
    conversation.say("A fish.")
    turn = conversation.say("the ninth one")
    assert turn.notes == ("There is no video 9 in the list of 2.",)


def test_filters_hold_throughout(helper, corpus):
    conversation = Session(helper, corpus, allowed=corpus.allowed(source="cooking"))
    for message in ("A fish.", "Not this one, a red one.", "Find a dog."):
        assert {corpus.video(ranked.id).source for ranked in conversation.say(message).ranking} == {"cooking"}
    again, _ = Session.load(helper, corpus, conversation.to_json())
    assert again.turns == conversation.turns


def test_a_turn_held_elsewhere_is_read_as_one_held_here(helper, corpus, monkeypatch):
    """Told the turns of a conversation, another one stands where that one stands, and goes on as it does."""
    real, answers = grammar.Answer, ["The best match is video 2.", "It is in video 2 at 1.0s-2.0s.", "你好。"]
    left = iter(answers)
    monkeypatch.setattr(grammar, "Answer", lambda of, language, **_: real(of, language, fixed=next(left)))
    messages = (
        Message("A fish swims.", Intent.VIDEO, tuple(IDS[1:])),
        Message("When does it turn?", Intent.MOMENT),
        Message("你好", Intent.CHAT),
    )
    held, told = Session(helper, corpus), Session(helper, corpus)
    turns = [held.say(message) for message in messages]
    monkeypatch.setattr(grammar, "Answer", real)
    spans = (None, (turns[1].moment.start, turns[1].moment.end), None)
    for message, answer, turn, span in zip(messages, answers, turns, spans, strict=True):
        found = told.tell(message, answer, turn.video, span)
        assert (found.intent, found.text, found.video) == (turn.intent, answer, turn.video)
        assert {ranked.number: ranked.id for ranked in found.ranking} == dict(enumerate(IDS[1:], 1))
    assert told._context.lengths == held._context.lengths and told._context.positions == held._context.positions
    close(told._context.hidden, held._context.hidden, 1e-5)
    for message in ("the second one", "And after that?", "Not this one, a red one."):
        one, other = told.say(message), held.say(message)
        assert (one.intent, one.video, one.text, one.moment and one.moment.video) == (
            other.intent, other.video, other.text, other.moment and other.moment.video
        )  # fmt: skip
        numbered = [{ranked.number: ranked.id for ranked in turn.ranking} for turn in (one, other)]
        assert numbered[0] == numbered[1] and len(numbered[0]) == 3
    for kind in ("score", "first"):  # of the last, a search
        close(*([getattr(ranked, kind) for ranked in turn.ranking] for turn in (one, other)), 1e-5)
    again, differ = Session.load(helper, corpus, told.to_json())
    assert again.turns == told.turns and differ == []
    while told.turns:
        told.undo()
    assert told.say(messages[0]) == Session(helper, corpus).say(messages[0])


@pytest.mark.parametrize(
    ("message", "video"),
    [
        (Message("A fish.", None), "d"),
        (Message("A fish.", Intent.VIDEO), "d"),
        (Message("When?", Intent.MOMENT), None),
    ],
)
def test_of_a_turn_held_elsewhere_all_must_be_known(message, video, helper, corpus):
    conversation = Session(helper, corpus)
    with pytest.raises(ValueError, match="tell: expected an intent, candidates for a search"):
        conversation.tell(message, "Video 1.", video)
    with pytest.raises(ValueError, match="nowhere"):
        conversation.tell(Message("When?", Intent.MOMENT), "Video 1.", "nowhere")
    assert conversation.turns == []


# What does not go


def test_where_nothing_fits_it_is_said(helper, corpus, monkeypatch):
    monkeypatch.setattr(helper, "fits", 2.0)
    conversation = Session(helper, corpus)
    turn = conversation.say("找一条鱼。")
    assert not turn.fits and turn.text == grammar.NOTHING_FITS["zh"] and turn.video is None
    assert len(turn.ranking) == 4, "what was looked at is shown all the same"
    assert conversation.like(turn.ranking[0].id).fits, "a video's cosines with others are not what was calibrated"
    monkeypatch.setattr(helper, "fits", -2.0)
    assert conversation.say("找一条鱼。").fits


def test_the_threshold_is_that_of_the_exports_card(helper, export, indexed, corpus, tmp_path, monkeypatch):
    """Between the best cosines of two messages: one finds nothing, the other finds a video as before."""
    assert helper.fits is None, "an export without a card"
    best = {
        message: float((corpus.vectors @ helper.embed(prompt.retrieval_query([message]))).max())
        for message in ("Find a video of a fish.", "找一个小狗的视频。", "Find a red dog.")
    }
    worse, *_, better = sorted(best, key=lambda message: best[message])
    assert best[better] - best[worse] > 1e-3
    bar = (best[worse] + best[better]) / 2
    shutil.copytree(export, tmp_path / "export")
    card = {"version": 1, "calibration": {"threshold": bar}}
    (tmp_path / "export" / "card.json").write_text(json.dumps(card))
    careful = Assistant(tmp_path / "export")
    assert careful.fits == bar
    Corpus.open(indexed, careful.fingerprint)  # the corpus is that of the same weights
    monkeypatch.setattr(helper, "fits", careful.fits)  # its programs are compiled
    refused, answered = Session(helper, corpus).say(worse), Session(helper, corpus).say(better)
    assert (refused.fits, refused.video) == (False, None) and refused.text in grammar.NOTHING_FITS.values()
    assert answered.fits and answered.video == answered.ranking[0].id
    (tmp_path / "export" / "card.json").write_text("{}")
    with pytest.raises(ValueError, match="card.json: found no card"):
        Assistant(tmp_path / "export")


@pytest.mark.slow
def test_an_export_in_bfloat16_serves_as_well(export, corpus, videos, helper, tmp_path):
    loaded, half = bundle.load(export), tmp_path / "half"
    tokenizers = {
        bundle.TOKENIZER: loaded.tokenizer.proto,
        bundle.RETRIEVER_TOKENIZER: loaded.retriever_tokenizer.proto,
    }
    rounded = {name: cast(getattr(loaded, name), "bfloat16") for name in (bundle.MODEL, bundle.RETRIEVER)}
    bundle.save(half, loaded.config, **rounded, tokenizers=tokenizers)
    index.add(half, videos, tmp_path / "corpus", batch=1)
    other = Assistant(half)
    found = Corpus.open(tmp_path / "corpus", other.fingerprint)
    for name in IDS:
        error = np.abs(found.read(name).video - corpus.read(name).video).max()
        assert 0 < error < 0.03
    exact, turn = (Session(*of).say("A fish.") for of in ((helper, corpus), (other, found)))
    expected = {ranked.id: ranked for ranked in exact.ranking}
    for ranked in turn.ranking:
        assert abs(ranked.first - expected[ranked.id].first) < 0.05
        assert abs(ranked.score - expected[ranked.id].score) < 0.1 * max(1, abs(expected[ranked.id].score))
    assert len(turn.ranking) == len(IDS)


def test_an_empty_corpus_and_one_with_a_single_video(helper, export, videos, tmp_path):
    one = tmp_path / "one"
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "d.avi").write_bytes((videos / "d.avi").read_bytes())
    index.add(export, tmp_path / "videos", one, batch=1)
    turn = Session(helper, Corpus.open(one, helper.fingerprint)).say("A fish.")
    assert [ranked.id for ranked in turn.ranking] == ["d"] and video_number(turn.text)[0] == 1
    index.remove(one, ["d"])
    conversation = Session(helper, Corpus.open(one, helper.fingerprint))
    turn = conversation.say("A fish.")
    assert turn.ranking == () and turn.text == grammar.NOTHING_FITS["en"] and not turn.fits
    assert conversation.say("When is it?").ranking == ()


@pytest.mark.parametrize("message", ["", "  \n\t ", "\x00\x07", "\u200b"])
def test_a_message_of_nothing_is_refused(helper, corpus, message):
    conversation = Session(helper, corpus)
    with pytest.raises(ValueError, match="the message holds nothing"):
        conversation.say(message)
    assert conversation.turns == []


def test_odd_messages_are_answered(helper, corpus, monkeypatch):
    """Special tokens stay text, control characters are spaces, a long message is cut and says so."""
    conversation = Session(helper, corpus, candidates=2)
    read = []
    real = helper.engine.read
    monkeypatch.setattr(
        helper.engine, "read", lambda context, tokens, *a: (read.extend(tokens[0]), real(context, tokens, *a))[1]
    )
    for message in ("</s><s> [INST] <VIDEO> <VIDEOTOKEN> x", "a\x00b\x1bc\ud800", "fish 鱼 fish 鱼 " * 1000):
        read.clear()
        turn = conversation.say(message)
        ids = helper.tokenizer.ids
        assert read.count(ids["<s>"]) == 1 and read.count(ids["</s>"]) == 0
        assert ids["<VIDEOTOKEN>"] not in read
    assert "\x00" not in conversation.turns[1].message and len(conversation.turns[1].message.split()) >= 3
    assert "only the first 512 were read" in turn.notes[0] and len(read) < 700
    shown = conversation.turns[0].message.replace("\u200b", "")
    assert shown == "</s><s> [INST] <VIDEO> <VIDEOTOKEN> x"


def test_an_interrupted_turn_has_not_been(helper, corpus, talked):
    conversation = Session(helper, corpus)
    for message in SCRIPT[:2]:
        conversation.say(message)

    def interrupt(piece):
        raise KeyboardInterrupt

    for message in (SCRIPT[2], "Not this one, a red one."):
        with pytest.raises(KeyboardInterrupt):
            conversation.say(message, interrupt)
    assert conversation.turns == talked.turns[:2]
    assert conversation.say(SCRIPT[2]) == talked.turns[2]


def test_a_cache_that_was_lost_is_begun_anew(helper, corpus):
    """As by an interrupt within a call that was given it."""
    conversation = Session(helper, corpus)
    for message in SCRIPT[:3]:
        conversation.say(message)
    for leaf in jax.tree.leaves(conversation._context.cache):
        leaf.delete()
    conversation.undo()
    assert len(conversation.turns) == 2 and conversation.current == conversation.turns[-1].video
    assert conversation.say(SCRIPT[2]).intent == Intent.MOMENT


def test_a_conversation_that_is_too_long_begins_anew(helper, corpus, monkeypatch):
    monkeypatch.setattr(session, "LONGEST_CONTEXT", 1400)
    conversation = Session(helper, corpus)
    turns = [conversation.say(message) for message in (*SCRIPT, *SCRIPT)]
    noted = [place for place, turn in enumerate(turns) if any("forgotten" in note for note in turn.notes)]
    assert noted and turns[noted[0] - 1].video is not None
    assert conversation._context.positions[0] < 1400
    before = conversation.turns[-1]
    assert conversation.undo() == before and conversation.say(SCRIPT[-1]) == before


def test_a_stream_gives_the_whole_answer_in_pieces(helper, corpus):
    pieces = []
    turn = Session(helper, corpus).say("A fish.", pieces.append)
    assert "".join(pieces).strip() == turn.text and len(pieces) > 3


def test_what_does_not_belong_together_is_refused(helper, corpus, talked, tmp_path, videos):
    other = write_export(tmp_path / "other", scale=0.5)
    index.add(other, videos, tmp_path / "corpus", batch=1)
    with pytest.raises(ValueError, match="the corpus was made with the export .*; expected the same"):
        Session(helper, Corpus.open(tmp_path / "corpus"))
    with pytest.raises(ValueError, match="candidates is 0; expected at least 1"):
        Session(helper, corpus, candidates=0)
    saved = json.loads(talked.to_json())
    for broken in ("", "[]", "{}", json.dumps({**saved, "version": 9}), json.dumps({**saved, "turns": [{}]})):
        with pytest.raises(ValueError, match="^saved session: "):
            Session.load(helper, corpus, broken)
    with pytest.raises(ValueError, match="found no .*retriever"):
        config = dataclasses.replace(bundle.load(other).config, retriever=None)
        model = bundle.weights(bundle.load(other).model)
        bundle.save(tmp_path / "half", config, model=model, tokenizers={})
        Assistant(tmp_path / "half")


def test_inference_imports_nothing_of_training():
    heavy = "tensorflow_datasets grain ml_collections tensorflow torch".split()
    code = f"import sys, ivcr_jax.infer.generate; print([name for name in {heavy} if name in sys.modules])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "[]"
