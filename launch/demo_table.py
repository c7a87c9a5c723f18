"""The table that a demo ends with: figures with and without training, and the time of each stage."""

import dataclasses
import json
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ivcr_jax.data.dialogue import LANGUAGES

# What figures of videos that were trained on, with the words they are asked for by, are worth.
LEARNT = (
    "These videos are asked for with the captions and moments they were trained on, from other frames. This shows that "
    "the models can learn real footage, not that they know any other."
)
# What the table at the end shows: of which protocol, which metric, its factor.
TABLE = {
    "Retriever R@10, %": ("e2e", "retrieval_r10", 100),
    "Rank R@1, %": ("gold", "retrieval_r1", 100),
    "Moment R@1, IoU 0.5, %": ("gold", "moment_r1_iou_0.5", 100),
    "BLEU-4": ("gold", "bleu", 1),
    "End to end R@1, %": ("e2e", "retrieval_r1", 100),
}


def table(out: pathlib.Path, seconds: Mapping[str, float]) -> str:
    """What came of a demo in a folder, for the terminal. `seconds`: of each stage, by what it did."""
    after, before = (_protocols(out / name) for name in ("evaluation", "untrained"))
    lines = [
        f"{'':26}{'untrained':^21}   {'trained':^21}  {'95 % interval':16}{'n':>5}",
        f"{'':26}{'':5}{'en':>8}{'zh':>8}   {'':5}{'en':>8}{'zh':>8}",
    ]
    for label, (protocol, metric, factor) in TABLE.items():
        lines.append(_line(label, _row(before[protocol], metric, factor), _row(after[protocol], metric, factor)))
    if (out / "own").exists():
        own = _protocols(out / "own")["gold"]
        lines += ["", "Your videos:"]
        for label, metric in (
            ("R@1 of all of them, %", "retrieval_r1"),
            ("Moment R@1, IoU 0.5, %", "moment_r1_iou_0.5"),
        ):
            lines.append(_line(label, Row(), _row(own, metric, 100)))
        lines += textwrap.wrap(LEARNT, 96)
    lines += ["", *(f"{what:45}{took:>6.0f} s" for what, took in seconds.items())]
    lines.append(f"{'in all, without installing':45}{sum(seconds.values()):>6.0f} s")
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Row:
    """A figure as it is shown: over all, its interval, in each language, and how many it is over."""

    overall: str = ""
    interval: str = ""
    languages: Sequence[str] = ("", "")
    count: str = ""


def _line(label: str, before: Row, after: Row) -> str:
    each = "   ".join(
        f"{row.overall:>5}" + "".join(f"{value:>8}" for value in row.languages) for row in (before, after)
    )
    return f"{label:26}{each}  {after.interval:16}{after.count:>5}".rstrip()


def _protocols(folder: pathlib.Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))["protocols"]


def _row(summary: Mapping[str, Any], metric: str, factor: float) -> Row:
    """Of BLEU there is one a language, and none of both."""
    overall, languages = summary["overall"], summary["by"]["language"]
    if metric == "bleu":
        whole, each = None, [overall.get(f"bleu_{language}") for language in LANGUAGES]
    else:
        whole, each = overall.get(metric), [languages.get(language, {}).get(metric) for language in LANGUAGES]
    shown = ["" if cell is None else f"{cell['value'] * factor:.1f}" for cell in (whole, *each)]
    between = (
        f"{whole['low'] * factor:.1f} to {whole['high'] * factor:.1f}" if whole and whole["low"] is not None else ""
    )
    return Row(shown[0], between, shown[1:], str(sum(cell["n"] for cell in each if cell)))
