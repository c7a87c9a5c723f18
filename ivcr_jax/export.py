"""Writes a model folder from a run: what was trained, and with it what was not, ready to converse or to train on.

    python -m ivcr_jax.export --workdir=RUN --out=FOLDER [--dtype=bfloat16|float32] [--nocalibrate]

It holds the parameters of the newest whole checkpoint, the frozen ones of the folder the run began with, and from there
too a model that the run did not train; LoRA is merged. Beside them lies a card (ivcr_jax/card.py) that says what made
them, and below which score nothing fits.
"""

import collections
import dataclasses
import json
import pathlib
import platform
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import jaxlib
from absl import app, flags, logging
from etils import epath
from flax import nnx

from ivcr_jax import bundle, calibration, card, command, telemetry, train
from ivcr_jax.checkpoint import FOLDER, Checkpoints
from ivcr_jax.config import from_dict
from ivcr_jax.data.manifest import atomic
from ivcr_jax.data.store import DatasetNotFound, DialogueStore, VideoStore
from ivcr_jax.models import lora
from ivcr_jax.sharding import MeshConfig, make_mesh
from ivcr_jax.training import Program, TrainConfig

GONE = (DatasetNotFound, OSError, ValueError)  # what opening a store raises where it is not whole


def export(workdir: epath.PathLike, out: epath.PathLike, *, dtype: str | None = None, calibrate: bool = True) -> int:
    """Writes a model folder. For one process.

    Args:
      workdir: of a run, going on or done.
      out: the folder to write.
      dtype: of the parameters, "bfloat16" or "float32"; None is that of the run's computation: the run has not used
        more than it holds. Parameters with one axis are float32.
      calibrate: whether to measure, on the run's validation split, when nothing fits. Where its data are gone, the
        folder is written all the same, without a threshold.

    Returns:
      the step the parameters are of.

    Raises:
      FileNotFoundError: there is no run, or no checkpoint in it.
      FileExistsError: there is something at `out`.
      ValueError: no checkpoint can be read, the run trained on frozen weights of another folder than it names now, or
        `dtype` is another.
    """
    workdir = epath.Path(workdir)
    recipe = workdir / train.CONFIG
    if not recipe.exists() or not (workdir / FOLDER).is_dir():
        raise FileNotFoundError(f"{workdir} holds no {train.CONFIG} and {FOLDER}; expected the workdir of a run")
    if epath.Path(out).exists():
        raise FileExistsError(f"{out} exists; a model folder is written to a new one")
    config = from_dict(TrainConfig, json.loads(recipe.read_text()))
    written = dataclasses.replace(config.compute, dtype=dtype or config.compute.dtype).dtype
    # The devices of this machine, whatever the run had. Batches are not read.
    here = dataclasses.replace(
        config,
        mesh=MeshConfig(),
        accumulate=1,
        data=dataclasses.replace(config.data, batch_size=jax.device_count()),
        # Frozen parameters are read in it. Where f32 is wanted, nothing is rounded on the way.
        compute=dataclasses.replace(config.compute, dtype="float32") if written == "float32" else config.compute,
    )
    program = Program(here, make_mesh(here.mesh))
    checkpoints = Checkpoints(workdir, here.checkpoint, read_only=True)
    state, frozen, position, origin = train.start(here, workdir, program, checkpoints)
    if position is None:
        raise FileNotFoundError(f"{workdir} holds no checkpoint yet; expected one in {workdir / FOLDER}")
    step = int(state.step)
    logging.info("step %d: %s", step, origin)
    tokenizers = train.read_tokenizers(config, workdir)
    system = program.merge(state.params, frozen)
    parts: dict[str, dict[str, jax.Array] | None] = {}
    merged: dict[str, lora.Lora] = {}
    before: bundle.Bundle | None = None
    for name in (bundle.MODEL, bundle.RETRIEVER):
        module = getattr(system, name)
        if module is None and getattr(config, name) is not None:
            before = before or (bundle.load(config.init) if config.init else None)
            module = getattr(before, name, None)
        if module is not None:
            merged |= lora.merge(module, written)
        parts[name] = None if module is None else cast(module, written)
    if before is not None and before.retriever_tokenizer is not None:
        tokenizers.setdefault(bundle.RETRIEVER_TOKENIZER, before.retriever_tokenizer)
    model, retriever = parts[bundle.MODEL], parts[bundle.RETRIEVER]
    held = dataclasses.replace(  # what the run neither trained nor began with is not there
        config.bundle, model=config.model if model else None, retriever=config.retriever if retriever else None
    )
    if held.model is not None:
        held = dataclasses.replace(
            held, model=dataclasses.replace(held.model, lora=dataclasses.replace(held.model.lora, rank=0))
        )
    described = {
        "run": {
            "step": step,
            "steps": config.steps,
            "seed": config.seed,
            "began_with": epath.Path(config.init).name if config.init else None,
            "losses": {name: weight for name, weight in config.losses.weights.items() if weight},
        },
        "data": data_of(config) | {"stream": position["fingerprint"]},
        "validation": telemetry.last_validation(workdir, step),
        "parameters": counts(parts, state.params),
        "dtype": written,
        "lora": next(
            ({"rank": found.a.shape[-1], "alpha": found.scale * found.a.shape[-1]} for found in merged.values()), None
        ),
        "tokenizers": {name: tokenizer.fingerprint for name, tokenizer in tokenizers.items()},
        "code": revision(),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": jaxlib.__version__,
            "flax": flax.__version__,
        },
        "calibration": calibrated(config, workdir, retriever, calibrate),
    }
    with atomic(out) as aside:
        protos = {name: tokenizer.proto for name, tokenizer in tokenizers.items()}
        bundle.save(aside, held, model=model, retriever=retriever, tokenizers=protos)
        card.write(aside, described)
    return step


