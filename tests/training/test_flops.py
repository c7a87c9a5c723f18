"""The count of a step's arithmetic, against the products that JAX traces, and by hand."""

import dataclasses
import math

import jax
import pytest
from jax.interpreters import partial_eval

from configs import interllava_7b, tiny
from ivcr_jax import flops
from ivcr_jax.data.batches import BatchShape, empty_batch
from ivcr_jax.losses import LossConfig
from ivcr_jax.models.lora import LoraConfig
from ivcr_jax.sharding import MeshConfig, make_mesh
from ivcr_jax.training import Program, read_config

FRAME_TEXT = 18
FIRST = LossConfig(lm=0, rank=0, moment=0, moment_l1=0, moment_iou=0, contrastive=1)


def products(jaxpr):
    """FLOPs of all matrix products of a program, a scan's body as often as it runs."""
    total = 0
    for operation in jaxpr.eqns:
        times = operation.params["length"] if operation.primitive.name == "scan" else 1
        if operation.primitive.name == "dot_general":
            (contracted, _), _ = operation.params["dimension_numbers"]
            left = operation.invars[0].aval.shape
            total += 2 * math.prod(operation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
        for value in operation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * products(inner)
    return total


def traced(config, features, *, step):
    """Products of a train step, or of the forward pass alone."""
    config = dataclasses.replace(config, mesh=MeshConfig(1, 1, 1))
    program = Program(config, make_mesh(config.mesh, jax.devices()[:1]))
    tower = (config.model or config.retriever).vit
    shape = (tower.patches + tower.cls_token, tower.width) if features else (tower.image_size, tower.image_size, 3)
    of_batch = BatchShape("features" if features else "frames", shape, "float16" if features else "uint8", FRAME_TEXT)
    rows = config.data.batch_size
    batch = {
        name: jax.ShapeDtypeStruct((rows, *array.shape[1:]), array.dtype)
        for name, array in empty_batch(1, config.pack, of_batch).items()
    }
    if step:
        return products(jax.make_jaxpr(program._train_step)(program.state, program.frozen, batch).jaxpr)

    def forward(params, frozen, batch):
        return program._apply(program.merge(params, frozen), batch, None)[0]

    jaxpr = jax.make_jaxpr(forward)(program.state.params, program.frozen, batch).jaxpr
    return products(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])  # as XLA does


def counted(config, features, factors=None):
    """By the formula; without factors nothing is trained, which is the forward pass."""
    paths = Program(config, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])).factors
    factors = dict.fromkeys(paths, 0.0) if factors is None else factors
    return flops.train_step(config, factors, frame_text=FRAME_TEXT, features=features)


def masked_half(config):
    """The half of the decoder's attention that the mask leaves out, and XLA's plain attention computes all the same."""
    if config.model is None or not config.losses.decode:
        return 0
    c, data = config.model.llama, config.data
    return c.layers * data.batch_size * data.seq_len**2 * 2 * c.head_size * c.heads


TINY = tiny.config()
SEVEN = read_config(interllava_7b.get_config())


@pytest.mark.parametrize(
    "config, features",
    [
        (TINY, True),
        (TINY, False),
        (dataclasses.replace(TINY, losses=FIRST), False),
        (tiny.config("retriever"), True),
        (SEVEN, True),
        (dataclasses.replace(SEVEN, data=dataclasses.replace(SEVEN.data, batch_size=1)), False),
    ],
    ids=["tiny", "tiny frames", "tiny first stage", "tiny no decoder", "7b", "7b frames"],
)
def test_the_forward_pass_is_what_jax_traces(config, features):
    if config.model:
        config = dataclasses.replace(config, compute=dataclasses.replace(config.compute, attention="xla", remat="none"))
    found = traced(config, features, step=False)
    assert counted(config, features) + masked_half(config) == pytest.approx(found, rel=0.01)


ALL = ((".*", 1.0),)
FROZEN = tiny.config().optim.rules
LORA = ((r"model\.llama\..*\.lora\..*", 1.0), (r"model\.llama\..*", 0.0), (r".*\.vit\.(?!head).*", 0.0), (".*", 1.0))


@pytest.mark.parametrize("rules, features", [(ALL, False), (FROZEN, True), (FROZEN, False), (LORA, True)])
def test_a_step_is_what_jax_traces(rules, features):
    """With its backward pass: nothing for what is frozen and has nothing trained before it."""
    model = dataclasses.replace(TINY.model, lora=LoraConfig(rank=4 if rules is LORA else 0))
    compute = dataclasses.replace(TINY.compute, attention="xla")  # of "auto", the ways of all platforms are traced
    config = dataclasses.replace(TINY, model=model, optim=dataclasses.replace(TINY.optim, rules=rules), compute=compute)
    program = Program(config, make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1]))
    head = 2 * config.data.batch_size * config.data.seq_len * 128 * (tiny.VOCAB + 5)  # logits are computed twice
    found = traced(config, features, step=True) - head
    assert counted(config, features, program.factors) + 3 * masked_half(config) == pytest.approx(found, rel=0.03)


def test_a_text_tower_by_hand():
    """One layer of width 4 over 2 words, an MLP of 8, in a batch of one turn; and a video of one frame of one patch."""
    vit = dataclasses.replace(
        TINY.retriever.vit, image_size=8, patch_size=8, stem=(), width=4, heads=1, layers=1, mlp_width=8
    )
    text = dataclasses.replace(TINY.retriever.text, max_tokens=2, width=4, heads=1, layers=1, mlp_width=8)
    retriever = dataclasses.replace(TINY.retriever, vit=dataclasses.replace(vit, map_head=False), text=text)
    data = dataclasses.replace(TINY.data, batch_size=1, video_slots=1, max_turns=1, frames=1)
    config = dataclasses.replace(
        TINY, retriever=dataclasses.replace(retriever, frame_layers=0), data=data, losses=FIRST, model=None
    )
    words = 2 * (4 * 2 * 4 * 4) + 2 * (2 * 2 * 4 * 8) + 2 * 2 * 2 * 2 * 4  # projections, MLP, scores and their sums
    head = 2 * 4 * 4
    patch = (8 * 8 * 3) * 4 * 2 + (4 * 2 * 4 * 4) + (2 * 2 * 4 * 8) + 2 * 2 * 4
    assert counted(config, False) == words + head + patch
