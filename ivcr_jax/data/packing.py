"""Packing: which dialogues share a row, decided once for the whole split, and a row's arrays.

The plan is a pure function of the dialogues, the tokenizer and the configuration, so every process makes the same
one and any row can be built at any time. Lengths are upper bounds: candidates are shuffled and frames are drawn
anew each epoch, which may change how many digits are written, and the plan must hold for all of them.
"""

import dataclasses
import functools
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from ivcr_jax.data import manifest, prompt
from ivcr_jax.data.dialogue import LANGUAGES, Dialogue, Intent, renumber
from ivcr_jax.data.encoding import NO_TARGET, Encoded, EncodedTurn, EncodingConfig, Shown, encode, show, turn_texts
from ivcr_jax.data.store import DialogueStore, StoredVideo, VideoStore, choose_stored
from ivcr_jax.data.tokenizer import Tokenizer, encode_query

# Rows being filled at a time: more of them waste fewer positions and mix dialogues over a longer stretch.
OPEN_ROWS = 256
MEASURED_AT_ONCE = 4096
# Raised when the same data and configuration come to mean other rows: saved plans and positions are refused then.
VERSION = 3


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
class Plan:
    """The rows of a split.

    Attributes:
      starts: i64[rows + 1]; row i holds items starts[i]..starts[i + 1].
      items: i64[n, 2], (record number, turns kept) of each packed dialogue.
      entries: what was dropped or cut, and why.
      used: positions that hold a token, by the bound.
    """

    starts: np.ndarray
    items: np.ndarray
    entries: tuple[manifest.Entry, ...]
    used: int

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, number: int) -> list[tuple[int, int]]:
        """(record number, turns kept) of each dialogue of a row."""
        return [(int(a), int(b)) for a, b in self.items[self.starts[number] : self.starts[number + 1]]]

    def report(self, seq_len: int) -> dict[str, float | int | dict[str, int]]:
        """Counts for the log: rows, dialogues, turns, the share of positions wasted, what was lost by reason."""
        lost: dict[str, int] = {}
        for entry in self.entries:
            key = f"{entry.action}: {entry.reason}"
            lost[key] = lost.get(key, 0) + 1
        return {
            "rows": len(self),
            "dialogues": len(self.items),
            "turns": int(self.items[:, 1].sum()),
            "wasted": 1 - self.used / max(len(self) * seq_len, 1),
            "lost": lost,
        }


def restrict(dialogue: Dialogue, videos: Container[str]) -> tuple[Dialogue | None, list[manifest.Entry]]:
    """The dialogue without candidates the store lacks, up to the first turn whose own video it lacks."""
    entries = []
    turns = []
    for place, turn in enumerate(dialogue.turns):
        if turn.intent != Intent.CHAT and turn.video_id not in videos:
            entries.append(
                manifest.Entry(f"{dialogue.id}#{place}", "video_id", "video_not_in_store", "cut", turn.video_id)
            )
            break
        kept = tuple(name for name in turn.candidates if name in videos)
        if len(kept) < len(turn.candidates) and turn.intent == Intent.VIDEO:
            lost = len(turn.candidates) - len(kept)
            entries.append(
                manifest.Entry(
                    f"{dialogue.id}#{place}", "candidates", "candidate_not_in_store", "repaired", f"{lost} videos"
                )
            )
        turns.append(dataclasses.replace(turn, candidates=kept))
    return (dataclasses.replace(dialogue, turns=tuple(turns)) if turns else None), entries


