"""Makes a corpus of a folder of videos, and keeps it.

    python -m ivcr_jax.index --export=EXPORT --videos=DIR --corpus=CORPUS      add what is new or changed below DIR
    python -m ivcr_jax.index --corpus=CORPUS remove ID...
    python -m ivcr_jax.index --corpus=CORPUS list
    python -m ivcr_jax.index --corpus=CORPUS [--videos=DIR] verify             exit status 1 where anything is wrong

A video is decoded once and embedded by both models of the export. A run that is stopped, even by `kill -9`, loses the
videos of the last SAVE_SECONDS; the next goes on. Files that cannot be read are listed, and tried again when they have
changed. ivcr_jax/infer/corpus.py says what lies in the folder.
"""

import collections
import contextlib
import dataclasses
import fcntl
import itertools
import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence

import jax
import numpy as np
from absl import app, flags
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from ivcr_jax import bundle, command
from ivcr_jax.ahead import read_ahead
from ivcr_jax.config import listed
from ivcr_jax.data.dialogue import VIDEO_SUFFIXES, corpus_of, video_id
from ivcr_jax.data.video import VideoError, Views, sample_views
from ivcr_jax.infer import corpus as stored
from ivcr_jax.infer.corpus import Contents, CorpusError, Problem, Record, Video
from ivcr_jax.infer.embed import Embedder
from ivcr_jax.infer.verify import verify
from ivcr_jax.models.layers import Compute, native_dtype
from ivcr_jax.sharding import MeshConfig, make_mesh

THUMBNAIL_HEIGHT, THUMBNAIL_QUALITY = 160, 80  # pixels at most; of 1..100
UNTRIED = -1  # in the place of a time of change: the file is looked at again whenever the folder is
SAVE_SECONDS = 30  # corpus.json grows with the corpus: to write it after each video would cost more than the video


@dataclasses.dataclass(frozen=True)
class Added:
    """What `add` did. Attributes: contents: of the corpus now. embedded: ids. unchanged: videos that were there
    already. others: files below the folder whose suffix is no video's."""

    contents: Contents
    embedded: tuple[str, ...]
    unchanged: int
    others: int


@dataclasses.dataclass(frozen=True)
class _File:
    """A file to index: path below the folder; size and mtime_ns, 0 where it cannot be looked at."""

    path: str
    size: int
    mtime_ns: int

    @property
    def id(self) -> str:
        return video_id(self.path)


def add(
    export: epath.PathLike,
    videos: epath.PathLike,
    corpus: epath.PathLike,
    *,
    batch: int = 4,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    only: Collection[str] | None = None,
) -> Added:
    """Adds every video file below a folder that is new or changed, by size or time of change. For one process.

    Args:
      export: a model folder with both models.
      videos: the folder. Its folders are entered once each, so that links in a ring end.
      corpus: the corpus, or a new or empty folder.
      batch: videos at once on each device.
      dtype: of the computation, "bfloat16" or "float32"; None is float32 on a CPU and bfloat16 elsewhere.
      mesh: over whose devices videos and parameters are divided; None is all devices.
      only: ids of the videos to add; None is all.

    Raises:
      CorpusError: the folder holds something else, a corpus of another export or a broken one, or another process
        writes to it.
      ValueError: there is no video below the folder, or none that can be read; the export lacks something; or a value
        is beyond float16, which names the video. What was embedded before is kept.
      FileNotFoundError: there is no export.
    """
    fingerprint, width = bundle.fingerprint(export), _width(export)
    files, troubles, others = _scan(videos)
    if only is not None and files:
        every = len(files)
        files = [file for file in files if file.id in only]
        if not files:
            raise ValueError(f"{videos}: found none of {len(only)} videos among its {every}, expected some of them")
    if not files:
        found = f"{others} other files" if others else "nothing"
        raise ValueError(
            f"{videos}: found {found}, expected videos with one of the suffixes in dialogue.VIDEO_SUFFIXES"
        )
    _check_folder(epath.Path(corpus))
    with _locked(corpus):
        writer = _Writer(epath.Path(corpus), fingerprint, width)
        work = writer.plan(files, troubles)
        if work:
            mesh = make_mesh(MeshConfig()) if mesh is None else mesh
            dtype = dtype or native_dtype()
            embedder = Embedder(bundle.load(export, mesh=mesh, compute=Compute(dtype)), mesh, batch)
        try:
            if work:
                writer.embed(embedder, os.fspath(videos), work)
        finally:
            contents = writer.save()
    here = {file.id for file in files}
    if not any(video.id in here for video in contents.videos):
        first = contents.problems[0]
        raise ValueError(
            f"{videos}: none of its {len(files)} videos could be read; the first, {first.path}: {first.reason}"
        )
    return Added(contents, tuple(writer.embedded), len(files) - len(work) - writer.skipped, others)


