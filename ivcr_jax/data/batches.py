"""A batch's arrays: what lies in which, and how a row is filled with the dialogues that the plan puts there."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ivcr_jax.data import prompt
from ivcr_jax.data.dialogue import LANGUAGES, Dialogue, Intent
from ivcr_jax.data.encoding import Encoded, EncodedTurn, EncodingConfig, encode, frame_ids, frame_text_length, show
from ivcr_jax.data.store import StoredVideo, VideoStore, choose_stored
from ivcr_jax.data.tokenizer import Tokenizer, encode_query


@dataclasses.dataclass(frozen=True)
class PackConfig:
    """The static shape of a row.

    Attributes:
      encoding: how a dialogue becomes tokens.
      seq_len: S, positions of a row.
      video_slots: V, distinct videos of a row.
      max_turns: R, turns of a row.
      frames: T, frames of a video.
      query_len: W, ids of a query for the first stage; 0 where batches are to hold none.
    """

    encoding: EncodingConfig = EncodingConfig()
    seq_len: int = 4096
    video_slots: int = 48
    max_turns: int = 24
    frames: int = 64
    query_len: int = 0

    def __post_init__(self) -> None:
        for name in ("seq_len", "video_slots", "max_turns", "frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")


@dataclasses.dataclass(frozen=True)
class BatchShape:
    """What of a batch's shape does not follow from the row's configuration.

    Attributes:
      kind: "frames" or "features". item_shape: of a frame's array. dtype: its.
      frame_text: L, tokens of a frame's sentence.
    """

    kind: str
    item_shape: tuple[int, ...]
    dtype: Any
    frame_text: int

    @classmethod
    def of(cls, videos: VideoStore, tokenizer: Tokenizer, config: PackConfig) -> "BatchShape":
        """Of the batches that are made from these."""
        text = frame_text_length(tokenizer, config.encoding.style)
        return cls(videos.kind, videos.item_shape, videos.dtype, text)


def empty_batch(rows: int, config: PackConfig, shape: BatchShape) -> dict[str, np.ndarray]:
    """A batch of `rows` rows that hold nothing. The shapes and dtypes of every batch are these.

    Returns a dict of (letters as in docs/architecture.md; F the shape of a frame's array, L tokens of a frame's
    sentence; -1 stands for none in slots, targets, blocks and numbers):
      tokens, targets i32[B, S]: a token and the one that follows it in its dialogue.
      loss_mask bool[B, S]: whether that target is learnt.
      segment_ids i32[B, S]: 1, 2, ... by dialogue, 0 where the row is empty.
      positions i32[B, S]: of the rotary embedding; they start anew with each dialogue.
      video_slots i32[B, S]: the slot whose visual token stands there, -1 at text.
      video_offsets i32[B, S]: which of that video's tokens.
      frames dtype[B, V, T, *F]: u8 pixels, or under the name `features` a tower's features.
      frame_times f32[B, V, T]: seconds. frame_mask bool[B, V, T]: whether the frame is there.
      frame_text i32[B, V, T, L]: the sentence with the frame's time, 0 past its end.
      durations f32[B, V]: seconds. video_mask bool[B, V]: whether the slot holds a video.
      video_numbers i32[B, V]: the video's number in its store.
      turn_mask bool[B, R]; turn_segments, turn_intents, turn_languages i32[B, R].
      turn_states i32[B, R]: index in S of the last prompt token, which the heads read.
      turn_records, turn_numbers i32[B, R]: the dialogue's record number and the turn's place in it.
      turn_videos i32[B, R]: the number of the video that is the answer of a VIDEO turn or holds a MOMENT turn's.
      candidate_slots, candidate_blocks i32[B, R, C]: a VIDEO turn's candidates: slot, and index in S of the first
        visual token. candidate_targets i32[B, R]: the place of the truth among them.
      moment_slots, moment_blocks i32[B, R]: a MOMENT turn's video. moment_spans f32[B, R, 2]: seconds.
      queries i32[B, R, W]: what the first stage reads: of a VIDEO turn what is looked for, of a MOMENT turn its
        message alone; not there where W is 0.
    """
    b, s, v, t, r = rows, config.seq_len, config.video_slots, config.frames, config.max_turns
    c = config.encoding.max_candidates

    def ints(*shape: int, fill: int = 0) -> np.ndarray:
        return np.full(shape, fill, np.int32)

    batch = {
        "tokens": ints(b, s),
        "targets": ints(b, s),
        "loss_mask": np.zeros((b, s), bool),
        "segment_ids": ints(b, s),
        "positions": ints(b, s),
        "video_slots": ints(b, s, fill=-1),
        "video_offsets": ints(b, s),
        shape.kind: np.zeros((b, v, t, *shape.item_shape), shape.dtype),
        "frame_times": np.zeros((b, v, t), np.float32),
        "frame_mask": np.zeros((b, v, t), bool),
        "frame_text": ints(b, v, t, shape.frame_text),
        "durations": np.zeros((b, v), np.float32),
        "video_mask": np.zeros((b, v), bool),
        "video_numbers": ints(b, v, fill=-1),
        "turn_mask": np.zeros((b, r), bool),
        "turn_segments": ints(b, r),
        "turn_intents": ints(b, r),
        "turn_languages": ints(b, r),
        "turn_states": ints(b, r),
        "turn_records": ints(b, r, fill=-1),
        "turn_numbers": ints(b, r, fill=-1),
        "turn_videos": ints(b, r, fill=-1),
        "candidate_slots": ints(b, r, c, fill=-1),
        "candidate_blocks": ints(b, r, c, fill=-1),
        "candidate_targets": ints(b, r, fill=-1),
        "moment_slots": ints(b, r, fill=-1),
        "moment_blocks": ints(b, r, fill=-1),
        "moment_spans": np.zeros((b, r, 2), np.float32),
    }
    if config.query_len:
        batch["queries"] = ints(b, r, config.query_len)
    return batch


def fill_row(
    batch: Mapping[str, np.ndarray],
    row: int,
    content: Sequence[tuple[int, Dialogue]],
    videos: VideoStore,
    tokenizer: Tokenizer,
    config: PackConfig,
    rng: np.random.Generator | None,
    queries: Tokenizer | None = None,
) -> list[tuple[StoredVideo, np.ndarray, np.ndarray]]:
    """Writes dialogues into a row of an empty batch, all but the frames' pixels.

    Args:
      batch: from `empty_batch`.
      row: which row.
      content: (record number, dialogue as the plan kept it) of each.
      videos, tokenizer, config: as the plan was made with.
      rng: for training: orders the candidates and draws the frames. None keeps ranks and middle frames.
      queries: the first stage's tokenizer, where the batch holds queries.

    Returns:
      The frames to decode: (video, frames chosen, the array dtype[T, *F] to write them to) of each slot.
    """
    train = rng is not None
    shown = [show(dialogue, config.encoding, insert_truth=train, rng=rng) for _, dialogue in content]
    slot_of: dict[str, int] = {}
    work = []
    times: dict[str, list[float]] = {}
    for name in dict.fromkeys(name for turns in shown for item in turns for name in item.videos):
        stored = videos.read(name)
        chosen = choose_stored(len(stored.times), config.frames, rng)
        slot = slot_of[name] = len(slot_of)
        times[name] = stored.times[chosen].tolist()
        count = len(chosen)
        batch["frame_times"][row, slot, :count] = times[name]
        batch["frame_mask"][row, slot, :count] = True
        for place, sentence in enumerate(prompt.frame_texts(times[name], config.encoding.style)):
            ids = frame_ids(tokenizer, sentence)
            batch["frame_text"][row, slot, place, : len(ids)] = ids
        batch["durations"][row, slot] = stored.duration
        batch["video_mask"][row, slot] = True
        batch["video_numbers"][row, slot] = videos.number[name]
        work.append((stored, chosen, batch[videos.kind][row, slot]))
    start = turn = 0
    for segment, ((record, _), turns) in enumerate(zip(content, shown, strict=True), start=1):
        encoded = encode(turns, tokenizer, config.encoding, times)
        if start + len(encoded.tokens) > config.seq_len:
            raise RuntimeError(
                f"record {record} does not fit where the plan puts it: the plan is of other code or data"
            )
        _place(batch, row, start, encoded, segment, slot_of)
        asked: list[str] = []
        for number, item in enumerate(encoded.turns):
            said = turns[number].turn
            if item.intent != Intent.CHAT:
                batch["turn_videos"][row, turn] = videos.number[said.video_id]
            if item.intent == Intent.VIDEO:
                asked.append(said.user)
            if item.intent != Intent.CHAT and queries is not None:
                # A moment is looked for in one video: what was asked of others says nothing of it.
                about = asked if item.intent == Intent.VIDEO else [said.user]
                batch["queries"][row, turn] = encode_query(prompt.retrieval_query(about), queries, config.query_len)
            _place_turn(batch, row, turn, start, item, encoded.videos, slot_of)
            batch["turn_segments"][row, turn] = segment
            batch["turn_records"][row, turn] = record
            batch["turn_numbers"][row, turn] = number
            turn += 1
        start += len(encoded.tokens)
    return work


def _place(
    batch: Mapping[str, np.ndarray],
    row: int,
    start: int,
    encoded: Encoded,
    segment: int,
    slot_of: Mapping[str, int],
) -> None:
    n = len(encoded.tokens)
    here = slice(start, start + n)
    batch["tokens"][row, here] = encoded.tokens
    batch["targets"][row, start : start + n - 1] = encoded.tokens[1:]
    batch["loss_mask"][row, start : start + n - 1] = encoded.learnt[1:]
    batch["segment_ids"][row, here] = segment
    batch["positions"][row, here] = encoded.positions
    slots = np.array([slot_of[name] for name in encoded.videos] + [-1], np.int32)  # -1 at the end: text's place
    batch["video_slots"][row, here] = slots[encoded.video]
    batch["video_offsets"][row, here] = encoded.offset


def _place_turn(
    batch: Mapping[str, np.ndarray],
    row: int,
    turn: int,
    start: int,
    item: EncodedTurn,
    names: Sequence[str],
    slot_of: Mapping[str, int],
) -> None:
    batch["turn_mask"][row, turn] = True
    batch["turn_intents"][row, turn] = item.intent
    batch["turn_languages"][row, turn] = LANGUAGES.index(item.language)
    batch["turn_states"][row, turn] = start + item.state
    slots = [slot_of[names[place]] for place in item.videos]
    blocks = [start + block for block in item.blocks]
    if item.intent == Intent.VIDEO:
        batch["candidate_slots"][row, turn, : len(slots)] = slots
        batch["candidate_blocks"][row, turn, : len(slots)] = blocks
        batch["candidate_targets"][row, turn] = item.target
    elif item.intent == Intent.MOMENT:
        batch["moment_slots"][row, turn] = slots[0]
        batch["moment_blocks"][row, turn] = blocks[0]
        batch["moment_spans"][row, turn] = item.span
