"""The source: IVCR-200K's JSON, one list of dialogues, read as a stream, validated row by row.

Turns raw rows (docs/data.md lists the fields) into `Dialogue`s and manifest entries; a bad row never stops it.
It knows the tree of videos only as a catalogue of ids and durations; it decodes no frame and writes no dataset.
"""

import codecs
import dataclasses
import functools
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import ijson
from etils import epath

from ivcr_jax.data import prompt, video
from ivcr_jax.data.dialogue import (
    CHAT_TYPE,
    INDEPENDENT_TYPE,
    VIDEO_SUFFIXES,
    Dialogue,
    Intent,
    Turn,
    language_of,
    video_id,
)
from ivcr_jax.data.manifest import Entry

# Where the source lies in its folder.
DIALOGUES_FILE = "IVCR-200K.json"
VIDEOS_FOLDER = "videos"

SPLITS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
UNKNOWN_TYPE = -1
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class SourceError(Exception):
    """The source file as a whole cannot be used: absent, not JSON, or not a list of dialogues."""


class _Utf8:
    """A binary reader whose bytes are valid UTF-8 without a mark: undecodable bytes become U+FFFD."""

    def __init__(self, file: Any):
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")

    def read(self, size: int = -1) -> bytes:
        while True:
            chunk = self._file.read(size)
            text = self._decoder.decode(chunk, final=not chunk)
            if text or not chunk or size == 0:  # a chunk may end inside its first character
                return text.encode("utf-8")


def stream_rows(path: epath.PathLike) -> Iterator[Any]:
    """Yields the items of a JSON file that is one list, in order, without holding the list.

    Raises:
      SourceError: when the file is absent or is not a list; and, after the rows before it were yielded, where
        the JSON is cut off or malformed. An unknown number of rows is lost then.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise SourceError(f"{path}: no such file; expected the list of dialogues, e.g. IVCR-200K.json")
    count = 0
    with path.open("rb") as file:
        reader = _Utf8(file)
        try:
            events = ijson.basic_parse(reader, use_float=True)
            first = next(events, (None, None))
            if first[0] != "start_array":
                raise SourceError(f"{path}: starts with {first[0]}; expected a JSON list of dialogues")
            builder = ijson.ObjectBuilder()
            depth = 0
            for event, value in events:
                if event == "end_array" and depth == 0:
                    continue
                builder.event(event, value)
                if event in ("start_map", "start_array"):
                    depth += 1
                elif event in ("end_map", "end_array"):
                    depth -= 1
                if depth == 0:
                    yield builder.value
                    count += 1
                    builder = ijson.ObjectBuilder()
        except ijson.JSONError as error:
            reason = " ".join(str(error).split("\n")[0].split())
            raise SourceError(
                f"{path}: the JSON is cut off or malformed after {count} rows ({reason}); what follows is lost"
            ) from None


@dataclasses.dataclass(frozen=True)
class VideoFile:
    """A video of the tree: its id and path, and size and time of change (ns), by which another content shows."""

    id: str
    path: epath.Path
    size: int
    changed: int


class VideoCatalog:
    """The videos below a root folder, by id (`corpus/name`, without suffix).

    Attributes:
      root: the folder.
      files: id -> VideoFile, in order of id.
      problems: manifest entries for files that share an id with another; the first by path is kept.
    """

    def __init__(self, root: epath.PathLike):
        self.root = epath.Path(root)
        if not self.root.is_dir():
            raise SourceError(f"{self.root}: no such folder; expected the tree of videos <corpus>/<name>.<ext>")
        self.files: dict[str, VideoFile] = {}
        self.problems: list[Entry] = []
        for path in sorted(_walk(self.root)):
            if path.suffix.lower() not in VIDEO_SUFFIXES:
                continue
            relative = path.relative_to(self.root).as_posix()
            name = video_id(relative)
            if name in self.files:
                kept = self.files[name].path.name
                self.problems.append(
                    Entry(name, "path", "duplicate_video_id", "rejected", f"{relative}: {kept} has the same id")
                )
                continue
            stat = os.stat(path)  # epath's own has whole seconds only
            self.files[name] = VideoFile(name, path, stat.st_size, stat.st_mtime_ns)
        self.files = dict(sorted(self.files.items()))

    @functools.cache  # noqa: B019 - the catalogue lives as long as the build
    def duration(self, name: str) -> float | str:
        """The duration in seconds as the file's header has it, or the reason why the video cannot be used."""
        file = self.files.get(name)
        if file is None:
            return "video_missing"
        try:
            return video.probe(str(file.path), scan=False).duration
        except video.VideoError as error:
            return error.reason


def _walk(folder: epath.Path) -> Iterator[epath.Path]:
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _walk(path)
        else:
            yield path


