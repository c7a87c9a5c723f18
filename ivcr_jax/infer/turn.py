"""What a conversation gives back, turn by turn: plain values, for programs and for those who show them."""

import dataclasses

from ivcr_jax.data.dialogue import Intent


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A candidate. Attributes: id: of the video. number: under which it was shown. score: the rank head's. first: the
    first stage's, a cosine."""

    id: str
    number: int
    score: float
    first: float


@dataclasses.dataclass(frozen=True)
class Moment:
    """Attributes: video: its id. start, end: seconds. score: its expected IoU with the moment, 0..1."""

    video: str
    start: float
    end: float
    score: float


@dataclasses.dataclass(frozen=True)
class Turn:
    """A message and what came of it.

    Attributes:
      message: of the person. intent: what it was taken for. language: "en" or "zh".
      ranking: the candidates, best first. fits: whether the best of them is thought to be what was asked for.
      video: the current one from here on, its id, or None.
      moment: what was found in it, or None.
      text: the answer.
      evidence: frames of the video that speak for it, (seconds, cosine with the query), best first.
      notes: what a person should know besides, a sentence each.
      timings: seconds by stage: search, read, rank, write. Not part of what is compared or saved.
    """

    message: str
    intent: Intent
    language: str
    ranking: tuple[Ranked, ...] = ()
    fits: bool = True
    video: str | None = None
    moment: Moment | None = None
    text: str = ""
    evidence: tuple[tuple[float, float], ...] = ()
    notes: tuple[str, ...] = ()
    timings: dict[str, float] = dataclasses.field(default_factory=dict, compare=False)
