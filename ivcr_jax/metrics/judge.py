"""A language model's judgement of answers, for who asks for it: 0 to 5 each, by an endpoint in OpenAI's form.

Judgements cost money, so each is kept in a file as it comes, and asked for once. What the endpoint did not judge
counts as 0 in this run, and is asked again in the next.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import http.client
import json
import os
import pathlib
import re
import socket
import ssl
import string
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from tqdm import tqdm

from ivcr_jax import lines
from ivcr_jax.data.dialogue import LANGUAGES
from ivcr_jax.metrics import interval
from ivcr_jax.metrics.interval import Cell
from ivcr_jax.metrics.records import Pair

VERSION = 1
KIND = "judgements"
PROMPT = pathlib.Path(__file__).with_name("judge.txt")
BEST = 5
TRIES = 3
PAUSE = 1.0  # seconds before the second try, twice as long before the third
DEAD = 20  # questions that fail in a row, after which no other is asked
_LARGEST_REPLY = 1 << 20  # bytes
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})  # HTTP statuses that may be others a moment later


@dataclasses.dataclass(frozen=True)
class Judge:
    """Where to ask for judgements: an endpoint of chat completions in OpenAI's form.

    Attributes:
      url: what "/chat/completions" follows, "http://127.0.0.1:8000/v1".
      model: its exact name; scores of two models are not comparable.
      key_variable: the environment variable that holds the key, "" where none is needed.
      timeout: seconds that a try may take in all.
      workers: questions at once.

    Raises ValueError for a URL that is none, no model, or a variable that is not set.
    """

    url: str
    model: str
    key_variable: str = ""
    timeout: float = 60.0
    workers: int = 8

    def __post_init__(self) -> None:
        if not re.match("https?://[^/]", self.url):
            raise ValueError(f"url of the judge: found {self.url!r}, expected http://... or https://...")
        if not self.model:
            raise ValueError("model of the judge: found nothing, expected its exact name")
        if self.key_variable and not (self.key and self.key.isascii() and self.key.isprintable()):
            found = "what is no key" if self.key else "nothing"
            raise ValueError(f"key of the judge: found {found} in ${self.key_variable}, expected a key")

    @property
    def key(self) -> str:
        return os.environ.get(self.key_variable, "").strip()


@dataclasses.dataclass(frozen=True)
class Judged:
    """What came of asking.

    Attributes:
      scores: f64[N], 0..5, of each turn; 0 where it failed.
      failures: why, by id of the turn.
      about: the model, the names that the endpoint gave itself, the SHA-256 of the prompt (other prompts, other
        scores), and why asking stopped, if it did: in words, for a report.
    """

    scores: np.ndarray
    failures: dict[str, str]
    about: str


class _Row(NamedTuple):
    """A line of the file. Attributes: turn: its id. asked: SHA-256 of the question. model: that the endpoint says it
    is. content: what it replied."""

    turn: str
    asked: str
    model: str
    content: str

    @classmethod
    def parse(cls, values: Any, number: int) -> "_Row":
        del number
        if not isinstance(values, dict) or values.keys() != {*cls._fields} or {*map(type, values.values())} != {str}:
            raise ValueError(f"found {values!r:.80}, expected an object with {', '.join(cls._fields)}, all texts")
        return cls(**values)


class _Failed(Exception):
    """Why a question has no reply."""


def judged(pairs: Sequence[Pair], endpoint: Judge, path: str) -> Judged:
    """Asks a model, at temperature 0, how well each answer agrees with the data's own.

    Args:
      path: the file of judgements, to begin or to go on with. A question that has its reply there is not asked.

    Raises FileNotFoundError and ValueError as `lines.growing`, for a file of another model or prompt too.
    """
    template = PROMPT.read_text(encoding="utf-8")
    prompts = {
        pair.id: string.Template(template).substitute(
            message=pair.turn.user, reference=pair.turn.answer, answer=pair.prediction.text
        )
        for pair in pairs
        if pair.prediction is not None and pair.prediction.text.strip()
    }
    fingerprint = _sha256(template)
    header = {KIND: VERSION, "model": endpoint.model, "prompt": fingerprint}
    with lines.growing(path, header, KIND, _Row.parse) as (append, rows):
        replies = {row.turn: row for row in rows if row.turn in prompts and row.asked == _sha256(prompts[row.turn])}
        left = {turn: prompt for turn, prompt in prompts.items() if turn not in replies}
        found, failures, stopped = _ask_all(endpoint, left, append)
    replies |= found
    scores = np.zeros(len(pairs))
    for place, pair in enumerate(pairs):
        if pair.id not in prompts:
            failures[pair.id] = "no answer"
        elif pair.id in replies:
            try:
                scores[place] = _score(replies[pair.id].content)
            except ValueError as error:
                failures[pair.id] = str(error)
    said = ", ".join(sorted({row.model for row in replies.values()} - {"", endpoint.model}))
    about = f"{endpoint.model}{said and f' (says it is {said})'}, prompt {fingerprint[:12]}"
    return Judged(scores, failures, f"{about}; {stopped}" if stopped else about)


def cells(pairs: Sequence[Pair], scores: np.ndarray, seed: int = 0) -> dict[str, Cell]:
    """The mean score by `judge_en`, `judge_zh`, 0..5, for the languages that there are; scores: f64[N] of the turns."""
    languages = np.array([pair.turn.language for pair in pairs])
    means = {f"judge_{language}": np.where(languages == language, scores, np.nan) for language in LANGUAGES}
    return interval.cells(means, interval.clusters_of(pairs), seed=seed)


def _ask_all(
    endpoint: Judge, prompts: dict[str, str], append: Callable[[Any], None]
) -> tuple[dict[str, _Row], dict[str, str], str]:
    """Replies, as they come put into the file; why others have none, by the turns' ids; why asking stopped, or ""."""
    replies: dict[str, _Row] = {}
    failures: dict[str, str] = {}
    lock = threading.Lock()
    stop = threading.Event()
    in_a_row, stopped = 0, ""

    def ask(turn: str) -> None:
        nonlocal in_a_row, stopped
        if stop.is_set():
            failures[turn] = "not asked"
            return
        try:
            row = _Row(turn, _sha256(prompts[turn]), *_ask(endpoint, prompts[turn], stop))
        except _Failed as error:
            with lock:
                failures[turn] = str(error)
                in_a_row += 1
                if in_a_row >= DEAD and not stopped:
                    stopped = f"asking stopped: {in_a_row} questions in a row failed, the last one of {error}"
                    logging.warning("judge: %s", stopped)
                    stop.set()
        else:
            with lock:
                append(row._asdict())
                replies[turn] = row
                in_a_row = 0

    pool = concurrent.futures.ThreadPoolExecutor(endpoint.workers)
    try:
        asked = [pool.submit(ask, turn) for turn in prompts]
        for each in tqdm(concurrent.futures.as_completed(asked), "judge", len(asked), disable=not asked):
            each.result()
    finally:
        stop.set()  # who interrupts it does not wait for all questions, nor for other tries
        pool.shutdown(cancel_futures=True)
    return replies, failures, stopped


