"""What a run answered, turn by turn, as plain records; their file; and which answer belongs to which turn of the truth.

Every turn of the truth is scored: where there is no answer, or one that cannot be used, it is wrong, and `Problems`
names it.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ivcr_jax import lines
from ivcr_jax.data.dialogue import Dialogue, Intent, Turn
from ivcr_jax.metrics.published import of_dialogue

VERSION = 2
KIND = "predictions"
PAPER, OWN = "paper", "e2e"  # protocols: of the published test set; whose every search is of the whole corpus
EARLIER = "an earlier turn failed"  # the error of a turn that a cascade never came to
_NAMED = ("protocol", "export", "dialogues", "split")  # what every file says


class Moment(NamedTuple):
    """Attributes: video: its id. start, end: seconds. score: the IoU it is expected to have, 0..1, None where the
    system has none."""

    video: str
    start: float
    end: float
    score: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
    """What came of one turn.

    Attributes:
      dialogue: its id. turn: its place, from 0.
      intent: what the message was taken for; None where it came to nothing.
      ranking: ids of videos, best first: the given candidates, or the first stage's best.
      pool: how many videos were ranked among, those behind `ranking` included; 0 where none.
      rank: the truth's place in the final order of the whole pool, from 1, ties against it; None where it is not
        known, its place in `ranking` then counts.
      video: the id of the one that was chosen. None where the search was refused, as nothing fits, or there was none.
      moments: best first.
      text: the answer.
      parsed: whether the text says what the record says: the number of `video`, the times of the first moment.
        True where there is nothing to say.
      latency: seconds by stage.
      error: why the turn failed, "" where it did not. A turn that failed is wrong, whatever else is here.
      shuffled: the truth's places, from 1, where the same candidates were shown in other orders.
    """

    dialogue: str
    turn: int
    intent: Intent | None = None
    ranking: tuple[str, ...] = ()
    pool: int = 0
    rank: int | None = None
    video: str | None = None
    moments: tuple[Moment, ...] = ()
    text: str = ""
    parsed: bool = True
    latency: Mapping[str, float] = dataclasses.field(default_factory=dict)
    error: str = ""
    shuffled: tuple[int, ...] = ()

    @property
    def id(self) -> str:
        return turn_id(self.dialogue, self.turn)

    def to_json(self) -> dict[str, Any]:
        """Its fields as plain values, the intent by its name."""
        values = {name: getattr(self, name) for name in _FIELDS}
        return values | {"intent": None if self.intent is None else self.intent.name, "latency": dict(self.latency)}

    @classmethod
    def from_json(cls, values: Any) -> "Prediction":
        """What `to_json` gives. Raises ValueError, one sentence, for anything else."""
        if not isinstance(values, dict) or values.keys() != _FIELDS.keys():
            found = ", ".join(sorted(values)) or "nothing" if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"found {found}; expected an object with {', '.join(_FIELDS)}")
        for name, (fits, expected) in _FIELDS.items():
            if not fits(values[name]):
                raise ValueError(f"{name}: found {values[name]!r:.80}, expected {expected}")
        intent = values["intent"]
        converted = {
            "intent": None if intent is None else Intent[intent],
            "ranking": tuple(values["ranking"]),
            "shuffled": tuple(values["shuffled"]),
            "moments": tuple(Moment(*moment) for moment in values["moments"]),
        }
        return cls(**(values | converted))


@dataclasses.dataclass(frozen=True)
class Header:
    """What predictions were made from. Attributes: protocol: its name. export, dialogues: fingerprints. split: of the
    dialogues. settings: what else they depend on, by name."""

    protocol: str
    export: str
    dialogues: str
    split: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        named = {name: getattr(self, name) for name in _NAMED}
        return {KIND: VERSION, **named, **self.settings}

    def truths(self, dialogues: Sequence[Dialogue]) -> list[Dialogue]:
        """What of a split the run was to answer: of its first `dialogues_at_most`, where that is set, what the protocol
        holds."""
        first = dialogues[: self.settings.get("dialogues_at_most") or len(dialogues)]
        kept = map(of_dialogue, first) if self.protocol == PAPER else first
        return [dialogue for dialogue in kept if dialogue is not None]


class Pair(NamedTuple):
    """A turn of the truth and what was answered.

    Attributes:
      dialogue: of the truth. place: of the turn in it, from 0.
      there: whether the true video is among those that could be ranked; False in a chat turn.
      prediction: None where there is none that can be used, and the turn is wrong.
      reached: whether it was come to, False behind a cascade's failed turn (EARLIER).
    """

    dialogue: Dialogue
    place: int
    there: bool
    prediction: Prediction | None
    reached: bool = True

    @property
    def turn(self) -> Turn:
        return self.dialogue.turns[self.place]

    @property
    def id(self) -> str:
        return turn_id(self.dialogue.id, self.place)


@dataclasses.dataclass(frozen=True)
class Problems:
    """What is wrong with predictions, by `turn_id`, with what was found. All but `repeated`, `unknown` and `unjudged`
    make their turn wrong.

    Attributes:
      repeated: turns with more than one prediction; the first counts.
      unknown: of a dialogue or a turn that the truth has not; left out.
      missing: turns without a prediction.
      failed: the run says so itself.
      outside: a video that is not in the pool.
      spans: of moments: not finite, reversed, or with a score that is no IoU.
      ranks: a ranking, a pool and a rank that contradict each other.
      unjudged: no score came of the judge, where one was asked; 0 in its mean.
    """

    repeated: dict[str, str] = dataclasses.field(default_factory=dict)
    unknown: dict[str, str] = dataclasses.field(default_factory=dict)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    outside: dict[str, str] = dataclasses.field(default_factory=dict)
    spans: dict[str, str] = dataclasses.field(default_factory=dict)
    ranks: dict[str, str] = dataclasses.field(default_factory=dict)
    unjudged: dict[str, str] = dataclasses.field(default_factory=dict)


def turn_id(dialogue: str, turn: int) -> str:
    """The name of a turn, `dialogue#0`."""
    return f"{dialogue}#{turn}"


def match(
    dialogues: Iterable[Dialogue],
    predictions: Iterable[Prediction],
    pool: Collection[str] | None = None,
    *,
    given: bool = False,
) -> tuple[list[Pair], Problems]:
    """Every turn of the truth with its prediction, in the truth's order; predictions may come in any.

    Args:
      dialogues: of the split.
      predictions: of the run.
      pool: ids of the corpus that was searched. None where a turn's own candidates were ranked: then a ranking may
        hold these alone, and a choice or a moment any video of the dialogue.
      given: whether, where a turn has candidates, these were ranked and not the corpus.

    Raises ValueError where there is no turn, or a dialogue twice.
    """
    truths: dict[str, Dialogue] = {}
    for dialogue in dialogues:
        if dialogue.id in truths:
            raise ValueError(f"dialogues: found {dialogue.id!r} twice, expected each once")
        truths[dialogue.id] = dialogue
    if not any(dialogue.turns for dialogue in truths.values()):
        raise ValueError(f"dialogues: found no turn in {len(truths)} dialogues, expected at least one: an empty split?")
    problems = Problems()
    found: dict[tuple[str, int], Prediction] = {}
    for prediction in predictions:
        key = (prediction.dialogue, prediction.turn)
        if key[0] not in truths:
            problems.unknown[prediction.id] = "no such dialogue"
        elif not 0 <= key[1] < len(truths[key[0]].turns):
            problems.unknown[prediction.id] = f"the dialogue has {len(truths[key[0]].turns)} turns"
        elif key in found:
            same = "the same" if found[key] == prediction else "another"
            problems.repeated[prediction.id] = f"{same} answer"
        else:
            found[key] = prediction
    corpus = None if pool is None else frozenset(pool)
    pairs = []
    for dialogue in truths.values():
        of_dialogue = frozenset(dialogue.videos) if corpus is None else corpus
        for place, turn in enumerate(dialogue.turns):
            ranked = frozenset(turn.candidates) if corpus is None or (given and turn.candidates) else corpus
            answer = found.get((dialogue.id, place))
            reached = answer is None or answer.error != EARLIER
            if not _usable(answer, turn_id(dialogue.id, place), turn.video_id, ranked, of_dialogue, problems):
                answer = None
            pairs.append(Pair(dialogue, place, turn.video_id in ranked, answer, reached))
    return pairs, problems


def _usable(
    prediction: Prediction | None,
    name: str,
    truth: str,
    ranked: Collection[str],
    shown: Collection[str],
    problems: Problems,
) -> bool:
    """Whether a prediction can be scored; notes why it cannot."""
    if prediction is None:
        problems.missing[name] = "no prediction"
    elif prediction.error:
        problems.failed[name] = prediction.error
    elif strange := [video for video in prediction.ranking if video not in ranked]:
        problems.outside[name] = f"ranking: {strange[0]}"
    elif prediction.video is not None and prediction.video not in shown:
        problems.outside[name] = f"video: {prediction.video}"
    elif strange := [moment.video for moment in prediction.moments if moment.video not in shown]:
        problems.outside[name] = f"moments: {strange[0]}"
    elif bad := next((moment for moment in prediction.moments if not _is_span(moment)), None):
        problems.spans[name] = f"[{bad.start}, {bad.end}] s, score {bad.score}"
    elif reason := _contradiction(prediction, truth):
        problems.ranks[name] = reason
    else:
        return True
    return False


def _is_span(moment: Moment) -> bool:
    scored = moment.score is None or 0 <= moment.score <= 1
    return scored and -math.inf < moment.start <= moment.end < math.inf


def _contradiction(prediction: Prediction, truth: str) -> str:
    """Why a ranking, its pool and the truth's rank cannot all be right, or ""."""
    ranking, rank = prediction.ranking, prediction.rank
    if len(set(ranking)) < len(ranking):
        return "ranking: a video twice"
    if len(ranking) > prediction.pool:
        return f"pool: {prediction.pool}, but {len(ranking)} are ranked"
    if max(prediction.shuffled, default=0) > prediction.pool:
        return f"shuffled: {max(prediction.shuffled)}, expected at most {prediction.pool}"
    if rank is None:
        return ""
    # Ties may put it behind its place in the list, never before that.
    least = ranking.index(truth) + 1 if truth in ranking else len(ranking) + 1
    if not least <= rank <= prediction.pool:
        return f"rank: {rank}, expected {least} to {prediction.pool}"
    return ""


