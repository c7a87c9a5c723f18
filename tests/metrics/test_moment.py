"""Overlap of spans and what counts as found, against loops from the definitions."""

import numpy as np
import pytest

from ivcr_jax.metrics import moment
from ivcr_jax.metrics.records import Moment

SPANS = np.array([[0, 4], [0, 4], [0, 4], [2, 2], [5, 9], [3, 3]], np.float64)
WANTED = np.array([[0, 4], [2, 6], [4, 6], [2, 2], [6, 7], [2, 5]], np.float64)


def test_spans_by_hand():
    for one, other in ((SPANS, WANTED), (WANTED, SPANS)):
        np.testing.assert_allclose(moment.interval_iou(one, other), [1, 1 / 3, 0, 0, 1 / 4, 0], atol=1e-12)


def test_overlap_is_the_share_of_a_fine_grid():
    """By counting the hundredths of a second that lie in spans."""
    rng = np.random.default_rng(0)
    found, wanted = (np.sort(rng.integers(0, 1000, (200, 2)), 1) / 100 for _ in range(2))
    ticks = (np.arange(1000) + 0.5) / 100
    for one, other, iou in zip(found, wanted, moment.interval_iou(found, wanted), strict=True):
        first, second = ((span[0] < ticks) & (ticks < span[1]) for span in (one, other))
        assert iou == pytest.approx((first & second).sum() / max((first | second).sum(), 1))
    np.testing.assert_allclose(moment.interval_iou(found[None, :20], wanted[:20, None])[3, 5],
                               moment.interval_iou(found[5], wanted[3]))  # fmt: skip


@pytest.fixture(scope="module")
def answers():
    """Lists of moments in three videos, some empty, some longer than a hundred, and the truths."""
    rng = np.random.default_rng(1)
    videos = [f"v{number}" for number in rng.integers(0, 3, 80)]
    spans = np.sort(rng.uniform(0, 30, (80, 2)), 1)
    lists = []
    for length in rng.choice((0, 1, 3, 8, 130), 80):
        shifts = rng.normal(0, 6, (length, 2))
        drawn = [(f"v{rng.integers(0, 3)}", *sorted(spans[len(lists)] + shift)) for shift in shifts]
        lists.append([Moment(*each) for each in drawn])
    return lists, videos, spans


def iou(found, wanted):
    overlap = max(0.0, min(found.end, wanted[1]) - max(found.start, wanted[0]))
    return overlap / (found.end - found.start + wanted[1] - wanted[0] - overlap)


def test_recalls_and_mean_iou_are_those_of_loops(answers):
    lists, videos, spans = answers
    everywhere = moment.per_corpus_query(moment.ious(lists, videos, spans))
    within = moment.per_query(moment.ious([moment.in_first_video(found) for found in lists], videos, spans))
    assert len(everywhere) == 12 and len(within) == 7
    for query, (found, video, span) in enumerate(zip(lists, videos, spans, strict=True)):
        right = [each.video == video for each in found]
        overlaps = [iou(each, span) * fits for each, fits in zip(found, right, strict=True)]
        own = [o for o, each in zip(overlaps, found, strict=True) if each.video == found[0].video]
        for bar in (0.3, 0.5, 0.7):
            for most in (1, 5, 10, 100):
                assert everywhere[f"r{most}_iou_{bar}"][query] == any(o >= bar for o in overlaps[:most])
            for most in (1, 5):
                assert within[f"r{most}_iou_{bar}"][query] == any(o >= bar for o in own[:most])
        assert within["miou"][query] == pytest.approx(own[0] if own else 0)
    means = {name: values.mean() for name, values in everywhere.items()}
    assert 0 < means["r1_iou_0.5"] < means["r10_iou_0.5"] < means["r100_iou_0.5"] < 1
    assert within["r5_iou_0.3"].mean() < means["r100_iou_0.3"]


def test_a_right_span_in_another_video_is_wrong():
    span = np.array([[1.0, 3.0]])
    lists = [[Moment("w", 1, 3), Moment("v", 1, 3)]]
    assert moment.ious(lists, ["v"], span).tolist() == [[0, 1]]
    assert moment.ious([moment.in_first_video(lists[0])], ["v"], span).tolist() == [[0]]
    assert moment.ious([[]], ["v"], span).tolist() == [[0]] and moment.in_first_video([]) == []
    assert moment.ious([], [], np.zeros((0, 2))).shape == (0, 1)


def test_a_bar_is_reached_at_its_value():
    found = moment.per_query(moment.ious([[Moment("v", 0, 5)]], ["v"], np.array([[0.0, 10.0]])))
    assert (found["r1_iou_0.5"], found["r1_iou_0.7"]) == ([1.0], [0.0])


def test_spans_that_are_apart_are_the_best_of_those_that_are_left():
    """By the definition, on made-up spans; and one list by hand."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        spans = np.sort(rng.uniform(0, 10, (30, 2)), 1)
        chosen = []
        for place, span in enumerate(spans):
            near = [float(moment.interval_iou(span, spans[each])) for each in chosen]
            if len(chosen) < 4 and all(iou <= 0.3 for iou in near):
                chosen.append(place)
        assert moment.apart(spans, 4, 0.3) == chosen
    by_hand = np.array([[0, 4], [0, 5], [1, 3], [4, 8], [0, 8]], float)  # IoU with the first: 1, 0.8, 0.5, 0, 0.5
    assert moment.apart(by_hand, 5, 0.5) == [0, 2, 3, 4] and moment.apart(by_hand, 2, 0.5) == [0, 2]
    assert moment.apart(by_hand[:0], 3, 0.5) == []
