r"""What the tiny models learn of the synthetic source in minutes, on held-out videos.

    python -m tests.benchmarks.learning --out=DIR [--seeds=0,1] [--long] \
      [--name=NAME --override=--config.losses.lm=0 --first=--config.losses.moment=0 ...]

Makes a source (once), pretrains the tower, computes its features, trains the retriever and then both models, and
measures on the test split: videos never seen, half of them of families built on combinations of colour, shape and
motion that training never shows. Candidates come in two kinds: five of a family (the truth, and four that differ from
it in one attribute each) with five others; and ten at random. Each question is asked in English and in Chinese, so that
what differs between the two is the language alone. The untrained models' figures stand beside, and for
moments the best that any constant answer has: a head that reads nothing of the video could have that.
"""

import dataclasses
import itertools
import json
import os
import pathlib
import platform
import subprocess
import sys
import time

import jax
import numpy as np
from absl import app, flags

from ivcr_jax import train, validation
from ivcr_jax.checkpoint import Checkpoints
from ivcr_jax.config import from_dict
from ivcr_jax.data import compose, synth
from ivcr_jax.data.dialogue import LANGUAGES
from ivcr_jax.metrics import moment
from ivcr_jax.sharding import make_mesh
from ivcr_jax.training import Program, TrainConfig
from tfds_builder.build import build
from tfds_builder.ivcr200k_videos.ivcr200k_videos_dataset_builder import VideosConfig

HUGE_PAGES = "glibc.malloc.hugetlb=1"
POOL = 200  # videos among which the first stage looks
SOURCE_SEED = 0
EVALUATION = 12000  # interactions composed for a test, of which the test split's share is used


def make_source(out: pathlib.Path, videos: int, interactions: int) -> None:
    """The videos, their stored frames, dialogues to learn from, and those of the tests, in each language the same."""
    source = out / "source"
    synth.generate(source, videos=videos, interactions=interactions, seed=SOURCE_SEED)
    if not (out / "data" / "ivcr200k").exists():
        build("ivcr200k", manual_dir=source, data_dir=out / "data")
    if not (out / "data" / "ivcr200k_videos").exists():
        build("ivcr200k_videos", manual_dir=source, data_dir=out / "data", config=VideosConfig(frames=24, size=48))
    clips = list(synth.clips_of(list(synth.invent(videos, seed=SOURCE_SEED, size=(48, 48), fps=8, seconds=12.0))))
    kinds = {"near": clips, "random": [dataclasses.replace(clip, near=(), similar=()) for clip in clips]}
    for (kind, clips), language in itertools.product(kinds.items(), LANGUAGES):
        folder = out / kind / language
        if not (folder / "ivcr200k").exists():
            (folder / "source").mkdir(parents=True, exist_ok=True)
            dialogues = compose.compose(
                clips,
                seed=SOURCE_SEED + 1,
                num_interactions=EVALUATION,
                zh_share=float(language == "zh"),
                name=kind,
            )
            compose.write_json(folder / "source" / "IVCR-200K.json", dialogues)
            build("ivcr200k", manual_dir=folder / "source", data_dir=folder)


def run(*command: str) -> float:
    """Runs a module of the project; seconds it took."""
    started = time.monotonic()
    print("+ python -m", *command, flush=True)
    # As docs/training.md advises for CPUs.
    subprocess.run([sys.executable, "-m", *command], check=True, env={"GLIBC_TUNABLES": HUGE_PAGES, **os.environ})
    return time.monotonic() - started


