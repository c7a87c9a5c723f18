"""The decoder, and the whole chain from published files, against PyTorch with the same weights, in f32."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch as safetensors_torch
import torch
import transformers
from flax import nnx
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ivcr_jax.bundle import Bundle, BundleConfig
from ivcr_jax.convert import layouts
from ivcr_jax.convert.files import open_weights
from ivcr_jax.data.prompt import PromptStyle
from ivcr_jax.models import lora
from ivcr_jax.models.heads import MomentHeadConfig, RankHeadConfig
from ivcr_jax.models.interllava import InterLLaVA, InterLLaVAConfig
from ivcr_jax.models.llama import Llama, LlamaConfig, RopeScaling, rotary
from ivcr_jax.models.lora import LoraConfig
from ivcr_jax.models.qformer import QFormerConfig
from ivcr_jax.models.video_encoder import VideoEncoderConfig
from ivcr_jax.models.vit import ViTConfig
from tests.models import torch_reference as reference
from tests.models.torch_reference import F32, assert_close, fill

pytestmark = pytest.mark.torch

BASE = LlamaConfig(
    vocab_size=61,
    added_tokens=5,
    width=48,
    layers=3,
    heads=4,
    kv_heads=4,
    mlp_width=70,
    norm_eps=1e-5,
    rope_theta=123.0,
)
# Wavelengths from about 6 to 500 positions: some kept, some stretched, some between.
LLAMA3 = RopeScaling("llama3", factor=3.0, low_freq_factor=1.5, high_freq_factor=5.0, original_positions=32)
CASES = {
    "every head its own keys": dataclasses.replace(BASE, norm_eps=1e-3, rope_theta=5e5),
    "shared keys": dataclasses.replace(BASE, heads=6, kv_heads=2, added_tokens=0),
    "one key for all, wide heads, tied": dataclasses.replace(BASE, kv_heads=1, head_dim=20, tied=True),
    "linear": dataclasses.replace(BASE, rope_scaling=RopeScaling("linear", factor=2.5), norm_eps=1e-3),
    "linear, tied": dataclasses.replace(
        BASE, rope_theta=5e5, rope_scaling=RopeScaling("linear", factor=4.0), tied=True, added_tokens=0
    ),
    "llama3": dataclasses.replace(BASE, head_dim=20, rope_scaling=LLAMA3),
    "llama3, shared keys, narrow heads": dataclasses.replace(
        BASE, kv_heads=2, head_dim=10, rope_theta=5e5, rope_scaling=dataclasses.replace(LLAMA3, factor=8.0)
    ),
}


@nnx.jit
def read(llama, tokens, positions, segments, blocks=None):
    """Logits."""
    return llama.logits(llama(llama.embed(tokens), positions, segments, blocks)[0])


def llama(config, model):
    ours = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0), F32))
    unused = ["lm_head.weight"] if config.tied else []
    return fill(ours, [(layouts.llama(config), model.state_dict())], prefix="llama.", unused=unused)


def texts(seed, lengths, vocab_size):
    """Token ids i64[B, S] of these lengths, rubbish after them, their places, and bool[B, S], which are there."""
    shape = (len(lengths), max(lengths))
    places = np.broadcast_to(np.arange(shape[1]), shape)
    tokens = np.random.default_rng(seed).integers(0, vocab_size, shape)
    return tokens, places, places < np.array(lengths)[:, None]


@torch.no_grad()
def hf_logits(model, tokens, there, places=None):
    places = None if places is None else torch.from_numpy(np.ascontiguousarray(places))
    mask = torch.from_numpy(there)
    return model(input_ids=torch.from_numpy(tokens), attention_mask=mask, position_ids=places, use_cache=False).logits


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_llama(config):
    model = reference.hf_llama(config, seed=1)
    tokens, places, there = texts(2, [75, 37, 6], config.vocab_size + config.added_tokens)
    ours = read(llama(config, model), tokens, places, there.astype(np.int32))
    assert_close(ours[there], hf_logits(model, tokens, there)[there])


def test_positions_far_apart():
    """Positions are what the caller says, not places in the row."""
    model = reference.hf_llama(CASES["llama3"], seed=3)
    tokens, places, there = texts(4, [29, 29], 66)
    places = np.sort(np.random.default_rng(5).choice(200, places.shape, replace=False), axis=1)
    ours = read(llama(CASES["llama3"], model), tokens, places, there.astype(np.int32))
    assert_close(ours, hf_logits(model, tokens, there, places))


@pytest.mark.parametrize("norm_eps", [1e-5, 1e-6])
def test_small_states(norm_eps):
    """States so small that the published epsilon of the norms decides."""
    config = dataclasses.replace(BASE, norm_eps=norm_eps, layers=2)
    model = reference.hf_llama(config, seed=6)
    model.model.embed_tokens.weight.data *= 0.01
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.01
        layer.mlp.down_proj.weight.data *= 0.01
    tokens, places, there = texts(7, [21], 66)
    ours = read(llama(config, model), tokens, places, there.astype(np.int32))
    assert_close(ours, hf_logits(model, tokens, there))


def test_packed_dialogues_and_blocks_of_video_tokens():
    """Who sees whom, told to Hugging Face as a mask that is made by a loop over pairs."""
    config = CASES["shared keys"]
    model = reference.hf_llama(config, seed=8)
    tokens = np.random.default_rng(9).integers(0, 61, (1, 23))
    segments = np.array([[1] * 13 + [2] * 8 + [0] * 2])
    blocks = np.array([[0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0, 0, 0] + [3, 3, 3, 0, 0, 0, 0, 0, 0, 0]])
    places = np.array([[0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9] + [0, 1, 2, 3, 4, 5, 6, 7, 0, 0]])
    sees = np.zeros((23, 23), bool)
    for i in range(23):
        for j in range(23):
            near = blocks[0, i] == blocks[0, j] if blocks[0, i] else j <= i
            sees[i, j] = near and segments[0, i] == segments[0, j]
    with torch.no_grad():
        mask = torch.where(torch.from_numpy(sees), 0.0, torch.finfo(torch.float32).min)
        theirs = model(
            input_ids=torch.from_numpy(tokens), attention_mask=mask[None, None], position_ids=torch.from_numpy(places)
        ).logits
    ours = read(llama(config, model), tokens, places, segments, blocks)
    assert_close(ours[0, :21], theirs[0, :21])


@pytest.mark.parametrize("file", ["training checkpoint", "adapter"])
def test_lora(file):
    config = InterLLaVAConfig(
        llama=CASES["shared keys"], lora=LoraConfig(rank=5, alpha=8.0, targets=r"llama\.layers\.(q|v|o|gate|down)")
    )

    class Model(nnx.Module):
        def __init__(self):
            self.llama = Llama(config.llama, nnx.Rngs(0), F32)
            lora.add(self, config.lora, nnx.Rngs(0))

    model = reference.hf_llama(config.llama, seed=10)
    base = model.state_dict()
    factors = reference.adapt(model, ["q", "v", "o", "gate", "down"], rank=5, scale=8.0 / 5, seed=11)
    if file == "adapter":
        table = layouts.peft_adapter(config)
        state = {f"base_model.model.{key}.weight": value for key, value in factors.items()}
    else:
        tensors = layouts.timechat(config).tensors
        table = {key: pieces for key, pieces in tensors.items() if key.startswith("llama_model.")}
        state = {f"llama_model.base_model.model.{key}.default.weight": value for key, value in factors.items()}
    ours = fill(
        nnx.eval_shape(Model), [(layouts.llama(config.llama), base), (layouts.Layout("timechat", table), state)]
    )
    tokens, places, there = texts(12, [27, 19], 61)
    segments = there.astype(np.int32)
    theirs = hf_logits(model, tokens, there)[there]
    assert_close(read(ours.llama, tokens, places, segments)[there], theirs)
    taken = lora.merge(ours)
    assert len(taken) == 5 and not lora.adapted(ours)
    assert_close(read(ours.llama, tokens, places, segments)[there], theirs)
    lora.unmerge(ours, taken)
    assert_close(read(ours.llama, tokens, places, segments)[there], theirs)


# The whole chain ------------------------------------------------------------------------------------------------------

WHOLE = InterLLaVAConfig(
    vit=ViTConfig(image_size=28, patch_size=14, width=40, layers=2, heads=4, mlp_width=52, norm_eps=1e-3),
    qformer=QFormerConfig(
        queries=3, width=36, layers=4, heads=3, mlp_width=50, cross_every=2, vocab_size=71, max_text=13, norm_eps=2e-3
    ),
    video_qformer=QFormerConfig(
        queries=2, width=24, layers=2, heads=4, mlp_width=44, cross_every=1, vocab_size=0, max_text=0, norm_eps=3e-3
    ),
    video=VideoEncoderConfig(max_frames=6, window=4, stride=3, keep_text_tokens=True, attend_to_pads=True),
    llama=dataclasses.replace(BASE, width=32, layers=2),
    lora=LoraConfig(rank=4, alpha=6.0),
    rank=RankHeadConfig(width=16, heads=2),
    moment=MomentHeadConfig(width=16, layers=1, heads=2),
    layout="inline",
    llama_ids_for_qformer=True,
)


def publish(folder):
    """Writes the published files at made-up sizes. Returns what the published system has after loading them all."""
    vision = reference.Vision(WHOLE, seed=1, frame_rows=9)
    torch.save(half_eva(vision), folder / "eva.pth")
    more = {"llm_proj.weight": torch.ones(5, 36), "llm_proj.bias": torch.ones(5)}
    ids = {"Qformer.bert.embeddings.position_ids": torch.arange(13)[None]}
    torch.save({"model": vision.instructblip() | more | ids}, folder / "instructblip.pth")

    model = reference.hf_llama(WHOLE.llama, seed=2, rows=61)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    (folder / "llama").mkdir()
    keys = sorted(state)
    shards = [{key: state[key] for key in keys[::2]}, {key: state[key] for key in keys[1::2]} | buffers]
    index = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-00002.safetensors"
        safetensors_torch.save_file(shard, folder / "llama" / name)
        index |= dict.fromkeys(shard, name)
    (folder / "llama" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))

    # TimeChat's checkpoint: all but the ViT, its norm and the LLaMA were trained on.
    trained = [part for part in vision.children() if part not in (vision.vit, vision.ln_vision)]
    for number, part in enumerate(trained):
        reference.randomise(part, seed=3 + number)
    vision.query_tokens.data.mul_(-1)
    vision.video_query_tokens.data.mul_(-1)
    factors = reference.adapt(model, "qkvo", rank=4, scale=6.0 / 4, seed=20)
    adapters = {f"llama_model.base_model.model.{key}.default.weight": value for key, value in factors.items()}
    torch.save(
        {"model": vision.image_side() | vision.video_side() | adapters | ids, "epoch": 2, "optimizer": {}},
        folder / "timechat.pth",
    )

    # Video-LLaMA's, of which the layers of the video Q-Former alone are taken.
    other = reference.Vision(WHOLE, seed=30, frame_rows=4)
    torch.save({"model": other.video_side()}, folder / "videollama.pth")
    vision.video_qformer = other.video_qformer

    table = vision.frame_positions.weight.data
    vision.frame_positions = torch.nn.Embedding.from_pretrained(
        torch.nn.functional.interpolate(table.T[None], size=6, mode="nearest")[0].T
    )
    for linear in (model.model.embed_tokens, model.lm_head):  # the five new tokens
        rows = linear.weight.data
        linear.weight.data = torch.cat([rows, rows.mean(0, keepdim=True).expand(5, -1)])
    return vision, model


def half_eva(vision):
    """EVA's file: matrices, convolutions and their biases in half precision; the module is rounded alike."""
    state = vision.eva()
    for key, value in vision.vit.named_parameters():
        if key.rpartition(".")[2] in ("weight", "bias") and "norm" not in key and "qkv.bias" not in key:
            value.data = value.data.half().float()
    exact = ("norm", "_bias", "pos_embed", "cls_token")
    return {key: value if any(name in key for name in exact) else value.half() for key, value in state.items()}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    vision, model = publish(folder)
    by_name = {
        "eva.pth": layouts.eva(WHOLE.vit),
        "instructblip.pth": layouts.instructblip(WHOLE),
        "timechat.pth": layouts.timechat(WHOLE),
        "videollama.pth": layouts.videollama(WHOLE),
        "llama": layouts.llama(WHOLE.llama),
    }
    ours = fill(
        nnx.eval_shape(lambda: InterLLaVA(WHOLE, nnx.Rngs(0), F32)),
        [(layout, open_weights(folder / name)) for name, layout in by_name.items()],
        unused=[
            *reference.eva_unused(WHOLE.vit),
            *("llm_proj.weight", "llm_proj.bias", "Qformer.bert.embeddings.position_ids"),
            *("video_query_tokens", "video_frame_position_embedding.weight", "llama_proj.weight", "llama_proj.bias"),
            *(f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(2)),
        ],
        new=r"(rank|moment)\..*",
    )
    return ours, vision, model


