"""The corpus on disk: what an export makes of each video, and reading it.

    corpus.json          the root: which export, which videos, which of the files below
    vectors-<hash>.npy   f32[N, Dr], every video's retriever embedding, in the order of corpus.json
    videos/<hash>.npz    one video's arrays, see `Record`
    .lock                held by the process that writes

No file is written twice: each has a name of its own and appears whole, and corpus.json, which names them, is replaced
last. A process that is killed at any time leaves the corpus before or the one after, and perhaps files that no
corpus.json names, which the next writer removes. Axis letters: N videos, T frames of a video, K visual tokens, D the
decoder's width, Dr the retriever's, Q queries of a frame, E the moment head's width.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from ivcr_jax.config import to_dict
from ivcr_jax.data import manifest
from ivcr_jax.infer.search import Index

ROOT, RECORDS, LOCK = "corpus.json", "videos", ".lock"
VERSION = 1
# Names of the files that a writer makes and, where corpus.json does not name them, removes.
OURS = re.compile(r"vectors-[0-9a-f]{32}\.npy|[0-9a-f]{32}\.npz|\.(corpus\.json|vectors-|[0-9a-f]{32}\.npz).*\.tmp")


class CorpusError(Exception):
    """A folder that does not hold the corpus it should. The message is one sentence."""


@dataclasses.dataclass(frozen=True)
class Video:
    """One video.

    Attributes:
      id: its path below the videos folder without the suffix. path: with it.
      source: the parent folder's name, "" in the root.
      title: the file's name, for people.
      duration: seconds. width, height: pixels of the upright picture. fps: frames per second.
      frames: T, how many were used.
      damaged: packets that did not decode, among those read.
      size, mtime_ns: of the file that was read, bytes and nanoseconds.
      record: the name of its record. record_size: its bytes.
    """

    id: str
    path: str
    source: str
    title: str
    duration: float
    width: int
    height: int
    fps: float
    frames: int
    damaged: int
    size: int
    mtime_ns: int
    record: str
    record_size: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """A file that is not in the corpus. Attributes: path: below the videos folder. reason: a sentence. size, mtime_ns:
    of the file when it was tried, bytes and nanoseconds, 0 where it could not be looked at; where it was not tried,
    mtime_ns is no file's."""

    path: str
    reason: str
    size: int
    mtime_ns: int


@dataclasses.dataclass(frozen=True)
class Contents:
    """What corpus.json says. Attributes: fingerprint: `bundle.fingerprint` of the export. vectors: the file's name.
    videos: ordered by id. problems: ordered by path."""

    fingerprint: str
    vectors: str
    videos: tuple[Video, ...]
    problems: tuple[Problem, ...]

    @property
    def digest(self) -> str:
        """A SHA-256 of what of the corpus an answer can depend on."""
        values = [[video.id, video.title, video.duration, video.record] for video in self.videos]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Record:
    """A video's arrays.

    Attributes:
      video: f32[Dr], the retriever's embedding, of length 1.
      frames: f16[T, Dr], that of each frame, of length 1.
      tokens: f16[K, D], visual tokens for the decoder. token_mask: bool[K], which are there.
      moment_keys: f16[T, Q, 2 E], from `MomentHead.keys`.
      times: f32[T] seconds.
      thumbnails: u8[bytes], one JPEG file a frame, end to end. thumbnail_sizes: i32[T], their bytes.
    """

    video: np.ndarray
    frames: np.ndarray
    tokens: np.ndarray
    token_mask: np.ndarray
    moment_keys: np.ndarray
    times: np.ndarray
    thumbnails: np.ndarray
    thumbnail_sizes: np.ndarray

    def stretch(self, start: float | None, end: float | None) -> np.ndarray:
        """f32[Dr] of length 1: the embedding of what lies between two times, in seconds; None is the begin and the end.

        Raises ValueError where no frame does.
        """
        inside = (self.times >= (start or 0.0)) & (self.times <= (np.inf if end is None else end))
        if not inside.any():
            raise ValueError(f"no frame from {start} to {end} s; expected a stretch that holds one")
        if start is None and end is None:
            return self.video
        mean = self.frames[inside].astype(np.float32).mean(0)
        return mean / np.linalg.norm(mean)

    def nearest(self, query: np.ndarray, span: tuple[float, float] | None = None) -> tuple[tuple[float, float], ...]:
        """Up to three frames, within a span of seconds where there is one, that are nearest to a query f32[Dr]: seconds
        and cosine, best first."""
        scores = self.frames.astype(np.float32) @ query
        inside = np.ones(len(scores), bool)
        if span is not None:
            inside = (self.times >= span[0]) & (self.times <= span[1])
        best = [i for i in np.argsort(-scores, kind="stable") if inside[i]][:3]
        return tuple((float(self.times[i]), float(scores[i])) for i in best)


