"""The engine under both builders: shards written one by one to a staging folder, resumable, on one machine or Beam.

TFDS's own engine throws every finished shard away when a build stops. Here a shard is a job with a key made of
its inputs; its finished file stays in `<data_dir>/.staging/<dataset>` under that key until the whole dataset is
moved into place, so a build that starts again only does what is left. What a job is about is the builder's affair.
"""

import abc
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from tensorflow_datasets.core import dataset_builder, example_serializer, file_adapters, splits
from tqdm import tqdm

from ivcr_jax.data import manifest, store

MANIFEST = "manifest.jsonl"


@dataclasses.dataclass(frozen=True)
class Job(abc.ABC):
    """One shard to write. Travels to Beam workers, so it holds plain values only.

    Attributes:
      split: the split it belongs to.
      key: unique per content of the shard: the same key means the same bytes.
    """

    split: str
    key: str

    @abc.abstractmethod
    def features(self) -> tfds.features.FeaturesDict:
        """The features of the examples."""

    @abc.abstractmethod
    def examples(self, entries: list[manifest.Entry]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields (id, example); appends to `entries` what goes wrong."""

    @abc.abstractmethod
    def index(self, example: dict[str, Any]) -> dict[str, Any]:
        """What readers want to know of a record before they read it."""


def stage(job: Job, staging: str, file_format: str) -> None:
    """Writes a job's shard and its record (index, manifest entries) to the staging folder, unless they are there."""
    record = epath.Path(staging) / f"{job.key}.json"
    if record.exists():
        return
    adapter = file_adapters.ADAPTER_FOR_FORMAT[file_adapters.FileFormat.from_value(file_format)]
    features = job.features()
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    entries: list[manifest.Entry] = []
    index: list[dict[str, Any]] = []

    def serialized() -> Iterator[tuple[str, bytes]]:
        for name, example in job.examples(entries):
            index.append({"id": name, **job.index(example)})
            yield name, serializer.serialize_example(features.encode_example(example))

    with manifest.atomic(epath.Path(staging) / job.key) as path:
        adapter.write_examples(path, serialized())
    # The record comes last: where it is, the shard is whole.
    with manifest.atomic(record) as path:
        path.write_text(json.dumps({"index": index, "entries": [vars(entry) for entry in entries]}))


class ResumableBuilder(dataset_builder.FileReaderBuilder):
    """A builder of jobs. Beside the shards it leaves a manifest, a summary and the ids in record order.

    Args:
      max_loss: the share of the source, in [0, 1], that may be lost before the build refuses to finish.
      **kwargs: of `tfds.core.DatasetBuilder`. The file format is ArrayRecord unless another is asked for.
    """

    def __init__(self, *, max_loss: float = 0.05, **kwargs: Any):
        if not 0 <= max_loss <= 1:
            raise ValueError(f"max_loss is {max_loss}; expected a share between 0 and 1")
        if kwargs.get("file_format") is None:
            kwargs["file_format"] = "array_record"
        super().__init__(**kwargs)
        self._max_loss = max_loss

    @abc.abstractmethod
    def _jobs(self, manual_dir: epath.Path, staging: epath.Path) -> tuple[list[Job], list[manifest.Entry]]:
        """The jobs in record order, and manifest entries of what was lost before any job."""

    @abc.abstractmethod
    def _loss(self, records: dict[str, int]) -> tuple[int, int, str]:
        """(units lost, units in the source, the unit's name in the plural), given the records of each split."""

    def _download_and_prepare(
        self,
        dl_manager: tfds.download.DownloadManager,
        download_config: tfds.download.DownloadConfig | None = None,
    ) -> None:
        config = download_config or tfds.download.DownloadConfig()
        staging = self.data_dir_root / ".staging" / self.info.full_name
        staging.mkdir(parents=True, exist_ok=True)
        jobs, entries = self._jobs(epath.Path(dl_manager.manual_dir), staging)
        self._run(jobs, staging, config)
        index: dict[str, list[dict[str, Any]]] = {}
        shards: dict[str, list[tuple[epath.Path, int]]] = {}
        for job in jobs:
            record = json.loads((staging / f"{job.key}.json").read_text())
            entries += [manifest.Entry(**entry) for entry in record["entries"]]
            if record["index"]:
                index.setdefault(job.split, []).extend(record["index"])
                shards.setdefault(job.split, []).append((staging / job.key, len(record["index"])))
        counts = manifest.write(staging / MANIFEST, entries)
        lost, seen, what = self._loss({split: len(rows) for split, rows in index.items()})
        manifest.check_loss(
            lost=lost, seen=seen, what=what, max_loss=self._max_loss, counts=counts, path=str(staging / MANIFEST)
        )
        self._move_into_place(shards)
        target = epath.Path(self.data_dir)
        for split, rows in index.items():
            columns = {name: [row[name] for row in rows] for name in rows[0]}
            (target / store.index_file(split)).write_text(json.dumps(columns, ensure_ascii=False))
        (staging / MANIFEST).copy(target / MANIFEST)
        summary = {
            "dataset": self.info.full_name,
            # Readers cache what they derive from a dataset under this name.
            "fingerprint": hashlib.sha256("\n".join(job.key for job in jobs).encode()).hexdigest(),
            "records": {split: len(rows) for split, rows in index.items()},
            "unit": what,
            "seen": seen,
            "lost": lost,
            "manifest": dict(counts.most_common()),
        }
        (target / store.SUMMARY).write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        staging.rmtree()
        for parent in staging.parents:  # up to .staging, unless another build has something there
            if parent == self.data_dir_root or not parent.is_dir() or any(parent.iterdir()):
                break
            parent.rmdir()
        logging.info("%s", json.dumps(summary, ensure_ascii=False))

    def _run(self, jobs: list[Job], staging: epath.Path, config: tfds.download.DownloadConfig) -> None:
        file_format = self.info.file_format.value
        if config.beam_runner is None and config.beam_options is None:
            for job in tqdm(jobs, desc=f"{self.name} shards", unit="shard"):
                stage(job, str(staging), file_format)
            return
        import apache_beam as beam

        with beam.Pipeline(runner=config.beam_runner, options=config.beam_options) as pipeline:
            _ = (
                pipeline
                | beam.Create(jobs)
                | beam.Reshuffle()
                | beam.Map(stage, staging=str(staging), file_format=file_format)
            )

    def _move_into_place(self, shards: dict[str, list[tuple[epath.Path, int]]]) -> None:
        infos = []
        for split, staged in shards.items():
            template = self._get_filename_template(split_name=split)
            size = 0
            for index, (path, _) in enumerate(staged):
                size += path.stat().length
                path.rename(template.sharded_filepath(shard_index=index, num_shards=len(staged)))
            lengths = [length for _, length in staged]
            infos.append(
                splits.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template)
            )
        self.info.set_splits(splits.SplitDict(infos))


def key_of(*parts: object) -> str:
    """A job's key from all that its shard depends on."""
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, default=str).encode()).hexdigest()[:32]
