"""Teaches a decoder that nobody has trained to write, before it meets a video; `ivcr_jax.pretrain` runs it.

A short training on words alone stands in for the one that LLaMA went through. A turn is some eighty tokens without its
videos, so it costs a tenth of what it does in the dialogue model's training, which is left to say what is seen.
"""

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from ivcr_jax import losses
from ivcr_jax.data import prompt
from ivcr_jax.data.dialogue import Intent, Turn
from ivcr_jax.data.tokenizer import Tokenizer
from ivcr_jax.models.layers import Compute
from ivcr_jax.models.llama import Llama, LlamaConfig

BATCH, LENGTH = 128, 96  # turns, and the tokens of one: longer ones are cut
PEAK_LR, WARMUP, B2, WEIGHT_DECAY, CLIP = 4e-3, 0.1, 0.98, 0.02, 1.0


def texts(turns: Iterable[Turn], style: prompt.PromptStyle) -> list[str]:
    """Each turn as the decoder will read it, message and answer, without its videos and without what goes before."""
    shown = (prompt.PromptTurn(turn.user, turn.answer, Intent.CHAT, turn.language) for turn in turns)
    return ["".join(prompt.render_turn(turn, style, first=False)) for turn in shown]


def train(config: LlamaConfig, tokenizer: Tokenizer, words: Sequence[str], steps: int, seed: int) -> Llama:
    """Learns to go on with texts drawn at random, messages too; the same arguments give the same weights.

    Raises ValueError where there are no texts.
    """
    if not words:
        raise ValueError("dialogues: found no turn in train, expected some to learn writing from")
    definition, parameters = nnx.split(nnx.jit(lambda: Llama(config, nnx.Rngs(seed), Compute(dtype="float32")))())
    rate = optax.warmup_cosine_decay_schedule(0, PEAK_LR, math.ceil(WARMUP * steps), max(2, steps))
    rule = optax.chain(optax.clip_by_global_norm(CLIP), optax.adamw(rate, b2=B2, weight_decay=WEIGHT_DECAY))

    def loss(parameters: nnx.State, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        llama = nnx.merge(definition, parameters)
        places = jnp.broadcast_to(jnp.arange(LENGTH), (BATCH, LENGTH))
        there = places < lengths[:, None]
        hidden, _ = llama(llama.embed(tokens[:, :-1]), places, there.astype(jnp.int32))
        return losses.lm(hidden, tokens[:, 1:], there, llama.logits) / there.sum()

    @jax.jit
    def step(parameters: nnx.State, state: Any, tokens: jax.Array, lengths: jax.Array) -> Any:
        value, gradients = jax.value_and_grad(loss)(parameters, tokens, lengths)
        updates, state = rule.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state, value

    state, started = rule.init(parameters), time.monotonic()
    for number in range(1, steps + 1):
        chosen = np.random.default_rng((seed, number)).integers(len(words), size=BATCH)
        tokens, lengths = np.zeros((BATCH, LENGTH + 1), np.int32), np.zeros(BATCH, np.int32)
        for row, ids in enumerate(tokenizer.encode_batch([words[place] for place in chosen])):
            lengths[row] = min(len(ids) - 1, LENGTH)
            tokens[row, : lengths[row] + 1] = ids[: lengths[row] + 1]
        parameters, state, value = step(parameters, state, tokens, lengths)
        if number % 50 == 0 or number == steps:
            print(f"writing: step {number}/{steps}: loss {value:.3f}, {time.monotonic() - started:.1f} s", flush=True)
    return nnx.merge(definition, parameters)
