"""The schema's helpers, against cases worked out by hand."""

import pytest

from ivcr_jax.data import dialogue


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("ActivityNet/v__n9eNF1WaFU.mp4", "ActivityNet/v__n9eNF1WaFU"),
        ("ActivityNet/v__n9eNF1WaFU", "ActivityNet/v__n9eNF1WaFU"),
        ("./MSR-VTT/video7010.MP4 ", "MSR-VTT/video7010"),
        ("DiDeMo/1@N01_2_a.3gp", "DiDeMo/1@N01_2_a"),
        ("LSMDC\\0001_Movie_00.01.02-00.03.04.avi", "LSMDC/0001_Movie_00.01.02-00.03.04"),
        ("LSMDC/0001_Movie_00.01.02-00.03.04", "LSMDC/0001_Movie_00.01.02-00.03.04"),
        ("语料/视频.webm", "语料/视频"),
        ("", ""),
    ],
)
def test_video_id_drops_a_container_suffix_only(path, name):
    assert dialogue.video_id(path) == name


def test_corpus_is_the_parent_folder():
    assert dialogue.corpus_of("TVQA/friends/s01") == "friends"
    assert dialogue.corpus_of("alone") == ""


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("A man rides a horse.", "en"),
        ("一个男人骑马。", "zh"),
        ("给我找一个关于 NASA rocket 的视频", "zh"),
        ("find the 视频 where a man is speaking", "en"),
        ("12345 ...", "en"),
        ("", "en"),
    ],
)
def test_language(text, language):
    assert dialogue.language_of(text) == language


@pytest.mark.parametrize(
    ("answer", "number", "as_twelve"),
    [
        ("Query content found in video 1 at 5s-10s.", 1, "Query content found in video 12 at 5s-10s."),
        ("The given query happens in 6th video. x", 6, "The given query happens in 12th video. x"),
        ("The query happens in 1st video", 1, "The query happens in 12th video"),
        ("see Video 10 and video 2", 10, "see Video 12 and video 2"),
        ("查询内容出现在视频 3 的 5.0s-10.0s。", 3, "查询内容出现在视频 12 的 5.0s-10.0s。"),
        ("是第4个视频。", 4, "是第12个视频。"),
        ("The videos are nice.", None, "The videos are nice."),
        ("videotape 3", None, "videotape 3"),
        ("video " + "3" * 5000, None, "video " + "3" * 5000),
        ("视频" + "3" * 5000, None, "视频" + "3" * 5000),
    ],
)
def test_video_number_is_found_and_replaced(answer, number, as_twelve):
    found = dialogue.video_number(answer)
    assert (found and found[0]) == number
    if found:
        assert answer[found[1] : found[2]] == str(number)
    assert dialogue.renumber(answer, 12) == as_twelve


@pytest.mark.parametrize(
    ("number", "ordinal"), [(1, "1st"), (2, "2nd"), (3, "3rd"), (4, "4th"), (11, "11th"), (21, "21st"), (112, "112th")]
)
def test_renumber_keeps_the_ordinal_right(number, ordinal):
    assert dialogue.renumber("in 6th video.", number) == f"in {ordinal} video."


def test_videos_of_a_dialogue_are_distinct_and_in_order():
    turn = dialogue.Turn("q", "a", dialogue.Intent.VIDEO, "en", "c/x", ("c/b", "c/x", "c/a"))
    again = dialogue.Turn("q", "a", dialogue.Intent.MOMENT, "en", "c/y", (), (0.0, 1.0))
    assert dialogue.Dialogue("d", "train", 1, (turn, again)).videos == ("c/b", "c/x", "c/a", "c/y")
