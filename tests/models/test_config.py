"""Sizes of the published models, configurations as trees, and that every field of them does something."""

import dataclasses
import functools
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import hardware, interllava_7b, retriever, tiny
from ivcr_jax.bundle import BundleConfig
from ivcr_jax.config import from_dict, to_dict
from ivcr_jax.data.prompt import PromptStyle
from ivcr_jax.models import lora
from ivcr_jax.models.heads import MomentHead, MomentHeadConfig, RankHead, RankHeadConfig
from ivcr_jax.models.interllava import InterLLaVA, InterLLaVAConfig
from ivcr_jax.models.layers import REMAT_POLICIES, Compute
from ivcr_jax.models.llama import Llama, LlamaConfig
from ivcr_jax.models.lora import LoraConfig
from ivcr_jax.models.qformer import QFormer
from ivcr_jax.models.retriever import Retriever, RetrieverConfig, TextConfig, TextTower
from ivcr_jax.models.video_encoder import VideoEncoder, VideoEncoderConfig
from ivcr_jax.models.vit import ViT, ViTConfig
from ivcr_jax.training import read_config
from tests.models.conftest import F32, QFORMER, VIDEO_QFORMER, VIT, fill, operations

# Sizes


@pytest.fixture(scope="module")
def published():
    """The published model, abstract: 8 billion parameters that take no memory."""
    return nnx.eval_shape(lambda: InterLLaVA(InterLLaVAConfig(llama_ids_for_qformer=True), nnx.Rngs(0)))


def count_parameters(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def test_the_published_sizes(published):
    encoder = published.encoder
    assert count_parameters(encoder.vit) == 985_894_528
    assert count_parameters(encoder.qformer) - encoder.qformer.queries.size == 185_660_160
    assert encoder.qformer.queries.shape == (32, 768)
    assert count_parameters(encoder.video_qformer) - encoder.video_qformer.queries.size == 18_905_088
    assert encoder.frame_positions.shape == (64, 768)
    assert count_parameters(encoder.projection) == 3_149_824
    adapted = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(published, nnx.LoRAParam)))
    assert adapted == 33_554_432
    llama = published.llama
    added = llama.added_embedding.size + llama.added_head.kernel.size
    assert (llama.added_embedding.shape, llama.added_head.kernel.shape) == ((5, 4096), (4096, 5))
    assert count_parameters(llama) - adapted - added == 6_738_415_616
    alone = nnx.eval_shape(lambda: Llama(LlamaConfig(added_tokens=0), nnx.Rngs(0)))
    assert count_parameters(alone) == 6_738_415_616