class Corpus:
    """A corpus to search, from `Corpus.open`. Attributes: videos: ordered by id. vectors: f32[N, Dr] of length 1, in
    that order. fingerprint: of the export it was made with. problems: files that are not in it."""

    def __init__(self, folder: epath.Path, contents: Contents, vectors: np.ndarray, mesh: Mesh | None) -> None:
        self.videos, self.problems, self.fingerprint = contents.videos, contents.problems, contents.fingerprint
        self.vectors = vectors
        self._contents, self._folder, self._mesh = contents, folder, mesh
        self._number = {video.id: number for number, video in enumerate(self.videos)}

    @classmethod
    def open(cls, folder: epath.PathLike, fingerprint: str | None = None, mesh: Mesh | None = None) -> "Corpus":
        """Reads corpus.json and the vectors; records are read when they are asked for.

        Args:
          folder: that `python -m ivcr_jax.index` wrote.
          fingerprint: `bundle.fingerprint` of the export that will be used with it; None for whichever it was.
          mesh: over whose devices `search` divides the vectors. None is one device.

        Raises:
          CorpusError: there is no whole corpus of this format, it was made with another export, or a file it names is
            absent or of another size.
        """
        return cls(epath.Path(folder), *read_checked(folder, fingerprint), mesh)

    def read(self, name: str) -> Record:
        """The arrays of the video with this id.

        Raises ValueError where there is none, and CorpusError where its record cannot be read.
        """
        return read_record(self._folder, self.video(name))

    def thumbnails(self, name: str) -> list[bytes]:
        """A JPEG file of each frame of the video with this id. Raises as `read`."""
        arrays = _load(self._folder, self.video(name), ("thumbnails", "thumbnail_sizes"))
        return split_thumbnails(arrays["thumbnails"], arrays["thumbnail_sizes"])

    def allowed(
        self,
        source: str | None = None,
        duration: tuple[float, float] | None = None,
        ids: Collection[str] | None = None,
        without: Collection[str] = (),
    ) -> np.ndarray:
        """Which videos pass every filter, for `search`.

        Args:
          source: of this source alone.
          duration: of at least and at most so many seconds.
          ids: these alone. without: not these.

        Returns:
          bool[N].

        Raises:
          ValueError: for an id that the corpus has not.
        """
        passed = np.ones(len(self.videos), bool)
        if source is not None:
            passed &= np.array([video.source == source for video in self.videos], bool)
        if duration is not None:
            seconds = np.array([video.duration for video in self.videos])
            passed &= (duration[0] <= seconds) & (seconds <= duration[1])
        if ids is not None:
            chosen = np.zeros(len(self.videos), bool)
            chosen[[self._index_of(name) for name in ids]] = True
            passed &= chosen
        passed[[self._index_of(name) for name in without]] = False
        return passed

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k videos nearest to each query, as `search.Index.search`: f32[B, Dr], bool[N] -> f32[B, k'], i32[B, k']
        numbers of `videos`."""
        return self._index.search(queries, k, allowed)

    def groups(self, threshold: float) -> np.ndarray:
        """Near-duplicates: videos joined by a chain of pairs whose embeddings have at least this cosine.

        Returns:
          i32[N], for each video the lowest number in its group; a video without a near-duplicate has its own.
        """
        number = np.arange(len(self.videos), dtype=np.int32)
        pairs = [np.stack([number, number])]
        asked, k = number, 16
        while len(asked):
            scores, found = self.search(self.vectors[asked], k)
            near = scores >= threshold
            pairs.append(np.stack([np.repeat(asked, near.sum(1)), found[near]]))
            # Whose last neighbour is near may have more.
            asked, k = asked[near[:, -1]] if k < len(number) else asked[:0], 4 * k
        one, other = np.concatenate(pairs, axis=1)
        group = number
        while True:  # the lowest number travels along pairs, and by halves of what is known
            lowest = group.copy()
            np.minimum.at(lowest, one, group[other])
            np.minimum.at(lowest, other, group[one])
            lowest = lowest[lowest]
            if (lowest == group).all():
                return group
            group = lowest

    @property
    def digest(self) -> str:
        """Of its contents."""
        return self._contents.digest

    @functools.cached_property
    def _index(self) -> Index:
        return Index(self.vectors, self._mesh)

    def _index_of(self, name: str) -> int:
        if name not in self._number:
            raise ValueError(f"found no video {name!r} in {self._folder}; expected one of its {len(self.videos)} ids")
        return self._number[name]

    def video(self, name: str) -> Video:
        """The entry of the video with this id. Raises ValueError where there is none."""
        return self.videos[self._index_of(name)]


def read_contents(folder: epath.PathLike, fingerprint: str | None = None) -> Contents:
    """What corpus.json says. Raises CorpusError where there is none, it is of another format or is not whole, or it is
    of another export than the one with this fingerprint."""
    path = epath.Path(folder) / ROOT
    if not path.exists():
        raise CorpusError(f"{folder}: found no {ROOT}, expected a folder that python -m ivcr_jax.index wrote")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CorpusError(f"{path}: found what is no JSON ({error}), expected a whole {ROOT}") from None
    version = values.get("version") if isinstance(values, dict) else None
    if version != VERSION:
        raise CorpusError(f"{path}: found format version {version!r}, expected {VERSION}; index the videos anew")
    try:
        contents = Contents(
            values["fingerprint"],
            values["vectors"],
            tuple(Video(**row) for row in values["videos"]),
            tuple(Problem(**row) for row in values["problems"]),
        )
    except (KeyError, TypeError) as error:
        raise CorpusError(f"{path}: {error}; expected the fields of format version {VERSION}") from None
    if fingerprint is not None and fingerprint != contents.fingerprint:
        raise CorpusError(
            f"{folder}: was made with the export {contents.fingerprint[:12]}, and this one is {fingerprint[:12]}; "
            "expected the same: index the videos into a new folder"
        )
    return contents


def read_checked(folder: epath.PathLike, fingerprint: str | None) -> tuple[Contents, np.ndarray]:
    """The contents and the vectors f32[N, Dr] of a whole corpus. Raises CorpusError as `Corpus.open`."""
    contents = read_contents(folder, fingerprint)
    vectors = read_vectors(folder, contents)  # at once: a writer replaces them
    for video in contents.videos:
        check_record(folder, video)
    return contents, vectors


def check_record(folder: epath.PathLike, video: Video) -> None:
    """Raises CorpusError where a record is absent or of another size than corpus.json says. It is not opened."""
    path = os.path.join(folder, RECORDS, video.record)
    try:
        size = os.stat(path).st_size
    except OSError as error:
        found = f"found no record of {video.id} ({error.strerror})"
        raise CorpusError(f"{path}: {found}, expected {video.record_size} bytes") from None
    if size != video.record_size:
        raise CorpusError(f"{path}: found {size} bytes, expected {video.record_size}, the record of {video.id}")


def read_vectors(folder: epath.PathLike, contents: Contents) -> np.ndarray:
    """f32[N, Dr]. Raises CorpusError where the file is absent or does not hold a vector a video."""
    path = epath.Path(folder) / contents.vectors
    try:
        vectors = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CorpusError(f"{path}: cannot be read ({error}), expected the vectors of the corpus") from None
    if vectors.ndim != 2 or vectors.dtype != np.float32 or len(vectors) != len(contents.videos):
        found = f"{vectors.dtype}{list(vectors.shape)}"
        raise CorpusError(f"{path}: found {found}, expected float32[{len(contents.videos)}, width], one a video")
    return vectors


def read_record(folder: epath.PathLike, video: Video) -> Record:
    """A video's record. Raises CorpusError where it cannot be read."""
    return Record(**_load(folder, video, [field.name for field in dataclasses.fields(Record)]))


