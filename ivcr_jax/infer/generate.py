"""Dialogues of a file, said to a corpus; what comes of them as JSON lines, for evaluation.

    python -m ivcr_jax.infer.generate --export=EXPORT --corpus=CORPUS --dialogues=FILE.jsonl --out=RESULTS.jsonl

A line of FILE is {"id": ..., "turns": [...]}, a turn what `turn.Message.from_json` reads. RESULTS has a line that says
what it was made from, then one of each dialogue in FILE's order. A run that is stopped, even by `kill -9`, goes on
where it was, and in the end the file is, byte for byte, that of a run that was not. docs/inference.md says more.
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags
from etils import epath
from tqdm import tqdm

from ivcr_jax import bundle, card, command, lines
from ivcr_jax.config import listed
from ivcr_jax.infer import terminal
from ivcr_jax.infer.assistant import Assistant
from ivcr_jax.infer.console import complain, read_file
from ivcr_jax.infer.corpus import Corpus
from ivcr_jax.infer.engine import GREEDY, Sampling
from ivcr_jax.infer.session import Session, say_together
from ivcr_jax.infer.steps import REFUSED
from ivcr_jax.infer.turn import Message
from ivcr_jax.models.layers import Compute, native_dtype

VERSION = 1


@dataclasses.dataclass(frozen=True)
class Script:
    """What is said in a dialogue. Attributes: id: unique in its file. messages: in order. line: of the file, from 1."""

    id: str
    messages: tuple[Message, ...]
    line: int


def read_scripts(data: bytes, file: str) -> list[Script]:
    """The dialogues of a file of JSON lines. Empty lines are skipped.

    Raises ValueError, one sentence with the number of the line, for a line that is none, an id that was there before,
    or no dialogue at all.
    """
    scripts: dict[str, Script] = {}
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            script = _script(line, number)
            if script.id in scripts:
                raise ValueError(f"found the id {script.id!r} of line {scripts[script.id].line} again")
        except ValueError as error:
            raise ValueError(f"{file}: line {number}: {error}") from None
        scripts[script.id] = script
    if not scripts:
        raise ValueError(f"{file}: found no dialogue, expected one a line")
    return [*scripts.values()]


def _script(line: bytes, number: int) -> Script:
    try:
        values = json.loads(line.decode())
    except ValueError as error:
        raise ValueError(f"found what is no JSON ({error}), expected an object with id and turns") from None
    if not isinstance(values, dict) or values.keys() != {"id", "turns"}:
        found = listed(sorted(values)) or "nothing" if isinstance(values, dict) else type(values).__name__
        raise ValueError(f"found {found}, expected an object with id and turns")
    if not isinstance(values["id"], str):
        raise ValueError(f"id: found {values['id']!r}, expected a string")
    if not isinstance(values["turns"], list) or not values["turns"]:
        raise ValueError(f"turns: found {values['turns']!r}, expected a list of at least one")
    messages = []
    for place, value in enumerate(values["turns"], 1):
        try:
            messages.append(Message.from_json(value))
        except ValueError as error:
            raise ValueError(f"turn {place}: {error}") from None
    return Script(values["id"], tuple(messages), number)


def generate(
    export: epath.PathLike,
    corpus: epath.PathLike,
    dialogues: str,
    out: str,
    *,
    candidates: int = 10,
    sampling: Sampling = GREEDY,
    batch: int = 8,
) -> dict[str, str]:
    """Says every dialogue of a file that `out` has not yet, and writes what comes of it.

    Args:
      export, corpus: folders. dialogues: the file. out: the file to write, or to go on with.
      candidates, sampling: as `Session`.
      batch: dialogues at once, at least 1: that many of the file, one after the other, make a group.

    Returns:
      why dialogues failed, by id.

    Raises:
      FileNotFoundError: there is no such export, file of dialogues or folder of `out`.
      CorpusError: there is no corpus, or one of another export.
      ValueError: a line of the dialogues is wrong or names a video that the corpus has not, or `out` holds something
        else, was made from other things, or is being written. Nothing has been changed.
    """
    data = read_file(dialogues, "a file of dialogues")
    scripts = read_scripts(data, dialogues)
    opened = Corpus.open(corpus, bundle.fingerprint(export))
    _check_videos(scripts, opened, dialogues)
    dtype = native_dtype()
    header = {
        "results": VERSION,
        "export": opened.fingerprint,
        "fits": card.threshold(export),  # the fingerprint leaves the card out
        "corpus": opened.digest,
        "dialogues": hashlib.sha256(data).hexdigest(),
        "candidates": candidates,
        **dataclasses.asdict(sampling),
        "batch": batch,
        "dtype": dtype,
    }

    def parse(row: Any, number: int) -> dict[str, Any]:
        expected = scripts[number - 2].id if number - 2 < len(scripts) else None
        if row["id"] != expected:
            raise ValueError(f"found the dialogue {row['id']!r}, expected {expected!r}")
        return row

    with lines.growing(out, header, "results", parse) as (append, rows):
        if len(rows) == len(scripts):
            return _failed(rows)
        assistant = Assistant(export, compute=Compute(dtype=dtype), fingerprint=opened.fingerprint)
        with tqdm(desc="generate", initial=len(rows), total=len(scripts), unit="dialogue") as progress:
            # Whole groups, those begun too: who is beside whom decides the last bits of numbers.
            for first in range(len(rows) // batch * batch, len(scripts), batch):
                group = scripts[first : first + batch]
                sessions = [Session(assistant, opened, candidates=candidates, sampling=sampling) for _ in group]
                for row in _converse(sessions, group)[len(rows) - first :]:
                    append(row)
                    rows.append(row)
                    progress.update()
    return _failed(rows)


def _converse(sessions: Sequence[Session], scripts: Sequence[Script]) -> list[dict[str, Any]]:
    """Dialogues turn by turn, as rows of the results; what is left of one that fails is not said."""
    rows: list[dict[str, Any]] = [{"id": script.id, "turns": []} for script in scripts]
    for number in range(max(len(script.messages) for script in scripts)):
        here = [
            place
            for place, script in enumerate(scripts)
            if number < len(script.messages) and "error" not in rows[place]
        ]
        if not here:
            break
        said = say_together([sessions[i] for i in here], [scripts[i].messages[number] for i in here])
        for place, turn in zip(here, said, strict=True):
            if isinstance(turn, Exception):
                rows[place]["error"] = f"turn {number + 1}: {turn}"
            else:
                rows[place]["turns"].append({k: v for k, v in turn.to_json().items() if k != "timings"})
    return rows


def _check_videos(scripts: Sequence[Script], corpus: Corpus, file: str) -> None:
    known = {video.id for video in corpus.videos}
    for script in scripts:
        for place, message in enumerate(script.messages, 1):
            if unknown := [name for name in message.videos if name not in known]:
                raise ValueError(
                    f"{file}: line {script.line}: turn {place}: found no video {listed(unknown)} in the corpus, "
                    f"expected ids among its {len(known)}"
                )


def _failed(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    return {row["id"]: row["error"] for row in rows if "error" in row}


def main(argv: list[str]) -> None:
    """Says the dialogues, and tells which failed."""
    args = flags.FLAGS
    command.refuse_arguments(argv)
    command.quiet()
    command.keep_programs(args.cache)
    try:
        sampling = Sampling(args.temperature, args.top_p, args.seed)
        failed = generate(
            args.export, args.corpus, args.dialogues, args.out, candidates=args.candidates, sampling=sampling,
            batch=args.batch,
        )  # fmt: skip
    except REFUSED as error:
        sys.exit(f"generate: {terminal.printable(str(error))}")
    except KeyboardInterrupt:
        sys.exit(130)
    for name, reason in failed.items():
        complain(f"{name}: {reason}")
    print(f"{terminal.printable(args.out)}: {len(failed)} dialogues failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    flags.DEFINE_string("export", None, "A model folder with both models.", required=True)
    flags.DEFINE_string("corpus", None, "The folder of a corpus that was made with it.", required=True)
    flags.DEFINE_string("dialogues", None, "The file of dialogues, one a line.", required=True)
    flags.DEFINE_string("out", None, "The file of results to write, or to go on with.", required=True)
    flags.DEFINE_integer("candidates", 10, "Videos that the first stage hands on.", lower_bound=1)
    flags.DEFINE_integer("batch", 8, "Dialogues at once.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.0, "Of the answers' words; 0 is the likeliest word.")
    flags.DEFINE_float("top_p", 1.0, "Share of the likeliest words to choose among.")
    flags.DEFINE_integer("seed", 0, "Of the choice.")
    flags.DEFINE_string("cache", None, "A folder to keep compiled programs in, so that the next start is fast.")
    app.run(main)
