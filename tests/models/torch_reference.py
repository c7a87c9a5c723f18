"""The published models in PyTorch with random weights, at made-up sizes, and the way of their weights into ours.

The modules are Hugging Face's, under the keys of the published files. What no library has, the path from frames to
visual tokens, is written out here for one video, with plain loops and slices.
"""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from ivcr_jax import bundle
from ivcr_jax.convert import files, layouts, read
from ivcr_jax.models.layers import Compute

TOLERANCE = 1e-4  # of any number, where outputs are about 1; f32 itself leaves some 1e-6
F32 = Compute(dtype="float32", attention="xla")
HF_ACTIVATION = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def assert_close(ours, theirs, spread=0.1):
    """Fails where any number differs by more than TOLERANCE, or where there is too little to see a difference in."""
    ours, theirs = np.asarray(ours), np.asarray(theirs.detach())
    assert ours.dtype == theirs.dtype == np.float32
    assert ours.shape == theirs.shape
    assert theirs.std() > spread
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def randomise(module, seed, std=0.15):
    """Fills every parameter: scales of norms about 1, all others, biases too, so large that each of them shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            is_scale = name.endswith("weight") and value.ndim == 1
            value.copy_(1 + 0.2 * noise if is_scale else std * noise)
    for name, value in module.named_parameters():
        if name.endswith("qkv.bias"):  # EVA's keys have none, which a fused bias says with zeros
            value.data[len(value) // 3 : 2 * len(value) // 3] = 0
    return module.eval()


class InMemory:
    """A state dict where `read.plan` expects files.Weights; it notes which tensors were read."""

    def __init__(self, name, state):
        self.name = name
        self.arrays = {key: value.detach().numpy().copy() for key, value in state.items()}
        self.entries = {key: files.Entry(x.shape, x.dtype, pathlib.Path(name)) for key, x in self.arrays.items()}
        self.seen = set()

    def read(self, key, rows=None):
        self.seen.add(key)
        return self.arrays[key] if rows is None else self.arrays[key][rows]


def fill(model, sources, prefix="", unused=(), new=r"(?!)"):
    """Puts published tensors into a model, through the tables of `layouts`; all of them, and into all of it.

    Args:
      model: ours, made by nnx.eval_shape: without values, so that none but these can be left in it.
      sources: (layout, a state dict or weights of a file) of each.
      prefix: of the model's parameters in the tables.
      unused: keys that are there and known, and that nothing is made of.
      new: a regular expression of the parameters that no source has; they become random numbers.

    Returns:
      The model.
    """
    sources = [(layout, InMemory(layout.name, w) if isinstance(w, dict) else w) for layout, w in sources]
    state = nnx.state(model, nnx.Param)
    expected = {prefix + path: value for path, value in bundle.parameters(model).items()}

    def initial(paths):
        rng = np.random.default_rng(0)
        return {path: 0.1 * rng.standard_normal(expected[path].shape, np.float32) for path in paths}

    plan = read.plan(sources, expected, lambda _, x: jnp.asarray(x), initial)
    assert plan.problems == []
    assert plan.new == [path for path in expected if re.fullmatch(new, path)]
    assert plan.parameters.keys() == expected.keys()
    for path, value in nnx.to_flat_state(state):
        lazy = plan.parameters[prefix + ".".join(map(str, path))]
        array = lazy.load()
        assert array.shape == value.shape
        value.set_value(array)
    nnx.update(model, state)
    rest = {key for layout, weights in sources for key in set(weights.entries) - set(layout.tensors)}
    assert rest == set(unused)
    for layout, weights in sources:
        if isinstance(weights, InMemory):
            assert weights.seen == set(layout.tensors)
    return model


def renamed(state, rules):
    """A state dict whose keys went through each (regular expression, replacement)."""
    out = {}
    for key, value in state.items():
        new = key
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        assert new not in out
        out[new] = value.detach().clone()
    return out


# EVA ------------------------------------------------------------------------------------------------------------------


def eva_tower(config, seed):
    """InstructBLIP's ViT for a ViTConfig, with one block more: the published file has one that is not used."""
    return randomise(
        transformers.InstructBlipVisionModel(
            transformers.InstructBlipVisionConfig(
                hidden_size=config.width,
                intermediate_size=config.mlp_width,
                num_hidden_layers=config.layers + 1,
                num_attention_heads=config.heads,
                image_size=config.image_size,
                patch_size=config.patch_size,
                layer_norm_eps=config.norm_eps,
                hidden_act=HF_ACTIVATION[config.activation],
            )
        ),
        seed,
    )


