"""Holds the dialogues of a split with an export, and reports how it did.

    python -m ivcr_jax.evaluate --export=EXPORT|--workdir=RUN --videos=SOURCE/videos|--corpus=CORPUS
        --dialogues=DATA/ivcr200k --out=OUT [--split=test] [--protocols=paper,gold,cascade,e2e,simulator]

Of a run it exports the newest checkpoint. Of a folder of videos it indexes those that the dialogues name; a corpus is
taken as it is. OUT gets both, the predictions of each protocol, report.md with plots, and report.json. A run that is
stopped goes on where it was. On several hosts each holds its share of the dialogues, and the first reports.
docs/evaluation.md says what the protocols and figures are.
"""

import sys
from collections.abc import Sequence

import jax
from absl import app, flags
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from ivcr_jax import bundle, card, checkpoint, command, distributed, export, index, protocols, score, simulator
from ivcr_jax.config import listed
from ivcr_jax.data.dialogue import Dialogue
from ivcr_jax.data.store import DatasetNotFound, DialogueStore
from ivcr_jax.infer.assistant import Assistant
from ivcr_jax.infer.corpus import Corpus, CorpusError
from ivcr_jax.metrics import judge, records
from ivcr_jax.models.layers import Compute, native_dtype

OFFERED = (*protocols.PROTOCOLS, simulator.NAME)


def evaluate(
    model: epath.PathLike,
    corpus: epath.PathLike,
    dialogues: epath.PathLike,
    out: epath.PathLike,
    *,
    split: str = "test",
    names: Sequence[str] = OFFERED,
    candidates: int = 10,
    batch: int = 8,
    shuffles: int = 4,
    most: int = 0,
    judged_by: judge.Judge | None = None,
    rounds: int = 5,
    note: str = "",
) -> None:
    """Holds the dialogues by each protocol, and reports. Every process of a job calls it.

    Args:
      model, corpus, dialogues: folders, the first of an export.
      out: the folder of predictions and report, to begin or to go on with.
      split: of the dialogues. names: of the protocols.
      candidates: how many the first stage hands on, where none are given.
      shuffles: in how many other orders given candidates are ranked besides, where the history is the true one.
      batch: dialogues at once. most: dialogues that are held, the first of the split; 0 is all.
      judged_by: a language model that scores the answers, where one is to.
      rounds: messages of a simulated user, at most.
      note: what else the readers of the report should know.

    Raises:
      FileNotFoundError, DatasetNotFound: there is no such export, or no such dialogues.
      CorpusError: there is no corpus, or one of another export.
      ValueError: an unknown protocol, an empty split, no dialogue whose videos the corpus has, or predictions or
        judgements in `out` that were made with something else.
    """
    if unknown := [name for name in names if name not in OFFERED]:
        raise ValueError(f"protocols: found {listed(unknown)}, expected some of {listed(OFFERED)}")
    opened = Corpus.open(corpus, bundle.fingerprint(model))
    store = DialogueStore(dialogues, split)
    everything = [store[number] for number in range(min(len(store), most or len(store)))]
    known = {video.id for video in opened.videos}
    if not any(known.issuperset(dialogue.videos) for dialogue in everything):
        raise ValueError(f"{corpus}: found none of the {len(everything)} dialogues' videos whole, expected them there")
    folder = epath.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = native_dtype()
    assistant = Assistant(model, compute=Compute(dtype=dtype), fingerprint=opened.fingerprint)
    settings = {
        "corpus": opened.digest,
        "fits": assistant.fits,
        "candidates": candidates,
        "shuffles": shuffles,
        "dtype": dtype,
        "processes": jax.process_count(),
        "dialogues_at_most": most,
    }
    truths: dict[str, list[Dialogue]] = {}
    for name in names:
        if name == simulator.NAME:
            simulator.run(
                assistant, opened, store, everything, folder, settings, rounds=rounds, candidates=candidates,
                batch=batch, process=(jax.process_index(), jax.process_count()),
            )  # fmt: skip
            continue
        header = records.Header(name, assistant.fingerprint, store.fingerprint, split, settings)
        truths[name] = header.truths(everything)
        own = truths[name][jax.process_index() :: jax.process_count()]
        _hold(assistant, opened, own, _file(folder, name, jax.process_index()), header, batch)
    multihost_utils.sync_global_devices("predictions are written")
    if jax.process_index():
        return
    runs = {}
    for name, held in truths.items():
        files = [str(_file(folder, name, process)) for process in range(jax.process_count())]
        runs[name] = score.Run(name, held, [each for file in files for each in records.read(file)[1]])
    users = simulator.results(folder, jax.process_count(), everything, known) if simulator.NAME in names else None
    about = {
        "export": assistant.fingerprint[:12],
        "dialogues": f"{len(everything)} of {split}, {store.fingerprint[:12]}",
        "corpus": f"{len(known)} videos",
        "candidates of the first stage": str(candidates),
        "dtype": dtype,
        **({"note": note} if note else {}),
    }
    score.score(folder, runs, known, about, judged_by, users)
    print((folder / "report.md").read_text())


