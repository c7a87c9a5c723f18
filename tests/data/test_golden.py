"""One whole batch, in words, as it is meant to be: golden/batch.txt.

`python -m tests.data.test_golden` writes it anew. Read the difference before you accept one: whatever changes here
changes what every model is trained on.
"""

import dataclasses
import pathlib
import shutil
import tempfile

import numpy as np
import pytest

from ivcr_jax.data import pipeline, store
from ivcr_jax.data.batches import PackConfig
from ivcr_jax.data.encoding import EncodingConfig
from ivcr_jax.data.tokenizer import Tokenizer, train_demo
from tfds_builder.build import build
from tfds_builder.ivcr200k_videos.ivcr200k_videos_dataset_builder import VideosConfig

GOLDEN = pathlib.Path(__file__).parent / "golden"
BUILDERS = pathlib.Path(__file__).resolve().parents[2] / "tfds_builder"
CONFIG = pipeline.PipelineConfig(
    pack=PackConfig(
        EncodingConfig(tokens_per_video=3, max_candidates=4), seq_len=2048, video_slots=8, max_turns=12, frames=4
    ),
    batch_size=2,
    seed=1,
)


def build_source(folder: pathlib.Path) -> None:
    """Builds both datasets from the builders' dummy data."""
    shutil.copytree(BUILDERS / "ivcr200k_videos" / "dummy_data", folder / "manual")
    shutil.copy(BUILDERS / "ivcr200k" / "dummy_data" / "IVCR-200K.json", folder / "manual")
    build("ivcr200k", manual_dir=folder / "manual", data_dir=folder)
    config = VideosConfig(frames=6, size=32)
    build("ivcr200k_videos", manual_dir=folder / "manual", data_dir=folder, config=config)


def render(folder: pathlib.Path) -> tuple[str, str]:
    """(the first training batch in both layouts, in words; mean colours of each slot's first and last frame)."""
    tokenizer = Tokenizer.load(GOLDEN / "demo.model")
    stores = store.DialogueStore(folder / "ivcr200k", "train"), store.VideoStore(folder / "ivcr200k_videos")
    parts = []
    for layout in ("isolated", "inline"):
        encoding = dataclasses.replace(CONFIG.pack.encoding, layout=layout)
        config = dataclasses.replace(CONFIG, pack=dataclasses.replace(CONFIG.pack, encoding=encoding))
        batch = pipeline.Pipeline(*stores, tokenizer, config).batch(0)
        if layout == "isolated":
            parts += [f"{name}: {array.dtype}{list(array.shape)}" for name, array in batch.items()]
        parts += ["", f"=== {layout} ===", pipeline.describe(batch, tokenizer)]
    colours = []
    for row, slot in zip(*np.nonzero(batch["video_mask"]), strict=True):
        frames = batch["frames"][row, slot][[0, -1]].mean((1, 2))
        listed = "  ".join(" ".join(f"{value:5.1f}" for value in frame) for frame in frames)
        colours.append(f"row {row} slot {slot}:  {listed}")
    return "\n".join(parts), "\n".join(colours) + "\n"


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    build_source(folder)
    return render(folder)


def test_the_batch_is_the_golden_one(rendered):
    assert rendered[0] == (GOLDEN / "batch.txt").read_text(encoding="utf-8")


def test_the_pixels_are_the_golden_ones(rendered):
    """By mean colour, as two builds of libav may round a pixel differently."""
    lines = zip(rendered[1].splitlines(), (GOLDEN / "colours.txt").read_text().splitlines(), strict=True)
    for found, expected in lines:
        place, values = found.split(":")
        assert expected.startswith(place + ":")
        assert [float(v) for v in values.split()] == pytest.approx(
            [float(v) for v in expected.split(":")[1].split()], abs=1
        )


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        build_source(folder)
        if not (GOLDEN / "demo.model").exists():
            texts = []
            for split in ("train", "test"):
                dialogues = store.DialogueStore(folder / "ivcr200k", split)
                texts += [
                    text for i in range(len(dialogues)) for t in dialogues[i].turns for text in (t.user, t.answer)
                ]
            wording = (
                "[INST] <<SYS>>\nYou are an excellent video retrieval AI assistant.\n<</SYS>>\n\n Candidate videos : "
            )
            wording += (
                "Current video : The video contains frames sampled at seconds. This frame is sampled second. [/INST]"
            )
            train_demo(
                [
                    *texts,
                    wording,
                    "候选视频：当前视频：该视频共有帧，采样时间为秒。你是一个出色的视频检索人工智能助手。",
                ],
                700,
                GOLDEN / "demo.model",
            )
        batch, colours = render(folder)
        (GOLDEN / "batch.txt").write_text(batch, encoding="utf-8")
        (GOLDEN / "colours.txt").write_text(colours)


if __name__ == "__main__":
    main()
