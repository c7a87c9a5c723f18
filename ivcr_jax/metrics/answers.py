"""Reading answers: which video they name, and which seconds.

Two readers. The published one reads as the released scorer does (`convert_dataset.ipynb` and `metrics/eval.py` of the
IVCR-200K code), with all that it misses and mistakes; ours reads what people and models write, in English and Chinese.
They know strings only.
"""

import math
import re
import unicodedata

from ivcr_jax.data.dialogue import video_number

# -- the published reader

_PUBLISHED_VIDEO = re.compile(r"\bvideo\s+(10|[0-9])\b", re.IGNORECASE)
# A number is taken whole, here and below: a run of thousands of digits is not tried from every digit to every other.
_PUBLISHED_TRUTH = re.compile(r"(?<!\d)(?P<seconds1>\d++(?:\.\d++)?)s-(?P<seconds2>\d++(?:\.\d++)?)s")
_PUBLISHED_PAIR = re.compile(r"(?<!\d)(\d++(?:\.\d*+)?+)s?\s*+-\s*+(\d++(?:\.\d*+)?+)")
_PUBLISHED_NUMBER = re.compile(r"\b(\d+(?:\.\d+)?)\b")
_PUBLISHED_EXAMPLE = "a specific example is : 20.8 - 30.0 seconds"  # of an older prompt, which answers repeated


def published_video(answer: str) -> int | None:
    """The first `video N`, N from 0 to 10, or None."""
    found = _PUBLISHED_VIDEO.search(answer)
    return int(found.group(1)) if found else None


def published_span(answer: str) -> tuple[float, float]:
    """Seconds of a predicted answer: the first `a[s] - b[s]`; else of the first number of each sentence (which a period
    does not end) the first two; sorted; (0, 0) where there are none.

    The released code goes on to look for HH:MM:SS. That finds nothing ever: where two sentences have such times, two
    have numbers.
    """
    text = re.sub(r"\.{2,}", ".", answer.lower().replace(_PUBLISHED_EXAMPLE, ""))
    pair = _PUBLISHED_PAIR.search(text)
    if pair is not None:
        times = [*pair.groups()]
    else:
        firsts = (_PUBLISHED_NUMBER.search(sentence) for sentence in re.split(r"[!?\n]", text))
        times = [first.group(1) for first in firsts if first is not None][:2]
    if len(times) < 2:
        return 0.0, 0.0
    start, end = sorted(float(time) for time in times)
    return start, end


def published_truth(answer: str) -> list[float]:
    """Seconds of a ground-truth answer: of every `Xs-Ys` the start and the end, in one flat list, as they stand."""
    return [float(time) for pair in _PUBLISHED_TRUTH.findall(answer) for time in pair]


# -- ours

_UNIT = r"(?:秒钟?|s(?:ec(?:ond)?s?)?(?![a-z]))"
_NUMBER = r"\d++(?:\.\d++)?"
_JOIN = r"\s*(?:--?|[‐–—−]{1,2}|[~〜]|至|到|to\b|until\b|till\b|and\b(?:\s+ends?(?:\s+at)?\b)?)\s*"
_UP_TO = r"\s*(?:[-‐–—−~〜至到]|to\b)\s*"


def _time(n: int) -> str:
    """`0:05`, `1:02:03.5`; or seconds, with minutes before them or not, with a unit or without one. A number without a
    unit must not be part of something else."""
    return (
        rf"第?\s*(?:(?:(?P<hours{n}>\d\d?):)?(?P<minutes{n}>\d\d?\d?):(?P<clock{n}>[0-5]\d(?:\.\d++)?)(?![\d:])"
        rf"|(?:(?P<before{n}>\d++)\s*(?:分钟?|min(?:ute)?s?)\s*)?(?P<seconds{n}>{_NUMBER})"
        rf"(?:\s*(?P<unit{n}>{_UNIT})|(?![a-z\d]|\.\d|\s*(?:分|min|小时|hour))))"
    )


