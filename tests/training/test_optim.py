"""The schedule as published, AdamW as PyTorch has it, and which rule is a parameter's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ivcr_jax import optim
from ivcr_jax.optim import OptimConfig


def test_the_published_schedule():
    rate = optim.schedule(OptimConfig(), 250_000)
    expected = {0: 1e-6, 25_000: 1.55e-5, 50_000: 2.81e-5, 100_000: 2.31e-5, 150_000: 1.69e-5, 200_000: 1.19e-5}
    for step, value in expected.items():
        assert float(rate(jnp.int32(step))) == pytest.approx(value, rel=3e-3), step
    assert float(rate(jnp.int32(250_000))) == float(rate(jnp.int32(999_999))) == pytest.approx(1e-5)
    flat = optim.schedule(OptimConfig(peak_lr=1e-3, final_lr=0.0, warmup=0.0), 10)
    assert float(flat(jnp.int32(0))) == pytest.approx(1e-3) and float(flat(jnp.int32(5))) == pytest.approx(5e-4)


@pytest.mark.torch
@pytest.mark.parametrize("clip", [0.0, 0.7])
def test_a_step_is_pytorchs(clip):
    import torch

    config = OptimConfig(peak_lr=0.02, initial_lr=0.003, final_lr=0.001, warmup=0.3, weight_decay=0.3, clip=clip)
    shapes = {"a.kernel": (3, 4), "a.bias": (4,), "slow.kernel": (4, 2), "layers.norm": (2, 4)}
    trained = {"a.kernel": 1.0, "a.bias": 1.0, "slow.kernel": 0.25, "layers.norm": 1.0}
    axes = {"a.kernel": 2, "a.bias": 1, "slow.kernel": 2, "layers.norm": 1}  # a stack of norms is one of vectors
    rng = np.random.default_rng(0)
    begin = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
    steps = 7

    theirs = {path: torch.nn.Parameter(torch.tensor(value)) for path, value in begin.items()}
    groups = [
        {"params": [theirs[path]], "weight_decay": 0.3 if axes[path] > 1 else 0.0, "factor": factor}
        for path, factor in trained.items()
    ]
    adam = torch.optim.AdamW(groups, lr=1.0, betas=(optim.B1, config.b2), eps=optim.EPS)
    rate = optim.schedule(config, steps)
    rule = optim.make(config, steps, trained, axes)
    params = {path: jnp.asarray(value) for path, value in begin.items()}
    state = rule.init(params)
    for step in range(steps):
        gradients = {path: (step + 1) * rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
        for path, value in gradients.items():
            theirs[path].grad = torch.tensor(value)
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs.values(), clip)
        for group in adam.param_groups:
            group["lr"] = float(rate(step)) * group["factor"]
        adam.step()
        updates, state = rule.update({path: jnp.asarray(value) for path, value in gradients.items()}, state, params)
        params = optax.apply_updates(params, updates)
        for path, value in params.items():
            np.testing.assert_allclose(value, theirs[path].detach().numpy(), rtol=2e-5, atol=2e-6, err_msg=path)


PATHS = ("vit.head.kernel", "vit.kernel", "llama.lora.a", "llama.kernel")


def test_the_first_rule_that_matches_a_whole_path_decides():
    config = OptimConfig(rules=((r"vit\.(?!head).*", 0.0), (r".*\.lora\..*", 2.0), (r"llama\..*", 0.0), (r".*", 1.0)))
    expected = {"vit.head.kernel": 1.0, "vit.kernel": 0.0, "llama.lora.a": 2.0, "llama.kernel": 0.0}
    assert optim.factors(config, PATHS) == expected


@pytest.mark.parametrize(
    "rules, message",
    [
        (((r"vit\..*", 1.0),), "optim.rules cover no llama.lora.a, llama.kernel"),
        (((r"lora", 1.0), (r".*", 0.5)), "nothing is left for lora to match; check the names and the order"),
        (((r".*", 1.0), (r"vit\..*", 0.0)), r"nothing is left for vit\..* to match"),
        (((r".*", 0.0),), "optim.rules freeze every parameter"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused(rules, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        optim.factors(OptimConfig(rules=rules), PATHS)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rules": (("(", 1.0),)}, "rules: '(' is no regular expression"),
        ({"rules": ((".*", -1.0),)}, "the factor of '.*' is -1.0; expected 0 or more"),
        ({"warmup": 1.0}, "warmup is 1.0; expected a share of the steps"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        OptimConfig(**change)


def test_the_state_is_two_moments_of_what_is_trained():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones(3)}
    state = optim.make(OptimConfig(), 10, dict.fromkeys(params, 1.0), {"a": 2, "b": 1}).init(params)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * 9 + 2
