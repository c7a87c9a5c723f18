"""Dialogues of the data, held again with an export: what each protocol lets a conversation know, and what it answers.

paper     the dialogues the published test set keeps, up to seven turns; given candidates and intent, true history,
          moments in the true video (docs/evaluation.md)
gold      the same of all dialogues and turns
cascade   given candidates and intent, its own history and current video; after a failed turn no other counts
e2e       the words alone: its own intent, first stage, history and current video
"""

import contextlib
import dataclasses
import random
from collections.abc import Sequence

import numpy as np

from ivcr_jax.data import prompt
from ivcr_jax.data.dialogue import Dialogue, Intent, Turn, video_number
from ivcr_jax.infer import grammar
from ivcr_jax.infer.assistant import Assistant
from ivcr_jax.infer.corpus import Corpus
from ivcr_jax.infer.session import Session, say_together
from ivcr_jax.infer.steps import REFUSED
from ivcr_jax.infer.turn import Message
from ivcr_jax.infer.turn import Turn as Said
from ivcr_jax.metrics import retrieval
from ivcr_jax.metrics.moment import interval_iou
from ivcr_jax.metrics.records import EARLIER, Moment, Prediction, turn_id

PROTOCOLS = ("paper", "gold", "cascade", "e2e")
HIT = 0.5  # IoU from which a moment is found, for those that follow in a cascade


def hold(
    assistant: Assistant,
    corpus: Corpus,
    dialogues: Sequence[Dialogue],
    protocol: str,
    candidates: int,
    shuffles: int = 0,
) -> list[list[Prediction]]:
    """Holds dialogues side by side; of each a prediction a turn.

    Args:
      protocol: one of PROTOCOLS. candidates: how many the first stage hands on, where none are given.
      shuffles: in how many other orders given candidates are ranked besides, where the history is the true one.
    """
    trusted = protocol in ("paper", "gold")
    sessions = [Session(assistant, corpus, candidates=candidates) for _ in dialogues]
    found: list[list[Prediction]] = [[] for _ in dialogues]
    for place in range(max(len(dialogue.turns) for dialogue in dialogues)):
        here = []
        for number, dialogue in enumerate(dialogues):
            if place >= len(dialogue.turns):
                continue
            if protocol == "cascade" and place and failed(dialogue.turns[place - 1], found[number][-1]):
                found[number].append(Prediction(dialogue.id, place, error=EARLIER))
            else:
                here.append(number)
        if not here:
            continue
        messages = [_message(dialogues[number].turns[place], protocol) for number in here]
        # The history of a cascade is its own, and hangs on the order that was shown.
        shuffled = [
            _shuffled(sessions[number], message, dialogues[number], place, shuffles if trusted else 0)
            for number, message in zip(here, messages, strict=True)
        ]
        said = say_together([sessions[number] for number in here], messages)
        for number, answer, places in zip(here, said, shuffled, strict=True):
            dialogue, session = dialogues[number], sessions[number]
            given = protocol != "e2e" and bool(dialogue.turns[place].candidates)
            stage = None if given else FirstStage(assistant, corpus, session)
            prediction = _prediction(dialogue, place, answer, stage)
            found[number].append(dataclasses.replace(prediction, shuffled=places))
            if trusted:
                _correct(session, dialogue.turns[place], answer)
    return found


def _shuffled(session: Session, message: Message, dialogue: Dialogue, place: int, count: int) -> tuple[int, ...]:
    """Places of the true video where a search's candidates are shown in other orders; none where it is not shown."""
    truth, places = dialogue.turns[place].video_id, list[int]()
    if message.candidates is None or truth not in message.candidates:
        return ()
    rng = random.Random(turn_id(dialogue.id, place))
    for _ in range(count):
        order = tuple(rng.sample(message.candidates, len(message.candidates)))
        try:
            ranked = session.rank(dataclasses.replace(message, candidates=order))
        except REFUSED:  # as the turn will be, which says why
            return ()
        places.append([each.id for each in ranked].index(truth) + 1)
    return tuple(places)


def failed(turn: Turn, answer: Prediction) -> bool:
    """Whether a turn's answer ends a cascade: another video, or in it a moment with too small an IoU."""
    if turn.intent == Intent.CHAT:
        return bool(answer.error)
    if answer.error or answer.video != turn.video_id:
        return True
    if turn.span is None:
        return False
    return not answer.moments or bool(interval_iou(np.array(answer.moments[0][1:3]), np.array(turn.span)) < HIT)


def _message(turn: Turn, protocol: str) -> Message:
    if protocol == "e2e":
        return Message(turn.user)
    video = turn.video_id if turn.intent == Intent.MOMENT and protocol != "cascade" else None
    return Message(turn.user, turn.intent, turn.candidates or None if turn.intent == Intent.VIDEO else None, video)


@dataclasses.dataclass(frozen=True)
class FirstStage:
    """What searched for a session's candidates."""

    assistant: Assistant
    corpus: Corpus
    session: Session

    def rank(self, video: str, ranking: Sequence[str]) -> int | None:
        """The place of a video in the final order of the whole corpus: those of the ranking are before all others."""
        if video in ranking:
            return ranking.index(video) + 1
        place = next((place for place, each in enumerate(self.corpus.videos) if each.id == video), None)
        if place is None:
            return None
        scores = self.corpus.vectors @ self.assistant.embed(prompt.retrieval_query(self.session.asked))
        return max(int(retrieval.ranks(scores[None], np.array([place]))[0]), len(ranking) + 1)


def _prediction(dialogue: Dialogue, place: int, said: Said | Exception, stage: FirstStage | None) -> Prediction:
    """Args: stage: that found the candidates; None where they were given."""
    turn = dialogue.turns[place]
    if isinstance(said, Exception):
        return Prediction(dialogue.id, place, error=str(said))
    searched = said.intent == Intent.VIDEO
    ranking = tuple(ranked.id for ranked in said.ranking) if searched else ()
    pool = len(ranking) if stage is None else len(stage.corpus.videos)
    moment = said.moment
    return Prediction(
        dialogue.id,
        place,
        said.intent,
        ranking,
        pool if searched else 0,
        stage.rank(turn.video_id, ranking) if stage and searched and turn.intent == Intent.VIDEO else None,
        video=moment.video if moment else said.video if searched else None,
        moments=tuple(Moment(*dataclasses.astuple(each)) for each in (moment, *said.others)) if moment else (),
        text=said.text,
        parsed=_parsed(said),
        latency=said.timings,
    )


def _parsed(said: Said) -> bool:
    """Whether the words say what the heads found."""
    number = video_number(said.text)
    if said.intent == Intent.VIDEO and said.fits:
        return number is not None and number[0] == said.ranking[0].number
    if said.moment is not None:
        times = (said.moment.start, said.moment.end)
        return number is not None and grammar.span(said.text) == grammar.span(grammar.span_text(times))
    return True


def _correct(session: Session, turn: Turn, said: Said | Exception) -> None:
    """Puts the true turn in the place of the one that was answered."""
    if not isinstance(said, Exception):
        session.undo()
    shown = turn.candidates
    if turn.intent == Intent.VIDEO and not shown and not isinstance(said, Exception):
        shown = tuple(each.id for each in sorted(said.ranking, key=lambda each: each.number))  # as they were numbered
    message = Message(turn.user, turn.intent, shown if turn.intent == Intent.VIDEO else None)
    # A video that the corpus lacks, or a message of nothing, cannot be told either; that turn has failed by itself.
    with contextlib.suppress(*REFUSED):
        session.tell(message, turn.answer, turn.video_id or None, turn.span)
