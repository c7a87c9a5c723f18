"""A captioned corpus as the composer takes it, and readers of the public caption formats.

Every reader gives clips and a list of what it could not use. It knows annotation files and, to find a name's
file, folder listings; it must not know how dialogues are worded, nor open a video.
"""

import collections
import csv
import dataclasses
import json
import math
import pathlib
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeGuard

from ivcr_jax.data.dialogue import LANGUAGES, VIDEO_SUFFIXES, language_of, video_id

DIDEMO_CHUNK = 5.0  # seconds
# Annotators round: an end this much past the duration (seconds) is taken as the duration.
END_TOLERANCE = 0.5


@dataclasses.dataclass(frozen=True)
class Moment:
    """A described part of a video: [start, end] in seconds from its first frame, language -> sentence."""

    start: float
    end: float
    captions: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Clip:
    """A captioned video.

    Attributes:
      video: path relative to the video root, `corpus/name.ext`; the suffix may be missing.
      split: "train", "validation" or "test".
      duration: seconds, None where the source does not say.
      captions: language -> sentences, each describing the whole video.
      moments: in order of start.
      similar: (another clip's `video`, language -> what to ask for to go from this one to that one, a noun phrase
        such as "the same but with a green ball").
      near: `video` of clips that are easily mistaken for this one.
    """

    video: str
    split: str = "train"
    duration: float | None = None
    captions: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    moments: tuple[Moment, ...] = ()
    similar: tuple[tuple[str, Mapping[str, str]], ...] = ()
    near: tuple[str, ...] = ()


class Corpus:
    """Clips by name, by split, and by the languages they are described in. Everything is in order of name.

    Attributes:
      clips: name -> clip.
      languages: name -> languages in which the clip or a moment of it is described.
      split: split -> names.
      findable: (split, language) -> names of the clips described in that language.
      leads: names of the clips described in any language.

    Raises:
      ValueError: where a clip is given twice, or none is described.
    """

    def __init__(self, clips: Iterable[Clip]):
        ordered = sorted(clips, key=lambda clip: clip.video)
        self.clips = {clip.video: clip for clip in ordered}
        if len(self.clips) < len(ordered):
            counts = collections.Counter(clip.video for clip in ordered)
            raise ValueError(f"clips given twice: {', '.join(name for name, n in counts.items() if n > 1)}")
        self.languages: dict[str, list[str]] = {}
        self.split: dict[str, list[str]] = collections.defaultdict(list)
        self.findable: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
        for clip in ordered:
            self.split[clip.split].append(clip.video)
            spoken = {language for language, sentences in clip.captions.items() if sentences}
            spoken = spoken.union(*(moment.captions for moment in clip.moments))
            self.languages[clip.video] = [language for language in LANGUAGES if language in spoken]
            for language in self.languages[clip.video]:
                self.findable[clip.split, language].append(clip.video)
        self.leads = [name for name, languages in self.languages.items() if languages]
        if not self.leads:
            raise ValueError(f"none of the {len(ordered)} clips has a caption in {' or '.join(LANGUAGES)}")

    def beside(self, clip: Clip) -> list[str]:
        """The clips of the same split that are easily mistaken for this one."""
        names = dict.fromkeys((*clip.near, *(other for other, _ in clip.similar)))
        return [n for n in names if n != clip.video and n in self.clips and self.clips[n].split == clip.split]

    def candidates(self, rng: random.Random, clip: Clip, count: int, hit: bool) -> list[str]:
        """Up to `count` distinct clips of the split in random order: those beside `clip`, then any others.

        The clip itself is one of them if `hit`, and none of them if not.
        """
        chosen = dict.fromkeys([clip.video] if hit else [])
        beside = self.beside(clip)
        chosen.update(dict.fromkeys(rng.sample(beside, min(len(beside), count - len(chosen)))))
        pool = self.split[clip.split]
        count = min(count, len(pool) - (not hit))
        if 4 * count > len(pool):
            others = [name for name in pool if name not in chosen and name != clip.video]
            chosen.update(dict.fromkeys(rng.sample(others, count - len(chosen))))
        while len(chosen) < count:
            name = rng.choice(pool)
            if name != clip.video:
                chosen[name] = None
        order = list(chosen)
        rng.shuffle(order)
        return order