def remove(corpus: epath.PathLike, ids: Collection[str]) -> Contents:
    """Removes videos from a corpus, by id or by path below the videos folder. Their files are left alone.

    Raises CorpusError as `Corpus.open`, or where another process writes, and ValueError for an unknown id.
    """
    stored.read_contents(corpus)
    with _locked(corpus):
        writer = _Writer(epath.Path(corpus), stored.read_contents(corpus).fingerprint, 0)
        names = {video_id(name) for name in ids}
        if unknown := sorted(names - {*writer.videos}):
            raise ValueError(f"{corpus}: found no video {listed(unknown)}, expected ids among its {len(writer.videos)}")
        for name in names:
            del writer.videos[name], writer.vectors[name]
        return writer.save()


class _Writer:
    """A corpus under change. Attributes: videos, vectors: by id. problems: by path. embedded: ids. skipped: files that
    are known not to be readable."""

    def __init__(self, folder: epath.Path, fingerprint: str, width: int) -> None:
        """Reads the corpus, or begins one of vectors of this width. Raises CorpusError as `Corpus.open`."""
        self._folder, self._fingerprint, self._width = folder, fingerprint, width
        self.videos: dict[str, Video] = {}
        self.vectors: dict[str, np.ndarray] = {}
        self.problems: dict[str, Problem] = {}
        self.skipped, self.embedded = 0, list[str]()
        if not (folder / stored.ROOT).exists():
            self.save()  # so that the folder is known for a corpus from the start
            return
        contents, vectors = stored.read_checked(folder, fingerprint)
        self._width = vectors.shape[1]
        self.videos = {video.id: video for video in contents.videos}
        self.vectors = dict(zip(self.videos, vectors, strict=True))
        self.problems = {problem.path: problem for problem in contents.problems}

    def save(self) -> Contents:
        return stored.write_contents(
            self._folder, self._fingerprint, self.videos, self.vectors, self.problems, self._width
        )

    def plan(self, files: Sequence[_File], troubles: Sequence[Problem]) -> list[_File]:
        """Which files are to be read; problems of files that are gone are forgotten."""
        known = self.problems
        self.problems = {problem.path: problem for problem in troubles}
        work: list[_File] = []
        first: dict[str, str] = {}
        for file in files:
            before = known.get(file.path)
            if before and (before.size, before.mtime_ns) == (file.size, file.mtime_ns):
                self.problems[file.path] = before
                self.skipped += 1
                continue
            if first.setdefault(file.id, file.path) != file.path:
                reason = f"its id {file.id} is that of {first[file.id]}, which comes first"
                self.problems[file.path] = Problem(file.path, reason, file.size, UNTRIED)
                self.skipped += 1
                continue
            video = self.videos.get(file.id)
            if not video or (video.path, video.size, video.mtime_ns) != (file.path, file.size, file.mtime_ns):
                work.append(file)
        return work

    def embed(self, embedder: Embedder, folder: str, files: Sequence[_File]) -> None:
        """Reads, embeds and writes the files, in order."""

        def read(file: _File) -> tuple[_File, Views | str]:
            try:
                views = sample_views(
                    os.path.join(folder, file.path), embedder.frames, sizes=embedder.sizes,
                    thumbnail_height=THUMBNAIL_HEIGHT, quality=THUMBNAIL_QUALITY,
                )  # fmt: skip
            except VideoError as error:
                return file, str(error.args[1])
            except Exception as error:  # of whatever kind: what a reader meets in broken bytes is not ours to list
                return file, f"{type(error).__name__}: {error}"
            return file, views

        saved = time.monotonic()
        with tqdm(desc="index", total=len(files), unit="video") as progress:
            reading = self._readable(read_ahead(read, files), progress)
            for file, views, record in _embedded(embedder, reading):
                name, size = stored.write_record(self._folder, file.id, record)
                self.videos[file.id] = _describe(file, views, name, size)
                self.vectors[file.id] = record.video
                self.embedded.append(file.id)
                progress.update()
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()

    def _readable(self, reading: Iterator[tuple[_File, Views | str]], progress: tqdm) -> Iterator[tuple[_File, Views]]:
        for file, found in reading:
            if isinstance(found, str):
                self.problems[file.path] = Problem(file.path, found, file.size, file.mtime_ns)
                if file.id in self.videos and self.videos[file.id].path == file.path:  # it can be read no more
                    del self.videos[file.id], self.vectors[file.id]
                progress.update()
            else:
                yield file, found


