"""The dialogue: its schema, how language and intent are read off a turn, and the numbers in an answer.

Shared by the builders, the training pipeline, evaluation and inference, so it imports nothing but the
standard library: no TFDS, no Grain, no video, no tokenizer.
"""

import dataclasses
import enum
import re

LANGUAGES = ("en", "zh")
# Values of a dialogue's type.
CHAT_TYPE = 0
INDEPENDENT_TYPE = 7  # its turns do not depend on each other

# Containers whose suffix is not part of a video's name. A name may hold dots of its own.
VIDEO_SUFFIXES = frozenset(
    ".3g2 .3gp .asf .avi .f4v .flv .m2ts .m4v .mjpeg .mkv .mov .mp4 .mpeg .mpg .mts .ogg .ogv .ts .vob .webm "
    ".wmv".split()
)


class Intent(enum.IntEnum):
    """What a turn asks for. The values are stored in records and batches: never renumber them."""

    CHAT = 0
    VIDEO = 1
    MOMENT = 2


@dataclasses.dataclass(frozen=True)
class Turn:
    """One question and its answer.

    Attributes:
      user: the person's message.
      answer: the system's reply.
      intent: what the message asks for.
      language: "en" or "zh", of the message.
      video_id: ground-truth video (`corpus/name`), "" in a chat turn.
      candidates: video ids in the first stage's rank order; empty where the source has none.
      span: (start, end) in seconds from the first frame in a moment turn, else None.
    """

    user: str
    answer: str
    intent: Intent
    language: str
    video_id: str = ""
    candidates: tuple[str, ...] = ()
    span: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A conversation as it is stored, one record each.

    Attributes:
      id: unique in the source.
      split: "train", "validation" or "test".
      type: the source's behaviour class; 0 is plain chat, 7 means the turns are independent of each other.
      turns: in order, at least one.
    """

    id: str
    split: str
    type: int
    turns: tuple[Turn, ...]

    @property
    def videos(self) -> tuple[str, ...]:
        """Every distinct video of the dialogue, in order of first mention."""
        seen: dict[str, None] = {}
        for turn in self.turns:
            seen.update(dict.fromkeys(turn.candidates))
            if turn.video_id:
                seen[turn.video_id] = None
        return tuple(seen)


def video_id(path: str) -> str:
    """The id of a video, `corpus/name`, from its path below the video root, with or without a suffix."""
    path = path.replace("\\", "/").strip().strip("/")
    while path.startswith("./"):
        path = path[2:]
    stem, dot, suffix = path.rpartition(".")
    return stem if dot and "." + suffix.lower() in VIDEO_SUFFIXES else path


def corpus_of(video: str) -> str:
    """The corpus of a video id: its parent folder's name, "" for a video directly in the root."""
    parts = video.split("/")
    return parts[-2] if len(parts) > 1 else ""


HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_LATIN_WORD = re.compile(r"[A-Za-z]+")


def language_of(text: str) -> str:
    """ "zh" where Han characters outnumber Latin words (a Chinese sentence may name an English one), else "en"."""
    return "zh" if len(HAN.findall(text)) > len(_LATIN_WORD.findall(text)) else "en"


# The number of the video in an answer. "video 3" is what the released code parses (its regex admits
# 1-10 only), "3rd video" what the 2024 figures show; the Chinese forms are ours.
_VIDEO_NUMBER = re.compile(
    r"\bvideo\s+(?:number\s+)?(\d{1,9})\b|\b(\d{1,9})(?:st|nd|rd|th)\s+video\b"
    r"|视频\s*(\d{1,9})(?!\d)|第\s*(\d{1,9})\s*个?\s*视频",
    re.IGNORECASE,
)


def video_number(answer: str) -> tuple[int, int, int] | None:
    """The first video number an answer names: (number, start, end) with the digits at answer[start:end]."""
    match = _VIDEO_NUMBER.search(answer)
    if match is None:
        return None
    group = match.lastindex or 0
    return int(match.group(group)), match.start(group), match.end(group)


def renumber(answer: str, number: int) -> str:
    """The answer with its first video number replaced; unchanged where it names none.

    "6th video" keeps its ordinal suffix right ("2nd video").
    """
    found = video_number(answer)
    if found is None:
        return answer
    _, start, end = found
    tail = answer[end:]
    if re.match(r"(st|nd|rd|th)\s", tail, re.IGNORECASE):
        tail = _ordinal_suffix(number) + tail[2:]
    return answer[:start] + str(number) + tail


def _ordinal_suffix(number: int) -> str:
    if number % 100 in (11, 12, 13):
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
