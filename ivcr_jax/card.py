"""The card of an export: what made it, how well it did, and below which score nothing fits.

    card.json     for programs
    README.md     the same for people, rendered from it

It needs the standard library and etils alone, as inference reads it. It is no part of `bundle.fingerprint`.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

CARD, README = "card.json", "README.md"
VERSION = 1


def write(folder: epath.PathLike, card: Mapping[str, Any]) -> None:
    """Writes both files into a folder that nobody reads yet.

    Args:
      folder: to write to.
      card: plain values, as `ivcr_jax.export` gathers them; "version" is added.
    """
    card = {"version": VERSION, **card}
    folder = epath.Path(folder)
    (folder / CARD).write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / README).write_text(render(card), encoding="utf-8")


def step(folder: epath.PathLike) -> int | None:
    """The step of the run that the folder's parameters are of; None where it has no card."""
    path = epath.Path(folder) / CARD
    return json.loads(path.read_text(encoding="utf-8"))["run"]["step"] if path.exists() else None


def threshold(folder: epath.PathLike) -> float | None:
    """The cosine of the first stage below which nothing fits; None where the folder has no card, or its card none.

    Raises ValueError for a card that is not of this version, or a threshold that is no cosine.
    """
    path = epath.Path(folder) / CARD
    if not path.exists():
        return None
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
        version, found = card["version"], card["calibration"]["threshold"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: found no card ({type(error).__name__}: {error}), expected what export wrote"
        ) from None
    if version != VERSION:
        raise ValueError(f"{path}: found version {version!r}, expected {VERSION}")
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float) or not -1 <= found <= 1:
        raise ValueError(f"{path}: calibration.threshold is {found!r}; expected null or a number from -1 to 1")
    return float(found)


def render(card: Mapping[str, Any]) -> str:
    """A card as Markdown."""
    run, data, code, found = (card[part] for part in ("run", "data", "code", "calibration"))
    whole = {name: sum(part[name] for part in card["parameters"].values()) for name in ("count", "trained")}
    began = f"It began with `{run['began_with']}`." if run["began_with"] else "It began with random weights."
    held = "Parameters with one axis (norms, biases, scales) are float32." if card["dtype"] != "float32" else ""
    lora = card["lora"]
    lines = [
        "# Model card",
        "",
        "Interactive video corpus retrieval: a model folder of `ivcr_jax`, written by `python -m ivcr_jax.export`.",
        "`card.json` has the same for programs.",
        "",
        "## Parameters",
        "",
        *_table(
            ("part", "parameters", "trained"),
            [
                *((name, f"{part['count']:,}", f"{part['trained']:,}") for name, part in card["parameters"].items()),
                ("all", f"{whole['count']:,}", f"{whole['trained']:,}"),
            ],
        ),
        "",
        f"They are {card['dtype']}. {held}".rstrip(),
        f"LoRA of rank {lora['rank']} and alpha {lora['alpha']:g} is merged into the matrices."
        if lora
        else "There was no LoRA to merge.",
        "",
        "## Training",
        "",
        f"Step {run['step']:,} of {run['steps']:,}, seed {run['seed']}. {began}",
        "",
        *_table(("loss", "weight"), [(name, f"{weight:g}") for name, weight in run["losses"].items()]),
        "",
        *_table(
            ("data", "name", "what", "fingerprint"),
            [
                (part, data[part]["name"], data[part]["what"] or "not at hand", data[part]["fingerprint"] or "unknown")
                for part in ("dialogues", "videos")
            ],
        ),
        "",
        f"The stream of batches made of them has the fingerprint {data['stream']}.",
        "",
        "## Validation",
        "",
        *_validation(card["validation"]),
        "",
        "## When nothing fits",
        "",
        *_calibration(found),
        "",
        "## Made with",
        "",
        f"Code of revision {code['revision']}{', with changes that no revision holds' if code['changed'] else ''}; "
        + ", ".join(f"{name} {version}" for name, version in card["versions"].items())
        + ".",
        "",
        *_table(("tokenizer", "fingerprint"), card["tokenizers"].items()),
    ]
    return "\n".join(lines) + "\n"


def _validation(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return ["The run wrote no metrics of validation."]
    rows = [(name, _number(value)) for name, value in found["metrics"].items()]
    return [f"After step {found['step']:,}:", "", *_table(("metric", "value"), rows)]


def _calibration(found: Mapping[str, Any]) -> list[str]:
    if found["threshold"] is None:
        return [f"No threshold is stated: {found['why']}. So no search is refused."]
    rows = [
        ("is among them", "wrongly", found["refused_answerable"]),
        ("is there, alone", "wrongly", found["refused_alone"]),
        ("is taken out", "rightly", found["refused_without_truth"]),
        ("is taken out, and what the data list beside it", "rightly", found["refused_without_candidates"]),
    ]
    return [
        f"A search whose best cosine is under {found['threshold']:.4f} finds nothing. {found['rule']}",
        f"Measured with {found['queries']:,} queries among {found['videos']:,} videos of the run's validation split:",
        "",
        *_table(("where the right video", "are refused"), [(a, f"{100 * share:.1f} %, {b}") for a, b, share in rows]),
    ]


def _number(value: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:,.0f}" if value == math.floor(value) and abs(value) >= 2 else f"{value:.4f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