def cast(module: nnx.Module, dtype: str) -> dict[str, jax.Array]:
    """A model's parameters by path in a dtype.

    Those with one axis (norms, biases, scales) are float32: norms are computed in it, and they are a thousandth of all.
    """
    return {
        path: variable.get_value().astype(jnp.float32 if len(variable.get_metadata("axes")) == 1 else dtype)
        for path, variable in bundle.parameters(module).items()
    }


def counts(parts: Mapping[str, Any], trained: Mapping[str, jax.Array]) -> dict[str, dict[str, int]]:
    """How many numbers each part of the models has ("count"), and how many the run trained for it ("trained").

    Args:
      parts: of each model by name, its parameters by path, or None.
      trained: the run's trained parameters by path, LoRA's among them.
    """
    count: collections.Counter[str] = collections.Counter()
    learnt: collections.Counter[str] = collections.Counter()
    for name, flat in parts.items():
        for path, value in (flat or {}).items():
            count[f"{name}.{path.split('.')[0]}"] += value.size
    for path, value in trained.items():
        learnt[".".join(path.split(".")[:2])] += value.size
    return {part: {"count": count[part], "trained": learnt[part]} for part in sorted(count)}


def data_of(config: TrainConfig) -> dict[str, Any]:
    """What a run was trained on, by name and fingerprint; of data that are gone the name alone is known. No paths."""
    dialogues, videos = config.data.dialogues, config.data.videos
    paths = {"dialogues": dialogues, "videos": videos}
    found: dict[str, dict[str, Any]] = {
        part: {"name": epath.Path(path).name, "what": None, "fingerprint": None} for part, path in paths.items()
    }
    try:
        train_split = DialogueStore(dialogues, "train")
        found["dialogues"] |= {"what": f"{len(train_split)} dialogues", "fingerprint": train_split.fingerprint}
    except GONE as error:
        logging.warning("the card says little of the dialogues: %s", error)
    try:
        store = VideoStore(videos)
        found["videos"] |= {"what": f"{len(store)} videos as {store.kind}", "fingerprint": store.fingerprint}
    except GONE as error:
        logging.warning("the card says little of the videos: %s", error)
    return found


def calibrated(
    config: TrainConfig, workdir: epath.Path, retriever: Mapping[str, jax.Array] | None, asked: bool
) -> dict[str, Any]:
    """The card's `calibration`: fields of `calibration.Calibration`; or `threshold` None and, in words, `why`."""
    if retriever is None:
        return {"threshold": None, "why": "the folder holds no retriever"}
    if not asked:
        return {"threshold": None, "why": "nobody asked for one"}
    try:
        return dataclasses.asdict(calibration.calibrate(config, workdir, retriever))
    except Exception as error:  # whatever damaged data lead to: the folder is worth more than its threshold
        logging.warning("no threshold for when nothing fits: %s", " ".join(str(error).split()))
        # Without the reason's own words: they name paths of this machine.
        measured = isinstance(error, calibration.CannotTell)
        return {"threshold": None, "why": str(error) if measured else f"the run's data led to a {type(error).__name__}"}


def revision() -> dict[str, Any]:
    """The git revision of this code, and whether files it holds were changed; "unknown" and None outside a checkout."""
    here = pathlib.Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # installed below another project's checkout, it is not of that
        return {"revision": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {"revision": "unknown", "changed": None}


def main(argv: list[str]) -> None:
    """Writes a model folder from a run."""
    command.refuse_arguments(argv)
    command.quiet()
    try:
        args = flags.FLAGS
        step = export(args.workdir, args.out, dtype=args.dtype, calibrate=args.calibrate)
    except (ValueError, OSError) as error:
        sys.exit(f"export: {error}")
    print(f"{args.out}: step {step} of {args.workdir}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Of the run.", required=True)
    flags.DEFINE_string("out", None, "The folder to write. It must not exist.", required=True)
    flags.DEFINE_enum("dtype", None, ["bfloat16", "float32"], "Of the parameters; by default what the run computed in.")
    flags.DEFINE_bool("calibrate", True, "Measures, on the run's validation split, when nothing fits.")
    app.run(main)