def measure(config: TrainConfig, workdir: pathlib.Path, out: pathlib.Path, trained: bool) -> dict[str, float]:
    """Figures on the test split, of the newest checkpoint or of the models before training."""
    program = Program(config, make_mesh(config.mesh))
    checkpoints = Checkpoints(workdir if trained else workdir / "none", config.checkpoint)
    state, frozen, *_ = train.start(config, workdir, program, checkpoints)
    tokenizers = train.read_tokenizers(config, workdir)
    figures: dict[str, float] = {}
    for name in ("near", "random"):
        collected, moments = validation.Validation(config.losses), []
        for language in LANGUAGES:
            data = dataclasses.replace(config.data, dialogues=str(out / name / language / "ivcr200k"))
            here = dataclasses.replace(config, data=data)
            for batch in train.pipeline(here, tokenizers, program.mesh, "test", workdir):
                rows, turns = np.nonzero(batch["moment_slots"] >= 0)
                lengths = batch["durations"][rows, batch["moment_slots"][rows, turns]]
                moments.append(batch["moment_spans"][rows, turns] / lengths[:, None])
                with jax.set_mesh(program.mesh):
                    found = program.validation_step(state.params, frozen, train.place(batch, program.mesh, config))
                collected.add(jax.device_get(found))
        metrics = collected.metrics()
        kept = ("rank_r1", "ranked_turns") if name == "random" else ("rank_r1", "moment_")
        figures |= {f"{name}_{key}": value for key, value in metrics.items() if key.startswith(kept)}
        if name == "near":
            figures |= {key: metrics[key] for key in ("ranked_turns", "moments", "queries")}
            figures |= pooled(collected) | constants(np.concatenate(moments))
    return figures


def constants(moments: np.ndarray) -> dict[str, float]:
    """The best that one answer to all questions has, f32[N, 2] in shares of the duration; for each figure another."""
    grid = [np.array([[start, end]]) / 20 for start in range(20) for end in range(start + 1, 21)]
    found = np.stack([moment.interval_iou(span, moments) for span in grid])
    bars = {f"near_moment_r1_iou_{bar}_constant": float((found >= bar).mean(1).max()) for bar in moment.IOUS}
    return bars | {"near_moment_miou_constant": float(found.mean(1).max())}


