"""The whole way with real files: captioned clips -> composed dialogues -> both datasets -> batches."""

import json
import subprocess
import sys

import numpy as np
import pytest

from ivcr_jax.data import batches, manifest, pipeline, store
from ivcr_jax.data.dialogue import Intent, video_id
from ivcr_jax.data.encoding import EncodingConfig
from ivcr_jax.data.tokenizer import Tokenizer
from tfds_builder.build import build
from tfds_builder.ivcr200k_videos.ivcr200k_videos_dataset_builder import VideosConfig

FRAMES = 12


@pytest.fixture(scope="module")
def built(realdata, tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ivcr_jax.data.compose", "--format=manifest", "--repeats=3", "--num_candidates=6"),
            *(f"--annotations={realdata / 'MANIFEST.json'}", f"--videos={realdata}"),
            f"--out={folder / 'IVCR-200K.json'}",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (folder / "videos").symlink_to(realdata)
    build("ivcr200k", manual_dir=folder, data_dir=folder, max_loss=0.0)
    build(
        "ivcr200k_videos", manual_dir=folder, data_dir=folder, max_loss=0.0, config=VideosConfig(frames=FRAMES, size=64)
    )
    return folder


@pytest.fixture(scope="module")
def clips(realdata):
    rows = json.loads((realdata / "MANIFEST.json").read_text(encoding="utf-8"))["files"]
    return {video_id(row["file"]): row for row in rows if "clip" in row["kind"]}


def test_every_clip_is_there_with_its_measures(built, clips):
    videos = store.VideoStore(built / "ivcr200k_videos")
    assert set(videos.duration) == set(clips)
    for name, row in clips.items():
        media = row["media"]
        last = media["last_pts"] - media["first_pts"]
        assert last < videos.duration[name] <= last + 2.1 / media["avg_fps"], name
        assert videos.num_frames[name] == min(FRAMES, media["decoded_frames"]), name
        stored = videos.read(name)
        assert (np.diff(stored.times) > 0).all() and stored.times[0] >= 0 and stored.times[-1] <= last + 1e-3
    noted = {
        (entry.id, entry.reason) for entry in manifest.read(next(built.glob("ivcr200k_videos/*/*/manifest.jsonl")))
    }
    assert noted == {("clips/edge/corrupted", "damaged_packets")}


def test_dialogues_speak_of_the_clips_in_both_languages(built, clips):
    dialogues = store.DialogueStore(built / "ivcr200k", "train")
    languages, spans = set(), 0
    for number in range(len(dialogues)):
        for turn in dialogues[number].turns:
            languages.add(turn.language)
            if turn.intent == Intent.MOMENT:
                moments = [(moment["start"], moment["end"]) for moment in clips[turn.video_id]["moments"]]
                assert any(np.allclose(turn.span, moment, atol=0.35) for moment in moments), turn
                spans += 1
    assert languages == {"en", "zh"} and spans > 10


def test_they_make_batches_with_a_llama_tokenizer(built, realdata):
    tokenizer = Tokenizer.load(realdata / "tokenizer" / "mistral_v1.tokenizer.model")
    pack = batches.PackConfig(EncodingConfig(tokens_per_video=8), seq_len=2048, video_slots=20, frames=8)
    stream = pipeline.Pipeline(
        store.DialogueStore(built / "ivcr200k", "train"),
        store.VideoStore(built / "ivcr200k_videos"),
        tokenizer,
        pipeline.PipelineConfig(pack=pack, batch_size=2),
    )
    assert not any(entry.action == "rejected" for entry in stream.plan.entries)
    text = ""
    for step in range(stream.steps):
        batch = stream.batch(step)
        text += pipeline.describe(batch, tokenizer)
        shown = batch["frames"][batch["frame_mask"]]
        assert shown.reshape(len(shown), -1).std(axis=1).min() > 5  # no empty picture
        assert not batch["frames"][~batch["frame_mask"]].any()
    assert "候选视频" in text and "Candidate videos : " in text
