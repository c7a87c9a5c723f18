"""The whole of it on one machine: data, training on a mesh, export, evaluation, a conversation.

    python -m launch.demo --out=build/demo [--videos=DIR [--annotations=FILE] [--format=manifest]]

Makes the synthetic source and trains both tiny models on it. Videos of one's own are indexed and conversed with; with
annotations (`ivcr_jax.data.captions` has the formats) dialogues are composed from these, both sources are trained on,
and the videos are asked for with their own captions and moments. A run that is stopped goes on where it was. Each stage
is one of the project's commands, which OUT/log keeps with what it said; OUT/table.txt is what came of all.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

try:
    from absl import app, flags, logging

    from ivcr_jax.data import captions, compose, video
    from ivcr_jax.data.dialogue import LANGUAGES, VIDEO_SUFFIXES, Dialogue, Intent, Turn
    from ivcr_jax.data.manifest import atomic
    from ivcr_jax.data.store import DialogueStore
    from ivcr_jax.infer.understanding import understand
    from launch.demo_table import LEARNT, table
    from launch.local_pod import die_with_parent
except ModuleNotFoundError as lacking:  # whoever has no make may not have installed anything either
    sys.exit(
        f"demo: {sys.executable} (Python {sys.version.split()[0]}) has no {lacking.name}; install with Python 3.11 to "
        "3.13, python -m venv .venv && .venv/bin/pip install -e '.[eval]', and run .venv/bin/python -m launch.demo"
    )
except KeyboardInterrupt:
    sys.exit(130)

CONFIG = "configs/tiny.py"
DEVICES = 8  # virtual, on the processor
NEEDED = 2 * 2**30  # bytes of disk
SAID = 4  # messages of a conversation
FULL = 2**20  # bytes: where less is free when a stage fails, that is why
EVERY = 20.0  # seconds between two lines of progress, where they do not replace each other
# How a moment and another video are asked for, in wordings of `compose`: the tiny model has read no others.
WHEN = {"en": "When does this happen? ", "zh": "这是什么时候发生的？"}
MORE = {"en": "I need one more video. ", "zh": "再帮我找另一个视频："}
# Messages to videos that nobody has described. One is opened, as a model that knows shapes alone is seldom sure of any.
WORDS = {
    "en": (
        "Find a video that shows something red.",
        "/open 1",
        "When is something red in view?",
        "Do you have a similar one?",
    ),
    "zh": (
        "帮我找一个有红色东西的视频。",
        "/open 1",
        "红色的东西是什么时候出现的？",
        "有没有类似的？",
    ),
}


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
      videos, interactions: of the synthetic source.
      own: interactions about captioned videos of one's own.
      held: test dialogues that are evaluated.
      steps: by stage, where they are not the configuration's.
    """

    videos: int = 3000
    interactions: int = 20_000
    own: int = 30_000
    held: int = 120
    steps: Mapping[str, int] = dataclasses.field(default_factory=dict)


OWN = Size(steps={"retriever": 750})  # few videos, seen often: their moments take longer


class DemoError(Exception):
    """Why it cannot go on, in one sentence that says what to do."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the work. Attributes: name: also of its log. what: for people. work: a module's arguments, the module
    first, or a function. devices: virtual ones."""

    name: str
    what: str
    work: Sequence[str] | Callable[[], object]
    devices: int = 1


