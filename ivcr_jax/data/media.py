"""An opened video file: its packets, its timeline without decoding, and the errors it can have.

What `video.py` samples from. It knows PyAV; of frame choice, sizes, colours and JPEG, nothing. libav's log is off
unless the process turns it on.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

StrPath = str | os.PathLike[str]

# Titles come in any encoding. From version 19 on PyAV takes them as they are.
_ANY_METADATA: dict[str, Any] = {"metadata_errors": "replace"} if av.__version__ < "19" else {}

# The packets of a file up to this size are kept from the pass that finds the frames' times to the one that
# decodes; a larger file is read twice.
KEPT_BYTES = 64 * 2**20


class VideoError(Exception):
    """A video that cannot be used: `path` is the file, `reason` a short code to count by."""

    reason: ClassVar[str] = "video_error"

    def __init__(self, path: StrPath, message: str):
        super().__init__(os.fspath(path), message)  # both, or the error would not survive pickling
        self.path = os.fspath(path)

    def __str__(self) -> str:
        return f"{self.path}: {self.args[1]}"


class VideoMissingError(VideoError):
    """There is no such file."""

    reason = "video_missing"


class VideoUnreadableError(VideoError):
    """libav cannot read the file as media."""

    reason = "video_unreadable"


class VideoNoStreamError(VideoError):
    """A media file without moving pictures; cover art does not count."""

    reason = "video_no_stream"


class VideoNoFramesError(VideoError):
    """There is a video stream, but none of its frames decodes."""

    reason = "video_no_frames"


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a video file holds.

    Attributes:
      duration: seconds, to the end of the last frame.
      fps: frames per second on average (num_frames / duration).
      width: of the displayed picture, in pixels, after rotation.
      height: likewise.
      rotation: degrees clockwise by which the stored picture is turned for display: 0, 90, 180 or 270.
      codec: libav's name of it, "h264".
      num_frames: presented frames; a damaged one counts, since only decoding would tell.
      declared_duration: seconds the header promises, 0.0 where it says nothing.
    """

    duration: float
    fps: float
    width: int
    height: int
    rotation: int
    codec: str
    num_frames: int
    declared_duration: float

    @property
    def truncated(self) -> bool:
        """Whether clearly less is there (by over 5 % and a second) than the header promises: a cut file."""
        return self.declared_duration > 1.05 * self.duration + 1.0


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The presented frames, in order of presentation, and where they stand in the stream."""

    pts: np.ndarray  # i64[N], in ticks
    packet: np.ndarray  # i64[N], the position of each one's packet, in decode order
    key: np.ndarray  # bool[N]
    end: int  # ticks from the first frame to the end of the last
    tick: float  # seconds
    packets: list[av.Packet] | None  # all of them, in decode order; None where the file is too large to keep
    stamped: bool  # packets carry presentation times
    ordered: bool  # and these can be right (see `scan`)

    @property
    def duration(self) -> float:
        return self.end * self.tick


@contextlib.contextmanager
def open_video(path: StrPath) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens a file at its first real video stream; libav's errors, in the body too, become `VideoError`."""
    name = os.fspath(path)
    if not os.path.exists(name):
        raise VideoMissingError(name, "no such file, expected a video.")
    if not os.path.isfile(name):
        raise VideoUnreadableError(name, "not a regular file, expected a video.")
    try:
        # "file:" keeps a colon in the name from being taken for a protocol.
        with av.open(f"file:{name}", **_ANY_METADATA) as container:
            videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
            if not videos:
                kinds = ", ".join(sorted({s.type for s in container.streams})) or "nothing"
                raise VideoNoStreamError(name, f"holds no video stream but {kinds}, expected one.")
            if videos[0].codec_context is None:
                raise VideoUnreadableError(name, "libav has no decoder for its video stream, expected one.")
            yield container, videos[0]
    except (av.FFmpegError, OSError) as error:
        found = f"{os.path.getsize(name)} bytes of which libav says {error.strerror!r}"
        raise VideoUnreadableError(name, f"{found}, expected a video.") from error


