"""The optimiser: which parameters are trained, at what rate, and by what rule. Knows paths and shapes, no model."""

import dataclasses
import re
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import optax

from ivcr_jax.config import listed

B1, EPS = 0.9, 1e-8  # of AdamW


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW (arXiv 1711.05101) and its schedule. The defaults are the published ones, gradient clipping apart.

    Attributes:
      rules: (regular expression, factor) pairs. The first that matches the whole path of a parameter gives the factor
        on its learning rate; 0 freezes it: no gradient, no optimiser state.
      peak_lr, initial_lr, final_lr, warmup: see `schedule`; warmup is a share of the steps.
      b2, weight_decay: of AdamW. What has one axis (norms, biases) does not decay.
      clip: the largest norm of all gradients together; 0 for no limit.
    """

    rules: tuple[tuple[str, float], ...] = ((".*", 1.0),)
    peak_lr: float = 3e-5
    initial_lr: float = 1e-6
    final_lr: float = 1e-5
    warmup: float = 0.2
    b2: float = 0.999
    weight_decay: float = 0.05
    clip: float = 1.0

    def __post_init__(self) -> None:
        for pattern, factor in self.rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"rules: {pattern!r} is no regular expression: {error}") from None
            if factor < 0:
                raise ValueError(f"rules: the factor of {pattern!r} is {factor}; expected 0 or more")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is {self.warmup}; expected a share of the steps, at least 0 and under 1")


def factors(config: OptimConfig, paths: Iterable[str]) -> dict[str, float]:
    """The factor on each parameter's learning rate.

    Raises:
      ValueError: for a parameter that no rule covers, or a rule that is the first to match none: a misspelt one.
    """
    found, uncovered, used = {}, [], set()
    for path in paths:
        rule = next((rule for rule in config.rules if re.fullmatch(rule[0], path)), None)
        if rule is None:
            uncovered.append(path)
        else:
            found[path] = rule[1]
            used.add(rule)
    if uncovered:
        raise ValueError(f"optim.rules cover no {listed(uncovered)}")
    if idle := [pattern for pattern, factor in config.rules if (pattern, factor) not in used]:
        raise ValueError(f"optim.rules: nothing is left for {listed(idle)} to match; check the names and the order")
    if not any(found.values()):
        raise ValueError("optim.rules freeze every parameter; expected some to train")
    return found


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step, as published (Video-LLaMA's linear_warmup_cosine_lr).

    A straight line from `initial_lr` towards `peak_lr` over the first `warmup` share; from there on the cosine from
    peak to `final_lr`, which runs over all steps, so it does not begin at its peak.
    """
    warm = round(config.warmup * steps)

    def rate(step: jax.Array) -> jax.Array:
        share = jnp.clip(step / steps, 0, 1)
        cosine = config.final_lr + (config.peak_lr - config.final_lr) * (1 + jnp.cos(jnp.pi * share)) / 2
        line = config.initial_lr + (config.peak_lr - config.initial_lr) * step / max(warm, 1)
        return jnp.where(step < warm, line, cosine)

    return rate


def make(
    config: OptimConfig, steps: int, trained: Mapping[str, float], axes: Mapping[str, int]
) -> optax.GradientTransformation:
    """The optimiser of a flat dict of parameters by path.

    Args:
      config, steps: of the schedule and the rule.
      trained: each parameter's factor on the learning rate.
      axes: how many axes each has in one layer.
    """

    def scaled(updates: optax.Updates, params: optax.Params = None) -> optax.Updates:
        return {path: update * trained[path] for path, update in updates.items()}

    return optax.chain(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.scale_by_adam(B1, config.b2, EPS),
        optax.add_decayed_weights(config.weight_decay, {path: axes[path] > 1 for path in trained}),
        optax.stateless(scaled),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )
