"""Random access to what was built: dialogues by number, videos by id.

A video store holds sampled frames (the `ivcr200k_videos` dataset) or the features a frozen tower made of them; the
pipeline reads both through the same calls. Nothing here knows of tokens, rows or batches.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source, array_record_module
from etils import epath
from tensorflow_datasets.core import example_parser, example_serializer, splits

from ivcr_jax.data import manifest, video
from ivcr_jax.data.dialogue import LANGUAGES, Dialogue, Intent, Turn

SUMMARY = "summary.json"
# The only split of a video store: a video belongs to no split, dialogues do.
VIDEO_SPLIT = "corpus"


def index_file(split: str) -> str:
    """The name of the file beside the shards that holds, in record order, what is known of each record."""
    return f"index-{split}.json"


class DatasetNotFound(Exception):
    """A folder does not hold the one whole dataset it should."""


class _Records:
    """The parsed records of one split of a built dataset. Reopens its files after pickling, for worker processes."""

    def __init__(self, directory: epath.PathLike, split: str):
        self.directory = _dataset_directory(epath.Path(directory))
        self.split = split
        self._source: array_record_data_source.ArrayRecordDataSource | None = None
        path = self.directory / index_file(split)
        if not path.exists():
            found = sorted(p.name[len("index-") : -len(".json")] for p in self.directory.glob("index-*.json"))
            raise DatasetNotFound(f"{self.directory}: no split {split!r}; it has {found}")
        self.index: dict[str, list[Any]] = json.loads(path.read_text(encoding="utf-8"))
        self.summary: dict[str, Any] = json.loads((self.directory / SUMMARY).read_text(encoding="utf-8"))
        self.fingerprint: str = self.summary["fingerprint"]

    def __len__(self) -> int:
        return len(self.index["id"])

    def __getitem__(self, record: int) -> Mapping[str, Any]:
        if self._source is None:
            # Parsed here, not by TFDS's own data source: that one would decode the frames, with TensorFlow or Pillow.
            info = tfds.builder_from_directory(self.directory).info
            paths = [os.fspath(path) for path in info.splits[self.split].filepaths]
            self._parser = example_parser.ExampleParserNp(info.features.get_serialized_info())
            try:
                source = array_record_data_source.ArrayRecordDataSource(paths)
                found = f"{len(source)} records"
            except RuntimeError as error:
                found = str(error)
            if found != f"{len(self)} records":  # where a file is absent, some versions raise and some count none
                raise DatasetNotFound(
                    f"{self.directory}: its index lists {len(self)} records of {self.split}, its shards give: {found}; "
                    "a shard is absent or cut off"
                )
            self._source = source
        return self._parser.parse_example(self._source[record])

    def features(self) -> tfds.features.FeaturesDict:
        return tfds.features.FeaturesDict.from_config(os.fspath(self.directory))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_source": None, "_parser": None}


def _dataset_directory(path: epath.Path) -> epath.Path:
    """The folder with dataset_info.json at `path` or, where there is only one, below it."""
    if not path.is_dir():
        raise DatasetNotFound(f"{path}: no such folder; expected a built dataset")
    if (path / "dataset_info.json").exists():
        return path
    found = [
        info.parent
        for depth in ("*", "*/*", "*/*/*")
        for info in path.glob(f"{depth}/dataset_info.json")
        if not any(part.startswith(".") for part in info.relative_to(path).parts)
    ]
    if len(found) != 1:
        listed = ", ".join(sorted(str(p) for p in found)) or "none"
        raise DatasetNotFound(f"{path}: expected one built dataset at or below it, found: {listed}")
    return found[0]


class DialogueStore:
    """The dialogues of one split, by number."""

    def __init__(self, directory: epath.PathLike, split: str):
        self._records = _Records(directory, split)
        self.split = split
        self.ids: list[str] = self._records.index["id"]
        self.fingerprint = f"{self._records.fingerprint}:{split}"

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, record: int) -> Dialogue:
        row = self._records[record]
        turns = row["turns"]
        candidates = [_text(name) for name in row["candidates"]]
        built = []
        used = 0
        for place, intent in enumerate(turns["intent"]):
            count = int(turns["num_candidates"][place])
            built.append(
                Turn(
                    user=_text(turns["user"][place]),
                    answer=_text(turns["answer"][place]),
                    intent=Intent(int(intent)),
                    language=LANGUAGES[int(turns["language"][place])],
                    video_id=_text(turns["video_id"][place]),
                    candidates=tuple(candidates[used : used + count]),
                    span=(float(turns["start"][place]), float(turns["end"][place]))
                    if intent == Intent.MOMENT
                    else None,
                )
            )
            used += count
        return Dialogue(_text(row["id"]), self.split, int(row["type"]), tuple(built))


@dataclasses.dataclass(frozen=True)
class StoredVideo:
    """A video as read, before its frames are decoded.

    Attributes:
      times: f32[N], seconds from the first frame.
      duration: seconds.
      payload: N JPEG files, or features [N, ...].
    """

    times: np.ndarray
    duration: float
    payload: Any


class VideoStore:
    """Videos by id: sampled frames or features of them.

    Attributes:
      kind: "frames" or "features".
      item_shape: of one frame's array: (H, W, 3) or the feature's shape.
      dtype: u8 for frames.
      made_by: of features, what `ivcr_jax.encode` made them from and by (its docstring tells the fields); else None.
      number, duration, num_frames: by id, known without reading the video.
    """

    def __init__(self, directory: epath.PathLike):
        self._records = _Records(directory, VIDEO_SPLIT)
        self.fingerprint = self._records.fingerprint
        self.made_by: dict[str, Any] | None = self._records.summary.get("made_by")
        index = self._records.index
        self.number = {name: number for number, name in enumerate(index["id"])}
        self.duration: dict[str, float] = dict(zip(index["id"], index["duration"], strict=True))
        self.num_frames: dict[str, int] = dict(zip(index["id"], index["num_frames"], strict=True))
        features = self._records.features()
        self.kind = "frames" if "frames" in features else "features"
        self.item_shape: tuple[int, ...]
        if self.kind == "frames":
            self.item_shape, self.dtype = features["frames"].shape[1:], np.dtype(np.uint8)
        else:
            self.item_shape, self.dtype = features["features"].shape[1:], np.dtype(features["features"].np_dtype)

    def __contains__(self, name: object) -> bool:
        return name in self.number

    def __len__(self) -> int:
        return len(self.number)

    def read(self, name: str) -> StoredVideo:
        """Reads a video's record. Raises KeyError for an id the store lacks."""
        row = self._records[self.number[name]]
        payload: Any = row[self.kind]
        if self.kind == "features":
            payload = np.frombuffer(payload, self.dtype).reshape(-1, *self.item_shape)
        return StoredVideo(np.asarray(row["times"], np.float32), float(row["duration"]), payload)

    def decode(self, stored: StoredVideo, chosen: np.ndarray, out: np.ndarray) -> None:
        """Writes the chosen frames, dtype[len(chosen), *item_shape], to the front of `out`."""
        if self.kind == "frames":
            jpegs = [stored.payload[place] for place in chosen]
            video.decode_jpegs(jpegs, size=(self.item_shape[0], self.item_shape[1]), out=out[: len(chosen)])
        else:
            out[: len(chosen)] = stored.payload[chosen]