def read(path: str) -> tuple[Header, list[Prediction]]:
    """A file of predictions; half a last line, as a run that was stopped leaves it, is passed over.

    Raises FileNotFoundError; ValueError, one sentence, for a file or a line that is something else.
    """
    values, predictions = lines.read(path, KIND, lambda row, _: Prediction.from_json(row))
    if values.pop(KIND) != VERSION or not all(isinstance(values.get(name), str) for name in _NAMED):
        raise ValueError(f"{path}: line 1: found {values!r:.200}; expected version {VERSION} and {', '.join(_NAMED)}")
    return Header(**{name: values.pop(name) for name in _NAMED}, settings=values), predictions


def read_of(path: str, dialogues: str, split: str) -> tuple[Header, list[Prediction]]:
    """As `read`, of these dialogues alone. Args: dialogues: the dataset's fingerprint. Raises ValueError for others."""
    header, predictions = read(path)
    most = header.settings.get("dialogues_at_most", 0)
    if (header.split, header.dialogues) != (split, dialogues):
        found = f"predictions for {header.split} of the dialogues {header.dialogues[:12]}"
        raise ValueError(f"{path}: found {found}, expected {split} of {dialogues[:12]}")
    if type(most) is not int or most < 0:
        raise ValueError(f"{path}: dialogues_at_most: found {most!r:.80}, expected a whole number, 0 for all")
    return header, predictions


