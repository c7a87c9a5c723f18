"""Indexing as a user does it: folders that grow, change and hold broken files, stops in the middle, two at a time."""

import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from ivcr_jax import bundle, index
from ivcr_jax.data.dialogue import VIDEO_SUFFIXES, Intent, video_id, video_number
from ivcr_jax.infer import corpus as stored
from ivcr_jax.infer.assistant import Assistant
from ivcr_jax.infer.corpus import Corpus, CorpusError
from ivcr_jax.infer.embed import Embedder
from ivcr_jax.infer.session import Session
from tests.data.video_fixtures import barcode, write_audio, write_video
from tests.infer.conftest import IDS, write_export

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def folder(videos, tmp_path):
    """A copy of the videos, times of change included, for a test to change."""
    return shutil.copytree(videos, tmp_path / "videos")


@pytest.fixture
def corpus(indexed, tmp_path):
    """A copy of their corpus, to change."""
    return shutil.copytree(indexed, tmp_path / "corpus")


@pytest.fixture
def started(monkeypatch):
    """How many videos each batch that was embedded held."""
    sizes, start = [], Embedder.start
    monkeypatch.setattr(Embedder, "start", lambda self, views: sizes.append(len(views)) or start(self, views))
    return sizes


def records(folder):
    """(name, inode, time of change) of each record, by id."""
    found = {}
    for video in stored.read_contents(folder).videos:
        status = os.stat(folder / stored.RECORDS / video.record)
        found[video.id] = video.record, status.st_ino, status.st_mtime_ns
    return found


def reasons(contents):
    return {problem.path: problem.reason for problem in contents.problems}


def same(folder, expected):
    """Both hold the same, array for array, and no file besides."""
    found, expected = (Corpus.open(each) for each in (folder, expected))
    assert [video.id for video in found.videos] == [video.id for video in expected.videos]
    np.testing.assert_array_equal(found.vectors, expected.vectors)
    for video in expected.videos:
        one, other = vars(found.read(video.id)), vars(expected.read(video.id))
        for name, array in other.items():
            np.testing.assert_array_equal(one[name], array, err_msg=f"{video.id} {name}")
    whole(folder)


def whole(folder):
    """Every file in the folder is one that corpus.json names."""
    contents = stored.read_contents(folder)
    assert {path.name for path in folder.iterdir()} == {stored.ROOT, stored.LOCK, stored.RECORDS, contents.vectors}
    assert {path.name for path in (folder / stored.RECORDS).iterdir()} == {video.record for video in contents.videos}


def test_nothing_new_is_nothing_to_do(export, folder, corpus, started):
    before = records(corpus)
    done = index.add(export, folder, corpus, batch=1)
    assert (done.embedded, done.unchanged, done.others, started) == ((), 4, 1, [])
    assert records(corpus) == before
    whole(corpus)


def test_a_new_video_is_embedded_alone(export, folder, corpus, started, indexed):
    before = records(corpus)
    write_video(folder / "cooking" / "bb.mp4", count=9)
    done = index.add(export, folder, corpus, batch=1)
    assert (done.embedded, done.unchanged, started) == (("cooking/bb",), 4, [1])
    after = records(corpus)
    assert [*after] == ["cooking/b_fish", "cooking/bb", *IDS[1:]] and {**after, **before} == after
    assert index.verify(corpus, folder) == []
    index.remove(corpus, ["cooking/bb"])
    same(corpus, indexed)
    assert records(corpus) == before


def test_a_changed_video_is_embedded_again(export, folder, corpus, started):
    before = records(corpus)
    vector = Corpus.open(corpus).vectors[2]
    write_video(folder / "d.avi", "mpeg4", pictures=[255 - barcode(number) for number in range(9)])
    assert index.add(export, folder, corpus, batch=1).embedded == ("d",)
    after = records(corpus)
    assert {name for name in IDS if before[name] != after[name]} == {"d"} and started == [1]
    assert np.abs(Corpus.open(corpus).vectors[2] - vector).max() > 1e-3
    assert index.verify(corpus, folder) == []
    whole(corpus)