def test_video_through_the_whole_chain(chain):
    ours, vision, _ = chain
    frames = np.random.default_rng(40).integers(0, 256, (5, 28, 28, 3), np.uint8)
    text, text_mask = sentences(41, [7, 6, 7, 5, 4])
    expected = vision(normalised(frames), torch.from_numpy(text), torch.from_numpy(text_mask))
    bundle = Bundle(BundleConfig(WHOLE, None, PromptStyle()), ours, None, None, None)
    tokens, between = bundle.encode_video(frames, text=text, text_mask=text_mask, intermediates=True)
    assert between.keys() == expected.keys() - {"tokens"}
    for name, value in between.items():
        assert_close(value, expected[name])
    assert_close(tokens, expected["tokens"])


def test_dialogue_through_the_whole_chain(chain):
    """Text and two videos in a row, the second of three frames alone: its last window has none, so no tokens."""
    ours, vision, model = chain
    frames = np.random.default_rng(42).integers(0, 256, (2, 5, 28, 28, 3), np.uint8)
    text, text_mask = (x.reshape(2, 5, -1) for x in sentences(43, [7, 6, 7, 5, 4] * 2))
    text = text * text_mask  # 0 at padding, as batches have it: its states are read
    slots = np.array([-1] * 3 + [0] * 4 + [-1] * 3 + [1] * 4 + [-1] * 6)
    offsets = np.array([0] * 3 + [0, 1, 2, 3] + [0] * 3 + [0, 1, 2, 3] + [0] * 6)
    there = np.array([1] * 12 + [0] * 2 + [1] * 4 + [0] * 2, bool)
    tokens = np.random.default_rng(44).integers(0, 66, 20)
    tokens[[0, 7, 15]] = [61, 64, 65]  # some of the added ones
    count = np.array([5, 3])
    batch = {
        "tokens": tokens,
        "positions": np.arange(20),
        "segment_ids": np.array([1] * 18 + [0] * 2),
        "video_slots": slots,
        "video_offsets": offsets,
        "frames": frames,
        "frame_mask": np.arange(5) < count[:, None],
        "frame_text": text,
        "frame_times": np.zeros((2, 5), np.float32),
        "durations": np.ones(2, np.float32),
        "turn_states": np.array([17]),
        "candidate_blocks": np.array([[3, 10]]),
        "moment_slots": np.array([0]),
    }
    batch = {name: value[None] for name, value in batch.items()}
    hidden, logits = whole(ours, batch)

    videos = [
        vision(normalised(frames[i, :n]), torch.from_numpy(text[i, :n]), torch.from_numpy(text_mask[i, :n]))["tokens"]
        for i, n in enumerate(count)
    ]
    assert [len(video) for video in videos] == [4, 2]
    with torch.no_grad():
        words = model.model.embed_tokens(torch.from_numpy(tokens))
        x = torch.cat([words[:3], videos[0], words[7:10], videos[1], words[14:18]])[None]
        places = torch.from_numpy(np.flatnonzero(there))[None]
        mask = torch.ones_like(places)
        states = model.model(inputs_embeds=x, position_ids=places, attention_mask=mask).last_hidden_state
        theirs = model.lm_head(states)
    assert_close(hidden[0][there], states[0])
    assert_close(logits[0][there], theirs[0])


