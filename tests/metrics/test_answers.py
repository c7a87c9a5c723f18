"""What each reader gives for what people and models write."""

import time

import numpy as np
import pytest

from ivcr_jax.metrics import answers
from tests.metrics import naive

# answer: published number, our number, published span, our span
TABLE = {
    "": (None, None, (0, 0), None),
    "Query content found in video 1 at 5s-10s.": (1, 1, (5, 10), (5, 10)),
    "video 3": (3, 3, (0, 0), None),
    "VIDEO  3!": (3, 3, (0, 0), None),
    "video 12": (None, 12, (0, 0), None),
    "video 10": (10, 10, (0, 0), None),
    "video 0": (0, 0, (0, 0), None),
    "6th video": (None, 6, (0, 0), None),
    "The given query happens in 6th video.": (None, 6, (0, 0), None),
    "video number 3": (None, 3, (0, 0), None),
    "video #3": (None, 3, (0, 0), None),
    "videos 3": (None, None, (0, 0), None),
    "videotape 3": (None, None, (0, 0), None),
    "video 1-10": (1, None, (1, 10), None),
    "Of video 1-10 the best is video 4.": (1, 4, (1, 10), None),
    "Among videos 1 to 10 it is video 4.": (4, 4, (0, 0), None),
    "Not video 2 but video 5": (2, 2, (0, 0), None),
    "video 2024-05-10": (None, None, (5, 2024), None),
    "video 3 - 5s-10s": (3, 3, (3, 5), (5, 10)),
    "video 5-10 seconds": (5, None, (5, 10), (5, 10)),
    "视频 3": (None, 3, (0, 0), None),
    "视频3": (None, 3, (0, 0), None),
    "第3个视频": (None, 3, (0, 0), None),
    "第三个视频": (None, 3, (0, 0), None),
    "第十个视频": (None, 10, (0, 0), None),
    "第十二个视频": (None, 12, (0, 0), None),
    "第二十个视频": (None, 20, (0, 0), None),
    "第１２个视频": (None, 12, (0, 0), None),
    "视频３的５秒～１０秒": (None, 3, (0, 0), (5, 10)),
    "视频一开始": (None, None, (0, 0), None),
    "视频 5秒到10秒": (None, None, (0, 0), (5, 10)),
    "第1到第10个视频中是第4个视频": (None, 4, (0, 0), None),
    "视频 3 的 5.0s-10.0s。": (None, 3, (5, 10), (5, 10)),
    "5s-10s": (None, None, (5, 10), (5, 10)),
    "5.0s–10.0s": (None, None, (0, 0), (5, 10)),
    "5.5s—10s": (None, None, (0, 0), (5.5, 10)),
    "5s~10s": (None, None, (0, 0), (5, 10)),
    "5s～10s": (None, None, (0, 0), (5, 10)),
    "5s至10s": (None, None, (0, 0), (5, 10)),
    "5s到10s": (None, None, (0, 0), (5, 10)),
    "5s to 10s": (None, None, (0, 0), (5, 10)),
    "2 s - 4 s": (None, None, (0, 0), (2, 4)),
    "from 5 to 10": (None, None, (0, 0), (5, 10)),
    "from 5 to 10 seconds": (None, None, (0, 0), (5, 10)),
    "between 5 and 10 seconds": (None, None, (0, 0), (5, 10)),
    "from 2 to 3 people": (None, None, (0, 0), None),
    "from 2010 to 2012.": (None, None, (0, 0), None),
    "5秒到10秒": (None, None, (0, 0), (5, 10)),
    "从5秒到10秒": (None, None, (0, 0), (5, 10)),
    "从第5秒到第10秒": (None, None, (0, 0), (5, 10)),
    "1分5秒到1分10秒": (None, None, (0, 0), (65, 70)),
    "1 min 5 s to 1 min 10 s": (None, None, (0, 0), (65, 70)),
    "5s to 2 minutes": (None, None, (0, 0), None),
    "5-10 minutes": (None, None, (5, 10), None),
    "00:05-00:10": (None, None, (0, 5), (5, 10)),
    "00:00:05 - 00:00:10": (None, None, (0, 5), (5, 10)),
    "1:02:03 - 1:02:10": (None, None, (1, 3), (3723, 3730)),
    "0:05 to 0:10": (None, None, (0, 0), (5, 10)),
    "00:00:05:12 - 00:00:06:01": (None, None, (0, 12), None),
    "It begins at 00:00:18! It ends at 00:00:23.": (None, None, (0, 0), (18, 23)),
    "The given query happens 130.98 - 160.27 seconds. 2 dogs": (None, None, (130.98, 160.27), (130.98, 160.27)),
    "Starting time: 0.8 seconds\nEnding time: 1.1 seconds": (None, None, (0.8, 1.1), (0.8, 1.1)),
    "开始时间：5秒，结束时间：10秒": (None, None, (0, 0), (5, 10)),
    "It starts in video 3 at 5 s and ends at 10 s": (3, 3, (0, 0), (5, 10)),
    "10s-5s": (None, None, (5, 10), (5, 10)),
    "5s-5s": (None, None, (5, 5), (5, 5)),
    "-3 - 5": (None, None, (3, 5), None),
    "[5, 10.5]": (None, None, (0, 0), (5, 10.5)),
    "2024-05-10": (None, None, (5, 2024), None),
    "On 2024-05-10 video 2 was shot; see 5s-10s": (2, 2, (5, 2024), (5, 10)),
    "1. 3 dogs! 2. 4 cats": (None, None, (1, 2), None),
    "12...5 - 20": (None, None, (12.5, 20), None),
    "A specific example is : 20.8 - 30.0 seconds. 5 - 6": (None, None, (5, 6), (20.8, 30)),
    "nans-nans": (None, None, (0, 0), None),
    "It is video 2 at 1.0s-9.5ss.": (2, 2, (1, 9.5), (1, 9.5)),
}


