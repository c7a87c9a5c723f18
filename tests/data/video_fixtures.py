"""Small videos whose frames carry their own number, written with PyAV, and a slow, plain reader of them."""

import pathlib
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np

HEIGHT, WIDTH, BITS = 48, 80, 8


def barcode(number: int) -> np.ndarray:
    """u8[48, 80, 3]: the number as eight black or white bars above a picture that moves."""
    rows, columns = np.indices((HEIGHT, WIDTH))
    picture = np.stack([(3 * rows + 2 * columns + shift + 5 * number) % 256 for shift in (0, 60, 150)], -1)
    bars = np.repeat([number >> bit & 1 for bit in range(BITS)], WIDTH // BITS)
    picture[: HEIGHT // 2] = 30 + 200 * bars[None, :, None]
    return picture.astype(np.uint8)


def number_of(image: np.ndarray) -> int:
    """The number a picture of a barcode shows: u8[H, W, 3] of any size."""
    height, width = image.shape[:2]
    row = image[height // 8 : height // 3].mean((0, 2))
    middles = [int((bit + 0.5) * width / BITS) for bit in range(BITS)]
    return sum(int(row[middle] > 130) << bit for bit, middle in enumerate(middles))


def write_video(
    path: pathlib.Path,
    codec: str = "libx264",
    count: int = 60,
    *,
    fps: int = 25,
    options: dict[str, str] | None = None,
    b_frames: int | None = None,
    pts: Sequence[int] | None = None,
    pix_fmt: str = "yuv420p",
    container_format: str | None = None,
    container_options: dict[str, str] | None = None,
    title: str | None = None,
    rotation: int = 0,
    pictures: Sequence[np.ndarray] | None = None,
) -> pathlib.Path:
    """Writes frames 0 .. count-1 at `fps`, or at `pts` in milliseconds."""
    pictures = pictures or [barcode(number) for number in range(count)]
    with av.open(str(path), "w", format=container_format, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if b_frames is not None:
            stream.codec_context.max_b_frames = b_frames
        if rotation:
            stream.set_display_rotation(rotation)
        if title is not None:
            container.metadata["title"] = title
        if pts is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            if pts is not None:
                frame.pts, frame.time_base = pts[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_audio(path: pathlib.Path) -> pathlib.Path:
    """One second of silence."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        assert isinstance(stream, av.AudioStream)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def packets_of(path: pathlib.Path) -> list[tuple[int, int]]:
    """(offset in the file, size) of the data of every video packet, in decode order."""
    data = path.read_bytes()
    with av.open(str(path)) as container:
        # libav's position is that of the container's block, a few bytes before the data.
        return [(data.index(bytes(p), p.pos or 0), p.size) for p in container.demux(video=0) if p.size]


def tear(path: pathlib.Path, *numbers: int) -> pathlib.Path:
    """Overwrites the data of some packets with zeros."""
    data = bytearray(path.read_bytes())
    packets = packets_of(path)
    for number in numbers:
        offset, size = packets[number]
        data[offset : offset + size] = bytes(size)
    path.write_bytes(data)
    return path


def choose_slowly(times: Sequence[Fraction], end: Fraction, count: int) -> list[int]:
    """The sampler's rule with rational numbers and loops: the frame shown at each interval's centre, once."""
    if len(times) <= count:
        return list(range(len(times)))
    chosen: list[int] = []
    for interval in range(count):
        centre = end * (2 * interval + 1) / (2 * count)
        shown = max(index for index, time in enumerate(times) if time <= centre)
        if shown not in chosen:
            chosen.append(shown)
    return chosen
