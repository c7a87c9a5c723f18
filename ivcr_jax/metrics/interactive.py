"""Episodes of a user who looks for one video, round by round: their records and file, and what they come to.

    success         episodes whose video had been chosen by the round
    hit10           episodes whose video had been among the first ten of a list by then, or chosen (Hit@10 of ChatIR,
                    arXiv 2305.20062)
    r1, r10         episodes whose video's rank, as it stands after the round, is at most so much
    best_rank       the median of the best rank so far
    rounds, rounds_median    until success; an episode without counts as one round more than were to be held
    bri             mean of the best log rank over the rounds (Best log Rank Integral of PlugIR, arXiv 2406.03411)

A rank is among all videos, from 1. Success makes it 1 from then on; a round without a search leaves it, and before
any is known it is one behind all videos.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ivcr_jax import lines
from ivcr_jax.metrics import interval
from ivcr_jax.metrics.interval import Comparison
from ivcr_jax.metrics.summary import LATENCIES, Cells, Summary

VERSION = 1
KIND = "episodes"
SHOWN = 10  # of a list, for hit10
GROUPS = ("round", "language")  # by which figures are broken down


@dataclasses.dataclass(frozen=True)
class Round:
    """A message and what came of it.

    Attributes:
      said: by the user. answer: of the system. intent: the name of what the message was taken for.
      video: the id of the chosen one from here on, or None.
      shown: ids of the list of a search, best first; of other answers empty.
      turned_down: ids of videos that the session no longer shows.
      rank: of the wanted video among all that it may still show, from 1; None where nothing was searched or it is not
        in the corpus.
      latency: seconds by stage.
      error: why there is no answer, "" where there is one.
    """

    said: str
    answer: str = ""
    intent: str | None = None
    video: str | None = None
    shown: tuple[str, ...] = ()
    turned_down: tuple[str, ...] = ()
    rank: int | None = None
    latency: Mapping[str, float] = dataclasses.field(default_factory=dict)
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Episode:
    """A user and what it was shown.

    Attributes:
      dialogue: the id of the one that it begins as. language: "en" or "zh".
      video: the id of the wanted one.
      pool: videos of the corpus.
      rounds: at least one, up to success, to the last that was to be held, or until the user had nothing to say.
    """

    dialogue: str
    language: str
    video: str
    pool: int
    rounds: tuple[Round, ...]

    @property
    def success(self) -> int | None:
        """The round, from 1, in which the wanted video was chosen."""
        return next((number for number, each in enumerate(self.rounds, 1) if each.video == self.video), None)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> "Episode":
        """What `to_json` gives. Raises ValueError, one sentence, for anything else."""
        try:
            held = [Round(**(each | {name: tuple(each[name]) for name in _LISTS})) for each in values["rounds"]]
            return cls(**(values | {"rounds": tuple(held)}))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{error}; expected the fields of an episode") from None


_LISTS = ("shown", "turned_down")


@dataclasses.dataclass(frozen=True)
class Problems:
    """What is amiss, with what was found.

    Attributes:
      no_search: dialogues that begin with no search; they make no episode.
      outside: episodes, by their dialogue, whose video is not in the corpus: without success, and behind all videos.
      failed: rounds, by `dialogue#round` from 1: the run says so itself. The user goes on.
    """

    no_search: dict[str, str] = dataclasses.field(default_factory=dict)
    outside: dict[str, str] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Users:
    """What kinds of users came to. Attributes: kinds: figures by kind. comparisons: of two kinds on the same episodes,
    by which they are and metric. problems: with the episodes."""

    kinds: Mapping[str, Summary]
    comparisons: Mapping[str, Mapping[str, Comparison]]
    problems: Problems


def read(path: str) -> tuple[dict[str, Any], list[Episode]]:
    """A file's first line and its episodes. Raises FileNotFoundError; ValueError, one sentence, for another file."""
    return lines.read(path, KIND, lambda row, _: Episode.from_json(row))


@contextlib.contextmanager
def growing(path: str, header: Mapping[str, Any]) -> Iterator[tuple[Callable[[Episode], None], list[Episode]]]:
    """A function that writes one more episode to a file, and those that are in it. Raises as `lines.growing`."""
    first = {KIND: VERSION, **header}
    with lines.growing(path, first, KIND, lambda row, _: Episode.from_json(row)) as (append, episodes):
        yield lambda episode: append(episode.to_json()), episodes


