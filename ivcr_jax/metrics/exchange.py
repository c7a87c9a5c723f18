"""Prediction files in the published form and in ours, one made of the other.

    python -m ivcr_jax.metrics.exchange --raw=IVCR-200K.json --dialogues=DATA/ivcr200k --predictions=FILE --out=FILE
        [--split=test]

A result.json, a list of `user_q` and `output`, becomes JSON lines as `records` has them, by the protocol `paper`; such
lines become a result.json, in the order of the published test set. Prints what could not be carried over, and in its
last line one JSON object with the ids of all of it. docs/evaluation.md says what is taken for what.
"""

import collections
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from ivcr_jax import command
from ivcr_jax.config import listed
from ivcr_jax.data.dialogue import INDEPENDENT_TYPE, Dialogue, Intent, renumber, video_id
from ivcr_jax.data.prompt import without_control_tokens
from ivcr_jax.data.store import DatasetNotFound, DialogueStore
from ivcr_jax.metrics import answers, matching, published, raw, records
from ivcr_jax.metrics.published import Sample
from ivcr_jax.metrics.records import Header, Moment, Prediction

# What may be amiss, and what becomes of it. `dialogue turn 1` is one of the raw file, `dialogue#0` one of the dataset.
TO_PUBLISHED = {
    "not_in_dataset": "samples whose turn the dataset has not, or the run was not to answer: null",
    "missing": "samples without a prediction: null",
    "failed": "samples whose turn failed: null",
    "not_shown": "answers with a video that is no candidate of the sample: null",
    "renumbered": "answers with another number than the sample has for their video: it was changed",
    "no_sample": "predictions of turns that no sample ends with: left out",
    "not_in_raw": "predictions of turns that are not found in the raw file's test rows, as plain chat: left out",
    "repeated": "predictions of a turn that has one: left out",
    "unknown": "predictions of what is no turn: left out",
}
TO_OURS = {
    "not_in_dataset": "samples whose turn the dataset, or its part for `paper`, has not: left out",
    "missing": "samples without a prediction, or with null: without one",
    "contradicted": "samples answered more than once, not in the same words: failed",
    "ambiguous": "samples not in their order, and others ask the same and are answered otherwise: failed",
    "unreadable": "answers that name no video, or no span: they do not parse",
    "out_of_range": "answers with a number that was not shown: they do not parse",
    "doubled": "samples answered twice in the same words: counted once",
    "reordered": "samples not in their order: found by the question",
    "unknown": "predictions for what is no sample: left out",
}

Problems = dict[str, list[str]]
Numbers = dict[tuple[str, int], int | None]


def exchange(rows: str, dialogues: str, predictions: str, out: str, *, split: str = raw.SPLIT) -> dict[str, Any]:
    """Writes predictions in the other form.

    Args:
      rows: IVCR-200K.json. dialogues: the folder of the dataset that was built of it. split: of the dataset.
      predictions: a result.json, or a file of `records`. out: what is made of it.

    Returns:
      "predictions" and "samples", how many there are, "written", how many of the latter have an answer, and "problems":
      by the names above how many, what becomes of them, and their ids.

    Raises:
      FileNotFoundError, DatasetNotFound: there is no such file, or no such dataset.
      ValueError: a file is something else, has predictions for other dialogues or by a protocol that gives no
        candidates, or has no turn in common with the dataset.
    """
    store = DialogueStore(dialogues, split)
    theirs = _is_list(predictions)
    if theirs:
        answered = published.read_predictions(predictions)
        settings = {"form": "result.json", "raw": _hash(rows)}
        header = Header(records.PAPER, _hash(predictions), store.fingerprint, split, settings)
    else:
        header, ours = records.read_of(predictions, store.fingerprint, split)
        if header.protocol == records.OWN:
            raise ValueError(f"{predictions}: found the protocol {header.protocol}, expected one with given candidates")
    test = raw.read_rows(rows)
    samples, _ = published.convert(test)
    numbers = align([store[number] for number in range(len(store))], header, test)
    if not any(numbers.values()):
        raise ValueError(f"{dialogues}: found no turn of {rows} in {split}, expected a dataset that was built of it")
    if theirs:
        found, problems = to_ours(answered, samples, numbers)
        records.write(out, header, found)
        counts = {"predictions": len(answered), "samples": len(samples), "written": len(found)}
    else:
        outputs, problems = to_published(ours, samples, numbers)
        published.write_predictions(out, samples, outputs)
        written = sum(output is not None for output in outputs)
        counts = {"predictions": len(ours), "samples": len(samples), "written": written}
    names = TO_OURS if theirs else TO_PUBLISHED
    amiss = {
        name: {"count": len(problems[name]), "what": what, "ids": problems[name]}
        for name, what in names.items()
        if problems.get(name)
    }
    return counts | {"problems": amiss}


