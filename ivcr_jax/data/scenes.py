"""Draws synthetic scenes, simple shapes that move over a textured background, and encodes them as video files.

It knows geometry, colours, time and encoders. It must not know captions, families, splits or dialogues.
"""

import concurrent.futures
import dataclasses
import math
import multiprocessing
import os
from collections.abc import Iterator, Sequence

import av
import numpy as np

from ivcr_jax.data import manifest

COLOURS = {
    "red": (225, 35, 35),
    "green": (30, 185, 55),
    "blue": (45, 80, 240),
    "yellow": (240, 220, 40),
    "purple": (175, 45, 215),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "cross")
# Half the extent, as a share of the picture's shorter side: 20 and 13 pixels across in a picture of 48.
SIZES = {"large": 0.21, "small": 0.135}
MOTIONS = ("still", "sideways", "vertical", "loop", "diagonal")
# What happens to a thing in [start, end): it is there only then; is away then; has another colour then; rests
# then; moves only then.
EVENTS = ("appears", "leaves", "recolours", "pauses", "starts")
# Cycles of a motion in a clip, whatever its length: a dozen frames spread over the clip show every motion.
CYCLES = 2.5


@dataclasses.dataclass(frozen=True)
class Thing:
    """One thing of a scene.

    Attributes:
      colour, shape, size, motion, event: a name of the tables above; `motion` is how it moves when it moves.
      start, end: of the event, seconds.
      second: its colour during "recolours", else "".
      home: (x, y) of the motion's centre, as shares of width and height.
      reach: amplitude of the motion, as a share of the picture's shorter side.
      phase: of the motion at time 0, radians.
    """

    colour: str
    shape: str
    size: str
    motion: str
    event: str
    start: float
    end: float
    second: str
    home: tuple[float, float]
    reach: float
    phase: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a clip shows. `background` is the seed of the texture; sizes in pixels.

    Small things are drawn over large ones, and of those alike the earlier over the later.
    """

    things: tuple[Thing, ...]
    width: int
    height: int
    fps: int
    frames: int
    background: int

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.frames / self.fps


@dataclasses.dataclass(frozen=True)
class Codec:
    """How a file is encoded. `smallest`: shorter picture sides (pixels) make the encoder write past its memory."""

    suffix: str
    container: str
    encoder: str
    options: dict[str, str]
    smallest: int = 16


CODECS = {
    "h264": Codec(".mp4", "mp4", "libx264", {"preset": "ultrafast", "tune": "zerolatency", "crf": "18"}),
    "vp9": Codec(
        ".webm",
        "webm",
        "libvpx-vp9",
        {"deadline": "realtime", "cpu-used": "8", "crf": "20", "b": "0", "lag-in-frames": "0"},
    ),
    "mpeg4": Codec(".avi", "avi", "mpeg4", {"qmin": "2", "qmax": "3"}),
    "hevc": Codec(
        ".mkv",
        "matroska",
        "libx265",
        {"preset": "ultrafast", "crf": "18", "x265-params": "log-level=none:pools=none:frame-threads=1"},
        smallest=64,
    ),
}


def codec_for(name: str, width: int, height: int) -> str:
    """The codec that a picture of this size (pixels) is encoded with where `name` is wanted."""
    return name if min(width, height) >= CODECS[name].smallest else "h264"


def missing_encoders() -> list[str]:
    """The encoders in CODECS that PyAV was built without."""
    missing = []
    for codec in CODECS.values():
        try:
            av.codec.Codec(codec.encoder, "w")
        except av.codec.codec.UnknownCodecError:
            missing.append(codec.encoder)
    return missing


def _mask(shape: str, radius: float) -> np.ndarray:
    """bool[2n + 1, 2n + 1]: the pixels of a shape around its centre."""
    n = math.ceil(radius)
    y, x = np.mgrid[-n : n + 1, -n : n + 1] / radius
    if shape == "circle":
        return x**2 + y**2 <= 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.86
    if shape == "triangle":
        return (abs(x) <= (y + 1) / 1.8) & (y <= 0.8)
    return (np.minimum(abs(x), abs(y)) <= 0.36) & (np.maximum(abs(x), abs(y)) <= 1)


def _background(scene: Scene) -> np.ndarray:
    """u8[H, W, 3]: dim, greyish, uneven, and of one piece with no colour of a thing."""
    rng = np.random.default_rng(scene.background)

    def spread(grid: np.ndarray) -> np.ndarray:
        rows, columns = (
            np.maximum(0, 1 - abs(np.linspace(0, n - 1, size)[:, None] - np.arange(n)))
            for n, size in zip(grid.shape[:2], (scene.height, scene.width), strict=True)
        )
        return columns @ (rows @ grid.reshape(len(grid), -1)).reshape(scene.height, *grid.shape[1:])

    light = spread(rng.uniform(60, 125, (2, 2, 1))) + spread(rng.uniform(-18, 18, (9, 9, 1)))
    tint = spread(rng.uniform(-9, 9, (3, 3, 3)))
    grain = rng.uniform(-7, 7, (scene.height, scene.width, 1))
    return np.clip(light + tint + grain, 0, 255).astype(np.uint8)


def during(scene: Scene, thing: Thing) -> np.ndarray:
    """bool[T]: whether the time of a frame is within the thing's event."""
    times = np.arange(scene.frames) / scene.fps
    return (times > thing.start - 1e-6) & (times < thing.end - 1e-6)


