"""The published test set and result file: IVCR-200K.json -> the samples that the released code evaluates on.

    python -m ivcr_jax.metrics.published --raw=IVCR-200K.json --dialogues=DIALOGUES.json [--videos=VIDEOS.json]

The steps are those of `convert_dataset.ipynb` (all its versions agree on the test set). DIALOGUES is what the notebook
calls `IVCR_no_type0_no_zero_dialogues_test_7.json`, VIDEOS the list beside it. docs/evaluation.md says what is
corrected unless --as_published is given.
"""

import collections
import dataclasses
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from absl import app, flags

from ivcr_jax.config import listed
from ivcr_jax.data import dialogue as stored
from ivcr_jax.data.dialogue import CHAT_TYPE, INDEPENDENT_TYPE, Dialogue, Intent
from ivcr_jax.metrics import answers
from ivcr_jax.metrics.raw import INDEPENDENT, SEARCH, Turn, read_list, read_rows, short, turn_id, turns_of

AnyTurn = TypeVar("AnyTurn", Turn, stored.Turn)

LONGEST = 7  # turns of a sample; the notebook writes up to UNFILTERED, then leaves those out that are longer
UNFILTERED = 10
CANDIDATES = 10

SYSTEM = "You are an excellent video retrieval AI assistant."
_VIDEO = "<VID> {} </VID> <VIDEO> <VIDEOTOKEN> </VIDEO>"
_LIST = "Candidate videos : " + ",".join(_VIDEO.format(number + 1) for number in range(CANDIDATES)) + "."
_CURRENT = f"Current video : {_VIDEO}."
# What stands before the question in `user_q`. The sentence with the frames' times is put in once more each time the
# released dataset hands out the same sample.
_SHOWN = _VIDEO.format(r"\w+")
_BEFORE_QUESTION = re.compile(
    rf"(?:Candidate videos : {_SHOWN}(?:,{_SHOWN})*"
    rf"|Current video : {_SHOWN}(?:\. The video contains \d+ frames sampled at [\d., ]+ seconds)*)\."
)


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """A dialogue up to one of its turns, whose answer is what is asked for.

    Attributes:
      dialogue: its id.
      turns: those before it and itself, last.
      messages: {"role", "content"} of the system, then of user and assistant in turn.
    """

    dialogue: str
    turns: tuple[Turn, ...]
    messages: list[dict[str, str]]

    @property
    def videos(self) -> list[list[str] | str]:
        """Of each turn the candidates, or the one video of a moment; nothing of a chat turn."""
        shown = (turn for turn in self.turns if turn.intent != Intent.CHAT)
        return [turn.video_id if turn.intent == Intent.MOMENT else [*turn.candidates] for turn in shown]


@dataclasses.dataclass(frozen=True, slots=True)
class Prediction:
    """A row of result.json. Attributes: user_q: the last user message. output: the answer, None where there is none."""

    user_q: str
    output: str | None


def question_of(content: str) -> str:
    """The question of a user message, without the videos and times before it."""
    content = content.strip()
    found = _BEFORE_QUESTION.match(content)
    return content[found.end() :].strip() if found else content


