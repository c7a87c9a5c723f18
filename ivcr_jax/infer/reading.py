"""How a message and its videos get into a context: cleaned words, the prompt, blocks or visual tokens."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ivcr_jax.data import prompt
from ivcr_jax.data.tokenizer import Tokenizer
from ivcr_jax.infer.assistant import Assistant
from ivcr_jax.infer.corpus import Corpus
from ivcr_jax.infer.engine import Context

LONGEST_MESSAGE = 512  # tokens; what is longer is cut


def clean(text: str, tokenizer: Tokenizer) -> tuple[str, list[str]]:
    """A message as the model may read it, and notes. Raises ValueError for one that holds nothing."""
    # Half a surrogate pair is no text; a control character has no meaning in one.
    text = text.encode(errors="replace").decode()
    message = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if not message:
        raise ValueError("the message holds nothing; expected some words")
    message, notes = prompt.as_text(message), []
    ids = tokenizer.encode(message)
    if len(ids) > LONGEST_MESSAGE:
        message = tokenizer.decode(ids[:LONGEST_MESSAGE]).rstrip("\ufffd")
        notes = [f"The message has {len(ids)} tokens; only the first {LONGEST_MESSAGE} were read."]
    return message, notes


def read_turn(
    assistant: Assistant,
    corpus: Corpus,
    context: Context,
    turn: prompt.PromptTurn,
    names: Sequence[str],
    *,
    first: bool,
    held: tuple[str, ...],
) -> tuple[Any, np.ndarray, tuple[str, ...]]:
    """Reads a turn's prompt with its videos.

    Args:
      context: of one row; is changed.
      turn: whose `numbers` are those of the videos `names`.
      first: whether the context has no prompt yet.
      held: the videos whose blocks are in the context, each under its place and one.

    Returns:
      for `Engine.scores` the videos' keys f[1, C, K, 2 E] and which are there, bool[1, C, K]; and what is held now.
    """
    text, _ = prompt.render_turn(turn, assistant.style, first)
    ids = assistant.tokenizer.encode(text)
    video_token = assistant.tokenizer.ids[prompt.VIDEO_TOKEN]
    places = [place for place, token in enumerate(ids) if token == video_token]
    if not assistant.isolated:
        return *_read_inline(assistant, corpus, context, ids, places, names), held
    engine = assistant.engine
    blocks = assistant.blocks(corpus, names) if names else []
    new = [name for name in dict.fromkeys(names) if name not in held]
    border = places[-1] if new else len(ids)
    before, behind = ([token for token in part if token != video_token] for part in (ids[:border], ids[border:]))
    engine.read(context, [before])
    if new:
        of_name = dict(zip(names, blocks, strict=True))
        engine.put(context, [[(len(held) + place + 1, of_name[name]) for place, name in enumerate(new)]])
        engine.read(context, [behind])
    if not blocks:
        return None, np.zeros((1, 0, 0), bool), held
    keys, there = jnp.stack([block.keys for block in blocks]), np.stack([block.there for block in blocks])
    return keys[None], there[None], (*held, *new)


def _read_inline(
    assistant: Assistant, corpus: Corpus, context: Context, ids: list[int], places: list[int], names: Sequence[str]
) -> tuple[Any, np.ndarray]:
    """As published: a video's tokens go through the decoder wherever it is mentioned."""
    engine, records = assistant.engine, [corpus.read(name) for name in names]
    if not records:
        engine.read(context, [ids])
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
    hidden = engine.read(context, [line], [np.concatenate(visual)])
    where = np.array(begins)[:, None] + np.arange(there.shape[1])
    return engine.rank_keys(hidden[0][where])[None], there[None]