def packets_of(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """Every packet with data, in decode order. A read error ends the stream; what came before counts.

    Packets without data (dropped AVI frames) are left out: a decoder takes one for the end of the stream.
    """
    with contextlib.suppress(av.FFmpegError):
        yield from (packet for packet in container.demux(stream) if packet.size)


def feed(context: VideoCodecContext, packet: av.Packet | None) -> list[VideoFrame | None]:
    """The frames a packet brings out, [None] where it does not decode. A packet None drains the decoder."""
    try:
        return list(context.decode(packet))
    except av.FFmpegError:
        return [None]


def decoded(
    context: VideoCodecContext, packets: Iterable[av.Packet], ranges: Sequence[tuple[int, int]] = ()
) -> Iterator[VideoFrame | None]:
    """Frames of the packets in `ranges` (none: of all), None for each packet that does not decode.

    Packets between ranges are read and left out rather than sought over: a seek lands where the container's
    index says, which need not be where a decoder can start.
    """
    left = list(ranges)
    for position, packet in enumerate(packets):
        if left and position >= left[0][1]:
            yield from feed(context, None)
            context.flush_buffers()
            del left[0]
            if not left:
                return
        if not left or position >= left[0][0]:
            yield from feed(context, packet)
    yield from feed(context, None)


def scan(path: StrPath) -> Timeline:
    """Reads the whole file, decoding nothing, for its timeline."""
    kept: list[av.Packet] | None = [] if os.path.exists(path) and os.path.getsize(path) <= KEPT_BYTES else None
    rows: list[tuple[int | None, int | None, int | None, bool, bool]] = []
    with open_video(path) as (container, stream):
        context = stream.codec_context
        vp8 = context.codec.canonical_name == "vp8"
        for packet in packets_of(container, stream):
            # VP8 has packets that hold only a reference picture; bit 4 of the first byte says "show".
            shown = not packet.is_discard and not (vp8 and not memoryview(packet)[0] & 16)
            if kept is not None:
                kept.append(packet)
            rows.append((packet.pts, packet.dts, packet.duration, packet.is_keyframe, shown))
        tick = float(stream.time_base or 1 / av.time_base)
        gap = max(round(1 / (float(stream.average_rate) * tick)), 1) if stream.average_rate else 1
        reorders = context.has_b_frames
    start = next((i for i, row in enumerate(rows) if row[3]), 0)  # what a cut stream has before cannot decode
    at = np.array([i for i, row in enumerate(rows) if i >= start and row[4]], np.int64)
    if not len(at):
        raise VideoNoFramesError(path, f"{len(rows)} video packets, none of them shown, expected frames.")
    # Raw streams have no times. Frames leave a decoder in the order they are shown, so any times in that
    # order will do.
    stamped = all(rows[i][0] is not None for i in at)
    stamps = [rows[i][0 if stamped else 1] for i in at]
    pts = np.arange(len(at)) * gap if None in stamps else np.array(stamps, np.int64)
    # A container without presentation times (AVI) gives itself away by times in decode order where the
    # codec reorders frames.
    ordered = stamped and not (reorders and len(pts) > 2 and bool(np.all(np.diff(pts) > 0)))
    pts, index = np.unique(pts, return_index=True)
    at = at[index]
    last = rows[at[-1]][2] or (int(np.median(np.diff(pts))) if len(pts) > 1 else gap)
    key = np.array([rows[i][3] for i in at], bool)
    return Timeline(pts, at, key, int(pts[-1] - pts[0]) + last, tick, kept, stamped, ordered)


def declared_duration(container: InputContainer, stream: VideoStream) -> float:
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / av.time_base


def info_of(
    path: StrPath, stream: VideoStream, frame: VideoFrame | None, duration: float, count: int, declared: float
) -> VideoInfo:
    if frame is None:
        raise VideoNoFramesError(path, "a video stream of which nothing decodes, expected frames.")
    turns = quarter_turns(frame)
    width, height = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
    codec = stream.codec_context.codec.canonical_name
    return VideoInfo(duration, count / duration, width, height, 90 * turns, codec, count, declared)


def ranges_of(line: Timeline, wanted: np.ndarray) -> list[tuple[int, int]]:
    """The packets, [start, stop) in decode order, that the wanted frames need; [] for all.

    A frame can be decoded from the last key packet that precedes it in the stream and on screen. The latter
    keeps open groups exact: a picture after a key packet in the stream but before it on screen leans on the
    group before.
    """
    ranges: list[tuple[int, int]] = []
    for index in wanted:
        keys = line.packet[: index + 1][line.key[: index + 1]]
        start = int(keys[keys <= line.packet[index]].max(initial=0))
        stop = int(line.packet[index]) + 1
        while ranges and start <= ranges[-1][1]:
            start, stop = min(start, ranges[-1][0]), max(stop, ranges.pop()[1])
        ranges.append((start, stop))
    return ranges if len(ranges) > 1 or ranges[0][0] > 0 else []


def quarter_turns(frame: VideoFrame) -> int:
    """Quarter turns clockwise that bring the stored picture upright."""
    return round(-frame.rotation / 90) % 4
