"""Turns under way: each reads, hands out the answer that is to be written, and goes on when it has been, so that the
answers of several conversations can be written together."""

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

from ivcr_jax.infer.assistant import Assistant
from ivcr_jax.infer.corpus import CorpusError
from ivcr_jax.infer.engine import Context, Sampling
from ivcr_jax.infer.grammar import Answer
from ivcr_jax.infer.turn import Turn

REFUSED = ValueError, OSError, CorpusError  # what a message may be refused with; the conversation goes on

# Behind what the answer is to be written, and the answer; in the end the turn.
Steps = Generator[tuple[Context, Answer], None, Turn]


def finish(
    turns: Sequence[Steps], assistant: Assistant, sampling: Sampling, stream: Callable[[str], None] | None = None
) -> list[Turn | Exception]:
    """Carries out turns of several conversations, their answers a row each.

    Args:
      turns: not begun. assistant: of them all. sampling: of their words.
      stream: is given the pieces of the first answer.

    Returns:
      of each what it comes to, or why there is none, one of REFUSED; the others go on.
    """
    with contextlib.ExitStack() as stack:
        for steps in turns:
            stack.callback(steps.close)  # an interrupt takes back what is under way
        found: list[Any] = [_step(steps) for steps in turns]
        writing = [place for place, each in enumerate(found) if isinstance(each, tuple)]
        if writing:
            contexts, answers = zip(*[found[place] for place in writing], strict=True)
            given = 0
            for _ in assistant.engine.write_together(contexts, answers, assistant.grammar.barred, sampling):
                ready = answers[0].text.rstrip("\ufffd")  # the rest of a character may come with the next token
                if stream is not None and len(ready) > given:
                    stream(ready[given:])
                    given = len(ready)
        for place in writing:
            found[place] = _step(turns[place])
    return found


def _step(steps: Steps) -> tuple[Context, Answer] | Turn | Exception:
    """Goes on with a turn: to the answer that is to be written, to its end, or to what it is refused with."""
    try:
        return next(steps)
    except StopIteration as end:
        return end.value
    except REFUSED as error:
        return error


class Clock:
    """Attributes: seconds: by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Ends a stage."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
