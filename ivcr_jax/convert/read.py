"""Published files -> parameters: what each one is made of, whether all fits, and the arrays themselves, lazily."""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ivcr_jax.convert.files import Weights, empty
from ivcr_jax.convert.layouts import Form, Layout, ours_of, published_shape
from ivcr_jax.convert.stream import Lazy
from ivcr_jax.models.llama import LlamaConfig
from ivcr_jax.models.retriever import RetrieverConfig

# What no published file holds: it starts as a new model's does.
NEW = r"(rank|moment|frame_blocks)\..*|frame_positions|.*\.lora\.[ab]"
MEAN_ROWS = 4096  # read at once for a mean


@dataclasses.dataclass(frozen=True)
class _Origin:
    """Where a parameter, or one layer of it, comes from: rows of a published tensor, or the mean of them."""

    weights: Weights
    key: str
    rows: slice
    form: Form
    shape: tuple[int, ...]
    mean: bool = False

    @property
    def dtype(self) -> np.dtype:
        return self.weights.entries[self.key].dtype

    def read(self) -> np.ndarray:
        if self.mean:
            total = sum(
                self.weights.read(self.key, slice(at, min(at + MEAN_ROWS, self.rows.stop))).astype(np.float64).sum(0)
                for at in range(0, self.rows.stop, MEAN_ROWS)
            )
            mean = (total / self.rows.stop).astype(self.dtype)
            return np.broadcast_to(mean[:, None] if self.form.shape(self.shape) != self.shape else mean, self.shape)
        x = self.weights.read(self.key, self.rows)
        there = self.form.shape(self.shape)
        if self.form.resize is not None and x.shape != there:
            x = self.form.resize(x, there)
        return self.form.back(x, self.shape)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Attributes: parameters: by path. new: paths that no file holds and that start as in a new model. notes: what was
    fitted or left aside, a sentence each. problems: why it cannot be done, a sentence each; empty where it can."""

    parameters: dict[str, Lazy]
    new: list[str]
    notes: list[str]
    problems: list[str]


def plan(
    sources: Sequence[tuple[Layout, Weights]],
    expected: Mapping[str, Any],
    place: Callable[[str, np.ndarray], jax.Array],
    initial: Callable[[Sequence[str]], Mapping[str, jax.Array]],
) -> Plan:
    """Finds an origin for every parameter, and everything that does not fit.

    Args:
      sources: files and their layouts; where two hold the same parameter the later one counts.
      expected: the model's parameters by path, anything with a shape and a dtype.
      place: (path, array) -> the array where it is to lie.
      initial: the values in a new model of the parameters that no file holds.
    """
    shapes = {path: tuple(value.shape) for path, value in expected.items()}
    origins: dict[tuple[str, int | None], _Origin] = {}
    notes: list[str] = []
    problems: list[str] = []
    for layout, weights in sources:
        _match(layout, weights, shapes, origins, notes, problems)
    if problems:
        return Plan({}, [], notes, problems)
    parameters: dict[str, Lazy] = {}
    new: list[str] = []
    values = functools.cache(lambda: initial(new))

    def start(path: str) -> jax.Array:
        return place(path, np.asarray(values()[path]))

    for path, shape in shapes.items():
        stacked = (path, 0) in origins
        if stacked or (path, None) in origins:
            parts = [origins[path, layer] for layer in range(shape[0])] if stacked else [origins[path, None]]
            dtype = parts[0].dtype
            for part in parts[1:]:
                dtype = np.dtype(jnp.promote_types(dtype, part.dtype))
            parameters[path] = Lazy(shape, dtype, _loader(path, shape, dtype, parts, stacked, place))
        elif re.fullmatch(NEW, path):
            new.append(path)
            dtype = np.dtype(expected[path].dtype)
            parameters[path] = Lazy(shape, dtype, functools.partial(start, path))
        else:
            problems.append(f"{path}: none of the given files holds it")
    return Plan(parameters, new, notes, problems)


def _loader(
    path: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    parts: Sequence[_Origin],
    stacked: bool,
    place: Callable[[str, np.ndarray], jax.Array],
) -> Callable[[], jax.Array]:
    def load() -> jax.Array:
        whole = empty(shape, dtype)
        for layer, part in enumerate(parts):
            whole[layer if stacked else ...] = part.read()
        return place(path, whole)

    return load


def _match(
    layout: Layout,
    weights: Weights,
    shapes: Mapping[str, tuple[int, ...]],
    origins: dict[tuple[str, int | None], _Origin],
    notes: list[str],
    problems: list[str],
) -> None:
    """Enters the origins of one file's tensors."""
    keys = set(weights.entries)
    # A checkpoint of several GPUs has its every key under the wrapper's name.
    prefix = "module." if keys and all(key.startswith("module.") for key in keys) else ""
    ignored = 0
    for key in sorted(keys):
        bare = key.removeprefix(prefix)
        if bare not in layout.tensors:
            if any(re.fullmatch(pattern, bare) for pattern in layout.ignored):
                ignored += 1
            else:
                problems.append(f"--{layout.name}: {key}: unexpected, of shape {weights.entries[key].shape}")
    if ignored:
        notes.append(f"--{layout.name}: {ignored} tensors are known and not used")
    for bare, pieces in layout.tensors.items():
        key = prefix + bare
        if key not in keys:
            problems.append(f"--{layout.name}: {key}: missing, of shape {published_shape(shapes, pieces)}")
            continue
        found = weights.entries[key].shape
        firm = tuple(piece for piece in pieces if not piece.optional)
        expected = published_shape(shapes, pieces)
        short = found != expected and len(firm) < len(pieces) and found == published_shape(shapes, firm)
        if short:
            notes.append(f"--{layout.name}: {key}: the rows of added tokens start as the mean of the others")
        elif found != expected and _fits(pieces[0].form, found, expected):
            notes.append(f"--{layout.name}: {key}: fitted from {found} to {expected}")
        elif found != expected:
            problems.append(f"--{layout.name}: {key}: found shape {found}, expected {expected}")
            continue
        start = 0
        for piece in pieces:
            shape = ours_of(shapes, piece)
            rows = piece.form.shape(shape)[0] if len(pieces) > 1 else found[0]
            mean = short and piece.optional
            taken = slice(0, start) if mean else slice(start, start + rows)
            origins[piece.path, piece.layer] = _Origin(weights, key, taken, piece.form, shape, mean)
            start += 0 if mean else rows


