"""Reading video files: what a file holds, and frames chosen by presentation time, as arrays or as JPEG.

The one door to video files; `media.py` and `pictures.py` are the rooms behind it. It knows PyAV and NumPy, and
nothing of dialogues, datasets, models or devices. It is thread-safe: every call owns its decoder, scaler and
encoder, and PyAV releases the GIL while libav works, so callers run one file per thread.

Times are seconds from the first presented frame. They come from the packets of a file and not from its
header, which miscounts frames (edit lists, live WebM, cut files). A video lasts until its last frame has
been shown. Pixels are taken as square, and a mirroring display matrix is not undone.
"""

import bisect
import contextlib
import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import av
import numpy as np
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter

from ivcr_jax.data import media, pictures
from ivcr_jax.data.media import StrPath, VideoError, VideoInfo, VideoNoFramesError

_T = TypeVar("_T")


class JpegError(VideoError):
    """Bytes that are not a JPEG file; `path` says which of the list."""

    reason = "jpeg_unreadable"


@dataclasses.dataclass(frozen=True)
class Frames:
    """Decoded frames in order of presentation.

    Attributes:
      images: u8[T, H, W, 3], RGB.
      times: f32[T], strictly increasing seconds at which they are presented.
      info: of the whole video.
      damaged: packets that did not decode, among those read.
      substituted: wanted frames that did not decode. The frame shown before stands in for each, unless it
        is there already.
    """

    images: np.ndarray
    times: np.ndarray
    info: VideoInfo
    damaged: int
    substituted: int


@dataclasses.dataclass(frozen=True)
class Views:
    """As `Frames`, with the images at several sizes u8[T, H, W, 3] by (H, W), and T thumbnails, complete JPEG files."""

    images: dict[tuple[int, int], np.ndarray]
    thumbnails: list[bytes]
    times: np.ndarray
    info: VideoInfo
    damaged: int
    substituted: int


@dataclasses.dataclass(frozen=True)
class EncodedFrames:
    """As `Frames`, with T complete JPEG files in place of the images."""

    jpegs: list[bytes]
    times: np.ndarray
    info: VideoInfo
    damaged: int
    substituted: int


def probe(path: StrPath, scan: bool = True) -> VideoInfo:
    """What the file holds. One frame is decoded: rotation and size are certain only there.

    Args:
      path: a local file.
      scan: exact times, from all packets, at the cost of reading the file once. False takes the header's
        duration and mean rate and costs opening the file: good to a frame or two in a well-formed file, but
        it may count a longer sound track or a lead-in, and in a cut or miswritten file it is what the
        header claims. A file whose header states no duration is scanned all the same.

    Raises:
      VideoError: the file is missing, unreadable, or holds no video frame.
    """
    with media.open_video(path) as (container, stream):
        stream.codec_context.thread_count = 1
        frame = next(filter(None, media.decoded(stream.codec_context, media.packets_of(container, stream))), None)
        declared = media.declared_duration(container, stream)
        if not scan and declared and stream.average_rate:
            return media.info_of(path, stream, frame, declared, round(declared * stream.average_rate), declared)
        line = media.scan(path)
        return media.info_of(path, stream, frame, line.duration, len(line.pts), declared)


def choose_frames(pts: np.ndarray, end: int, num_frames: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Chooses frames by the time they are shown at.

    A video of at most `num_frames` frames gives each of them once. Else [0, end) is split into `num_frames`
    equal intervals and an instant is taken in each, its centre or with `rng` a uniformly drawn one. Each
    instant takes the frame being shown then: the last with pts <= instant. A frame shown at several
    instants (variable frame rate, intervals of about a frame) is taken once: there are never duplicates,
    and may be fewer frames than asked, for the caller to pad and mask.

    Args:
      pts: i64[N], strictly increasing presentation times in ticks, the first 0.
      end: the video's duration in ticks.
      num_frames: T.
      rng: None for the centres.

    Returns:
      i64[<= T], strictly increasing indices into pts.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}, expected at least 1.")
    if len(pts) <= num_frames:
        return np.arange(len(pts))
    instants: np.ndarray
    if rng is None:  # in integers: centres often fall exactly on the start of a frame
        instants = (2 * np.arange(num_frames, dtype=np.int64) + 1) * end // (2 * num_frames)
    else:
        instants = (np.arange(num_frames) + rng.random(num_frames)) * (end / num_frames)
    return np.unique(np.searchsorted(pts, instants, side="right") - 1)


