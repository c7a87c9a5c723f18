"""A model folder: what converting, pretraining and exporting write, and training and inference read.

    config.json               sizes of the models, wording of the prompt
    model/                    parameters of the dialogue model (Orbax), if there is one
    retriever/                parameters of the first stage (Orbax), if there is one
    tokenizer.model           SentencePiece, of the decoder; retriever_tokenizer.model of the first stage

`load(folder)` needs jax, flax, orbax, numpy and sentencepiece alone. What is in a folder is said by its config.json:
nothing is guessed from the weights.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx

from ivcr_jax.config import flat, from_dict, listed, to_dict
from ivcr_jax.data import manifest, prompt
from ivcr_jax.data.encoding import frame_ids
from ivcr_jax.data.tokenizer import Tokenizer
from ivcr_jax.models.interllava import InterLLaVA, InterLLaVAConfig
from ivcr_jax.models.layers import Compute
from ivcr_jax.models.retriever import Retriever, RetrieverConfig
from ivcr_jax.models.video_encoder import EncodedVideo
from ivcr_jax.sharding import shardings

CONFIG, MODEL, RETRIEVER = "config.json", "model", "retriever"
TOKENIZER, RETRIEVER_TOKENIZER = "tokenizer.model", "retriever_tokenizer.model"


@dataclasses.dataclass(frozen=True)
class BundleConfig:
    """Attributes: model: of the dialogue model, or None. retriever: of the first stage, or None. style: of texts."""

    model: InterLLaVAConfig | None
    retriever: RetrieverConfig | None
    style: prompt.PromptStyle

    def to_json(self) -> str:
        """The text of config.json."""
        return json.dumps(to_dict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "BundleConfig":
        """Reads it back; raises ValueError, naming the field, for anything but a whole configuration."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"config.json: found {text[:40]!r}, expected JSON: {error}") from None
        if sorted(values) != ["model", "retriever", "style"]:
            raise ValueError(f"config.json: found {sorted(values)}, expected model, retriever and style")
        return cls.from_values(values)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> "BundleConfig":
        """From nested mappings such as an ml_collections.ConfigDict's `to_dict()`. What a training configuration has
        besides is left alone."""
        if missing := {"model", "retriever", "style"} - {*values}:
            raise ValueError(f"config: {listed(sorted(missing))} missing, expected model, retriever and style")
        model, retriever = values["model"], values["retriever"]
        return cls(
            None if model is None else from_dict(InterLLaVAConfig, model, "config.model"),
            None if retriever is None else from_dict(RetrieverConfig, retriever, "config.retriever"),
            from_dict(prompt.PromptStyle, values["style"], "config.style"),
        )


