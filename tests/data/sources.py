"""A small source made in code, for tests: dialogues over videos that exist as features only."""

import json
import pathlib
from collections.abc import Iterable

import numpy as np

from ivcr_jax.data import store
from ivcr_jax.data.batches import PackConfig
from ivcr_jax.data.encoding import EncodingConfig
from ivcr_jax.data.tokenizer import Tokenizer, train_demo
from tfds_builder.build import build

VIDEOS = 12
SHAPE = (2, 3)
PACK = PackConfig(
    EncodingConfig(tokens_per_video=4, max_candidates=5), seq_len=640, video_slots=12, max_turns=8, frames=3
)


def name_of(number: int) -> str:
    return f"corpus/v{number}"


def raw_dialogue(number: int, split: str) -> dict:
    """Dialogue `number`: a search among 3-6 videos, a moment, thanks; 1-3 turns; every fifth in Chinese."""
    rng = np.random.default_rng((7, number))
    candidates = [f"{name_of(v)}.mp4" for v in rng.permutation(VIDEOS)[: rng.integers(3, 7)]]
    place = int(rng.integers(len(candidates)))
    zh = number % 5 == 0
    start = round(float(rng.uniform(0, 3)), 1)
    end = round(start + 1.5, 1)
    conversations = [
        {"from": "human", "value": f"找第{number}种动物。" if zh else f"Find animal {number}.", "text_id": number},
        {
            "from": "gpt",
            "value": f"在视频 {place + 1}。" if zh else f"It is in video {place + 1}.",
            "video_id": candidates[place],
            "candidate_videos": candidates,
            "gt_se": [-1, -1],
        },
        {"from": "human", "value": "什么时候？" if zh else "When is it seen?", "text_id": number},
        {
            "from": "gpt",
            "value": f"在视频 {place + 1} 的 {start}s-{end}s。" if zh else f"In video {place + 1} at {start}s-{end}s.",
            "video_id": candidates[place],
            "gt_se": [start, end],
        },
        {"from": "human", "value": "谢谢" if zh else "Thanks", "text_id": number},
        {"from": "gpt", "value": "不客气" if zh else "Not at all"},
    ]
    turns = 1 + number % 3
    return {"id": f"{split}-{number}", "split": split, "type": [1], "conversations": conversations[: 2 * turns]}


def build_dialogues(folder: pathlib.Path, count: int) -> pathlib.Path:
    """Builds the dialogues dataset under folder/data; a quarter of the rows are test."""
    manual = folder / "manual"
    manual.mkdir(parents=True)
    rows = [raw_dialogue(number, "test" if number % 4 == 3 else "train") for number in range(count)]
    (manual / "IVCR-200K.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return pathlib.Path(build("ivcr200k", manual_dir=manual, data_dir=folder / "data"))


def features_of(number: int) -> tuple[str, float, np.ndarray, np.ndarray]:
    """Video `number` as `write_features` takes it: 5 frames (the first video: 2), every feature different."""
    frames = 2 if number == 0 else 5
    array = 1000 * number + np.arange(frames * 6, dtype=np.float32).reshape(frames, *SHAPE)
    return name_of(number), 5.0 + number, np.arange(frames, dtype=np.float32), array


def write_features(
    folder: pathlib.Path,
    videos: Iterable[tuple[str, float, np.ndarray, np.ndarray]],
    *,
    shape: tuple[int, ...],
    dtype: type[np.floating],
    fingerprint: str,
) -> None:
    """A feature store of one shard; the arguments are those of `store.write_feature_shard` and of its description."""
    folder.mkdir(parents=True)
    rows = list(videos)
    columns = {"id": 0, "duration": 1, "num_frames": 2}
    index = {key: [len(row[2]) if place == 2 else row[place] for row in rows] for key, place in columns.items()}
    (path,) = store.feature_shards(folder, 1)
    store.write_feature_shard(path, rows, shape=shape, dtype=dtype)
    store.describe_features(folder, index, [len(rows)], shape=shape, dtype=dtype, fingerprint=fingerprint)


def build_features(folder: pathlib.Path, videos: range = range(VIDEOS)) -> pathlib.Path:
    """Writes the feature store folder/features."""
    path = folder / "features"
    write_features(
        path, (features_of(n) for n in videos), shape=SHAPE, dtype=np.float32, fingerprint=f"features of {videos}"
    )
    return path


def tokenizer() -> Tokenizer:
    """A demo tokenizer that knows the texts of `raw_dialogue`."""
    texts = [message["value"] for number in range(20) for message in raw_dialogue(number, "train")["conversations"]]
    return train_demo([*texts, "[INST] <<SYS>> <</SYS>> [/INST] 0123456789 frames sampled at seconds second"], 400)