def sample_frames(
    path: StrPath,
    num_frames: int,
    *,
    size: tuple[int, int],
    rng: np.random.Generator | None = None,
    threads: int = 1,
) -> Frames:
    """Frames of a video as RGB, chosen by `choose_frames`.

    The picture is turned upright and resized to `size` whatever its aspect, as the published system does,
    with swscale's bilinear: its kernel widens when shrinking, so it does not alias, it interpolates where a
    side grows, and it costs a third less than bicubic. Colours follow the stream's tags; an untagged stream is
    read as limited-range BT.601, libav's default.

    Args:
      path: a local file.
      num_frames: T, at least 1. Fewer come back from a video with fewer.
      size: (H, W) of the images.
      rng: None for the frame at each interval's centre, a generator for a random one.
      threads: of the decoder. 1 suits callers that read several files in parallel.

    Raises:
      VideoError: the file is missing, unreadable, or none of it decodes. Single damaged frames are replaced
        and counted instead.
    """
    scaler = VideoReformatter()

    def convert(frame: VideoFrame) -> np.ndarray:
        return pictures.rgb(scaler, frame, size)

    images, times, info, damaged, substituted = _pick(path, num_frames, rng, convert, threads)
    return Frames(np.stack(images), times, info, damaged, substituted)


def sample_views(
    path: StrPath,
    num_frames: int,
    *,
    sizes: Collection[tuple[int, int]],
    thumbnail_height: int,
    quality: int,
    threads: int = 1,
) -> Views:
    """The frames of `sample_frames` (without rng) at several sizes, and as thumbnails, from one pass of decoding.

    Args:
      path, num_frames, threads: as in `sample_frames`.
      sizes: (H, W) of each size.
      thumbnail_height: at most, in pixels. A thumbnail keeps the upright picture's aspect and is never larger than it.
      quality: of the thumbnails, as in `sample_jpegs`.

    Raises:
      VideoError: as `sample_frames`.
    """
    scalers = {size: VideoReformatter() for size in sizes}  # each keeps its tables from frame to frame
    jpeg: pictures.Jpeg | None = None

    def convert(frame: VideoFrame) -> tuple[dict[tuple[int, int], np.ndarray], bytes]:
        nonlocal jpeg
        if jpeg is None:  # where a later frame has another aspect, it takes that of the first
            jpeg = pictures.Jpeg(pictures.within(frame, thumbnail_height), quality)
        return {size: pictures.rgb(scaler, frame, size) for size, scaler in scalers.items()}, jpeg.write(frame)

    items, times, info, damaged, substituted = _pick(path, num_frames, None, convert, threads)
    images = {size: np.stack([views[size] for views, _ in items]) for size in scalers}
    return Views(images, [thumbnail for _, thumbnail in items], times, info, damaged, substituted)


def sample_jpegs(
    path: StrPath, num_frames: int, *, size: tuple[int, int], quality: int, threads: int = 1
) -> EncodedFrames:
    """The frames of `sample_frames` (without rng) as JPEG files, without a detour over RGB.

    swscale's planes go to libav's encoder as full-range BT.601, which JFIF readers assume, in 4:2:0: videos
    hold their colour so, and 4:4:4 would cost a third more bytes and nearly half more encoding time.

    Args:
      path, num_frames, size, threads: as in `sample_frames`.
      quality: 1..100. libav's quantiser is 1 + (100 - quality) / 5, rounded. From 50 to 95 the error is
        within 1 dB of what libjpeg makes at that number, and the files are smaller.

    Raises:
      VideoError: as `sample_frames`.
    """
    return EncodedFrames(*_pick(path, num_frames, None, pictures.Jpeg(size, quality).write, threads))


def decode_jpegs(jpegs: Sequence[bytes], size: tuple[int, int], out: np.ndarray | None = None) -> np.ndarray:
    """Decodes JPEG files to RGB, through swscale's fast path: colour takes its nearest sample.

    Args:
      jpegs: T JPEG files. One that is not of the size is resized.
      size: (H, W).
      out: u8[T, H, W, 3] to decode into; None makes one.

    Returns:
      out, u8[T, H, W, 3].

    Raises:
      JpegError: one of them does not decode.
    """
    shape = (len(jpegs), *size, 3)
    if out is None:
        out = np.empty(shape, np.uint8)
    elif out.shape != shape or out.dtype != np.uint8:
        raise ValueError(f"out is {out.dtype}{out.shape}, expected uint8{shape}.")
    decoder, scaler = VideoCodecContext.create("mjpeg", "r"), VideoReformatter()
    decoder.thread_count = 1
    for index, data in enumerate(jpegs):
        # A file cut short may decode in part, and an empty packet would end the stream: look for JPEG's end.
        frame = media.feed(decoder, av.Packet(data))[:1] if b"\xff\xd9" in data else []
        if not frame or frame[0] is None:
            raise JpegError(f"jpeg {index} of {len(jpegs)}", f"{len(data)} bytes that are no JPEG file.")
        rgb = scaler.reformat(frame[0], size[1], size[0], "rgb24", interpolation=Interpolation.BILINEAR, threads=1)
        out[index] = pictures.pixels(rgb.planes[0], 3)
    return out