def summarise(episodes: Sequence[Episode], rounds: int, seed: int = 0) -> Summary:
    """All figures: overall and by GROUPS, rounds counting from 1, in clusters by the wanted video.

    Args:
      rounds: that were to be held. seed: of the intervals' resampling.
    """
    clusters = _clusters(episodes)
    reached = per_round(episodes, rounds)
    overall, needed = per_episode(episodes, rounds)
    languages = np.array([episode.language for episode in episodes])

    def cells(chosen: np.ndarray) -> Cells:
        means = {name: values[chosen] for name, values in overall.items()}
        return interval.cells(means, clusters[chosen], [(needed[chosen], {"rounds_median": 0.5})], seed)

    by_round = {}
    for place in range(rounds):
        means = {name: values[:, place] for name, values in reached.items()}
        quantiles = [(means.pop("best_rank"), {"best_rank": 0.5}), (_latency(episodes, place), LATENCIES)]
        by_round[str(place + 1)] = interval.cells(means, clusters, quantiles, seed)
    by_language = {str(language): cells(languages == language) for language in np.unique(languages)}
    return Summary(cells(np.ones(len(episodes), bool)), dict(zip(GROUPS, (by_round, by_language), strict=True)))


def compare(first: Sequence[Episode], second: Sequence[Episode], rounds: int, seed: int = 0) -> dict[str, Comparison]:
    """Two users of the same dialogues, in the same order, by each overall metric.

    Raises ValueError where they are not the same.
    """
    if [episode.dialogue for episode in first] != [episode.dialogue for episode in second]:
        raise ValueError(f"users: found {len(first)} and {len(second)} episodes, expected the same dialogues in order")
    ours, theirs = per_episode(first, rounds)[0], per_episode(second, rounds)[0]
    clusters = _clusters(first)
    return {name: interval.compare(ours[name], theirs[name], clusters, seed) for name in ours}


def per_round(episodes: Sequence[Episode], rounds: int) -> dict[str, np.ndarray]:
    """One value an episode and round: f64[N, rounds] by metric, `best_rank` being each episode's own."""
    ranks, hits = np.empty((len(episodes), rounds)), np.zeros((len(episodes), rounds))
    success = np.zeros_like(hits)
    for row, episode in enumerate(episodes):
        rank, end = episode.pool + 1, episode.success
        for place in range(rounds):
            if place < len(episode.rounds):
                held = episode.rounds[place]
                rank = rank if held.rank is None else held.rank
                hits[row, place] = episode.video in held.shown[:SHOWN]
            if end is not None and place + 1 >= end:
                rank, success[row, place] = 1, 1
            ranks[row, place] = rank
    hits = np.maximum.accumulate(np.maximum(hits, success), 1)
    return {
        "success": success, "hit10": hits, "r1": (ranks <= 1) * 1.0, "r10": (ranks <= 10) * 1.0,
        "best_rank": np.minimum.accumulate(ranks, 1),
    }  # fmt: skip


def per_episode(episodes: Sequence[Episode], rounds: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One value an episode: f64[N] by metric, of a single round without `bri`; and the rounds until success, f64[N]."""
    reached = per_round(episodes, rounds)
    needed = np.array([episode.success or rounds + 1 for episode in episodes], np.float64)
    values = {"success": reached["success"][:, -1], "hit10": reached["hit10"][:, -1], "rounds": needed}
    if rounds > 1:
        logs = np.log(reached["best_rank"])
        values["bri"] = ((logs[:, 1:] + logs[:, :-1]) / 2).mean(1)
    return values, needed


def _latency(episodes: Sequence[Episode], place: int) -> np.ndarray:
    """Seconds of a round: f64[N], NaN of those that have not held it."""
    timed = [episode.rounds[place].latency if place < len(episode.rounds) else {} for episode in episodes]
    return np.array([sum(each.values()) if each else np.nan for each in timed])


def _clusters(episodes: Sequence[Episode]) -> np.ndarray:
    return np.unique([episode.video for episode in episodes], return_inverse=True)[1]
