"""Moments: overlap of spans in seconds, and what of it counts as found. One value a query, as in `retrieval`."""

from collections.abc import Sequence

import numpy as np

from ivcr_jax.metrics.records import Moment

IOUS = (0.3, 0.5, 0.7)
RECALLS = (1, 5)
CORPUS_RECALLS = (1, 5, 10, 100)


def interval_iou(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """IoU of spans f[..., 2] in seconds: f[...]; 0 where both are empty."""
    overlap = np.minimum(found[..., 1], wanted[..., 1]) - np.maximum(found[..., 0], wanted[..., 0])
    overlap = np.maximum(overlap, 0)
    union = (found[..., 1] - found[..., 0]) + (wanted[..., 1] - wanted[..., 0]) - overlap
    return overlap / np.maximum(union, 1e-9)


def apart(spans: np.ndarray, most: int, overlap: float) -> list[int]:
    """Places of up to `most` spans of f[N, 2], best first: each has an IoU of at most `overlap` with all before it."""
    chosen: list[int] = []
    left = np.arange(len(spans))
    while len(left) and len(chosen) < most:
        chosen.append(int(left[0]))
        left = left[1:][interval_iou(spans[left[1:]], spans[left[0]]) <= overlap]
    return chosen


def ious(moments: Sequence[Sequence[Moment]], videos: Sequence[str], spans: np.ndarray) -> np.ndarray:
    """IoU of each query's moments with the true one: f64[Q, K], best first, 0 in another video and past a list's end.

    Args:
      moments: of each query, in any video; those past the hundredth are not looked at.
      videos: the true ones' ids. spans: f64[Q, 2], the true ones, seconds.
    """
    lists = [found[: CORPUS_RECALLS[-1]] for found in moments]
    counts = np.array([len(found) for found in lists], np.int64)
    rows = np.repeat(np.arange(len(lists)), counts)
    columns = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    given = np.array([(moment.start, moment.end) for found in lists for moment in found]).reshape(-1, 2)
    right = np.array([moment.video == video for found, video in zip(lists, videos, strict=True) for moment in found])
    table = np.zeros((len(lists), max(counts, default=0) or 1))
    table[rows, columns] = interval_iou(given, spans[rows]) * right
    return table


def in_first_video(moments: Sequence[Moment]) -> list[Moment]:
    """Those in the video of the first: the tries at a moment once a video is chosen."""
    return [moment for moment in moments if moment.video == moments[0].video]


def per_query(ious: np.ndarray) -> dict[str, np.ndarray]:
    """f64[Q] by metric, of f64[Q, K] IoUs within one video. Their means are R@k at IoU (`r1_iou_0.5`) and `miou`."""
    return _recalls(ious, RECALLS) | {"miou": ious[:, 0]}


def per_corpus_query(ious: np.ndarray) -> dict[str, np.ndarray]:
    """R@k at IoU of moments from a whole corpus (VCMR, as TVR evaluates it: arXiv 2001.09099): f64[Q] by metric."""
    return _recalls(ious, CORPUS_RECALLS)


def _recalls(ious: np.ndarray, places: Sequence[int]) -> dict[str, np.ndarray]:
    best = {most: ious[:, :most].max(1) for most in places}
    return {f"r{most}_iou_{bar}": np.where(best[most] >= bar, 1.0, 0.0) for most in places for bar in IOUS}