def path(scene: Scene, thing: Thing) -> np.ndarray:
    """i64[T, 2]: the pixel (x, y) of the thing's centre in every frame, whether it is visible or not."""
    inside = during(scene, thing)
    moving = {"pauses": ~inside, "starts": inside}.get(thing.event, np.ones_like(inside))
    cycles = CYCLES * np.concatenate(([0], np.cumsum(moving[:-1]))) / scene.frames
    angle = thing.phase + 2 * np.pi * cycles
    sine, zero = np.sin(angle), np.zeros_like(angle)
    offset = {
        "still": (zero, zero),
        "sideways": (sine, zero),
        "vertical": (zero, sine),
        "loop": (np.cos(angle), sine),
        "diagonal": (0.8 * sine, 0.8 * sine),
    }[thing.motion]
    shorter = min(scene.width, scene.height)
    size = np.array([scene.width, scene.height])
    margin = math.ceil(SIZES[thing.size] * shorter)
    centre = np.array(thing.home) * size + thing.reach * shorter * np.stack(offset, axis=-1)
    return np.clip(np.rint(centre).astype(int), margin, size - 1 - margin)


def draw(scene: Scene) -> Iterator[np.ndarray]:
    """Yields the frames of a scene, u8[H, W, 3] RGB, in order."""
    background = _background(scene)
    layers = []
    for thing in sorted(reversed(scene.things), key=lambda thing: -SIZES[thing.size]):
        rows, columns = np.nonzero(_mask(thing.shape, SIZES[thing.size] * min(scene.width, scene.height)))
        middle = math.ceil(SIZES[thing.size] * min(scene.width, scene.height))
        pixels = (rows - middle) * scene.width + columns - middle
        inside = during(scene, thing)
        visible = {"appears": inside, "leaves": ~inside}.get(thing.event, np.ones_like(inside))
        colours = np.array([COLOURS[thing.colour], COLOURS[thing.second or thing.colour]], np.uint8)
        centres = path(scene, thing) @ (1, scene.width)
        layers.append((pixels, visible.tolist(), colours[inside.astype(int)], centres))
    for index in range(scene.frames):
        frame = background.copy()
        flat = frame.reshape(-1, 3)
        for pixels, visible, colours, centres in layers:
            if visible[index]:
                flat[pixels + centres[index]] = colours[index]
        yield frame


def encode(scene: Scene, codec: str, target: str | os.PathLike[str]) -> None:
    """Draws a scene into a video file, which appears when it is complete.

    The same scene gives the same bytes with the same build of PyAV: encoders run in one thread, and containers
    carry no dates and no random ids.
    """
    container = CODECS[codec].container
    used = CODECS[codec_for(codec, scene.width, scene.height)]
    with (
        manifest.atomic(target) as temporary,
        av.open(str(temporary), "w", format=container, options={"fflags": "+bitexact"}) as output,
    ):
        stream = output.add_stream(used.encoder, rate=scene.fps, options=used.options)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = scene.width, scene.height, "yuv420p"
        stream.codec_context.thread_count = 1
        for picture in draw(scene):
            output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        output.mux(stream.encode())


Job = tuple[Scene, str, str]  # scene, codec, file to write


def _encode_all(jobs: Sequence[Job]) -> None:
    for job in jobs:
        encode(*job)


def render(jobs: Sequence[Job], workers: int | None = None) -> int:
    """Encodes those of the files that do not exist, in `workers` processes; None: as the work and the cores suggest.

    Returns how many files were written. A caller that is a script must guard its entry by `__name__`, as for any
    process pool.
    """
    left = [job for job in jobs if not os.path.exists(job[2])]
    if workers is None:
        # A process takes about as long to start as ten million pixels, 45 small clips, take to draw.
        pixels = sum(scene.frames * scene.width * scene.height for scene, _, _ in left)
        workers = min(os.cpu_count() or 1, math.ceil(pixels / 1e7))
    if workers <= 1:
        _encode_all(left)
        return len(left)
    size = min(16, math.ceil(len(left) / (4 * workers)) or 1)
    # Spawned, not forked: the caller may run JAX, whose threads do not survive a fork.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        list(pool.map(_encode_all, (left[i : i + size] for i in range(0, len(left), size))))
    return len(left)
