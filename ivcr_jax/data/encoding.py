"""A dialogue as tokens: which videos each turn shows and in what order, what is learnt, where the heads look.

Everything here is about one dialogue; `batches.py` puts several into a row. Pure functions of their arguments: the
random order of candidates comes from a generator passed in.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from ivcr_jax.data import prompt
from ivcr_jax.data.dialogue import Dialogue, Intent, Turn, renumber, video_number
from ivcr_jax.data.tokenizer import Tokenizer

Layout = Literal["isolated", "inline"]
NO_TARGET = -1


@dataclasses.dataclass(frozen=True)
class EncodingConfig:
    """How dialogues become tokens.

    Attributes:
      layout: "isolated" writes a video's block of visual tokens once a dialogue, in the turn that first shows it, all
        blocks at the same positions 0..tokens_per_video-1 and text from there on. The new blocks of a turn stand one
        after the other at its last mention of a video: text sees all of them or none, so the order of candidates
        does not change what it sees. "inline" (published) writes the block at every mention and numbers positions
        straight on.
      tokens_per_video: visual tokens of a video in the decoder.
      max_candidates: candidates a turn may show; the truth and the best ranked others are kept.
      style: the wording.
    """

    layout: Layout = "isolated"
    tokens_per_video: int = 64
    max_candidates: int = 10
    style: prompt.PromptStyle = prompt.PromptStyle()


@dataclasses.dataclass(frozen=True)
class Shown:
    """A turn with its videos in the order they are written.

    Attributes:
      turn: with the answer's video number set to the truth's place.
      videos: the candidates in their order, or the one current video, or nothing.
      numbers: the number each is written under.
      target: the place of the truth among `videos` in a VIDEO turn; -1 where it is not there.
    """

    turn: Turn
    videos: tuple[str, ...]
    numbers: tuple[int, ...]
    target: int


@dataclasses.dataclass(frozen=True)
class EncodedTurn:
    """Where a turn's heads look and what they should say.

    Attributes:
      intent, language: of the turn.
      state: index of the last prompt token, whose hidden state the heads read.
      videos: places in `Encoded.videos` of the candidates (VIDEO) or the current video (MOMENT).
      blocks: index of the first visual token of each of them.
      target: place of the truth among them, -1 for none.
      span: (start, end) in seconds in a MOMENT turn.
    """

    intent: Intent
    language: str
    state: int
    videos: tuple[int, ...]
    blocks: tuple[int, ...]
    target: int
    span: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A dialogue of n positions.

    Attributes:
      tokens: i32[n]; at a visual position the id of <VIDEOTOKEN>.
      positions: i32[n], of the rotary embedding.
      video: i32[n], place in `videos` at a visual position, -1 at text.
      offset: i32[n], which of the video's tokens stands there; 0 at text.
      learnt: bool[n], whether this token is one the model should write.
      videos: the distinct videos, in order of first mention.
      turns: one each.
    """

    tokens: np.ndarray
    positions: np.ndarray
    video: np.ndarray
    offset: np.ndarray
    learnt: np.ndarray
    videos: tuple[str, ...]
    turns: tuple[EncodedTurn, ...]


def show(
    dialogue: Dialogue, config: EncodingConfig, *, insert_truth: bool, rng: np.random.Generator | None = None
) -> list[Shown]:
    """Settles which videos each turn shows, in what order, and under what number. With `rng`, in random order.

    Where the first stage missed, `insert_truth` (for training) puts the truth in the last candidate's place, unless
    the answer names no video and so says that none fits.

    A VIDEO turn shows its candidates numbered from 1. A MOMENT turn shows its video under the number it had in the
    last list it stood in, 1 if it stood in none. The number in the answer follows.
    """
    shown: list[Shown] = []
    number_of: dict[str, int] = {}
    for turn in dialogue.turns:
        if turn.intent == Intent.VIDEO:
            videos = _candidates(turn, config.max_candidates, insert_truth)
            if rng is not None:
                videos = [videos[place] for place in rng.permutation(len(videos))]
            target = videos.index(turn.video_id) if turn.video_id in videos else NO_TARGET
            if target != NO_TARGET:
                turn = dataclasses.replace(turn, answer=renumber(turn.answer, target + 1))
            number_of |= {name: place + 1 for place, name in enumerate(videos)}
            shown.append(Shown(turn, tuple(videos), tuple(range(1, len(videos) + 1)), target))
        elif turn.intent == Intent.MOMENT:
            number = number_of.get(turn.video_id, 1)
            turn = dataclasses.replace(turn, answer=renumber(turn.answer, number))
            shown.append(Shown(turn, (turn.video_id,), (number,), 0))
        else:
            shown.append(Shown(turn, (), (), NO_TARGET))
    return shown


def _candidates(turn: Turn, limit: int, insert_truth: bool) -> list[str]:
    if not turn.candidates:
        return [turn.video_id]
    kept = list(turn.candidates[:limit])
    insert = insert_truth and video_number(turn.answer) is not None
    if turn.video_id not in kept and (insert or turn.video_id in turn.candidates):
        kept[-1] = turn.video_id
    return kept


def turn_texts(
    shown: Sequence[Shown], style: prompt.PromptStyle, times: Mapping[str, Sequence[float]]
) -> list[tuple[str, str]]:
    """The (prompt, answer) texts of the turns. `times` are each current video's frame times in seconds."""
    return prompt.render(
        [
            prompt.PromptTurn(
                user=item.turn.user,
                answer=item.turn.answer,
                intent=item.turn.intent,
                language=item.turn.language,
                numbers=item.numbers,
                times=tuple(times[item.turn.video_id]) if item.turn.intent == Intent.MOMENT else (),
            )
            for item in shown
        ],
        style,
    )