PRESETS = {
    "configs/interllava_7b.py": lambda: interllava_7b.get_config(),
    "configs/interllava_7b.py:published": lambda: interllava_7b.get_config("published"),
    **{f"configs/tiny.py:{stage}": functools.partial(tiny.get_config, stage) for stage in tiny.STEPS},
    **{
        f"configs/interllava_7b.py:{chip}:{key}": functools.partial(interllava_7b.get_config, f"{chip}:{key}")
        for chip, settings in hardware.CHIPS.items()
        for key in settings
    },
    "configs/retriever.py": retriever.get_config,
    "configs/retriever.py:tiny": lambda: retriever.get_config("tiny"),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build_and_come_back_from_json(name):
    values = PRESETS[name]()
    whole = read_config(values)
    config = whole.bundle
    assert BundleConfig.from_values(values.to_dict()) == config
    assert BundleConfig.from_json(config.to_json()) == config
    assert to_dict(whole) == values.to_dict()
    assert config.model is not None or config.retriever is not None
    for made in (
        config.model and nnx.eval_shape(lambda: InterLLaVA(config.model, nnx.Rngs(0))),
        config.retriever and nnx.eval_shape(lambda: Retriever(config.retriever, nnx.Rngs(0))),
    ):
        if made is not None:
            axes = [(v.get_metadata("axes"), v.shape) for v in jax.tree.leaves(nnx.state(made), is_leaf=is_variable)]
            assert all(len(names) in (len(shape), len(shape) - 1) for names, shape in axes)
    assert len(list(leaves(whole))) <= 150


def is_variable(leaf):
    return isinstance(leaf, nnx.Variable)


def test_presets_are_what_they_say():
    config = BundleConfig.from_values(interllava_7b.get_config("published").to_dict())
    assert config.model.layout == "inline" and config.model.llama_ids_for_qformer
    assert config.model.video == VideoEncoderConfig(keep_text_tokens=True, attend_to_pads=True)
    assert config.style == PromptStyle(localized=False, last_frame_seconds_bug=True)
    config = BundleConfig.from_values(interllava_7b.get_config().to_dict())
    assert config.model == InterLLaVAConfig(llama_ids_for_qformer=True) and config.style == PromptStyle()
    small = BundleConfig.from_values(tiny.get_config().to_dict())
    made = nnx.eval_shape(lambda: InterLLaVA(small.model, nnx.Rngs(0)))
    assert 1.1e6 < count_parameters(made) < 1.4e6
    with pytest.raises(ValueError, match="found stage 'all', expected one of retriever, both, long-retriever, long"):
        tiny.get_config("all")
    with pytest.raises(ValueError, match="retriever.py:other; expected nothing or :tiny"):
        retriever.get_config("other")
    with pytest.raises(ValueError, match="no settings for 'v5e:3x3'; expected one of v5e:4x4, v5e:4x4:frames"):
        interllava_7b.get_config("v5e:3x3")
    lying = read_config(interllava_7b.get_config("v5e:16x16:2"))
    assert (lying.mesh.data, lying.mesh.slices, lying.mesh.fsdp, lying.data.batch_size) == (2, 2, 256, 512)
    assert importlib.import_module("configs").__file__.endswith("__init__.py")


# Trees


def leaves(config, path=()):
    """The paths of a configuration's fields, those of nested ones too."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, (*path, field.name))
        else:
            yield (*path, field.name)


def get(config, path):
    return functools.reduce(getattr, path, config)


def replaced(config, path, value):
    name, *rest = path
    if rest:
        value = replaced(getattr(config, name), rest, value)
    return dataclasses.replace(config, **{name: value})


WHOLE = BundleConfig(InterLLaVAConfig(), RetrieverConfig(), PromptStyle())


@pytest.mark.parametrize("path", list(leaves(WHOLE)), ids=".".join)
def test_every_field_is_required_and_of_its_type(path):
    values = json.loads(WHOLE.to_json())
    *folders, name = path
    folder = functools.reduce(lambda node, part: node[part], folders, values)
    value = folder.pop(name)
    where = ".".join(["config", *folders])
    with pytest.raises(ValueError, match=rf"^{where}: missing fields \['{name}'\], unknown fields none$"):
        BundleConfig.from_values(values)
    for wrong in (None, {"a": 1}, "?" if not isinstance(value, str) else 7, True if value is not True else 1):
        if isinstance(value, bool) and isinstance(wrong, bool):
            continue
        folder[name] = wrong
        with pytest.raises(ValueError, match=rf"^{where}.{name} is "):
            BundleConfig.from_values(values)
    folder[name] = value
    folder["surplus"] = value
    with pytest.raises(ValueError, match=rf"^{where}: missing fields none, unknown fields \['surplus'\]$"):
        BundleConfig.from_values(values)


def test_trees_are_read_strictly():
    values = to_dict(InterLLaVAConfig())
    assert from_dict(InterLLaVAConfig, values) == InterLLaVAConfig()
    values["llama"]["kv_heads"] = 5
    with pytest.raises(ValueError, match="^model.llama: heads 32 is not a multiple of kv_heads 5"):
        from_dict(InterLLaVAConfig, values, "model")
    vit = to_dict(ViTConfig())
    for wrong in ([0.5, 0.5], [0.5, 0.5, "0.5"], 0.5):
        with pytest.raises(ValueError, match="^config.pixel_mean"):
            from_dict(ViTConfig, vit | {"pixel_mean": wrong})
    assert from_dict(ViTConfig, vit | {"pixel_mean": [0, 1, 0.5]}).pixel_mean == (0.0, 1.0, 0.5)
    assert isinstance(from_dict(ViTConfig, vit | {"norm_eps": 1}).norm_eps, float)
    with pytest.raises(ValueError, match="^config.width is 16.0; expected int"):
        from_dict(ViTConfig, vit | {"width": 16.0})


# Every field does something

MODEL = InterLLaVAConfig(
    vit=VIT,
    qformer=QFORMER,
    video_qformer=dataclasses.replace(VIDEO_QFORMER, layers=2),
    video=VideoEncoderConfig(max_frames=6, window=3, stride=3),
    llama=LlamaConfig(vocab_size=44, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48),
    lora=LoraConfig(rank=2, alpha=1.0, targets=r"llama\.layers\.(q|v)"),
    rank=RankHeadConfig(width=16, heads=2),
    moment=MomentHeadConfig(width=16, layers=1, heads=2),
)
RETRIEVER = RetrieverConfig(
    vit=dataclasses.replace(VIT, map_head=True),
    text=TextConfig(vocab_size=40, max_tokens=6, width=16, layers=1, heads=2, mlp_width=24),
    frame_layers=1,
    max_frames=4,
)
# Another value of each field, by its class. A field without one here fails the test: give it one that changes the
# parameters, or the outputs.
OTHER = {
    "ViTConfig": {
        "image_size": 12, "patch_size": 2, "stem": (5,), "width": 8, "layers": 1, "heads": 4, "mlp_width": 20,
        "activation": "gelu_tanh", "norm_eps": 0.1, "cls_token": False, "key_bias": True, "final_norm": True,
        "map_head": lambda value: not value, "pixel_mean": (0.5, 0.4, 0.3), "pixel_std": (0.5, 0.4, 0.3),
    },
    "QFormerConfig": {
        "queries": 3, "width": 8, "layers": 4, "heads": 4, "mlp_width": 20, "cross_every": lambda value: 3 - value,
        "vocab_size": 48, "max_text": 20, "norm_eps": 0.1, "dropout": 0.5,
    },
    "VideoEncoderConfig": {
        "max_frames": 5, "window": 2, "stride": 2, "keep_text_tokens": True, "attend_to_pads": True,
    },
    "LlamaConfig": {
        "vocab_size": 48, "added_tokens": 3, "width": 16, "layers": 1, "heads": 8, "kv_heads": 4, "head_dim": 16,
        "mlp_width": 32, "norm_eps": 0.1, "rope_theta": 100.0, "tied": True,
    },
    "RopeScaling": {
        "kind": "linear", "factor": 3.0, "low_freq_factor": 1.5, "high_freq_factor": 16.0, "original_positions": 60,
    },
    "LoraConfig": {"rank": 3, "alpha": 2.0, "dropout": 0.5, "targets": r"llama\.layers\.(q|k)"},
    "RankHeadConfig": {"width": 8, "heads": 4, "first_stage": True},
    "MomentHeadConfig": {"width": 8, "layers": 2, "heads": 4, "first_width": 12},
    "InterLLaVAConfig": {"layout": "inline", "llama_ids_for_qformer": True},
    "TextConfig": {
        "vocab_size": 44, "max_tokens": 5, "width": 8, "layers": 2, "heads": 4, "mlp_width": 20, "activation": "gelu",
        "norm_eps": 0.1,
    },
    "RetrieverConfig": {"frame_layers": 2, "max_frames": 5},
}  # fmt: skip
ROPE = {"kind": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 8.0, "original_positions": 40}
# What a field needs beside it to mean anything.
NEEDS = {
    "qformer.vocab_size": {"llama_ids_for_qformer": True},
    "video.attend_to_pads": {"video.keep_text_tokens": True},
    **{f"llama.rope_scaling.{name}": {f"llama.rope_scaling.{k}": v for k, v in ROPE.items()} for name in ROPE},
}
# Fields that only one value is right for, and that say so.
REFUSED = {
    "video_qformer.vocab_size": "max_text is 0; expected at least 1 where there is text",
    "video_qformer.max_text": "max_text is 20; expected 0 where there is no text",
}


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Adapted(nnx.Module):
    """A decoder with LoRA, and nothing else, under the path it has in the whole."""

    def __init__(self, config, rngs):
        self.llama = Llama(config.llama, rngs, F32)
        lora.add(self, config.lora, rngs)


TEXT = np.array([[3, 4, 5, 6], [3, 4, 5, 0]], np.int32)
FRAMES = np.random.default_rng(1).integers(0, 256, (2, 3, 8, 8, 3)).astype(np.uint8)


def read_llama(llama, key):
    tokens = np.arange(24, dtype=np.int32)[None] % 20
    hidden, _ = llama(llama.embed(tokens), tokens * 2, np.ones_like(tokens), None, None, key)
    return llama.logits(hidden)


# How the whole makes each part, and what is compared of it.
PARTS = {
    "vit": (lambda c, rngs: ViT(c.vit, rngs, F32), lambda vit, key: vit(FRAMES[0])),
    "qformer": (
        lambda c, rngs: QFormer(c.text_qformer, c.vit.width, rngs, F32),
        lambda qformer, key: qformer(random(2, 5, VIT.width), None, TEXT, TEXT > 0, key),
    ),
    "video_qformer": (
        lambda c, rngs: QFormer(c.video_qformer, c.qformer.width, rngs, F32),
        lambda qformer, key: qformer(random(2, 5, QFORMER.width), key=key),
    ),
    "video": (
        lambda c, rngs: VideoEncoder(c.vit, c.text_qformer, c.video_qformer, c.video, 8, rngs, F32),
        lambda encoder, key: encoder(random(1, 6, 5, VIT.width), text=np.tile(TEXT, (3, 1))[None]).tokens,
    ),
    "llama": (lambda c, rngs: Llama(c.llama, rngs, F32), read_llama),
    "lora": (Adapted, lambda model, key: read_llama(model.llama, key)),
    "rank": (
        lambda c, rngs: RankHead(c.rank, 32, rngs),
        lambda head, key: head(
            random(2, 32), head.keys(random(2, 3, 4, 32)), np.ones((2, 3, 4), bool),
            random(2, 3) if head.config.first_stage else None,
        ),
    ),
    "moment": (
        lambda c, rngs: MomentHead(c.moment, 32, 16, rngs, F32),
        lambda head, key: head(
            random(2, 32), head.keys(random(2, 3, 4, 16)), np.arange(3.0)[None].repeat(2, 0), np.ones((2, 3), bool),
            np.full(2, 4.0), random(2, head.config.first_width) if head.config.first_width else None,
        ).start_logits,
    ),
    "layout": (InterLLaVA, lambda model, key: np.float32(model.blocks(TEXT) is None)),
    "llama_ids_for_qformer": (lambda c, rngs: QFormer(c.text_qformer, c.vit.width, rngs, F32), None),
}  # fmt: skip
OF_RETRIEVER = {
    "vit": (lambda c, rngs: ViT(c.vit, rngs, F32), lambda vit, key: vit.pool(vit(FRAMES[0]))),
    "text": (
        lambda c, rngs: TextTower(c.text, c.vit.width, rngs, F32),
        lambda tower, key: tower(np.arange(6, dtype=np.int32)[None]),
    ),
    "frame_layers": (lambda c, rngs: Retriever(c, rngs, F32), None),
    "max_frames": (lambda c, rngs: Retriever(c, rngs, F32), None),
}


def parameters(abstract):
    flat = nnx.to_flat_state(nnx.state(abstract))
    return {".".join(map(str, path)): (value.shape, type(value)) for path, value in flat}


def part_of(config, part):
    """(how the part is made, what is compared)."""
    make, call = (PARTS if isinstance(config, InterLLaVAConfig) else OF_RETRIEVER)[part]
    return functools.partial(make, config), call


@functools.cache
def made(part, config):
    """The part of a configuration, abstract."""
    make, _ = part_of(config, part)
    return nnx.eval_shape(lambda: make(nnx.Rngs(0)))


@functools.cache
def output(part, config):
    _, call = part_of(config, part)
    if part == "layout":
        return call(made(part, config), None)
    return np.asarray(nnx.jit(call)(fill(nnx.clone(made(part, config))), jax.random.key(0)))


FIELDS = [(InterLLaVAConfig, path) for path in leaves(MODEL)] + [(RetrieverConfig, path) for path in leaves(RETRIEVER)]


@pytest.mark.parametrize(("kind", "path"), FIELDS, ids=[f"{k.__name__}-{'.'.join(p)}" for k, p in FIELDS])
def test_every_field_changes_the_parameters_or_the_output(kind, path):
    base = MODEL if kind is InterLLaVAConfig else RETRIEVER
    name = ".".join(path)
    if kind is InterLLaVAConfig:
        for other, value in NEEDS.get(name, {}).items():
            base = replaced(base, other.split("."), value)
    owner = type(get(base, path[:-1])).__name__
    assert path[-1] in OTHER.get(owner, {}), f"{owner}.{path[-1]} has no other value in this test: is it live?"
    value = OTHER[owner][path[-1]]
    was = get(base, path)
    value = value(was) if callable(value) else value
    assert value != was
    if kind is InterLLaVAConfig and name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            replaced(base, path, value)
        return
    changed = replaced(base, path, value)
    a, b = (parameters(made(path[0], config)) for config in (base, changed))
    if a != b:
        return
    a, b = (output(path[0], config) for config in (base, changed))
    assert a.shape != b.shape or np.abs(a - b).max() > 1e-5
    assert np.isfinite(a).all() and np.isfinite(b).all()


def test_the_whole_gives_each_part_its_own_configuration(published):
    """With the test above: so every field of the whole does something in it."""
    config = published.config
    assert published.encoder.vit.config is config.vit
    assert published.encoder.qformer.config is config.qformer is config.text_qformer
    assert published.encoder.video_qformer.config is config.video_qformer
    assert published.encoder.config is config.video
    assert published.llama.config is config.llama
    assert published.rank.config is config.rank and published.moment.config is config.moment
    assert set(lora.adapted(published)) == {f"llama.layers.{name}" for name in "qkvo"}
    assert {linear.lora.scale for linear in lora.adapted(published).values()} == {1.0}
    assert {linear.lora.dropout for linear in lora.adapted(published).values()} == {0.1}
    first = nnx.eval_shape(lambda: Retriever(RETRIEVER, nnx.Rngs(0)))
    assert first.vit.config is RETRIEVER.vit and first.text.config is RETRIEVER.text and first.config is RETRIEVER
    of_decoder = LlamaConfig(vocab_size=50, width=64)
    words = dataclasses.replace(MODEL, llama=of_decoder).text_qformer
    assert words == dataclasses.replace(QFORMER, vocab_size=50)


# How it is computed


def program(compute):
    """The whole model's operations, (name, parameters, types of what goes in), those of nested programs too."""
    model = nnx.eval_shape(lambda: InterLLaVA(MODEL, nnx.Rngs(0), compute))
    definition, state = nnx.split(model)

    def run(state, frames, mask, text, x, marks):
        model = nnx.merge(definition, state)
        videos = model.encoder(frames, mask, text)
        hidden, _ = model.llama(x, marks, marks, marks)
        keys = model.moment.keys(videos.frames)
        return hidden, model.moment(hidden[:2, 0], keys, mask * 1.0, mask, mask[:, 0] * 9.0).start_logits

    mask, x, marks = jnp.ones((2, 3), bool), jnp.zeros((2, 8, 32)), jnp.ones((2, 8), jnp.int32)
    closed = jax.make_jaxpr(run)(state, FRAMES, mask, np.tile(TEXT[:1], (2, 3, 1)), x, marks)
    return [(o.primitive.name, o.params, [str(value.aval) for value in o.invars]) for o in operations(closed.jaxpr)]


def test_every_way_to_compute_is_another_program():
    """Each remat policy in all five stacks of layers; splash in the decoder; the dtype in every product."""
    plain = program(Compute("float32", attention="xla"))
    names = {name for name, _, _ in plain}
    assert not names & {"checkpoint", "remat2", "pallas_call", "platform_index"} and "dot_general" in names
    assert not any("bfloat16" in kind for _, _, kinds in plain for kind in kinds)
    for policy in REMAT_POLICIES[1:]:
        found = program(Compute("float32", remat=policy, attention="xla"))
        used = [params["policy"] for name, params, _ in found if name in ("checkpoint", "remat2")]
        expected = getattr(jax.checkpoint_policies, "nothing_saveable" if policy == "full" else policy)
        assert used == [expected] * 5, policy
    for how in ("splash", "auto"):
        names = {name for name, _, _ in program(Compute("float32", attention=how))}
        assert {"pallas_call", "platform_index"} <= names, "both choose by the platform compiled for"
    products = [kinds for name, _, kinds in program(Compute(attention="xla")) if name == "dot_general"]
    in_f32 = [kinds for kinds in products if any(kind.startswith("float32") for kind in kinds)]
    assert len(products) > 60 and not in_f32, in_f32


def test_fields_of_compute():
    # The last is in test_interllava.
    assert [field.name for field in dataclasses.fields(Compute)] == ["dtype", "remat", "attention", "videos_at_once"]
