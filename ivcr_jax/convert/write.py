"""Parameters -> published files: Hugging Face folders of LLaMA and SigLIP, a PEFT adapter, and .pth files of the rest.

Everything a file holds is in host memory while it is written.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from ivcr_jax import bundle
from ivcr_jax.convert import layouts
from ivcr_jax.convert.layouts import Table
from ivcr_jax.models.interllava import InterLLaVA, InterLLaVAConfig
from ivcr_jax.models.retriever import Retriever

SHARD = 5 << 30  # bytes of a Hugging Face shard
EVA_FILE = "eva_vit_g.pth"
INSTRUCTBLIP_FILE = "instruct_blip_vicuna7b_trimmed.pth"
IVCR_FILE = "checkpoint.pth"


def to_ivcr(folder: epath.Path, config: bundle.BundleConfig, out: epath.Path) -> None:
    """Writes what is not LLaMA as the published system reads it: `eva_vit_g.pth`, InstructBLIP's and IVCR's own file.

    Raises ValueError where the folder holds no dialogue model.
    """
    import torch

    model = _model_of(config)
    parts = (
        (EVA_FILE, layouts.eva(model.vit).tensors, False),
        (INSTRUCTBLIP_FILE, layouts.instructblip(model).tensors, True),
        (IVCR_FILE, layouts.ivcr(model).tensors, True),
    )
    for name, table, wrapped in parts:
        tensors = {key: _torch(value) for key, value in _published(folder, config, table)}
        with (out / name).open("wb") as file:
            torch.save({"model": tensors} if wrapped else tensors, file)


def to_hf(folder: epath.Path, config: bundle.BundleConfig, out: epath.Path, merged: bool) -> None:
    """Writes `llama/`, `adapter/` where LoRA is not merged, and `siglip/` where there is a retriever.

    Args:
      folder, config: of the parameters.
      out: the folder to write into.
      merged: whether LoRA is added to the matrices; else it is written as a PEFT adapter beside them.
    """
    if config.retriever is not None:
        _hf_folder(out / "siglip", _published(folder, config, layouts.siglip(config.retriever).tensors, "retriever"))
    if config.model is None:
        return
    table = layouts.llama(config.model.llama).tensors
    with_added = _added_rows_say_more(folder, config)
    table = {key: tuple(piece for piece in pieces if with_added or not piece.optional) for key, pieces in table.items()}
    llama = out / "llama"
    _hf_folder(llama, _published(folder, config, table, merged=merged))
    (llama / "config.json").write_text(json.dumps(_hf_config(config.model, with_added), indent=2) + "\n")
    if (folder / bundle.TOKENIZER).exists():
        (folder / bundle.TOKENIZER).copy(llama / bundle.TOKENIZER)
    if layouts.adapted(config.model) and not merged:
        adapter = out / "adapter"
        _hf_folder(adapter, _published(folder, config, layouts.peft_adapter(config.model)), "adapter_model")
        (adapter / "adapter_config.json").write_text(json.dumps(_peft_config(config.model), indent=2) + "\n")


def _model_of(config: bundle.BundleConfig) -> InterLLaVAConfig:
    if config.model is None:
        raise ValueError("the folder holds no dialogue model; expected one to write as IVCR's files")
    return config.model


def _published(
    folder: epath.Path, config: bundle.BundleConfig, table: Table, part: str = "model", merged: bool = False
) -> Iterator[tuple[str, np.ndarray]]:
    """Each tensor of a table, in PyTorch's form; with `merged`, LoRA added to the matrices it adapts."""
    make: Callable[[], nnx.Module]
    if part == "model":
        model = _model_of(config)
        make = lambda: InterLLaVA(model, nnx.Rngs(0))  # noqa: E731
    else:
        retriever = config.retriever
        assert retriever is not None
        make = lambda: Retriever(retriever, nnx.Rngs(0))  # noqa: E731
    expected = bundle.parameters(nnx.eval_shape(make))
    paths = {piece.path for pieces in table.values() for piece in pieces}
    if merged:
        paths |= {name for name in expected if ".lora." in name and name.split(".lora.")[0] + ".kernel" in paths}
    host = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    read = bundle.read_parameters(folder / part, expected, dict.fromkeys(sorted(paths), host))
    arrays = {path: np.asarray(value) for path, value in read.items()}
    for key, pieces in table.items():
        parts = []
        for piece in pieces:
            layer = ... if piece.layer is None else piece.layer
            x = arrays[piece.path][layer]
            lora = piece.path.removesuffix("kernel") + "lora."
            if merged and f"{lora}a" in arrays:
                scale = _model_of(config).lora.alpha / _model_of(config).lora.rank
                a, b = (arrays[lora + name][layer].astype(np.float32) for name in "ab")
                x = (x.astype(np.float32) + scale * (a @ b)).astype(x.dtype)
            parts.append(piece.form.there(x))
        yield key, parts[0] if len(parts) == 1 else np.concatenate(parts)


def _added_rows_say_more(folder: epath.Path, config: bundle.BundleConfig) -> bool:
    """Whether rows of added tokens are anything but the mean of the others, which every reader starts them with."""
    table = layouts.llama(_model_of(config).llama).tensors
    both = {key: pieces for key, pieces in table.items() if any(piece.optional for piece in pieces)}
    size = _model_of(config).llama.vocab_size
    return any(
        (value[size:] != value[:size].mean(0, dtype=np.float64).astype(value.dtype)).any()
        for _, value in _published(folder, config, both)
    )


def _torch(x: np.ndarray) -> Any:
    import torch

    x = np.ascontiguousarray(x)
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(x.copy() if not x.flags.writeable else x)


def _hf_folder(path: epath.Path, tensors: Iterator[tuple[str, np.ndarray]], name: str = "model") -> None:
    """Writes safetensors: one file, or several with an index, as `save_pretrained` does."""
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = []
    total = 0
    held: dict[str, Any] = {}

    def flush() -> None:
        save_file(held, path / f"{name}.{len(shards)}.tmp", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    size = 0
    for key, value in tensors:
        if held and size + value.nbytes > SHARD:
            flush()
            size = 0
        held[key] = _torch(value)
        size += value.nbytes
        total += value.nbytes
    flush()
    if len(shards) == 1:
        (path / f"{name}.0.tmp").rename(path / f"{name}.safetensors")
        return
    where: dict[str, str] = {}
    for number, keys in enumerate(shards):
        file = f"{name}-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (path / f"{name}.{number}.tmp").rename(path / file)
        where |= dict.fromkeys(keys, file)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (path / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _hf_config(config: InterLLaVAConfig, with_added: bool) -> dict[str, Any]:
    c = config.llama
    scaling = c.rope_scaling
    rope: dict[str, Any] | None = None
    if scaling.kind != "none":
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
    if rope and scaling.kind == "llama3":
        rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        rope["original_max_position_embeddings"] = scaling.original_positions
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": c.width,
        "intermediate_size": c.mlp_width,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_size,
        "vocab_size": c.vocab_size + with_added * c.added_tokens,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": rope,
        "tie_word_embeddings": c.tied,
    }


def _peft_config(config: InterLLaVAConfig) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": config.lora.rank,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": config.lora.dropout,
        "target_modules": [f"{name}_proj" for name in layouts.adapted(config)],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
