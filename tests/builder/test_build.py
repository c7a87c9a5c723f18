"""The builders on a real source: encoded videos with faults among them, built in every way there is."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from ivcr_jax.data import manifest, source, store, synth, video
from ivcr_jax.data.dialogue import Intent
from tfds_builder.build import build
from tfds_builder.ivcr200k_videos.ivcr200k_videos_dataset_builder import VideosConfig

CONFIG = VideosConfig(frames=6, size=32)
ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """A faultless source of 24 videos and 60 interactions."""
    folder = tmp_path_factory.mktemp("source")
    synth.generate(folder, videos=24, interactions=60, seconds=4.0, seed=5)
    return folder


@pytest.fixture(scope="session")
def built(good, tmp_path_factory):
    """The good source built by our own entry point."""
    data = tmp_path_factory.mktemp("data")
    build("ivcr200k", manual_dir=good, data_dir=data)
    build("ivcr200k_videos", manual_dir=good, data_dir=data, config=CONFIG)
    return data


def run(*arguments, timeout=300, **kwargs):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
        **kwargs,
    )


def all_dialogues(data):
    """By split; a split that came out empty is not there."""
    return {
        split: [dialogues[i] for i in range(len(dialogues))]
        for split in summary_of(data / "ivcr200k" / "1.0.0")["records"]
        for dialogues in [store.DialogueStore(data / "ivcr200k", split)]
    }


def assert_same_videos(first, second):
    a, b = store.VideoStore(first), store.VideoStore(second)
    assert a.fingerprint == b.fingerprint and a.duration == b.duration and len(a) > 0
    for name in a.duration:
        x, y = a.read(name), b.read(name)
        assert list(x.payload) == list(y.payload) and (x.times == y.times).all()


def summary_of(folder):
    return json.loads((pathlib.Path(folder) / store.SUMMARY).read_text())


def test_nothing_of_a_good_source_is_lost(good, built):
    raw = json.loads((good / "IVCR-200K.json").read_text())
    found = all_dialogues(built)
    assert sum(len(part) for part in found.values()) == len(raw)
    by_id = {dialogue.id: dialogue for part in found.values() for dialogue in part}
    for row in raw:
        dialogue = by_id[row["id"]]
        assert [turn.user for turn in dialogue.turns] == [m["value"] for m in row["conversations"][::2]]
        assert dialogue.type == row["type"][0] and (dialogue.split == "test") == (row["split"] == "test")
    assert summary_of(built / "ivcr200k" / "1.0.0")["lost"] == 0
    assert {intent for part in found.values() for d in part for intent in [t.intent for t in d.turns]} == set(Intent)


def test_validation_shares_no_truth_with_train(built):
    found = all_dialogues(built)
    truths = {
        split: {turn.video_id for dialogue in found[split] for turn in dialogue.turns if turn.video_id}
        for split in found
    }
    assert truths["validation"] and not truths["validation"] & truths["train"]


def test_videos_hold_the_frames_a_plain_decode_gives(good, built):
    videos = store.VideoStore(built / "ivcr200k_videos")
    files = {p.relative_to(good / "videos").with_suffix("").as_posix(): p for p in (good / "videos").rglob("*.*")}
    assert set(videos.duration) == set(files)
    for name, path in files.items():
        expected = video.sample_frames(str(path), CONFIG.frames, size=(CONFIG.size, CONFIG.size))
        stored = videos.read(name)
        assert stored.times == pytest.approx(expected.times)
        assert videos.duration[name] == pytest.approx(expected.info.duration, rel=1e-6)
        out = np.zeros((CONFIG.frames, CONFIG.size, CONFIG.size, 3), np.uint8)
        videos.decode(stored, np.arange(len(stored.times)), out)
        error = np.abs(out[: len(stored.times)].astype(int) - expected.images)
        assert error.mean() < 6, name  # JPEG with halved chroma, of 32 x 32 pixels


def test_moments_lie_in_their_videos(built):
    videos = store.VideoStore(built / "ivcr200k_videos")
    for part in all_dialogues(built).values():
        for turn in (turn for dialogue in part for turn in dialogue.turns if turn.span):
            assert 0 <= turn.span[0] < turn.span[1] <= videos.duration[turn.video_id] + 0.05


def test_building_needs_no_tensorflow_torch_or_beam(good, tmp_path, built):
    """In an interpreter that cannot find them, as on a machine with the run-time dependencies alone."""
    script = f"""