def stages(
    out: pathlib.Path, videos: pathlib.Path | None, annotations: pathlib.Path | None, form: str, size: Size
) -> list[Stage]:
    """Everything there is to do, in order."""
    both = out / ("both" if annotations else "source")
    data, init, features, model = out / "data", out / "init", out / "features", out / "export"
    note = [f"--note={LEARNT}"] if annotations else []
    dialogues, stored = f"--dialogues={data}/ivcr200k", f"--videos={data}/ivcr200k_videos"

    def train(stage: str, run: str, begin: pathlib.Path) -> list[str]:
        given = {"init": begin, "data.dialogues": data / "ivcr200k", "data.videos": features}
        settings = [f"--config.{name}={value}" for name, value in given.items()]
        return ["ivcr_jax.train", f"--config={CONFIG}:{stage}", f"--workdir={out / run}", *settings,
                *steps(stage, "config.steps")]  # fmt: skip

    def steps(stage: str, flag: str) -> list[str]:
        return [f"--{flag}={size.steps[stage]}"] if stage in size.steps else []

    def build(dataset: str, source: pathlib.Path, folder: pathlib.Path, *more: str) -> list[str]:
        return ["tfds_builder.build", f"--dataset={dataset}", f"--manual_dir={source}", f"--data_dir={folder}", *more]

    def evaluate(
        export: pathlib.Path, shown: str, to: str, protocols: str = "gold,e2e", of: str = dialogues
    ) -> list[str]:
        return ["ivcr_jax.evaluate", f"--export={export}", f"--{shown}", of, f"--out={out / to}",
                f"--protocols={protocols}", "--shuffles=0", f"--dialogues_at_most={size.held}",
                f"--cache={out / 'cache'}"]  # fmt: skip

    def talk(language: str, corpus: pathlib.Path) -> list[str]:
        return ["ivcr_jax.chat", f"--export={model}", f"--corpus={corpus}", f"--script={out}/script-{language}.txt",
                f"--report={out}/conversation-{language}.html", f"--cache={out / 'cache'}", *note]  # fmt: skip

    synth = ["ivcr_jax.data.synth", f"--out={out / 'source'}", f"--videos={size.videos}",
             f"--interactions={size.interactions}"]  # fmt: skip
    pretrain = [
        "ivcr_jax.pretrain",
        f"--config={CONFIG}",
        f"--source={out / 'source'}",
        dialogues,
        stored,
        f"--out={init}",
        *steps("pretrain", "steps"),
        *steps("text", "text_steps"),
    ]
    encode = ["ivcr_jax.encode", f"--model={init}", "--tower=model", stored, f"--out={features}", "--dtype=float32"]
    found = [Stage("source", "drawing and describing the synthetic videos", synth)]
    if videos and annotations:
        found.append(
            Stage("compose", "dialogues about your videos", lambda: join(out, videos, annotations, form, size))
        )
    found += [
        Stage("dialogues", "building the dataset of dialogues", build("ivcr200k", both, data)),
        Stage("videos", "decoding every video once", build("ivcr200k_videos", both, data, "--frames=24", "--size=48",
                                                           *["--max_loss=0.5"] * bool(annotations))),
        Stage("pretrain", "teaching the tower to see, the decoder to write", pretrain),
        Stage("encode", "computing the frozen tower's features", encode),
        Stage("retriever", "training the retriever", train("retriever", "retriever", init), DEVICES),
        Stage("first", "exporting it",
              ["ivcr_jax.export", f"--workdir={out}/retriever", f"--out={out}/first", "--nocalibrate"]),
        Stage("both", "training the dialogue model with it", train("both", "run", out / "first"), DEVICES),
        Stage("export", "exporting both", ["ivcr_jax.export", f"--workdir={out}/run", f"--out={model}"]),
        Stage("evaluate", "holding test dialogues again", evaluate(model, f"videos={both}/videos", "evaluation")),
        Stage("untrained", "the same without training", evaluate(init, f"videos={both}/videos", "untrained")),
    ]  # fmt: skip
    corpus = out / "evaluation" / "corpus"
    if videos:
        corpus = out / "corpus"
        index = ["ivcr_jax.index", f"--export={model}", f"--videos={videos}", f"--corpus={corpus}"]
        found.append(Stage("index", "indexing your videos", index))
    if videos and annotations:
        asked = f"--dialogues={out}/asked/ivcr200k"
        found += [
            Stage("asked", "asking for your videos by their captions", build("ivcr200k", out / "asked", out / "asked")),
            Stage("own", "what was found", [*evaluate(model, f"corpus={corpus}", "own", "gold", asked), *note]),
        ]
    found.append(
        Stage("scripts", "writing what will be said", lambda: write_scripts(out, bool(videos), bool(annotations)))
    )
    found += [Stage(f"talk-{each}", f"a conversation ({each})", talk(each, corpus)) for each in LANGUAGES]
    return found


