"""Trains: mesh -> data -> models -> restore -> loop (validate, save, next batch, step). One process on each host.

    python -m ivcr_jax.train --config=configs/tiny.py --workdir=DIR [--config.steps=100 ...]

In WORKDIR: config.json and tokenizers, checkpoints/, metrics.jsonl, tensorboard/, plans/. Started again with the same
command it goes on where its newest whole checkpoint stands, on any mesh and any number of processes.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import config_flags

from ivcr_jax import bundle, command, distributed, encode, flops, validation
from ivcr_jax.checkpoint import FOLDER, Checkpoints
from ivcr_jax.config import flat, json_of, listed
from ivcr_jax.data.batches import BatchShape
from ivcr_jax.data.manifest import atomic
from ivcr_jax.data.pipeline import Pipeline, PipelineConfig
from ivcr_jax.data.store import DatasetNotFound, DialogueStore, VideoStore
from ivcr_jax.data.tokenizer import Tokenizer
from ivcr_jax.models.vit import ViTConfig
from ivcr_jax.sharding import MeshConfig, by_rows, make_mesh
from ivcr_jax.telemetry import Telemetry
from ivcr_jax.training import Arrays, Program, State, TrainConfig, read_config

CONFIG = "train.json"


def train(config: TrainConfig, workdir: epath.PathLike) -> None:
    """Trains, or goes on training, in a folder.

    Raises:
      ValueError, DatasetNotFound, FileNotFoundError: before the first step, for what does not go together.
      OSError: where a checkpoint cannot be written.
      FloatingPointError: after `config.max_skipped` steps in a row without finite gradients.
    """
    workdir = epath.Path(workdir).resolve()
    mesh = make_mesh(config.mesh)
    program = Program(config, mesh)
    tokenizers = read_tokenizers(config, workdir)
    stream = pipeline(config, tokenizers, mesh, "train", workdir)
    held_out = pipeline(config, tokenizers, mesh, "validation", workdir) if config.eval.every else None
    if config.checkpoint.keep_best and held_out and config.checkpoint.best not in validation.names(config.losses):
        known = ", ".join(sorted(validation.names(config.losses)))
        raise ValueError(f"checkpoint.best is {config.checkpoint.best!r}; expected one of {known}")
    check_features(config, program.factors)
    checkpoints = Checkpoints(workdir, config.checkpoint)
    state, frozen, position, origin = start(config, workdir, program, checkpoints)
    write_folder(workdir, config, tokenizers)

    batches = iter(stream)
    if position is not None:
        batches.set_state(position)
    shape = BatchShape.of(VideoStore(config.data.videos), tokenizers[bundle.TOKENIZER], config.pack)
    work = flops.train_step(config, program.factors, frame_text=shape.frame_text, features=shape.kind == "features")
    peak = flops.PEAK.get(jax.devices()[0].device_kind)
    step = first = int(state.step)
    peak = peak and peak * jax.device_count()
    telemetry = Telemetry(workdir, config.log, step=step, steps=config.steps, flops=work, peak=peak)
    trained, whole = (sum(leaf.size for leaf in tree.values()) for tree in (state.params, frozen))
    telemetry.say(
        f"{trained:,} parameters trained, {whole:,} frozen; mesh {dict(mesh.shape)}; {work:.3g} FLOPs a step; "
        f"{len(stream.plan)} rows, {stream.steps} steps a pass; step {step} of {config.steps}: {origin}"
    )
    run = {"seed": config.seed, "init": config.init}
    loader = telemetry.batches(batches)
    metrics: dict[str, float] | None = None
    with jax.set_mesh(mesh):
        while True:
            # Evaluate, save, and only then take the next batch: what is saved is what the next step begins with.
            told = checkpoints.must_stop(step)
            stop = told or step >= config.steps
            # Who is told to stop has seconds. What was left out then is done at the next start, and nothing twice.
            due = step > 0 and held_out is not None and (step % config.eval.every == 0 or step >= config.steps)
            if held_out and due and not told and not (step == first and checkpoints.judged(step)):
                check(telemetry.flush(), config, step)
                metrics = validate(config, program, held_out, state.params, frozen)
                telemetry.write(step, {f"validation/{name}": value for name, value in metrics.items()})
                telemetry.say(f"step {step}  validation  " + "  ".join(f"{k} {v:.3f}" for k, v in metrics.items()))
            if step and (stop or (config.checkpoint.every and step % config.checkpoint.every == 0)):
                check(telemetry.flush(), config, step)
                checkpoints.save(step, state, batches.get_state(), run, metrics)
            metrics = None
            if stop:
                break
            state, numbers = program.train_step(state, frozen, place(next(loader), mesh, config))
            check(telemetry.step(step, numbers), config, step)
            step += 1
    checkpoints.close()
    telemetry.say(f"step {step}: " + ("done" if step >= config.steps else "told to stop; saved"))
    telemetry.close()


def start(
    config: TrainConfig, workdir: epath.Path, program: Program, checkpoints: Checkpoints
) -> tuple[State, Arrays, dict[str, Any] | None, str]:
    """The state to begin with, the frozen parameters, the data's position, and where they are from.

    In this order: the workdir's own newest checkpoint; that of `config.resume`; `config.init`, a model folder; random
    weights. Frozen parameters are always those of `config.init`, or drawn from the seed.
    """
    given: Mapping[str, jax.Array] = {}
    found = checkpoints.restore(program.state)
    where = str(workdir)
    if found is None and config.resume:
        if not (epath.Path(config.resume) / FOLDER).is_dir():
            raise FileNotFoundError(f"resume: {config.resume} holds no {FOLDER}; expected the workdir of a run")
        other = Checkpoints(config.resume, config.checkpoint, read_only=True)
        found, where = other.restore(program.state), config.resume
        if found is None:
            raise ValueError(f"resume: {config.resume} holds no checkpoint")
    if config.init:
        wanted: dict[str, Any] = {**program.frozen, **({} if found else program.state.params)}
        given = bundle.read_folder(config.init, wanted, program.factors)
    if found is None:
        state = program.fresh(program.parameters(program.state.params, given))
        new = [path for path in program.factors if path not in given]
        origin = f"weights of {config.init}, but for {listed(new, 3)}" if config.init and new else config.init
        return state, program.parameters(program.frozen, given), None, origin or "random weights"
    state, position, run = found
    mine = {"seed": config.seed, "init": config.init}
    if program.frozen and run != mine:
        raise ValueError(f"{where} was trained on frozen weights of {run}; this configuration has {mine}")
    return state, program.parameters(program.frozen, given), position, f"resumed from {where}"


def read_tokenizers(config: TrainConfig, workdir: epath.Path) -> dict[str, Tokenizer]:
    """The decoder's and, where there is one, the retriever's tokenizer, by their file's name in a model folder.

    From the configuration, else from the folder training starts from, else from the workdir of before.
    """
    found = {}
    for name, path, needed in (
        (bundle.TOKENIZER, config.data.tokenizer, True),
        (bundle.RETRIEVER_TOKENIZER, config.data.retriever_tokenizer, bool(config.losses.contrastive)),
    ):
        folders = [epath.Path(folder) / name for folder in (config.init, config.resume, workdir) if folder]
        places = [epath.Path(path)] if path else [place for place in folders if place.exists()]
        if places:
            found[name] = bundle.read_tokenizer(places[0], config.bundle, name)
        elif name == bundle.TOKENIZER and config.model is None:
            continue  # rows are then measured in the retriever's tokens
        elif needed:
            field = "tokenizer" if name == bundle.TOKENIZER else "retriever_tokenizer"
            raise FileNotFoundError(f"found none of {listed([*map(str, folders)])}; expected one, or data.{field}")
    if bundle.TOKENIZER not in found:
        found[bundle.TOKENIZER] = Tokenizer.from_proto(found[bundle.RETRIEVER_TOKENIZER].proto)
    return found


def pipeline(
    config: TrainConfig, tokenizers: Mapping[str, Tokenizer], mesh: Mesh, split: str, workdir: epath.Path
) -> Pipeline:
    """The batches of a split, this process's rows of them.

    Raises ValueError where the videos are not what the models read.
    """
    data = config.data
    videos = VideoStore(data.videos)
    for tower, vit in towers(config).items():
        size = (vit.image_size, vit.image_size, 3)
        wanted = size if videos.kind == "frames" else (vit.patches + vit.cls_token, vit.width)
        if videos.item_shape != wanted:
            raise ValueError(
                f"data.videos {data.videos} holds {videos.kind} of {videos.item_shape}; expected {wanted} for "
                f"config.{tower}.vit"
            )
    settings = PipelineConfig(
        config.pack,
        data.batch_size,
        split == "train",
        config.seed,
        data.keep_chat,
        data.threads,
        data.workers,
    )
    return Pipeline(
        DialogueStore(data.dialogues, split),
        videos,
        tokenizers[bundle.TOKENIZER],
        settings,
        queries=tokenizers.get(bundle.RETRIEVER_TOKENIZER) if config.pack.query_len else None,
        rows=rows_of_process(mesh, data.batch_size),
        cache_dir=workdir / "plans",
    )


def towers(config: TrainConfig) -> dict[str, ViTConfig]:
    """The ViTs that read the videos of a batch, by the model they are in."""
    found = {}
    if config.model and config.losses.of_model:
        found["model"] = config.model.vit
    if config.retriever and config.losses.contrastive:
        found["retriever"] = config.retriever.vit
    return found


def check_features(config: TrainConfig, factors: Mapping[str, float]) -> None:
    """Raises ValueError where a store holds features that the run's own ViTs would not make of the frames.

    Args:
      factors: of every parameter on the learning rate.
    """
    videos = VideoStore(config.data.videos)
    if videos.kind != "features":
        return
    for tower, vit in towers(config).items():
        prefix = ".".join(encode.TOWERS[tower])
        body = {path: factor for path, factor in factors.items() if path.startswith(prefix)}
        trained = [path for path, factor in body.items() if factor and not path.startswith(f"{prefix}head.")]
        if trained:
            raise ValueError(
                f"data.videos {config.data.videos} holds features, and optim.rules train the ViT they are of "
                f"({listed(trained, 2)}); expected a store of frames, or a rule that freezes it"
            )
        if not videos.made_by:
            continue
        where = f"data.videos {config.data.videos} holds features of another ViT than config.{tower}.vit"
        of_store, mine = ({**plain, "map_head": None} for plain in (videos.made_by["vit"], json_of(vit)))
        if other := sorted(name for name in mine if of_store.get(name) != mine[name]):
            raise ValueError(f"{where}: {', '.join(f'{name} is {of_store.get(name)}' for name in other)}")
        if not config.init:
            raise ValueError(f"{where}, which is drawn from the seed; expected config.init, what they were encoded by")
        mesh = make_mesh(MeshConfig(), jax.local_devices())  # each process by itself: the values must be here
        sha256 = encode.parameters_sha256(encode.read_tower(config.init, tower, mesh, config.compute))
        if videos.made_by["parameters"] != sha256:
            found = videos.made_by["parameters"]
            raise ValueError(f"{where}: its parameters are {found[:12]}, those of {config.init} {sha256[:12]}")


def rows_of_process(mesh: Mesh, rows: int) -> list[int]:
    """Which of a batch's rows this process's devices hold, in order. Processes may hold the same."""
    indices = by_rows(mesh).addressable_devices_indices_map((rows,)).values()
    return sorted({row for index in indices if index for row in range(*index[0].indices(rows))})


def place(batch: Mapping[str, np.ndarray], mesh: Mesh, config: TrainConfig) -> dict[str, jax.Array]:
    """This process's rows as part of the batch over all devices."""
    lies = by_rows(mesh)
    rows = config.data.batch_size
    where = {row: place for place, row in enumerate(rows_of_process(mesh, rows))}

    def placed(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None
            begin, end, _ = index[0].indices(rows)
            return array[where[begin] : where[begin] + end - begin]

        return jax.make_array_from_callback((rows, *array.shape[1:]), lies, part)

    return {name: placed(array) for name, array in batch.items()}


def validate(
    config: TrainConfig, program: Program, held_out: Pipeline, params: Arrays, frozen: Arrays
) -> dict[str, float]:
    """Metrics over the validation split (its first `config.eval.batches`)."""
    return collect(config, program, held_out, params, frozen).metrics()


def collect(
    config: TrainConfig, program: Program, held_out: Pipeline, params: Arrays, frozen: Arrays
) -> validation.Validation:
    """What the models say of the validation split (its first `config.eval.batches`)."""
    collected = validation.Validation(config.losses)
    count = min(held_out.steps, config.eval.batches or held_out.steps)
    for _, batch in zip(range(count), held_out, strict=False):
        found = program.validation_step(params, frozen, place(batch, program.mesh, config))
        collected.add(jax.device_get(found))
    return collected


def check(values: Mapping[str, float] | None, config: TrainConfig, step: int) -> None:
    """Raises FloatingPointError where too many steps in a row were skipped."""
    if values and values["skipped_in_a_row"] >= config.max_skipped:
        raise FloatingPointError(
            f"step {step}: the loss or a gradient was not finite {config.max_skipped} times in a row (loss "
            f"{values['loss']}, gradient norm {values['gradient_norm']}); the newest checkpoint is of before"
        )


def write_folder(workdir: epath.Path, config: TrainConfig, tokenizers: Mapping[str, Tokenizer]) -> None:
    """What a reader of the workdir needs beside the checkpoints. Says what changed since an earlier start."""
    if jax.process_index():
        return
    path = workdir / CONFIG
    now = json_of(config)
    if path.exists():
        before, after = flat(json.loads(path.read_text())), flat(now)
        for name in sorted({*before} | {*after}):
            if before.get(name) != after.get(name):
                logging.warning("%s was %s when this run began, and is %s", name, before.get(name), after.get(name))
    files = {CONFIG: json.dumps(now, indent=2).encode(), bundle.CONFIG: config.bundle.to_json().encode()}
    for name, content in (files | {name: tokenizer.proto for name, tokenizer in tokenizers.items()}).items():
        with atomic(workdir / name) as aside:
            aside.write_bytes(content)


def parse(argv: list[str]) -> list[str]:
    """Reads the flags as absl does, and says in a sentence what ml_collections leaves with a traceback."""
    try:
        return app.parse_flags_with_usage(argv)
    except AttributeError as error:
        name = str(error).strip("'\"")
        given = [arg for arg in argv if arg.startswith("--config.") and name in arg]
        if not given:
            raise
        sys.exit(f"train: {given[0]}: the configuration has no {name!r}")
    except OSError as error:
        sys.exit(f"train: --config: {' '.join(str(error).split())}")


def main(argv: list[str]) -> None:
    """Trains as the flags say."""
    command.refuse_arguments(argv)
    command.quiet()
    try:
        distributed.start()
        train(read_config(flags.FLAGS.config), flags.FLAGS.workdir)
    except (ValueError, DatasetNotFound, OSError, FloatingPointError) as error:
        logging.debug("", exc_info=error)
        sys.exit(f"train: {error}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "configs/X.py[:argument].", lock_config=True)
    flags.DEFINE_string("workdir", None, "Where the run is kept.", required=True)
    flags.mark_flag_as_required("config")
    distributed.define_flags()
    app.run(main, flags_parser=parse)