def _embedded(embedder: Embedder, reading: Iterator[tuple[_File, Views]]) -> Iterator[tuple[_File, Views, Record]]:
    """Files with what was embedded of them, in order; one batch is computed while the one before is written."""
    flying: collections.deque[tuple[list[tuple[_File, Views]], dict[str, jax.Array]]] = collections.deque()

    def land() -> Iterator[tuple[_File, Views, Record]]:
        batch, found = flying.popleft()
        files, views = zip(*batch, strict=True)
        records = embedder.finish([file.path for file in files], views, found)
        return zip(files, views, records, strict=True)

    while batch := list(itertools.islice(reading, embedder.rows)):
        flying.append((batch, embedder.start([views for _, views in batch])))
        if len(flying) == 2:
            yield from land()
    while flying:
        yield from land()


def _describe(file: _File, views: Views, record: str, record_size: int) -> Video:
    info = views.info
    title = file.id.rpartition("/")[2].replace("_", " ")
    return Video(
        file.id, file.path, corpus_of(file.id), title, info.duration, info.width, info.height, info.fps,
        len(views.times), views.damaged, file.size, file.mtime_ns, record, record_size,
    )  # fmt: skip


def _scan(folder: epath.PathLike) -> tuple[list[_File], list[Problem], int]:
    """Video files below a folder, sorted by path; folders that cannot be read; and how many other files there are."""
    root = os.fspath(folder)
    if not os.path.isdir(root):
        raise ValueError(f"{root}: found no folder, expected one of videos")
    files: list[_File] = []
    troubles: list[Problem] = []
    others, entered = 0, {os.path.realpath(root)}

    def refused(error: OSError) -> None:
        path = os.path.relpath(error.filename, root)
        troubles.append(Problem(path, f"the folder cannot be read: {error.strerror}", 0, 0))

    def new(path: str) -> bool:
        before = len(entered)
        entered.add(os.path.realpath(path))
        return len(entered) > before

    for where, folders, names in os.walk(root, followlinks=True, onerror=refused):
        folders[:] = [name for name in sorted(folders) if new(os.path.join(where, name))]
        for name in names:
            if os.path.splitext(name)[1].lower() not in VIDEO_SUFFIXES:
                others += 1
                continue
            path = os.path.join(where, name)
            try:
                status = os.stat(path)
                size, mtime_ns = status.st_size, status.st_mtime_ns
            except OSError:
                size = mtime_ns = 0  # to read it will say why
            files.append(_File(os.path.relpath(path, root), size, mtime_ns))
    return sorted(files, key=lambda file: file.path), troubles, others


def _width(export: epath.PathLike) -> int:
    """Of the vectors that an export makes. Raises ValueError where it lacks a model, before anything is written."""
    config = bundle.read_config(export)
    if config.model is None or config.retriever is None:
        lacking = "dialogue model" if config.model is None else "retriever"
        raise ValueError(f"{export}: found no {lacking}, expected an export with both models")
    return config.retriever.vit.width