def choose_stored(stored: int, wanted: int, rng: np.random.Generator | None) -> np.ndarray:
    """Which of `stored` frames, even in time, stand for a video: i64[min(stored, wanted)], ascending.

    One frame for each of `wanted` equal intervals: the one in the middle, or with `rng` any of its frames.
    """
    if stored <= wanted:
        return np.arange(stored)
    if rng is None:
        return (np.arange(wanted) * 2 + 1) * stored // (2 * wanted)
    edges = np.arange(wanted + 1) * stored // wanted
    return rng.integers(edges[:-1], edges[1:])


def feature_features(shape: tuple[int, ...], dtype: Any) -> tfds.features.FeaturesDict:
    """The features of a feature store's record: one array dtype[N, *shape] a video."""
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "duration": np.float32,
            "times": tfds.features.Sequence(np.float32),
            "features": tfds.features.Tensor(shape=(None, *shape), dtype=dtype, encoding="bytes"),
        }
    )


def feature_shards(directory: epath.PathLike, count: int) -> list[epath.Path]:
    """The paths of a feature store's shards, in record order."""
    template = _feature_template(directory)
    return [template.sharded_filepath(shard_index=number, num_shards=count) for number in range(count)]


def write_feature_shard(
    path: epath.Path,
    videos: Iterable[tuple[str, float, np.ndarray, np.ndarray]],
    *,
    shape: tuple[int, ...],
    dtype: Any,
) -> None:
    """Writes one of `feature_shards`, video by video; the file appears when it is whole.

    Args:
      path: of the shard.
      videos: (id, duration in seconds, times f32[N] in seconds, features dtype[N, *shape]).
      shape: of one frame's features.
      dtype: float16 or float32.

    Raises ValueError, naming the video, for features of another shape or number.
    """
    features = feature_features(shape, dtype)
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    with manifest.atomic(path) as temporary:
        # Not compressed, unlike TFDS's own shards: features shrink by 8 %, and reading them would take twice as long.
        writer = array_record_module.ArrayRecordWriter(os.fspath(temporary), "group_size:1,uncompressed")
        try:
            for name, duration, times, array in videos:
                if array.shape[1:] != shape or len(array) != len(times):
                    raise ValueError(
                        f"{name}: features {array.shape} at {len(times)} times; expected {(len(times), *shape)}"
                    )
                example = {
                    "id": name,
                    "duration": duration,
                    "times": times,
                    "features": array.astype(dtype, copy=False),
                }
                # Deterministic: or the order of the fields, and so the bytes, would change from process to process.
                record = serializer.get_tf_example(features.encode_example(example))
                writer.write(record.SerializeToString(deterministic=True))
        finally:
            writer.close()