def eva_features(tower, pixels, **kwargs):
    """f32[B, H, W, 3] normalised -> f32[B, P, D], before the last block and the last norm, which EVA's file has too."""
    with torch.no_grad():
        return tower(pixels.permute(0, 3, 1, 2), output_hidden_states=True, **kwargs).hidden_states[-2]


def eva_state(tower):
    """The keys of `eva_vit_g.pth`."""
    state = renamed(
        tower.state_dict(),
        [
            (r"^embeddings\.class_embedding$", "cls_token"),
            (r"^embeddings\.position_embedding$", "pos_embed"),
            (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
            (r"^encoder\.layers\.", "blocks."),
            (r"\.layer_norm([12])\.", r".norm\1."),
            (r"\.self_attn\.qkv\.", ".attn.qkv."),
            (r"\.self_attn\.projection\.", ".attn.proj."),
            (r"^post_layernorm\.", "norm."),
        ],
    )
    for key in [key for key in state if key.endswith("qkv.bias")]:
        q, k, v = state.pop(key).chunk(3)
        assert not k.any()
        state |= {key.replace("qkv.bias", "q_bias"): q.clone(), key.replace("qkv.bias", "v_bias"): v.clone()}
    return state


def eva_unused(config):
    """The keys of the last block and the last norm."""
    last = f"blocks.{config.layers}."
    parts = ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
    block = [f"{last}{part}.{kind}" for part in parts for kind in ("weight", "bias")]
    return [*block, f"{last}attn.qkv.weight", f"{last}attn.q_bias", f"{last}attn.v_bias", "norm.weight", "norm.bias"]


# Q-Formers ------------------------------------------------------------------------------------------------------------


def hf_qformer(config, context_width):
    """InstructBLIP's Q-Former for a QFormerConfig; one without text has a text side all the same, unused."""
    return transformers.InstructBlipQFormerModel(
        transformers.InstructBlipQFormerConfig(
            vocab_size=config.vocab_size or 7,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=config.mlp_width,
            max_position_embeddings=config.max_text or 3,
            encoder_hidden_size=context_width,
            cross_attention_frequency=config.cross_every,
            layer_norm_eps=config.norm_eps,
        )
    )


def qformer_state(model, prefix, text=True):
    """The keys of a Q-Former in the published files. Without text these drop all that reads it."""
    state = renamed(
        model.state_dict(),
        [(r"\.attention\.attention\.", ".attention.self."), (r"\.crossattention\.attention\.", ".crossattention.self.")]
        + [(r"\.layernorm\.", ".LayerNorm."), ("^", prefix)],
    )
    of_text = r".*\.(word_embeddings|position_embeddings)\..*|.*\.layer\.\d+\.(intermediate|output)\..*"
    return {key: value for key, value in state.items() if text or not re.fullmatch(of_text, key)}


# From frames to visual tokens -----------------------------------------------------------------------------------------


class Vision(torch.nn.Module):
    """The published vision side, for an InterLLaVAConfig."""

    def __init__(self, config, seed=0, frame_rows=None):
        super().__init__()
        c = self.config = config
        self.vit = eva_tower(c.vit, seed)
        self.ln_vision = torch.nn.LayerNorm(c.vit.width)
        self.qformer = hf_qformer(c.text_qformer, c.vit.width)
        self.query_tokens = torch.nn.Parameter(torch.empty(1, c.qformer.queries, c.qformer.width))
        self.frame_positions = torch.nn.Embedding(frame_rows or c.video.max_frames, c.qformer.width)
        self.video_qformer = hf_qformer(c.video_qformer, c.qformer.width)
        self.video_query_tokens = torch.nn.Parameter(torch.empty(1, c.video_qformer.queries, c.video_qformer.width))
        self.llama_proj = torch.nn.Linear(c.video_qformer.width, c.llama.width)
        randomise(self, seed)

    def eva(self):
        """`eva_vit_g.pth`."""
        return eva_state(self.vit)

    def instructblip(self):
        """`instruct_blip_vicuna7b_trimmed.pth`, under "model"."""
        norm = {f"ln_vision.{key}": value for key, value in self.ln_vision.state_dict().items()}
        return norm | self.image_side()

    def image_side(self):
        """The image Q-Former, as InstructBLIP and TimeChat both have it."""
        text = bool(self.config.text_qformer.vocab_size)
        return qformer_state(self.qformer, "Qformer.bert.", text) | {"query_tokens": self.query_tokens.detach().clone()}

    def video_side(self):
        """Without the image Q-Former: what `VL_LLaMA_2_7B_Finetuned.pth` has."""
        state = qformer_state(self.video_qformer, "video_Qformer.bert.", text=False)
        for name, value in (
            ("video_query_tokens", self.video_query_tokens),
            ("video_frame_position_embedding.weight", self.frame_positions.weight),
            ("llama_proj.weight", self.llama_proj.weight),
            ("llama_proj.bias", self.llama_proj.bias),
        ):
            state[name] = value.detach().clone()
        return state

    @torch.no_grad()
    def forward(self, pixels, text=None, text_mask=None, there=None):
        """One video.

        Args:
          pixels: f32[T, H, W, 3], normalised, or f32[T, P, Dv], what the ViT makes of them.
          text, text_mask: [T, S], each frame's sentence.
          there: bool[T], which frames there are; None is all.

        Returns:
          A dict: "tokens" [windows * Q, D], of the windows that have a frame; "frames" [T, Q, E]; what lies between.
        """
        video, queries = self.config.video, self.config.qformer.queries
        count = len(pixels)
        there = [True] * count if there is None else [bool(x) for x in there]
        vit = pixels if pixels.ndim == 3 else eva_features(self.vit, pixels)
        normed = self.ln_vision(vit)
        mask = None
        if text is not None:
            mask = torch.cat([torch.ones(count, queries, dtype=torch.long), text_mask.long()], dim=1)
        read = self.qformer(
            input_ids=text,
            attention_mask=mask,
            query_embeds=self.query_tokens.expand(count, -1, -1),
            encoder_hidden_states=normed,
        ).last_hidden_state
        table = self.frame_positions.weight
        if count > video.max_frames:  # frames share rows
            table = torch.nn.functional.interpolate(table.T[None], size=count, mode="nearest")[0].T
        placed = read + table[:count, None]
        of_frames = []
        for frame in range(count):
            kept = placed[frame]
            if not video.keep_text_tokens:
                kept = kept[:queries]
            elif not video.attend_to_pads:
                kept = torch.cat([kept[:queries], kept[queries:][text_mask[frame]]])
            of_frames.append(kept)
        windows = []
        for start in range(0, count, video.stride):
            clip = [of_frames[i] for i in range(start, min(start + video.window, count)) if there[i]]
            if clip:
                windows.append(
                    self.video_qformer(
                        input_ids=None,
                        query_embeds=self.video_query_tokens,
                        encoder_hidden_states=torch.cat(clip)[None],
                    ).last_hidden_state[0]
                )
        windows = torch.stack(windows)
        return {
            "vit": vit,
            "vit_norm": normed,
            "qformer": read,
            "frames": placed[:, :queries],
            "video_qformer": windows,
            "tokens": self.llama_proj(windows).flatten(0, 1),
        }


def fill_vision(encoder, vision):
    """Puts a torch Vision's weights into our VideoEncoder, as EVA's, InstructBLIP's and TimeChat's files have them."""
    config = vision.config
    video_side = {key: pieces for key, pieces in layouts.timechat(config).tensors.items() if "video" in key}
    video_side |= {key: layouts.timechat(config).tensors[key] for key in ("llama_proj.weight", "llama_proj.bias")}
    return fill(
        encoder,
        [
            (layouts.eva(config.vit), vision.eva()),
            (layouts.instructblip(config), vision.instructblip()),
            (layouts.Layout("timechat", video_side), vision.video_side()),
        ],
        prefix="encoder.",
        unused=eva_unused(config.vit),
    )


# LLaMA ----------------------------------------------------------------------------------------------------------------


def hf_llama(config, seed, rows=None):
    """Hugging Face's LLaMA for a LlamaConfig; `rows` of its tables, all where not given."""
    scaling = config.rope_scaling
    rope = {"rope_type": scaling.kind.replace("none", "default"), "rope_theta": config.rope_theta}
    if scaling.kind != "none":
        rope["factor"] = scaling.factor
    if scaling.kind == "llama3":
        rope["low_freq_factor"] = scaling.low_freq_factor
        rope["high_freq_factor"] = scaling.high_freq_factor
        rope["original_max_position_embeddings"] = scaling.original_positions
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=rows or config.vocab_size + config.added_tokens,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_size,
            max_position_embeddings=4096,
            rms_norm_eps=config.norm_eps,
            rope_parameters=rope,
            tie_word_embeddings=config.tied,
        )
    )
    return randomise(model, seed)


def adapt(model, names, rank, scale, seed):
    """Puts a LoRA addition beside projections of Hugging Face's LLaMA. Returns its factors under PEFT's names."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for path, linear in model.named_modules():
        if path.rpartition(".")[2] not in [f"{name}_proj" for name in names]:
            continue
        a = 0.15 * torch.randn(rank, linear.in_features, generator=generator)
        b = 0.15 * torch.randn(linear.out_features, rank, generator=generator)
        linear.register_forward_hook(lambda _, args, out, a=a, b=b: out + scale * (args[0] @ a.T) @ b.T)
        factors |= {f"{path}.lora_A": a, f"{path}.lora_B": b}
    return factors
