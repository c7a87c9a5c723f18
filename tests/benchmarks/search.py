"""Exact search against faiss: `python -m tests.benchmarks.search [--rounds=N]`.

Ours and faiss's IndexFlatIP, in turn in one process, over the same random unit vectors, k = 10. faiss goes over to BLAS
where a batch has at least `distance_compute_blas_threshold` queries; each of THRESHOLDS is timed, and its best median
counts. What both find is compared: the same vectors, or where ids differ the same scores. Prints one line of JSON.
"""

import json
import sys
import time

import faiss
import numpy as np
from absl import app, flags

from ivcr_jax.infer.search import Index

FLAGS = flags.FLAGS
SIZES = ((100_000, 512), (1_000_000, 256))
BATCHES = (1, 64, 256)
THRESHOLDS = (1, 2, 20)
K = 10


def measure(size: int, width: int, rounds: int) -> dict[str, dict[str, object]]:
    """Times of all batches over vectors of one shape, by batch."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((size, width), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ours, theirs = Index(vectors), faiss.IndexFlatIP(width)
    theirs.add(vectors)
    found: dict[str, dict[str, object]] = {}
    for batch in BATCHES:
        queries = rng.standard_normal((batch, width), np.float32)
        runs = {"ours": lambda queries=queries: ours.search(queries, K)}
        for threshold in THRESHOLDS:

            def run(queries: np.ndarray = queries, threshold: int = threshold) -> tuple[np.ndarray, np.ndarray]:
                faiss.cvar.distance_compute_blas_threshold = threshold
                return theirs.search(queries, K)

            runs[f"faiss, threshold {threshold}"] = run
        answers = {name: run() for name, run in runs.items()}  # and warm
        scores, indices = answers["ours"]
        same = 1.0
        for other_scores, other in answers.values():
            agreed = (indices == other) | np.isclose(scores, other_scores, rtol=0, atol=1e-5)
            same = min(same, float(agreed.mean()))
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                begun = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - begun)
        best = min((name for name in runs if name != "ours"), key=lambda name: float(np.median(seconds[name])))
        ratios = np.array(seconds[best]) / np.array(seconds["ours"])
        found[str(batch)] = {
            "times as fast": [round(float(value), 2) for value in (np.median(ratios), ratios.min(), ratios.max())],
            "ms ours": _milliseconds(seconds["ours"]),
            "ms faiss": _milliseconds(seconds[best]),
            "faiss's best": best,
            "recall": same,
        }
        print(f"{size} x {width}, batch {batch}: {found[str(batch)]}", file=sys.stderr)
    return found


def _milliseconds(seconds: list[float]) -> list[float]:
    """Median, smallest, largest."""
    return [round(1000 * float(value), 1) for value in (np.median(seconds), min(seconds), max(seconds))]


def main(argv: list[str]) -> None:
    """Prints what was measured."""
    del argv
    print(json.dumps({f"{size} x {width}": measure(size, width, FLAGS.rounds) for size, width in SIZES}))


if __name__ == "__main__":
    flags.DEFINE_integer("rounds", 3, "How often everything is timed, in turn.")
    app.run(main)