def align(dialogues: Sequence[Dialogue], header: Header, rows: Sequence[Mapping[str, Any]]) -> Numbers:
    """Which turns of the raw file those of the dataset are.

    `data.source` cuts turns and leaves some out, cleans texts, and counts from 0; what it keeps of a dialogue it keeps
    in order. So a turn is found by the dialogue's id, the question, the answer and the video, and of several that have
    these in common the first is the first. Of independent turns it may have left out any: where it kept fewer that are
    alike than there were, nobody knows which.

    Args:
      dialogues: of the split. header: of the predictions, whose protocol says which turns are counted.
      rows: of `raw.read_rows`.

    Returns:
      of each turn that the run was to answer, by dialogue and place from 0, its number in the raw file, from 1; None
      where it is not found.
    """
    turns = {row["id"]: raw.turns_of(row)[0] for row in rows}
    every: dict[int, int | None] = {}  # by the identity of a turn, as a protocol may count fewer of them
    for dialogue in dialogues:
        alike: dict[tuple[str, ...], list[int]] = collections.defaultdict(list)
        for turn in turns.get(dialogue.id, ()):
            alike[_plain(turn.question), _plain(turn.answer), video_id(turn.video_id)].append(turn.number)
        kept = collections.Counter(_key(dialogue, place) for place in range(len(dialogue.turns)))
        if dialogue.type == INDEPENDENT_TYPE:
            alike = {key: there for key, there in alike.items() if len(there) == kept[key]}
        left = {key: iter(there) for key, there in alike.items()}
        for place, each in enumerate(dialogue.turns):
            every[id(each)] = next(left.get(_key(dialogue, place), iter(())), None)
    return {
        (dialogue.id, place): every[id(turn)]
        for dialogue in header.truths(dialogues)
        for place, turn in enumerate(dialogue.turns)
    }


def _key(dialogue: Dialogue, place: int) -> tuple[str, ...]:
    turn = dialogue.turns[place]
    return turn.user, turn.answer, turn.video_id


def _plain(text: str) -> str:
    """A text as `data.source` cleans it."""
    return without_control_tokens(text.strip())


def to_published(
    predictions: Sequence[Prediction], samples: Sequence[Sample], numbers: Numbers
) -> tuple[list[str | None], Problems]:
    """Of each sample the answer, None where there is none, and ids of what is amiss by the names of TO_PUBLISHED.

    Args: predictions: of one file. samples: of `published.convert`. numbers: of `align`.
    """
    problems: Problems = collections.defaultdict(list)
    places = _places(numbers)
    there: dict[tuple[str, int], Prediction] = {}
    for prediction in predictions:
        key = (prediction.dialogue, prediction.turn)
        if key in there:
            problems["repeated"].append(prediction.id)
        elif key not in numbers:
            problems["unknown"].append(prediction.id)
        else:
            there[key] = prediction
            if numbers[key] is None:
                problems["not_in_raw"].append(prediction.id)
    outputs: list[str | None] = []
    for sample in samples:
        name, place = _name(sample), places.get((sample.dialogue, sample.turns[-1].number))
        found = None if place is None else there.pop((sample.dialogue, place), None)
        output, amiss = None, ""
        if found is None:
            amiss = "not_in_dataset" if place is None else "missing"
        elif found.error:
            amiss = "failed"
        else:
            output, amiss = _as_shown(found, sample.turns[-1])
        outputs.append(output)
        if amiss:
            problems[amiss].append(name)
    problems["no_sample"] = [found.id for key, found in there.items() if numbers[key] is not None]
    return outputs, problems