def pooled(collected: validation.Validation) -> dict[str, float]:
    """R@10 of queries among POOL videos: those of the test split in order, cut into pools; families stay together."""
    pool = {number: place // POOL for place, number in enumerate(sorted(collected.videos))}
    hits: list[tuple[int, float]] = []
    whole = {index for index in set(pool.values()) if list(pool.values()).count(index) == POOL}
    for index in sorted(whole):
        numbers = [number for number in pool if pool[number] == index]
        vectors = np.stack([collected.videos[number] for number in numbers])
        for query in collected.queries:
            if query.video in pool and pool[query.video] == index:
                scores = vectors @ query.vector
                hits.append((query.language, float((scores >= scores[numbers.index(query.video)]).sum() <= 10)))
    return validation.by_language(f"retrieval_r10_of_{POOL}", hits) | {"pooled_queries": float(len(hits))}


def gap(figures: dict[str, float], name: str, count: float) -> str:
    """English minus Chinese with its 95 % interval, in points."""
    both = [figures[f"{name}_{language}"] for language in LANGUAGES]
    spread = 1.96 * sum(share * (1 - share) / (count / 2) for share in both) ** 0.5
    return f"{100 * (both[0] - both[1]):+.1f} ± {100 * spread:.1f}"


SHOWN = (
    (f"retrieval_r10_of_{POOL}", "pooled_queries"),
    ("near_moment_r1_iou_0.5", "moments"),
    ("near_moment_r1_iou_0.7", "moments"),
    ("random_rank_r1", "random_ranked_turns"),
    ("near_rank_r1", "ranked_turns"),
)


def main(_: list[str]) -> None:
    """Runs every stage that is not done, for every seed."""
    args = flags.FLAGS
    out = pathlib.Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    make_source(out, args.videos, args.interactions)
    results = {}
    for seed in args.seeds:
        length = "-long" if args.long else ""
        mine = out / (args.name + length) / f"seed{seed}"
        seconds = {}
        videos, dialogues = out / "data" / "ivcr200k_videos", out / "data" / "ivcr200k"
        init, features, workdir = out / f"init{seed}{length}", out / f"features{seed}{length}", mine / "run"
        if not init.exists():
            seconds["pretrain"] = run(
                "ivcr_jax.pretrain",
                f"--config={args.file}",
                f"--source={out / 'source'}",
                f"--dialogues={dialogues}",
                f"--videos={videos}",
                f"--out={init}",
                f"--seed={seed}",
                *["--steps=2500"] * args.long,
            )
        if not features.exists():
            seconds["encode"] = run(
                "ivcr_jax.encode",
                f"--model={init}",
                "--tower=model",
                f"--videos={videos}",
                f"--out={features}",
                "--dtype=float32",
            )
        given = {"seed": int(seed), "data.dialogues": str(dialogues), "data.videos": str(features)}

        def stage(name: str, workdir: pathlib.Path, begin: pathlib.Path, *more: str, given: dict = given) -> float:
            return run(
                "ivcr_jax.train",
                f"--config={args.file}{name}",
                f"--workdir={workdir}",
                *[f"--config.{name}={value}" for name, value in {**given, "init": begin}.items()],
                *more,
            )

        # The same for every recipe of the second stage alone.
        first = mine / "retriever" if args.first else out / f"retriever{seed}{length}"
        if not first.exists():
            before = first.with_name(f"{first.name}-run")
            seconds["retriever"] = stage(":long-retriever" if args.long else ":retriever", before, init, *args.first)
            run("ivcr_jax.export", f"--workdir={before}", f"--out={first}", "--nocalibrate")
        seconds["both"] = stage(":long" if args.long else "", workdir, first, *args.override)

        config = from_dict(TrainConfig, json.loads((workdir / "train.json").read_text()))
        untrained = out / f"untrained{seed}{length}.json"  # of the recipe that comes first: run the plain one
        if not untrained.exists():
            begin = dataclasses.replace(config, init=str(init))
            untrained.write_text(json.dumps(measure(begin, mine, out, trained=False)))
        results[seed] = {
            "seconds": seconds,
            "untrained": json.loads(untrained.read_text()),
            "trained": measure(config, workdir, out, trained=True),
        }
        print(json.dumps(results[seed]), flush=True)
    table(results)
    machine = f"{platform.machine()}, {jax.device_count()} device"
    print(json.dumps({"machine": machine, **{f"seed{seed}": result for seed, result in results.items()}}))


def table(results: dict[int, dict]) -> None:
    """For the terminal."""
    print(f"\n{'':28}{'seed':>5}{'untrained':>11}{'trained':>9}{'en':>7}{'zh':>7}  en - zh, points (95 %)     n")
    for name, count in SHOWN:
        for seed, result in results.items():
            before, after = result["untrained"], result["trained"]
            print(
                f"{name:28}{seed:>5}{before[name]:>11.3f}{after[name]:>9.3f}{after[name + '_en']:>7.3f}"
                f"{after[name + '_zh']:>7.3f}  {gap(after, name, after[count]):>22}{after[count]:>8.0f}"
                + (f"  the best constant {after[name + '_constant']:.3f}" if name + "_constant" in after else "")
            )


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Where everything is kept.", required=True)
    flags.DEFINE_string("file", "configs/tiny.py", "The configuration's file, as the training command takes it.")
    flags.DEFINE_string("name", "plain", "Of this recipe's runs.")
    flags.DEFINE_bool("long", False, "The recipe of an hour.")
    flags.DEFINE_list("seeds", ["0", "1"], "Seeds of pretraining and training.")
    flags.DEFINE_integer("videos", 3000, "Of the source.")
    flags.DEFINE_integer("interactions", 20000, "Of the source.")
    flags.DEFINE_multi_string("override", [], "--config.field=value, handed on to the second stage's training.")
    flags.DEFINE_multi_string("first", [], "Likewise, to the first stage's, which is then this recipe's own.")
    app.run(main)
