"""The source reader: each kind of bad row, by hand; the stream, against json.load."""

import collections
import json

import pytest

from ivcr_jax.data import manifest, source, splits
from ivcr_jax.data.dialogue import Intent


def human(value="Find a dog."):
    return {"from": "human", "value": value, "text_id": 1}


def gpt(value="The intent is video retrieval. It is in video 2.", **fields):
    answer = {
        "from": "gpt",
        "value": value,
        "video_id": "DiDeMo/b.mp4",
        "candidate_videos": ["DiDeMo/a.mp4", "DiDeMo/b.mp4"],
        "gt_se": [-1, -1],
    }
    return {key: item for key, item in (answer | fields).items() if item is not ...}


def moment(*span, **fields):
    return gpt("It happens in video 2 at 1s-2s.", gt_se=list(span), **({"candidate_videos": ...} | fields))


def row(*messages, **fields):
    return {"id": "d", "split": "train", "type": [1], "conversations": list(messages)} | fields


class Catalog:
    """Durations by id, as VideoCatalog gives them."""

    def __init__(self, **durations):
        self._durations = {f"DiDeMo/{name}": value for name, value in durations.items()}

    def duration(self, name):
        return self._durations.get(name, "video_missing")


def read(raw, catalog=None):
    reader = source.RowReader(catalog)
    dialogue = reader.read(raw)
    reasons = [(entry.reason, entry.action) for entry in reader.entries]
    return dialogue, reasons, reader


def test_a_good_row_passes_untouched():
    raw = row(human(), gpt(), human("When?"), moment(1, 2.5), human("谢谢"), {"from": "gpt", "value": "不客气"})
    dialogue, reasons, reader = read(raw, Catalog(a=9.0, b=9.0))
    assert reasons == []
    assert (reader.seen, reader.kept) == (3, 3)
    assert dialogue.id == "d" and dialogue.split == "train" and dialogue.type == 1
    find, when, thanks = dialogue.turns
    assert (find.intent, find.video_id, find.candidates) == (Intent.VIDEO, "DiDeMo/b", ("DiDeMo/a", "DiDeMo/b"))
    assert find.span is None and find.language == "en"
    assert (when.intent, when.span, when.candidates) == (Intent.MOMENT, (1.0, 2.5), ())
    assert (thanks.intent, thanks.language, thanks.video_id) == (Intent.CHAT, "zh", "")


