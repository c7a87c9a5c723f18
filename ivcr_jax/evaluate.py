"""Holds the dialogues of a split with an export, and reports how it did.

    python -m ivcr_jax.evaluate --export=EXPORT --corpus=CORPUS --dialogues=DATA/ivcr200k --out=OUT
        [--split=test] [--protocols=paper,gold,cascade,e2e,simulator]

CORPUS is of the videos, by `ivcr_jax.index`. OUT gets the predictions of each protocol, report.md with plots, and
report.json. A run that is stopped goes on where it was. On several hosts each holds its share of the dialogues, and
the first reports. docs/evaluation.md says what the protocols and figures are.
"""

import dataclasses
import sys
from collections.abc import Sequence

import jax
from absl import app, flags
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from ivcr_jax import bundle, command, distributed, protocols, simulator
from ivcr_jax.config import listed
from ivcr_jax.data.dialogue import Dialogue
from ivcr_jax.data.store import DatasetNotFound, DialogueStore
from ivcr_jax.infer.assistant import Assistant
from ivcr_jax.infer.corpus import Corpus, CorpusError
from ivcr_jax.infer.generate import contents
from ivcr_jax.metrics import records, report, summary, text
from ivcr_jax.models.layers import Compute


def evaluate(
    export: epath.PathLike,
    corpus: epath.PathLike,
    dialogues: epath.PathLike,
    out: epath.PathLike,
    *,
    split: str = "test",
    names: Sequence[str] = protocols.PROTOCOLS,
    candidates: int = 10,
    batch: int = 8,
    most: int = 0,
    rounds: int = 5,
) -> None:
    """Holds the dialogues by each protocol, and reports. Every process of a job calls it.

    Args:
      export, corpus, dialogues: folders. out: the folder of predictions and report, to begin or to go on with.
      split: of the dialogues. names: of the protocols.
      candidates: how many the first stage hands on, where none are given.
      batch: dialogues at once. most: dialogues that are held, the first of the split; 0 is all.
      rounds: messages of a simulated user, at most.

    Raises:
      FileNotFoundError, DatasetNotFound: there is no such export, or no such dialogues.
      CorpusError: there is no corpus, or one of another export.
      ValueError: an unknown protocol, an empty split, no dialogue whose videos the corpus has, or predictions in `out`
        that were made with something else.
    """
    offered = [*protocols.PROTOCOLS, simulator.NAME]
    if unknown := [name for name in names if name not in offered]:
        raise ValueError(f"protocols: found {listed(unknown)}, expected some of {listed(offered)}")
    opened = Corpus.open(corpus, bundle.fingerprint(export))
    store = DialogueStore(dialogues, split)
    everything = [store[number] for number in range(min(len(store), most or len(store)))]
    known = {video.id for video in opened.videos}
    if not any(known.issuperset(dialogue.videos) for dialogue in everything):
        raise ValueError(f"{corpus}: found none of the {len(everything)} dialogues' videos whole, expected them there")
    folder = epath.Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    assistant = Assistant(export, compute=Compute(dtype=dtype))
    settings = {
        "corpus": contents(opened),
        "fits": assistant.fits,
        "candidates": candidates,
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
        kept = [protocols.of_paper(dialogue) for dialogue in everything] if name == "paper" else everything
        truths[name] = [dialogue for dialogue in kept if dialogue is not None]
        header = records.Header(name, assistant.fingerprint, store.fingerprint, split, settings)
        own = truths[name][jax.process_index() :: jax.process_count()]
        _hold(assistant, opened, own, name, _file(folder, name, jax.process_index()), header, candidates, batch)
    multihost_utils.sync_global_devices("predictions are written")
    if jax.process_index():
        return
    summaries, problems = {}, {}
    signatures: dict[str, str] = {}
    for name, held in truths.items():
        said = [
            prediction
            for process in range(jax.process_count())
            for prediction in records.read(str(_file(folder, name, process)))[1]
        ]
        pairs, problems[name] = records.match(held, said, known, given=name != "e2e")
        found = summary.summarise(pairs)
        words, signatures = text.bleu(pairs)
        summaries[name] = dataclasses.replace(found, overall=found.overall | words)
    users = simulator.results(folder, jax.process_count(), everything, known) if simulator.NAME in names else None
    about = {
        "export": assistant.fingerprint[:12],
        "dialogues": f"{len(everything)} of {split}, {store.fingerprint[:12]}",
        "corpus": f"{len(known)} videos",
        "candidates of the first stage": str(candidates),
        "dtype": dtype,
        **signatures,
    }
    report.write(str(folder), report.Report(about, summaries, problems, users=users))
    print((folder / "report.md").read_text())


def _file(folder: epath.Path, protocol: str, process: int) -> epath.Path:
    return folder / f"predictions-{protocol}-{process}.jsonl"


def _hold(
    assistant: Assistant,
    corpus: Corpus,
    dialogues: Sequence[Dialogue],
    protocol: str,
    file: epath.Path,
    header: records.Header,
    candidates: int,
    batch: int,
) -> None:
    """Holds the dialogues whose turns are not all in the file."""
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
                for found in protocols.hold(assistant, corpus, group, protocol, candidates):
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
    try:
        distributed.start()
        evaluate(
            args.export, args.corpus, args.dialogues, args.out, split=args.split, names=args.protocols,
            candidates=args.candidates, batch=args.batch, most=args.dialogues_at_most, rounds=args.rounds,
        )  # fmt: skip
    except (ValueError, OSError, CorpusError, DatasetNotFound) as error:
        sys.exit(f"evaluate: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    distributed.define_flags()
    flags.DEFINE_string("export", None, "A model folder with both models.", required=True)
    flags.DEFINE_string("corpus", None, "The folder of a corpus of the dialogues' videos, made with it.", required=True)
    flags.DEFINE_string("dialogues", None, "The folder of the ivcr200k dataset.", required=True)
    flags.DEFINE_string("out", None, "The folder of predictions and report.", required=True)
    flags.DEFINE_string("split", "test", "Of the dialogues.")
    flags.DEFINE_list("protocols", [*protocols.PROTOCOLS], "By which they are held; simulator is simulated users.")
    flags.DEFINE_integer("rounds", 5, "Messages of a simulated user at most.", lower_bound=1)
    flags.DEFINE_integer("candidates", 10, "Videos that the first stage hands on.", lower_bound=1)
    flags.DEFINE_integer("batch", 8, "Dialogues at once.", lower_bound=1)
    flags.DEFINE_integer("dialogues_at_most", 0, "The first of the split; 0 is all.", lower_bound=0)
    flags.DEFINE_string("cache", None, "A folder to keep compiled programs in, so that the next start is fast.")
    app.run(main)
