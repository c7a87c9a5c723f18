"""IVCR-200K dialogues: one record a dialogue, from IVCR-200K.json in manual_dir."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

from ivcr_jax.data import manifest, source, splits
from ivcr_jax.data.dialogue import LANGUAGES, Intent
from tfds_builder import resumable

# Of the dialogues of train, at most this share leaves it for validation.
VALIDATION_SHARE = 0.05
# Bounds the memory of a job; the size of a shard is of no consequence to random access.
DIALOGUES_PER_SHARD = 8192

NO_TIME = -1.0


def dialogue_features() -> tfds.features.FeaturesDict:
    """The features of a record.

    A turn's candidates are `num_candidates` items of the flat list `candidates`, in the order of the turns: TFDS
    writes sequences of sequences only with TensorFlow at hand. `start` and `end` are seconds, -1 where the turn asks
    for no moment.
    """
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "type": np.int32,
            "turns": tfds.features.Sequence(
                {
                    "user": tfds.features.Text(),
                    "answer": tfds.features.Text(),
                    "intent": tfds.features.ClassLabel(names=[intent.name.lower() for intent in Intent]),
                    "language": tfds.features.ClassLabel(names=list(LANGUAGES)),
                    "video_id": tfds.features.Text(),
                    "start": np.float32,
                    "end": np.float32,
                    "num_candidates": np.int32,
                }
            ),
            "candidates": tfds.features.Sequence(tfds.features.Text()),
        }
    )


@dataclasses.dataclass(frozen=True)
class DialogueJob(resumable.Job):
    """A shard of validated dialogues, read from a JSON-lines file of the staging folder."""

    path: str

    def features(self) -> tfds.features.FeaturesDict:
        return dialogue_features()

    def examples(self, entries: list[manifest.Entry]) -> Iterator[tuple[str, dict[str, Any]]]:
        del entries  # rows were validated when the file was written
        with epath.Path(self.path).open("r", encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                turns = row["turns"]
                spans = [turn["span"] or (NO_TIME, NO_TIME) for turn in turns]
                yield (
                    row["id"],
                    {
                        "id": row["id"],
                        "type": row["type"],
                        "turns": {
                            **{
                                name: [turn[name] for turn in turns]
                                for name in ("user", "answer", "intent", "language", "video_id")
                            },
                            "start": [start for start, _ in spans],
                            "end": [end for _, end in spans],
                            "num_candidates": [len(turn["candidates"]) for turn in turns],
                        },
                        "candidates": [candidate for turn in turns for candidate in turn["candidates"]],
                    },
                )

    def index(self, example: dict[str, Any]) -> dict[str, Any]:
        return {}


class Builder(resumable.ResumableBuilder):
    """DatasetBuilder for the dialogues of IVCR-200K."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = """\
    Get IVCR-200K.json from the authors of IVCR-200K (https://ivcr200k.github.io) and lay it in manual_dir:

      <manual_dir>/IVCR-200K.json
      <manual_dir>/videos/<corpus>/<name>.<ext>     (optional here: with it, videos and times are checked)
    """

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(features=dialogue_features(), homepage="https://ivcr200k.github.io")

    def _jobs(self, manual_dir: epath.Path, staging: epath.Path) -> tuple[list[resumable.Job], list[manifest.Entry]]:
        videos = manual_dir / source.VIDEOS_FOLDER
        catalog = source.VideoCatalog(videos) if videos.is_dir() else None
        if catalog is None:
            logging.warning("%s is absent: that videos exist and moments lie inside them goes unchecked", videos)
        reader = source.RowReader(catalog)
        entries: list[manifest.Entry] = []
        truths: dict[str, list[str]] = {}
        split_of: dict[str, str] = {}
        everything = staging / "dialogues.jsonl"
        with everything.open("w", encoding="utf-8") as file:
            try:
                for row in source.stream_rows(manual_dir / source.DIALOGUES_FILE):
                    dialogue = reader.read(row)
                    if dialogue is None:
                        continue
                    split_of[dialogue.id] = dialogue.split
                    if dialogue.split == "train":
                        truths[dialogue.id] = [turn.video_id for turn in dialogue.turns if turn.video_id]
                    file.write(json.dumps(dataclasses.asdict(dialogue), ensure_ascii=False) + "\n")
            except source.SourceError as error:
                # An unknown share is lost, so it counts as all of it: only max_loss=1 builds the rest.
                if not split_of or self._max_loss < 1:
                    raise
                entries.append(manifest.Entry(source.DIALOGUES_FILE, "", "malformed_json", "cut", str(error)))
        entries += reader.take_entries()
        self._seen, self._kept = reader.seen, reader.kept
        if "validation" not in split_of.values():
            validation, left_out = splits.carve(truths, VALIDATION_SHARE)
            split_of |= dict.fromkeys(validation, "validation") | dict.fromkeys(left_out, "")
        jobs, lost = _shard(everything, split_of, staging)
        self._kept -= sum(lost.values())
        entries += [
            manifest.Entry(name, "split", "astride_train_and_validation", "rejected", f"{count} turns")
            for name, count in lost.items()
        ]
        everything.unlink()
        return jobs, entries

    def _loss(self, records: dict[str, int]) -> tuple[int, int, str]:
        del records
        return self._seen - self._kept, self._seen, "interactions"


def _shard(
    everything: epath.Path, split_of: dict[str, str], staging: epath.Path
) -> tuple[list[resumable.Job], dict[str, int]]:
    """Deals the dialogues out to one file a shard. Returns the jobs and the dialogues (id -> turns) of no split."""
    left_out: dict[str, int] = {}
    jobs: list[resumable.Job] = []
    pending: dict[str, list[str]] = {"train": [], "validation": [], "test": []}

    def close(split: str) -> None:
        key = resumable.key_of("dialogues", split, pending[split])
        path = staging / f"{key}.rows.jsonl"
        path.write_text("".join(pending[split]), encoding="utf-8")
        jobs.append(DialogueJob(split, key, str(path)))
        pending[split] = []

    with everything.open("r", encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            split = split_of[row["id"]]
            if not split:
                left_out[row["id"]] = len(row["turns"])
                continue
            pending[split].append(line)
            if len(pending[split]) == DIALOGUES_PER_SHARD:
                close(split)
    for split, lines in pending.items():
        if lines:
            close(split)
    return jobs, left_out
