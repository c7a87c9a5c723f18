"""The demo: what it refuses, what it writes itself, its table by hand, and in small the whole of it."""

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest

from ivcr_jax.data import captions, compose
from ivcr_jax.data.dialogue import Dialogue, Intent, Turn
from launch import demo
from tests.data.video_fixtures import write_video

TINY = demo.Size(40, 150, 150, 2, {"pretrain": 2, "text": 1, "retriever": 1, "both": 1})


def clip(name, **fields):
    return captions.Clip(f"mine/{name}.mp4", duration=10.0, **fields)


CLIPS = (
    clip(
        "a",
        captions={"en": ("A dog runs.", "A dog."), "zh": ("一只狗在跑。",)},
        moments=(
            captions.Moment(1.0, 2.5, {"en": "It stops.", "zh": "它停下来。"}),
            captions.Moment(4.0, 6.0, {"en": "It sits."}),
        ),
    ),
    clip("b"),
    clip("c", captions={"zh": ("一只猫。",)}),
)


def test_a_captioned_video_is_asked_for_with_its_own_words():
    rows = list(demo.questions(CLIPS))
    assert [row["id"] for row in rows] == ["mine/a.mp4 en", "mine/a.mp4 zh", "mine/c.mp4 zh"]
    asked = [
        [
            (question["value"], answer["video_id"], answer["gt_se"])
            for question, answer in zip(row["conversations"][::2], row["conversations"][1::2], strict=True)
        ]
        for row in rows
    ]
    first = "mine/a.mp4"
    assert asked[0] == [
        ("A dog runs.", first, [-1, -1]), ("It stops.", first, [1.0, 2.5]), ("It sits.", first, [4.0, 6.0])
    ]  # fmt: skip
    assert asked[1] == [("一只狗在跑。", first, [-1, -1]), ("它停下来。", first, [1.0, 2.5])]
    assert asked[2] == [("一只猫。", "mine/c.mp4", [-1, -1])]


def test_what_cannot_be_begun_is_one_sentence(tmp_path, monkeypatch):
    out, folder, notes = tmp_path / "out", tmp_path / "videos", tmp_path / "notes.json"
    folder.mkdir()
    (folder / "readme.txt").write_text("of no video")
    notes.write_text("{}")
    for videos, annotations, said in (
        (None, notes, "found ANNOTATIONS without VIDEOS"),
        (tmp_path / "none", None, "none: found no folder; give one of videos"),
        (folder, None, "videos: found no video in it"),
    ):
        with pytest.raises(demo.DemoError, match=said):
            demo.check(out, videos, annotations, "manifest")
    write_video(folder / "a.MP4", count=4)
    with pytest.raises(demo.DemoError, match="nowhere.json: found no file"):
        demo.check(out, folder, tmp_path / "nowhere.json", "manifest")
    demo.check(out, folder, None, "manifest")
    demo.check(out, folder, None, "manifest")  # again, the same
    with pytest.raises(demo.DemoError, match="out: found what was made from other videos; give another --out"):
        demo.check(out, None, None, "manifest")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**29}))
    with pytest.raises(demo.DemoError, match=r"out: found 0\.5 GiB of free disk, expected 2; free some"):
        demo.check(out, folder, None, "manifest")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(demo.DemoError, match="run this in the project's folder"):
        demo.check(out, folder, None, "manifest")


def test_a_stage_that_fails_says_its_last_words_and_is_done_again(tmp_path, capsys):
    counted = tmp_path / "counted"

    def count():
        counted.write_text(counted.read_text() + "x" if counted.exists() else "x")

    failing = ["timeit", "-n1", "-r1", "import sys", "print('so far')", "sys.exit('disk: full')"]
    stages = [demo.Stage("one", "counting", count), demo.Stage("two", "failing", failing)]
    for _ in range(2):
        with pytest.raises(demo.DemoError, match="failing failed: .*disk: full"):
            demo.run(stages, tmp_path)
    assert counted.read_text() == "x", "what is done is not done again"
    assert "counting (done before" in capsys.readouterr().out
    stages[1] = demo.Stage("two", "failing", ["timeit", "-n1", "-r1", "pass"])
    times = demo.run(stages, tmp_path)
    assert [*times] == ["one", "two"] and times["two"] > 0
    log = (tmp_path / "log" / "two.txt").read_text()
    assert log.count("+ python -m timeit") == 3 and "so far" in log


def test_the_last_line_is_what_stands(tmp_path):
    log = tmp_path / "log"
    for said, stands in (
        (b"", ""),
        (b"one\n", "one"),
        (b"one\n\n  \n", "one"),
        (b"one\r 10 %\r 20 %", "20 %"),
        (b"x" * 9000 + b"\nend", "end"),
    ):
        log.write_bytes(said)
        assert demo._last(log) == stands


def cell(value, n, low=None, high=None):
    return {"value": value, "n": n, "low": low, "high": high, "clusters": n}