def _load(folder: epath.PathLike, video: Video, names: Sequence[str]) -> dict[str, np.ndarray]:
    path = epath.Path(folder) / RECORDS / video.record
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except Exception as error:  # of whatever kind: what zip and NumPy meet in broken bytes is not ours to list
        raise CorpusError(f"{path}: cannot be read ({error}), expected the record of {video.id}") from None


def split_thumbnails(joined: np.ndarray, sizes: np.ndarray) -> list[bytes]:
    """u8[bytes] and i32[T] -> T JPEG files."""
    ends = np.cumsum(sizes)
    return [joined[end - size : end].tobytes() for end, size in zip(ends, sizes, strict=True)]


def write_record(folder: epath.PathLike, name: str, record: Record) -> tuple[str, int]:
    """Writes the arrays of the video with this id; returns the file's name, by its contents, and its bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **{field.name: getattr(record, field.name) for field in dataclasses.fields(record)})
    data = buffer.getvalue()
    # The id too, so that no two videos share a file.
    file = f"{_hash(name.encode(errors='surrogatepass'), data)}.npz"
    with manifest.atomic(epath.Path(folder) / RECORDS / file) as aside:
        aside.write_bytes(data)
    return file, len(data)


def write_contents(
    folder: epath.PathLike,
    fingerprint: str,
    videos: Mapping[str, Video],
    vectors: Mapping[str, np.ndarray],
    problems: Mapping[str, Problem],
    width: int,
) -> Contents:
    """Makes this the corpus: writes the vectors, replaces corpus.json, and removes what it names no longer.

    Args:
      folder: whose records are written already.
      fingerprint: of the export.
      videos, vectors: by id; f32[Dr]. problems: by path.
      width: Dr.
    """
    folder, names = epath.Path(folder), sorted(videos)
    buffer = io.BytesIO()
    np.save(buffer, np.stack([vectors[name] for name in names]) if names else np.zeros((0, width), np.float32))
    file = f"vectors-{_hash(buffer.getvalue())}.npy"
    with manifest.atomic(folder / file) as aside:
        aside.write_bytes(buffer.getvalue())
    ordered = tuple(videos[name] for name in names), tuple(problems[path] for path in sorted(problems))
    contents = Contents(fingerprint, file, *ordered)
    values: dict[str, Any] = {"version": VERSION, **to_dict(contents)}
    with manifest.atomic(folder / ROOT) as aside:
        aside.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    remove_leftovers(folder, contents)
    return contents


def remove_leftovers(folder: epath.PathLike, contents: Contents) -> None:
    """Removes files of our names that corpus.json does not name: what a writer that was killed left, or one before."""
    named = {contents.vectors, *(video.record for video in contents.videos)}
    for place in (epath.Path(folder), epath.Path(folder) / RECORDS):
        for path in place.iterdir() if place.exists() else ():
            if path.name not in named and OURS.fullmatch(path.name):
                path.unlink(missing_ok=True)


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(b"%d " % len(part) + part)
    return digest.hexdigest()[:32]
