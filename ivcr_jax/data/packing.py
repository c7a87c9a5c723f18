"""Packing: which dialogues share a row, decided once for the whole split.

The plan is a pure function of the dialogues, the tokenizer and the configuration, so every process makes the same
one and any row can be built at any time. Lengths are upper bounds: candidates are shuffled and frames are drawn
anew each epoch, which may change how many digits are written, and the plan must hold for all of them.
"""

import dataclasses
import json
from collections.abc import Container, Iterator, Sequence

import numpy as np
from etils import epath

from ivcr_jax.data import manifest, prompt
from ivcr_jax.data.batches import PackConfig
from ivcr_jax.data.dialogue import Dialogue, Intent, renumber
from ivcr_jax.data.encoding import NO_TARGET, Shown, show, turn_texts
from ivcr_jax.data.store import DialogueStore, VideoStore
from ivcr_jax.data.tokenizer import Tokenizer

# Rows being filled at a time: more of them waste fewer positions and mix dialogues over a longer stretch.
OPEN_ROWS = 256
MEASURED_AT_ONCE = 4096
# Raised when the same data and configuration come to mean other rows: saved plans and positions are refused then.
VERSION = 3


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