def encode(
    shown: Sequence[Shown],
    tokenizer: Tokenizer,
    config: EncodingConfig,
    times: Mapping[str, Sequence[float]],
) -> Encoded:
    """Writes a dialogue as tokens.

    Every answer is learnt, its end-of-sequence token too, save where it would teach a wrong number: in a VIDEO turn
    whose truth is not among the candidates and whose answer names one of them all the same. In the isolated layout the
    digits of the video's number are not learnt: there the rank head chooses it, and constrained decoding writes it.

    Args:
      shown: from `show`.
      tokenizer: any with the video tokens.
      config: layout and sizes.
      times: frame times in seconds of each video of a MOMENT turn.
    """
    tokens: list[np.ndarray] = []
    learnt: list[np.ndarray] = []
    state_of: list[int] = []
    length = 0
    for item, (question, answer) in zip(shown, turn_texts(shown, config.style, times), strict=True):
        ids = tokenizer.encode(question + answer)
        boundary = _common_prefix(tokenizer.encode(question), ids)
        mask = np.zeros(len(ids), bool)
        number = video_number(answer)
        mask[boundary:] = item.turn.intent != Intent.VIDEO or item.target != NO_TARGET or number is None
        if number is not None and item.videos and config.layout == "isolated":
            first, last = (_common_prefix(tokenizer.encode(question + answer[:end]), ids) for end in number[1:])
            mask[first:last] = False
        tokens.append(np.asarray(ids, np.int32))
        learnt.append(mask)
        state_of.append(length + boundary - 1)
        length += len(ids)
    return _expand(
        np.concatenate(tokens), np.concatenate(learnt), state_of, shown, tokenizer.ids[prompt.VIDEO_TOKEN], config
    )


def _common_prefix(prefix: Sequence[int], whole: Sequence[int]) -> int:
    """How many of the first tokens agree; all of `prefix` unless a token spans the border."""
    for place, (a, b) in enumerate(zip(prefix, whole, strict=False)):
        if a != b:
            return place
    return min(len(prefix), len(whole))


def _expand(
    tokens: np.ndarray,
    learnt: np.ndarray,
    state_of: Sequence[int],
    shown: Sequence[Shown],
    video_token: int,
    config: EncodingConfig,
) -> Encoded:
    """Puts the videos' blocks in the place of the <VIDEOTOKEN>s."""
    isolated = config.layout == "isolated"
    width = config.tokens_per_video
    mentions = [name for item in shown for name in item.videos]
    places = np.flatnonzero(tokens == video_token)
    if len(places) != len(mentions):
        raise ValueError(f"{len(places)} video tokens in the text for {len(mentions)} videos shown")
    number_of = {name: place for place, name in enumerate(dict.fromkeys(mentions))}
    numbers = [number_of[name] for name in mentions]
    ends = np.cumsum([len(item.videos) for item in shown])  # ends[i]: mentions up to and with turn i
    repeats = np.where(tokens == video_token, 0, 1)
    # written: the video of each block, in the order they stand; block_of: which of the blocks a mention means
    if isolated:
        written, block_of = list(number_of.values()), numbers
        seen: set[str] = set()
        for item, end in zip(shown, ends, strict=True):
            if new := set(item.videos) - seen:
                repeats[places[end - 1]] = width * len(new)
                seen |= new
    else:
        written, block_of = numbers, list(range(len(numbers)))
        repeats[places] = width
    start = np.concatenate([[0], np.cumsum(repeats)])  # start[i]: new index of old token i
    visual = np.repeat(tokens == video_token, repeats)
    video = np.full(len(visual), -1, np.int32)
    offset = np.zeros(len(visual), np.int32)
    video[visual] = np.repeat(written, width)
    offset[visual] = np.tile(np.arange(width), len(written))
    blocks = np.flatnonzero(visual)[::width][block_of].tolist()
    if isolated:
        text = width - 1 + np.cumsum(~visual) if mentions else np.arange(len(visual))
        positions = np.where(visual, offset, text)
    else:
        positions = np.arange(len(visual))
    turns = []
    for item, state, end in zip(shown, state_of, ends, strict=True):
        here = slice(end - len(item.videos), end)
        turns.append(
            EncodedTurn(
                intent=item.turn.intent,
                language=item.turn.language,
                state=int(start[state]),
                videos=tuple(numbers[here]),
                blocks=tuple(blocks[here]),
                target=item.target,
                span=item.turn.span,
            )
        )
    return Encoded(
        tokens=np.repeat(tokens, repeats),
        positions=positions.astype(np.int32),
        video=video,
        offset=offset,
        learnt=np.repeat(learnt, repeats),
        videos=tuple(number_of),
        turns=tuple(turns),
    )


def frame_text_length(tokenizer: Tokenizer, style: prompt.PromptStyle) -> int:
    """Tokens of the longest sentence that goes with a frame: one of a video of under ten thousand seconds."""
    return len(frame_ids(tokenizer, prompt.frame_texts([9999.9], style)[0]))


@functools.lru_cache(maxsize=100_000)  # times have one decimal: few sentences, written millions of times
def frame_ids(tokenizer: Tokenizer, sentence: str) -> tuple[int, ...]:
    """Token ids of a frame's sentence."""
    return tuple(tokenizer.encode(prompt.BOS + sentence))