def make_plan(
    dialogues: DialogueStore,
    videos: VideoStore,
    tokenizer: Tokenizer,
    config: PackConfig,
    *,
    keep_chat: bool,
    seed: int | None,
    threads: int = 1,
) -> Plan:
    """Measures every dialogue and packs them into rows.

    What does not fit: a dialogue too long, with too many videos or too many turns for a row loses turns from its
    end until it fits; one whose first turn does not fit is dropped. Both are listed in `Plan.entries`.

    Args:
      dialogues, videos, tokenizer: what is read and how it is written.
      config: the row.
      keep_chat: whether dialogues of plain chat take part.
      seed: for training: of the order in which dialogues are packed. None keeps the stored order, for evaluation.
      threads: of the tokenizer.

    Raises:
      ValueError: for a tokenizer that does not write each digit as one token (lengths could not be bounded), or
        where nothing fits or nothing is left without chat.
    """
    if not tokenizer.splits_digits():
        raise ValueError(
            "the tokenizer joins digits into longer tokens, so the length of a time or a number is not known "
            "beforehand; expected one that splits digits, as those of LLaMA and Gemma do"
        )
    entries: list[manifest.Entry] = []
    train = seed is not None
    measured = list(_measure(dialogues, videos, tokenizer, config, keep_chat, train, threads, entries))
    if not measured and not entries:
        raise ValueError(f"each of the {len(dialogues)} dialogues is plain chat; expected keep_chat or other dialogues")
    if not measured:
        raise ValueError(
            f"none of the {len(dialogues)} dialogues fits a row of {config.seq_len} positions, "
            f"{config.video_slots} videos and {config.max_turns} turns: {[vars(entry) for entry in entries[:3]]}"
        )
    order = np.random.default_rng(seed).permutation(len(measured)) if train else range(len(measured))
    rows = _pack([measured[place] for place in order], config)
    items = np.array([(item.record, item.turns) for row in rows for item in row], np.int64).reshape(-1, 2)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    used = sum(item.tokens for item in measured)
    return Plan(starts.astype(np.int64), items, tuple(entries), used)


@dataclasses.dataclass(frozen=True)
class _Measured:
    record: int
    turns: int
    tokens: int
    videos: frozenset[str]


def _measure(
    dialogues: DialogueStore,
    videos: VideoStore,
    tokenizer: Tokenizer,
    config: PackConfig,
    keep_chat: bool,
    train: bool,
    threads: int,
    entries: list[manifest.Entry],
) -> Iterator[_Measured]:
    video_token = tokenizer.ids[prompt.VIDEO_TOKEN]
    width = config.encoding.tokens_per_video
    for first in range(0, len(dialogues), MEASURED_AT_ONCE):
        batch: list[tuple[int, Dialogue, list[Shown]]] = []
        texts: list[str] = []
        for record in range(first, min(first + MEASURED_AT_ONCE, len(dialogues))):
            dialogue = dialogues[record]
            if not keep_chat and all(turn.intent == Intent.CHAT for turn in dialogue.turns):
                continue
            usable, noted = restrict(dialogue, videos)
            entries += noted
            if usable is None:
                continue
            shown = _at_longest(show(usable, config.encoding, insert_truth=train))
            entries += _over_limit(usable, config.encoding.max_candidates)
            times = {
                item.turn.video_id: [videos.duration[item.turn.video_id]]
                * min(config.frames, videos.num_frames[item.turn.video_id])
                for item in shown
                if item.turn.intent == Intent.MOMENT
            }
            batch.append((record, usable, shown))
            texts += [question + answer for question, answer in turn_texts(shown, config.encoding.style, times)]
        encoded = iter(tokenizer.encode_batch(texts, num_threads=threads))
        for record, usable, shown in batch:
            tokens = 0
            fits: _Measured | None = None
            seen: set[str] = set()
            why = ""
            for place, item in enumerate(shown):
                ids = next(encoded)
                blocks = set(item.videos) - seen if config.encoding.layout == "isolated" else item.videos
                tokens += len(ids) - ids.count(video_token) + width * len(blocks)
                seen.update(item.videos)
                if not why:
                    why = _too_much(tokens, len(seen), place + 1, config)
                    if not why:
                        fits = _Measured(record, place + 1, tokens, frozenset(seen))
            if fits is None:
                entries.append(manifest.Entry(usable.id, "turns", "first_turn_too_long", "rejected", why))
                continue
            if why:
                detail = f"{len(shown) - fits.turns} turns: {why}"
                entries.append(manifest.Entry(usable.id, "turns", "too_long", "cut", detail))
            yield fits