# What a single bad answer becomes: (reason, action) and the turn that is left, by field.
@pytest.mark.parametrize(
    ("answer", "noted", "left"),
    [
        (moment(2, 1), ("moment_reversed", "repaired"), {"span": (1.0, 2.0)}),
        (moment(-0.5, 1), ("moment_before_start", "repaired"), {"span": (0.0, 1.0)}),
        (moment(8, 12), ("moment_past_end", "repaired"), {"span": (8.0, 9.0)}),
        (moment(9.5, 12), ("moment_outside_video", "cut"), None),
        (moment(-3, -2), ("moment_empty", "cut"), None),
        (moment(2, 2), ("moment_empty", "cut"), None),
        (moment(1), ("moment_malformed", "cut"), None),
        (moment(True, 2), ("moment_malformed", "cut"), None),
        (moment(None, 2), ("moment_malformed", "cut"), None),
        (moment("x", 2), ("moment_malformed", "cut"), None),
        (moment(float("inf"), 2), ("moment_malformed", "cut"), None),
        (moment("1.5", "2"), ("time_as_text", "repaired"), {"span": (1.5, 2.0)}),
        (gpt(gt_se="5s-10s"), ("moment_malformed", "cut"), None),
        (gpt(candidate_videos=...), ("candidates_missing", "flagged"), {"candidates": (), "intent": Intent.VIDEO}),
        (gpt(candidate_videos=[]), ("candidates_empty", "flagged"), {"candidates": ()}),
        (gpt(candidate_videos="DiDeMo/b.mp4"), ("candidates_malformed", "repaired"), {"candidates": ()}),
        (
            gpt(candidate_videos=["DiDeMo/a.mp4"]),
            ("truth_not_in_candidates", "flagged"),
            {"candidates": ("DiDeMo/a",), "video_id": "DiDeMo/b"},
        ),
        (
            gpt(candidate_videos=["DiDeMo/b", "DiDeMo/b.mp4"]),
            ("candidate_twice", "repaired"),
            {"candidates": ("DiDeMo/b",)},
        ),
        (gpt(candidate_videos=["DiDeMo/b", 7]), ("candidate_malformed", "repaired"), {"candidates": ("DiDeMo/b",)}),
        (
            gpt(candidate_videos=["DiDeMo/b", "DiDeMo/gone.mp4"]),
            ("candidate_video_missing", "repaired"),
            {"candidates": ("DiDeMo/b",)},
        ),
        (gpt(video_id="DiDeMo/gone.mp4"), ("video_missing", "cut"), None),
        (gpt(video_id="DiDeMo/broken.mp4"), ("video_unreadable", "cut"), None),
        (gpt(video_id=None), ("truth_missing", "cut"), None),
        (gpt(value=" \n"), ("empty_text", "cut"), None),
        (gpt(value=None), ("text_missing", "cut"), None),
        (gpt(value=" In video 2. "), ("stray_blanks", "repaired"), {"answer": "In video 2."}),
        (gpt(value="In video 2.</s>"), ("control_token_in_text", "repaired"), {"answer": "In video 2."}),
        (gpt(value="In vid\ufffdo 2."), ("invalid_utf8", "flagged"), {"answer": "In vid\ufffdo 2."}),
        (gpt(video_id="DiDeMo/b"), None, {"video_id": "DiDeMo/b"}),  # a name without its suffix is no fault
        (moment(1, 2), None, {"span": (1.0, 2.0)}),  # nor are whole seconds
        (gpt(gt_se=None), None, {"intent": Intent.VIDEO}),
    ],
)
def test_a_bad_answer(answer, noted, left):
    dialogue, reasons, reader = read(row(human(), answer), Catalog(a=9.0, b=9.0, broken="video_unreadable"))
    assert reader.seen == 1
    if left is None:
        assert reasons[0] == noted
        assert reasons[-1] == ("no_usable_turn", "rejected") and dialogue is None and reader.kept == 0
    else:
        assert reasons == ([noted] if noted else [])
        assert {name: getattr(dialogue.turns[0], name) for name in left} == left and reader.kept == 1


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ([], "not_an_object"),
        (row(human(), gpt(), split="dev"), "unknown_split"),
        (row(human(), gpt(), split=None), "unknown_split"),
        (row(), "no_conversation"),
        (row(conversations="hello"), "no_conversation"),
        (row(human()), "no_usable_turn"),
        (row({"from": "system", "value": "x"}), "no_usable_turn"),
    ],
)
def test_a_bad_row_is_rejected(raw, reason):
    dialogue, reasons, reader = read(raw)
    assert dialogue is None and reasons[-1] == (reason, "rejected")
    assert (reader.seen, reader.kept) == (1, 0)


def test_a_lost_turn_ends_the_dialogue_unless_turns_are_independent():
    messages = [human("1"), gpt(), human("2"), moment(2, 2), human("3"), gpt(), human("4"), gpt()]
    dialogue, reasons, reader = read(row(*messages))
    assert [turn.user for turn in dialogue.turns] == ["1"]
    assert reasons == [("moment_empty", "cut"), ("after_a_lost_turn", "cut")]
    assert (reader.seen, reader.kept) == (4, 1)
    dialogue, reasons, reader = read(row(*messages, type=[7]))
    assert [turn.user for turn in dialogue.turns] == ["1", "3", "4"]
    assert reasons == [("moment_empty", "cut")] and (reader.seen, reader.kept) == (4, 3)