class Problem(NamedTuple):
    """Something of a source that was not used: which row, which of its fields, and why."""

    row: str
    field: str
    reason: str


class _Found:
    """Collects what is said about each video, in order of first mention, and what is wrong."""

    def __init__(self, folder: str, split: str):
        self.folder = folder
        self.split = split
        self.problems: list[Problem] = []
        self._videos: dict[str, Clip] = {}

    def video(self, name: str, duration: float | None = None, split: str | None = None) -> None:
        """Makes a video known; what was said first stays."""
        path = f"{self.folder}/{name}" if self.folder else name
        self._videos.setdefault(name, Clip(path, split or self.split, duration))

    def problem(self, row: str, field: str, reason: str) -> None:
        self.problems.append(Problem(row, field, reason))

    def caption(self, name: str, text: Any, row: str, language: str | None = None) -> None:
        sentence = _clean(text)
        if not sentence:
            self.problem(row, "caption", f"no sentence: {text!r}")
            return
        clip = self._videos[name]
        language = language or language_of(sentence)
        sentences = (*clip.captions.get(language, ()), sentence)
        self._videos[name] = dataclasses.replace(clip, captions={**clip.captions, language: sentences})

    def moment(self, name: str, start: Any, end: Any, captions: Mapping[str, str], row: str) -> None:
        """Adds a moment if its times, in seconds, make sense for the video."""
        clip = self._videos[name]
        if not _is_time(start) or not _is_time(end):
            self.problem(row, "times", f"not two numbers: {start!r}, {end!r}")
            return
        start, end = float(start), float(end)
        if clip.duration is not None and clip.duration < end <= clip.duration + END_TOLERANCE:
            end = clip.duration
        if not captions:
            self.problem(row, "sentence", "empty")
        elif not 0 <= start < end:
            self.problem(row, "times", f"not a span from its start to a later end: {start} to {end} s")
        elif clip.duration is not None and end > clip.duration:
            self.problem(row, "times", f"{start} to {end} s in a video of {clip.duration} s")
        else:
            moments = sorted((*clip.moments, Moment(start, end, dict(captions))), key=lambda m: (m.start, m.end))
            self._videos[name] = dataclasses.replace(clip, moments=tuple(moments))

    def result(self) -> tuple[list[Clip], list[Problem]]:
        return [clip for clip in self._videos.values() if clip.captions or clip.moments], self.problems


def _clean(text: Any) -> str:
    return " ".join(text.split()) if isinstance(text, str) else ""


