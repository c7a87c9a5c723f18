"""Composed dialogues against the published answer format, and caption readers against rows read by hand."""

import collections
import json
import pathlib
import re
import subprocess
import sys

import pytest

from ivcr_jax.data import captions, compose, source
from ivcr_jax.data.captions import Clip, Moment
from ivcr_jax.data.dialogue import Intent, language_of

ROOT = pathlib.Path(__file__).parents[2]
REAL = ROOT / ".." / "shared" / "realdata"
real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real annotation files at {REAL}")

# The expressions that the published evaluation reads answers with; the Chinese number is this project's.
VIDEO = {"en": re.compile(r"\bvideo\s+(10|[0-9])\b", re.IGNORECASE), "zh": re.compile(r"视频\s*(\d+)")}
SPAN = re.compile(r"(\d+(?:\.\d+)?)s-(\d+(?:\.\d+)?)s")


def make_clips(count=60, languages=("en", "zh"), test_every=4):
    """Clips in groups of three that are near each other; the text of each names its number."""
    clips = []
    for n in range(count):
        group = n // 3
        mates = [f"C{group % 2}/clip{m}.mp4" for m in range(3 * group, 3 * group + 3) if m != n]
        words = {"en": f"a dog number {n} runs", "zh": f"编号{n}的小狗在奔跑。"}
        asks = {"en": f"the same but with dog {n}", "zh": f"换成小狗{n}的视频"}
        moments = tuple(
            Moment(
                1.5 * k, 1.5 * k + 1.25, {lang: f"{'part' if lang == 'en' else '第几段'} {n}.{k}" for lang in languages}
            )
            for k in range(3)
        )
        clips.append(
            Clip(
                f"C{group % 2}/clip{n}.mp4",
                "test" if group % test_every == 1 else "train",
                10.0,
                {lang: (words[lang], f"{words[lang]}!") for lang in languages},
                moments,
                tuple((mate, {lang: asks[lang] for lang in languages}) for mate in mates),
                tuple(mates),
            )
        )
    return clips