def join(out: pathlib.Path, videos: pathlib.Path, annotations: pathlib.Path, form: str, size: Size) -> None:
    """Writes the two sources as one (OUT/both), and questions for the captioned videos (OUT/asked).

    Raises DemoError where no video of the folder is described, or a name is in both.
    """
    clips, problems = captions.read(form, annotations, "train")
    clips, missing = captions.resolve(clips, videos)
    for problem in (*problems, *missing):
        print(f"{problem.row}: {problem.field}: {problem.reason}")
    if not any(clip.captions for clip in clips):
        raise DemoError(
            f"{annotations}: found no caption of a video in {videos}, expected some; check --format and paths"
        )
    own = compose.compose(clips, seed=0, num_interactions=size.own, name="own")
    whole = json.loads((out / "source" / "IVCR-200K.json").read_text(encoding="utf-8"))
    for folder, rows in (("both", (*whole, *own)), ("asked", questions(clips))):
        (out / folder).mkdir(exist_ok=True)
        compose.write_json(out / folder / "IVCR-200K.json", rows)
    linked = out / "both" / "videos"
    linked.mkdir(exist_ok=True)
    for source in (out / "source" / "videos", videos):
        for entry in sorted(source.iterdir()):
            link = linked / entry.name
            if link.is_symlink() and link.resolve() != entry.resolve():
                raise DemoError(f"{entry}: found a name that the synthetic source has too; rename it")
            if not link.is_symlink():
                link.symlink_to(entry.resolve())


def questions(clips: Sequence[captions.Clip]) -> Iterator[dict[str, Any]]:
    """For each clip and language a dialogue: its first caption, then each of its moments."""
    for clip in clips:
        for language, (caption, *_) in clip.captions.items():
            asked: list[tuple[str, list[float]]] = [(caption, [*compose.NO_SPAN])]
            asked += [(m.captions[language], [m.start, m.end]) for m in clip.moments if language in m.captions]
            messages = [
                message
                for words, span in asked
                for message in (
                    {"from": "human", "value": words},
                    {"from": "gpt", "value": f"video 1: {words}", "video_id": clip.video, "gt_se": span},
                )
            ]
            yield {"id": f"{clip.video} {language}", "split": "test", "type": [2], "conversations": messages}


def write_scripts(out: pathlib.Path, videos: bool, annotations: bool) -> None:
    """What is said in the conversations: a test dialogue's words, those of two captioned videos, or WORDS."""
    folder = out / ("asked" if videos else "data") / "ivcr200k"
    for language in LANGUAGES:
        lines: tuple[str, ...] = WORDS[language]
        if annotations or not videos:
            store = DialogueStore(folder, "test")
            told = [store[number] for number in range(len(store))]
            if fitting := [each for each in told if _tells(each, language)]:
                chosen = max(fitting, key=lambda each: len(each.turns[:SAID]))  # the first that is so long
                lines = tuple(_asked(turn) for turn in chosen.turns[:SAID])
                others = (each.turns[0] for each in told if each is not chosen)
                other = next((turn.user for turn in others if turn.language == language), None)
                if videos and other:
                    lines = (*lines[: SAID - 1], MORE[language] + other)
        with atomic(out / f"script-{language}.txt") as temporary:
            temporary.write_text("".join(f"{' '.join(line.split())}\n" for line in lines), encoding="utf-8")


def _tells(dialogue: Dialogue, language: str) -> bool:
    """Whether a dialogue begins with a search and a moment, in a language."""
    intents = [turn.intent for turn in dialogue.turns]
    return intents[:2] == [Intent.VIDEO, Intent.MOMENT] and dialogue.turns[0].language == language