def _is_time(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _own_language(text: Any) -> dict[str, str]:
    sentence = _clean(text)
    return {language_of(sentence): sentence} if sentence else {}


def _load(path: pathlib.Path, kind: type, expected: str) -> Any:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # both bad JSON and bad UTF-8
        raise ValueError(f"{path}: not JSON ({error}); expected {expected}") from None
    if not isinstance(data, kind):
        raise ValueError(f"{path}: a JSON {type(data).__name__}; expected {expected}")
    return data


def majority_chunks(times: list[tuple[int, int]]) -> tuple[int, int]:
    """One (first, last) chunk out of several annotators'.

    The pair that more annotators gave than any other; where no pair leads, the lower median of the firsts and
    the lower median of the lasts.
    """
    ranked = collections.Counter(times).most_common()
    if len(ranked) == 1 or ranked[0][1] > ranked[1][1]:
        return ranked[0][0]
    return statistics.median_low(first for first, _ in times), statistics.median_low(last for _, last in times)


DIDEMO = "DiDeMo's list of {video, num_segments, description, times}"


def read_didemo(path: pathlib.Path, split: str) -> tuple[list[Clip], list[Problem]]:
    """DiDeMo: chunks of 5 s become seconds.

    The duration is num_segments x 5 s, which the video's last chunk may fall short of by up to 5 s: the file
    does not say; whoever has the video cuts the end there.
    """
    corpus = _Found("DiDeMo", split)
    for index, row in enumerate(_load(path, list, DIDEMO)):
        if not isinstance(row, dict):
            corpus.problem(f"row {index}", "row", f"a {type(row).__name__}, not an object")
            continue
        name, segments, times = _clean(row.get("video")), row.get("num_segments"), row.get("times")
        where = f"annotation {row.get('annotation_id', f'at row {index}')}"
        if not name:
            corpus.problem(where, "video", f"no name: {row.get('video')!r}")
        elif not isinstance(segments, int) or isinstance(segments, bool) or segments < 1:
            corpus.problem(where, "num_segments", f"not a count: {segments!r}")
        elif not (
            isinstance(times, list)
            and times
            and all(isinstance(pair, list) and len(pair) == 2 and all(type(t) is int for t in pair) for pair in times)
        ):
            corpus.problem(where, "times", f"not a list of [first, last] chunks: {times!r}")
        elif not all(0 <= first <= last < segments for first, last in times):
            corpus.problem(where, "times", f"outside the {segments} chunks: {times}")
        else:
            first, last = majority_chunks([(first, last) for first, last in times])
            corpus.video(name, segments * DIDEMO_CHUNK)
            sentence = _own_language(row.get("description"))
            corpus.moment(name, first * DIDEMO_CHUNK, (last + 1) * DIDEMO_CHUNK, sentence, where)
    return corpus.result()


ACTIVITYNET = (
    "ActivityNet Captions' {video: {duration, timestamps, sentences}} or its submission form "
    "{results: {video: [{sentence, timestamp}]}}"
)


def read_activitynet(path: pathlib.Path, split: str) -> tuple[list[Clip], list[Problem]]:
    """ActivityNet Captions, as published or as results to submit (these have no duration)."""
    corpus = _Found("ActivityNet", split)
    data = _load(path, dict, ACTIVITYNET)
    submission = isinstance(data.get("results"), dict)
    for raw_name, row in (data["results"] if submission else data).items():
        name = _clean(raw_name)
        if submission:
            if not isinstance(row, list) or not all(isinstance(item, dict) for item in row):
                corpus.problem(name, "results", f"not a list of objects: {str(row)[:60]}")
                continue
            duration = None
            pairs = [(item.get("timestamp"), item.get("sentence")) for item in row]
        else:
            times = row.get("timestamps") if isinstance(row, dict) else None
            sentences = row.get("sentences") if isinstance(row, dict) else None
            if not isinstance(times, list) or not isinstance(sentences, list) or len(times) != len(sentences):
                corpus.problem(name, "timestamps", "not as many timestamps as sentences")
                continue
            duration = row.get("duration")
            if not _is_time(duration) or duration <= 0:
                corpus.problem(name, "duration", f"not seconds: {duration!r}")
                duration = None
            pairs = list(zip(times, sentences, strict=True))
        corpus.video(name, None if duration is None else float(duration))
        for index, (span, sentence) in enumerate(pairs):
            start, end = span if isinstance(span, list) and len(span) == 2 else (span, None)
            corpus.moment(name, start, end, _own_language(sentence), f"{name}[{index}]")
    return corpus.result()


TVR = "TVR's JSON lines {vid_name, duration, ts, desc}"


def read_tvr(path: pathlib.Path, split: str) -> tuple[list[Clip], list[Problem]]:
    """TVR: one described moment a line. Stray blanks are stripped from its sentences."""
    corpus = _Found("TVR", split)
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); expected {TVR}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            corpus.problem(f"line {number}", "row", f"not JSON: {error.msg}")
            continue
        if not isinstance(row, dict):
            corpus.problem(f"line {number}", "row", f"a {type(row).__name__}, not an object")
            continue
        name, duration, span = _clean(row.get("vid_name")), row.get("duration"), row.get("ts")
        where = f"desc {row.get('desc_id', f'at line {number}')}"
        if not name:
            corpus.problem(where, "vid_name", f"no name: {row.get('vid_name')!r}")
            continue
        if not _is_time(duration) or duration <= 0:
            corpus.problem(where, "duration", f"not seconds: {duration!r}")
            duration = None
        corpus.video(name, None if duration is None else float(duration))
        start, end = span if isinstance(span, list) and len(span) == 2 else (span, None)
        corpus.moment(name, start, end, _own_language(row.get("desc")), where)
    return corpus.result()