@nnx.jit
def whole(model, batch):
    hidden = model(batch).hidden
    return hidden, model.llama.logits(hidden)


def normalised(frames):
    mean, std = transformers.image_utils.OPENAI_CLIP_MEAN, transformers.image_utils.OPENAI_CLIP_STD
    return (torch.from_numpy(frames) / 255 - torch.tensor(mean)) / torch.tensor(std)


def sentences(seed, lengths):
    """Ids of the Q-Former's words i64[N, S] and bool[N, S], which are there."""
    tokens, _, there = texts(seed, lengths, 70)
    return tokens + 1, there


@pytest.mark.parametrize("scaling", ["none", "llama3"])
def test_rotations_at_real_lengths(scaling):
    """Where an error in the last place of a frequency would be turned by thousands of positions."""
    config = LlamaConfig(rope_theta=1e4, rope_scaling=RopeScaling(scaling, 8.0, 1.0, 4.0, 8192))
    rope = {"rope_type": "default", "rope_theta": 1e4}
    if scaling == "llama3":
        rope |= {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 8192}
    hf_config = transformers.LlamaConfig(hidden_size=4096, max_position_embeddings=16384, rope_parameters=rope)
    theirs = LlamaRotaryEmbedding(hf_config)
    positions = np.arange(16384)[None]
    cos, sin = theirs(torch.zeros(1), torch.from_numpy(positions))
    for found, expected in zip(rotary(jnp.asarray(positions), config), (cos, sin), strict=True):
        np.testing.assert_allclose(np.asarray(found)[0], expected[0, :, :64].numpy(), rtol=0, atol=1e-6)