def _as_shown(found: Prediction, turn: raw.Turn) -> tuple[str | None, str]:
    """An answer in which the number of a candidate is its place in the raw list, and what is amiss. The dataset may
    have left candidates out, and where it has none, the first stage's were numbered."""
    number, shown = answers.video(found.text), _shown(turn)
    if turn.intent != Intent.VIDEO or found.video is None or number is None or not found.parsed:
        return found.text, ""
    if found.video in shown[number - 1 : number]:
        return found.text, ""
    if found.video in shown:
        text = renumber(found.text, shown.index(found.video) + 1)
        if answers.video(text) == shown.index(found.video) + 1:
            return text, "renumbered"
    return None, "not_shown"


def to_ours(
    predictions: Sequence[published.Prediction], samples: Sequence[Sample], numbers: Numbers
) -> tuple[list[Prediction], Problems]:
    """The records of a result file, and ids of what is amiss by the names of TO_OURS. Arguments: `to_published`'s."""
    problems: Problems = collections.defaultdict(list)
    questions = [published.question_of(sample.messages[-2]["content"]) for sample in samples]
    found, amiss, unknown = matching.match(questions, predictions)
    problems |= {name: [_name(samples[place]) for place in here] for name, here in amiss.items() if name != "missing"}
    problems["unknown"] = [f"prediction {row}" for row in unknown]
    failed = {place: TO_OURS[name] for name in ("contradicted", "ambiguous") for place in amiss.get(name, ())}
    places, ours = _places(numbers), []
    for number, (sample, row) in enumerate(zip(samples, found, strict=True)):
        name, turn, place = _name(sample), sample.turns[-1], places.get((sample.dialogue, sample.turns[-1].number))
        output = None if row is None else predictions[row].output
        if place is None:
            problems["not_in_dataset"].append(name)
        elif number in failed:
            ours.append(Prediction(sample.dialogue, place, error=failed[number]))
        elif output is None:
            problems["missing"].append(name)
        else:
            read, reason = _read(output, turn)
            if reason:
                problems[reason].append(name)
            ours.append(Prediction(sample.dialogue, place, turn.intent, text=output, parsed=not reason, **read))
    return ours, problems


def _read(output: str, turn: raw.Turn) -> tuple[dict[str, Any], str]:
    """Fields of a record that an answer gives, and why it gives none. A moment is in the true video, as published."""
    if turn.intent == Intent.MOMENT:
        span, truth = answers.span(output), video_id(turn.video_id)
        return ({}, "unreadable") if span is None else ({"video": truth, "moments": (Moment(truth, *span),)}, "")
    number, shown = answers.video(output), _shown(turn)
    if number is None or not 1 <= number <= len(shown):
        return {"pool": len(shown)}, "unreadable" if number is None else "out_of_range"
    chosen = shown[number - 1]
    return {"video": chosen, "ranking": (chosen,), "pool": len(shown)}, ""


def _shown(turn: raw.Turn) -> list[str]:
    return [video_id(candidate) for candidate in turn.candidates]


def _places(numbers: Numbers) -> dict[tuple[str, int], int]:
    """The place of a turn by its dialogue and number."""
    return {(dialogue, number): place for (dialogue, place), number in numbers.items() if number is not None}


def _name(sample: Sample) -> str:
    return raw.turn_id(sample.dialogue, sample.turns[-1].number)


def _is_list(path: str) -> bool:
    """Whether a JSON file is one list, by how it begins."""
    with open(path, "rb") as file:
        return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _hash(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main(argv: Sequence[str]) -> None:
    """Writes the file, and prints what is amiss."""
    args = flags.FLAGS
    command.refuse_arguments(argv)
    command.quiet()
    try:
        found = exchange(args.raw, args.dialogues, args.predictions, args.out, split=args.split)
    except (OSError, ValueError, DatasetNotFound) as error:
        sys.exit(f"exchange: {error}")
    for name, problem in found["problems"].items():
        print(f"{name} ({problem['what']}): {problem['count']}, {listed(problem['ids'])}")
    print(json.dumps(found))


if __name__ == "__main__":
    flags.DEFINE_string("raw", None, "IVCR-200K.json.", required=True)
    flags.DEFINE_string("dialogues", None, "The folder of the ivcr200k dataset that was built of it.", required=True)
    flags.DEFINE_string("predictions", None, "A result.json, or a file of predictions in our form.", required=True)
    flags.DEFINE_string("out", None, "The file to write, in the other form.", required=True)
    flags.DEFINE_string("split", raw.SPLIT, "Of the dialogues.")
    app.run(main)