MSRVTT = "MSR-VTT's {videos, sentences} (.json) or the JSFusion test list with video_id and sentence (.csv)"
_MSRVTT_SPLITS = {"train": "train", "validate": "validation", "val": "validation", "test": "test"}


def read_msrvtt(path: pathlib.Path, split: str) -> tuple[list[Clip], list[Problem]]:
    """MSR-VTT: whole-video captions. Where the JSON states a video's split, that counts, not `split`."""
    corpus = _Found("MSR-VTT", split)
    if path.suffix.lower() == ".csv":
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = list(csv.DictReader(file))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path}: not CSV text ({error}); expected {MSRVTT}") from None
        if rows and not {"video_id", "sentence"} <= set(rows[0]):
            raise ValueError(f"{path}: the first line names {', '.join(map(str, rows[0]))}; expected {MSRVTT}")
        for number, line in enumerate(rows, start=2):
            name = _clean(line["video_id"])
            where = line.get("key") or f"line {number}"
            if not name:
                corpus.problem(where, "video_id", "empty")
                continue
            corpus.video(name)
            corpus.caption(name, line["sentence"], where)
        return corpus.result()
    data = _load(path, dict, MSRVTT)
    if not isinstance(data.get("videos"), list) or not isinstance(data.get("sentences"), list):
        raise ValueError(f"{path}: no lists `videos` and `sentences`; expected {MSRVTT}")
    known = set()
    for index, row in enumerate(data["videos"]):
        name = _clean(row.get("video_id")) if isinstance(row, dict) else ""
        if not name:
            corpus.problem(f"videos[{index}]", "video_id", "no name")
            continue
        start, end = row.get("start time"), row.get("end time")
        duration = float(end - start) if _is_time(start) and _is_time(end) and start < end else None
        if duration is None:
            corpus.problem(name, "end time", f"no duration: {start!r} to {end!r}")
        corpus.video(name, duration, _MSRVTT_SPLITS.get(str(row.get("split"))))
        known.add(name)
    for index, row in enumerate(data["sentences"]):
        name = _clean(row.get("video_id")) if isinstance(row, dict) else ""
        if name in known:
            corpus.caption(name, row.get("caption"), f"sentences[{index}]")
        else:
            corpus.problem(f"sentences[{index}]", "video_id", f"not among the videos: {name!r}")
    return corpus.result()


MANIFEST = "a manifest {files: [{file, caption_en, caption_zh, moments: [{start, end, en, zh}]}]}"


def read_manifest(path: pathlib.Path, split: str) -> tuple[list[Clip], list[Problem]]:
    """A manifest of files beside it; `file` is relative to its folder. Files that are no videos are passed over."""
    corpus = _Found("", split)
    data = _load(path, dict, MANIFEST)
    if not isinstance(data.get("files"), list):
        raise ValueError(f"{path}: no list `files`; expected {MANIFEST}")
    for index, row in enumerate(data["files"]):
        name = _clean(row.get("file")) if isinstance(row, dict) else ""
        if not name:
            corpus.problem(f"files[{index}]", "file", "no name")
            continue
        if pathlib.PurePosixPath(name).suffix.lower() not in VIDEO_SUFFIXES:
            continue
        media = row.get("media")
        duration = media.get("container_duration") if isinstance(media, dict) else None
        corpus.video(name, float(duration) if _is_time(duration) else None)
        captions = {language: row[key] for language in LANGUAGES if (key := f"caption_{language}") in row}
        if not captions:
            corpus.problem(name, "caption", "in no language")
        for language, caption in captions.items():
            corpus.caption(name, caption, name, language)
        moments = row.get("moments", [])
        for number, moment in enumerate(moments if isinstance(moments, list) else [moments]):
            where = f"{name}[{number}]"
            if not isinstance(moment, dict):
                corpus.problem(where, "moments", f"a {type(moment).__name__}, not an object")
                continue
            sentences = {lang: text for lang in LANGUAGES if (text := _clean(moment.get(lang)))}
            corpus.moment(name, moment.get("start"), moment.get("end"), sentences, where)
    return corpus.result()