def _fits(form: Form, found: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    """Whether a tensor of another number of positions can be brought to the one expected."""
    return (
        form.resize is not None and len(found) == len(expected) and found[-1] == expected[-1] and math.prod(found) > 0
    )


def llama_config_problems(folder: epath.Path, config: LlamaConfig) -> list[str]:
    """What a Hugging Face LLaMA folder's config.json says otherwise: thetas and norms leave no trace in shapes."""
    theirs = _read_json(folder / "config.json")
    rope = {**theirs, **(theirs.get("rope_scaling") or {}), **(theirs.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    scaling = config.rope_scaling
    pairs = {
        "num_attention_heads": (theirs.get("num_attention_heads"), config.heads),
        "num_key_value_heads": (theirs.get("num_key_value_heads"), config.kv_heads),
        "head_dim": (theirs.get("head_dim"), config.head_size),
        "rms_norm_eps": (theirs.get("rms_norm_eps"), config.norm_eps),
        "rope_theta": (rope.get("rope_theta"), config.rope_theta),
        "tie_word_embeddings": (theirs.get("tie_word_embeddings"), config.tied),
        "hidden_act": (theirs.get("hidden_act"), "silu"),
        "rope_type": ({"default": "none"}.get(kind, kind), scaling.kind),
    }
    if scaling.kind != "none":
        pairs["factor"] = (rope.get("factor"), scaling.factor)
    if scaling.kind == "llama3":
        pairs["low_freq_factor"] = (rope.get("low_freq_factor"), scaling.low_freq_factor)
        pairs["high_freq_factor"] = (rope.get("high_freq_factor"), scaling.high_freq_factor)
        original = rope.get("original_max_position_embeddings")
        pairs["original_max_position_embeddings"] = (original, scaling.original_positions)
    return _unequal("--llama: config.json", pairs if theirs else {})


def siglip_config_problems(folder: epath.Path, config: RetrieverConfig) -> list[str]:
    """The same of a SigLIP folder: heads, activations and norms leave no trace in shapes either."""
    theirs = _read_json(folder / "config.json")
    problems = []
    for tower, ours in (("text_config", config.text), ("vision_config", config.vit)):
        found = theirs.get(tower) or {}
        activation = str(found["hidden_act"]) if "hidden_act" in found else None
        pairs = {
            "num_attention_heads": (found.get("num_attention_heads"), ours.heads),
            "layer_norm_eps": (found.get("layer_norm_eps"), ours.norm_eps),
            "hidden_act": ("gelu_tanh" if activation == "gelu_pytorch_tanh" else activation, ours.activation),
        }
        problems += _unequal(f"--siglip: config.json: {tower}", pairs)
    return problems


def _read_json(path: epath.Path) -> dict[str, Any]:
    """An empty one where there is none."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise ValueError(f"{path}: found {path.read_text()[:40]!r}, expected JSON: {error}") from None


def _unequal(where: str, pairs: Mapping[str, tuple[Any, Any]]) -> list[str]:
    return [
        f"{where}: {name}: found {found!r}, the configuration has {ours!r}"
        for name, (found, ours) in pairs.items()
        if found is not None and found != ours
    ]
