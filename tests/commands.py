"""The commands that a page of Markdown shows: found, and read by their own programs without being carried out."""

import ast
import contextlib
import dataclasses
import importlib
import io
import json
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What a reader lacks: in the paragraph above a block, or in the comment behind a command.
MARK = re.compile(r"\bneeds? (?:a TPU|the real data|the published weights|a network)\b")
# Of what no commands are: a page as text, rows, a container's recipe.
OTHER = ("text", "json", "python", "dockerfile")
# What commands of ours import, once for all of them.
COMMON = ("ivcr_jax.training", "ivcr_jax.infer.assistant", "ivcr_jax.data.pipeline", "ml_collections.config_flags",
          "orbax.checkpoint", "tensorflow_datasets", "tfds_builder.resumable")  # fmt: skip
TRAIN = ("python", "-m", "ivcr_jax.train", "--workdir=RUN")


@dataclasses.dataclass(frozen=True)
class Command:
    """One of a page. Attributes: page: below the project's folder. line: its number. text: without comment and prompt,
    on one line. mark: what it needs, in the page's words, if it says so."""

    page: str
    line: int
    text: str
    mark: str = ""

    @property
    def words(self) -> list[str]:
        words = shlex.split(self.text)
        python = ["python"] if words[0] in ("python3", ".venv/bin/python") else words[:1]
        return python + words[1:]

    @property
    def form(self) -> str:
        """The command without its values: "ivcr_jax.export --workdir --out", "make demo VIDEOS"."""
        words = self.words[2:] if self.words[:2] == ["python", "-m"] else self.words
        return " ".join(word.split("=")[0] for word in words)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def commands(page: str, text: str | None = None) -> list[Command]:
    """The commands of every fenced block of a page, in order.

    Where a block has prompts ("$ "), the other lines are what the commands said. A block of no commands says so behind
    its fence (OTHER); of any other block every line is taken for a command.
    """
    lines = ((ROOT / page).read_text(encoding="utf-8") if text is None else text).splitlines()
    found: list[Command] = []
    above: list[str] = []  # the paragraph that is being read
    block: list[tuple[int, str]] | None = None
    kind = ""
    for number, line in enumerate(map(str.strip, lines), 1):
        if line.startswith("```") and block is None:
            block, kind = [], line[3:]
        elif line.startswith("```"):
            if kind not in OTHER:
                found += _commands(page, block, " ".join(above))
            block, above = None, []
        elif block is not None:
            block.append((number, line))
        elif line:
            above = [*above, line] if number > 1 and lines[number - 2].strip() else [line]
    return found


def _commands(page: str, block: Sequence[tuple[int, str]], above: str) -> Iterator[Command]:
    prompts = any(line.startswith("$ ") for _, line in block)
    left = iter(block)
    for number, line in left:
        if prompts and not line.startswith("$ "):
            continue
        line = line.removeprefix("$ ")
        while line.endswith("\\"):
            line = line[:-1].rstrip() + " " + next(left)[1]
        line, _, comment = (part.strip() for part in re.sub(r"(^|  +)#", "\0", line, count=1).partition("\0"))
        line = line.split(" | ")[0]  # of a pipe, what is first
        line = re.sub(r"\[((?:--|[A-Z]+=)[^][]*)\]", r"\1", line)  # what may be left out is given
        line = re.sub(r"(=\w+)(?:\|\w+)+", r"\1", line)  # of alternatives, the first
        if line:
            mark = MARK.search(comment) or MARK.search(above)
            yield Command(page, number, line, mark.group() if mark else "")