import sys
HIDDEN = ("tensorflow", "torch", "apache_beam", "PIL", "cv2", "transformers")
class Hiding:
    def __init__(self, finder):
        self._finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in HIDDEN else self._finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self._finder, name)
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
from tfds_builder import build
from tfds_builder.ivcr200k_videos.ivcr200k_videos_dataset_builder import VideosConfig
places = dict(manual_dir={str(good)!r}, data_dir={str(tmp_path)!r})
build.build("ivcr200k", **places)
build.build("ivcr200k_videos", **places, config=VideosConfig(frames=6, size=32))
from ivcr_jax.data import pipeline, store
videos = store.VideoStore({str(tmp_path)!r} + "/ivcr200k_videos")
videos.decode(videos.read(next(iter(videos.duration))), [0], __import__("numpy").zeros((1, 32, 32, 3), "uint8"))
print(store.DialogueStore({str(tmp_path)!r} + "/ivcr200k", "train")[0].id)
assert not set(HIDDEN) & {{name.split(".")[0] for name in sys.modules}}
"""
    done = run("-c", script)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_videos(tmp_path / "ivcr200k_videos", built / "ivcr200k_videos")


@pytest.mark.slow
def test_tfds_build_gives_the_same(good, built, tmp_path):
    pytest.importorskip("tensorflow", reason="the build extra is not installed")
    command = [str(pathlib.Path(sys.executable).with_name("tfds")), "build"]
    places = [f"--manual_dir={good}", f"--data_dir={tmp_path}"]
    # The ordinary command knows the configurations by name only, so it builds one of those.
    for arguments in (["tfds_builder/ivcr200k"], ["tfds_builder/ivcr200k_videos", "--config=16x96"]):
        done = subprocess.run([*command, *arguments, *places], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    assert all_dialogues(tmp_path) == all_dialogues(built)
    ours = build(
        "ivcr200k_videos", manual_dir=good, data_dir=tmp_path / "ours", config=VideosConfig(frames=16, size=96)
    )
    assert_same_videos(tmp_path / "ivcr200k_videos", ours)


@pytest.mark.slow
def test_beam_gives_the_same(good, built, tmp_path, monkeypatch):
    pytest.importorskip("apache_beam", reason="the build extra is not installed")
    options = ["runner=DirectRunner"]
    build("ivcr200k", manual_dir=good, data_dir=tmp_path, beam_options=options)
    build("ivcr200k_videos", manual_dir=good, data_dir=tmp_path, config=CONFIG, beam_options=options)
    assert all_dialogues(tmp_path) == all_dialogues(built)
    assert_same_videos(tmp_path / "ivcr200k_videos", built / "ivcr200k_videos")


@pytest.mark.multiprocess
def test_a_killed_build_resumes_without_decoding_finished_shards(good, tmp_path):
    """Killed with SIGKILL in its third shard of six; the second run must not touch the first two again."""
    log = tmp_path / "decoded.log"
    script = f"""
import sys, time
from tfds_builder import build
from tfds_builder.ivcr200k_videos import ivcr200k_videos_dataset_builder as videos
videos.VIDEOS_PER_SHARD = 4
real = videos.VideoJob._sample
def logged(self, path):
    with open({str(log)!r}, "a") as file:
        file.write(path + "\\n")
    if "slow" in sys.argv and open({str(log)!r}).read().count("\\n") > 10:
        time.sleep(60)
    return real(self, path)
