"""What a conversation is told and what it gives back, turn by turn: plain values, for programs and for those who show
them."""

import dataclasses
from typing import Any

from ivcr_jax.config import listed
from ivcr_jax.data.dialogue import Intent


@dataclasses.dataclass(frozen=True)
class Message:
    """What a person says, and what is known besides.

    Attributes:
      text: the words.
      intent: what they ask for; None where the words decide.
      candidates: ids of the videos that a search shows, in this order, in place of the first stage's best; None is
        those.
      video: the id of the current video as this is said; None is what the conversation has come to.

    Raises ValueError for candidates of what is no search, for none, and for one that is there twice.
    """

    text: str
    intent: Intent | None = None
    candidates: tuple[str, ...] | None = None
    video: str | None = None

    def __post_init__(self) -> None:
        if self.candidates is None:
            return
        if self.intent not in (None, Intent.VIDEO):
            raise ValueError(
                f"candidates of a message with the intent {self.intent.name}; expected VIDEO, or no intent"
            )
        count = len(self.candidates)
        if not count or len(set(self.candidates)) < count:
            raise ValueError(
                f"candidates: found {listed([*self.candidates]) or 'none'}; expected at least one, each once"
            )

    @property
    def videos(self) -> tuple[str, ...]:
        """Every id that is given."""
        return (*(self.candidates or ()), *(() if self.video is None else (self.video,)))

    @classmethod
    def from_json(cls, value: Any) -> "Message":
        """From a JSON value: the words alone, or an object with "message", and with "intent" (its name), "candidates"
        and "video" where they are known. Raises ValueError, one sentence, for anything else."""
        values = {"message": value} if isinstance(value, str) else value
        kinds = {"message": (str, "words"), "intent": (str, "a name"), "candidates": (list, "a list of ids"),
                 "video": (str, "an id")}  # fmt: skip
        if not isinstance(values, dict) or "message" not in values or values.keys() - kinds:
            found = listed(sorted(values)) or "nothing" if isinstance(values, dict) else repr(values)
            raise ValueError(
                f"found {found}, expected words, or an object with message and perhaps {listed([*kinds][1:])}"
            )
        for name, found in values.items():
            kind, expected = kinds[name]
            if not isinstance(found, kind) or (kind is list and not all(isinstance(each, str) for each in found)):
                raise ValueError(f"{name}: found {found!r}, expected {expected}")
        intent, candidates = values.get("intent"), values.get("candidates")
        if intent is not None and intent not in Intent.__members__:
            raise ValueError(f"intent: found {intent!r}, expected one of {listed([*Intent.__members__])}")
        return cls(
            values["message"],
            None if intent is None else Intent[intent],
            None if candidates is None else tuple(candidates),
            values.get("video"),
        )

    def to_json(self) -> Any:
        """What `from_json` reads: the words alone where nothing else is known."""
        values = {
            "intent": None if self.intent is None else self.intent.name,
            "candidates": None if self.candidates is None else list(self.candidates),
            "video": self.video,
        }
        known = {name: value for name, value in values.items() if value is not None}
        return {"message": self.text, **known} if known else self.text


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
      others: moments that it may be instead, each apart from those before, best first.
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
    others: tuple[Moment, ...] = ()
    notes: tuple[str, ...] = ()
    timings: dict[str, float] = dataclasses.field(default_factory=dict, compare=False)

    def to_json(self) -> dict[str, Any]:
        """Its fields as plain values, the intent by its name."""
        return dataclasses.asdict(self) | {"intent": self.intent.name}
