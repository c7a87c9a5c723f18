"""What is wrong with a corpus, found by reading all of it."""

import os
from collections.abc import Iterator

import numpy as np
from etils import epath

from ivcr_jax.infer.corpus import (
    CorpusError,
    Record,
    Video,
    check_record,
    read_contents,
    read_record,
    read_vectors,
    split_thumbnails,
)


def verify(corpus: epath.PathLike, videos: epath.PathLike | None = None) -> list[str]:
    """Reads everything again; a sentence for each thing that is wrong.

    Args:
      corpus: the corpus.
      videos: the folder it was made of, to tell of files that are gone; None leaves that out.

    Raises:
      CorpusError: there is no corpus.json that can be read.
    """
    contents, faults = read_contents(corpus), list[str]()
    vectors: list[np.ndarray | None] = [None] * len(contents.videos)
    try:
        vectors = list(read_vectors(corpus, contents))
    except CorpusError as error:
        faults.append(str(error))
    shapes: dict[str, tuple[int, ...]] = {}
    for video, vector in zip(contents.videos, vectors, strict=True):
        try:
            check_record(corpus, video)
            faults += [f"{video.id}: {fault}" for fault in _faults(video, read_record(corpus, video), vector, shapes)]
        except CorpusError as error:
            faults.append(str(error))
        if videos is not None and not os.path.exists(os.path.join(videos, video.path)):
            faults.append(f"{video.id}: its file {video.path} is gone from {videos}")
    return faults


def _faults(
    video: Video, record: Record, vector: np.ndarray | None, shapes: dict[str, tuple[int, ...]]
) -> Iterator[str]:
    """What is wrong with a record; `shapes` keeps those of the first, which all others share."""
    of_each = {"frames": record.frames, "moment_keys": record.moment_keys, "times": record.times}
    for name, array in {**of_each, "thumbnail_sizes": record.thumbnail_sizes}.items():
        if len(array) != video.frames:
            yield f"found {len(array)} {name}, expected one a frame, {video.frames}"
    alike = {name: array.shape[1:] for name, array in of_each.items()}
    alike |= {name: getattr(record, name).shape for name in ("video", "tokens", "token_mask")}
    for name, shape in alike.items():
        if shapes.setdefault(name, shape) != shape:
            yield f"{name} are of shape {shape}, expected {shapes[name]} as in the first record"
    for name in ("video", "frames", "tokens", "moment_keys", "times"):
        if not np.isfinite(getattr(record, name)).all():
            yield f"{name} hold values that are not finite"
    if vector is not None and not np.array_equal(record.video, vector):
        yield "its vector is not the one in its record"
    if record.thumbnail_sizes.sum() != len(record.thumbnails):
        yield f"found {len(record.thumbnails)} bytes of thumbnails, expected {record.thumbnail_sizes.sum()}"
    elif not all(j.startswith(b"\xff\xd8") for j in split_thumbnails(record.thumbnails, record.thumbnail_sizes)):
        yield "a thumbnail is no JPEG file"