def _asked(turn: Turn) -> str:
    """A turn's words; a moment's that do not ask when may be taken for a search, and this conversation has a course."""
    plain = turn.intent == Intent.MOMENT and understand(turn.user, True).intent != Intent.MOMENT
    return f"{WHEN[turn.language]}{turn.user}" if plain else turn.user


def run(found: Sequence[Stage], out: pathlib.Path) -> dict[str, float]:
    """Carries out the stages that are not done; seconds of each by name, those of earlier runs included.

    Raises DemoError for one that fails, with its last words, or that the disk is full.
    """
    (out / "log").mkdir(parents=True, exist_ok=True)
    times = json.loads((out / "times.json").read_text()) if (out / "times.json").exists() else {}
    for number, stage in enumerate(found, 1):
        done = out / "log" / f"{stage.name}.done"
        print(f"[{number}/{len(found)}] {stage.what}", end=" " if done.exists() else "\n", flush=True)
        if done.exists():
            print(f"(done before, {times.get(stage.name, 0):.0f} s)")
            continue
        log, started = out / "log" / f"{stage.name}.txt", time.monotonic()
        try:
            if callable(stage.work):
                stage.work()
            else:
                _watched(stage, log)
            done.touch()
        except (DemoError, OSError) as error:
            if "No space left" in str(error) or shutil.disk_usage(out).free < FULL:
                raise DemoError(
                    f"{stage.what} failed, as the disk is full; free {NEEDED / 2**30:.0f} GiB where {out} lies, "
                    "and the same command goes on from here"
                ) from error
            raise
        finally:
            times[stage.name] = times.get(stage.name, 0) + time.monotonic() - started
            # On a full disk this fails too, and would hide why.
            with contextlib.suppress(OSError), atomic(out / "times.json") as temporary:
                temporary.write_text(json.dumps(times))
    return times


def _watched(stage: Stage, log: pathlib.Path) -> None:
    """Runs a command; shows the last line of its log now and then."""
    environment = {
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # as docs/training.md advises
        "TF_CPP_MIN_LOG_LEVEL": "3",
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        # One's own flags too; of a name the last holds.
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={stage.devices}",
    }
    assert not callable(stage.work)
    with log.open("ab") as file:
        file.write(f"+ python -m {' '.join(stage.work)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            [sys.executable, "-m", *stage.work], stdout=file, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True, preexec_fn=die_with_parent,
        )  # fmt: skip
        try:
            told = time.monotonic()
            while process.poll() is None:
                time.sleep(0.2)
                if time.monotonic() - told > (1.0 if sys.stdout.isatty() else EVERY):
                    told = time.monotonic()
                    _show(_last(log))
        finally:
            if process.poll() is None:
                process.terminate()  # a training saves
                process.wait()
    if sys.stdout.isatty():
        _show("")
    if process.returncode:
        raise DemoError(f"{stage.what} failed: {_last(log)}\nall it said is in {log}; mend that, and run this again")


def _show(line: str) -> None:
    width = shutil.get_terminal_size().columns - 6
    if sys.stdout.isatty():
        print(f"\r\x1b[K    {line[:width]}" if line else "\r\x1b[K", end="", flush=True)
    else:
        print(f"    {line[:100]}", flush=True)


