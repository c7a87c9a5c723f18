"""A conversation with a corpus, at a terminal or for a program.

    python -m ivcr_jax.chat --export=EXPORT --corpus=CORPUS
    python -m ivcr_jax.chat --export=EXPORT --corpus=CORPUS --script=FILE [--json] [--report=FILE.html]

What is typed is a message to the models, in English or Chinese; a line that begins with a slash is a command, which
/help lists. A script holds such lines, and comments that begin with #. With --json each turn is one object a line on
the standard output, and nothing else is. docs/inference.md says more.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from absl import app, flags
from etils import epath

from ivcr_jax import command
from ivcr_jax.config import listed
from ivcr_jax.infer import report, terminal
from ivcr_jax.infer.assistant import Assistant
from ivcr_jax.infer.console import Console, complain, read_file, refuse_others
from ivcr_jax.infer.corpus import Corpus, CorpusError
from ivcr_jax.infer.engine import GREEDY, Sampling
from ivcr_jax.infer.session import Session
from ivcr_jax.infer.steps import REFUSED
from ivcr_jax.models.layers import Compute, native_dtype

PROMPT = "> "


def run_script(console: Console, lines: Sequence[str], name: str) -> bool:
    """Runs the lines of a script, each printed before as if typed; returns whether none was refused.

    A line that is refused is told with its number, and the next ones run.
    """
    good = True
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        console.tell(PROMPT + line)
        try:
            if not console.run(line):
                break
        except REFUSED as error:
            good = False
            complain(f"{name}: line {number}: {error}")
    return good


def converse(console: Console, read: Callable[[], str]) -> None:
    """Runs lines as they are read, until /quit or EOFError or KeyboardInterrupt from `read`."""
    while True:
        try:
            line = read()
        except (EOFError, KeyboardInterrupt):
            console.tell("")
            return
        try:
            if not console.run(line):
                return
        except KeyboardInterrupt:
            complain("stopped; the conversation is as it was before")
        except REFUSED as error:
            complain(str(error))


def begin(
    export: epath.PathLike,
    corpus: epath.PathLike,
    *,
    source: str | None = None,
    duration: tuple[float, float] = (0.0, np.inf),
    candidates: int = 10,
    sampling: Sampling = GREEDY,
    as_json: bool = False,
    note: str = "",
) -> tuple[Console, int]:
    """Opens a corpus and loads an export.

    Args:
      export, corpus: folders. source, duration: as `Corpus.allowed`. candidates, sampling: as `Session`.
      as_json, note: as `Console`.

    Returns:
      the console, and how many videos may be found.

    Raises:
      CorpusError, FileNotFoundError: there is no corpus, or no export.
      ValueError: no video may be found, the corpus was made with another export, or an argument is out of range.
    """
    opened = Corpus.open(corpus)
    if not opened.videos:
        raise CorpusError(f"{corpus}: found no videos, expected at least one; see python -m ivcr_jax.index")
    sources = sorted({video.source for video in opened.videos})
    if source is not None and source not in sources:
        raise ValueError(f"source: found {source!r}, expected one of {listed([repr(name) for name in sources])}")
    allowed = opened.allowed(source, duration)
    if not allowed.any():
        raise ValueError(f"found no video of {duration[0]:g} to {duration[1]:g} s, expected at least one")
    assistant = Assistant(export, compute=Compute(dtype=native_dtype()))
    session = Session(assistant, opened, candidates=candidates, sampling=sampling, allowed=allowed)
    return Console(assistant, opened, session, as_json=as_json, note=note), int(allowed.sum())


@contextlib.contextmanager
def _history(file: str | None) -> Iterator[None]:
    """Editing of typed lines, and their history in a file where one is named."""
    try:
        import readline
    except ImportError:  # this Python was built without
        yield
        return
    path = os.path.expanduser(file) if file else None
    if path and os.path.exists(path):
        readline.read_history_file(path)
    try:
        yield
    finally:
        if path:
            readline.write_history_file(path)


def main(argv: list[str]) -> None:
    """Runs a script, or what is typed."""
    args = flags.FLAGS
    command.refuse_arguments(argv)
    command.quiet()
    for stream in (sys.stdin, sys.stdout):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr] # they are files here
    command.keep_programs(args.cache)
    typed = args.script is None and sys.stdin.isatty() and not args.json
    good = True
    try:
        lines = []
        if args.script:
            lines = read_file(args.script, "a script").decode("utf-8-sig", errors="replace").splitlines()
        if args.report:
            refuse_others(args.report, report.is_report, "a report")
        if typed:
            print("Reading the models ...", file=sys.stderr)
        duration = (args.min_seconds, np.inf if args.max_seconds is None else args.max_seconds)
        sampling = Sampling(args.temperature, args.top_p, args.seed)
        console, allowed = begin(
            args.export, args.corpus, source=args.source, duration=duration, candidates=args.candidates,
            sampling=sampling, as_json=args.json, note=args.note,
        )  # fmt: skip
        try:
            if args.script:
                good = run_script(console, lines, args.script)
            else:
                if typed:
                    console.greet(allowed)
                with _history(args.history if typed else None):
                    converse(console, lambda: input(PROMPT if typed else ""))
        finally:
            if args.report:
                console.run(f"/report {args.report}")
    except REFUSED as error:
        sys.exit(f"chat: {terminal.printable(str(error))}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    flags.DEFINE_string("export", None, "A model folder with both models.", required=True)
    flags.DEFINE_string("corpus", None, "The folder of a corpus that was made with it.", required=True)
    flags.DEFINE_string("script", None, "A file of lines to run instead of what is typed.")
    flags.DEFINE_bool("json", False, "Prints one JSON object a turn, and nothing else.")
    flags.DEFINE_string("report", None, "The file to write the conversation to at its end, as HTML.")
    flags.DEFINE_string("note", "", "What else the readers of that file should know.")
    flags.DEFINE_integer("candidates", 10, "Videos that the first stage hands on.", lower_bound=1)
    flags.DEFINE_string("source", None, "Finds videos of this source alone.")
    flags.DEFINE_float("min_seconds", 0.0, "Finds videos of at least this length alone.")
    flags.DEFINE_float("max_seconds", None, "Finds videos of at most this length alone.")
    flags.DEFINE_float("temperature", 0.0, "Of the answers' words; 0 is the likeliest word.")
    flags.DEFINE_float("top_p", 1.0, "Share of the likeliest words to choose among.")
    flags.DEFINE_integer("seed", 0, "Of the choice.")
    flags.DEFINE_string("history", None, "A file to keep what was typed in.")
    flags.DEFINE_string("cache", None, "A folder to keep compiled programs in, so that the next start is fast.")
    app.run(main)