class _Inexact(Exception):
    """This way of decoding cannot be trusted to return the frames asked for."""


def _pick(
    path: StrPath,
    num_frames: int,
    rng: np.random.Generator | None,
    convert: Callable[[VideoFrame], _T],
    threads: int,
) -> tuple[list[_T], np.ndarray, VideoInfo, int, int]:
    """Chooses frames and returns them converted, with the other fields of `Frames`."""
    line = media.scan(path)
    wanted = choose_frames(line.pts - line.pts[0], line.end, num_frames, rng)
    ranges = media.ranges_of(line, wanted) if line.ordered else []
    # From cheap to tolerant: without the groups of pictures that hold no wanted frame; all packets; and
    # counting frames, where the container's times cannot be those of the frames.
    if ranges:
        with contextlib.suppress(_Inexact):
            return _decode(path, line, wanted, convert, threads, ranges=ranges)
    if line.stamped:
        with contextlib.suppress(_Inexact):
            return _decode(path, line, wanted, convert, threads)
    return _decode(path, line, wanted, convert, threads, by_rank=True)


def _decode(
    path: StrPath,
    line: media.Timeline,
    wanted: np.ndarray,
    convert: Callable[[VideoFrame], _T],
    threads: int,
    ranges: Sequence[tuple[int, int]] = (),
    by_rank: bool = False,
) -> tuple[list[_T], np.ndarray, VideoInfo, int, int]:
    """Decodes the wanted frames (indices into the timeline) and converts each at once.

    A frame is known by its presentation time or, `by_rank`, as the n-th to come out. A wanted frame that
    does not come is replaced by the one before, but raises `_Inexact` where the fault may be ours: with
    `ranges` or doubtful times. So do any other sign of a wrong start in `ranges`, and times out of order.
    """
    labels: Sequence[int] = range(len(line.pts)) if by_rank else line.pts.tolist()
    entries = set(line.pts[line.key & np.isin(line.packet, [start for start, _ in ranges])].tolist())
    strict = bool(ranges) or not (line.ordered or by_rank)
    pending = wanted[::-1].tolist()
    taken: list[int] = []
    items: list[_T] = []
    before: tuple[int, VideoFrame] | None = None
    info: VideoInfo | None = None
    damaged = substituted = 0

    def take(index: int, frame: VideoFrame) -> None:
        if not taken or taken[-1] < index:
            taken.append(index)
            items.append(convert(frame))

    with media.open_video(path) as (container, stream):
        stream.codec_context.thread_type = "AUTO"
        stream.codec_context.thread_count = threads
        packets = media.packets_of(container, stream) if line.packets is None else line.packets
        for rank, frame in enumerate(media.decoded(stream.codec_context, packets, ranges)):
            if frame is None:
                damaged += 1
                if ranges:
                    raise _Inexact
                continue
            if not info:
                declared = media.declared_duration(container, stream)
                info = media.info_of(path, stream, frame, line.duration, len(line.pts), declared)
            label = rank if by_rank else frame.pts
            if label is None:
                raise _Inexact
            here = max(bisect.bisect_right(labels, label) - 1, 0)
            if before and here < before[0]:
                raise _Inexact
            if ranges and (frame.is_corrupt or label in entries and not frame.key_frame):
                raise _Inexact
            entries.discard(label)
            while pending and labels[pending[-1]] < label:
                if strict:
                    raise _Inexact
                pending.pop()
                substituted += 1
                take(*(before or (here, frame)))
            if pending and labels[pending[-1]] == label:
                take(pending.pop(), frame)
            before = here, frame
            if not pending:
                break
        if strict and (pending or entries):
            raise _Inexact
        if info is None or before is None:
            raise VideoNoFramesError(path, f"{len(line.pts)} video frames of which none decodes.")
        if pending:
            take(*before)
    times = ((line.pts[taken] - line.pts[0]) * line.tick).astype(np.float32)
    return items, times, info, damaged, substituted + len(pending)
