"""The published test set out of raw dialogues, against a naive conversion, and the files."""

import copy
import json
import pathlib
import subprocess
import sys

import pytest

from ivcr_jax.data import prompt
from ivcr_jax.data.dialogue import Intent
from ivcr_jax.metrics import published, raw
from tests.metrics import naive
from tests.metrics.made_up import Maker


def write(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return str(path)


def rows_of(tmp_path, dialogues):
    return raw.read_rows(write(tmp_path / "raw.json", dialogues))


def search(question, truth, candidates, answer=None):
    number = candidates.index(truth) + 1 if truth in candidates else 0
    answer = answer or f"It is video {number}."
    gpt = {"from": "gpt", "value": answer, "video_id": truth, "candidate_videos": candidates, "gt_se": [-1, -1]}
    return [{"from": "human", "value": question, "text_id": 1}, gpt]


def moment(question, start, end, truth="c/a.mp4", candidates=("c/a.mp4",)):
    gpt = {"from": "gpt", "value": f"In video 1 at {start}s-{end}s.", "video_id": truth, "gt_se": [start, end]}
    return [{"from": "human", "value": question, "text_id": 1}, gpt | {"candidate_videos": [*candidates]}]


def chat(question):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "You are welcome.", "gt_se": [-1, -1]}]


def dialogue(*turns, kind=1, split="test", **more):
    return {"split": split, "type": [kind], "conversations": sum(turns, []), **more}


LIST = [f"c/{letter}.mp4" for letter in "abcdefghij"]


