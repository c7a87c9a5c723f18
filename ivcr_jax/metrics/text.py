"""The words of answers: BLEU-4 against the data's own, and, for who asks for it, a language model's judgement."""

import concurrent.futures
import dataclasses
import hashlib
import http.client
import json
import os
import pathlib
import string
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np
from sacrebleu.metrics.bleu import BLEU

from ivcr_jax.data.dialogue import LANGUAGES
from ivcr_jax.metrics import interval
from ivcr_jax.metrics.interval import Cell
from ivcr_jax.metrics.records import Pair

TOKENIZERS = {"en": "13a", "zh": "zh"}  # words, and Chinese characters, which have no blanks between them
PROMPT = pathlib.Path(__file__).with_name("judge.txt")
BEST = 5
TRIES = 3
PAUSE = 1.0  # seconds before the second try, twice as long before the third
_LARGEST_REPLY = 1 << 20  # bytes
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})  # HTTP statuses that may be others a moment later


def bleu(pairs: Sequence[Pair], seed: int = 0) -> tuple[dict[str, Cell], dict[str, str]]:
    """Corpus BLEU-4 of all answers in a language, 0..100, with its interval, and sacrebleu's signature.

    Returns cells and signatures by `bleu_en`, `bleu_zh`, for the languages that there are. A missing answer is an
    empty one.
    """
    cells, signatures = {}, {}
    for language in LANGUAGES:
        some = [pair for pair in pairs if pair.turn.language == language]
        if not some:
            continue
        # A warning of sacrebleu's that texts look tokenised is off: many short answers end in " .".
        metric = BLEU(tokenize=TOKENIZERS[language], force=True)
        clusters = interval.clusters_of(some)
        texts: list[tuple[list[str], list[str]]] = [([], []) for _ in range(clusters.max() + 1)]
        for pair, cluster in zip(some, clusters, strict=True):
            texts[cluster][0].append(pair.prediction.text if pair.prediction else "")
            texts[cluster][1].append(pair.turn.answer)
        # Counts of n-grams add up, so that resampling needs no text.
        counts = np.array([_counts(metric, found, wanted) for found, wanted in texts], np.float64)
        low = high = None
        if len(counts) > 1:
            resampled = interval.sums(counts, np.arange(len(counts)), seed)
            low, high = map(float, np.quantile([_score(row) for row in resampled], interval.SHARES))
        name = f"bleu_{language}"
        cells[name] = Cell(_score(counts.sum(0)), low, high, len(some), len(counts))
        signatures[name] = str(metric.get_signature())
    return cells, signatures


def _counts(metric: BLEU, found: list[str], wanted: list[str]) -> list[int]:
    score = metric.corpus_score(found, [wanted])
    return [*score.counts, *score.totals, score.sys_len, score.ref_len]


def _score(counts: np.ndarray) -> float:
    whole = [int(count) for count in counts]
    return float(
        BLEU.compute_bleu(
            correct=whole[:4], total=whole[4:8], sys_len=whole[8], ref_len=whole[9], smooth_method="exp"
        ).score
    )


@dataclasses.dataclass(frozen=True)
class Judge:
    """Where to ask for judgements: an endpoint of chat completions in OpenAI's form.

    Attributes:
      url: what "/chat/completions" follows, "http://127.0.0.1:8000/v1".
      model: its exact name; scores of two models are not comparable.
      key_variable: the environment variable that holds the key, "" where none is needed.
      timeout: seconds that the endpoint may be silent.
      workers: questions at once.

    Raises ValueError for a URL that is none, no model, or a variable that is not set.
    """

    url: str
    model: str
    key_variable: str = ""
    timeout: float = 60.0
    workers: int = 8

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url of the judge: found {self.url!r}, expected http://... or https://...")
        if not self.model:
            raise ValueError("model of the judge: found nothing, expected its exact name")
        if self.key_variable and not os.environ.get(self.key_variable):
            raise ValueError(f"key of the judge: found nothing in ${self.key_variable}, expected a key")


@dataclasses.dataclass(frozen=True)
class Judged:
    """What came of asking.

    Attributes:
      scores: f64[N], 0..5, of each turn; 0 where it failed.
      failures: why, by id of the turn.
      models: names that the endpoint gave itself.
      prompt: SHA-256 of the prompt's text; other prompts, other scores.
    """

    scores: np.ndarray
    failures: dict[str, str]
    models: tuple[str, ...]
    prompt: str


class _Failed(Exception):
    """Why a question has no score."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """urllib would send the key on to wherever it is sent."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def judge(pairs: Sequence[Pair], endpoint: Judge) -> Judged:
    """Asks a model, at temperature 0, how well each answer agrees with the data's own."""
    template = PROMPT.read_text(encoding="utf-8")
    opener = urllib.request.build_opener(_NoRedirect)

    def ask(pair: Pair) -> tuple[int, str, str]:
        if pair.prediction is None or not pair.prediction.text.strip():
            return 0, "no answer", ""
        prompt = string.Template(template).substitute(
            message=pair.turn.user, reference=pair.turn.answer, answer=pair.prediction.text
        )
        try:
            return _ask(opener, endpoint, prompt)
        except _Failed as error:
            return 0, str(error), ""

    pool = concurrent.futures.ThreadPoolExecutor(endpoint.workers)
    try:
        replies = list(pool.map(ask, pairs))
    finally:
        pool.shutdown(cancel_futures=True)  # who interrupts it does not wait for all questions
    return Judged(
        np.array([score for score, _, _ in replies], np.float64),
        {pair.id: reason for pair, (_, reason, _) in zip(pairs, replies, strict=True) if reason},
        tuple(sorted({model for _, _, model in replies if model})),
        hashlib.sha256(template.encode()).hexdigest(),
    )


def _ask(opener: urllib.request.OpenerDirector, endpoint: Judge, prompt: str) -> tuple[int, str, str]:
    body = {"model": endpoint.model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
    headers = {"Content-Type": "application/json"}
    if endpoint.key_variable:
        headers["Authorization"] = f"Bearer {os.environ[endpoint.key_variable]}"
    request = urllib.request.Request(
        endpoint.url.rstrip("/") + "/chat/completions", json.dumps(body).encode(), headers, method="POST"
    )
    reason = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            with opener.open(request, timeout=endpoint.timeout) as reply:
                return _read(reply.read(_LARGEST_REPLY))
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"HTTP {error.code}"
            if error.code not in _AGAIN:
                break
        except (OSError, http.client.HTTPException) as error:  # no connection, a timeout, half a reply
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            reason = "timeout" if isinstance(cause, TimeoutError) else f"no reply: {type(cause).__name__}"
    raise _Failed(reason)


def _read(data: bytes) -> tuple[int, str, str]:
    try:
        reply = json.loads(data)
        content = reply["choices"][0]["message"]["content"]
        grade = json.loads(content)
    except (ValueError, LookupError, TypeError, RecursionError):
        raise _Failed("unreadable reply") from None
    score = grade.get("score") if isinstance(grade, dict) and len(grade) == 1 else None
    if type(score) is not int or not 0 <= score <= BEST:
        raise _Failed(f"reply: found {content[:80]!r}, expected a score from 0 to {BEST}")
    return score, "", str(reply.get("model", ""))
