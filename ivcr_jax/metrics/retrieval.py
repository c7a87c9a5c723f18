"""Ranking: each metric is the mean, or the median, of one value a query, so that it can be resampled.

A query's rank is its true video's place, from 1, or infinity where that was not found.
"""

import numpy as np

RECALLS = (1, 5, 10)
CUT = 10  # of nDCG


def ranks(scores: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Places of true videos: i64[Q], from 1, of f[Q, N] scores and i[Q] columns.

    What has the truth's score comes before it, and so does what is no number; a truth that is none comes last.
    """
    own = scores[np.arange(len(truths)), truths]
    return (~(scores < own[:, None])).sum(1)


def per_query(ranks: np.ndarray, pools: np.ndarray) -> dict[str, np.ndarray]:
    """One value a query: f64[Q] by metric. Their means are R@k, MRR, nDCG@10 (one video fits, so the ideal is 1) and
    the mean rank; the median of `rank` is the median rank.

    Args:
      ranks: f64[Q].
      pools: i64[Q], how many videos were ranked; one that was not found counts as the next one behind them.
    """
    with np.errstate(divide="ignore"):
        gains = np.where(ranks <= CUT, 1 / np.log2(1 + ranks), 0.0)
    hits = {f"r{most}": (ranks <= most).astype(np.float64) for most in RECALLS}
    return {**hits, "mrr": 1 / ranks, f"ndcg{CUT}": gains, "rank": np.minimum(ranks, pools + 1)}
