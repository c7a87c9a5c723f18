"""Which published tensor is which parameter: one table for both directions.

A published tensor is one piece or several, joined along its first axis; a piece is a parameter, or one layer of a
stacked one, in PyTorch's form. Keys and shapes: the published files of IVCR, TimeChat, Video-LLaMA, InstructBLIP, EVA
and Hugging Face's LLaMA and SigLIP. Knows names and shapes, no file.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ivcr_jax.models.interllava import InterLLaVAConfig
from ivcr_jax.models.llama import LlamaConfig
from ivcr_jax.models.qformer import QFormerConfig
from ivcr_jax.models.retriever import RetrieverConfig
from ivcr_jax.models.vit import ViTConfig


@dataclasses.dataclass(frozen=True)
class Form:
    """How a parameter looks in PyTorch: ours -> theirs and back; `shape` the same of shapes.

    `resize`, where there is one, brings a tensor of another first axis to the shape expected.
    """

    there: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    resize: Callable[[np.ndarray, tuple[int, ...]], np.ndarray] | None = None

    def shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in PyTorch of a parameter of this shape."""
        return self.there(np.broadcast_to(np.empty((), np.uint8), ours)).shape


def _patch_kernel(x: np.ndarray) -> np.ndarray:
    side = int((x.shape[0] // 3) ** 0.5)
    return x.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


def _nearest_rows(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Frame positions for another number of frames, as the published code fits them: nearest, along frames."""
    return x[np.arange(shape[0]) * len(x) // shape[0]]


def _bicubic_grid(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Patch positions f[1, P', D] -> f[1, P, D], bicubic over the grid, a class token kept (EVA's own recipe)."""
    import torch

    cls = shape[1] - int(shape[1] ** 0.5) ** 2
    old, new = (int((size - cls) ** 0.5) for size in (x.shape[1], shape[1]))
    grid: Any = torch.from_numpy(x[:, cls:].astype(np.float32)).reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    grid = grid.permute(0, 2, 3, 1).reshape(1, new * new, -1).numpy()
    return np.concatenate([x[:, :cls], grid.astype(x.dtype)], axis=1)


SAME = Form(lambda x: x, lambda x, shape: x)
LINEAR = Form(np.transpose, lambda x, shape: x.T)
BATCHED = Form(lambda x: x[None], lambda x, shape: x[0])
CONV = Form(_patch_kernel, lambda x, shape: x.transpose(2, 3, 1, 0).reshape(shape))
FRAMES = dataclasses.replace(SAME, resize=_nearest_rows)
GRID = dataclasses.replace(BATCHED, resize=_bicubic_grid)
FLAT_GRID = dataclasses.replace(SAME, resize=lambda x, shape: _bicubic_grid(x[None], (1, *shape))[0])


@dataclasses.dataclass(frozen=True)
class Piece:
    """Attributes: path: of the parameter. layer: which of a stack, None for a whole parameter. form: of it.
    optional: a published tensor may end before it (the rows of added tokens)."""

    path: str
    layer: int | None = None
    form: Form = SAME
    optional: bool = False


Table = dict[str, tuple[Piece, ...]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A published file.

    Attributes:
      name: of the flag that gives the file.
      tensors: key -> pieces; each must be there.
      ignored: regular expressions of keys that are known and not used.
    """

    name: str
    tensors: Table
    ignored: tuple[str, ...] = ()


def _linear(
    key: str, path: str, layer: int | None = None, bias: bool = True
) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    yield f"{key}.weight", (Piece(f"{path}.kernel", layer, LINEAR),)
    if bias:
        yield f"{key}.bias", (Piece(f"{path}.bias", layer),)


def _norm(key: str, path: str, layer: int | None = None, bias: bool = True) -> Iterator[tuple[str, tuple[Piece, ...]]]:
    yield f"{key}.weight", (Piece(f"{path}.scale", layer),)
    if bias:
        yield f"{key}.bias", (Piece(f"{path}.bias", layer),)


def eva(config: ViTConfig) -> Layout:
    """`eva_vit_g.pth`: a bare state dict of 40 blocks, of which the last is not used, with fp16 matrices."""
    ours = "encoder.vit"
    table: Table = {
        "cls_token": (Piece(f"{ours}.cls", form=BATCHED),),
        "pos_embed": (Piece(f"{ours}.positions", form=GRID),),
        "patch_embed.proj.weight": (Piece(f"{ours}.patch.kernel", form=CONV),),
        "patch_embed.proj.bias": (Piece(f"{ours}.patch.bias"),),
    }
    for i in range(config.layers):
        theirs, mine = f"blocks.{i}", f"{ours}.blocks"
        table |= _norm(f"{theirs}.norm1", f"{mine}.attention_norm", i)
        table |= _norm(f"{theirs}.norm2", f"{mine}.mlp_norm", i)
        table[f"{theirs}.attn.q_bias"] = (Piece(f"{mine}.attention.q.bias", i),)
        table[f"{theirs}.attn.v_bias"] = (Piece(f"{mine}.attention.v.bias", i),)
        table[f"{theirs}.attn.qkv.weight"] = tuple(
            Piece(f"{mine}.attention.{name}.kernel", i, LINEAR) for name in ("q", "k", "v")
        )
        table |= _linear(f"{theirs}.attn.proj", f"{mine}.attention.out", i)
        table |= _linear(f"{theirs}.mlp.fc1", f"{mine}.mlp.up", i)
        table |= _linear(f"{theirs}.mlp.fc2", f"{mine}.mlp.down", i)
    last = config.layers
    return Layout("eva", table, (rf"blocks\.{last}\..*", r"norm\..*", r"head\..*", r"fc_norm\..*"))


def qformer(config: QFormerConfig, theirs: str, ours: str) -> Table:
    """The tensors of a Q-Former under a prefix such as "Qformer.bert."; its queries have names of their own."""
    table: Table = {}
    if config.vocab_size:
        table[f"{theirs}embeddings.word_embeddings.weight"] = (Piece(f"{ours}.words"),)
        table[f"{theirs}embeddings.position_embeddings.weight"] = (Piece(f"{ours}.positions"),)
    table |= _norm(f"{theirs}embeddings.LayerNorm", f"{ours}.norm")
    for i in range(config.layers):
        group, place = divmod(i, config.cross_every)
        layer, mine = f"{theirs}encoder.layer.{i}", f"{ours}.groups.layers.{place}"
        attentions = {"attention": "attention"} | ({"crossattention": "cross"} if place == 0 else {})
        for name, part in attentions.items():
            for full in ("query", "key", "value"):
                table |= _linear(f"{layer}.{name}.self.{full}", f"{mine}.{part}.{full[0]}", group)
            table |= _linear(f"{layer}.{name}.output.dense", f"{mine}.{part}.out", group)
            table |= _norm(f"{layer}.{name}.output.LayerNorm", f"{mine}.{part}_end.norm", group)
        mlps = {"_query": "query_mlp"} | ({"": "text_mlp"} if config.vocab_size else {})
        for suffix, part in mlps.items():
            table |= _linear(f"{layer}.intermediate{suffix}.dense", f"{mine}.{part}.up", group)
            table |= _linear(f"{layer}.output{suffix}.dense", f"{mine}.{part}.down", group)
            table |= _norm(f"{layer}.output{suffix}.LayerNorm", f"{mine}.{part}_end.norm", group)
    return table


PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")  # of a decoder layer
BUFFERS = (r".*position_ids", r".*rotary_emb\.inv_freq")


def _image_side(config: InterLLaVAConfig) -> Table:
    queries: Table = {"query_tokens": (Piece("encoder.qformer.queries", form=BATCHED),)}
    return queries | qformer(config.text_qformer, "Qformer.bert.", "encoder.qformer")


def _video_qformer(config: InterLLaVAConfig) -> Table:
    return qformer(config.video_qformer, "video_Qformer.bert.", "encoder.video_qformer")


def _video_side(config: InterLLaVAConfig) -> Table:
    table: Table = {
        "video_query_tokens": (Piece("encoder.video_qformer.queries", form=BATCHED),),
        "video_frame_position_embedding.weight": (Piece("encoder.frame_positions", form=FRAMES),),
    }
    return table | dict(_linear("llama_proj", "encoder.projection")) | _video_qformer(config)


def _lora(config: InterLLaVAConfig, prefix: str, adapter: str) -> Table:
    """PEFT's names. `adapter` is ".default" in a training checkpoint, "" in an adapter's own file."""
    table: Table = {}
    for i in range(config.llama.layers):
        for name in adapted(config):
            for part in "ab":
                key = f"{prefix}model.layers.{i}.{_hf_name(name)}.lora_{part.upper()}{adapter}.weight"
                table[key] = (Piece(f"llama.layers.{name}.lora.{part}", i, LINEAR),)
    return table


def adapted(config: InterLLaVAConfig) -> list[str]:
    """The decoder's projections that LoRA adapts."""
    names = PROJECTIONS if config.lora.rank else ()
    return [name for name in names if re.fullmatch(config.lora.targets, f"llama.layers.{name}")]


def _hf_name(name: str) -> str:
    return f"{'self_attn' if name in 'qkvo' else 'mlp'}.{name}_proj"


def instructblip(config: InterLLaVAConfig) -> Layout:
    """`instruct_blip_vicuna7b_trimmed.pth`."""
    table = dict(_norm("ln_vision", "encoder.vit_norm")) | _image_side(config)
    return Layout("instructblip", table, (*BUFFERS, r"llm_proj\..*", r"Qformer\.cls\..*"))


def timechat(config: InterLLaVAConfig) -> Layout:
    """`timechat_7b.pth`; IVCR's own checkpoints have the same keys and more."""
    table = _video_side(config) | _image_side(config) | _lora(config, "llama_model.base_model.model.", ".default")
    more = (r"Qformer\.cls\..*", r".*\.base_layer\.SCB", r".*\.weight_format", r"(video_retrieval|temporal)_head\..*")
    return Layout("timechat", table, (*BUFFERS, *more))


def ivcr(config: InterLLaVAConfig) -> Layout:
    """IVCR's `checkpoint_{epoch}.pth`."""
    return dataclasses.replace(timechat(config), name="ivcr")


def videollama(config: InterLLaVAConfig) -> Layout:
    """`VL_LLaMA_2_7B_Finetuned.pth`, of which the published system takes the video Q-Former's layers alone."""
    unused = (r"video_query_tokens", r"video_frame_position_embedding\..*", r"llama_proj\..*")
    return Layout("videollama", _video_qformer(config), (*BUFFERS, *unused))


def llama(config: LlamaConfig) -> Layout:
    """A Hugging Face LLaMA folder. The rows of added tokens may be missing."""
    ours = "llama"
    added = Piece(f"{ours}.added_embedding", optional=True)
    added_head = Piece(f"{ours}.added_head.kernel", form=LINEAR, optional=True)
    extra = bool(config.added_tokens)
    table: Table = {"model.embed_tokens.weight": (Piece(f"{ours}.embedding"), *[added] * extra)}
    table |= _norm("model.norm", f"{ours}.norm", bias=False)
    if not config.tied:
        table["lm_head.weight"] = (Piece(f"{ours}.head.kernel", form=LINEAR), *[added_head] * extra)
    for i in range(config.layers):
        theirs, mine = f"model.layers.{i}", f"{ours}.layers"
        table |= _norm(f"{theirs}.input_layernorm", f"{mine}.attention_norm", i, bias=False)
        table |= _norm(f"{theirs}.post_attention_layernorm", f"{mine}.mlp_norm", i, bias=False)
        for name in PROJECTIONS:
            table |= _linear(f"{theirs}.{_hf_name(name)}", f"{mine}.{name}", i, bias=False)
    return Layout("llama", table, (*BUFFERS, *([r"lm_head\.weight"] if config.tied else [])))


def of_model(config: InterLLaVAConfig) -> list[Layout]:
    """The files of a dialogue model, in the order in which they are read: where two hold a tensor, the later counts."""
    parts = [instructblip(config), timechat(config), videollama(config), ivcr(config)]
    return [eva(config.vit), llama(config.llama), *parts]


def peft_adapter(config: InterLLaVAConfig) -> Table:
    """`adapter_model.safetensors` of a PEFT LoRA adapter."""
    return _lora(config, "base_model.model.", "")


def siglip(config: RetrieverConfig) -> Layout:
    """A Hugging Face SigLIP or SigLIP2 folder of fixed image size."""
    table: Table = {
        "logit_scale": (Piece("logit_scale"),),
        "logit_bias": (Piece("logit_bias"),),
        "text_model.embeddings.token_embedding.weight": (Piece("text.words"),),
        "text_model.embeddings.position_embedding.weight": (Piece("text.positions"),),
        "vision_model.embeddings.patch_embedding.weight": (Piece("vit.patch.kernel", form=CONV),),
        "vision_model.embeddings.patch_embedding.bias": (Piece("vit.patch.bias"),),
        "vision_model.embeddings.position_embedding.weight": (Piece("vit.positions", form=FLAT_GRID),),
        "vision_model.head.probe": (Piece("vit.head.probe"),),
    }
    table |= _norm("text_model.final_layer_norm", "text.norm")
    table |= _norm("vision_model.post_layernorm", "vit.norm")
    table |= _linear("text_model.head", "text.head")
    for tower, ours, layers in (
        ("text_model", "text.blocks", config.text.layers),
        ("vision_model", "vit.blocks", config.vit.layers),
    ):
        for i in range(layers):
            theirs = f"{tower}.encoder.layers.{i}"
            table |= _norm(f"{theirs}.layer_norm1", f"{ours}.attention_norm", i)
            table |= _norm(f"{theirs}.layer_norm2", f"{ours}.mlp_norm", i)
            for name in "qkv":
                table |= _linear(f"{theirs}.self_attn.{name}_proj", f"{ours}.attention.{name}", i)
            table |= _linear(f"{theirs}.self_attn.out_proj", f"{ours}.attention.out", i)
            table |= _linear(f"{theirs}.mlp.fc1", f"{ours}.mlp.up", i)
            table |= _linear(f"{theirs}.mlp.fc2", f"{ours}.mlp.down", i)
    head, mine = "vision_model.head", "vit.head"
    for kind, part, form in (("weight", "kernel", LINEAR), ("bias", "bias", SAME)):
        pieces = tuple(Piece(f"{mine}.attention.{name}.{part}", form=form) for name in "qkv")
        table[f"{head}.attention.in_proj_{kind}"] = pieces
    table |= _linear(f"{head}.attention.out_proj", f"{mine}.attention.out")
    table |= _norm(f"{head}.layernorm", f"{mine}.norm")
    table |= _linear(f"{head}.mlp.fc1", f"{mine}.mlp.up")
    table |= _linear(f"{head}.mlp.fc2", f"{mine}.mlp.down")
    return Layout("siglip", table, (r".*position_ids",))


def ours_of(shapes: Mapping[str, tuple[int, ...]], piece: Piece) -> tuple[int, ...]:
    """The shape of a piece as a parameter, without the axis of layers."""
    shape = shapes[piece.path]
    return shape if piece.layer is None else shape[1:]


def published_shape(shapes: Mapping[str, tuple[int, ...]], pieces: tuple[Piece, ...]) -> tuple[int, ...]:
    """The shape of a published tensor, from the shapes of the parameters it is made of."""
    parts: list[Any] = [piece.form.shape(ours_of(shapes, piece)) for piece in pieces]
    return (sum(part[0] for part in parts), *parts[0][1:])
