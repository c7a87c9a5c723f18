"""Validation in the loop: losses and what the heads and the first stage get right, over a whole split, by language.

Counts on the host what `training.Program.validation_step` hands out of each batch. The published protocols and
confidence intervals are `ivcr_jax.metrics`' affair.
"""

import collections
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ivcr_jax.data.dialogue import LANGUAGES
from ivcr_jax.losses import LossConfig
from ivcr_jax.metrics.moment import IOUS, interval_iou
from ivcr_jax.metrics.retrieval import RECALLS, ranks


class Query(NamedTuple):
    """A search. Attributes: language: its number. video: the number of the one asked for. vector: f32[Dr], of length 1.
    candidates: numbers of the videos that the data list for it."""

    language: int
    video: int
    vector: np.ndarray
    candidates: tuple[int, ...]


class Validation:
    """Collects batches; `metrics` sums them up.

    Attributes: queries: of all searches. videos: f32[Dr], of length 1, by number.
    """

    def __init__(self, config: LossConfig) -> None:
        self._weights = {name: weight for name, weight in config.weights.items() if weight}
        self._sums: collections.Counter[str] = collections.Counter()
        self._counts: collections.Counter[str] = collections.Counter()
        self._right: list[tuple[int, bool]] = []  # (language, whether the first ranked is right)
        self._ious: list[tuple[int, float]] = []
        self.queries: list[Query] = []
        self.videos: dict[int, np.ndarray] = {}

    def add(self, found: Mapping[str, Any]) -> None:
        """Takes what the validation step found in one batch, as NumPy arrays."""
        self._sums.update({name: float(value) for name, value in found["sums"].items()})
        self._counts.update({name: float(value) for name, value in found["counts"].items()})
        language = found["turn_languages"]
        if "ranked" in found:
            there = found["candidate_targets"] >= 0
            right = found["ranked"] == found["candidate_targets"]
            self._right += zip(language[there].tolist(), right[there].tolist(), strict=True)
        if "spans" in found:
            there = found["moment_slots"] >= 0
            ious = interval_iou(found["spans"][there], found["moment_spans"][there])
            self._ious += zip(language[there].tolist(), ious.tolist(), strict=True)
        if "texts" in found:
            asks = (found["turn_videos"] >= 0) & (found["moment_slots"] < 0)
            numbers = found["video_numbers"]
            for row, turn in zip(*np.nonzero(asks), strict=True):
                slots = found["candidate_slots"][row, turn]
                self.queries.append(
                    Query(
                        int(language[row, turn]),
                        int(found["turn_videos"][row, turn]),
                        found["texts"][row, turn],
                        tuple(numbers[row, slots[slots >= 0]].tolist()),
                    )
                )
            self.videos.update(zip(numbers[numbers >= 0].tolist(), found["videos"][numbers >= 0], strict=True))

    def metrics(self) -> dict[str, float]:
        """Each loss by its name and their weighted sum `loss`; `rank_r1`, `moment_r1_iou_*`, `moment_miou`,
        `retrieval_r*` (over the `retrieval_pool` videos of the batches), each also with `_en` and `_zh`; counts."""
        means = {name: self._sums[name] / max(self._counts[name], 1) for name in self._weights}
        found = {"loss": sum(weight * means[name] for name, weight in self._weights.items()), **means}
        found |= by_language("rank_r1", [(language, float(right)) for language, right in self._right])
        found |= by_language("moment_miou", self._ious)
        for bar in IOUS:
            found |= by_language(
                f"moment_r1_iou_{bar}", [(language, float(iou >= bar)) for language, iou in self._ious]
            )
        queries = [query for query in self.queries if query.video in self.videos]
        if queries:
            places = self._ranks(queries)
            for recall in RECALLS:
                hits = [(query.language, float(place <= recall)) for query, place in zip(queries, places, strict=True)]
                found |= by_language(f"retrieval_r{recall}", hits)
            found["retrieval_pool"] = float(len(self.videos))
        counted = {"ranked_turns": len(self._right), "moments": len(self._ious), "queries": len(queries)}
        return found | {name: float(count) for name, count in counted.items() if count}

    def _ranks(self, queries: list[Query]) -> np.ndarray:
        """i64: the place, from 1, of the video that each query asks for; ties count against it."""
        numbers = sorted(self.videos)
        place = {number: index for index, number in enumerate(numbers)}
        scores = np.stack([query.vector for query in queries]) @ np.stack([self.videos[number] for number in numbers]).T
        return ranks(scores, np.array([place[query.video] for query in queries]))


def names(config: LossConfig) -> set[str]:
    """The metrics by which a checkpoint may be judged."""
    found = {"loss", *(name for name, weight in config.weights.items() if weight)}
    if config.decode:
        found.add("rank_r1")
    if config.of_model:
        found |= {"moment_miou", *(f"moment_r1_iou_{bar}" for bar in IOUS)}
    if config.contrastive:
        found |= {f"retrieval_r{recall}" for recall in RECALLS}
    return found


def by_language(name: str, rows: Iterable[tuple[int, float]]) -> dict[str, float]:
    """The mean of (language, value) rows, over all and over each language; nothing where there are none."""
    groups: dict[str, list[float]] = collections.defaultdict(list)
    for language, value in rows:
        groups[name].append(value)
        groups[f"{name}_{LANGUAGES[language]}"].append(value)
    return {group: float(np.mean(values)) for group, values in groups.items()}