# At least one of the two says that it is a time; what goes on with a further dash is a date, or begins at the next.
_SPAN = re.compile(
    rf"(?<![a-z\d_.:‐–—−-]){_time(1)}{_JOIN}{_time(2)}(?!\s*[‐–—−~〜-]\s*\d)(?(unit1)|(?(unit2)|(?(minutes1)|(?!))))",
    re.IGNORECASE,
)
_START_AND_END = re.compile(
    rf"(?:\b(?:start|begin)|开始)(?:(?!video|视频)\D){{0,30}}?{_time(1)}"
    rf"(?:(?!video|视频)\D){{0,30}}?(?:\bend|结束)(?:(?!video|视频)\D){{0,30}}?{_time(2)}",
    re.IGNORECASE,
)
# Two numbers alone: at the very beginning or behind such a word, with nothing counted behind them; no years.
_BARE = re.compile(
    rf"(?:^|\b(?:from|between|at|in)\s|[从在])\s*[\[(]?\s*(?!(?:19|20)\d\d\b)(?P<seconds1>{_NUMBER})(?:{_JOIN}|\s*,\s*)"
    rf"(?P<seconds2>{_NUMBER})\s*[\])]?(?=\s*(?:[.,;!?。、]|$))",
    re.IGNORECASE,
)
_RANGE = re.compile(
    rf"\bvideos?\s+\d+{_UP_TO}(?:video\s+)?\d+|视频\s*\d+{_UP_TO}(?:视频\s*)?\d+|(?:第\s*|(?<!\d))\d++{_UP_TO}第?\s*\d+\s*个?\s*视频",
    re.IGNORECASE,
)
_INSTANT = re.compile(rf"(?<!\d){_NUMBER}\s*秒")
_ABBREVIATED = re.compile(r"\bvideo\s*(?:#|no\.)\s*(?=\d)", re.IGNORECASE)
_DIGITS = "一二三四五六七八九"
_CHINESE_ORDINAL = re.compile(rf"第\s*([{_DIGITS}]?十[{_DIGITS}]?|[{_DIGITS}])(?=\s*个?\s*视频)")
_GAP = " ; "


def video(answer: str) -> int | None:
    """The first number of a video that the answer names, or None: `video 3`, `6th video`, `视频 3`, `第三个视频`.
    Neither several at once (`video 1-10`) nor times (`视频 5秒到10秒`) are one. It may be out of range."""
    text = _SPAN.sub(_GAP, unicodedata.normalize("NFKC", answer))
    for pattern in (_RANGE, _INSTANT):
        text = pattern.sub(_GAP, text)
    text = _ABBREVIATED.sub("video ", text)
    found = video_number(_CHINESE_ORDINAL.sub(lambda match: f"第{_chinese(match.group(1))}", text))
    return None if found is None else found[0]


def span(answer: str) -> tuple[float, float] | None:
    """The first span of time that the answer names, in seconds, sorted, or None: `5s-10s`, `from 5 to 10 seconds`,
    `5秒到10秒`, `00:05-00:10`; two bare numbers only where nothing else is said of them (`[5, 10]`, `at 5-10.`)."""
    text = unicodedata.normalize("NFKC", answer).strip()
    patterns = (_SPAN, _START_AND_END, _BARE, _PUBLISHED_TRUTH)  # the last finds `5s-10s` in whatever surroundings
    found = next((found for pattern in patterns if (found := pattern.search(text))), None)
    if found is None:
        return None
    groups = found.groupdict()
    start, end = sorted(_seconds(groups, n) for n in (1, 2))
    return (start, end) if math.isfinite(end) else None


def _seconds(groups: dict[str, str | None], n: int) -> float:
    def value(name: str) -> float:
        return float(groups.get(f"{name}{n}") or 0)

    return value("hours") * 3600 + (value("minutes") + value("before")) * 60 + value("clock") + value("seconds")


def _chinese(number: str) -> int:
    """The value of a number from 一 (1) to 九十九 (99)."""
    tens, ten, ones = number.rpartition("十")
    return (10 * (_DIGITS.find(tens) + 1 if tens else 1) if ten else 0) + (_DIGITS.find(ones) + 1 if ones else 0)