def test_messages_without_a_partner():
    messages = [gpt(), human("lost"), human("1"), gpt(), {"from": "system", "value": "x"}, human("open")]
    dialogue, reasons, reader = read(row(*messages))
    assert [turn.user for turn in dialogue.turns] == ["1"]
    assert collections.Counter(reasons) == {
        ("answer_without_question", "cut"): 1,
        ("question_without_answer", "cut"): 2,
        ("unknown_speaker", "cut"): 1,
    }
    assert (reader.seen, reader.kept) == (3, 1)


def test_a_moment_question_whose_moment_is_null_is_not_taken_for_a_search():
    lost = gpt(gt_se=None, candidate_videos=...)
    dialogue, reasons, _ = read(row(human(), gpt(), human("When?"), lost))
    assert len(dialogue.turns) == 1 and ("moment_missing", "cut") in reasons


def test_chat_dialogues_are_kept_as_chat():
    dialogue, reasons, _ = read(row(human("Write a script."), gpt("Sure."), type=[0]))
    assert dialogue.turns[0].intent == Intent.CHAT and dialogue.turns[0].video_id == "" and reasons == []


def test_duplicate_and_missing_ids_become_unique():
    reader = source.RowReader()
    names = [reader.read(row(human(), gpt(), id=name)).id for name in ("x", "x", None, "", "x")]
    assert len(set(names)) == 5 and names[0] == "x"
    assert [entry.reason for entry in reader.entries] == ["duplicate_id", "duplicate_id"]


def test_type_forms():
    for value, kind, reasons in (([3], 3, []), (3, 3, []), (None, -1, ["type_missing"]), (["a"], -1, ["type_missing"])):
        reader = source.RowReader()
        assert reader.read(row(human(), gpt(), type=value)).type == kind
        assert [entry.reason for entry in reader.entries] == reasons


def test_stream_gives_what_json_gives(tmp_path):
    items = [{"a": [1, -1, 2.5, None, True, {"b": []}], "视": "频 \u2028 \U0001f600"}, [], [[1], {}], "x", 3, None]
    path = tmp_path / "x.json"
    for text in (json.dumps(items), json.dumps(items, ensure_ascii=False, indent=2), "\ufeff" + json.dumps(items)):
        path.write_text(text, encoding="utf-8")
        assert list(source.stream_rows(path)) == items
    path.write_text(" [] ")
    assert list(source.stream_rows(path)) == []


def test_invalid_utf8_becomes_replacement_characters(tmp_path):
    path = tmp_path / "x.json"
    # Long enough that characters fall across the borders of the reader's chunks.
    path.write_bytes(b'["\xff", "caf\xe9", "' + "视频".encode() * 50_000 + b'"]')
    assert list(source.stream_rows(path)) == ["\ufffd", "caf\ufffd", "视频" * 50_000]


@pytest.mark.parametrize(
    ("text", "rows", "message"),
    [
        ('[{"a": 1}, {"b": 2}, {"c"', 2, "cut off or malformed after 2 rows"),
        ('[{"a": 1}, {"b" 2}, {"c": 3}]', 1, "cut off or malformed after 1 rows"),
        ("", 0, "cut off or malformed after 0 rows"),
        ("hello", 0, "malformed"),
        ('{"a": []}', 0, "starts with start_map; expected a JSON list"),
    ],
)
def test_what_is_no_list_says_so_after_the_rows_before(tmp_path, text, rows, message):
    path = tmp_path / "source.json"
    path.write_text(text)
    seen = []
    with pytest.raises(source.SourceError, match=message) as error:
        for item in source.stream_rows(path):
            seen.append(item)
    assert len(seen) == rows and "source.json" in str(error.value)


def test_absent_source(tmp_path):
    with pytest.raises(source.SourceError, match=r"gone\.json: no such file"):
        list(source.stream_rows(tmp_path / "gone.json"))


