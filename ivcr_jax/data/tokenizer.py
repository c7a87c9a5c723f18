"""Text to token ids and back: a SentencePiece model plus the special tokens a dialogue needs.

The same ids as Hugging Face's LLaMA tokenizer, from the `.model` file alone. Light inference uses it too, so
it needs SentencePiece and the standard library only. It knows the names of the video tokens; of dialogues,
videos and models, nothing.

A special token is matched as it stands, longest first, and white space beside it is kept. The text between
two special tokens is a chunk, and Hugging Face has two ways with the "▁" that SentencePiece puts before a
text, told apart by the setting of its name, `legacy`:

  legacy=True   Every chunk gets its own "▁". The fast tokenizer does so when it reads the `tokenizer.json` of
                Meta's LLaMA-2 folders, and so does the slow one with `legacy=True`: what the published system
                was trained with. Meta's own code encoded each `[INST]` after a `<s>` so as well. The default.
  legacy=False  Only a chunk at the very start of the text gets it. The slow tokenizer with `legacy=False`,
                which Meta's `tokenizer_config.json` asks for: what the published evaluation ran with.

So the published evaluation fed its model other ids than the training had: `[` for `▁[` after every `<s>`, one
space for two after a video token. transformers 5 agrees with legacy=False, but for a text that itself begins
with a space or "▁": it puts no second "▁" before that one.
"""

import functools
import hashlib
import io
import json
import operator
import os
import re
import sys
from collections.abc import Iterable, Sequence

import sentencepiece

from ivcr_jax.data.dialogue import HAN
from ivcr_jax.data.prompt import VIDEO_TOKENS

_SPACE = "▁"
_BORDER = "\x01"  # where no piece may reach across, in training
_PAIRS = re.compile(f"{HAN.pattern}{{1,2}}"), re.compile(f"(?<!{HAN.pattern}){HAN.pattern}|{HAN.pattern}{{1,2}}")