def convert(
    rows: Sequence[Mapping[str, Any]], *, as_published: bool = False, longest: int = LONGEST
) -> tuple[list[Sample], dict[str, list[str]]]:
    """The samples of the test set, in order.

    Dialogues stay whose first turn the first stage found; of those whose turns are independent of each other, the turns
    it found. Each turn then ends a sample, at most `longest` turns long, with the true answers before it.

    Args:
      rows: of `read_rows`.
      as_published: lose every dialogue of independent turns, as the notebook does. Else they stay, and a turn that has
        no video to show is history only.
      longest: turns; 10 for what the notebook calls `..._dialogues_test.json`.

    Returns:
      the samples, and ids of what ends none by the reason.

    Raises:
      ValueError: as_published, where the notebook would stop: the sentence says at which turn, and why.
    """
    samples: list[Sample] = []
    left_out: dict[str, list[str]] = collections.defaultdict(list)
    for row in rows:
        name = row["id"]
        turns, alone = turns_of(row)
        kept, lost = _kept_as_published(row, turns, alone) if as_published else _kept(row, turns)
        left_out["messages in no turn"] += [f"{name} message {place}" for place in alone]
        left_out[lost] += [turn_id(name, turn.number) for turn in turns if turn not in kept]
        left_out[f"behind {longest} turns"] += [turn_id(name, turn.number) for turn in kept[longest:]]
        messages = [{"role": "system", "content": SYSTEM}]
        for end, turn in enumerate(kept[:longest], 1):
            messages += [
                {"role": "user", "content": _shown(turn) + turn.question.strip()},
                {"role": "assistant", "content": turn.answer.strip()},
            ]
            if _shown(turn):
                samples.append(Sample(name, tuple(kept[:end]), messages[:]))
            else:
                left_out["without a video to show"].append(turn_id(name, turn.number))
    return samples, {reason: ids for reason, ids in left_out.items() if ids}


def _kept(row: Mapping[str, Any], turns: list[Turn]) -> tuple[list[Turn], str]:
    """Turns of a row that samples are made of, and why the others are not."""
    independent = row["type"] == INDEPENDENT
    why = "missed by the first stage" if independent else "their dialogue's first was missed by the first stage"
    return kept_of(turns, independent), why


def kept_of(turns: Sequence[AnyTurn], independent: bool) -> list[AnyTurn]:
    """The turns of a dialogue that the test set keeps: all where the first stage found the first one's video, else
    none; of independent ones those it found."""
    if independent:
        return [turn for turn in turns if turn.intent == Intent.CHAT or retrieved(turn)]
    first = next((turn for turn in turns if turn.intent != Intent.CHAT), None)
    return list(turns) if first is not None and retrieved(first) else []


def retrieved(turn: AnyTurn) -> bool:
    """Whether the first stage found a turn's video: in its list, or for a moment at the head of it."""
    listed = turn.candidates[:1] if turn.intent == Intent.MOMENT else turn.candidates
    return turn.video_id in listed


def of_dialogue(dialogue: Dialogue) -> Dialogue | None:
    """What of a dialogue of the built dataset the test set keeps, or None: nothing of plain chat."""
    turns = tuple(kept_of(dialogue.turns, dialogue.type == INDEPENDENT_TYPE)[:LONGEST])
    return dataclasses.replace(dialogue, turns=turns) if turns and dialogue.type != CHAT_TYPE else None


def _kept_as_published(row: Mapping[str, Any], turns: list[Turn], alone: list[int]) -> tuple[list[Turn], str]:
    """As `_kept`. Raises as `convert`."""
    independent = row["type"] == INDEPENDENT
    asked_last = [
        place for place in alone if place >= 2 * len(turns) and row["conversations"][place]["from"] == "human"
    ]
    if alone and (independent or not turns or alone != asked_last):  # questions at the end are passed over
        raise ValueError(f"{row['id']} message {alone[0]}: the published conversion needs human and gpt in turn")
    for turn in turns if independent else turns[:1]:
        answer = row["conversations"][2 * turn.number - 1]
        lacking = [name for name in ("gt_se", "candidate_videos", "video_id") if name not in answer]
        if lacking or (turn.intent == Intent.MOMENT and not turn.candidates):
            found = f"no {listed(lacking)}" if lacking else "empty candidate_videos"
            raise ValueError(f"{turn_id(row['id'], turn.number)}: {found}; the published conversion stops here (B12)")
    if independent:
        return [], "of independent turns (B8)"  # the notebook keeps the questions without their answers
    kept = turns if turns and retrieved(turns[0]) else []
    for turn in kept[:UNFILTERED]:
        where = turn_id(row["id"], turn.number)
        if turn.gt_se is None:
            raise ValueError(f"{where}: no gt_se; the published scorer stops here (B6)")
        if turn.gt_se == SEARCH and not turn.candidates:
            raise ValueError(f"{where}: no candidate_videos; the published conversion stops here (B12)")
    return kept, "their dialogue's first was missed by the first stage"