def _at_longest(shown: Sequence[Shown]) -> list[Shown]:
    """The turns with every number that an order of candidates could change at its most digits."""
    largest = 1
    longest = []
    for item in shown:
        largest = max([largest, *item.numbers])
        if item.target != NO_TARGET and item.turn.intent == Intent.VIDEO:
            turn = dataclasses.replace(item.turn, answer=renumber(item.turn.answer, len(item.videos)))
            item = dataclasses.replace(item, turn=turn)
        elif item.turn.intent == Intent.MOMENT:
            turn = dataclasses.replace(item.turn, answer=renumber(item.turn.answer, largest))
            item = dataclasses.replace(item, turn=turn, numbers=(largest,))
        longest.append(item)
    return longest


def _over_limit(dialogue: Dialogue, limit: int) -> list[manifest.Entry]:
    return [
        manifest.Entry(
            f"{dialogue.id}#{place}",
            "candidates",
            "candidates_over_limit",
            "repaired",
            f"{len(turn.candidates)} videos",
        )
        for place, turn in enumerate(dialogue.turns)
        if turn.intent == Intent.VIDEO and len(turn.candidates) > limit
    ]


def _too_much(tokens: int, videos: int, turns: int, config: PackConfig) -> str:
    if tokens > config.seq_len:
        return f"{tokens} positions of {config.seq_len}"
    if videos > config.video_slots:
        return f"{videos} videos of {config.video_slots}"
    if turns > config.max_turns:
        return f"{turns} turns of {config.max_turns}"
    return ""


def _pack(measured: Sequence[_Measured], config: PackConfig) -> list[list[_Measured]]:
    """Best fit with a bounded number of open rows: into the fullest row that has room, else into a new one."""
    rows: list[list[_Measured]] = []
    open_rows: list[list[_Measured]] = []
    videos: list[set[str]] = []
    room = np.zeros(OPEN_ROWS, np.int64)
    turns = np.zeros(OPEN_ROWS, np.int64)
    for item in measured:
        fits = np.flatnonzero((room >= item.tokens) & (turns >= item.turns))
        for place in fits[np.argsort(room[fits], kind="stable")]:
            if len(videos[place] | item.videos) <= config.video_slots:
                break
        else:
            if len(open_rows) < OPEN_ROWS:
                place = len(open_rows)
                open_rows.append([])
                videos.append(set())
            else:
                place = int(np.argmin(room))  # the fullest is done
                rows.append(open_rows[place])
                open_rows[place], videos[place] = [], set()
            room[place], turns[place] = config.seq_len, config.max_turns
        open_rows[place].append(item)
        videos[place] |= item.videos
        room[place] -= item.tokens
        turns[place] -= item.turns
    return rows + open_rows


def frame_text_length(tokenizer: Tokenizer, style: prompt.PromptStyle) -> int:
    """Tokens of the longest sentence that goes with a frame: one of a video of under ten thousand seconds."""
    return len(_frame_ids(tokenizer, prompt.frame_texts([9999.9], style)[0]))


@functools.lru_cache(maxsize=100_000)  # times have one decimal: few sentences, written millions of times
def _frame_ids(tokenizer: Tokenizer, sentence: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(prompt.BOS + sentence))


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
      queries i32[B, R, W]: what the first stage reads in a VIDEO turn; not there where W is 0.
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
            ids = _frame_ids(tokenizer, sentence)
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
            if item.intent == Intent.VIDEO and queries is not None:
                asked.append(said.user)
                batch["queries"][row, turn] = encode_query(prompt.retrieval_query(asked), queries, config.query_len)
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


def save_plan(path: epath.PathLike, plan: Plan) -> None:
    """Writes a plan, atomically, with its manifest beside it."""
    path = epath.Path(path)
    manifest.write(path.with_suffix(".manifest.jsonl"), plan.entries)
    arrays = {"starts": plan.starts.tolist(), "items": plan.items.tolist(), "used": plan.used}
    with manifest.atomic(path) as temporary:
        temporary.write_text(json.dumps(arrays))


def load_plan(path: epath.PathLike) -> Plan:
    """Reads a plan that `save_plan` wrote."""
    path = epath.Path(path)
    arrays = json.loads(path.read_text())
    return Plan(
        np.array(arrays["starts"], np.int64),
        np.array(arrays["items"], np.int64).reshape(-1, 2),
        tuple(manifest.read(path.with_suffix(".manifest.jsonl"))),
        arrays["used"],
    )
