"""Builds a dataset without TensorFlow: `python -m tfds_builder.build --dataset=ivcr200k --manual_dir=D --data_dir=D`.

The same builder classes as `tfds build` (which imports TensorFlow and Beam), with their options as flags.
"""

import importlib
import sys
from typing import Any

import tensorflow_datasets as tfds
from absl import app, flags
from etils import epath

from ivcr_jax import command
from ivcr_jax.data import manifest, source, store
from tfds_builder.ivcr200k_videos.ivcr200k_videos_dataset_builder import VideosConfig

DATASETS = ("ivcr200k", "ivcr200k_videos")


def build(
    dataset: str,
    *,
    manual_dir: epath.PathLike,
    data_dir: epath.PathLike,
    config: VideosConfig | None = None,
    max_loss: float = 0.05,
    beam_options: list[str] | None = None,
) -> epath.Path:
    """Builds one dataset unless it is there. Returns its folder.

    Args:
      dataset: one of DATASETS.
      manual_dir: the source.
      data_dir: where to.
      config: frames and size, for `ivcr200k_videos`.
      max_loss: share of the source that may be lost.
      beam_options: Beam pipeline options (`name=value`); None builds in this process.

    Raises:
      SourceError, TooMuchLost: as the builders do.
    """
    module = importlib.import_module(f"tfds_builder.{dataset}.{dataset}_dataset_builder")
    kwargs: dict[str, Any] = {}
    if config is not None:  # TFDS wants its own configs by name
        kwargs["config"] = config.name if config.name in module.Builder.builder_configs else config
    builder = module.Builder(data_dir=data_dir, max_loss=max_loss, **kwargs)
    download_config = tfds.download.DownloadConfig(manual_dir=epath.Path(manual_dir))
    if beam_options:
        from apache_beam.options.pipeline_options import PipelineOptions

        download_config.beam_options = PipelineOptions([f"--{option}" for option in beam_options])
    builder.download_and_prepare(download_config=download_config)
    return epath.Path(builder.data_dir)


def _define_flags() -> None:
    # Not at import: another program may import this module and have flags of the same names.
    flags.DEFINE_enum("dataset", None, DATASETS, "What to build.", required=True)
    flags.DEFINE_string(
        "manual_dir", None, "Folder with IVCR-200K.json and videos/<corpus>/<name>.<ext>.", required=True
    )
    flags.DEFINE_string("data_dir", None, "Folder to write datasets to.", required=True)
    flags.DEFINE_integer("frames", 64, "ivcr200k_videos: sampled frames a video.")
    flags.DEFINE_integer("size", 224, "ivcr200k_videos: height and width of a frame, pixels.")
    flags.DEFINE_float("max_loss", 0.05, "Share of the source that may be lost before the build refuses to finish.")
    flags.DEFINE_multi_string(
        "beam", [], "An Apache Beam pipeline option, e.g. runner=DataflowRunner; repeatable. Distributes the build."
    )


def main(argv: list[str]) -> None:
    command.refuse_arguments(argv)
    args = flags.FLAGS
    try:
        path = build(
            args.dataset,
            manual_dir=args.manual_dir,
            data_dir=args.data_dir,
            config=VideosConfig(frames=args.frames, size=args.size) if args.dataset == "ivcr200k_videos" else None,
            max_loss=args.max_loss,
            beam_options=args.beam,
        )
    except (source.SourceError, manifest.TooMuchLost) as error:
        sys.exit(f"error: {error}")
    print((path / store.SUMMARY).read_text(), end="")
    print(path)


if __name__ == "__main__":
    _define_flags()
    app.run(main)