_READERS: dict[str, tuple[Callable[[pathlib.Path, str], tuple[list[Clip], list[Problem]]], str]] = {
    "didemo": (read_didemo, DIDEMO),
    "activitynet": (read_activitynet, ACTIVITYNET),
    "tvr": (read_tvr, TVR),
    "msrvtt": (read_msrvtt, MSRVTT),
    "manifest": (read_manifest, MANIFEST),
}
FORMATS = tuple(_READERS)


def read(form: str, path: str | pathlib.Path, split: str = "train") -> tuple[list[Clip], list[Problem]]:
    """Reads an annotation file.

    Args:
      form: one of FORMATS.
      path: the file.
      split: the split of its videos, where the file itself does not say.

    Returns:
      (clips, problems): a row that cannot be used is a problem, and the others are read.

    Raises:
      ValueError: for an unknown format, and where the file as a whole is not of this format or holds no usable
        row; the message names the file and what was expected.
      OSError: where the file cannot be opened.
    """
    if form not in _READERS:
        raise ValueError(f"format {form!r}: expected one of {', '.join(FORMATS)}")
    reader, expected = _READERS[form]
    clips, problems = reader(pathlib.Path(path), split)
    if not clips:
        first = f"; the first problem: {problems[0].row}, {problems[0].field}: {problems[0].reason}" if problems else ""
        raise ValueError(f"{path}: no usable row; expected {expected}{first}")
    return clips, problems


def resolve(clips: Iterable[Clip], root: str | pathlib.Path) -> tuple[list[Clip], list[Problem]]:
    """Replaces the names of clips by the paths of existing files below a video root.

    A name matches a file of the same `corpus/name` whatever its suffix, or else the only file of that name in any
    folder. Clips without a file are left out and reported; `near` and `similar` follow.

    Raises:
      NotADirectoryError: where `root` is no folder.
    """
    root = pathlib.Path(root)
    if not root.is_dir():
        raise NotADirectoryError(f"{root}: no such folder of videos")
    by_id: dict[str, str] = {}
    by_name: dict[str, list[str]] = collections.defaultdict(list)
    for path in sorted(_videos(root)):
        if by_id.setdefault(video_id(path), path) == path:
            by_name[video_id(path).rpartition("/")[2]].append(path)
    paths: dict[str, str] = {}
    owners: dict[str, str] = {}
    problems: list[Problem] = []
    clips = list(clips)
    for clip in clips:
        wanted = video_id(clip.video)
        found = [by_id[wanted]] if wanted in by_id else by_name.get(wanted.rpartition("/")[2], [])
        if len(found) != 1:
            reason = f"several files: {', '.join(found)}" if found else f"no such file below {root}"
            problems.append(Problem(clip.video, "video", reason))
        elif owners.setdefault(found[0], clip.video) != clip.video:
            problems.append(Problem(clip.video, "video", f"{found[0]} is {owners[found[0]]} already"))
        else:
            paths[clip.video] = found[0]
    return [
        dataclasses.replace(
            clip,
            video=paths[clip.video],
            near=tuple(paths[other] for other in clip.near if other in paths),
            similar=tuple((paths[other], request) for other, request in clip.similar if other in paths),
        )
        for clip in clips
        if clip.video in paths
    ], problems


def _videos(root: pathlib.Path) -> Iterator[str]:
    for path in root.rglob("*"):
        if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith("."):
            yield path.relative_to(root).as_posix()