def _check_folder(corpus: epath.Path) -> None:
    if (corpus / stored.ROOT).exists() or not corpus.exists():
        return
    # A writer that was killed at once may have left this much.
    begun = {stored.LOCK}
    if not corpus.is_dir() or any(p.name not in begun and not stored.OURS.fullmatch(p.name) for p in corpus.iterdir()):
        raise CorpusError(
            f"{corpus}: found something without {stored.ROOT}, expected a corpus or a new or empty folder"
        )


@contextlib.contextmanager
def _locked(corpus: epath.PathLike) -> Iterator[None]:
    """Keeps other writers out of a corpus; the lock goes with the process that holds it."""
    folder = epath.Path(corpus)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / stored.LOCK, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CorpusError(f"{folder}: another process writes to this corpus; expected to be the only one") from None
        yield


def _shown(text: str) -> str:
    """A file's name as any terminal can print it: names need not be UTF-8."""
    return text.encode(errors="replace").decode()


def _print_problems(contents: Contents) -> None:
    for problem in contents.problems:
        print(_shown(f"not in the corpus: {problem.path}: {problem.reason}"))


def _print_list(contents: Contents) -> None:
    width = max([2, *(len(video.id) for video in contents.videos)])
    print(f"{'id':{width}}  {'seconds':>9}  {'picture':>9}  frames  title")
    for video in contents.videos:
        picture = f"{video.width}x{video.height}"
        row = f"{video.id:{width}}  {video.duration:9.1f}  {picture:>9}  {video.frames:6}  {video.title}"
        print(_shown(row + (f" ({video.damaged} packets did not decode)" if video.damaged else "")))
    print(f"{len(contents.videos)} videos, {len(contents.problems)} problems")


def main(argv: list[str]) -> None:
    """Adds, removes, lists or verifies."""
    args, (action, *ids) = flags.FLAGS, argv[1:] or ["add"]
    command.quiet()
    needed = {"add": ("export", "videos"), "remove": (), "list": (), "verify": ()}
    if action not in needed:
        raise app.UsageError(f"found {action!r}, expected add, remove, list or verify")
    if lacking := [f"--{name}" for name in needed[action] if not args[name].value]:
        raise app.UsageError(f"{action} needs {' and '.join(lacking)}")
    if bool(ids) != (action == "remove"):
        raise app.UsageError(f"{action}: found {ids or 'no ids'}, expected {'ids' if action == 'remove' else 'none'}")
    try:
        if action == "add":
            done = add(args.export, args.videos, args.corpus, batch=args.batch, dtype=args.dtype)
            _print_problems(done.contents)
            print(
                f"{args.corpus}: {len(done.contents.videos)} videos, {len(done.embedded)} embedded now, "
                f"{done.unchanged} unchanged, {len(done.contents.problems)} problems; {done.others} other files"
            )
        elif action == "remove":
            print(f"{args.corpus}: {len(remove(args.corpus, ids).videos)} videos are left")
        elif action == "list":
            contents = stored.read_contents(args.corpus)
            _print_list(contents)
            _print_problems(contents)
        elif faults := verify(args.corpus, args.videos):
            sys.exit(_shown("\n".join(f"index: {fault}" for fault in faults)))
        else:
            print(f"{args.corpus}: {len(stored.read_contents(args.corpus).videos)} videos, nothing wrong")
    except (ValueError, OSError, CorpusError) as error:
        sys.exit(_shown(f"index: {error}"))


if __name__ == "__main__":
    flags.DEFINE_string("export", None, "A model folder, for add.")
    flags.DEFINE_string("videos", None, "The folder of videos, for add; for verify, to tell of files that are gone.")
    flags.DEFINE_string("corpus", None, "The folder of the corpus.", required=True)
    flags.DEFINE_integer("batch", 4, "Videos at once on each device.", lower_bound=1)
    flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Of the computation; by default float32 on a CPU.")
    app.run(main)
