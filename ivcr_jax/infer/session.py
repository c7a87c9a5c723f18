"""A conversation with a corpus: what is asked, what is found, what is said, and what can be taken back.

Every turn is one prompt behind what the decoder has read, so it costs its own tokens alone. A turn that looks for a
video shows the first stage's best as candidates; the rank head orders them, the moment head says when, and the answer
is written with their numbers. Saved as JSON a session is its messages: loading says them again, and gives the same.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ivcr_jax.data import prompt
from ivcr_jax.data.dialogue import Intent, language_of
from ivcr_jax.infer import grammar
from ivcr_jax.infer.assistant import Assistant
from ivcr_jax.infer.corpus import Corpus
from ivcr_jax.infer.engine import GREEDY, Context, Sampling
from ivcr_jax.infer.reading import LONGEST_MESSAGE, clean, read_turn
from ivcr_jax.infer.steps import Clock, Steps, finish
from ivcr_jax.infer.turn import Message, Moment, Ranked, Turn
from ivcr_jax.infer.understanding import Request, understand

VERSION = 1
MOMENTS = 5  # that a question of time is answered with, the first of them in words
LONGEST_CONTEXT = 4096  # positions; a conversation that would grow beyond begins anew


@dataclasses.dataclass(frozen=True)
class _State:
    """All that a turn changes besides the cache, so that a turn can be taken back."""

    lengths: np.ndarray
    positions: np.ndarray
    hidden: Any
    prompts: int = 0  # in the context
    blocks: tuple[str, ...] = ()  # videos in the context, each under its place and one
    asked: tuple[str, ...] = ()
    rejected: frozenset[str] = frozenset()
    ranking: tuple[Ranked, ...] = ()
    current: str | None = None
    moment: Moment | None = None


class Session:
    """One conversation. Attributes: turns: so far."""

    def __init__(
        self,
        assistant: Assistant,
        corpus: Corpus,
        *,
        candidates: int = 10,
        sampling: Sampling = GREEDY,
        allowed: np.ndarray | None = None,
    ) -> None:
        """Begins.

        Args:
          assistant: of the export that the corpus was made with.
          corpus: to converse with.
          candidates: how many the first stage hands on, at least 1.
          sampling: of the answers' words.
          allowed: bool[N], from `Corpus.allowed`: which videos may be found; None is all.

        Raises:
          ValueError: for a corpus of another export, or no candidates.
        """
        if corpus.fingerprint != assistant.fingerprint:
            raise ValueError(
                f"the corpus was made with the export {corpus.fingerprint[:12]}, and this is "
                f"{assistant.fingerprint[:12]}; expected the same"
            )
        if candidates < 1:
            raise ValueError(f"candidates is {candidates}; expected at least 1")
        self._assistant, self._corpus = assistant, corpus
        self._candidates, self._sampling = candidates, sampling
        self._allowed = np.ones(len(corpus.videos), bool) if allowed is None else allowed
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.turns: list[Turn] = []
        self._requests: list[dict[str, Any]] = []
        self._before: list[tuple[Context, _State]] = []
        self._context = self._assistant.engine.context(1)
        self._state = _State(self._context.lengths, self._context.positions, None)

    @property
    def current(self) -> str | None:
        """The id of the current video."""
        return self._state.current

    @property
    def asked(self) -> tuple[str, ...]:
        """The messages that the last search went by."""
        return self._state.asked

    @property
    def rejected(self) -> frozenset[str]:
        """The ids of videos that were turned down, which the last search left out."""
        return self._state.rejected

    def say(self, message: str | Message, stream: Callable[[str], None] | None = None) -> Turn:
        """Answers a message.

        Args:
          message: of the person: the words, or with what is known besides.
          stream: is given each piece of the answer as it is written.

        Raises:
          ValueError: for a message that holds nothing, or an id that the corpus has not.
        """
        return self._alone(self._said(message), stream)

    def rank(self, message: Message) -> tuple[Ranked, ...]:
        """The candidates of a search, best first. Nothing is said, and the conversation stays what it is.

        Raises ValueError for what is no search, and as `say`.
        """
        if message.intent != Intent.VIDEO:
            raise ValueError(f"rank: found a message with the intent {message.intent}, expected a search")
        steps = self._said(message)
        next(steps)  # to where the answer would be written
        try:
            return self._state.ranking
        finally:
            steps.close()

    def _said(self, message: str | Message) -> Steps:
        known = Message(message) if isinstance(message, str) else message
        for name in known.videos:
            self._corpus.video(name)  # or it is refused
        words, notes = clean(known.text, self._assistant.tokenizer)
        request = understand(words, known.video is not None or self._state.current is not None)
        if known.intent is not None:
            request = dataclasses.replace(request, intent=known.intent)
        return (
            yield from self._turn({"say": known.to_json()}, words, request, notes, known.video, None, known.candidates)
        )

    def like(
        self,
        video: str,
        start: float | None = None,
        end: float | None = None,
        stream: Callable[[str], None] | None = None,
    ) -> Turn:
        """Looks for more like a video, or like a stretch of it.

        Args:
          video: its id. start, end: seconds; None is its begin and its end.

        Raises ValueError for an id that the corpus has not, or a stretch without a frame.
        """
        record = self._corpus.read(video)
        try:
            vector = record.stretch(start, end)
        except ValueError as error:
            raise ValueError(f"{video}: {error}") from None
        language = self.turns[-1].language if self.turns else "en"
        words = {"en": "Show me videos similar to this one.", "zh": "再给我找一些类似的视频。"}[language]
        request = Request(Intent.VIDEO, similar=True, bare=True)
        saved = {"like": video, "start": start, "end": end}
        return self._alone(self._turn(saved, words, request, [], video, vector), stream)

    def tell(
        self, message: Message, answer: str, video: str | None = None, span: tuple[float, float] | None = None
    ) -> Turn:
        """Puts a turn into the conversation as it was held elsewhere: nothing is looked for, ranked or written.

        Args:
          message: with its intent; a search with the candidates it showed.
          answer: as it was given.
          video: the current one from here on; None leaves it. It need not be among the candidates.
          span: seconds (start, end) that the answer names.

        Raises ValueError for a message that holds nothing, an unknown id, no intent, a search without candidates, or a
        moment without its video.
        """
        for name in (*message.videos, *([video] if video else [])):
            self._corpus.video(name)  # or it is refused
        intent, shown = message.intent, message.candidates or ()
        if intent is None or bool(shown) != (intent == Intent.VIDEO) or (intent == Intent.MOMENT and not video):
            raise ValueError("tell: expected an intent, candidates for a search and for nothing else, a moment's video")
        assistant = self._assistant
        words, notes = clean(message.text, assistant.tokenizer)
        language = language_of(words)
        saved = {"tell": message.to_json(), "answer": answer, "video": video, "span": None if span is None else [*span]}
        with self._change(saved, notes, message.video) as made:
            shown_as = tuple(range(1, len(shown) + 1))
            asked = prompt.PromptTurn(words, None, intent, language, shown_as)
            changes: dict[str, Any] = {"current": video or self.current}
            seen, moment = shown, None
            if intent == Intent.VIDEO:
                changes["asked"], changes["rejected"] = (*self._state.asked, words), frozenset()
                changes["ranking"] = tuple(Ranked(*each, 0.0, 0.0) for each in zip(shown, shown_as, strict=True))
            elif intent == Intent.MOMENT and video is not None:
                asked, seen = self._about(words, language, video), (video,)
                moment = None if span is None else Moment(video, *span, 0.0)
            self._read(asked, seen)
            assistant.engine.read(self._context, [assistant.grammar.whole(answer)])
            self._keep(**changes, **({} if intent == Intent.CHAT else {"moment": moment}))
            turn = Turn(words, intent, language, self._state.ranking, True, self.current, moment, text=answer)
            made.append(dataclasses.replace(turn, notes=tuple(notes)))
        return made[0]

    def undo(self) -> Turn:
        """Takes the last turn back; returns it. Raises ValueError where there is none."""
        if not self.turns:
            raise ValueError("undo: found no turn to take back")
        self._context, self._state = self._before.pop()
        self._requests.pop()
        self._rewind()
        return self.turns.pop()

    def _rewind(self) -> None:
        """Takes the context back to the state."""
        state = self._state
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(self._context.cache)):
            self._forget()  # it was interrupted within a call that was given the cache
            return
        self._assistant.engine.cut(self._context, state.lengths, state.positions, state.hidden)

    def to_json(self) -> str:
        """The conversation as JSON, for `Session.load`."""
        allowed = [video.id for video, there in zip(self._corpus.videos, self._allowed, strict=True) if there]
        values = {
            "version": VERSION,
            "export": self._assistant.fingerprint,
            "candidates": self._candidates,
            "sampling": dataclasses.asdict(self._sampling),
            "allowed": None if self._allowed.all() else allowed,
            "turns": [dict(asked, answer=turn.text) for asked, turn in zip(self._requests, self.turns, strict=True)],
        }
        return json.dumps(values, ensure_ascii=False, indent=1) + "\n"

    @classmethod
    def load(cls, assistant: Assistant, corpus: Corpus, text: str) -> tuple["Session", list[int]]:
        """A conversation from its JSON: everything is said again.

        Returns:
          the session, and the numbers of turns whose answers are not the saved ones, because the corpus has changed.

        Raises:
          ValueError: for what is no saved session, or is one with another export.
        """
        try:
            values = json.loads(text)
            if values["version"] != VERSION or values["export"] != assistant.fingerprint:
                found = f"version {values['version']}, export {values['export'][:12]}"
                raise ValueError(f"found {found}, expected version {VERSION}, export {assistant.fingerprint[:12]}")
            allowed = None if values["allowed"] is None else corpus.allowed(ids=values["allowed"])
            session = cls(
                assistant, corpus, candidates=values["candidates"], sampling=Sampling(**values["sampling"]),
                allowed=allowed,
            )  # fmt: skip
            differ = []
            for number, saved in enumerate(values["turns"]):
                turn = session._again(saved)
                if turn.text != saved["answer"]:
                    differ.append(number)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"saved session: {error}") from None
        return session, differ

    def _again(self, saved: dict[str, Any]) -> Turn:
        if "like" in saved:
            return self.like(saved["like"], saved["start"], saved["end"])
        if "tell" in saved:
            span = saved["span"] and tuple(saved["span"])
            return self.tell(Message.from_json(saved["tell"]), saved["answer"], saved["video"], span)
        return self.say(Message.from_json(saved["say"]))

    def _turn(
        self,
        saved: dict[str, Any],
        words: str,
        request: Request,
        notes: list[str],
        current: str | None,
        vector: np.ndarray | None = None,
        candidates: Sequence[str] | None = None,
    ) -> Steps:
        with self._change(saved, notes, current) as made:
            made.append((yield from self._answer(words, request, notes, vector, candidates)))
        return made[0]

    def _alone(self, steps: Steps, stream: Callable[[str], None] | None) -> Turn:
        found = finish([steps], self._assistant, self._sampling, stream)[0]
        if isinstance(found, Exception):
            raise found
        return found

    @contextlib.contextmanager
    def _change(self, saved: dict[str, Any], notes: list[str], current: str | None) -> Iterator[list[Turn]]:
        """What happens within makes a turn, which is put into the list; or else it has not been."""
        before, made = (self._context, self._state), list[Turn]()
        try:
            if current is not None:
                self._state = dataclasses.replace(self._state, current=current)
            if self._state.positions[0] + LONGEST_MESSAGE + 512 > LONGEST_CONTEXT:
                self._forget()
                notes.append("The conversation has become too long; what was said before is forgotten.")
            yield made
        except BaseException:  # an interrupt too, which closes what is under way
            self._context, self._state = before
            self._rewind()
            raise
        self._before.append(before)
        self._requests.append(saved)
        self.turns += made

    def _forget(self) -> None:
        """A new context; what was found stays."""
        here = self._context = self._assistant.engine.context(1)
        self._state = dataclasses.replace(
            self._state, lengths=here.lengths, positions=here.positions, hidden=None, prompts=0, blocks=()
        )

    def _answer(
        self,
        message: str,
        request: Request,
        notes: list[str],
        vector: np.ndarray | None,
        candidates: Sequence[str] | None,
    ) -> Steps:
        """Answers; leaves in `_state` what the next turn begins with."""
        state, language, clock = self._state, language_of(message), Clock()
        listed = {ranked.number: ranked.id for ranked in state.ranking}
        current = state.current
        if request.number is not None and request.number in listed:
            current = listed[request.number]
        elif request.number is not None and listed:
            notes.append(f"There is no video {request.number} in the list of {len(listed)}.")
        intent = request.intent
        if intent is None and request.bare and request.number in listed:
            return (yield from self._point(message, language, request.number, notes, clock))
        if intent is None:
            intent = self._intent_of(message, current)
        if intent == Intent.MOMENT and current is not None:
            turn = yield from self._locate(message, language, current, request.after, clock)
        elif intent == Intent.CHAT:
            turn = yield from self._talk(message, language, clock)
        else:
            self._state = dataclasses.replace(state, current=current)
            turn = yield from self._find(message, language, request, vector, candidates, clock)
        return dataclasses.replace(turn, notes=tuple(notes), timings=clock.seconds)

    def _intent_of(self, description: str, current: str | None) -> Intent:
        """Of a bare description: of a moment in the current video, where that is among the likely videos."""
        if current is None:
            return Intent.VIDEO
        vector = self._assistant.embed(prompt.retrieval_query([description]))
        _, likely = self._corpus.search(vector[None], self._candidates, self._allowed)
        return Intent.MOMENT if current in {self._corpus.videos[i].id for i in likely[0] if i >= 0} else Intent.VIDEO

    def _find(
        self,
        message: str,
        language: str,
        request: Request,
        vector: np.ndarray | None,
        candidates: Sequence[str] | None,
        clock: Clock,
    ) -> Steps:
        state, assistant = self._state, self._assistant
        beside = frozenset([state.current] if state.current and (request.rejects or request.similar) else [])
        rejected = state.rejected | (beside if request.rejects else frozenset())
        if state.current and not beside:  # another search begins; behind one that was refused it goes on
            rejected = frozenset()
        asked = state.asked if request.bare and request.rejects and state.asked else (*state.asked, message)
        if vector is None and request.bare and request.similar and state.current:
            vector = self._corpus.read(state.current).video
        bar = None  # of words' cosines with videos: those of one video with another are of another size
        if vector is None:
            vector, bar = assistant.embed(prompt.retrieval_query(asked)), assistant.fits
        if candidates is None:
            allowed, count = self._allowed & self._corpus.allowed(without=beside | rejected), self._candidates
        else:
            allowed, count = self._corpus.allowed(ids=candidates), len(candidates)
        found, numbers = self._corpus.search(vector[None], count, allowed)
        near = {self._corpus.videos[i].id: score for i, score in zip(numbers[0], found[0], strict=True) if i >= 0}
        names = [*(near if candidates is None else candidates)]
        first = np.array([near[name] for name in names], np.float32)
        clock.lap("search")
        turn = prompt.PromptTurn(message, None, Intent.VIDEO, language, tuple(range(1, len(names) + 1)))
        keys, shown = self._read(turn, names)
        clock.lap("read")
        ranking: tuple[Ranked, ...] = ()
        if names:
            scores = assistant.engine.scores(self._context, keys, shown, first[None])[0]
            ranking = tuple(
                Ranked(names[place], place + 1, float(scores[place]), float(first[place]))
                for place in np.argsort(-scores, kind="stable").tolist()
            )
        clock.lap("rank")
        self._state = dataclasses.replace(self._state, ranking=ranking)
        fits = bool(names) and (bar is None or float(first.max()) >= bar)
        answer = grammar.Answer(
            assistant.grammar,
            language,
            number=ranking[0].number if fits else None,
            fixed=None if fits else grammar.NOTHING_FITS[language],
        )
        text = yield from self._written(answer, clock)
        video = ranking[0].id if fits else None
        self._keep(asked=asked, rejected=rejected, current=video, moment=None)
        evidence = self._corpus.read(video).nearest(vector) if video else ()
        return Turn(message, Intent.VIDEO, language, ranking, fits, video, text=text, evidence=evidence)

    def _locate(self, message: str, language: str, video: str, after: bool, clock: Clock) -> Steps:
        state, assistant = self._state, self._assistant
        record, asked = self._corpus.read(video), self._about(message, language, video)
        self._read(asked, [video])
        clock.lap("read")
        begins = state.moment.end if after and state.moment and state.moment.video == video else 0.0
        vector = assistant.embed(prompt.retrieval_query([message]))
        duration = self._corpus.video(video).duration
        found = assistant.moments(self._context, record, duration, vector, begins, MOMENTS)
        moment, *others = (Moment(video, *each, score) for each, score in found)
        clock.lap("rank")
        span = moment.start, moment.end
        answer = grammar.Answer(assistant.grammar, language, number=asked.numbers[0], span=span)
        text = yield from self._written(answer, clock)
        self._keep(current=video, moment=moment)
        evidence = record.nearest(vector, span)
        return Turn(
            message, Intent.MOMENT, language, state.ranking, video=video, moment=moment, others=tuple(others),
            text=text, evidence=evidence,
        )  # fmt: skip

    def _about(self, message: str, language: str, video: str) -> prompt.PromptTurn:
        """A question about a video, which has the number under which it was shown last."""
        number = next((ranked.number for ranked in self._state.ranking if ranked.id == video), 1)
        times = tuple(self._corpus.read(video).times.tolist())
        return prompt.PromptTurn(message, None, Intent.MOMENT, language, (number,), times)

    def _talk(self, message: str, language: str, clock: Clock, fixed: str | None = None) -> Steps:
        self._read(prompt.PromptTurn(message, None, Intent.CHAT, language), [])
        clock.lap("read")
        text = yield from self._written(grammar.Answer(self._assistant.grammar, language, fixed=fixed), clock)
        self._keep()
        return Turn(message, Intent.CHAT, language, self._state.ranking, video=self._state.current, text=text)

    def _point(self, message: str, language: str, number: int | None, notes: list[str], clock: Clock) -> Steps:
        """The current video is another one of the list."""
        name = next(ranked.id for ranked in self._state.ranking if ranked.number == number)
        title = prompt.as_text(self._corpus.video(name).title)
        words = {"en": f"Now we look at video {number}: {title}.", "zh": f"现在看的是视频 {number}：{title}。"}[
            language
        ]
        turn = yield from self._talk(message, language, clock, words)
        self._keep(current=name, moment=None)
        return dataclasses.replace(turn, video=name, notes=tuple(notes), timings=clock.seconds)

    def _read(self, turn: prompt.PromptTurn, names: Sequence[str]) -> tuple[Any, np.ndarray]:
        state = self._state
        keys, there, blocks = read_turn(
            self._assistant, self._corpus, self._context, turn, names, first=state.prompts == 0, held=state.blocks
        )
        self._state = dataclasses.replace(state, prompts=state.prompts + 1, blocks=blocks)
        return keys, there

    def _written(self, answer: grammar.Answer, clock: Clock) -> Generator[tuple[Context, grammar.Answer], None, str]:
        yield self._context, answer
        clock.lap("write")
        return answer.text.strip()

    def _keep(self, **changes: Any) -> None:
        here = self._context
        self._state = dataclasses.replace(
            self._state, lengths=here.lengths, positions=here.positions, hidden=here.hidden, **changes
        )


def say_together(sessions: Sequence[Session], messages: Sequence[Message]) -> list[Turn | Exception]:
    """A message to each of several sessions, which have an assistant and the sampling in common.

    They read one after the other and write together, a row each. What comes of it is what `Session.say` gives, but for
    the last bits of numbers: several rows are summed in another order than one.

    Returns:
      of each its turn, or why there is none, one of REFUSED; the others go on.
    """
    turns = [session._said(message) for session, message in zip(sessions, messages, strict=True)]
    return finish(turns, sessions[0]._assistant, sessions[0]._sampling)
