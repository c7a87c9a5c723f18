"""A conversation with a corpus: what is asked, what is found, what is said, and what can be taken back.

Every turn is one prompt behind what the decoder has read, so it costs its own tokens alone. A turn that looks for a
video shows the first stage's best as candidates; the rank head orders them, the moment head says when, and the answer
is written with their numbers. Saved as JSON a session is its messages: loading says them again, and gives the same.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ivcr_jax.data import prompt
from ivcr_jax.data.dialogue import Intent, language_of
from ivcr_jax.infer import grammar
from ivcr_jax.infer.assistant import Assistant
from ivcr_jax.infer.corpus import Corpus, Record
from ivcr_jax.infer.engine import GREEDY, Context, Sampling
from ivcr_jax.infer.turn import Moment, Ranked, Turn
from ivcr_jax.infer.understanding import Request, understand

VERSION = 1
LONGEST_MESSAGE = 512  # tokens; what is longer is cut
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

    def say(self, text: str, stream: Callable[[str], None] | None = None) -> Turn:
        """Answers a message.

        Args:
          text: of the person.
          stream: is given each piece of the answer as it is written.

        Raises:
          ValueError: for a message that holds nothing.
        """
        message, notes = self._clean(text)
        request = understand(message, self._state.current is not None)
        return self._turn({"say": text}, message, request, notes, stream)

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
        inside = (record.times >= (start or 0.0)) & (record.times <= (np.inf if end is None else end))
        if not inside.any():
            raise ValueError(f"{video}: no frame from {start} to {end} s; expected a stretch that holds one")
        vector = record.video
        if start is not None or end is not None:
            mean = record.frames[inside].astype(np.float32).mean(0)
            vector = mean / np.linalg.norm(mean)
        language = self.turns[-1].language if self.turns else "en"
        words = {"en": "Show me videos similar to this one.", "zh": "再给我找一些类似的视频。"}[language]
        request = Request(Intent.VIDEO, similar=True, bare=True)
        saved = {"like": video, "start": start, "end": end}
        return self._turn(saved, words, request, [], stream, vector, video)

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
        return self.say(saved["say"])

    def _clean(self, text: str) -> tuple[str, list[str]]:
        """The message as the model may read it, and notes."""
        # Half a surrogate pair is no text; a control character has no meaning in one.
        text = text.encode(errors="replace").decode()
        message = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        if not message:
            raise ValueError("the message holds nothing; expected some words")
        message = prompt.as_text(message)
        tokenizer, notes = self._assistant.tokenizer, []
        ids = tokenizer.encode(message)
        if len(ids) > LONGEST_MESSAGE:
            message = tokenizer.decode(ids[:LONGEST_MESSAGE]).rstrip("\ufffd")
            notes = [f"The message has {len(ids)} tokens; only the first {LONGEST_MESSAGE} were read."]
        return message, notes

    def _turn(
        self,
        saved: dict[str, Any],
        message: str,
        request: Request,
        notes: list[str],
        stream: Callable[[str], None] | None,
        vector: np.ndarray | None = None,
        current: str | None = None,
    ) -> Turn:
        before = self._context, self._state
        clock = _Clock()
        try:
            if current is not None:
                self._state = dataclasses.replace(self._state, current=current)
            if self._state.positions[0] + LONGEST_MESSAGE + 512 > LONGEST_CONTEXT:
                self._forget()
                notes.append("The conversation has become too long; what was said before is forgotten.")
            turn = self._answer(message, request, notes, stream, vector, clock)
        except BaseException:  # an interrupt too: the turn has not been
            self._context, self._state = before
            self._rewind()
            raise
        self._before.append(before)
        self._requests.append(saved)
        self.turns.append(turn)
        return turn

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
        stream: Callable[[str], None] | None,
        vector: np.ndarray | None,
        clock: "_Clock",
    ) -> Turn:
        """Answers; leaves in `_state` what the next turn begins with."""
        state, language = self._state, language_of(message)
        listed = {ranked.number: ranked.id for ranked in state.ranking}
        current = state.current
        if request.number is not None and request.number in listed:
            current = listed[request.number]
        elif request.number is not None and listed:
            notes.append(f"There is no video {request.number} in the list of {len(listed)}.")
        intent = request.intent
        if intent is None and request.bare and request.number in listed:
            return self._point(message, language, request.number, notes, stream, clock)
        if intent is None:
            intent = self._intent_of(message, current)
        if intent == Intent.MOMENT and current is not None:
            turn = self._locate(message, language, current, request.after, stream, clock)
        elif intent == Intent.CHAT:
            turn = self._talk(message, language, stream, clock)
        else:
            self._state = dataclasses.replace(state, current=current)
            turn = self._find(message, language, request, vector, stream, clock)
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
        stream: Callable[[str], None] | None,
        clock: "_Clock",
    ) -> Turn:
        state, assistant = self._state, self._assistant
        beside = frozenset([state.current] if state.current and (request.rejects or request.similar) else [])
        rejected = (state.rejected | beside if request.rejects else state.rejected) if beside else frozenset()
        asked = state.asked if request.bare and request.rejects and state.asked else (*state.asked, message)
        if vector is None and request.bare and request.similar and state.current:
            vector = self._corpus.read(state.current).video
        if vector is None:
            vector = assistant.embed(prompt.retrieval_query(asked))
        allowed = self._allowed & self._corpus.allowed(without=beside | rejected)
        first, found = self._corpus.search(vector[None], self._candidates, allowed)
        there = found[0] >= 0
        names, first = [self._corpus.videos[i].id for i in found[0][there]], first[0][there]
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
        fits = bool(names) and (assistant.fits is None or float(first.max()) >= assistant.fits)
        answer = grammar.Answer(
            assistant.grammar,
            language,
            number=ranking[0].number if fits else None,
            fixed=None if fits else grammar.NOTHING_FITS[language],
        )
        text = self._write(answer, stream, clock)
        video = ranking[0].id if fits else None
        self._keep(asked=asked, rejected=rejected, ranking=ranking, current=video, moment=None)
        evidence = self._evidence(self._corpus.read(video), vector) if video else ()
        return Turn(message, Intent.VIDEO, language, ranking, fits, video, text=text, evidence=evidence)

    def _locate(
        self,
        message: str,
        language: str,
        video: str,
        after: bool,
        stream: Callable[[str], None] | None,
        clock: "_Clock",
    ) -> Turn:
        state, assistant = self._state, self._assistant
        record = self._corpus.read(video)
        number = next((ranked.number for ranked in state.ranking if ranked.id == video), 1)
        times = tuple(record.times.tolist())
        self._read(prompt.PromptTurn(message, None, Intent.MOMENT, language, (number,), times), [video])
        clock.lap("read")
        begins = state.moment.end if after and state.moment and state.moment.video == video else 0.0
        vector = assistant.embed(prompt.retrieval_query([message]))
        duration = self._corpus.video(video).duration
        span, score = assistant.moment(self._context, record, duration, vector, begins)
        clock.lap("rank")
        answer = grammar.Answer(assistant.grammar, language, number=number, span=span)
        text = self._write(answer, stream, clock)
        moment = Moment(video, *span, score)
        self._keep(current=video, moment=moment)
        evidence = self._evidence(record, vector, span)
        return Turn(
            message, Intent.MOMENT, language, state.ranking, video=video, moment=moment, text=text, evidence=evidence
        )

    def _talk(
        self,
        message: str,
        language: str,
        stream: Callable[[str], None] | None,
        clock: "_Clock",
        fixed: str | None = None,
    ) -> Turn:
        self._read(prompt.PromptTurn(message, None, Intent.CHAT, language), [])
        clock.lap("read")
        text = self._write(grammar.Answer(self._assistant.grammar, language, fixed=fixed), stream, clock)
        self._keep()
        return Turn(message, Intent.CHAT, language, self._state.ranking, video=self._state.current, text=text)

    def _point(
        self,
        message: str,
        language: str,
        number: int | None,
        notes: list[str],
        stream: Callable[[str], None] | None,
        clock: "_Clock",
    ) -> Turn:
        """The current video is another one of the list."""
        name = next(ranked.id for ranked in self._state.ranking if ranked.number == number)
        title = prompt.as_text(self._corpus.video(name).title)
        words = {"en": f"Now we look at video {number}: {title}.", "zh": f"现在看的是视频 {number}：{title}。"}[
            language
        ]
        turn = self._talk(message, language, stream, clock, words)
        self._keep(current=name, moment=None)
        return dataclasses.replace(turn, video=name, notes=tuple(notes), timings=clock.seconds)

    def _read(self, turn: prompt.PromptTurn, names: Sequence[str]) -> tuple[Any, np.ndarray]:
        """Reads a turn's prompt with its videos; for `Engine.scores` their keys f[1, C, K, 2 E] and which are there."""
        assistant, engine, context = self._assistant, self._assistant.engine, self._context
        text, _ = prompt.render_turn(turn, assistant.style, self._state.prompts == 0)
        self._state = dataclasses.replace(self._state, prompts=self._state.prompts + 1)
        ids = assistant.tokenizer.encode(text)
        video_token = assistant.tokenizer.ids[prompt.VIDEO_TOKEN]
        places = [place for place, token in enumerate(ids) if token == video_token]
        if not assistant.isolated:
            return self._read_inline(ids, places, names)
        blocks = assistant.blocks(self._corpus, names) if names else []
        held = self._state.blocks
        new = [name for name in dict.fromkeys(names) if name not in held]
        border = places[-1] if new else len(ids)
        before, behind = ([token for token in part if token != video_token] for part in (ids[:border], ids[border:]))
        engine.read(context, [before])
        if new:
            of_name = dict(zip(names, blocks, strict=True))
            engine.put(context, [[(len(held) + place + 1, of_name[name]) for place, name in enumerate(new)]])
            engine.read(context, [behind])
            self._state = dataclasses.replace(self._state, blocks=(*held, *new))
        if not blocks:
            return None, np.zeros((1, 0, 0), bool)
        return jnp.stack([block.keys for block in blocks])[None], np.stack([block.there for block in blocks])[None]

    def _read_inline(self, ids: list[int], places: list[int], names: Sequence[str]) -> tuple[Any, np.ndarray]:
        """As published: a video's tokens go through the decoder wherever it is mentioned."""
        engine, records = self._assistant.engine, [self._corpus.read(name) for name in names]
        if not records:
            engine.read(self._context, [ids])
            return None, np.zeros((1, 0, 0), bool)
        there = np.stack([record.token_mask for record in records])
        tokens = np.stack([record.tokens for record in records]).astype(np.float32)
        line: list[int] = []
        visual: list[np.ndarray] = []
        begins: list[int] = []
        for place, token in enumerate(ids):
            if place in places:
                number = len(begins)
                begins.append(len(line))
                line += np.where(there[number], token, -1).tolist()
                visual.append(tokens[number])
            else:
                line.append(token)
                visual.append(np.full((1, tokens.shape[-1]), np.nan, np.float32))
        hidden = engine.read(self._context, [line], [np.concatenate(visual)])
        where = np.array(begins)[:, None] + np.arange(there.shape[1])
        return engine.rank_keys(hidden[0][where])[None], there[None]

    def _write(self, answer: grammar.Answer, stream: Callable[[str], None] | None, clock: "_Clock") -> str:
        assistant, given = self._assistant, 0
        for _ in assistant.engine.write(self._context, [answer], assistant.grammar.barred, self._sampling):
            ready = answer.text.rstrip("\ufffd")  # the rest of a character may come with the next token
            if stream is not None and len(ready) > given:
                stream(ready[given:])
                given = len(ready)
        clock.lap("write")
        return answer.text.strip()

    def _keep(self, **changes: Any) -> None:
        here = self._context
        self._state = dataclasses.replace(
            self._state, lengths=here.lengths, positions=here.positions, hidden=here.hidden, **changes
        )

    def _evidence(
        self, record: Record, vector: np.ndarray, span: tuple[float, float] | None = None
    ) -> tuple[tuple[float, float], ...]:
        """Up to three frames of a video (within seconds of a span) that are nearest to a query f32[Dr]."""
        scores = record.frames.astype(np.float32) @ vector
        inside = np.ones(len(scores), bool)
        if span is not None:
            inside = (record.times >= span[0]) & (record.times <= span[1])
        best = [i for i in np.argsort(-scores, kind="stable") if inside[i]][:3]
        return tuple((float(record.times[i]), float(scores[i])) for i in best)


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Ends a stage."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
