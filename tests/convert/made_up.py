"""Made-up weights under the published names, written down from the published files' key tables, not from our code.

Sizes as one namespace; values normal from a seed. `write` makes the files that `python -m ivcr_jax.convert` reads.
"""

import dataclasses
import json
import pathlib

import torch
from safetensors.torch import save_file


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Small sizes that differ wherever two could be mistaken for each other."""

    vit: int = 48
    vit_layers: int = 3
    vit_heads: int = 4
    vit_mlp: int = 80
    image: int = 42
    patch: int = 14
    queries: int = 5
    bert: int = 36
    bert_layers: int = 4
    bert_heads: int = 3
    bert_mlp: int = 72
    words: int = 523
    places: int = 40
    video: int = 24
    video_layers: int = 2
    video_heads: int = 2
    video_mlp: int = 56
    video_queries: int = 6
    frames: int = 8
    window: int = 4
    vocab: int = 300
    llama: int = 64
    llama_layers: int = 3
    llama_heads: int = 4
    llama_kv: int = 2
    llama_mlp: int = 96
    rank: int = 3

    @property
    def values(self) -> dict[str, int]:
        """These sizes by the fields of configs/interllava_7b.py's model."""
        return {
            "vit.width": self.vit,
            "vit.layers": self.vit_layers,
            "vit.heads": self.vit_heads,
            "vit.mlp_width": self.vit_mlp,
            "vit.image_size": self.image,
            "vit.patch_size": self.patch,
            "qformer.queries": self.queries,
            "qformer.width": self.bert,
            "qformer.layers": self.bert_layers,
            "qformer.heads": self.bert_heads,
            "qformer.mlp_width": self.bert_mlp,
            "qformer.vocab_size": self.words,
            "qformer.max_text": self.places,
            "video_qformer.queries": self.video_queries,
            "video_qformer.width": self.video,
            "video_qformer.layers": self.video_layers,
            "video_qformer.heads": self.video_heads,
            "video_qformer.mlp_width": self.video_mlp,
            "video.max_frames": self.frames,
            "video.window": self.window,
            "video.stride": self.window,
            "llama.vocab_size": self.vocab,
            "llama.width": self.llama,
            "llama.layers": self.llama_layers,
            "llama.heads": self.llama_heads,
            "llama.kv_heads": self.llama_kv,
            "llama.mlp_width": self.llama_mlp,
            "lora.rank": self.rank,
            "rank.width": 16,
            "rank.heads": 2,
            "moment.width": 16,
        }

    @property
    def overrides(self) -> list[str]:
        """The same as flags."""
        return [f"--config.model.{name}={value}" for name, value in self.values.items()]


# The published sizes, for measurements at true shapes.
PUBLISHED = Sizes(
    vit=1408, vit_layers=39, vit_heads=16, vit_mlp=6144, image=224, queries=32, bert=768, bert_layers=12,
    bert_heads=12, bert_mlp=3072, words=30523, places=512, video=768, video_heads=12, video_mlp=3072, video_queries=32,
    frames=64, window=32, vocab=32000, llama=4096, llama_layers=32, llama_heads=32, llama_kv=32, llama_mlp=11008,
    rank=32,
)  # fmt: skip


def _dense(out: dict[str, tuple[int, ...]], key: str, rows: int, columns: int, bias: bool = True) -> None:
    out[f"{key}.weight"] = (rows, columns)
    if bias:
        out[f"{key}.bias"] = (rows,)


def _norm(out: dict[str, tuple[int, ...]], key: str, width: int) -> None:
    out[f"{key}.weight"] = out[f"{key}.bias"] = (width,)