# A protobuf message that occurs twice is merged, so these bytes after a model change one thing in it:
# `normalizer_spec { add_dummy_prefix: false }`.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Tokenizer:
    """A SentencePiece model with special tokens, made by `load`, `from_proto` or `train_demo`.

    A special token that the model already holds as a piece keeps that id; the others follow the model's own
    vocabulary, in order. Immutable, safe to share between threads, picklable (as the model's bytes).

    Attributes:
      proto: the SentencePiece model file, as bytes.
      special_tokens: as given.
      legacy: see the module.
      ids: id of each of `special_tokens`, of `<unk>` and of each control piece (`<s>`, `</s>`), by its text.
      vocab_size: number of ids, those of the special tokens included.
      bos_id, eos_id: of the model, both always there.
      pad_id: the model's, or eos_id where it has none (as the published system pads). Only a filler: the same
        id can be a real token, so whoever pads must mask.
    """

    def __init__(self, proto: bytes, special_tokens: Sequence[str], legacy: bool, name: str) -> None:
        self.proto = proto
        self.special_tokens = tuple(special_tokens)
        self.legacy = legacy
        self._sp = _processor(proto, name)
        self.bos_id, self.eos_id, unknown = self._sp.bos_id(), self._sp.eos_id(), self._sp.unk_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise ValueError(
                f"{name}: found begin id {self.bos_id}, end id {self.eos_id}, expected a model that has both"
            )
        self.pad_id = self._sp.pad_id() if self._sp.pad_id() >= 0 else self.eos_id

        base = list(range(self._sp.GetPieceSize()))
        self._pieces, self._is_byte = self._sp.IdToPiece(base), self._sp.IsByte(base)
        controls = [unknown, *(i for i, control in enumerate(self._sp.IsControl(base)) if control)]
        self.ids = {self._pieces[i]: i for i in controls}
        self.vocab_size = len(base)
        for token in self.special_tokens:
            if not token or token in self.ids:
                raise ValueError(
                    f"special tokens {self.special_tokens}: found {token!r} empty, repeated or a control "
                    "piece of the model, expected distinct new ones"
                )
            found = self._sp.PieceToId(token)
            if found == unknown:
                found, self.vocab_size = self.vocab_size, self.vocab_size + 1
            self.ids[token] = found
        # Longest first: of tokens that begin alike, the first alternative that fits would win.
        alternatives = sorted(self.ids, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, alternatives)) + ")")

        self._prefixed = self._sp.Normalize("a").startswith(_SPACE)
        self._inner = self._sp  # encodes what follows a special token
        if self._prefixed and not legacy:
            if self._sp.Normalize("a  a").count(_SPACE) < 3:
                raise ValueError(
                    f"{name}: found a model that collapses white space, expected for legacy=False one that "
                    "keeps it, as LLaMA's does"
                )
            self._inner = _processor(proto + _NO_DUMMY_PREFIX, name)
        # A prompt's chunks are mostly the same few: " ", " 1 ", ",".
        self._inner_ids = functools.lru_cache(maxsize=1024)(lambda c: tuple(self._inner.EncodeAsIds(c.encode())))

    @classmethod
    def from_proto(cls, proto: bytes, special_tokens: Sequence[str] = VIDEO_TOKENS, legacy: bool = True) -> "Tokenizer":
        """A tokenizer from the bytes of a SentencePiece model file, wherever they were read from.

        Raises ValueError for anything but a SentencePiece model with begin and end pieces, for one that
        collapses white space with legacy=False, and for special tokens that are empty, repeated or control
        pieces.
        """
        return cls(proto, special_tokens, legacy, "tokenizer model")

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], special_tokens: Sequence[str] = VIDEO_TOKENS, legacy: bool = True
    ) -> "Tokenizer":
        """A tokenizer from a SentencePiece `.model` file on a local disk.

        Raises FileNotFoundError where there is no such file, else as `from_proto`.
        """
        if not os.path.isfile(path):
            found = "a folder" if os.path.isdir(path) else "nothing"
            raise FileNotFoundError(f"{os.fspath(path)}: found {found}, expected a SentencePiece .model file")
        with open(path, "rb") as file:
            return cls(file.read(), special_tokens, legacy, os.fspath(path))

    def __reduce__(self) -> tuple[object, ...]:
        return Tokenizer.from_proto, (self.proto, self.special_tokens, self.legacy)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (64 hex digits) of all that decides an id: the model, the special tokens, `legacy`."""
        settings = json.dumps({"special_tokens": self.special_tokens, "legacy": self.legacy}, sort_keys=True)
        return hashlib.sha256(self.proto + settings.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text of any length. Nothing is added: `<s>` and `</s>` are those the text has.

        Raises ValueError (UnicodeEncodeError) for half a surrogate pair, which is no text.
        """
        first, *rest = self._cut.split(text)
        ids: list[int] = self._sp.EncodeAsIds(first.encode())
        for token, chunk in zip(rest[::2], rest[1::2], strict=True):
            ids.append(self.ids[token])
            ids += self._inner_ids(chunk)
        return ids

    def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
        """`[encode(text) for text in texts]`, faster: recurring chunks are encoded once, on `num_threads`."""
        split = [self._cut.split(text) for text in texts]
        firsts: dict[str, list[int]] = {parts[0]: [] for parts in split}
        inners: dict[str, list[int]] = {chunk: [] for parts in split for chunk in parts[2::2]}
        for chunks, processor in ((firsts, self._sp), (inners, self._inner)):
            found = processor.Encode([chunk.encode() for chunk in chunks], num_threads=num_threads)
            chunks.update(zip(chunks, found, strict=True))
        result = []
        for first, *rest in split:
            ids = firsts[first].copy()
            for token, chunk in zip(rest[::2], rest[1::2], strict=True):
                ids.append(self.ids[token])
                ids += inners[chunk]
            result.append(ids)
        return result

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of some ids, as Hugging Face's fast tokenizer writes it.

        One leading space goes, where the model puts "▁" before a text; special tokens appear as their text or
        are left out. Ids may stop within a character: what is not UTF-8 becomes U+FFFD, one for an unfinished
        character (Hugging Face puts one for each byte of the whole run of byte tokens).

        Raises ValueError for an id outside 0..vocab_size - 1.
        """
        table, special = self._bytes_of
        parts = []
        for position, i in enumerate(map(operator.index, ids)):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"ids[{position}]: found {i}, expected one in 0..{self.vocab_size - 1}")
            if not (skip_special_tokens and i in special):
                parts.append(table[i])
        text = b"".join(parts).decode("utf-8", errors="replace")
        return text[1:] if self._prefixed and text.startswith(" ") else text

    @functools.cached_property
    def _bytes_of(self) -> tuple[list[bytes], frozenset[int]]:
        """The bytes each id stands for, and which ids are special."""
        table = [
            bytes.fromhex(piece[3:5]) if byte else piece.replace(_SPACE, " ").encode()  # byte: "<0xE4>"
            for piece, byte in zip(self._pieces, self._is_byte, strict=True)
        ]
        table += [b""] * (self.vocab_size - len(table))
        for token, i in self.ids.items():
            table[i] = token.encode()
        return table, frozenset(self.ids.values())

    def splits_digits(self) -> bool:
        """Whether every ASCII digit is a token of its own, in any context, as for LLaMA, Mistral and Gemma.

        Then a number of n digits takes n tokens and cuts the text around it in two: exchanging a digit changes no
        other token, so a text's length depends on how many digits its numbers have, not on which. Read off the
        vocabulary: each digit is a token, and none holds a digit and anything else. One "▁1" is enough for False,
        because where "▁2" is no piece, ` 1` and ` 2` differ in length. Marks with a letter, `<h1>` or `[x=0]`, do
        not count: no number runs into one.
        """
        mark = re.compile(rb"<.*[A-Za-z].*>|\[.*[A-Za-z].*\]")
        held = {text for text in self._bytes_of[0] if re.search(rb"[0-9]", text) and not mark.fullmatch(text)}
        return held == {b"%d" % digit for digit in range(10)}

    def digit_ids(self) -> list[int]:
        """The ids that hold a decimal digit of any script, or a byte that may begin one.

        A text without them has no number that a parser could find.
        """
        leads = {char.encode()[:1] for char in map(chr, range(sys.maxunicode + 1)) if char.isdecimal()}
        found = []
        for i, text in enumerate(self._bytes_of[0]):
            if text in leads or any(char.isdecimal() for char in text.decode(errors="ignore")):
                found.append(i)
        return found


def encode_query(text: str, tokenizer: Tokenizer, length: int) -> list[int]:
    """A text for the first stage, `length` ids: lower case, cut to leave room for the end id, padded.

    As SigLIP2's text tower was trained (big_vision: lower, no begin id, a "sticky" end id, padding to full length).
    """
    ids = tokenizer.encode(text.lower())[: length - 1] + [tokenizer.eos_id]
    return ids + [tokenizer.pad_id] * (length - len(ids))


def train_demo(
    texts: Iterable[str],
    vocab_size: int,
    path: str | os.PathLike[str] | None = None,
) -> Tokenizer:
    """Trains a small LLaMA-like tokenizer: BPE, byte fallback, single digits, text kept as it is.

    No piece holds more than two Han characters.

    The special tokens go on top of the model, not into it: a demo has the layout of the published vocabulary
    and takes the same path through the code. Where the texts hold them they are cut out, so that no piece
    learns a part of one. The same texts in the same order give the same model, byte for byte.

    Args:
      texts: sentences or whole dialogues in any language, a few hundred or 1e5 of them; all are used.
      vocab_size: of the model, special tokens not counted. It holds 3 control pieces, 256 bytes, the digits
        and the characters of the texts, and is smaller where these have no more pairs to merge.
      path: where to write the `.model` file as well.

    Raises ValueError where the texts are empty, and where `vocab_size` is too small for their characters.
    """
    cut = re.compile("|".join(map(re.escape, ("\n", "<unk>", "<s>", "</s>", *VIDEO_TOKENS))))
    # Chinese has no spaces that end a word, so pieces of text that repeats itself would be whole clauses. Cut into
    # pairs from the first character of a run and from the second, it gives pieces of two characters at most.
    lines = [line for text in texts for line in cut.split(text) if line.strip()]
    lines = [pairs.sub(_BORDER + r"\g<0>" + _BORDER, line) for line in lines for pairs in _PAIRS]
    if not lines:
        raise ValueError("texts: found none with a character in it, expected sentences to train on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=0.9995,  # of the texts' characters; the rest is spelt in bytes
            byte_fallback=True,
            pretokenization_delimiter=_BORDER,
            split_digits=True,
            required_chars="0123456789",
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 30,  # longer ones are dropped without a word
            shuffle_input_sentence=False,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"vocab_size: found {vocab_size}, expected one that fits: {error}") from error
    if path is not None:
        with open(path, "wb") as file:
            file.write(model.getvalue())
    return Tokenizer.from_proto(model.getvalue())


def _processor(proto: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(proto)
    except RuntimeError as error:
        found = f"{len(proto)} bytes that begin {proto[:20]!r}"
        raise ValueError(f"{name}: found {found}, expected a whole SentencePiece .model file") from error
    return processor
