"""Exports the best run of a sweep, and evaluates it.

    python -m launch.export_best --out=OUT --export=EXPORT [--metric=NAME --mode=max|min]
        [-- --dialogues=DATA/ivcr200k --videos=SOURCE/videos --out=REPORT ...]

OUT is the sweep's folder. What is behind `--` is for `ivcr_jax.evaluate`, which gets --export besides. The same command
goes on where it was stopped. Only runs that are done count.
"""

import json
import pathlib
import shlex
import subprocess
import sys

from absl import app, flags

from ivcr_jax import command
from ivcr_jax.data.manifest import atomic
from launch import manifest, report

FILE = "best.json"  # in the sweep's folder: which run was exported, and where to


def export_best(out: pathlib.Path, export: str, metric: str | None, mode: str | None) -> None:
    """Exports the best run to a new folder; one that it was exported to already is left as it is.

    Raises:
      FileNotFoundError: there is no sweep.
      FileExistsError: something else is at `export`.
      ValueError: as `report.ranked`.
      subprocess.CalledProcessError: the export failed, and has said why.
    """
    held = manifest.read(out)
    found = report.ranked(held, metric, mode)
    best, value = found.best[0]
    record = {"run": best.name, "metric": found.metric, "mode": found.mode, "value": value, "export": export}
    print(f"best of {len(found.best)} runs ({found.mode} of {found.metric}): {best.name}, {value:.5g}", flush=True)
    note = out / FILE
    if pathlib.Path(export).exists():
        if not note.exists() or json.loads(note.read_text()) != record:
            raise FileExistsError(f"--export: {export} is there, and not known to be of {best.name}; expected nothing")
        print(f"{export}: exported before", flush=True)
        return
    with atomic(note) as aside:
        aside.write_text(json.dumps(record, indent=1) + "\n")
    _call("ivcr_jax.export", f"--workdir={held.workdir(best.name)}", f"--out={export}")


def _call(module: str, *args: str) -> None:
    # Each in a process of its own: one after the other they have the devices for themselves.
    line = [sys.executable, "-m", module, *args]
    print(shlex.join(line), flush=True)
    subprocess.run(line, check=True)


def main(argv: list[str]) -> None:
    """Exports and evaluates."""
    args, evaluation = flags.FLAGS, argv[1:]
    command.refuse_arguments([*argv[:1], *(arg for arg in evaluation if not arg.startswith("--"))])
    command.quiet()
    try:
        export_best(pathlib.Path(args.out).resolve(), args.export, args.metric, args.mode)
        if evaluation:
            _call("ivcr_jax.evaluate", f"--export={args.export}", *evaluation)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    except (ValueError, OSError) as error:
        sys.exit(f"export_best: {error}")


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "The folder of the sweep.", required=True)
    flags.DEFINE_string("export", None, "The model folder to write.", required=True)
    report.define_flags()
    app.run(main)