def eva(s: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of `eva_vit_g.pth`, its last block and final norm, which nobody uses, with it."""
    out: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, s.vit),
        "pos_embed": (1, (s.image // s.patch) ** 2 + 1, s.vit),
        "patch_embed.proj.weight": (s.vit, 3, s.patch, s.patch),
        "patch_embed.proj.bias": (s.vit,),
    }
    for i in range(s.vit_layers + 1):
        block = f"blocks.{i}"
        _norm(out, f"{block}.norm1", s.vit)
        _norm(out, f"{block}.norm2", s.vit)
        out[f"{block}.attn.q_bias"] = out[f"{block}.attn.v_bias"] = (s.vit,)
        out[f"{block}.attn.qkv.weight"] = (3 * s.vit, s.vit)
        _dense(out, f"{block}.attn.proj", s.vit, s.vit)
        _dense(out, f"{block}.mlp.fc1", s.vit_mlp, s.vit)
        _dense(out, f"{block}.mlp.fc2", s.vit, s.vit_mlp)
    _norm(out, "norm", s.vit)
    return out


def _bert(prefix: str, width: int, layers: int, mlp: int, context: int, every: int, text: bool) -> dict:
    out: dict[str, tuple[int, ...]] = {}
    _norm(out, f"{prefix}.embeddings.LayerNorm", width)
    for i in range(layers):
        layer = f"{prefix}.encoder.layer.{i}"
        for name, source in (("attention", width), ("crossattention", context)):
            if name == "crossattention" and i % every:
                continue
            _dense(out, f"{layer}.{name}.self.query", width, width)
            _dense(out, f"{layer}.{name}.self.key", width, source)
            _dense(out, f"{layer}.{name}.self.value", width, source)
            _dense(out, f"{layer}.{name}.output.dense", width, width)
            _norm(out, f"{layer}.{name}.output.LayerNorm", width)
        for suffix in ("_query", "") if text else ("_query",):
            _dense(out, f"{layer}.intermediate{suffix}.dense", mlp, width)
            _dense(out, f"{layer}.output{suffix}.dense", width, mlp)
            _norm(out, f"{layer}.output{suffix}.LayerNorm", width)
    return out


def _image_qformer(s: Sizes) -> dict[str, tuple[int, ...]]:
    return {
        "query_tokens": (1, s.queries, s.bert),
        "Qformer.bert.embeddings.word_embeddings.weight": (s.words, s.bert),
        "Qformer.bert.embeddings.position_embeddings.weight": (s.places, s.bert),
    } | _bert("Qformer.bert", s.bert, s.bert_layers, s.bert_mlp, s.vit, 2, text=True)


def instructblip(s: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of `instruct_blip_vicuna7b_trimmed.pth`."""
    out: dict[str, tuple[int, ...]] = {}
    _norm(out, "ln_vision", s.vit)
    _dense(out, "llm_proj", s.llama, s.bert)
    return out | _image_qformer(s)


def videollama(s: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of `VL_LLaMA_2_7B_Finetuned.pth`, of half as many frames."""
    out: dict[str, tuple[int, ...]] = {
        "video_query_tokens": (1, s.video_queries, s.video),
        "video_frame_position_embedding.weight": (s.frames // 2, s.bert),
    }
    _dense(out, "llama_proj", s.llama, s.video)
    return out | _bert("video_Qformer.bert", s.video, s.video_layers, s.video_mlp, s.bert, 1, text=False)


def timechat(s: Sizes, frames: int) -> dict[str, tuple[int, ...]]:
    """Shapes of `timechat_7b.pth`."""
    out = videollama(s) | _image_qformer(s)
    out["video_frame_position_embedding.weight"] = (frames, s.bert)
    head = s.llama // s.llama_heads
    for i in range(s.llama_layers):
        for name in "qkvo":
            key = f"llama_model.base_model.model.model.layers.{i}.self_attn.{name}_proj"
            out[f"{key}.lora_A.default.weight"] = (s.rank, s.llama)
            rows = head * s.llama_kv if name in "kv" else s.llama
            out[f"{key}.lora_B.default.weight"] = (rows, s.rank)
    return out


def ivcr(s: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of IVCR's own checkpoint, with its unused language head and slot heads."""
    out = timechat(s, s.frames)
    _dense(out, "Qformer.cls.predictions.decoder", s.words, s.bert)
    _dense(out, "video_retrieval_head.0", 8, s.llama)
    return out


def llama(s: Sizes) -> dict[str, tuple[int, ...]]:
    """Shapes of Hugging Face's LLaMA."""
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (s.vocab, s.llama)}
    kv = s.llama // s.llama_heads * s.llama_kv
    for i in range(s.llama_layers):
        layer = f"model.layers.{i}"
        for name, rows in (("q", s.llama), ("k", kv), ("v", kv), ("o", s.llama)):
            _dense(out, f"{layer}.self_attn.{name}_proj", rows, s.llama, bias=False)
        _dense(out, f"{layer}.mlp.gate_proj", s.llama_mlp, s.llama, bias=False)
        _dense(out, f"{layer}.mlp.up_proj", s.llama_mlp, s.llama, bias=False)
        _dense(out, f"{layer}.mlp.down_proj", s.llama, s.llama_mlp, bias=False)
        out[f"{layer}.input_layernorm.weight"] = out[f"{layer}.post_attention_layernorm.weight"] = (s.llama,)
    return out | {"model.norm.weight": (s.llama,), "lm_head.weight": (s.vocab, s.llama)}


def llama_config(s: Sizes) -> dict:
    """What LLaMA-2's config.json says of what shapes do not."""
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        "num_attention_heads": s.llama_heads,
        "num_key_value_heads": s.llama_kv,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    }