def describe_features(
    directory: epath.PathLike,
    index: Mapping[str, list[Any]],
    lengths: list[int],
    *,
    shape: tuple[int, ...],
    dtype: Any,
    fingerprint: str,
    made_by: Mapping[str, Any] | None = None,
) -> None:
    """Puts beside whole shards what makes them a store: TFDS's metadata, the index and the summary.

    Args:
      directory: with all of `feature_shards(directory, len(lengths))`.
      index: "id", "duration" and "num_frames" of every record, in record order.
      lengths: records of each shard.
      shape, dtype: as `write_feature_shard` takes them.
      fingerprint: names what the features were made from and by.
      made_by: plain values that tell what the features were made from and by; None where nobody will ask.
    """
    directory = epath.Path(directory)
    paths = feature_shards(directory, len(lengths))
    template = _feature_template(directory)
    size = sum(path.stat().length for path in paths)
    info = splits.SplitInfo(name=VIDEO_SPLIT, shard_lengths=lengths, num_bytes=size, filename_template=template)
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features=feature_features(shape, dtype),
        split_infos=[info],
        filename_template=template,
        check_data=False,
    )
    (directory / index_file(VIDEO_SPLIT)).write_text(json.dumps(index, ensure_ascii=False))
    summary = {"fingerprint": fingerprint} | ({} if made_by is None else {"made_by": dict(made_by)})
    (directory / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")


def _feature_template(directory: epath.PathLike) -> tfds.core.ShardedFileTemplate:
    return tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(directory), dataset_name="features", split=VIDEO_SPLIT, filetype_suffix="array_record"
    )


def _text(value: bytes | str) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)