def _ask(endpoint: Judge, prompt: str, stop: threading.Event) -> tuple[str, str]:
    """The endpoint's model and what it replied."""
    body = {"model": endpoint.model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
    headers = {"Content-Type": "application/json"}
    if endpoint.key_variable:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    request = urllib.request.Request(
        endpoint.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers, method="POST"
    )
    reason = ""
    for attempt in range(TRIES):
        if attempt and stop.wait(PAUSE * 2 ** (attempt - 1)):
            break
        with _Deadline(endpoint.timeout) as deadline:
            try:
                with _opener(deadline).open(request, timeout=endpoint.timeout) as reply:
                    data = reply.read(_LARGEST_REPLY)
                if not deadline.over:
                    return _read(data)
                reason = "timeout"
            except urllib.error.HTTPError as error:
                error.close()
                reason = f"HTTP {error.code}"
                if error.code not in _AGAIN:
                    break
            except (OSError, http.client.HTTPException) as error:  # no connection, a timeout, half a reply
                cause = error.reason if isinstance(error, urllib.error.URLError) else error
                late = deadline.over or isinstance(cause, TimeoutError)
                reason = "timeout" if late else f"no reply: {type(cause).__name__}"
    raise _Failed(reason)


class _Deadline:
    """Ends a connection some seconds after it was begun: a socket's own timeout is of one silence, and a reply that
    comes drop by drop never has one."""

    def __init__(self, seconds: float):
        self.over = False
        self._connection: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> "_Deadline":
        self._timer.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._timer.cancel()
        self._timer.join()
        if self._connection is not None:
            self._connection.close()

    def watch(self, connection: socket.socket) -> None:
        # Its own handle: the first is closed, or handed over to TLS, while the reply is read.
        self._connection = connection.dup()
        if self.over:
            self._end()

    def _end(self) -> None:
        self.over = True
        if self._connection is not None:
            with contextlib.suppress(OSError):  # the other side was first
                self._connection.shutdown(socket.SHUT_RDWR)


def _opener(deadline: _Deadline) -> urllib.request.OpenerDirector:
    class Plain(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            deadline.watch(self.sock)

    class Secure(http.client.HTTPSConnection, Plain):
        """Watched before TLS begins."""

    class Http(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Plain, req)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
            return self.do_open(Secure, req, context=_tls())

    return urllib.request.build_opener(_NoRedirect, Http, Https(context=_tls()))


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()  # reads all certificates of the machine


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would send the key on to wherever it is sent."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _read(data: bytes) -> tuple[str, str]:
    try:
        reply = json.loads(data)
        content = reply["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        content = None
    if not isinstance(content, str):
        raise _Failed("unreadable reply")
    return str(reply.get("model", "")), content


def _score(content: str) -> int:
    """Raises ValueError where the reply is no judgement."""
    try:
        grade = json.loads(content)
    except (ValueError, RecursionError):
        grade = None
    score = grade.get("score") if isinstance(grade, dict) and len(grade) == 1 else None
    if type(score) is not int or not 0 <= score <= BEST:
        raise ValueError(f"reply: found {content[:80]!r}, expected a score from 0 to {BEST}")
    return score


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