def exported(workdir: epath.PathLike, out: epath.PathLike) -> epath.Path:
    """The run's newest checkpoint as a model folder below `out`, which is there or is written.

    Raises ValueError where `out` has that of another step, and as `export.export`.
    """
    folder, run = epath.Path(out) / "export", epath.Path(workdir)
    if folder.exists():
        newest = max(checkpoint.saved(run), default=None)
        if (there := card.step(folder)) != newest:
            raise ValueError(f"{folder}: found step {there}, and {workdir} is at {newest}; expected another --out")
    else:
        folder.parent.mkdir(parents=True, exist_ok=True)
        export.export(run, folder)
    return folder


def indexed(
    model: epath.PathLike, videos: epath.PathLike, dialogues: epath.PathLike, split: str, out: epath.PathLike
) -> epath.Path:
    """A corpus below `out` of the videos that the dialogues of a split name. Raises as `index.add`."""
    folder, store = epath.Path(out) / "corpus", DialogueStore(dialogues, split)
    named = {video for number in range(len(store)) for video in store[number].videos}
    folder.parent.mkdir(parents=True, exist_ok=True)
    added = index.add(model, videos, folder, only=named)
    for problem in added.contents.problems:
        print(f"{problem.path}: {problem.reason}", file=sys.stderr)
    return folder


def _file(folder: epath.Path, protocol: str, process: int) -> epath.Path:
    return folder / f"predictions-{protocol}-{process}.jsonl"


def _hold(
    assistant: Assistant,
    corpus: Corpus,
    dialogues: Sequence[Dialogue],
    file: epath.Path,
    header: records.Header,
    batch: int,
) -> None:
    """Holds the dialogues whose turns are not all in the file."""
    protocol, settings = header.protocol, header.settings
    with records.growing(str(file), header) as (append, before):
        there = {prediction.id for prediction in before}
        left = [
            dialogue
            for dialogue in dialogues
            if any(records.turn_id(dialogue.id, place) not in there for place in range(len(dialogue.turns)))
        ]
        with tqdm(desc=protocol, initial=len(dialogues) - len(left), total=len(dialogues), unit="dialogue") as bar:
            for first in range(0, len(left), batch):
                group = left[first : first + batch]
                for found in protocols.hold(
                    assistant, corpus, group, protocol, settings["candidates"], settings["shuffles"]
                ):
                    for prediction in found:
                        if prediction.id not in there:
                            append(prediction)
                    bar.update()


def main(argv: list[str]) -> None:
    """Holds the dialogues and prints the report."""
    args = flags.FLAGS
    command.refuse_arguments(argv)
    command.quiet()
    command.keep_programs(args.cache)
    told = (args.judge_url, args.judge_model, args.judge_key_variable)
    try:
        judged_by = judge.Judge(*told) if any(told) else None
        distributed.start()
        if jax.process_count() > 1 and (args.workdir or args.videos):
            raise ValueError("found --workdir or --videos with several processes, expected --export and --corpus")
        model = args.export or exported(args.workdir, args.out)
        corpus = args.corpus or indexed(model, args.videos, args.dialogues, args.split, args.out)
        evaluate(
            model, corpus, args.dialogues, args.out, split=args.split, names=args.protocols,
            candidates=args.candidates, batch=args.batch, shuffles=args.shuffles, most=args.dialogues_at_most,
            rounds=args.rounds, judged_by=judged_by, note=args.note,
        )  # fmt: skip
    except (ValueError, OSError, CorpusError, DatasetNotFound) as error:
        sys.exit(f"evaluate: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    distributed.define_flags()
    flags.DEFINE_string("export", None, "A model folder with both models.")
    flags.DEFINE_string("workdir", None, "Or a run, whose newest checkpoint becomes one, OUT/export.")
    flags.DEFINE_string("corpus", None, "The folder of a corpus, made with the model folder.")
    flags.DEFINE_string(
        "videos", None, "Or the folder of videos; those that the dialogues name become one, OUT/corpus."
    )
    flags.mark_flags_as_mutual_exclusive(["export", "workdir"], required=True)
    flags.mark_flags_as_mutual_exclusive(["corpus", "videos"], required=True)
    flags.DEFINE_string("dialogues", None, "The folder of the ivcr200k dataset.", required=True)
    flags.DEFINE_string("out", None, "The folder of predictions and report.", required=True)
    flags.DEFINE_string("split", "test", "Of the dialogues.")
    flags.DEFINE_list("protocols", [*OFFERED], "By which they are held; simulator is simulated users.")
    flags.DEFINE_integer("rounds", 5, "Messages of a simulated user at most.", lower_bound=1)
    flags.DEFINE_integer("candidates", 10, "Videos that the first stage hands on.", lower_bound=1)
    flags.DEFINE_integer("shuffles", 4, "Other orders in which given candidates are ranked.", lower_bound=0)
    flags.DEFINE_integer("batch", 8, "Dialogues at once.", lower_bound=1)
    flags.DEFINE_integer("dialogues_at_most", 0, "The first of the split; 0 is all.", lower_bound=0)
    flags.DEFINE_string("judge_url", "", "An endpoint in OpenAI's form, of a language model that scores the answers.")
    flags.DEFINE_string("judge_model", "", "Its exact name there.")
    flags.DEFINE_string("judge_key_variable", "", "The environment variable that holds the endpoint's key, if any.")
    flags.DEFINE_string("note", "", "What else the readers of the report should know.")
    flags.DEFINE_string("cache", None, "A folder to keep compiled programs in, so that the next start is fast.")
    app.run(main)
