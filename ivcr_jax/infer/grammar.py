"""Constrained answers: the number of the video and the times in them are the heads' own, well-formed and once.

The model writes freely, but no digit: where it would write one, or has come to a video's number, that stands there
which the rank head chose, and after it the times that the moment head chose. If it comes to its end without, a sentence
with them is written for it. So `dialogue.video_number` and `span` always find what the heads said, whatever the
weights. An answer of plain talk is not constrained. It knows a tokenizer and strings.
"""

import collections
import re
from collections.abc import Sequence

import numpy as np

from ivcr_jax.data import prompt
from ivcr_jax.data.dialogue import video_number
from ivcr_jax.data.tokenizer import Tokenizer

# What may stand before the number of a video, at the end of what is written so far; see `dialogue.video_number`.
_BEFORE_NUMBER = re.compile(r"(?:\bvideo\s+(?:number\s+)?|视频\s*|第\s*)$", re.IGNORECASE)
# After this nothing else can: text would bring its own space. In the isolated layout a model does not learn that digit,
# so it has no wish for one.
_AWAITS_NUMBER = re.compile(r"(?:\bvideo|视频)\s+$", re.IGNORECASE)
_SPAN = re.compile(r"(\d+(?:\.\d+)?)s-(\d+(?:\.\d+)?)s")
# Said where the model does not come to it by itself.
_NUMBER = {"en": " The best match is video {n}.", "zh": "最符合的是视频 {n}。"}
_MOMENT = {"en": " It is in video {n} at {s}.", "zh": "它在视频 {n} 中，时间是 {s}。"}
_TIMES = {"en": " It is at {s}.", "zh": "时间是 {s}。"}
NOTHING_FITS = {
    "en": "None of the candidate videos matches the query.",
    "zh": "候选视频中没有与提问相符的。",
}


def span_text(span: Sequence[float]) -> str:
    """Seconds (start, end) as answers write them: `5.0s-12.3s`."""
    return "-".join(f"{prompt.seconds(time)}s" for time in span)


def span(answer: str) -> tuple[float, float] | None:
    """The seconds that `span_text` wrote into an answer, or None."""
    found = _SPAN.search(answer)
    return (float(found.group(1)), float(found.group(2))) if found else None


class Grammar:
    """What answers are made of with a tokenizer.

    Attributes:
      tokenizer: as given.
      digits: bool[ids], those that hold a digit or may begin one.
      barred: bool[ids], what an answer's second choice is made without: digits, and every special token but the end.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises ValueError for a tokenizer whose numbers run into the text around them."""
        if not tokenizer.splits_digits():
            raise ValueError("the tokenizer has digits in pieces with other text; expected one that splits digits")
        self.tokenizer = tokenizer
        self.digits = np.zeros(tokenizer.vocab_size, bool)
        self.digits[tokenizer.digit_ids()] = True
        self.barred = self.digits.copy()
        self.barred[[i for i in tokenizer.ids.values() if i != tokenizer.eos_id]] = True

    def whole(self, answer: str) -> list[int]:
        """The ids of a whole answer behind a prompt, with those that end it, as in training."""
        # The tokenizer puts the space before it itself, and a space is what training has before the end.
        return [*self.tokenizer.encode(f"{prompt.BOS}{answer.lstrip()} ")[1:], self.tokenizer.eos_id]


class Answer:
    """Decides token by token what a row writes: what the model chooses, or what it must say.

    Attributes:
      done: whether the last token was the end.
      text: what is written so far.
    """

    def __init__(
        self,
        grammar: Grammar,
        language: str,
        *,
        number: int | None = None,
        span: tuple[float, float] | None = None,
        fixed: str | None = None,
        limit: int = 200,
    ) -> None:
        """Args:
        grammar: of the decoder's tokenizer.
        language: "en" or "zh", of what is said where the model says nothing.
        number: under which the video was shown; None leaves the answer free.
        span: in seconds, of a moment in it.
        fixed: the whole answer; the model chooses nothing.
        limit: tokens after which the answer is brought to its end.

        Raises:
          ValueError: times without a number.
        """
        if span is not None and number is None:
            raise ValueError(f"span {span} without the number of its video")
        self._grammar, self._tokenizer, self._language, self._limit = grammar, grammar.tokenizer, language, limit
        self._number, self._times = number, None if span is None else span_text(span)
        self._ids: list[int] = []
        self._queue: collections.deque[int] = collections.deque()
        self.done, self.text = False, ""
        if fixed is not None:
            self._queue.extend(grammar.whole(fixed))

    def take(self, free: int, barred: int) -> int:
        """The next token, given the model's choice among all, and among those without digits."""
        token = self._queue.popleft() if self._queue else self._next(free, barred)
        self._ids.append(token)
        self.done = token == self._tokenizer.eos_id
        self.text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return token

    def _next(self, free: int, barred: int) -> int:
        end = self._tokenizer.eos_id
        special = free in self._tokenizer.ids.values()  # one that is not the end belongs into no answer: it ends there
        if self._number is not None and _AWAITS_NUMBER.search(self.text):
            self._queue.extend(self._continued(str(self._number)))
        elif special or len(self._ids) >= self._limit:
            self._queue.extend([*self._missing(), end])
        elif self._number is None or not self._grammar.digits[free]:
            return free
        else:
            said = self._said()
            if said is None:
                return barred if barred != end else self._next(end, end)
            self._queue.extend(self._continued(said))
        return self._queue.popleft()

    def _said(self) -> str | None:
        """What stands where the model would write a digit; None for nothing."""
        if _BEFORE_NUMBER.search(self.text):
            return str(self._number)
        if self._times is None or video_number(self.text) is None or span(self.text) is not None:
            return None
        return self._apart(self._times)

    def _missing(self) -> list[int]:
        """What the answer still has to say."""
        if self._number is None:
            return []
        found = video_number(self.text)
        timed = self._times is None or self._times in self.text
        if found is not None and timed:
            return []
        pattern = _TIMES if found is not None else _NUMBER if self._times is None else _MOMENT
        return self._continued(self._apart(pattern[self._language].format(n=self._number, s=self._times)))

    def _apart(self, text: str) -> str:
        """The text, with a space before it where it would run into a number: no parser would find that one then."""
        return f" {text}" if self.text[-1:].isdecimal() else text

    def _continued(self, text: str) -> list[int]:
        """The tokens of a text behind what is written, as they are where all is encoded at once."""
        if not self._ids:  # the tokenizer puts the space before an answer itself
            text = text.lstrip()
        # Behind a special token, as an answer is behind the prompt's end.
        before = self._tokenizer.encode(prompt.BOS + self.text)
        after = self._tokenizer.encode(prompt.BOS + self.text + text)
        if after[: len(before)] == before:
            return after[len(before) :]
        return self._tokenizer.encode(prompt.BOS + text)[1:]