def write(path: str, header: Header, predictions: Iterable[Prediction]) -> None:
    """Writes a file of predictions, which appears when it is complete. What is no number is written as NaN."""
    lines.write(path, header.to_json(), (prediction.to_json() for prediction in predictions))


@contextlib.contextmanager
def growing(path: str, header: Header) -> Iterator[tuple[Callable[[Prediction], None], list[Prediction]]]:
    """A function that writes one more prediction to a file, and those that are in it. Raises as `lines.growing`."""
    with lines.growing(path, header.to_json(), KIND, lambda row, _: Prediction.from_json(row)) as (append, predictions):
        yield lambda prediction: append(prediction.to_json()), predictions


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)


_is_text, _is_number, _is_count = _is(str), _is(int, float), _is(int)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_moment(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 4:
        return False
    video, start, end, score = value
    return _is_text(video) and _is_number(start) and _is_number(end) and (score is None or _is_number(score))


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "dialogue": (_is_text, "an id"),
    "turn": (_is_count, "a whole number"),
    "intent": (
        lambda value: value is None or (_is_text(value) and value in Intent.__members__),
        "the name of an intent or null",
    ),
    "ranking": (_is_texts, "a list of ids"),
    "pool": (_is_count, "a whole number"),
    "rank": (lambda value: value is None or _is_count(value), "a whole number or null"),
    "shuffled": (
        lambda value: isinstance(value, list) and all(_is_count(each) and each > 0 for each in value),
        "a list of places from 1",
    ),
    "video": (lambda value: value is None or _is_text(value), "an id or null"),
    "moments": (
        lambda value: isinstance(value, list) and all(map(_is_moment, value)),
        "a list of [video, start, end, score]",
    ),
    "text": (_is_text, "a text"),
    "parsed": (_is(bool), "true or false"),
    "latency": (
        lambda value: isinstance(value, dict) and all(_is_number(v) and 0 <= v < math.inf for v in value.values()),
        "seconds by stage",
    ),
    "error": (_is_text, "a text"),
}
