"""One decoded frame as another picture: upright, of a size, RGB or JPEG. It knows nothing of files, times or choice."""

from fractions import Fraction

import numpy as np
from av.codec.context import Flags
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from ivcr_jax.data import media


def rgb(scaler: VideoReformatter, frame: VideoFrame, size: tuple[int, int]) -> np.ndarray:
    """A frame, turned upright and resized: u8[H, W, 3], a view. A scaler is for one thread and one size."""
    turns = media.quarter_turns(frame)
    return np.rot90(pixels(_scale(scaler, frame, size, turns, "rgb24").planes[0], 3), -turns)


def within(frame: VideoFrame, height: int) -> tuple[int, int]:
    """(H, W) of the upright picture, shrunk to at most that height in pixels with its aspect kept."""
    high, wide = frame.height, frame.width
    if media.quarter_turns(frame) % 2:
        high, wide = wide, high
    share = min(1.0, height / high)
    return max(round(share * high), 1), max(round(share * wide), 1)


class Jpeg:
    """Writes frames as JPEG files of one size, turned upright. For one thread."""

    def __init__(self, size: tuple[int, int], quality: int) -> None:
        """Size (H, W); quality 1..100, as in `video.sample_jpegs`. Raises ValueError where it is another."""
        if not 1 <= quality <= 100:
            raise ValueError(f"quality is {quality}, expected 1..100.")
        self._size, self._scaler, self._encoder, self._count = size, VideoReformatter(), _encoder(size, quality), 0

    def write(self, frame: VideoFrame) -> bytes:
        """The frame as one complete JPEG file."""
        turns = media.quarter_turns(frame)
        picture = _upright(_scale(self._scaler, frame, self._size, turns, "yuvj420p"), turns)
        picture.pts, picture.time_base = self._count, self._encoder.time_base  # the encoder wants times that grow
        self._count += 1
        return b"".join(bytes(packet) for packet in self._encoder.encode(picture))


def _scale(
    scaler: VideoReformatter, frame: VideoFrame, size: tuple[int, int], turns: int, pixel_format: str
) -> VideoFrame:
    """The frame in a full-range format, resized so that `turns` quarter turns make it `size`."""
    height, width = size[::-1] if turns % 2 else size
    return scaler.reformat(
        frame,
        width,
        height,
        pixel_format,
        dst_colorspace=Colorspace.ITU601,
        dst_color_range=ColorRange.JPEG,
        interpolation=Interpolation.BILINEAR,
        threads=1,
    )


def pixels(plane: VideoPlane, channels: int) -> np.ndarray:
    """A view of a plane without its row padding: u8[H, W, channels]."""
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, plane.line_size)
    return rows[:, : plane.width * channels].reshape(plane.height, plane.width, channels)


def _upright(frame: VideoFrame, turns: int) -> VideoFrame:
    """A planar frame, turned clockwise. The copy has no display matrix, which an encoder might store."""
    if not turns:
        return frame
    width, height = (frame.height, frame.width) if turns % 2 else (frame.width, frame.height)
    turned = VideoFrame(width, height, frame.format.name)
    turned.color_range, turned.colorspace = frame.color_range, frame.colorspace
    for source, target in zip(frame.planes, turned.planes, strict=True):
        pixels(target, 1)[:] = np.rot90(pixels(source, 1), -turns)
    return turned


def _encoder(size: tuple[int, int], quality: int) -> VideoCodecContext:
    """libav's JPEG encoder at a constant quantiser. Opening one takes 0.06 ms, so each call makes its own."""
    encoder = VideoCodecContext.create("mjpeg", "w")
    encoder.height, encoder.width = size
    encoder.pix_fmt = "yuvj420p"
    encoder.time_base = Fraction(1, 25)
    encoder.sample_aspect_ratio = Fraction(1, 1)  # or there would be no JFIF header
    encoder.thread_count = 1  # or packets would come late
    encoder.qmin = encoder.qmax = 1 + round((100 - quality) / 5)
    encoder.options = {"huffman": "default"}  # optimal tables: 5 % smaller, 30 % slower
    encoder.flags |= Flags.bitexact  # no version string in each file
    return encoder