def test_catalog_knows_videos_by_id_and_reports_namesakes(tmp_path):
    for name in ("DiDeMo/a.mp4", "DiDeMo/a.webm", "TVQA/friends/b.MKV", "TVQA/notes.txt", ".hidden/c.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    catalog = source.VideoCatalog(tmp_path)
    assert list(catalog.files) == ["DiDeMo/a", "TVQA/friends/b"]
    assert catalog.files["DiDeMo/a"].path.name == "a.mp4"
    assert [(entry.id, entry.reason) for entry in catalog.problems] == [("DiDeMo/a", "duplicate_video_id")]
    assert catalog.duration("DiDeMo/gone") == "video_missing"
    assert catalog.duration("DiDeMo/a") == "video_unreadable"
    with pytest.raises(source.SourceError, match="no such folder"):
        source.VideoCatalog(tmp_path / "gone")


# --- splits ---


def check_carve(truths, share):
    validation, left_out = splits.carve(truths, share)
    assert validation <= set(truths) and left_out <= set(truths) and not validation & left_out
    assert len(validation) + len(left_out) <= share * len(truths)
    train = set(truths) - validation - left_out
    videos = [{video for name in part for video in truths[name]} for part in (validation, train)]
    assert not videos[0] & videos[1]
    assert splits.carve(dict(reversed(truths.items())), share) == (validation, left_out)
    return validation, left_out


def test_carve_takes_whole_groups():
    # 200 groups of five dialogues over three videos each, chained so that no two dialogues share all videos.
    truths = {
        f"{group}-{number}": [f"{group}/{number % 3}", f"{group}/{(number + 1) % 3}"]
        for group in range(200)
        for number in range(5)
    }
    truths |= {f"chat-{number}": [] for number in range(100)}
    validation, left_out = check_carve(truths, 0.1)
    assert not left_out and 100 <= len(validation) <= 110
    assert any(name.startswith("chat") for name in validation)


def test_carve_cuts_a_giant_group():
    # One chain: dialogue i links video i and i + 1, so all 1000 are one group.
    truths = {f"d{number}": [f"v{number}", f"v{number + 1}"] for number in range(1000)}
    validation, left_out = check_carve(truths, 0.1)
    assert len(left_out) == 2 and 90 <= len(validation) <= 98


def test_chat_takes_its_share_of_the_budget_and_no_more():
    truths = {f"d{number}": [f"v{number}", f"v{number + 1}"] for number in range(1000)}
    truths |= {f"chat-{number}": [] for number in range(500)}
    validation, _ = check_carve(truths, 0.1)
    chat = {name for name in validation if name.startswith("chat")}
    assert len(chat) == 50 and 90 <= len(validation - chat) <= 98


def test_carve_of_nothing():
    assert splits.carve({}, 0.1) == (set(), set())
    assert splits.carve({"a": ["v"]}, 0.1) == (set(), set())


# --- manifest ---


def test_manifest_round_trip(tmp_path):
    entries = [manifest.Entry("a", "f", "bad", "cut", "视频"), manifest.Entry("b", "f", "bad", "cut")]
    counts = manifest.write(tmp_path / "m.jsonl", entries)
    assert counts == {"cut: bad": 2} and list(manifest.read(tmp_path / "m.jsonl")) == entries
    with pytest.raises(ValueError, match="'lost'"):
        manifest.Entry("a", "f", "bad", "lost")


@pytest.mark.parametrize(("lost", "seen", "fails"), [(5, 100, False), (6, 100, True), (0, 0, True), (9, 9, True)])
def test_loss_limit(lost, seen, fails):
    def check():
        manifest.check_loss(
            lost=lost, seen=seen, what="videos", max_loss=0.05, counts={"rejected: x": 6}, path="m.jsonl"
        )

    if fails:
        with pytest.raises(manifest.TooMuchLost, match=f"{lost} of {seen} videos"):
            check()
    else:
        check()


def test_atomic_leaves_nothing_behind_when_it_fails(tmp_path):
    (tmp_path / "x").write_text("old")
    with pytest.raises(RuntimeError), manifest.atomic(tmp_path / "x") as path:
        path.write_text("half")
        raise RuntimeError
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "old"
