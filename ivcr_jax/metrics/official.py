"""Scores a published result file, as the released scorer does, or with the same definitions corrected.

    python -m ivcr_jax.metrics.official --predictions=result.json --dialogues=DIALOGUES.json --raw=IVCR-200K.json
        [--as_published]

DIALOGUES is the file of samples the predictions were made for; `ivcr_jax.metrics.published` writes one. Prints tables
in percent, and one JSON object in its last line, with shares. docs/evaluation.md says what is corrected.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from ivcr_jax.config import listed
from ivcr_jax.metrics import as_published, corrected, published, raw
from ivcr_jax.metrics.as_published import KINDS, METRICS

HEADERS = {"r1": "R@1", **{f"r1_iou_{bar}": f"R@1 IoU {bar}" for bar in as_published.IOUS}}
COUNTS = {"all_test_turns": "of all turns of the test dialogues", "scored_turns": "of the turns that are scored"}
WIDTH = 14


def evaluate(predictions: str, dialogues: str, rows: str, *, released: bool = False) -> tuple[str, dict[str, Any]]:
    """Scores files.

    Args:
      predictions, dialogues, rows: result.json, the samples, IVCR-200K.json.
      released: as the released scorer does.

    Returns:
      tables for people, and the same for programs.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file is something else or holds no test split, or samples are of another raw file.
    """
    given, samples, test = (
        published.read_predictions(predictions),
        published.read_samples(dialogues),
        raw.read_rows(rows),
    )
    found = {"predictions": len(given), "samples": len(samples), "dialogues": len(test)}
    if released:
        scores = as_published.score(given, samples, test)
        return _published_table(scores), {"protocol": "published"} | found | dataclasses.asdict(scores)
    try:
        figures = corrected.score(given, samples, test).to_json()
    except ValueError as error:
        raise ValueError(f"{dialogues}: {error}") from None
    return _corrected_tables(figures), {"protocol": "corrected"} | found | figures


def _published_table(scores: as_published.Scores) -> str:
    rows = [("overall", scores.overall, scores.counts)]
    rows += [(f"turn {turn}", figures, scores.turn_counts[turn]) for turn, figures in scores.per_turn.items()]
    lines = ["As the published scorer has it", _line("", [*HEADERS.values(), *KINDS])]
    for name, figures, counts in rows:
        cells = [_percent(figures[metric]) for metric in METRICS]
        lines.append(_line(name, [*cells, *(str(counts.get(kind, "-")) for kind in KINDS)]))
    for number, stop in enumerate(scores.stops):
        then = "" if number else "; it prints nothing from here on"
        lines.append(f"the original stops computing {stop.figures}: {stop.defect} at {stop.where}: {stop.what}{then}")
    return "\n".join(lines)


def _corrected_tables(found: Mapping[str, Any]) -> str:
    lines = []
    rows = [("overall", found["overall"])]
    rows += [(f"turn {turn}", figures) for turn, figures in found["per_turn"].items()]
    for of, title in COUNTS.items():
        lines += [f"Corrected, {title}", _line("", [*HEADERS.values(), *KINDS])]
        for name, figures in rows:
            cells = [_percent(figures[metric][of]["value"]) for metric in METRICS]
            counts = {METRICS[metric]: str(figures[metric][of]["count"]) for metric in METRICS}
            lines.append(_line(name, [*cells, *(counts[kind] for kind in KINDS)]))
        lines.append("")
    for name, problem in found["problems"].items():
        lines.append(f"{name} ({problem['what']}): {problem['count']}, {listed(problem['ids'])}")
    return "\n".join(lines).rstrip()


def _line(name: str, cells: Sequence[str]) -> str:
    return name.ljust(WIDTH) + "".join(cell.rjust(WIDTH) for cell in cells)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f}"


def main(argv: Sequence[str]) -> None:
    """Prints the tables and the JSON object."""
    args = flags.FLAGS
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; options are written --name=value")
    try:
        table, values = evaluate(args.predictions, args.dialogues, args.raw, released=args.as_published)
    except (OSError, ValueError) as error:
        sys.exit(f"official: {error}")
    print(table)
    print(json.dumps(values))


if __name__ == "__main__":
    flags.DEFINE_string("predictions", None, "result.json: a list of user_q and output.", required=True)
    flags.DEFINE_string("dialogues", None, "The file of samples they are for.", required=True)
    flags.DEFINE_string("raw", None, "IVCR-200K.json.", required=True)
    flags.DEFINE_bool("as_published", False, "Every figure as the released scorer has it, defects included.")
    app.run(main)
