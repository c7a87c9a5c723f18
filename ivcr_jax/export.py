"""Writes a model folder from a run: what was trained, and with it what was not.

    python -m ivcr_jax.export --workdir=RUN --out=FOLDER

It holds the parameters of the newest whole checkpoint, the frozen ones of the folder the run began with, and from there
too a model that the run did not train. So the folder is whole, and another run may begin with it.
"""

import dataclasses
import json
import sys

import jax
from absl import app, flags, logging
from etils import epath

from ivcr_jax import bundle, command, train
from ivcr_jax.checkpoint import FOLDER, Checkpoints
from ivcr_jax.config import from_dict
from ivcr_jax.sharding import MeshConfig, make_mesh
from ivcr_jax.training import Program, TrainConfig


def export(workdir: epath.PathLike, out: epath.PathLike) -> int:
    """Writes a model folder. For one process.

    Args:
      workdir: of a run, going on or done.
      out: the folder to write.

    Returns:
      the step the parameters are of.

    Raises:
      FileNotFoundError: there is no run, or no checkpoint in it.
      FileExistsError: there is something at `out`.
      ValueError: no checkpoint can be read, or the run trained on frozen weights of another folder than it names now.
    """
    workdir = epath.Path(workdir)
    recipe = workdir / train.CONFIG
    if not recipe.exists() or not (workdir / FOLDER).is_dir():
        raise FileNotFoundError(f"{workdir} holds no {train.CONFIG} and {FOLDER}; expected the workdir of a run")
    if epath.Path(out).exists():
        raise FileExistsError(f"{out} exists; a model folder is written to a new one")
    config = from_dict(TrainConfig, json.loads(recipe.read_text()))
    # The devices of this machine, whatever the run had. Batches are not read.
    data = dataclasses.replace(config.data, batch_size=jax.device_count())
    config = dataclasses.replace(config, mesh=MeshConfig(), accumulate=1, data=data)
    program = Program(config, make_mesh(config.mesh))
    checkpoints = Checkpoints(workdir, config.checkpoint, read_only=True)
    state, frozen, position, origin = train.start(config, workdir, program, checkpoints)
    if position is None:
        raise FileNotFoundError(f"{workdir} holds no checkpoint yet; expected one in {workdir / FOLDER}")
    logging.info("step %d: %s", int(state.step), origin)
    parameters = {**state.params, **frozen}
    tokenizers = {name: tokenizer.proto for name, tokenizer in train.read_tokenizers(config, workdir).items()}
    parts: dict[str, dict[str, jax.Array] | None] = {}
    before: bundle.Bundle | None = None
    for name in (bundle.MODEL, bundle.RETRIEVER):
        prefix = f"{name}."
        mine = {path.removeprefix(prefix): value for path, value in parameters.items() if path.startswith(prefix)}
        if not mine and getattr(config, name) is not None:
            before = before or (bundle.load(config.init) if config.init else None)
            module = getattr(before, name, None)
            mine = {} if module is None else bundle.weights(module)
        parts[name] = mine or None
    if before is not None and before.retriever_tokenizer is not None:
        tokenizers.setdefault(bundle.RETRIEVER_TOKENIZER, before.retriever_tokenizer.proto)
    model, retriever = parts[bundle.MODEL], parts[bundle.RETRIEVER]
    held = dataclasses.replace(  # what the run neither trained nor began with is not there
        config.bundle, model=config.model if model else None, retriever=config.retriever if retriever else None
    )
    bundle.save(out, held, model=model, retriever=retriever, tokenizers=tokenizers)
    return int(state.step)


def main(argv: list[str]) -> None:
    """Writes a model folder from a run."""
    command.refuse_arguments(argv)
    command.quiet()
    try:
        step = export(flags.FLAGS.workdir, flags.FLAGS.out)
    except (ValueError, OSError) as error:
        sys.exit(f"export: {error}")
    print(f"{flags.FLAGS.out}: step {step} of {flags.FLAGS.workdir}")


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Of the run.", required=True)
    flags.DEFINE_string("out", None, "The folder to write. It must not exist.", required=True)
    app.run(main)