@pytest.mark.parametrize(("answer", "expected"), TABLE.items())
def test_what_is_read(answer, expected):
    assert (
        answers.published_video(answer),
        answers.video(answer),
        answers.published_span(answer),
        answers.span(answer),
    ) == expected


@pytest.mark.parametrize(
    ("answer", "times"),
    [
        ("Content at 1.5s-3.2s and 10s-15.5s", [1.5, 3.2, 10, 15.5]),
        ("10s-5s", [10, 5]),
        ("at 5s - 10s", []),
        ("5-10s", []),
        ("5S-10S", []),
        ("5.s-10s", []),
        ("1.5.5s-7s", [5.5, 7]),
    ],
)
def test_what_the_published_reader_takes_for_the_truth(answer, times):
    assert answers.published_truth(answer) == times


BITS = (
    "video", " ", "  ", "Video ", "VIDEO\t", "1", "0", "10", "3", "12", "5.5", "s", "s-", " - ", "-", ".", "..", "!",
    "?", "\n", ":", "00:00:05", "1:2:03", "视频", "第", "秒", "到", "–", "A specific example is : 20.8 - 30.0 seconds",
    "x", "_", "３", "s ", ", ", "at ", "²", "\u00a0",
)  # fmt: skip


def test_the_published_reader_agrees_with_one_that_goes_by_characters():
    rng = np.random.default_rng(0)
    read = 0
    for _ in range(4_000):
        answer = "".join(rng.choice(BITS, size=rng.integers(1, 14)))
        found = (answers.published_video(answer), [*answers.published_span(answer)], answers.published_truth(answer))
        assert found == (naive.video_index(answer), naive.predicted_time(answer), naive.true_times(answer)), answer
        read += found[0] is not None or found[1] != [0, 0]
    assert read > 400


def test_our_span_is_sorted_and_finite_and_our_number_a_number_in_whatever_is_written():
    rng = np.random.default_rng(1)
    spans = 0
    for _ in range(4_000):
        answer = "".join(rng.choice(BITS, size=rng.integers(1, 14)))
        span, number = answers.span(answer), answers.video(answer)
        assert span is None or 0 <= span[0] <= span[1] < float("inf"), answer
        assert number is None or number >= 0, answer
        spans += span is not None
    assert spans > 100
    assert answers.span("5s-" + "9" * 400 + "s") is None


@pytest.mark.parametrize("answer", ["9" * 6000, "video " + "9" * 6000, "9." * 1500, "5s - " * 600, "start 5 " * 300])
def test_a_model_that_repeats_itself_is_read_in_no_time(answer):
    begun = time.process_time()
    for read in (answers.published_video, answers.published_span, answers.published_truth, answers.video, answers.span):
        read(answer)
    assert time.process_time() - begun < 5
