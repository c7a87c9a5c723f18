"""IVCR-200K videos: one record a video, sampled frames as JPEG, from the tree of videos in manual_dir."""

import concurrent.futures
import dataclasses
import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from ivcr_jax.data import manifest, source, store, video
from ivcr_jax.data.dialogue import corpus_of, video_id
from tfds_builder import resumable

# Finished shards survive a stop, so a shard is what a stop may cost: about 20 s of decoding.
VIDEOS_PER_SHARD = 128
JPEG_QUALITY = 90


@dataclasses.dataclass(kw_only=True)
class VideosConfig(tfds.core.BuilderConfig):
    """What changes the bytes on disk.

    Attributes:
      frames: sampled frames a video, spread evenly over its time.
      size: height and width of a frame in pixels; the aspect is squashed, as in the published system.
    """

    name: str = dataclasses.field(init=False)
    frames: int = 64
    size: int = 224

    def __post_init__(self) -> None:
        if self.frames < 1 or self.size < 16:
            raise ValueError(f"{self.frames} frames of {self.size} pixels; expected at least 1 frame of 16 pixels")
        self.name = f"{self.frames}x{self.size}"
        self.description = f"{self.frames} frames a video, {self.size} x {self.size} pixels."


def video_features(size: int) -> tfds.features.FeaturesDict:
    """The features of a record. `times` and `duration` are seconds from the first presented frame."""
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "corpus": tfds.features.Text(),
            "duration": np.float32,
            "fps": np.float32,
            "frames": tfds.features.Sequence(tfds.features.Image(shape=(size, size, 3), encoding_format="jpeg")),
            "times": tfds.features.Sequence(np.float32),
        }
    )


@dataclasses.dataclass(frozen=True)
class VideoJob(resumable.Job):
    """A shard of videos to decode; `videos` are (id, path) of each."""

    videos: tuple[tuple[str, str], ...]
    frames: int
    size: int

    def features(self) -> tfds.features.FeaturesDict:
        return video_features(self.size)

    def examples(self, entries: list[manifest.Entry]) -> Iterator[tuple[str, dict[str, Any]]]:
        threads = os.cpu_count() or 1
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:  # libav lets go of the GIL
            window: list[tuple[str, concurrent.futures.Future[video.EncodedFrames]]] = []
            waiting = iter(self.videos)
            while True:
                # A bounded window, so that memory does not grow with the shard.
                while len(window) < 2 * threads and (item := next(waiting, None)) is not None:
                    window.append((item[0], pool.submit(self._sample, item[1])))
                if not window:
                    return
                name, future = window.pop(0)
                try:
                    sampled = future.result()
                except video.VideoError as error:
                    entries.append(manifest.Entry(name, "path", error.reason, "rejected", str(error)))
                    continue
                entries += _doubts(name, sampled)
                yield (
                    name,
                    {
                        "id": name,
                        "corpus": corpus_of(name),
                        "duration": sampled.info.duration,
                        "fps": sampled.info.fps,
                        "frames": [io.BytesIO(jpeg) for jpeg in sampled.jpegs],
                        "times": sampled.times,
                    },
                )

    def index(self, example: dict[str, Any]) -> dict[str, Any]:
        return {"duration": float(example["duration"]), "num_frames": len(example["times"])}

    def _sample(self, path: str) -> video.EncodedFrames:
        return video.sample_jpegs(path, self.frames, size=(self.size, self.size), quality=JPEG_QUALITY)


class Builder(resumable.ResumableBuilder):
    """DatasetBuilder for the videos of IVCR-200K."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}
    BUILDER_CONFIGS = [VideosConfig(frames=64), VideosConfig(frames=96), VideosConfig(frames=16, size=96)]
    MANUAL_DOWNLOAD_INSTRUCTIONS = """\
    The videos come from TVQA, LSMDC, ActivityNet, DiDeMo and MSR-VTT, each under its own terms: get them from
    their authors, and IVCR-200K.json from https://ivcr200k.github.io. Lay them in manual_dir:

      <manual_dir>/videos/<corpus>/<name>.<ext>
      <manual_dir>/IVCR-200K.json     (optional here: with it, videos it names and the tree lacks are reported)

    <corpus>/<name> must be spelled as in the JSON; the suffix does not matter.
    """

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=video_features(self.builder_config.size), homepage="https://ivcr200k.github.io"
        )

    def _jobs(self, manual_dir: epath.Path, staging: epath.Path) -> tuple[list[resumable.Job], list[manifest.Entry]]:
        del staging
        catalog = source.VideoCatalog(manual_dir / source.VIDEOS_FOLDER)
        self._wanted = set(catalog.files)
        entries = list(catalog.problems)
        if (manual_dir / source.DIALOGUES_FILE).exists():
            missing = sorted(_named_videos(manual_dir / source.DIALOGUES_FILE) - self._wanted)
            entries += [manifest.Entry(name, "path", "video_missing", "rejected") for name in missing]
            self._wanted |= set(missing)
        config = self.builder_config
        files = list(catalog.files.values())
        jobs: list[resumable.Job] = []
        for first in range(0, len(files), VIDEOS_PER_SHARD):
            shard = files[first : first + VIDEOS_PER_SHARD]
            key = resumable.key_of(
                str(self.version),
                config.name,
                JPEG_QUALITY,
                [(file.id, file.size, file.changed) for file in shard],
            )
            videos = tuple((file.id, str(file.path)) for file in shard)
            jobs.append(VideoJob(store.VIDEO_SPLIT, key, videos, config.frames, config.size))
        return jobs, entries

    def _loss(self, records: dict[str, int]) -> tuple[int, int, str]:
        return len(self._wanted) - records.get(store.VIDEO_SPLIT, 0), len(self._wanted), "videos"


def _doubts(name: str, sampled: video.EncodedFrames) -> Iterator[manifest.Entry]:
    """What is wrong with a video that can be used all the same."""
    if sampled.damaged:
        yield manifest.Entry(name, "frames", "damaged_packets", "flagged", f"{sampled.damaged} packets")
    if sampled.substituted:
        yield manifest.Entry(name, "frames", "frame_substituted", "repaired", f"{sampled.substituted} frames")
    if sampled.info.truncated:
        detail = f"{sampled.info.duration:.2f} of {sampled.info.declared_duration:.2f} s"
        yield manifest.Entry(name, "duration", "shorter_than_declared", "flagged", detail)


def _named_videos(path: epath.Path) -> set[str]:
    """The ids of all videos that the dialogues name. What is malformed there is the dialogue builder's to report."""
    named: set[str] = set()
    for row in source.stream_rows(path):
        for message in row.get("conversations") or () if isinstance(row, dict) else ():
            if isinstance(message, dict):
                candidates = message.get("candidate_videos")
                for name in (message.get("video_id"), *(candidates if isinstance(candidates, list) else ())):
                    if isinstance(name, str) and name.strip():
                        named.add(video_id(name))
    return named