def test_removing(folder, corpus, indexed):
    before = records(corpus)
    with pytest.raises(ValueError, match="found no video e, expected ids among its 4"):
        index.remove(corpus, ["d", "e"])
    same(corpus, indexed)
    index.remove(corpus, ["d", "cooking/c.WEBM"])
    assert records(corpus) == {name: before[name] for name in ("cooking/b_fish", "talks/2024/a")}
    np.testing.assert_array_equal(Corpus.open(corpus).vectors, Corpus.open(indexed).vectors[[0, 3]])
    assert (folder / "d.avi").exists()
    index.remove(corpus, ["cooking/b_fish", "talks/2024/a"])
    assert Corpus.open(corpus).search(np.zeros((1, 16), np.float32), 2)[0].shape == (1, 0)
    whole(corpus)


def test_one_video_and_a_folder_that_is_empty(export, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "corpus").mkdir()
    write_video(tmp_path / "videos" / "one.mp4", count=1)
    done = index.add(export, tmp_path / "videos", tmp_path / "corpus", batch=1)
    assert done.embedded == ("one",) and done.contents.videos[0].frames == 1
    assert Corpus.open(tmp_path / "corpus").read("one").token_mask.sum() == 2  # of the first window alone


KILLED = """
import os, signal, sys
from ivcr_jax import index
from ivcr_jax.infer import corpus

export, videos, folder, name, before = sys.argv[1:]
index.SAVE_SECONDS = -1  # corpus.json anew after each video
call, calls = getattr(corpus, name), 0

def dies(*args):
    global calls
    calls += 1
    done = None if before and calls == int(before) else call(*args)
    if calls == int(before or 3):
        os.kill(os.getpid(), signal.SIGKILL)
    return done

setattr(corpus, name, dies)
index.add(export, videos, folder, batch=1)
"""
# What the process is killed at, before which call (the first save is of no video), and how many videos are left.
MOMENTS = {
    "a record is whole and not yet named": ("write_record", "", 2),
    "the vectors are new and corpus.json is old": ("to_dict", "4", 2),
    "what corpus.json no longer names is still there": ("remove_leftovers", "4", 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_loses_no_more_than_its_last_video(export, videos, indexed, tmp_path, moment, started):
    *where, done = MOMENTS[moment]
    folder = tmp_path / "corpus"
    run = [sys.executable, "-c", KILLED, export, videos, folder, *where]
    killed = subprocess.run(run, cwd=ROOT, capture_output=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    left = Corpus.open(folder)  # it is a whole corpus at any time
    assert [video.id for video in left.videos] == IDS[:done] and index.verify(folder, videos) == []
    with pytest.raises(AssertionError):
        whole(folder)  # something else is there too
    assert index.add(export, videos, folder, batch=1).embedded == tuple(IDS[done:])
    assert sum(started) == 4 - done
    same(folder, indexed)


def test_another_writer_is_refused(export, folder, corpus, indexed):
    with index._locked(corpus):
        for write in (lambda: index.add(export, folder, corpus), lambda: index.remove(corpus, ["d"])):
            with pytest.raises(CorpusError, match="corpus: another process writes to this corpus; expected to be the"):
                write()
    same(corpus, indexed)


def test_a_writer_in_another_process_is_refused(corpus):
    code = f"import sys; from ivcr_jax import index; index.remove({str(corpus)!r}, ['d'])"
    with index._locked(corpus):
        run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert "CorpusError" in run.stderr and "another process writes" in run.stderr
    assert len(stored.read_contents(corpus).videos) == 4


@pytest.mark.slow
def test_broken_files_are_listed_and_tried_again_when_they_change(export, folder, corpus, started, monkeypatch):
    (folder / "text.mp4").write_text("no video at all")
    (folder / "empty.mkv").touch()
    write_audio(folder / "sound.mp4")
    (folder / "gone.mp4").symlink_to(folder / "nowhere.mp4")
    (folder / os.fsdecode(b"caf\xe9.mp4")).write_text("a name that is not UTF-8")
    done = index.add(export, folder, corpus, batch=1)
    found = reasons(done.contents)
    broken = ["caf\udce9.mp4", "empty.mkv", "gone.mp4", "sound.mp4", "text.mp4"]
    assert [*found] == broken and started == [] and done.unchanged == 4
    assert "no such file" in found["gone.mp4"] and "no video stream but audio" in found["sound.mp4"]
    assert "of which libav says" in found["text.mp4"]
    assert Corpus.open(corpus).problems == done.contents.problems

    tried, sample = [], index.sample_views
    monkeypatch.setattr(index, "sample_views", lambda path, *a, **k: tried.append(path) or sample(path, *a, **k))
    assert index.add(export, folder, corpus, batch=1).contents == done.contents and tried == []
    write_video(folder / "text.mp4", count=3)
    (folder / "empty.mkv").unlink()
    done = index.add(export, folder, corpus, batch=1)
    assert done.embedded == ("text",) and len(tried) == 1
    assert [*reasons(done.contents)] == ["caf\udce9.mp4", "gone.mp4", "sound.mp4"]


def test_a_video_that_can_be_read_no_more_is_a_problem(export, folder, corpus):
    (folder / "d.avi").write_text("overwritten")
    done = index.add(export, folder, corpus, batch=1)
    assert [*reasons(done.contents)] == ["d.avi"]
    assert [video.id for video in done.contents.videos] == [name for name in IDS if name != "d"]
    whole(corpus)


def test_nothing_that_can_be_read_is_an_error(export, tmp_path):
    folder = tmp_path / "videos"
    with pytest.raises(ValueError, match="videos: found no folder, expected one of videos"):
        index.add(export, folder, tmp_path / "corpus")
    folder.mkdir()
    with pytest.raises(ValueError, match="videos: found nothing, expected videos with one of the suffixes"):
        index.add(export, folder, tmp_path / "corpus")
    (folder / "a.txt").touch()
    with pytest.raises(ValueError, match="videos: found 1 other files, expected videos"):
        index.add(export, folder, tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()
    (folder / "a.mp4").touch()
    for _ in range(2):  # known as broken, it is no better
        with pytest.raises(ValueError, match=r"none of its 1 videos could be read; the first, a.mp4: 0 bytes of which"):
            index.add(export, folder, tmp_path / "corpus", batch=1)
    corpus = Corpus.open(tmp_path / "corpus")
    assert corpus.videos == () and corpus.vectors.shape == (0, 16) and len(corpus.problems) == 1


def test_of_two_files_with_one_id_the_first_counts(export, folder, corpus):
    shutil.copy2(folder / "d.avi", folder / "d.mkv")
    done = index.add(export, folder, corpus, batch=1)
    assert reasons(done.contents) == {"d.mkv": "its id d is that of d.avi, which comes first"} and not done.embedded
    (folder / "d.avi").unlink()
    done = index.add(export, folder, corpus, batch=1)
    assert done.embedded == ("d",) and not done.contents.problems
    assert done.contents.videos[2].path == "d.mkv"


def test_files_that_are_gone_stay_until_they_are_removed(export, folder, corpus):
    (folder / "d.avi").unlink()
    assert len(index.add(export, folder, corpus, batch=1).contents.videos) == 4
    assert index.verify(corpus) == []
    assert index.verify(corpus, folder) == [f"d: its file d.avi is gone from {folder}"]


def test_links_are_followed_but_not_in_a_ring(export, videos, tmp_path, indexed):
    (tmp_path / "videos").mkdir()
    for name in ("cooking", "talks", "d.avi"):
        (tmp_path / "videos" / name).symlink_to(videos / name)
    (tmp_path / "videos" / "ring").symlink_to(tmp_path / "videos")
    index.add(export, tmp_path / "videos", tmp_path / "corpus", batch=1)
    same(tmp_path / "corpus", indexed)


def test_suffixes_are_read_in_any_case(tmp_path):
    for suffix in (".MP4", ".WebM", ".json"):
        (tmp_path / f"x{suffix}").touch()
    files, troubles, others = index._scan(tmp_path)
    assert [file.path for file in files] == ["x.MP4", "x.WebM"] and not troubles and others == 1
    assert ".webm" in VIDEO_SUFFIXES


def test_folders_of_something_else_are_refused(export, videos, corpus, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(CorpusError, match="other: found something without corpus.json, expected a corpus or a new or"):
        index.add(export, videos, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]
    with pytest.raises(CorpusError, match="was made with the export .*index the videos into a new folder"):
        index.add(write_export(tmp_path / "export", scale=2.0), videos, corpus)
    with pytest.raises(FileNotFoundError, match="found no config.json"):
        index.add(tmp_path, videos, tmp_path / "new")


def test_files_of_others_are_never_removed(export, folder, corpus):
    for name in ("notes.txt", "videos/mine.npz", "videos/0123.mp4"):
        (corpus / name).touch()
    left = corpus / stored.RECORDS / f"{'0' * 32}.npz"
    left.touch()
    index.add(export, folder, corpus, batch=1)
    assert not left.exists() and all((corpus / name).exists() for name in ("notes.txt", "videos/mine.npz"))


def test_values_beyond_float16_name_the_video(videos, tmp_path):
    export = write_export(tmp_path / "export", scale=1e6)
    with pytest.raises(ValueError, match="cooking/b_fish.mov: its tokens hold values beyond float16's range"):
        index.add(export, videos, tmp_path / "corpus", batch=1)
    assert Corpus.open(tmp_path / "corpus").videos == ()


def spoil(folder, number, **arrays):
    """Other arrays in a record, its size in corpus.json set right."""
    values = json.loads((folder / stored.ROOT).read_text())
    row = values["videos"][number]
    path = folder / stored.RECORDS / row["record"]
    with np.load(path) as found:
        np.savez(path, **{**found, **arrays})
    row["record_size"] = path.stat().st_size
    (folder / stored.ROOT).write_text(json.dumps(values))


def test_verify_says_what_is_wrong(corpus):
    record = Corpus.open(corpus).read(IDS[1])
    nan = record.tokens.copy()
    nan[0, 0] = np.nan
    spoil(corpus, 1, tokens=nan, times=record.times[:-1], thumbnails=record.thumbnails[::-1])
    spoil(corpus, 2, video=record.video, frames=record.frames[:, 1:])
    path = corpus / stored.RECORDS / stored.read_contents(corpus).videos[3].record
    path.write_bytes(path.read_bytes()[:-1])
    assert index.verify(corpus) == [
        f"{IDS[1]}: found 5 times, expected one a frame, 6",
        f"{IDS[1]}: tokens hold values that are not finite",
        f"{IDS[1]}: a thumbnail is no JPEG file",
        f"{IDS[2]}: frames are of shape (15,), expected (16,) as in the first record",
        f"{IDS[2]}: its vector is not the one in its record",
        f"{path}: found {path.stat().st_size} bytes, expected {path.stat().st_size + 1}, the record of {IDS[3]}",
    ]


@pytest.mark.parametrize(("lacking", "name"), [("model", "dialogue model"), ("retriever", "retriever")])
def test_an_export_with_one_model_is_refused(export, videos, tmp_path, lacking, name):
    folder = shutil.copytree(export, tmp_path / "half")
    shutil.rmtree(folder / lacking)
    config = json.loads((folder / bundle.CONFIG).read_text())
    (folder / bundle.CONFIG).write_text(json.dumps(config | {lacking: None}))
    with pytest.raises(ValueError, match=f"half: found no {name}, expected an export with both models"):
        index.add(folder, videos, tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def command(*arguments):
    run = [sys.executable, "-m", "ivcr_jax.index", *map(str, arguments)]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_command(export, videos, tmp_path):
    corpus = tmp_path / "corpus"
    folder = shutil.copytree(videos, tmp_path / "videos")
    (folder / os.fsdecode(b"caf\xe9.mp4")).touch()
    done = command(f"--export={export}", f"--videos={folder}", f"--corpus={corpus}", "--batch=1")
    assert done.returncode == 0, done.stderr
    assert "not in the corpus: caf?.mp4: 0 bytes" in done.stdout
    assert f"{corpus}: 4 videos, 4 embedded now, 0 unchanged, 1 problems; 1 other files" in done.stdout
    done = command(f"--corpus={corpus}", "list")
    assert done.returncode == 0 and "4 videos, 1 problems" in done.stdout
    assert [line.split()[0] for line in done.stdout.splitlines()[1:5]] == IDS
    assert command(f"--corpus={corpus}", f"--videos={folder}", "verify").stdout.endswith("4 videos, nothing wrong\n")
    done = command(f"--corpus={corpus}", "remove", "d", "talks/2024/a")
    assert (done.returncode, done.stdout) == (0, f"{corpus}: 2 videos are left\n")
    done = command(f"--corpus={corpus}", "remove", "d")
    assert done.returncode == 1 and "index: " in done.stderr and "found no video d" in done.stderr
    (folder / "cooking" / "c.WEBM").unlink()
    done = command(f"--corpus={corpus}", f"--videos={folder}", "verify")
    assert done.returncode == 1 and "cooking/c: its file cooking/c.WEBM is gone" in done.stderr
    for wrong, said in (
        (["add"], "add needs --export and --videos"),
        (["remove"], "expected ids"),
        (["a"], "found 'a'"),
    ):
        done = command(f"--corpus={corpus}", *wrong)
        assert done.returncode != 0 and said in done.stdout + done.stderr


@pytest.mark.slow
def test_real_clips(realdata, export, tmp_path):
    """All of them, the damaged one and those of odd rotation and codecs too; a broken one is listed. And a talk."""
    corpus, folder = tmp_path / "corpus", tmp_path / "videos"
    folder.mkdir()
    (folder / "clips").symlink_to(realdata / "clips")
    (folder / "broken.mp4").write_bytes((realdata / "clips" / "asl_milk.mkv").read_bytes()[:1000])
    done = index.add(export, folder, corpus, batch=1)
    rows = json.loads((realdata / "MANIFEST.json").read_text(encoding="utf-8"))["files"]
    clips = {video_id(row["file"]): row for row in rows if "clip" in row["kind"]}
    assert {video.id for video in done.contents.videos} == {*clips}
    assert [problem.path for problem in done.contents.problems] == ["broken.mp4"]
    assert {video.id for video in done.contents.videos if video.damaged} == {"clips/edge/corrupted"}
    for video in done.contents.videos:
        media = clips[video.id]["media"]
        assert video.duration >= media["last_pts"] - media["first_pts"]
        sides = (media["width"], media["height"])
        assert (video.width, video.height) in (sides, sides[::-1])
    assert index.verify(corpus, folder) == []
    talk(Assistant(export), corpus, [row for row in clips.values() if row.get("moments")][:3])


def talk(helper, folder, rows):
    """Looks for clips in their own words and for their moments, in both languages, and says it all again."""
    corpus = Corpus.open(folder, helper.fingerprint)
    session = Session(helper, corpus)
    durations = {video.id: video.duration for video in corpus.videos}
    for row, language in itertools.product(rows, ("en", "zh")):
        find, when = {
            "en": ("Find a video. {}", "When does this happen? {}"),
            "zh": ("找一个视频。{}", "什么时候？{}"),
        }[language]
        turn = session.say(find.format(row[f"caption_{language}"]))
        assert (turn.intent, turn.language, len(turn.ranking)) == (Intent.VIDEO, language, 10)
        assert turn.video == turn.ranking[0].id and {ranked.id for ranked in turn.ranking} <= durations.keys()
        located = session.say(when.format(row["moments"][0][language]))
        assert (located.intent, located.video) == (Intent.MOMENT, turn.video)
        assert 0 <= located.moment.start <= located.moment.end <= durations[turn.video]
        for said in (turn, located):
            assert video_number(said.text)[0] == turn.ranking[0].number
            assert said.evidence and all(0 <= seconds <= durations[said.video] for seconds, _ in said.evidence)
    again, differ = Session.load(helper, corpus, session.to_json())
    assert again.turns == session.turns and differ == [] and len(again.turns) == 4 * len(rows)