@pytest.mark.parametrize("seed", range(60))
def test_it_agrees_with_a_naive_conversion_and_stops_where_it_does(seed, tmp_path):
    maker = Maker(seed, untidy=(0, 0.002, 0.05)[seed % 3])
    data = maker.raw(20)
    rows = rows_of(tmp_path, copy.deepcopy(data))
    for longest in (7, 10):
        try:
            samples, videos = naive.convert(data, longest)
        except (KeyError, IndexError):
            with pytest.raises(ValueError, match=r"B12|B6|in turn"):
                published.convert(rows, as_published=True, longest=longest)
            continue
        found, left_out = published.convert(rows, as_published=True, longest=longest)
        assert [sample.messages for sample in found] == samples
        ours = [sample.videos for sample in found]
        assert ours == [shown for shown in videos if len(shown) <= longest]
        left_out.pop("messages in no turn", None)
        turns = sum(len(row["conversations"]) // 2 for row in rows)
        assert len(found) + sum(map(len, left_out.values())) == turns


def test_naive_conversions_are_not_all_stopped_nor_all_the_same(tmp_path):
    sizes = set()
    for seed in range(0, 60, 3):
        sizes.add(len(published.convert(rows_of(tmp_path, Maker(seed).raw(20)), as_published=True)[0]))
    assert len(sizes) > 10 and min(sizes) > 0


def test_what_a_model_is_shown_is_the_published_prompt():
    style = prompt.PromptStyle(localized=False, frame_times=False)
    rows = [dialogue(search(" Find it. ", "c/c.mp4", LIST), moment("When?", 5.0, 9.5), id="d")]
    (_, sample), left_out = published.convert(rows)
    asked = [
        prompt.PromptTurn("Find it.", "It is video 3.", Intent.VIDEO, "en", tuple(range(1, 11))),
        prompt.PromptTurn("When?", "In video 1 at 5.0s-9.5s.", Intent.MOMENT, "en", (1,)),
    ]
    system, *messages = sample.messages
    assert system["role"] == "system" and not left_out
    expected = prompt.render(asked, style)
    for (before, after), user, assistant in zip(expected, messages[::2], messages[1::2], strict=True):
        assert user["content"] == before.split("<</SYS>>\n\n")[-1].removeprefix("<s>[INST] ").removesuffix(" [/INST]")
        assert f" {assistant['content']} </s>" == after
    assert system["content"] in expected[0][0]
    assert sample.videos == [LIST, "c/a.mp4"]


def test_independent_turns_are_lost_as_published_and_kept_with_their_numbers():
    first, second, third = (search(f"q{n}", truth, LIST) for n, truth in enumerate(("c/a.mp4", "c/x.mp4", "c/b.mp4")))
    rows = [dialogue(first, second, third, kind=7, id="d")]
    assert published.convert(rows, as_published=True) == (
        [],
        {"of independent turns (B8)": ["d turn 1", "d turn 2", "d turn 3"]},
    )
    samples, left_out = published.convert(rows)
    assert [[turn.number for turn in sample.turns] for sample in samples] == [[1], [1, 3]]
    assert left_out == {"missed by the first stage": ["d turn 2"]}


def test_talk_is_history_and_a_search_among_nothing_is_none():
    lacking = search("And the other?", "c/b.mp4", LIST)
    del lacking[1]["candidate_videos"]
    rows = [dialogue(chat("Hello."), search("Find it.", "c/a.mp4", LIST), lacking, chat("Thanks"), id="d")]
    samples, left_out = published.convert(rows)
    assert [[message["content"][:9] for message in sample.messages[1:]] for sample in samples] == [
        ["Hello.", "You are w", "Candidate", "It is vid"]
    ]
    assert left_out == {"without a video to show": ["d turn 1", "d turn 3", "d turn 4"]}
    with pytest.raises(ValueError, match=r"d turn 1: no candidate_videos and video_id|d turn 1: no candidate_videos"):
        published.convert(rows, as_published=True)
    del rows[0]["conversations"][:2]
    with pytest.raises(ValueError, match=r"d turn 2: no candidate_videos; .*\(B12\)"):
        published.convert(rows, as_published=True)


def test_a_missed_first_turn_costs_the_dialogue():
    rows = [
        dialogue(moment("When?", 1, 2, candidates=LIST[1:]), search("q", "c/a.mp4", LIST), id="moment"),
        dialogue(search("q", "c/x.mp4", LIST), search("q", "c/a.mp4", LIST), id="search"),
        dialogue(moment("When?", 1, 2, candidates=LIST), id="good"),
        dialogue(*(search(f"q{n}", "c/a.mp4", LIST) for n in range(9)), id="long"),
    ]
    samples, left_out = published.convert(rows)
    assert [sample.dialogue for sample in samples] == ["good"] + ["long"] * 7
    assert left_out == {
        "their dialogue's first was missed by the first stage": [
            "moment turn 1", "moment turn 2", "search turn 1", "search turn 2",
        ],
        "behind 7 turns": ["long turn 8", "long turn 9"],
    }  # fmt: skip


def test_a_message_without_its_other_half_is_listed_and_stops_the_published_conversion():
    turns = search("q", "c/a.mp4", LIST)
    rows = [dialogue(turns, turns[:1], turns, turns[1:], id="d")]
    samples, left_out = published.convert(rows)
    assert len(samples) == 2 and left_out == {"messages in no turn": ["d message 2", "d message 5"]}
    stops = [
        (rows[0], 2),
        (dialogue(turns[:1], id="d"), 0),
        (dialogue(turns[:1], turns, id="d"), 0),
        (dialogue(turns, turns[1:], id="d"), 2),
    ]
    for row, place in (*stops, (dialogue(turns, turns[:1], kind=7, id="d"), 2)):
        with pytest.raises(
            ValueError, match=f"d message {place}: the published conversion needs human and gpt in turn"
        ):
            published.convert([row], as_published=True)
    assert len(published.convert([dialogue(turns, turns[:1], turns[:1], id="d")], as_published=True)[0]) == 1


@pytest.mark.parametrize(
    "before",
    [
        "",
        "Candidate videos : " + ",".join(f"<VID> {n} </VID> <VIDEO> <VIDEOTOKEN> </VIDEO>" for n in range(1, 11)) + ".",
        "Current video : <VID> 3 </VID> <VIDEO> <VIDEOTOKEN> </VIDEO>.",
        "Current video : <VID> None </VID> <VIDEO> <VIDEOTOKEN> </VIDEO>. The video contains 3 frames sampled at 0.1, "
        "0.5, 12.3 seconds.",
        "Current video : <VID> 3 </VID> <VIDEO> <VIDEOTOKEN> </VIDEO>"
        + ". The video contains 3 frames sampled at 0.1, 0.5, 12.3 seconds" * 3
        + ".",
    ],
)
@pytest.mark.parametrize("question", ["When. Does it bark?", "它在视频 3 里吗？", "The video contains dogs.", ""])
def test_the_question_is_found_behind_what_is_shown(before, question):
    assert published.question_of(f" {before}{question} ") == question


def test_results_are_written_in_order_and_read_again(tmp_path):
    samples, _ = published.convert([dialogue(search("找它", "c/a.mp4", LIST), moment("When?", 1, 2), id="d")])
    path = str(tmp_path / "result.json")
    published.write_predictions(path, samples, ["视频 1", "1s-2s"])
    assert json.loads(pathlib.Path(path).read_text(encoding="utf-8")) == [
        {"user_q": samples[0].messages[-2]["content"], "output": "视频 1"},
        {"user_q": samples[1].messages[-2]["content"], "output": "1s-2s"},
    ]
    assert [prediction.output for prediction in published.read_predictions(path)] == ["视频 1", "1s-2s"]
    with pytest.raises(ValueError, match="found 1 answers for 2 samples; expected one each"):
        published.write_predictions(path, samples, ["x"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["result.json"]


@pytest.mark.parametrize(
    ("read", "value", "message"),
    [
        (raw.read_rows, {"a": 1}, "found {'a': 1}, expected a list"),
        (raw.read_rows, [7], "row-0000000: found 7, expected a dialogue with its split"),
        (raw.read_rows, [{"split": "test", "type": [1]}], "row-0000000: found .*expected type and conversations"),
        (raw.read_rows, [dialogue([{"from": "gpt"}])], "row-0000000: message 0: found .*expected from and value"),
        (raw.read_rows, [], "found no dialogue of the split test"),
        (raw.read_rows, [dialogue(chat("q"), kind=0), dialogue(chat("q"), split="train")], "found no dialogue of"),
        (published.read_samples, [], "found no sample"),
        (published.read_samples, [[{"role": "user", "content": "q"}]], "sample 0: found"),
        (published.read_predictions, [{"user_q": "q"}], "row 0: found {'user_q': 'q'}, expected user_q and output"),
        (
            published.read_predictions,
            [{"user_q": "q", "output": float("nan")}],
            "row 0: output: found nan, expected text",
        ),
    ],
)
def test_other_files_are_refused(read, value, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / "file.json", value))
    with pytest.raises(ValueError, match="found what is no JSON"):
        read(
            str(
                write(tmp_path / "file.json", "")
                and (tmp_path / "file.json").write_text("{")
                and tmp_path / "file.json"
            )
        )
    with pytest.raises(FileNotFoundError):
        read(str(tmp_path / "absent.json"))


def test_rows_without_an_id_of_their_own_are_named_by_their_place(tmp_path):
    turns = search("q", "c/a.mp4", LIST)
    rows = rows_of(
        tmp_path, [dialogue(turns, split="train"), dialogue(turns), dialogue(turns, id=4), dialogue(turns, id="4")]
    )
    assert [row["id"] for row in rows] == ["row-0000001", "4", "4@row-0000003"]


def test_the_command_writes_samples_and_videos(tmp_path):
    path = write(tmp_path / "raw.json", Maker(3).raw(20))
    command = [sys.executable, "-m", "ivcr_jax.metrics.published", f"--raw={path}", f"--dialogues={tmp_path}/d.json"]
    done = subprocess.run([*command, f"--videos={tmp_path}/v.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    samples = published.read_samples(f"{tmp_path}/d.json")
    assert json.loads(done.stdout.splitlines()[-1])["samples"] == len(samples)
    assert len(json.loads((tmp_path / "v.json").read_text())) == len(samples)
    refused = subprocess.run([*command, "--raw=absent"], capture_output=True, text=True)
    assert refused.returncode == 1 and "published: " in refused.stderr and "Traceback" not in refused.stderr