def values(
    shapes: dict[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Weights of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    around = {key: float("norm" in key.lower() and key.endswith("weight")) for key in shapes}
    return {
        key: (around[key] + torch.randn(shape, generator=generator) * 0.1).to(dtype) for key, shape in shapes.items()
    }


def eva_values(s: Sizes, seed: int) -> dict[str, torch.Tensor]:
    """EVA's: matrices and their biases in half precision, the rest in single, as published."""
    half = (".proj.weight", ".proj.bias", "qkv.weight", ".fc1.weight", ".fc1.bias", ".fc2.weight", ".fc2.bias")
    return {key: value.half() if key.endswith(half) else value for key, value in values(eva(s), seed).items()}


def write(
    folder: pathlib.Path, s: Sizes = Sizes(), timechat_frames: int = 8, llama_dtype: torch.dtype = torch.float16
) -> dict[str, str]:
    """Writes the whole set. Returns the path of each by the converter's flag."""
    folder.mkdir(parents=True, exist_ok=True)
    position_ids = torch.arange(s.places)[None]
    paths = {name: folder / f"{name}.pth" for name in ("eva", "instructblip", "timechat", "videollama", "ivcr")}
    torch.save(eva_values(s, 1), paths["eva"])
    image = values(_image_qformer(s), 3)  # TimeChat begins with InstructBLIP's and trains it on: here, by nothing
    instruct = values(instructblip(s), 2) | image | {"Qformer.bert.embeddings.position_ids": position_ids}
    torch.save({"model": instruct}, paths["instructblip"])
    adam = {"state": {0: {"step": 7, "exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-4}]}
    time = values(timechat(s, timechat_frames), 4) | image
    torch.save({"model": time, "optimizer": adam, "epoch": 2}, paths["timechat"])
    torch.save({"model": values(videollama(s), 5), "epoch": 1}, paths["videollama"])
    torch.save({"model": values(ivcr(s), 6), "config": {"lr": 1.0}}, paths["ivcr"])
    model = folder / "llama"
    model.mkdir(exist_ok=True)
    tensors = list(values(llama(s), 7, llama_dtype).items())
    index = {}
    for number, part in enumerate((tensors[:7], tensors[7:]), 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file(dict(part), model / name, metadata={"format": "pt"})
        index |= {key: name for key, _ in part}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (model / "config.json").write_text(json.dumps(llama_config(s)))
    return {name: str(path) for name, path in paths.items()} | {"llama": str(model)}
