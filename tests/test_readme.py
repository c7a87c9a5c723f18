"""The commands of README.md and docs/: run as written, run by a test that is named here, or marked there and read."""

import os
import re
import shlex
import subprocess
import sys

import pytest

from ivcr_jax.data import synth
from tests.commands import ROOT, commands, imports, refusals
from tests.infer.conftest import WORDS, write_export

DEMO = "tests/launch/test_demo.py::test_the_whole_of_it_in_small"
FULL_SIZE = "tests/test_aot.py::test_the_full_model_trains_on_every_topology_that_has_settings"
# Commands that another test runs, by their form; the rest of README.md is run here or marked in it.
ELSEWHERE = {
    "make demo": DEMO,
    "make demo VIDEOS ANNOTATIONS": DEMO,
    "make test": "tests/test_readme.py::test_every_command_is_run_or_marked",  # it is what runs this
    "make sample": "tests/test_readme.py::test_make_sample_runs_the_same_commands",
    "ivcr_jax.aot --config --topology": FULL_SIZE,
    "ivcr_jax.export --workdir --out": DEMO,
}
README = commands("README.md")
HERE = [each for each in README if not each.mark and each.form not in ELSEWHERE]
PAGES = ["README.md", "CONTRIBUTING.md", "tests/benchmarks/README.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands are run: what README.md calls by a word in capitals lies there under that word."""
    folder = tmp_path_factory.mktemp("readme")
    synth.generate(folder / "SOURCE", videos=10, interactions=30, size=(64, 48), fps=8, seconds=6.0)
    (folder / "VIDEOS").symlink_to("SOURCE/videos")
    export = write_export(folder / "EXPORT")
    (folder / "FOLDER").symlink_to("EXPORT")
    (folder / "LLAMA").symlink_to(export.name)
    return folder


def run(command, folder):
    """A command as it is written, by this Python, with something to say to a conversation."""
    words = command.words
    assert words[0] == "python", f"{command}: no test runs it, and README.md does not say what it needs"
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        input=f"{WORDS[0]}\n",
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-1000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_every_command_is_run_or_marked(folder):
    """In their order, as one leaves what the next one reads. Of those that differ in such a word alone, one."""
    said = {}
    for command in HERE:
        name = re.sub(r"\b[A-Z]{3,}\b", "WORD", command.text)
        if name not in said:
            said[name] = command.form, run(command, folder)
    told = dict(said.values())
    assert '"wasted":' in told["ivcr_jax.data.pipeline --dialogues --videos"]
    assert "turn 0: state" in told["ivcr_jax.data.pipeline --dialogues --videos"]
    assert "nearest frames:" in told["ivcr_jax.chat --export --corpus"]


def test_what_other_tests_run_is_there():
    """Those tests, and the commands; what is marked besides is marked for nothing."""
    for form, node in ELSEWHERE.items():
        assert form in {each.form for each in README}, f"README.md has no {form!r} any more"
        path, _, name = node.partition("::")
        assert f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{form!r}: there is no {node}"
    assert [str(each) for each in README if each.mark and each.form in ELSEWHERE] == []


def test_make_sample_runs_the_same_commands():
    sample = [each.text.removeprefix(".venv/bin/") for each in README if each.text.startswith(".venv/bin/")]
    assert len(sample) == 4
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.findall(r"^\t\$\(BIN\)/(python -m .*data/.*)$", makefile, re.MULTILINE) == sample


STALE = """
```
python -m ivcr_jax.nowhere --out=X
python -m ivcr_jax.export --workdir=RUN --out=X --quantise=4
python -m ivcr_jax.export --out=X
python -m ivcr_jax.export --workdir=RUN --out=X more
python -m ivcr_jax.train --config=configs/tiny.py --workdir=RUN --config.data.words=X
python -m ivcr_jax.train --config=configs/huge.py --workdir=RUN
launch/slurm.sh --job_name=X --nodes=1 --pods=2 -- python -m ivcr_jax.chat
launch/run_tpu.sh --name=X -- python -m ivcr_jax.chat --export=X
python -m launch.local_pod --processes=2 --devices=1 -- python -m ivcr_jax.chat --talk
make demonstration
make demo FILMS=X
python -m ivcr_jax.export --workdir=RUN --out=X
```
"""


@pytest.fixture(scope="module")
def wrong():
    """What is wrong with the commands of all pages, and with those of STALE: as all are read in one process."""
    found = [command for page in PAGES for command in commands(page)]
    assert len(found) > 50
    return refusals([*found, *commands("stale.md", STALE)])


def test_every_command_of_every_page_could_be_given(wrong):
    """Its module, script or target is there, and takes its flags; its files are there, and the fields it sets."""
    assert [each for each in wrong if not each.startswith("stale.md")] == []
    assert [each for page in PAGES for each in imports(page)] == []


def test_a_command_that_is_out_of_date_is_found(wrong):
    stale = [each.partition(": ")[2].partition(": ")[2] for each in wrong if each.startswith("stale.md")]
    expected = ("nowhere", "quantise", "workdir", "'more'", "words", "there is no configs/huge.py", "--pods=2",
                "corpus", "talk", "no demonstration", "no FILMS")  # fmt: skip
    for said, word in zip(stale, expected, strict=True):
        assert word in said


TEXT = """
Here are some.

```
$ python -m a --b=1 \\
    --c      # needs the real data
what it says
$ make d E=f
```

This block needs a TPU,
as it says.

```
.venv/bin/python -m g '#'   # a comment
x [--h=i|j] | k
```
Not this one.

   ```text
   no command
   ```

   ```
   l
   ```
"""


def test_commands_are_found_as_a_reader_finds_them():
    found = commands("page.md", TEXT)
    assert [(each.line, each.text, each.form, each.mark) for each in found] == [
        (5, "python -m a --b=1 --c", "a --b --c", "needs the real data"),
        (8, "make d E=f", "make d E", ""),
        (15, ".venv/bin/python -m g '#'", "g #", "needs a TPU"),
        (16, "x --h=i", "x --h", "needs a TPU"),
        (25, "l", "l", ""),
    ]
    assert shlex.split(found[0].text) == found[0].words