def imports(page: str) -> list[str]:
    """What is wrong with the Python of a page: that it does not compile, or imports what there is not."""
    wrong = []
    for code in re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S):
        for node in ast.walk(ast.parse(code, page)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                for name in node.names:
                    try:
                        getattr(module, name.name, None) or importlib.import_module(f"{node.module}.{name.name}")
                    except ImportError:
                        wrong.append(f"{page}: from {node.module} import {name.name}: there is none")
    return wrong


def refusals(of: Sequence[Command]) -> list[str]:
    """What is wrong with commands, by their own programs' flags, files and targets; nothing is carried out."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.commands"],
        input=json.dumps([each.words for each in of]), cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    said = json.loads(run.stdout.splitlines()[-1])
    return [f"{command}: {wrong}" for command, wrong in zip(of, said, strict=True) if wrong]


def wrong_with(words: Sequence[str]) -> str:
    """Why a command cannot be, or nothing. Python's modules read their flags in a process of their own."""
    for word in words:  # also the values of flags, up to a configuration's argument
        path = re.split(r"[:\[]", word.split("=")[-1])[0]
        if re.match(r"(ivcr_jax|configs|launch|tfds_builder|tests)/", path) and not (ROOT / path).exists():
            return f"there is no {path}"
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        names = [word.partition("=") for word in words[1:]]
        lacking = [name for name, given, _ in names if not given and not re.search(rf"^{name}:", makefile, re.M)]
        lacking += [name for name, given, _ in names if given and f"({name})" not in makefile]
        return f"the Makefile knows no {lacking[0]}" if lacking else ""
    if words[0].endswith(".sh"):
        return _wrong_with_script(words)
    if words[:2] != ["python", "-m"]:
        return ""
    reading, writing = os.pipe()
    if not (child := os.fork()):
        try:
            said = _read_flags(words[2:])
        except BaseException:  # whatever it was, nothing of this process may go on here
            said = traceback.format_exc()[-4000:], []
        os.write(writing, json.dumps(said).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        wrong, another = json.loads(file.read())
    os.waitpid(child, 0)
    return wrong or (wrong_with(another) if another else "")


def _wrong_with_script(words: Sequence[str]) -> str:
    end = words.index("--") if "--" in words else len(words)
    code = (ROOT / words[0]).read_text(encoding="utf-8")
    known = shlex.split(code[code.index("\nread_flags ") :].splitlines()[1])[1:4]
    flags = " ".join(known).split()
    wrong = [word for word in words[1:end] if word.split("=")[0].removeprefix("--") not in flags]
    if wrong:
        return f"{wrong[0]}: its flags are {', '.join(flags)}"
    return wrong_with(words[end + 1 :]) if words[end:] else ""


def _read_flags(words: Sequence[str]) -> tuple[str, Sequence[str]]:
    """Runs a module up to where its `main` would begin. Why that cannot be, and a command that it is to start."""
    from absl import app, flags

    found: list[tuple[str, Sequence[str]]] = []

    def run(main, argv=None, flags_parser=app.parse_flags_with_usage):
        rest = flags_parser([*words])[1:]
        of_config = [word for word in rest if word.startswith("--config.")]
        if rest[:2] == ["python", "-m"]:
            found.append(("", rest))
        elif words[0] == "launch.sweep" and flags.FLAGS.config:  # a run's own are read when it begins
            found.append(("", [*TRAIN, f"--config={flags.FLAGS.config}", *of_config]))
        elif words[0] == "launch.export_best" and rest:
            found.append(("", ["python", "-m", "ivcr_jax.evaluate", "--export=EXPORT", *rest]))
        elif rest and "refuse_arguments" in main.__code__.co_names:
            found.append((f"unknown argument {rest[0]!r}", []))
        else:
            found.append(("", []))

    app.run = run
    sys.argv = [*words]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            return f"its flags are refused: {ended} {said.getvalue()[:400]}", []
        except (ImportError, AttributeError) as error:
            return f"{type(error).__name__}: {error}", []
    return found[0] if found else ("it is no program that reads flags with absl", [])


if __name__ == "__main__":
    for name in COMMON:
        importlib.import_module(name)
    print(json.dumps([wrong_with(each) for each in json.load(sys.stdin)]))
