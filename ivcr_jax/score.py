"""Reports on predictions that are there, without a model.

    python -m ivcr_jax.score --dialogues=DATA/ivcr200k --predictions=[NAME=]FILE,[NAME=]FILE... --out=OUT
        [--split=test] [--corpus=CORPUS]

FILE is as `ivcr_jax.evaluate` or `ivcr_jax.metrics.exchange` writes it. Files of one NAME, which is their protocol's
where none is given, are a run's that several hosts made. OUT gets report.md with plots, and report.json, as from
`ivcr_jax.evaluate`; and of the runs by one protocol, the first is compared with each of the others. CORPUS is what was
searched, of which corpus.json is read; it is needed where a search had no candidates.
"""

import dataclasses
import sys
from collections.abc import Collection, Mapping, Sequence

from absl import app, flags
from etils import epath

from ivcr_jax import command
from ivcr_jax.config import listed
from ivcr_jax.data.dialogue import Dialogue, Intent
from ivcr_jax.data.store import DatasetNotFound, DialogueStore
from ivcr_jax.infer.corpus import ROOT, Contents, CorpusError, read_contents
from ivcr_jax.metrics import interactive, judge, records, report, summary, text
from ivcr_jax.metrics.records import Header, Prediction


@dataclasses.dataclass(frozen=True)
class Run:
    """Attributes: protocol: by which it was held. truths: dialogues that it was to answer. predictions: what it did."""

    protocol: str
    truths: Sequence[Dialogue]
    predictions: Sequence[Prediction]


def score(
    folder: epath.PathLike,
    runs: Mapping[str, Run],
    pool: Collection[str] | None,
    about: Mapping[str, str],
    judged_by: judge.Judge | None = None,
    users: interactive.Users | None = None,
) -> None:
    """Scores runs and writes their report, with a comparison of the first by each protocol with each other one.

    Args:
      folder: gets report.md, plots and report.json.
      runs: by the names that the report has for them.
      pool: ids of the corpus that was searched; None where candidates were given.
      about: what the report says of itself.
      judged_by: a language model that scores the answers, where one is to.
      users: what came of simulated ones, where there were any.

    A run that had no turn to answer is told of and not scored, as where the first stage found nothing that the
    published test set would keep.

    Raises ValueError where no run had any, or one is to be compared with one of other turns.
    """
    if idle := [name for name, run in runs.items() if not run.truths]:
        if len(idle) == len(runs):
            raise ValueError(f"{listed(idle)}: found no turn to answer, expected at least one: an empty split?")
        about = {**about, **{name: "no turn of these dialogues is one of its" for name in idle}}
        runs = {name: run for name, run in runs.items() if run.truths}
    firsts: dict[str, str] = {}
    for name, run in runs.items():
        first = firsts.setdefault(run.protocol, name)
        if run.truths != runs[first].truths:
            raise ValueError(f"{name}: found other dialogues than {first} has, expected the same by {run.protocol}")
    summaries, problems, pairs, comparisons = {}, {}, {}, {}
    signatures: dict[str, str] = {}
    for name, run in runs.items():
        given = run.protocol != records.OWN
        pairs[name], problems[name] = records.match(run.truths, run.predictions, pool, given=given)
        words, signature = text.bleu(pairs[name])
        signatures |= signature
        found = summary.summarise(pairs[name])
        if judged_by is not None:
            judged = judge.judged(pairs[name], judged_by, str(epath.Path(folder) / f"judgements-{name}.jsonl"))
            words |= judge.cells(pairs[name], judged.scores)
            signatures[f"judge, {name}"] = judged.about
            problems[name].unjudged.update(judged.failures)
        summaries[name] = dataclasses.replace(found, overall=found.overall | words)
        first = firsts[run.protocol]
        if name != first:
            comparisons[f"{first} against {name}"] = summary.compare(pairs[first], pairs[name])
    report.write(str(folder), report.Report({**about, **signatures}, summaries, problems, comparisons, users))


def score_files(
    dialogues: epath.PathLike,
    files: Sequence[tuple[str, str]],
    out: epath.PathLike,
    *,
    split: str = "test",
    corpus: epath.PathLike | None = None,
) -> None:
    """Scores files of predictions.

    Args:
      dialogues: the folder of the dataset. split: of it.
      files: names of runs, "" for the protocol's, and paths.
      out: the folder of the report. corpus: that was searched, its folder or its corpus.json.

    Raises:
      FileNotFoundError, DatasetNotFound, CorpusError: there is no such file, dataset or corpus.
      ValueError: a file is something else, of other dialogues or of another corpus; two runs have one name; or a search
        had no candidates, and there is no corpus.
    """
    store = DialogueStore(dialogues, split)
    headers: dict[str, Header] = {}
    predictions: dict[str, list[Prediction]] = {}
    for given, path in files:
        header, found = records.read_of(path, store.fingerprint, split)
        name = given or header.protocol
        if headers.setdefault(name, header) != header:
            raise ValueError(f"{path}: found another run than {name} is, expected NAME=FILE with a name for each")
        predictions.setdefault(name, []).extend(found)
    opened = None if corpus is None else _contents(epath.Path(corpus))
    everything = [store[number] for number in range(len(store))]
    about = {"dialogues": f"{len(everything)} of {split}, {store.fingerprint[:12]}"}
    if opened is not None:
        about["corpus"] = f"{len(opened.videos)} videos, {opened.digest[:12]}"
    runs = {}
    for name, header in headers.items():
        run = runs[name] = Run(header.protocol, header.truths(everything), predictions[name])
        searched = header.settings.get("corpus")
        if opened is None and (run.protocol == records.OWN or (searched and _lacks_candidates(run.truths))):
            raise ValueError(f"{name}: found searches without candidates, expected --corpus")
        if opened is not None and searched not in (None, opened.digest):
            raise ValueError(f"{corpus}: found another corpus than {name} was made with, expected {searched!s:.12}")
        said = {"protocol": header.protocol, "export": header.export, **header.settings}
        about[name] = ", ".join(f"{key} {value!s:.12}" for key, value in said.items())
    score(out, runs, None if opened is None else {video.id for video in opened.videos}, about)


def _contents(path: epath.Path) -> Contents:
    """Args: path: of a corpus or of its root file."""
    return read_contents(path.parent if path.name == ROOT else path)


def _lacks_candidates(dialogues: Sequence[Dialogue]) -> bool:
    turns = (turn for dialogue in dialogues for turn in dialogue.turns)
    return any(turn.intent == Intent.VIDEO and not turn.candidates for turn in turns)


def main(argv: list[str]) -> None:
    """Writes the report and prints it."""
    args = flags.FLAGS
    command.refuse_arguments(argv)
    command.quiet()
    files = [(name, path) for name, _, path in (each.rpartition("=") for each in args.predictions)]
    try:
        score_files(args.dialogues, files, args.out, split=args.split, corpus=args.corpus)
    except (ValueError, OSError, CorpusError, DatasetNotFound) as error:
        sys.exit(f"score: {error}")
    print((epath.Path(args.out) / "report.md").read_text())


if __name__ == "__main__":
    flags.DEFINE_string("dialogues", None, "The folder of the ivcr200k dataset.", required=True)
    flags.DEFINE_list("predictions", None, "Files, each [NAME=]FILE.", required=True)
    flags.DEFINE_string("out", None, "The folder of the report.", required=True)
    flags.DEFINE_string("split", "test", "Of the dialogues.")
    flags.DEFINE_string("corpus", None, "The corpus that was searched: its folder, or its corpus.json.")
    app.run(main)