def _shown(turn: Turn) -> str:
    """What stands before the question. The number of a moment's video is that of its true answer, as published."""
    if turn.intent == Intent.MOMENT:
        return _CURRENT.format(answers.published_video(turn.answer))
    return _LIST if turn.candidates else ""


def read_samples(path: str) -> list[list[dict[str, str]]]:
    """The messages of each sample of DIALOGUES. Raises FileNotFoundError, and ValueError where it is something else or
    empty."""
    samples = read_list(path)
    for place, messages in enumerate(samples):
        roles = [m.get("role") if isinstance(m, dict) else None for m in messages] if isinstance(messages, list) else []
        if (
            roles != ["system", *["user", "assistant"] * (len(roles) // 2)]
            or len(roles) < 3
            or not all(isinstance(message.get("content"), str) for message in messages)
        ):
            raise ValueError(f"{path}: sample {place}: found {short(messages)}, expected messages of system, user, ...")
    if not samples:
        raise ValueError(f"{path}: found no sample, expected some")
    return samples


def read_predictions(path: str) -> list[Prediction]:
    """The rows of result.json. Raises FileNotFoundError, and ValueError where it is something else."""
    predictions = []
    for place, row in enumerate(read_list(path)):
        if not isinstance(row, dict) or not isinstance(row.get("user_q"), str) or "output" not in row:
            raise ValueError(f"{path}: row {place}: found {short(row)}, expected user_q and output")
        if not isinstance(row["output"], str | None):
            raise ValueError(f"{path}: row {place}: output: found {short(row['output'])}, expected text or null")
        predictions.append(Prediction(row["user_q"], row["output"]))
    return predictions


def write_predictions(path: str, samples: Sequence[Sample], outputs: Sequence[str | None]) -> None:
    """Writes result.json: for each sample an answer, or None, in their order. Raises ValueError for another number of
    them."""
    if len(outputs) != len(samples):
        raise ValueError(f"{path}: found {len(outputs)} answers for {len(samples)} samples; expected one each")
    rows = zip(samples, outputs, strict=True)
    write_json(path, [{"user_q": sample.messages[-2]["content"], "output": output} for sample, output in rows])


def write_json(path: str, value: Any) -> None:
    """Writes a file as the notebook does; it appears when it is whole."""
    with open(f"{path}.part", "w", encoding="utf-8") as file:
        json.dump(value, file, indent=4, ensure_ascii=False)
    os.replace(f"{path}.part", path)


def main(argv: Sequence[str]) -> None:
    """Writes the samples and the list of their videos, and says how many there are and what was left out."""
    args = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; options are written --name=value")
    try:
        samples, left_out = convert(read_rows(args.raw), as_published=args.as_published, longest=args.longest)
        write_json(args.dialogues, [sample.messages for sample in samples])
        if args.videos:
            write_json(args.videos, [sample.videos for sample in samples])
    except (OSError, ValueError) as error:
        sys.exit(f"published: {error}")
    for reason, ids in left_out.items():
        print(f"{len(ids)} {reason}: {listed(ids)}")
    print(json.dumps({"samples": len(samples), "left_out": {reason: len(ids) for reason, ids in left_out.items()}}))


if __name__ == "__main__":
    flags.DEFINE_string("raw", None, "IVCR-200K.json.", required=True)
    flags.DEFINE_string("dialogues", None, "The file of samples to write.", required=True)
    flags.DEFINE_string("videos", None, "The file of the samples' videos to write.")
    flags.DEFINE_bool("as_published", False, "Lose the dialogues of independent turns, as the notebook does.")
    flags.DEFINE_integer("longest", LONGEST, "Turns of a sample.", lower_bound=1, upper_bound=UNFILTERED)
    app.run(main)