def _last(log: pathlib.Path) -> str:
    """The last line that says something; of one that was written over, what stands."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        text = file.read().decode(errors="replace")
    lines = [line.split("\r")[-1].strip() for line in text.rstrip().split("\n")]
    return next((line for line in reversed(lines) if line), "")


def check(out: pathlib.Path, videos: pathlib.Path | None, annotations: pathlib.Path | None, form: str) -> None:
    """Raises DemoError where it cannot be begun, before hours are lost."""
    if annotations and not videos:
        raise DemoError("found ANNOTATIONS without VIDEOS; give both: make demo VIDEOS=DIR ANNOTATIONS=FILE")
    if videos and not videos.is_dir():
        raise DemoError(f"{videos}: found no folder; give one of videos")
    if videos and not any(path.suffix.lower() in VIDEO_SUFFIXES for path in videos.rglob("*")):
        raise DemoError(f"{videos}: found no video in it (.mp4, .mkv, .webm, ...); give a folder that has some")
    if annotations and not annotations.is_file():
        raise DemoError(f"{annotations}: found no file; give one of captions")
    if not pathlib.Path(CONFIG).exists():
        raise DemoError(f"found no {CONFIG} here; run this in the project's folder")
    out.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(out).free) < NEEDED and not (out / "export").exists():
        raise DemoError(f"{out}: found {free / 2**30:.1f} GiB of free disk, expected {NEEDED / 2**30:.0f}; free some")
    made_from = json.dumps([str(videos), str(annotations), form if annotations else None])
    before = out / "made_from.json"
    if before.exists() and before.read_text() != made_from:
        raise DemoError(f"{out}: found what was made from other videos; give another --out, or remove it")
    if videos and not before.exists():
        _probe(videos)
    with atomic(before) as temporary:
        temporary.write_text(made_from)


def _probe(videos: pathlib.Path) -> None:
    """Says which videos of a folder cannot be read. Raises DemoError where none can."""
    paths = sorted(path for path in videos.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    wrong: dict[str, str] = {}
    for path in paths:
        try:
            video.probe(path, scan=False)
        except video.VideoError as error:
            wrong[str(path.relative_to(videos))] = error.args[1]
    if not wrong:
        return
    first = ", ".join([*wrong][:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
    if len(wrong) == len(paths):
        reason = next(iter(wrong.values())).rstrip(".")
        raise DemoError(
            f"{videos}: found no video that can be read among {len(paths)} ({first}: {reason}); give a folder of others"
        )
    print(f"{videos}: {len(wrong)} of {len(paths)} videos cannot be read and are left out: {first}", flush=True)


def _define_flags() -> None:
    # Not at import: another program may import this module and have flags of the same names.
    flags.DEFINE_string("out", "build/demo", "Where everything is kept.")
    flags.DEFINE_string("videos", None, "A folder of your own videos.")
    flags.DEFINE_string("annotations", None, "What is seen in them.")
    flags.DEFINE_enum("format", "manifest", captions.FORMATS, "Of the annotations.")


def main(argv: list[str]) -> None:
    """Runs what is not done yet, and shows what came of it."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; options are written --name=value")
    args = flags.FLAGS
    logging.set_verbosity(logging.WARNING)
    out = pathlib.Path(args.out).resolve()
    videos, annotations = (pathlib.Path(each).resolve() if each else None for each in (args.videos, args.annotations))
    try:
        check(out, videos, annotations, args.format)
        found = stages(out, videos, annotations, args.format, OWN if annotations else Size())
        times = run(found, out)
        shown = table(out, {stage.what: times.get(stage.name, 0) for stage in found})
        with atomic(out / "table.txt") as temporary:
            temporary.write_text(f"{shown}\n", encoding="utf-8")
        print(f"\n{shown}\n")
    except (DemoError, OSError) as error:
        sys.exit(f"demo: {error}")
    except KeyboardInterrupt:
        print("\ndemo: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    for language in LANGUAGES:
        print(f"the conversation ({language}), to open in a browser: {out}/conversation-{language}.html")
    print(f"the evaluation: {out}/evaluation/report.md")
    if annotations:
        print(f"of your videos: {out}/own/report.md")
    corpus = out / "corpus" if videos else out / "evaluation" / "corpus"
    print(f"to converse yourself: {sys.executable} -m ivcr_jax.chat --export={out}/export --corpus={corpus}")


if __name__ == "__main__":
    _define_flags()
    app.run(main)
