"""BLEU-4 of answers' words against the data's own, as sacrebleu counts it."""

import collections
import functools
from collections.abc import Callable, Sequence

import numpy as np
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

from ivcr_jax.data.dialogue import LANGUAGES
from ivcr_jax.metrics import interval
from ivcr_jax.metrics.interval import Cell
from ivcr_jax.metrics.records import Pair

TOKENIZERS = {"en": "13a", "zh": "zh"}  # words, and Chinese characters, which have no blanks between them
ORDERS = 4
_AT_ONCE = 5000  # pairs whose n-grams are counted together
_REMEMBERED = 1 << 16  # pieces of texts whose tokens are kept

Tokenize = Callable[[str], list[str]]


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
        said = [(pair.prediction.text if pair.prediction else "", pair.turn.answer) for pair in some]
        # Counts of n-grams add up, so that resampling needs no text.
        counts, clusters = ngrams(said, tokenizer(language)), interval.clusters_of(some)
        several = int(clusters.max()) + 1
        low = high = None
        if several > 1:
            resampled = interval.sums(counts, clusters, seed)
            low, high = map(float, np.quantile([_score(row) for row in resampled], interval.SHARES))
        name = f"bleu_{language}"
        cells[name] = Cell(_score(counts.sum(0)), low, high, len(some), several)
        metric = BLEU(tokenize=TOKENIZERS[language])
        metric.corpus_score([""], [[""]])  # before it has scored something it has no signature
        signatures[name] = str(metric.get_signature())
    return cells, signatures


def tokenizer(language: str) -> Tokenize:
    """What gives a text's tokens just as sacrebleu's tokenizer of the language does, several times as fast.

    sacrebleu's rules widen each blank to three before those that look at two neighbours, so that what stands between
    two blanks comes out the same whatever is beside it: each such piece is given to sacrebleu once, and remembered.
    A Chinese character is a piece. Before a Chinese text's first piece, and behind its last, there is no blank.
    """
    if language == "en":
        own = Tokenizer13a()
        cut = functools.lru_cache(_REMEMBERED)(lambda piece: own(piece).split())
        return lambda text: [token for piece in text.rstrip().split(" ") if piece for token in cut(piece)]
    rules, chinese = TokenizerRegexp(), _Chinese()

    @functools.lru_cache(_REMEMBERED)
    def among(piece: str, first: bool, last: bool) -> list[str]:
        return rules(f"{'' if first else ' '}{piece}{'' if last else ' '}").split()

    def tokenize(text: str) -> list[str]:
        pieces = text.strip().translate(chinese).split(" ")
        end = len(pieces) - 1
        return [
            token for place, piece in enumerate(pieces) if piece for token in among(piece, place == 0, place == end)
        ]

    return tokenize


class _Chinese(dict[int, str]):
    """For str.translate: blanks around each character that sacrebleu takes for Chinese."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        self[code] = f" {character} " if TokenizerZh._is_chinese_char(character) else character
        return self[code]


def ngrams(pairs: Sequence[tuple[str, str]], tokenize: Tokenize) -> np.ndarray:
    """What BLEU is made of, of each pair of an answer and the true one: i64[N, 10].

    The answer's n-grams that are in the true one too, clipped (Papineni et al., 2002), by order from 1; all of the
    answer's; its length and the true one's, in tokens.
    """
    numbers: collections.defaultdict[str, int] = collections.defaultdict()
    numbers.default_factory = numbers.__len__
    found = []
    for first in range(0, len(pairs), _AT_ONCE):
        tokens: list[int] = []
        lengths = []
        for text in (text for pair in pairs[first : first + _AT_ONCE] for text in pair):
            before = len(tokens)
            tokens.extend(map(numbers.__getitem__, tokenize(text)))
            lengths.append(len(tokens) - before)
        found.append(_ngrams(np.array(tokens, np.int64), np.array(lengths)))
    return np.concatenate(found)


def _ngrams(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The same of the numbers i64[T] of tokens; lengths: i64[2 N], of an answer and the true one in turn."""
    count = len(lengths) // 2
    texts = np.repeat(np.arange(len(lengths)), lengths)
    pair, answered = texts // 2, texts % 2 == 0
    ends = np.cumsum(lengths)[texts]
    begin = np.arange(len(tokens))  # where an n-gram begins
    gram = pair  # its number, other ones in other pairs
    matched, every = [], []
    for order in range(ORDERS):
        whole = begin + order < ends[begin]
        begin = begin[whole]
        gram = np.unique(gram[whole] * (tokens.max(initial=0) + 1) + tokens[begin + order], return_inverse=True)[1]
        own = answered[begin]
        times = np.bincount(gram)
        of_answer = np.bincount(gram[own], minlength=len(times))
        owner = np.zeros(len(times), np.int64)
        owner[gram] = pair[begin]
        matched.append(np.bincount(owner, np.minimum(of_answer, times - of_answer), count).astype(np.int64))
        every.append(np.bincount(pair[begin][own], minlength=count))
    return np.stack([*matched, *every, lengths[::2], lengths[1::2]], 1)


def _score(counts: np.ndarray) -> float:
    whole = [int(count) for count in counts]
    return float(
        BLEU.compute_bleu(
            correct=whole[:4], total=whole[4:8], sys_len=whole[8], ref_len=whole[9], smooth_method="exp"
        ).score
    )