class RowReader:
    """Validates rows one after the other. Keeps the ids seen, the manifest entries, and what was lost.

    Attributes:
      seen: interactions (human messages) met so far; a row that shows none counts as one.
      kept: interactions that are in a returned dialogue.
      entries: manifest entries since the last `take_entries`.
    """

    def __init__(self, catalog: VideoCatalog | None = None):
        self._catalog = catalog
        self._ids: set[str] = set()
        self._index = 0
        self.seen = 0
        self.kept = 0
        self.entries: list[Entry] = []

    def read(self, row: Any) -> Dialogue | None:
        """The dialogue of a raw row, or None where nothing of it can be used."""
        index, self._index = self._index, self._index + 1
        fallback_id = f"row-{index:07d}"
        if not isinstance(row, Mapping):
            self.seen += 1
            self._note(fallback_id, "", "not_an_object", "rejected", f"{type(row).__name__}")
            return None
        name = self._identify(row, fallback_id)
        conversations = row.get("conversations")
        humans = _count_humans(conversations)
        self.seen += max(humans, 1)
        if not isinstance(conversations, list) or not conversations:
            self._note(name, "conversations", "no_conversation", "rejected", repr(conversations)[:80])
            return None
        split = SPLITS.get(str(row.get("split", "")).strip().lower())
        if split is None:
            self._note(name, "split", "unknown_split", "rejected", repr(row.get("split")))
            return None
        kind = self._type(row.get("type"), name)
        turns: list[Turn] = []
        for number, (human, gpt) in self._pairs(conversations, name):
            turn = self._turn(human, gpt, kind, f"{name}#{number}", turns)
            if turn is not None:
                turns.append(turn)
            elif kind != INDEPENDENT_TYPE:
                # What follows may refer to the lost turn; what came before stands by itself.
                left = humans - number - 1
                if left:
                    self._note(name, "conversations", "after_a_lost_turn", "cut", f"{left} turns")
                break
        if not turns:
            self._note(name, "conversations", "no_usable_turn", "rejected", f"{humans} questions")
            return None
        self.kept += len(turns)
        return Dialogue(name, split, kind, tuple(turns))

    def take_entries(self) -> list[Entry]:
        """The manifest entries so far; the list starts anew."""
        taken, self.entries = self.entries, []
        return taken

    def _note(self, name: str, field: str, reason: str, action: str, detail: object = "") -> None:
        self.entries.append(Entry(name, field, reason, action, str(detail)[:200]))

    def _identify(self, row: Mapping[str, Any], fallback: str) -> str:
        name = str(row.get("id", "")).strip() or fallback
        if name in self._ids:
            self._note(name, "id", "duplicate_id", "repaired", f"renamed {name}@{fallback}")
            name = f"{name}@{fallback}"
        self._ids.add(name)
        return name

    def _type(self, value: Any, name: str) -> int:
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, bool) or not isinstance(first, int):
            self._note(name, "type", "type_missing", "flagged", repr(value))
            return UNKNOWN_TYPE
        return first

    def _pairs(
        self, conversations: list[Any], name: str
    ) -> Iterator[tuple[int, tuple[Mapping[str, Any], Mapping[str, Any]]]]:
        """(number of the question, (question, answer)); messages that pair with none are noted and passed over."""
        question: Mapping[str, Any] | None = None
        number = -1
        for place, message in enumerate(conversations):
            role = message.get("from") if isinstance(message, Mapping) else None
            if role == "human":
                if question is not None:
                    self._note(f"{name}#{number}", "from", "question_without_answer", "cut", question.get("value"))
                question, number = message, number + 1
            elif role == "gpt" and question is not None:
                yield number, (question, message)
                question = None
            elif role == "gpt":
                self._note(name, "from", "answer_without_question", "cut", f"message {place}")
            else:
                self._note(name, "from", "unknown_speaker", "cut", f"message {place}: {role!r}")
        if question is not None:
            self._note(f"{name}#{number}", "from", "question_without_answer", "cut", question.get("value"))

    def _turn(
        self, human: Mapping[str, Any], gpt: Mapping[str, Any], kind: int, name: str, before: list[Turn]
    ) -> Turn | None:
        user = self._text(human.get("value"), name, "question")
        answer = self._text(gpt.get("value"), name, "answer")
        if user is None or answer is None:
            return None
        language = language_of(user)
        chat = Turn(user, answer, Intent.CHAT, language)
        truth = gpt.get("video_id")
        truth = video_id(truth) if isinstance(truth, str) else ""
        if kind == CHAT_TYPE:
            return chat
        span_given, span = self._span(gpt.get("gt_se"), name)
        if span_given and span is None:
            return None
        if not truth:
            if span is None and not gpt.get("candidate_videos"):
                return chat
            self._note(name, "video_id", "truth_missing", "cut", repr(gpt.get("video_id")))
            return None
        duration = self._catalog.duration(truth) if self._catalog else None
        if isinstance(duration, str):
            self._note(name, "video_id", duration, "cut", truth)
            return None
        candidates = self._candidates(gpt.get("candidate_videos"), name, needed=span is None)
        if span is None:
            if candidates and truth not in candidates:
                self._note(name, "candidate_videos", "truth_not_in_candidates", "flagged", truth)
            elif not candidates and gpt.get("gt_se") is None and before and before[-1].video_id == truth:
                # Neither a list to choose from nor a span: a moment question whose moment is gone.
                self._note(name, "gt_se", "moment_missing", "cut", truth)
                return None
            return dataclasses.replace(chat, intent=Intent.VIDEO, video_id=truth, candidates=candidates)
        if duration is not None:
            span = self._within(span, duration, name)
            if span is None:
                return None
        return dataclasses.replace(chat, intent=Intent.MOMENT, video_id=truth, candidates=candidates, span=span)

    def _text(self, value: Any, name: str, field: str) -> str | None:
        if not isinstance(value, str):
            self._note(name, field, "text_missing", "cut", repr(value))
            return None
        text = value.strip()
        plain = prompt.without_control_tokens(text)
        if not plain:
            self._note(name, field, "empty_text", "cut", repr(value))
            return None
        if text != value:
            self._note(name, field, "stray_blanks", "repaired", repr(value[:20] + "..." + value[-20:]))
        if REPLACEMENT in text:
            self._note(name, field, "invalid_utf8", "flagged", text)
        if plain != text:
            self._note(name, field, "control_token_in_text", "repaired", text)
        return plain

    def _span(self, value: Any, name: str) -> tuple[bool, tuple[float, float] | None]:
        """(whether a moment is asked for, its span or None where it cannot be used). [-1, -1] and null: not."""
        if value is None:
            return False, None
        if not isinstance(value, list) or len(value) != 2:
            self._note(name, "gt_se", "moment_malformed", "cut", repr(value))
            return True, None
        try:
            if any(isinstance(time, bool) for time in value):
                raise TypeError
            start, end = (float(time) for time in value)
        except (TypeError, ValueError):
            self._note(name, "gt_se", "moment_malformed", "cut", repr(value))
            return True, None
        if any(isinstance(time, str) for time in value):
            self._note(name, "gt_se", "time_as_text", "repaired", repr(value))
        if (start, end) == (-1, -1):
            return False, None
        if not (math.isfinite(start) and math.isfinite(end)):
            self._note(name, "gt_se", "moment_malformed", "cut", repr(value))
            return True, None
        if start > end:
            self._note(name, "gt_se", "moment_reversed", "repaired", repr(value))
            start, end = end, start
        if start < 0 < end:
            self._note(name, "gt_se", "moment_before_start", "repaired", repr(value))
            start = 0.0
        if start < 0 or start == end:
            self._note(name, "gt_se", "moment_empty", "cut", repr(value))
            return True, None
        return True, (start, end)

    def _within(self, span: tuple[float, float], duration: float, name: str) -> tuple[float, float] | None:
        start, end = span
        if start >= duration:
            self._note(name, "gt_se", "moment_outside_video", "cut", f"{span} of {duration:.3f} s")
            return None
        if end > duration:
            self._note(name, "gt_se", "moment_past_end", "repaired", f"{span} of {duration:.3f} s")
            end = duration
        return start, end

    def _candidates(self, value: Any, name: str, *, needed: bool) -> tuple[str, ...]:
        if value is None or value == []:
            if needed:
                self._note(
                    name, "candidate_videos", "candidates_missing" if value is None else "candidates_empty", "flagged"
                )
            return ()
        if not isinstance(value, list):
            self._note(name, "candidate_videos", "candidates_malformed", "repaired", repr(value))
            return ()
        usable: dict[str, None] = {}
        for item in value:
            candidate = video_id(item) if isinstance(item, str) else ""
            if not candidate:
                self._note(name, "candidate_videos", "candidate_malformed", "repaired", repr(item))
            elif candidate in usable:
                self._note(name, "candidate_videos", "candidate_twice", "repaired", candidate)
            elif self._catalog and isinstance(reason := self._catalog.duration(candidate), str):
                self._note(name, "candidate_videos", f"candidate_{reason}", "repaired", candidate)
            else:
                usable[candidate] = None
        return tuple(usable)


def _count_humans(conversations: Any) -> int:
    if not isinstance(conversations, list):
        return 0
    return sum(isinstance(message, Mapping) and message.get("from") == "human" for message in conversations)