videos.VideoJob._sample = logged
config = videos.VideosConfig(frames=6, size=32)
build.build("ivcr200k_videos", manual_dir={str(good)!r}, data_dir={str(tmp_path)!r}, config=config)
"""
    process = subprocess.Popen([sys.executable, "-c", script, "slow"], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text().count("\n") > 10):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = log.read_text().splitlines()
    assert not (tmp_path / "ivcr200k_videos" / CONFIG.name / "1.0.0").exists()
    log.unlink()
    done = run("-c", script)
    assert done.returncode == 0, done.stderr[-3000:]
    after = log.read_text().splitlines()
    finished = before[:8]
    assert sorted(after) == sorted(set(map(str, (good / "videos").rglob("*.*"))) - set(finished))
    undisturbed = build("ivcr200k_videos", manual_dir=good, data_dir=tmp_path / "again", config=CONFIG)
    a, b = store.VideoStore(tmp_path / "ivcr200k_videos"), store.VideoStore(undisturbed)
    assert list(a.duration) == list(b.duration)
    assert all(list(a.read(name).payload) == list(b.read(name).payload) for name in a.duration)
    assert not (tmp_path / ".staging").exists()


def test_a_changed_video_is_decoded_again_after_a_failed_build(good, tmp_path):
    """Staged shards are known by what they were made from, not by their place."""
    manual = tmp_path / "manual"
    shutil.copytree(good / "videos", manual / "videos")
    victim = sorted((manual / "videos").rglob("*.mp4"))[0]
    whole = victim.read_bytes()
    victim.write_bytes(bytes(len(whole)))  # of the same size
    with pytest.raises(manifest.TooMuchLost):
        build("ivcr200k_videos", manual_dir=manual, data_dir=tmp_path / "data", config=CONFIG, max_loss=0.0)
    victim.write_bytes(whole)
    path = build("ivcr200k_videos", manual_dir=manual, data_dir=tmp_path / "data", config=CONFIG, max_loss=0.0)
    assert summary_of(path)["lost"] == 0


@pytest.fixture
def faulty(good, tmp_path):
    """The good source with a fault of many kinds in its videos and rows."""
    manual = tmp_path / "manual"
    shutil.copytree(good, manual)
    files = sorted((manual / "videos").rglob("*.mp4"))
    files[0].unlink()
    files[1].write_bytes(b"")
    files[2].write_bytes(files[2].read_bytes()[:2000])
    (files[3].with_suffix(".webm")).write_bytes(files[3].read_bytes())
    (manual / "videos" / "notes.txt").write_text("not a video")
    rows = json.loads((manual / "IVCR-200K.json").read_text())
    rows += [[], {"id": "nosplit", "split": "dev", "type": [1], "conversations": rows[0]["conversations"]}, rows[0]]
    (manual / "IVCR-200K.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return manual, [p.relative_to(manual / "videos").with_suffix("").as_posix() for p in files[:4]]


def test_faults_are_listed_and_counted(faulty, tmp_path):
    manual, bad = faulty
    videos = build("ivcr200k_videos", manual_dir=manual, data_dir=tmp_path, config=CONFIG, max_loss=0.2)
    entries = [(entry.id, entry.reason, entry.action) for entry in manifest.read(videos / "manifest.jsonl")]
    assert sorted(entries) == sorted(
        [
            (bad[0], "video_missing", "rejected"),
            (bad[1], "video_unreadable", "rejected"),
            (bad[2], "video_unreadable", "rejected"),
            (bad[3], "duplicate_video_id", "rejected"),
        ]
    )
    summary = summary_of(videos)
    assert (summary["seen"], summary["lost"], summary["records"]) == (24, 3, {"corpus": 21})
    assert summary["manifest"]["rejected: video_unreadable"] == 2
    dialogues = build("ivcr200k", manual_dir=manual, data_dir=tmp_path, max_loss=0.9)
    summary = summary_of(dialogues)
    assert summary["manifest"]["rejected: not_an_object"] == 1
    assert summary["manifest"]["rejected: unknown_split"] == 1
    assert summary["manifest"]["repaired: duplicate_id"] == 1
    kept = [turn for part in all_dialogues(tmp_path).values() for d in part for turn in d.turns]
    assert summary["seen"] - summary["lost"] == len(kept)
    for turn in kept:
        assert not {turn.video_id, *turn.candidates} & set(bad[:3])


def test_a_build_that_loses_too_much_stops_with_the_counts(faulty, tmp_path):
    manual, _ = faulty
    done = run(
        "-m", "tfds_builder.build", "--dataset=ivcr200k_videos", f"--manual_dir={manual}", f"--data_dir={tmp_path}",
        "--frames=6", "--size=32",
    )  # fmt: skip
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("error: 3 of 24 videos lost (12.5 %; at most 5 % may be")
    assert "rejected: video_unreadable × 2" in message and "rejected: video_missing × 1" in message
    listed = pathlib.Path(message.rsplit(" ", 1)[1])
    assert len(listed.read_text().splitlines()) == 4
    assert not (tmp_path / "ivcr200k_videos" / CONFIG.name / "1.0.0").exists()


def test_a_cut_off_json_is_not_taken_for_a_whole_one(good, tmp_path):
    manual = tmp_path / "manual"
    manual.mkdir()
    text = (good / "IVCR-200K.json").read_text()
    (manual / "IVCR-200K.json").write_text(text[: len(text) // 2])
    with pytest.raises(source.SourceError, match="cut off or malformed after .* rows"):
        build("ivcr200k", manual_dir=manual, data_dir=tmp_path)
    path = build("ivcr200k", manual_dir=manual, data_dir=tmp_path, max_loss=1.0)
    assert summary_of(path)["manifest"] == {"cut: malformed_json": 1}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_loss=1.5"], "max_loss is 1.5; expected a share between 0 and 1"),
        (["--size=4"], "4 pixels; expected at least"),
        (["extra"], "unknown argument 'extra'"),
    ],
)
def test_bad_arguments(good, tmp_path, arguments, message):
    done = run(
        "-m", "tfds_builder.build", "--dataset=ivcr200k_videos", f"--manual_dir={good}", f"--data_dir={tmp_path}",
        *arguments,
    )  # fmt: skip
    assert done.returncode != 0 and message in done.stderr + done.stdout


def test_an_absent_source(tmp_path):
    with pytest.raises(source.SourceError, match=r"IVCR-200K\.json: no such file"):
        build("ivcr200k", manual_dir=tmp_path, data_dir=tmp_path / "data")
    with pytest.raises(source.SourceError, match=r"videos: no such folder"):
        build("ivcr200k_videos", manual_dir=tmp_path, data_dir=tmp_path / "data")
    assert not list((tmp_path / "data").rglob("dataset_info.json"))