def protocols(share):
    r = {"retrieval_r1": cell(share, 30, share - 0.1, share + 0.1), "moment_r1_iou_0.5": cell(share / 2, 20)}
    language = {
        "en": {"retrieval_r1": cell(share, 20), "moment_r1_iou_0.5": cell(0, 12)},
        "zh": {"retrieval_r1": cell(0.25, 10)},
    }
    gold = {"overall": r | {"bleu_en": cell(20.04, 40), "bleu_zh": cell(31.0, 9)}, "by": {"language": language}}
    e2e = {"overall": {"retrieval_r10": cell(0.9, 30), "retrieval_r1": cell(0.8, 30)}, "by": {"language": {"en": {}}}}
    return {"protocols": {"gold": gold, "e2e": e2e}}


def test_the_table_by_hand(tmp_path):
    for name, share in (("evaluation", 0.5), ("untrained", 0.125)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(protocols(share)))
    shown = demo.table(tmp_path, {"counting": 61.2, "reading": 0.4}).splitlines()
    assert [line.split() for line in shown[:7]] == [
        ["untrained", "trained", "95", "%", "interval", "n"],
        ["en", "zh", "en", "zh"],
        ["Retriever", "R@10,", "%", "90.0", "90.0", "0"],
        ["Rank", "R@1,", "%", "12.5", "12.5", "25.0", "50.0", "50.0", "25.0", "40.0", "to", "60.0", "30"],
        ["Moment", "R@1,", "IoU", "0.5,", "%", "6.2", "0.0", "25.0", "0.0", "12"],
        ["BLEU-4", "20.0", "31.0", "20.0", "31.0", "49"],
        ["End", "to", "end", "R@1,", "%", "80.0", "80.0", "0"],
    ]
    assert shown[-3:] == [
        f"{'counting':45}    61 s",
        f"{'reading':45}     0 s",
        f"{'in all, without installing':45}    62 s",
    ]


def test_what_is_said_is_what_a_test_dialogue_says():
    find = Turn("Find it.", "Video 1.", Intent.VIDEO, "en", "v")
    when = Turn("When?", "Then.", Intent.MOMENT, "en", "v", span=(0.0, 1.0))
    assert demo._tells(Dialogue("d", "test", 2, (find, when)), "en")
    assert not demo._tells(Dialogue("d", "test", 2, (find, when)), "zh")
    assert not demo._tells(Dialogue("d", "test", 2, (when, find)), "en")
    assert [demo._asked(turn) for turn in (find, when)] == ["Find it.", "When?"]
    bare = Turn("狗跑了。", "那时。", Intent.MOMENT, "zh", "v", span=(0.0, 1.0))
    assert demo._asked(bare) == "这是什么时候发生的？狗跑了。"
    for language, words in compose.WORDING.items():
        assert demo.WHEN[language] + "{c}" in words["locate"] and demo.MORE[language] + "{c}" in words["next"]


@pytest.mark.slow
def test_the_whole_of_it_in_small(realdata, tmp_path):
    """Over the synthetic source and real clips with their captions; stopped on its way and begun again."""
    videos = tmp_path / "videos"
    (videos / "clips").mkdir(parents=True)
    for name in ("dog_fetch.mp4", "city_drone_fly.m4v", "paper_sign.mov"):
        (videos / "clips" / name).symlink_to(realdata / "clips" / name)
    out = tmp_path / "out"
    script = f"from launch import demo; demo.OWN = demo.{TINY}; demo._define_flags(); demo.app.run(demo.main)"
    command = [sys.executable, "-c", script, f"--out={out}", f"--videos={videos}",
               f"--annotations={realdata / 'MANIFEST.json'}"]  # fmt: skip
    root = pathlib.Path(__file__).parents[2]
    process = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while process.poll() is None and not (out / "log" / "pretrain.txt").exists():
        time.sleep(0.05)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "the same command goes on from here" in told, told
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "drawing and describing the synthetic videos (done before" in done.stdout
    shown = (out / "table.txt").read_text(encoding="utf-8")
    for words in ("Retriever R@10, %", "R@1 of all of them, %", "not that they know any other", "in all, without"):
        assert words in " ".join(shown.split())
    assert shown in done.stdout
    for language in ("en", "zh"):
        page = (out / f"conversation-{language}.html").read_text(encoding="utf-8")
        assert page.count("<section") == 4 and "dog_fetch" in page and demo.LEARNT in page
        said = (out / f"script-{language}.txt").read_text(encoding="utf-8").splitlines()
        assert said[1].startswith(demo.WHEN[language]) and said[3].startswith(demo.MORE[language])
        assert said[3] != demo.MORE[language] + said[0], "another video"
    assert demo.LEARNT in (out / "own" / "report.md").read_text(encoding="utf-8")
    assert demo.LEARNT not in (out / "evaluation" / "report.md").read_text(encoding="utf-8")