class Bundle:
    """Models and their tokenizers, ready to use. Attributes as in BundleConfig, and the tokenizers, or None."""

    def __init__(
        self,
        config: BundleConfig,
        model: InterLLaVA | None,
        retriever: Retriever | None,
        tokenizer: Tokenizer | None,
        retriever_tokenizer: Tokenizer | None,
    ) -> None:
        self.config, self.model, self.retriever = config, model, retriever
        self.tokenizer, self.retriever_tokenizer = tokenizer, retriever_tokenizer

    def encode_video(
        self,
        frames: np.ndarray,
        timestamps: Sequence[float] | None = None,
        *,
        text: np.ndarray | None = None,
        text_mask: np.ndarray | None = None,
        intermediates: bool = False,
    ) -> Any:
        """One video as the decoder's visual tokens.

        Args:
          frames: u8[T, H, W, 3] pixels, or f32 of that shape normalised as the ViT expects them.
          timestamps: the frames' times in seconds. Or, ready made,
          text: i32[T, S] token ids of each frame's sentence, and
          text_mask: bool[T, S], which of them are there; None is all.
          intermediates: whether to hand out what lies between, too.

        Returns:
          f32[K, D]; with `intermediates` also a dict: "vit", "vit_norm" f32[T, P, Dv], "qformer" f32[T, Q + S, E],
          "frames" f32[T, Q, E] (with frame positions), "video_qformer" f32[windows, Q, E].

        Raises:
          ValueError: for both or neither of timestamps and text, a number of them that is not T, an id beyond the word
            table, or a folder without a dialogue model, or without a tokenizer where timestamps are given.
        """
        if self.model is None:
            raise ValueError("this folder holds no dialogue model, only a retriever")
        if (timestamps is None) == (text is None):
            raise ValueError("expected either timestamps or ready token ids in `text`")
        if timestamps is not None:
            text, text_mask = self.frame_text(timestamps)
        assert text is not None
        table = self.model.encoder.qformer.config.vocab_size
        if len(text) != len(frames):
            raise ValueError(f"{len(text)} times or sentences for {len(frames)} frames")
        if table and text.size and not 0 <= text.min() <= text.max() < table:
            raise ValueError(f"text holds ids {text.min()} to {text.max()}; the Q-Former's word table has {table} rows")
        mask = np.ones(text.shape, bool) if text_mask is None else text_mask
        sentences = (text[None], mask[None]) if table else (None, None)
        encoded = _encode(self.model.encoder, jnp.asarray(frames)[None], *sentences)
        tokens = encoded.tokens[0].astype(jnp.float32)
        if not intermediates:
            return tokens
        between = encoded.intermediates | {"frames": encoded.frames}
        return tokens, {name: value[0].astype(jnp.float32) for name, value in between.items()}

    def frame_text(self, timestamps: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
        """Times in seconds of T frames -> i32[T, S] token ids of their sentences, and bool[T, S] which are there.

        Raises ValueError where the folder has no tokenizer.
        """
        if self.tokenizer is None:
            raise ValueError(
                f"timestamps need a tokenizer, and the folder has no {TOKENIZER}; give ready ids in `text`"
            )
        sentences = prompt.frame_texts(timestamps, self.config.style)
        encoded = [frame_ids(self.tokenizer, sentence) for sentence in sentences]
        text = np.full((len(encoded), max(map(len, encoded))), self.tokenizer.pad_id, np.int32)
        mask = np.zeros(text.shape, bool)
        for row, ids in enumerate(encoded):
            text[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return text, mask


@nnx.jit
def _encode(encoder: Any, frames: jax.Array, text: jax.Array | None, text_mask: jax.Array | None) -> EncodedVideo:
    return encoder(frames, None, text, text_mask)


def load(folder: epath.PathLike, *, mesh: Any = None, compute: Compute = Compute(dtype="float32")) -> Bundle:
    """Reads a model folder.

    Args:
      folder: from `python -m ivcr_jax.convert` or `python -m ivcr_jax.export`.
      mesh: from `sharding.make_mesh`: each device reads its own part of every parameter. None is one device.
      compute: how the models are computed.

    Raises:
      FileNotFoundError: no folder, or no config.json in it.
      ValueError: parameters that are not those of the configuration, or a tokenizer that does not fit them.
    """
    folder = epath.Path(folder).resolve()
    config = read_config(folder)
    model = retriever = None
    if config.model is not None:
        of_model = config.model
        model = _restore(folder / MODEL, lambda: InterLLaVA(of_model, nnx.Rngs(0), compute), mesh)
    if config.retriever is not None:
        of_retriever = config.retriever
        retriever = _restore(folder / RETRIEVER, lambda: Retriever(of_retriever, nnx.Rngs(0), compute), mesh)
    tokenizers = {
        name: read_tokenizer(folder / name, config) if (folder / name).exists() else None
        for name in (TOKENIZER, RETRIEVER_TOKENIZER)
    }
    return Bundle(config, model, retriever, tokenizers[TOKENIZER], tokenizers[RETRIEVER_TOKENIZER])


def read_config(folder: epath.PathLike) -> BundleConfig:
    """The configuration of a model folder. Raises FileNotFoundError where there is none, ValueError for a wrong one."""
    path = epath.Path(folder) / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{folder}: found no {CONFIG}, expected a folder that convert or export wrote")
    return BundleConfig.from_json(path.read_text())


def fingerprint(folder: epath.PathLike) -> str:
    """Names what a model folder holds: a SHA-256 over config.json, the tokenizers and the files of the parameters.

    It stays the same where the folder is copied, and changes with any weight. The same weights written twice have two:
    Orbax gives its files other names each time. A card is no part of it: what was made with the weights stays valid
    whatever is said of them, and where nothing fits. Nothing is loaded; files are read several at a time.

    Raises:
      FileNotFoundError: no folder, or no config.json in it.
    """
    folder = epath.Path(folder).resolve()
    read_config(folder)  # or it is no model folder
    names = [name for name in (CONFIG, TOKENIZER, RETRIEVER_TOKENIZER) if (folder / name).exists()]
    for part in (MODEL, RETRIEVER):
        for where, _, files in os.walk(folder / part):
            # Hidden files are those of file managers and network file systems.
            names += [os.path.relpath(os.path.join(where, file), folder) for file in files if not file.startswith(".")]

    def digest(name: str) -> str:
        with open(folder / name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    names.sort()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        lines = [f"{name} {found}\n" for name, found in zip(names, pool.map(digest, names), strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_tree(path: epath.PathLike, tree: Mapping[str, Any]) -> None:
    """Writes nested dicts of arrays as an Orbax checkpoint."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as writer:
        writer.save(epath.Path(path).resolve(), args=ocp.args.PyTreeSave(dict(tree)))


def save(
    folder: epath.PathLike,
    config: BundleConfig,
    *,
    model: Mapping[str, Any] | None = None,
    retriever: Mapping[str, Any] | None = None,
    tokenizers: Mapping[str, bytes],
    write: Callable[[epath.Path, Mapping[str, Any]], None] = write_tree,
) -> None:
    """Writes a model folder, which appears when it is whole. For one process.

    Args:
      folder: must not exist.
      config: of the models.
      model, retriever: parameters by dotted path, as `weights(module)` gives them, in the dtypes they are to be kept
        in; None where the configuration has None.
      tokenizers: SentencePiece models by file name, TOKENIZER or RETRIEVER_TOKENIZER.
      write: of a tree to a path.

    Raises:
      FileExistsError: there is something at `folder`.
      ValueError: parameters of a model that the configuration has not, or none of one that it has; a tokenizer under
        another name, or one that does not fit the configuration.
    """
    folder = epath.Path(folder).resolve()
    if folder.exists():
        raise FileExistsError(f"{folder} exists; a model folder is written to a new one")
    given = {MODEL: (model, config.model), RETRIEVER: (retriever, config.retriever)}
    for name, (arrays, of_part) in given.items():
        if arrays is None and of_part is not None:
            raise ValueError(f"config.{name}: found no parameters for it")
        if arrays is not None and of_part is None:
            raise ValueError(f"{name}: found parameters, but config.{name} is None")
    for name, proto in tokenizers.items():
        if name not in (TOKENIZER, RETRIEVER_TOKENIZER):
            raise ValueError(f"tokenizers: found {name!r}, expected {TOKENIZER} or {RETRIEVER_TOKENIZER}")
        try:
            make_tokenizer(proto, config, name)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    with manifest.atomic(folder) as aside:
        aside.mkdir()
        for name, (arrays, _) in given.items():
            if arrays is not None:
                write(aside / name, nest(arrays))
        for name, proto in tokenizers.items():
            (aside / name).write_bytes(proto)
        (aside / CONFIG).write_text(config.to_json())


def read_tokenizer(path: epath.Path, config: BundleConfig, name: str = "") -> Tokenizer:
    """Reads a folder's tokenizer.

    Args:
      path: of a SentencePiece model.
      config: of the models.
      name: TOKENIZER or RETRIEVER_TOKENIZER; the path's own where it is not given.

    Raises:
      ValueError: where it is none, or its ids are not the rows of the embedding table.
    """
    try:
        return make_tokenizer(path.read_bytes(), config, name or path.name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def make_tokenizer(proto: bytes, config: BundleConfig, name: str) -> Tokenizer:
    """As `read_tokenizer`, of the bytes of a SentencePiece model."""
    of_model = name == TOKENIZER
    tokenizer = Tokenizer.from_proto(proto, prompt.VIDEO_TOKENS if of_model else ())
    if of_model and config.model is not None:
        llama = config.model.llama
        rows, sizes = llama.vocab_size + llama.added_tokens, f"{llama.vocab_size} + {llama.added_tokens} added tokens"
    elif not of_model and config.retriever is not None:
        rows = config.retriever.text.vocab_size
        sizes = f"{rows} words"
    else:
        return tokenizer
    if tokenizer.vocab_size != rows:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} ids; expected {rows}, for a table of {sizes}")
    return tokenizer


def parameters(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Every parameter by its dotted path, such as "llama.layers.q.kernel"."""
    return {".".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(module, nnx.Param))}


def weights(module: nnx.Module) -> dict[str, jax.Array]:
    """Every parameter's array by its dotted path."""
    return {path: variable.get_value() for path, variable in parameters(module).items()}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": x} -> {"a": {"b": x}}, the tree that a checkpoint holds."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, name = path.split(".")
        node = tree
        for part in folders:
            node = node.setdefault(part, {})
        node[name] = value
    return tree


def read_folder(
    folder: epath.PathLike, wanted: Mapping[str, jax.ShapeDtypeStruct], known: Collection[str]
) -> dict[str, jax.Array]:
    """Those of the wanted parameters that a model folder has, to train on from; the others begin as new.

    Args:
      folder: a model folder.
      wanted: by path, "model." or "retriever." in front: shapes with shardings.
      known: every path of the models, wanted or not.

    Raises:
      FileNotFoundError: no folder, or no config.json in it.
      ValueError: for a parameter of another shape, or one that the models lack: it would be lost without a word.
    """
    folder = epath.Path(folder).resolve()
    read_config(folder)  # or it is no model folder
    arrays: dict[str, jax.Array] = {}
    for name in (MODEL, RETRIEVER):
        prefix = f"{name}."
        mine = {path.removeprefix(prefix) for path in known if path.startswith(prefix)}
        if not mine or not (folder / name).exists():
            continue
        found = _metadata(folder / name)
        if lost := sorted({*found} - mine):
            raise ValueError(f"{folder / name} holds what config.{name} has no place for: {listed(lost)}")
        placed = {path: wanted[prefix + path].sharding for path in found if prefix + path in wanted}
        shapes = {path: wanted.get(prefix + path, value) for path, value in found.items()}
        read = read_parameters(folder / name, shapes, placed) if placed else {}
        arrays |= {prefix + path: value for path, value in read.items()}
    return arrays


def _metadata(path: epath.Path) -> dict[str, Any]:
    """What a checkpoint holds, by path: shapes and dtypes."""
    with ocp.StandardCheckpointer() as checkpointer:
        metadata = checkpointer.metadata(path).item_metadata if path.exists() else None
    if metadata is None:
        raise ValueError(f"{path}: found no whole checkpoint, expected the parameters that {CONFIG} tells of")
    return flat(metadata.tree)


def read_parameters(path: epath.Path, expected: Mapping[str, Any], placed: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Parameters by path, in the dtypes they were written in.

    Args:
      path: of the Orbax checkpoint.
      expected: what the model has, by path: anything with a shape.
      placed: those wanted, by path: the sharding of each.

    Raises:
      ValueError: where the checkpoint holds other parameters or shapes than expected.
    """
    found = _metadata(path)
    wrong = [f"{name}: missing" for name in sorted({*expected} - {*found})]
    wrong += [f"{name}: unexpected" for name in sorted({*found} - {*expected})]
    wrong += [
        f"{name}: found shape {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in sorted({*found} & {*expected})
        if tuple(found[name].shape) != tuple(expected[name].shape)
    ]
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} parameters are not those of {CONFIG}: " + "; ".join(wrong[:20]))
    wanted = {
        name: jax.ShapeDtypeStruct(found[name].shape, found[name].dtype, sharding=sharding)
        for name, sharding in placed.items()
    }
    arguments = ocp.args.PyTreeRestore(
        item=nest(wanted),
        restore_args=ocp.checkpoint_utils.construct_restore_args(nest(wanted)),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        return flat(reader.restore(path, args=arguments))


def _restore(path: epath.Path, make: Callable[[], Any], mesh: Any) -> Any:
    definition, state = nnx.split(nnx.eval_shape(make))
    flat = {".".join(map(str, where)): (where, value) for where, value in nnx.to_flat_state(state)}
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    lies = dict.fromkeys(flat, one)
    if mesh is not None:
        placed = nnx.to_flat_state(shardings(state, mesh))
        lies = {".".join(map(str, where)): value.get_value() for where, value in placed}
    arrays = read_parameters(path, {name: value for name, (_, value) in flat.items()}, lies)
    read = [(where, value.replace(arrays[name])) for name, (where, value) in flat.items()]
    return nnx.merge(definition, nnx.from_flat_state(read))
