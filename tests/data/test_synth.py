"""The synthetic source: what the decoded pixels show against what the truth, the captions and the dialogues say."""

import collections
import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
import subprocess
import sys

import av
import numpy as np
import pytest

from ivcr_jax.data import scenes, synth
from ivcr_jax.data.dialogue import language_of, video_number

ROOT = pathlib.Path(__file__).parents[2]
RGB = {"red": (225, 35, 35), "green": (30, 185, 55), "blue": (45, 80, 240), "yellow": (240, 220, 40)}
RGB |= {"purple": (175, 45, 215), "white": (250, 250, 250)}
SMALL = {"size": (48, 48), "fps": 8, "seconds": 5.0, "workers": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    out = tmp_path_factory.mktemp("synth")
    counts = synth.generate(out, videos=100, interactions=400, seed=3, **SMALL)
    truth = [json.loads(line) for line in (out / "truth.jsonl").read_text().splitlines()]
    rows = json.loads((out / "IVCR-200K.json").read_text(encoding="utf-8"))
    assert counts["videos"] == counts["rendered"] == len(truth) == 100 and counts["interactions"] == 400
    return out, truth, rows


def decode(path):
    """(times in seconds, f32[T, H, W, 3]) of a file."""
    with av.open(str(path)) as container:
        frames = [(float(frame.time), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    times, pictures = zip(*frames, strict=True)
    return np.array(times), np.stack(pictures).astype(np.float32)


def pixels(pictures, colour):
    """bool[T, H, W]: nearer to the colour than halfway to any grey."""
    return np.linalg.norm(pictures - RGB[colour], axis=-1) < 75


def centres(mask):
    """f64[T, 2]: mean (x, y) of the marked pixels."""
    y, x = np.mgrid[: mask.shape[1], : mask.shape[2]]
    area = mask.sum((1, 2))
    return np.stack([(mask * x).sum((1, 2)) / area, (mask * y).sum((1, 2)) / area], -1)


def test_frames_and_their_times(source):
    out, truth, _ = source
    for row in truth[::5]:
        times, pictures = decode(out / "videos" / row["video"])
        assert len(times) == row["frames"] and row["duration"] == row["frames"] / 8
        np.testing.assert_allclose(times, np.arange(len(times)) / 8, atol=2e-3)
        assert pictures.shape[1:] == (48, 48, 3)
    suffixes = collections.Counter(pathlib.Path(row["video"]).suffix for row in truth)
    assert set(suffixes) == {".mp4", ".avi", ".webm", ".mkv"} and suffixes[".mp4"] > 50
    assert len({row["duration"] for row in truth}) > 10
    assert {row["video"].split("/")[0] for row in truth} == {"Aster", "Birch", "Cedar", "Dune"}


def test_pixels_show_every_event_from_its_start_to_its_end(source):
    out, truth, _ = source
    checked = collections.Counter()
    for row in truth:
        thing, *others = row["objects"]
        if others or checked[thing["event"]] == 4:
            continue
        times, pictures = decode(out / "videos" / row["video"])
        inside = (times >= thing["start"] - 1e-3) & (times < thing["end"] - 1e-3)
        assert 2 <= inside.sum() < len(times) - 2
        first = pixels(pictures, thing["colour"])
        seen = first.sum((1, 2)) > 20
        event = thing["event"]
        checked[event] += 1
        if event == "appears":
            np.testing.assert_array_equal(seen, inside)
        elif event == "leaves":
            np.testing.assert_array_equal(seen, ~inside)
        elif event == "recolours":
            np.testing.assert_array_equal(seen, ~inside)
            np.testing.assert_array_equal(pixels(pictures, thing["second"]).sum((1, 2)) > 20, inside)
        else:
            assert seen.all()
            at = centres(first)
            resting = inside if event == "pauses" else ~inside
            # From one frame to the next; the frames at the borders belong to both.
            still = (resting[1:] & resting[:-1])[1:-1]
            moved = np.abs(np.diff(at, axis=0)).sum(1)[1:-1]
            assert moved[still].max() < 1 < moved[~still].max()
    assert set(checked) == set(scenes.EVENTS)


def scene_of(codec_size=(48, 48), **changes):
    base = scenes.Thing("red", "circle", "large", "still", "leaves", 4.0, 5.0, "", (0.5, 0.5), 0.22, 1.0)
    return scenes.Scene((dataclasses.replace(base, **changes),), *codec_size, fps=8, frames=80, background=7)


def drawn(**changes):
    pictures = np.stack(list(scenes.draw(scene_of(**changes)))).astype(np.float32)
    mask = pixels(pictures, "red")
    return mask[mask.any((1, 2))]


def test_motions_shapes_and_sizes_are_told_apart_by_pixels():
    spread = {}
    for motion in scenes.MOTIONS:
        at = centres(drawn(motion=motion))
        (left, top), (right, bottom) = at.min(0), at.max(0)
        spread[motion] = (right - left, bottom - top)
        if motion in ("loop", "diagonal"):
            together = abs(np.corrcoef(at.T)[0, 1])
            assert together > 0.95 if motion == "diagonal" else together < 0.3
    moves = {motion: (x > 12, y > 12) for motion, (x, y) in spread.items()}
    assert moves == {
        "still": (False, False),
        "sideways": (True, False),
        "vertical": (False, True),
        "loop": (True, True),
        "diagonal": (True, True),
    }
    assert spread["still"] == (0, 0) and spread["sideways"][1] < 1 and spread["vertical"][0] < 1
    for shape in scenes.SHAPES:
        large, small = (drawn(shape=shape, size=size)[0].sum() for size in ("large", "small"))
        assert large > 1.8 * small > 60
    outlines = {}
    for shape in scenes.SHAPES:
        mask = drawn(shape=shape)[0]
        y, x = np.nonzero(mask)
        box = mask[y.min() : y.max() + 1, x.min() : x.max() + 1]
        outlines[shape] = (box.mean(), box[0].mean(), box[-1].mean())  # how full: all, first row, last row
    assert outlines["square"][0] == 1
    assert 0.7 < outlines["circle"][0] < 0.9
    assert outlines["triangle"][1] < 0.3 and outlines["triangle"][2] > 0.9
    assert outlines["cross"][0] < 0.7 and outlines["cross"][1] == pytest.approx(outlines["cross"][2])


@pytest.mark.parametrize("codec", list(scenes.CODECS))
def test_codecs(tmp_path, codec):
    scene = scene_of((96, 64), event="appears", start=2.05, end=3.55)
    paths = [tmp_path / f"{n}{scenes.CODECS[codec].suffix}" for n in range(2)]
    for path in paths:
        scenes.encode(scene, codec, path)
    assert paths[0].read_bytes() == paths[1].read_bytes() and len(list(tmp_path.iterdir())) == 2
    with av.open(str(paths[0])) as container:
        assert container.streams.video[0].codec_context.name == codec
        assert (container.streams.video[0].width, container.streams.video[0].height) == (96, 64)
    times, pictures = decode(paths[0])
    np.testing.assert_allclose(times, np.arange(80) / 8, atol=2e-3)
    seen = pixels(pictures, "red").sum((1, 2)) > 100
    assert seen.tolist() == [2.05 <= k / 8 < 3.55 for k in range(80)]
    exact = np.stack(list(scenes.draw(scene)))
    assert np.abs(pictures - exact).mean() < 6


def test_small_pictures_are_not_given_to_an_encoder_that_fails_on_them():
    assert scenes.codec_for("hevc", 48, 96) == "h264" and scenes.codec_for("hevc", 64, 64) == "hevc"


def test_families_splits_and_held_out_triples():
    videos = list(synth.invent(1500, seed=5, size=(48, 48), fps=8, seconds=12.0))
    held_out = set(synth.held_out_triples(5))
    assert len(held_out) == 15 and 0.1 < len(held_out) / (6 * 4 * 5) < 0.14
    shown = collections.defaultdict(set)
    splits = collections.defaultdict(set)
    for video in videos:
        splits[video.family].add(video.split)
        mine = set()
        for thing in video.scene.things:
            colours = {thing.colour} | ({thing.second} if thing.event == "recolours" else set())
            mine |= {(colour, thing.shape, thing.motion) for colour in colours}
        shown[video.split] |= mine
        assert video.held_out == bool(mine & held_out)
    assert all(len(of_family) == 1 for of_family in splits.values()) and set(shown) == {"train", "validation", "test"}
    assert not (shown["train"] | shown["validation"]) & held_out and shown["test"] >= held_out
    assert len(shown["train"]) == 120 - 15
    test = [video for video in videos if video.split == "test"]
    assert 0.15 < len(test) / len(videos) < 0.25
    assert sum(video.split == "validation" for video in videos) == len(videos) // 20
    assert 0.2 < sum(video.held_out for video in test) / len(test) < 0.8
    things = [thing for video in videos for thing in video.scene.things]
    for attribute, values in {"event": 5, "motion": 5, "shape": 4, "colour": 6, "size": 2}.items():
        counts = collections.Counter(getattr(thing, attribute) for thing in things)
        assert len(counts) == values and max(counts.values()) < 4.5 * min(counts.values())


def test_a_family_is_a_base_and_edits_of_one_attribute_each():
    videos = list(synth.invent(400, seed=6, size=(48, 48), fps=8, seconds=12.0))
    for _, family in itertools.groupby(videos, key=lambda video: video.family):
        base, *edits = family
        assert base.edit == "" and len({video.edit for video in edits}) == 4
        for video in edits:
            assert video.scene.things[1:] == base.scene.things[1:]
            assert dataclasses.replace(video.scene, things=()) == dataclasses.replace(base.scene, things=())
            pairs = zip(
                dataclasses.astuple(base.scene.things[0]), dataclasses.astuple(video.scene.things[0]), strict=True
            )
            names = [field.name for field in dataclasses.fields(scenes.Thing)]
            changed = {name for name, (old, new) in zip(names, pairs, strict=True) if old != new}
            assert changed - {"second"} == {video.edit}


COLOUR_WORDS = {"en": list(RGB), "zh": ["红色", "绿色", "蓝色", "黄色", "紫色", "白色"]}
SHAPE_WORDS = {"en": ["circle", "square", "triangle", "cross"], "zh": ["圆形", "正方形", "三角形", "十字形"]}
SHAPE_ZH = dict(zip(SHAPE_WORDS["en"], SHAPE_WORDS["zh"], strict=True))
MOTION_WORDS = {
    "still": ("still", "原地不动"),
    "sideways": ("side to side", "左右"),
    "vertical": ("up and down", "上下"),
    "loop": ("in a loop", "绕着圈"),
    "diagonal": ("diagonally", "对角线"),
}


def test_no_one_span_answers_for_all_moments():
    """Else a model could seem to find moments that has learnt where they mostly are."""
    videos = synth.invent(500, seed=7, size=(48, 48), fps=8, seconds=12.0)
    made = [(thing, video.scene.duration) for video in videos for thing in video.scene.things]
    starts, ends = np.array([(thing.start / duration, thing.end / duration) for thing, duration in made]).T
    assert 0.13 < (ends - starts).min() < 0.16 and 0.39 < (ends - starts).max() < 0.42  # times have one decimal
    assert starts.min() < 0.02 and 0.98 < ends.max() <= 1
    share = 0.0
    for start, end in itertools.combinations(np.linspace(0, 1, 21), 2):
        overlap = np.maximum(np.minimum(ends, end) - np.maximum(starts, start), 0)
        share = max(share, ((overlap / (ends - starts + end - start - overlap)) >= 0.5).mean())
    assert 0.2 < share < 0.35


def test_captions_tell_a_family_apart():
    videos = list(synth.invent(500, seed=7, size=(48, 48), fps=8, seconds=12.0))
    clips = list(synth.clips_of(videos))
    assert [clip.video for clip in clips] == [video.path for video in videos]
    for language in ("en", "zh"):
        for _, family in itertools.groupby(zip(videos, clips, strict=True), key=lambda pair: pair[0].family):
            told = [clip.captions[language] for _, clip in family]
            assert len({caption for captions in told for caption in captions}) == sum(map(len, told))
        for video, clip in zip(videos, clips, strict=True):
            main = video.scene.things[0]
            colour = COLOUR_WORDS[language][list(RGB).index(main.colour)]
            shape = SHAPE_WORDS[language][scenes.SHAPES.index(main.shape)]
            for caption in clip.captions[language]:
                assert language_of(caption) == language
                assert colour in caption and shape in caption
                assert not re.search(r"[{}_]| {2}", caption)
    for video, clip in zip(videos, clips, strict=True):
        moments = sorted((thing.start, thing.end) for thing in video.scene.things)
        assert sorted((moment.start, moment.end) for moment in clip.moments) == moments
        assert all(0 <= moment.start < moment.end <= clip.duration == video.scene.duration for moment in clip.moments)
        # A moment names one thing only.
        for language in ("en", "zh"):
            assert len({moment.captions[language] for moment in clip.moments}) == len(clip.moments)


def test_requests_name_what_changes():
    videos = {video.path: video for video in synth.invent(500, seed=8, size=(48, 48), fps=8, seconds=12.0)}
    for clip in synth.clips_of(videos.values()):
        here = videos[clip.video]
        assert {name for name, _ in clip.similar} == set(clip.near)
        requests = [words for _, words in clip.similar]
        assert all(len({words[language] for words in requests}) == len(requests) for language in ("en", "zh"))
        for name, words in clip.similar:
            there = videos[name]
            assert there.family == here.family and there.split == here.split
            old, new = here.scene.things[0], there.scene.things[0]
            for attribute, vocabulary in (("colour", COLOUR_WORDS), ("shape", SHAPE_WORDS)):
                if getattr(old, attribute) == getattr(new, attribute):
                    continue
                keys = list(RGB) if attribute == "colour" else scenes.SHAPES
                for language in ("en", "zh"):
                    for thing in (old, new):
                        assert vocabulary[language][keys.index(getattr(thing, attribute))] in words[language]
            if found := re.search(r"with a (.+?) instead of the ([^,]+)", words["en"]):
                assert new.shape in found[1] and old.shape in found[2]
                assert re.search(rf"{SHAPE_ZH[old.shape]}换成了.*{SHAPE_ZH[new.shape]}", words["zh"])
            for motion, (english, chinese) in MOTION_WORDS.items():
                wanted = motion == new.motion != old.motion
                assert (english in words["en"]) == (chinese in words["zh"]) == wanted
            assert ("large" in words["en"]) == ("small" in words["en"]) == (old.size != new.size)
            assert language_of(words["zh"]) == "zh" and words["en"].startswith("the same but ")


def test_dialogues_agree_with_the_truth(source):
    _, truth, rows = source
    by_name = {row["video"]: row for row in truth}
    languages = collections.Counter()
    for row in rows:
        listed = []
        for human, gpt in zip(row["conversations"][::2], row["conversations"][1::2], strict=True):
            languages[language_of(human["value"])] += 1
            if "video_id" not in gpt:
                continue
            video = by_name[gpt["video_id"]]
            assert video["split"] == row["split"]
            listed = gpt.get("candidate_videos", listed)
            there = sum(other["split"] == row["split"] for other in truth)
            assert len(set(listed)) == min(10, there) > 0
            assert {by_name[name]["split"] for name in listed} == {row["split"]}
            assert listed[video_number(gpt["value"])[0] - 1] == gpt["video_id"]
            if gpt["gt_se"] != [-1, -1]:
                assert gpt["gt_se"] in [[thing["start"], thing["end"]] for thing in video["objects"]]
                assert f"{gpt['gt_se'][0]}s-{gpt['gt_se'][1]}s" in gpt["value"]
    assert min(languages.values()) > 100
    assert {row["split"] for row in rows} == {"train", "validation", "test"}


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_gives_the_same_bytes_in_any_number_of_processes(tmp_path):
    tiny = {"size": (32, 32), "fps": 4, "seconds": 2.0}
    for name, workers in (("a", 1), ("b", 2)):
        synth.generate(tmp_path / name, videos=20, interactions=40, seed=1, workers=workers, **tiny)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") and len(digest(tmp_path / "a")) == 23
    synth.generate(tmp_path / "c", videos=20, interactions=40, seed=1, render=False, **tiny)
    assert not (tmp_path / "c/videos").exists() and digest(tmp_path / "c").items() < digest(tmp_path / "a").items()


def test_running_again_keeps_what_is_there(tmp_path):
    tiny = {"seed": 1, "size": (32, 32), "fps": 4, "seconds": 2.0, "workers": 1}
    assert synth.generate(tmp_path, videos=6, interactions=5, **tiny)["rendered"] == 6
    before = digest(tmp_path)
    lost = tmp_path / "videos" / json.loads((tmp_path / "truth.jsonl").read_text().splitlines()[2])["video"]
    lost.unlink()
    assert synth.generate(tmp_path, videos=6, interactions=5, **tiny)["rendered"] == 1
    assert digest(tmp_path) == before
    assert synth.generate(tmp_path, videos=8, interactions=5, **tiny)["rendered"] == 2  # more of the same
    after = digest(tmp_path)
    assert all(after[name] == before[name] for name in before if name.startswith("videos/"))
    with pytest.raises(ValueError, match="another folder"):
        synth.generate(tmp_path, videos=8, interactions=5, **{**tiny, "seed": 2})
    assert digest(tmp_path) == after


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"size": (47, 48)}, "even"),
        ({"size": (48, 16)}, "32"),
        ({"videos": 0}, "videos"),
        ({"seconds": 1.0}, "seconds"),
    ],
)
def test_numbers_out_of_range(tmp_path, wrong, named):
    with pytest.raises(ValueError, match=named):
        synth.generate(tmp_path / "x", **{"videos": 5, "interactions": 5, **SMALL, **wrong})
    assert not (tmp_path / "x").exists()


def test_an_absent_encoder_is_named(tmp_path, monkeypatch):
    assert scenes.missing_encoders() == []
    absent = dataclasses.replace(scenes.CODECS["h264"], encoder="libnone")
    monkeypatch.setitem(scenes.CODECS, "h264", absent)
    assert scenes.missing_encoders() == ["libnone"]
    with pytest.raises(RuntimeError, match="libnone"):
        synth.generate(tmp_path, videos=5, interactions=5, **SMALL)
    assert not (tmp_path / "IVCR-200K.json").exists()


def test_the_program(tmp_path):
    command = [sys.executable, "-m", "ivcr_jax.data.synth", f"--out={tmp_path}", "--videos=12", "--interactions=30"]
    done = subprocess.run([*command, "--no_render"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "12 videos, 0 rendered" in done.stdout and "30 interactions" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["IVCR-200K.json", "synth.json", "truth.jsonl"]
    done = subprocess.run([*command, "--size=48"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "synth:" in done.stderr and "Traceback" not in done.stderr