def turns_of(dialogue):
    talk = dialogue["conversations"]
    assert [message["from"] for message in talk] == ["human", "gpt"] * (len(talk) // 2)
    return list(zip(talk[::2], talk[1::2], strict=True))


def kind_of(answer):
    if "video_id" not in answer:
        return "chat"
    return "find" if answer["gt_se"] == [-1, -1] else "locate"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_answers_lead_to_the_truth(language):
    clips = {clip.video: clip for clip in make_clips()}
    rows = list(compose.compose(clips.values(), seed=1, num_interactions=1500, zh_share=float(language == "zh")))
    seen = collections.Counter()
    for row in rows:
        listed = []
        for human, gpt in turns_of(row):
            kind = kind_of(gpt)
            seen[kind] += 1
            assert language_of(human["value"]) == language or kind == "locate"
            if kind == "chat":
                assert gpt["gt_se"] == [-1, -1] and "candidate_videos" not in gpt
                continue
            truth = clips[gpt["video_id"]]
            listed = gpt.get("candidate_videos", listed)
            assert listed[int(VIDEO[language].search(gpt["value"]).group(1)) - 1] == truth.video
            sentences = re.findall(r"[^.。]+[.。](?!\d)" if language == "en" else r"[^。：]+[。：]", gpt["value"])
            assert len(sentences) >= 2 and not SPAN.search(sentences[0])
            if kind == "find":
                assert not SPAN.search(gpt["value"])
                assert any(caption.rstrip("!.。")[1:] in gpt["value"] for caption in truth.captions[language])
            else:
                start, end = map(float, SPAN.search(gpt["value"]).groups())
                assert [start, end] == gpt["gt_se"] and 0 <= start < end <= truth.duration
                (moment,) = [m for m in truth.moments if m.start == start]
                assert moment.end == end and moment.captions[language][1:] in human["value"]
    assert min(seen[kind] for kind in ("find", "locate", "chat")) > 50


def test_odd_times_are_written_as_the_truth_has_them():
    clip = Clip(
        "a/b.mp4", captions={"en": ("A lady.",)}, moments=(Moment(130.98, 160.2704, {"en": "She is in orange."}),)
    )
    rows = compose.compose([clip], seed=0, num_interactions=60)
    located = [gpt for row in rows for _, gpt in turns_of(row) if kind_of(gpt) == "locate"]
    assert located and all("130.98s-160.27s" in gpt["value"] and gpt["gt_se"] == [130.98, 160.27] for gpt in located)


@pytest.mark.parametrize("count", [1, 4, 10, 25])
def test_candidates(count):
    clips = {clip.video: clip for clip in make_clips(120)}
    places = collections.Counter()
    for row in compose.compose(clips.values(), seed=2, num_interactions=800, num_candidates=count):
        for _, gpt in turns_of(row):
            listed = gpt.get("candidate_videos")
            if listed is None:
                continue
            assert len(listed) == len(set(listed)) == count
            assert {clips[name].split for name in listed} == {row["split"]}
            if count >= 3:
                assert set(clips[gpt["video_id"]].near) <= set(listed)
            places[listed.index(gpt["video_id"])] += 1
    assert sorted(places) == list(range(count))
    assert max(places.values()) < 3 * sum(places.values()) / count  # no favourite place


def test_a_split_smaller_than_the_list():
    rows = list(compose.compose(make_clips(12), seed=0, repeats=4))
    assert {
        len(gpt["candidate_videos"])
        for r in rows
        for _, gpt in turns_of(r)
        if r["split"] == "test" and "video_id" in gpt and "candidate_videos" in gpt
    } == {3}


@pytest.mark.parametrize("zh_share", [0.0, 1.0])
def test_misses_name_no_video(zh_share):
    rows = list(compose.compose(make_clips(), seed=3, num_interactions=400, miss_share=1.0, zh_share=zh_share))
    searches = [gpt for row in rows for _, gpt in turns_of(row) if "video_id" in gpt]
    assert len(searches) > 200
    for gpt in searches:
        assert gpt["gt_se"] == [-1, -1]  # what was not found cannot be asked about
        assert gpt["video_id"] not in gpt["candidate_videos"] and len(gpt["candidate_videos"]) == 10
        assert not VIDEO["en"].search(gpt["value"]) and not VIDEO["zh"].search(gpt["value"])
    rows = list(compose.compose(make_clips(), seed=3, num_interactions=3000, miss_share=0.3))
    searches = [gpt for row in rows for _, gpt in turns_of(row) if "candidate_videos" in gpt]
    missed = sum(gpt["video_id"] not in gpt["candidate_videos"] for gpt in searches)
    assert 0.25 < missed / len(searches) < 0.35


def test_languages():
    def share(clips, zh_share):
        rows = list(compose.compose(clips, seed=4, repeats=10, zh_share=zh_share, chat_share=0))
        return sum(language_of(row["conversations"][0]["value"]) == "zh" for row in rows) / len(rows)

    assert 0.24 < share(make_clips(), 0.3) < 0.36
    assert share(make_clips(languages=("en",)), 1.0) == 0
    assert share(make_clips(languages=("zh",)), 0.0) == 1
    # Clips without captions in the language of a dialogue are candidates there, never answers.
    mixed = make_clips(30) + [Clip(f"D/only{n}.mp4", captions={"en": (f"a cat {n}",)}) for n in range(30)]
    answers, listed = set(), set()
    for row in compose.compose(mixed, seed=4, repeats=5, zh_share=0.5):
        if language_of(row["conversations"][0]["value"]) == "zh":
            answers.update(gpt["video_id"] for _, gpt in turns_of(row) if "video_id" in gpt)
            listed.update(name for _, gpt in turns_of(row) for name in gpt.get("candidate_videos", ()))
    assert not any(name.startswith("D/") for name in answers) and any(name.startswith("D/") for name in listed)


@pytest.mark.parametrize("number", [1, 2, 37, 1000])
def test_the_number_of_interactions_is_the_number_asked_for(tmp_path, number):
    counts = compose.write_json(tmp_path / "a.json", compose.compose(make_clips(), seed=5, num_interactions=number))
    rows = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    turns = [turn for row in rows for turn in turns_of(row)]
    assert len(turns) == counts["interactions"] == number and counts["dialogues"] == len(rows)
    assert counts["video"] + counts["moment"] + counts["chat"] == number
    assert counts["moment"] == sum(gpt["gt_se"] != [-1, -1] for _, gpt in turns)
    assert len({row["id"] for row in rows}) == len(rows)


def test_every_round_begins_once_with_every_clip():
    clips = make_clips(40)
    rows = list(compose.compose(clips, seed=6, repeats=3, chat_share=0.1))
    assert len(rows) == 3 * 44
    first = collections.Counter(row["conversations"][1].get("video_id") for row in rows)
    assert first.pop(None) == 3 * 4 and first == {clip.video: 3 for clip in clips}
    assert sum(row["type"] == [0] for row in rows) == 12


def test_dialogue_i_depends_on_nothing_but_the_clips_and_the_seed():
    clips = make_clips()
    whole = list(compose.compose(clips, seed=7, num_interactions=600))
    part = list(compose.compose(clips[::-1], seed=7, num_interactions=100))
    assert part[:-1] == whole[: len(part) - 1]
    cut, full = part[-1]["conversations"], whole[len(part) - 1]["conversations"]
    assert cut == full[: len(cut)]
    assert list(compose.compose(clips, seed=7, repeats=6))[: len(whole) - 1] == whole[:-1]
    assert list(compose.compose(clips, seed=8, num_interactions=600)) != whole


def test_numbers_of_turns_follow_the_published_histogram():
    rows = list(compose.compose(make_clips(), seed=9, repeats=50, chat_share=0))
    counts = collections.Counter(len(turns_of(row)) for row in rows)
    published = {1: 37, 2: 31, 3: 20.5, 4: 11.7, 5: 6, 6: 5.5, 7: 1.3}
    for turns, thousands in published.items():
        assert counts[turns] / len(rows) == pytest.approx(thousands / 114, abs=0.025)
    assert max(counts) <= 20


def test_kinds_and_types():
    clips = {clip.video: clip for clip in make_clips()}
    rows = list(compose.compose(clips.values(), seed=10, num_interactions=3000, independent_share=0.2, zh_share=0))
    types = collections.Counter(row["type"][0] for row in rows)
    assert sorted(types) == list(range(8))
    refine = re.compile(r"^(Not that one|No,|Close,|That is not it)")
    similar = re.compile(r"^(Do you have a similar|Now show me something|Good\. I would|Is there another)")
    for row in rows:
        kinds, current = [], None
        for human, gpt in turns_of(row):
            kind = kind_of(gpt)
            if refine.match(human["value"]) or similar.match(human["value"]):
                kind = "refine" if refine.match(human["value"]) else "similar"
                assert gpt["video_id"] in clips[current].near and current in gpt["candidate_videos"]
            if kind == "locate":
                assert gpt["video_id"] == current
            current = gpt.get("video_id", current)
            kinds.append(kind)
        held = set(kinds)
        (number,) = row["type"]
        if number == 7:
            assert held <= {"find", "chat"} and len(kinds) > 1
            found = [gpt["video_id"] for _, gpt in turns_of(row) if "video_id" in gpt]
            assert len(set(found)) == len(found)
        elif held == {"chat"}:
            assert number == 0
        elif kinds.count("find") > 1:
            assert number == 6
        else:
            by_change = {(): 2 if "locate" in held else 1, ("refine",): 3, ("similar",): 4, ("refine", "similar"): 5}
            assert number == by_change[tuple(sorted(held & {"refine", "similar"}))]
            order = [kind for kind in kinds if kind != "locate"]
            assert order == [kind for kind in ("find", "refine", "similar", "chat") if kind in order]


def test_the_source_reader_accepts_every_row():
    reader = source.RowReader()
    rows = list(compose.compose(make_clips(), seed=11, num_interactions=500))
    dialogues = [reader.read(row) for row in rows]
    assert not reader.take_entries() and reader.seen == reader.kept == 500
    for row, dialogue in zip(rows, dialogues, strict=True):
        expected = {"chat": Intent.CHAT, "find": Intent.VIDEO, "locate": Intent.MOMENT}
        assert [turn.intent for turn in dialogue.turns] == [expected[kind_of(gpt)] for _, gpt in turns_of(row)]


@pytest.mark.parametrize(
    "wrong",
    [{"num_interactions": 0}, {"repeats": 0}, {"num_candidates": 0}, {"zh_share": 1.5}, {"miss_share": -0.1}],
)
def test_numbers_out_of_range(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        compose.compose(make_clips(6), seed=0, **wrong)


def test_clips_that_cannot_be_used():
    with pytest.raises(ValueError, match="C0/clip1"):
        compose.compose(make_clips(6) + make_clips(6)[1:2], seed=0)
    with pytest.raises(ValueError, match="caption"):
        compose.compose([Clip("a/b.mp4")], seed=0)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")

    def failing():
        yield from compose.compose(make_clips(6), seed=0, num_interactions=3)
        raise RuntimeError("cut")

    with pytest.raises(RuntimeError):
        compose.write_json(path, failing())
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# Readers


@real
def test_didemo_as_published():
    clips, problems = captions.read("didemo", REAL / "annotations/didemo_val_data.json", "test")
    assert not problems and len(clips) == 1094 and sum(len(clip.moments) for clip in clips) == 4180
    by_name = {clip.video: clip for clip in clips}
    # annotators: [1,1] [1,1] [1,1] [0,0], six chunks
    machine = by_name["DiDeMo/35034348999@N01_6060447507_dc1a90b8ef.mov"]
    assert machine.duration == 30 and machine.split == "test" and machine.captions == {}
    assert Moment(5, 10, {"en": "the man in the hat briefly bends over the machine"}) in machine.moments
    # [0,2] [2,2] [2,2] [2,2]
    glasses = by_name["DiDeMo/33234611@N00_3567949618_0bee41c6f7.mov"]
    wanted = "eyeglasses resting on a table disappear from view behind the camera."
    assert [(m.start, m.end) for m in glasses.moments if m.captions["en"] == wanted] == [(10, 15)]
    # five chunks
    assert by_name["DiDeMo/86091119@N00_13912142554_c451140af5.mp4"].duration == 25


@real
def test_tvr_as_published():
    clips, problems = captions.read("tvr", REAL / "annotations/tvr_val_release.jsonl", "test")
    assert not problems and len(clips) == 2179 and sum(len(clip.moments) for clip in clips) == 10895
    (clip,) = [clip for clip in clips if clip.video == "TVR/friends_s01e03_seg02_clip_19"]
    assert clip.duration == 61.46
    assert Moment(16.48, 33.87, {"en": "Phoebe puts one of her ponytails in her mouth."}) in clip.moments
    texts = [text for clip in clips for moment in clip.moments for text in moment.captions.values()]
    assert not any(text != text.strip() or "  " in text for text in texts)


@real
def test_msrvtt_and_activitynet_as_published():
    clips, problems = captions.read("msrvtt", REAL / "annotations/msrvtt_jsfusion_test.csv", "test")
    assert not problems and len(clips) == 1000
    assert clips[0] == Clip("MSR-VTT/video9770", "test", None, {"en": ("a person is connecting something to system",)})
    clips, problems = captions.read("activitynet", REAL / "annotations/densecap_sample_submission.json")
    assert not problems and [clip.video for clip in clips] == ["ActivityNet/v_uqiMw7tQ1Cc"]
    assert [(m.start, m.end) for m in clips[0].moments] == [(1.23, 4.53), (5.24, 18.23)]
    published = json.loads((REAL / "annotations/ivcr_published_examples.json").read_text(encoding="utf-8"))
    joined = published["dialogues"][0]["joined_source"]
    assert joined["video_id"] == "v_JyjONoyBr4Q" and len(joined["record"]["sentences"]) == 8


@real
def test_manifest_and_its_videos():
    clips, problems = captions.read("manifest", REAL / "MANIFEST.json")
    assert len(clips) == 22 and [problem.row for problem in problems] == [
        "clips/edge/corrupted.mp4",
        "clips/edge/frame_numbers_h265.mp4",
        "clips/edge/seconds_av1.mkv",
    ]
    (soccer,) = [clip for clip in clips if clip.video == "clips/soccer_juggle.mp4"]
    assert soccer.captions["zh"] == ("一名身穿灰色短袖衬衫和深色长裤的男子在树下的草坪上用脚颠白色足球。",)
    assert [(m.start, m.end) for m in soccer.moments] == [(0.0, 8.2), (8.4, 9.2), (9.2, 10.2)]
    assert soccer.moments[0].captions["zh"] == "男子面向镜头，双脚交替颠球。"
    resolved, missing = captions.resolve(clips, REAL)
    assert not missing and resolved == clips
    rows = list(compose.compose(clips, seed=0, repeats=5))
    assert {language_of(row["conversations"][0]["value"]) for row in rows} == {"en", "zh"}


def test_activitynet_official_form(tmp_path):
    path = tmp_path / "val_1.json"
    row = {
        "duration": 172.34,
        "timestamps": [[130.98, 160.27], [160.27, 172.5]],
        "sentences": [" In orange. ", "Jumps."],
    }
    bad = {
        "duration": 20,
        "timestamps": [[0, 5], [9, 3], [2, 50], ["a", 3], [1], [3, float("nan")], [1, 2]],
        "sentences": ["Fine.", "Reversed.", "Too long.", "Text.", "One.", "No number.", ""],
    }
    odd = {"duration": 3, "timestamps": [[0, 1]], "sentences": []}
    path.write_text(json.dumps({"v_a": row, "v_b": bad, "v_c": odd, "v_d": 7, "v_e": {**row, "duration": "long"}}))
    clips, problems = captions.read("activitynet", path, "test")
    assert [clip.video for clip in clips] == ["ActivityNet/v_a", "ActivityNet/v_b", "ActivityNet/v_e"]
    assert clips[0].moments == (Moment(130.98, 160.27, {"en": "In orange."}), Moment(160.27, 172.34, {"en": "Jumps."}))
    assert len(clips[1].moments) == 1 and clips[2].duration is None
    assert [problem.row for problem in problems] == [*(f"v_b[{n}]" for n in range(1, 7)), "v_c", "v_d", "v_e"]


def test_msrvtt_official_form(tmp_path):
    path = tmp_path / "train_val_videodatainfo.json"
    videos = [
        {"video_id": "video0", "split": "train", "start time": 137.72, "end time": 149.44},
        {"video_id": "video1", "split": "validate", "start time": 5, "end time": 5},
        {"split": "train"},
    ]
    sentences = [
        {"video_id": "video0", "caption": "a  car is shown ", "sen_id": 0},
        {"video_id": "video0", "caption": "一辆汽车", "sen_id": 1},
        {"video_id": "video1", "caption": "people sing", "sen_id": 2},
        {"video_id": "video9", "caption": "unknown", "sen_id": 3},
        {"video_id": "video0", "caption": None, "sen_id": 4},
    ]
    path.write_text(json.dumps({"videos": videos, "sentences": sentences}), encoding="utf-8")
    clips, problems = captions.read("msrvtt", path, "test")
    assert clips[0].captions == {"en": ("a car is shown",), "zh": ("一辆汽车",)}
    assert clips[0].duration == pytest.approx(11.72)
    assert [clip.split for clip in clips] == ["train", "validation"]
    assert [(p.row, p.field) for p in problems] == [
        ("video1", "end time"),
        ("videos[2]", "video_id"),
        ("sentences[3]", "video_id"),
        ("sentences[4]", "caption"),
    ]


def test_bad_rows_of_didemo_and_tvr(tmp_path):
    fine = {"annotation_id": 1, "video": "a.mp4", "num_segments": 6, "times": [[5, 5]], "description": "a  bird"}
    changes = [{"times": []}, {"times": [[6, 6]]}, {"times": [[2, 1]]}, {"num_segments": "6"}, {"video": " "}]
    rows = [fine, *({**fine, "annotation_id": 2 + n, **change} for n, change in enumerate(changes)), "text"]
    (tmp_path / "d.json").write_text(json.dumps([*rows, {**fine, "annotation_id": 9, "description": ""}]))
    clips, problems = captions.read("didemo", tmp_path / "d.json")
    assert [clip.moments for clip in clips] == [(Moment(25, 30, {"en": "a bird"}),)]
    fields = ["times", "times", "times", "num_segments", "video", "row", "sentence"]
    assert [problem.field for problem in problems] == fields

    fine = {"vid_name": "show_1", "duration": 60, "ts": [1, 2], "desc": "He\u2028sits."}
    lines = [
        json.dumps(fine, ensure_ascii=False),
        "{cut",
        "[]",
        json.dumps({**fine, "ts": [3, 70]}),
        "",
        '{"ts": [1, 2]}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines), encoding="utf-8")
    clips, problems = captions.read("tvr", tmp_path / "t.jsonl")
    assert [clip.moments for clip in clips] == [(Moment(1, 2, {"en": "He sits."}),)]
    assert [problem.field for problem in problems] == ["row", "row", "times", "vid_name"]


def test_chunks_of_several_annotators():
    assert captions.majority_chunks([(2, 2)]) == (2, 2)
    assert captions.majority_chunks([(0, 2), (2, 2), (2, 2)]) == (2, 2)
    assert captions.majority_chunks([(0, 1), (0, 1), (2, 3), (2, 3)]) == (0, 1)  # tie: lower medians
    assert captions.majority_chunks([(0, 0), (1, 3), (2, 2), (4, 4)]) == (1, 2)


@pytest.mark.parametrize("form", captions.FORMATS)
@pytest.mark.parametrize("text", ["{", "7", "{}", '{"a": 1}', "[1, 2]", ""])
def test_a_file_of_another_form(tmp_path, form, text):
    path = tmp_path / "annotations.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"annotations\.json.*expected"):
        captions.read(form, path)


def test_files_that_are_no_text(tmp_path):
    for form in captions.FORMATS:
        path = tmp_path / ("a.csv" if form == "msrvtt" else "a.json")
        path.write_bytes(b"\xff\xfe\x00\x81")
        with pytest.raises(ValueError, match="expected"):
            captions.read(form, path)
    (tmp_path / "b.csv").write_text("key,text\n1,2\n")
    with pytest.raises(ValueError, match="key, text"):
        captions.read("msrvtt", tmp_path / "b.csv")
    with pytest.raises(FileNotFoundError):
        captions.read("tvr", tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="didemo"):
        captions.read("vatex", tmp_path / "b.csv")


def test_resolving_names(tmp_path):
    for name in ["X/one.webm", "Y/two.mp4", "Z/two.mkv", "Y/three.AVI", "Y/.four.mp4.tmp", "Y/notes.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    clips = [
        Clip("X/one", near=("Q/three.mov", "X/four")),
        Clip("Z/two.mp4"),
        Clip("Q/three.mov", similar=(("X/one", {"en": "r"}), ("X/four", {"en": "r"}))),
        Clip("X/four"),
        Clip("Q/two"),
        Clip("R/three"),
    ]
    found, problems = captions.resolve(clips, tmp_path)
    assert [clip.video for clip in found] == ["X/one.webm", "Z/two.mkv", "Y/three.AVI"]
    assert found[0].near == ("Y/three.AVI",) and found[2].similar == (("X/one.webm", {"en": "r"}),)
    assert [problem.row for problem in problems] == ["X/four", "Q/two", "R/three"]
    assert "no such file" in problems[0].reason and "several files" in problems[1].reason
    with pytest.raises(NotADirectoryError):
        captions.resolve(clips, tmp_path / "none")


def test_the_program(tmp_path):
    rows = [
        {"video": name, "num_segments": 6, "times": [[n, n]], "description": f"thing {n}", "annotation_id": n}
        for n, name in enumerate(["a.mp4", "b.mp4", "c.mp4", "c.mp4"])
    ]
    (tmp_path / "didemo.json").write_text(json.dumps([*rows, {}]))
    for name in ["a.mkv", "c.mp4"]:
        (tmp_path / "videos/DiDeMo").mkdir(parents=True, exist_ok=True)
        (tmp_path / "videos/DiDeMo" / name).touch()
    command = [sys.executable, "-m", "ivcr_jax.data.compose", "--format=didemo", "--split=test"]
    command += [f"--annotations={tmp_path}/didemo.json", f"--videos={tmp_path}/videos", f"--out={tmp_path}/o/o.json"]
    done = subprocess.run([*command, "--interactions=9"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "DiDeMo/b.mp4: video: no such file" in done.stderr and "at row 4: video" in done.stderr
    assert "2 not used, video 2" in done.stderr and "9 interactions" in done.stdout
    rows = json.loads((tmp_path / "o/o.json").read_text(encoding="utf-8"))
    named = {name for row in rows for _, gpt in turns_of(row) for name in gpt.get("candidate_videos", [])}
    assert named == {"DiDeMo/a.mkv", "DiDeMo/c.mp4"} and {row["split"] for row in rows} == {"test"}
    (tmp_path / "didemo.json").write_text("[")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "didemo.json: not JSON" in done.stderr and "Traceback" not in done.stderr
