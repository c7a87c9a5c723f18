"""IVCR-200K.json for evaluation: the test rows as they stand, and the turns in them.

`ivcr_jax.data.source` repairs and cuts what it reads, for training. A score is of every turn that there is, so here
nothing is repaired. It knows no answer and no score.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ivcr_jax.data.dialogue import CHAT_TYPE, INDEPENDENT_TYPE, Intent

SPLIT = "test"
CHAT, INDEPENDENT = [CHAT_TYPE], [INDEPENDENT_TYPE]  # values of `type`
SEARCH = [-1, -1]  # the `gt_se` of a turn that looks for a video


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer.

    Attributes:
      number: of the turn in its dialogue, from 1.
      question, answer: as they stand in the file.
      video_id: path of the ground truth, "" where there is none.
      candidates: paths in the first stage's rank order; empty where there are none.
      gt_se: as it stands; None where it is missing.
    """

    number: int
    question: str
    answer: str
    video_id: str
    candidates: tuple[str, ...]
    gt_se: Any

    @property
    def intent(self) -> Intent:
        """What is asked for. The released code knows no chat here: it takes it for a search."""
        if self.gt_se is not None and self.gt_se != SEARCH:
            return Intent.MOMENT
        return Intent.VIDEO if self.video_id or self.candidates else Intent.CHAT


def read_rows(path: str) -> list[dict[str, Any]]:
    """The raw rows of the test split whose type is not [0], each with its "id": its own, or `row-` and its number, or
    both where another row has it.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is no JSON, no list, a row is malformed, or there is no such row.
    """
    rows, ids = [], set()
    for index, row in enumerate(read_list(path)):
        fallback = f"row-{index:07d}"
        if not isinstance(row, dict) or not isinstance(row.get("split"), str):
            raise ValueError(f"{path}: {fallback}: found {short(row)}, expected a dialogue with its split")
        # As `data.source` names them: one that is there again, in whatever split, is another dialogue.
        name = str(row.get("id", "")).strip() or fallback
        row["id"] = name = f"{name}@{fallback}" if name in ids else name
        ids.add(name)
        if row["split"] != SPLIT or row.get("type") == CHAT:
            continue
        messages = row.get("conversations")
        if "type" not in row or not isinstance(messages, list):
            raise ValueError(f"{path}: {fallback}: found {short(sorted(row))}, expected type and conversations")
        for place, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("value"), str) or "from" not in message:
                raise ValueError(
                    f"{path}: {fallback}: message {place}: found {short(message)}, expected from and value, a text"
                )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: found no dialogue of the split {SPLIT} whose type is not {CHAT}, expected some")
    return rows


def turns_of(row: Mapping[str, Any]) -> tuple[list[Turn], list[int]]:
    """The turns of a raw row, and the places of messages that are in none: a question whose answer does not follow,
    an answer without a question, an unknown speaker."""
    messages, turns, alone = row["conversations"], [], []
    for place, message in enumerate(messages):
        answer = messages[place + 1] if place + 1 < len(messages) else {}
        if message["from"] == "human" and answer.get("from") == "gpt":
            turns.append(_turn(place // 2 + 1, message, answer))
        elif not (message["from"] == "gpt" and place and messages[place - 1]["from"] == "human"):
            alone.append(place)
    return turns, alone


def _turn(number: int, question: Mapping[str, Any], answer: Mapping[str, Any]) -> Turn:
    listed = answer.get("candidate_videos")
    listed = tuple(each for each in listed if isinstance(each, str)) if isinstance(listed, list) else ()
    truth = answer.get("video_id")
    return Turn(
        number, question["value"], answer["value"], truth if isinstance(truth, str) else "", listed, answer.get("gt_se")
    )


def turn_id(dialogue: str, number: int) -> str:
    """How a turn is named in reports."""
    return f"{dialogue} turn {number}"


def read_list(path: str) -> list[Any]:
    """The items of a JSON file that is one list. Raises FileNotFoundError, or ValueError where it is something else."""
    with open(path, encoding="utf-8-sig") as file:
        try:
            values = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path}: found what is no JSON ({error})") from None
    if not isinstance(values, list):
        raise ValueError(f"{path}: found {short(values)}, expected a list")
    return values


def short(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
