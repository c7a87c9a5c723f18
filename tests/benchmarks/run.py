"""All benchmarks, one after the other: `python -m tests.benchmarks.run [--out=DIR] [--only=data,search] [--work=DIR]`.

Each is a process of its own, whose last line is its JSON. OUT gets results.json (machine, versions, revision, and of
each benchmark its JSON or why there is none), table.md, which is printed too, and what each wrote, NAME.out and
NAME.log. A run that is stopped goes on with those that did not end well before; to measure again, delete OUT. Exit
status 1 where a benchmark fails; a missed bar is told in the table and is no failure. `learning` is not among them: it
trains for half an hour, and what it finds is no speed.

ROWS is where the bars are. Without a folder of real clips (../shared/realdata) theirs is not measured.
"""

import dataclasses
import importlib.metadata
import json
import operator
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from ivcr_jax import command, export
from ivcr_jax.config import listed
from ivcr_jax.data import manifest

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Arguments of Python, run in the repository's root.
BENCHMARKS = {
    "data": ("-m", "tests.benchmarks.data"),
    "convert": ("-m", "tests.benchmarks.convert", "--layers=4"),  # all 32 need 40 GB of disk
    "scheme": ("-m", "tests.benchmarks.scheme"),
    "search": ("-m", "tests.benchmarks.search"),
    "metrics": ("-m", "tests.benchmarks.metrics"),
    "inference": ("-m", "tests.benchmarks.inference"),
}
KEEPING = ("data", "convert")  # those that take --work
PACKAGES = ("jax", "flax", "numpy", "av", "torch", "transformers", "faiss-cpu")
COMPARISONS = {"at least": operator.ge, "at most": operator.le, "under": operator.lt}
GB = 1e9 / 2**20  # in the benchmarks' MB, which are of 2**20 bytes


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
      what: is measured, with its unit.
      at: where it is in the JSON, the benchmark's name and keys, with "/" between: a number, or a median, the smallest
        and the largest, of which the median is held to the bar.
      peer: that a ratio is to; "" where a figure stands alone.
      bar: one of COMPARISONS and a number, or the place of one; None where there is none.
    """

    what: str
    at: str
    peer: str = ""
    bar: tuple[str, float | str] | None = None


LLAMA = "transformers, LlamaForCausalLM"
SCHEME = {
    "items": "(0) the published scheme in our modules",
    "whole": "(1) the whole dialogue in one pass",
    "slots": "(2) and each distinct video encoded once",
    "blocks": "(3) and its block once in the decoder",
    "cached": "(4) and the ViT's features computed before",
}
ROWS = (
    Row("193,434 interactions to ArrayRecord, s", "data/dialogues/seconds", bar=("under", 360)),
    Row("the same, peak of memory, MB", "data/dialogues/peak_rss_mb", bar=("under", 2 * GB)),
    *(
        Row(f"positions that hold nothing, share, {layout}, rows of {length}", f"data/packing/{layout}_{length}/wasted",
            bar=("under", 0.1))
        for length in (4096, 8192)
        for layout in ("isolated", "inline")
    ),
    *(
        Row(f"building videos, {name} clips, times as fast", f"data/videos/{name}/ratio",
            "PyAV decoding the same frames and throwing them away", ("at least", 0.6))
        for name in ("synthetic", "real")
    ),
    *(
        Row(f"building {count}, peak of memory, MB", f"data/videos/peak_rss_mb/{count}", bar=("under", GB))
        for count in ("32 videos", "256 videos")
    ),
    Row("reading packed batches, times as many dialogues a second", "data/reading/ratio",
        "a loop that decodes each dialogue's videos with PyAV", ("at least", 5)),
    Row("converting, 4 decoder layers, peak of memory, GB", "convert/peak_gb", bar=("under", "convert/bound_gb")),
    *(
        Row(f"train step, {what}, cost of a turn", f"scheme/over_peer/{variant}", "the published scheme in PyTorch",
            ("at most", 1 / 3) if variant in ("blocks", "cached") else None)
        for variant, what in SCHEME.items()
    ),
    *(
        Row(f"exact search, {size}, {batch} {'query' if batch == 1 else 'queries'}, times as fast",
            f"search/{size}/{batch}/times as fast", "faiss, IndexFlatIP")
        for size in ("100000 x 512", "1000000 x 256")
        for batch in (1, 64, 256)
    ),
    *(
        Row(f"scoring 200,000 published predictions, {mode}, {what}", f"metrics/{mode}/{key}", bar=("under", bar))
        for mode in ("corrected", "as published")
        for what, key, bar in (("s", "seconds", 60), ("peak of memory, MB", "peak_mb", 2 * GB))
    ),
    *(
        Row(f"the whole report of 200,000 predictions, {what}", f"metrics/report/{key}", bar=("under", bar))
        for what, key, bar in (("s", "seconds", 60), ("peak of memory, MB", "peak_mb", 2 * GB))
    ),
    *(
        Row(f"{what}, {rows}, times as fast, {time_of}", f"inference/{key}/{place}/times as fast, {kind}", LLAMA,
            ("at least", 1))
        for what, key in (("decode", "decode"), ("prefill of 512 tokens", "prefill"))
        for rows, place in (("1 row", "1 rows"), ("8 rows", "8 rows"))
        for time_of, kind in (("wall time", "wall"), ("core-seconds", "core"))
    ),
    *(
        Row(f"turn 7 over turn 2, {width}, {time_of}", f"inference/turns/{width}/turn 7 over turn 2, {kind}", "itself",
            ("at most", 1.3))
        for width in ("width 256", "width 1024")
        for time_of, kind in (("wall time", "wall"), ("core-seconds", "core"))
    ),
    Row("re-ranking ten indexed videos, frames encoded", "inference/rerank/frames", bar=("at most", 0)),
    Row("the same, visual tokens through the decoder, blocks at hand", "inference/rerank/visual tokens, at hand",
        bar=("at most", 0)),
    Row("cold process to the first answer, s", "inference/start/wall seconds", bar=("at most", 10)),
    *(
        Row(f"eight dialogues at once, times as fast, {time_of}", f"inference/batch/times as fast, {kind}",
            "the same one by one")
        for time_of, kind in (("wall time", "wall"), ("core-seconds", "core"))
    ),
)  # fmt: skip


def run(out: pathlib.Path, names: Sequence[str] = tuple(BENCHMARKS), work: pathlib.Path | None = None) -> bool:
    """Runs the named benchmarks that did not end well before, and prints the table. Returns whether all of them did.

    Args:
      out: the folder of what is found, to begin or to go on with.
      names: of BENCHMARKS.
      work: a folder for sources that a later run uses again.

    Raises ValueError where a name is unknown, or `out` has what another machine or revision found; OSError.
    """
    if unknown := [name for name in names if name not in BENCHMARKS]:
        raise ValueError(f"only: found {listed(unknown)}, expected some of {listed(tuple(BENCHMARKS))}")
    out = out.resolve()
    results = begin(out / "results.json")
    if work:
        work.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names, 1):
        if "result" in results["benchmarks"].get(name, ()):
            print(f"{name}: measured before", file=sys.stderr)
            continue
        print(f"{name}: {number} of {len(names)}, writes to {out / name}.log", file=sys.stderr, flush=True)
        results["benchmarks"][name] = found = measure(name, out, work)
        print(f"{name}: {found.get('problem', 'done')}, {found['seconds']:.0f} s", file=sys.stderr, flush=True)
        with manifest.atomic(out / "results.json") as temporary:
            temporary.write_text(json.dumps(results, indent=1))
    shown = table(results)
    with manifest.atomic(out / "table.md") as temporary:
        temporary.write_text(shown)
    print(shown, end="")
    return all("result" in results["benchmarks"][name] for name in names)


def begin(path: pathlib.Path) -> dict[str, Any]:
    """The results that are there, or none yet. Raises ValueError where they are of another machine or revision."""
    here: dict[str, Any] = {"machine": machine(), "versions": versions(), "code": export.revision()}
    if not path.exists():
        return here | {"benchmarks": {}}
    try:
        before = json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path}: found what is no JSON, expected results of benchmarks; delete it") from None
    if not isinstance(before, dict) or not isinstance(before.get("benchmarks"), dict):
        raise ValueError(f"{path}: found another file, expected results of benchmarks")
    if other := [f"{key} {before.get(key)} and not {value}" for key, value in here.items() if before.get(key) != value]:
        raise ValueError(f"{path}: was measured with {listed(other)}; delete its folder, or give another --out")
    return before


def measure(name: str, out: pathlib.Path, work: pathlib.Path | None) -> dict[str, Any]:
    """Runs a benchmark: seconds, exit, and its JSON as result, or the problem and the last lines of stderr."""
    arguments = [sys.executable, *BENCHMARKS[name]]
    if work and name in KEEPING:
        arguments.append(f"--work={work.resolve()}")
    said, log = out / f"{name}.out", out / f"{name}.log"
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with said.open("w") as stdout, log.open("w") as stderr:
        done = subprocess.run(arguments, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
    found = {"seconds": round(time.monotonic() - started, 1), "exit": done.returncode}
    problem = f"ended with {done.returncode}"
    if not done.returncode:
        try:
            result = json.loads(said.read_text(errors="replace").splitlines()[-1])
            if isinstance(result, dict):
                return found | {"result": result}
        except (ValueError, IndexError):
            pass
        problem = "its last line is no JSON object"
    return found | {"problem": problem, "stderr": log.read_text(errors="replace").splitlines()[-20:]}


def machine() -> dict[str, Any]:
    """What speeds depend on."""
    cpus = pathlib.Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
    }


def versions() -> dict[str, str]:
    """Of Python, and of what is measured and measured against."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def at(results: dict[str, Any], place: str) -> Any:
    """What is at a row's place in the results, None where there is nothing."""
    name, *keys = place.split("/")
    found = results["benchmarks"].get(name, {}).get("result")
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def cells(results: dict[str, Any], row: Row) -> tuple[str, str, str, str, str]:
    """Of a row: what, peer, bar, measured, and held, missed or not measured."""
    found = at(results, row.at)
    comparison, limit = row.bar or ("", None)
    if isinstance(limit, str):
        limit = at(results, limit)
    bar = "" if limit is None else f"{comparison} {_number(limit)}"
    if found is None or (row.bar and limit is None):
        return row.what, row.peer, bar, "", "not measured"
    median, *ends = found if isinstance(found, list) else [found]
    measured = _number(median) + (f" ({' to '.join(map(_number, ends))})" if ends else "")
    if limit is None:
        return row.what, row.peer, bar, measured, ""
    return row.what, row.peer, bar, measured, "held" if COMPARISONS[comparison](median, limit) else "**missed**"


def table(results: dict[str, Any]) -> str:
    """In Markdown: the machine, a line for each row, and the benchmarks that failed."""
    about, code = results["machine"], results["code"]
    changed = ", with changes that no revision holds" if code["changed"] else ""
    lines = [
        f"{about['processor']}, {about['cores']} cores, {about['memory_gb']} GB, {about['system']}; "
        + ", ".join(f"{name} {version}" for name, version in results["versions"].items())
        + f"; revision {code['revision'][:12]}{changed}.",
        "",
        "| what | peer | bar | measured: median (smallest to largest) | |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(cells(results, row))} |" for row in ROWS),
    ]
    for name, found in results["benchmarks"].items():
        if "problem" in found:
            last = found["stderr"][-1:] or ["nothing"]
            lines += ["", f"{name} failed: {found['problem']}; the last it said: {last[0]}"]
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main(argv: list[str]) -> None:
    """Runs what is asked."""
    args = flags.FLAGS
    command.refuse_arguments(argv)
    try:
        well = run(pathlib.Path(args.out), args.only, pathlib.Path(args.work) if args.work else None)
    except (ValueError, OSError) as error:
        sys.exit(f"run: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(not well)


if __name__ == "__main__":
    flags.DEFINE_string("out", "build/benchmarks", "The folder of results.json and table.md.")
    flags.DEFINE_list("only", [*BENCHMARKS], "The benchmarks to run.")
    flags.DEFINE_string("work", None, "Folder for sources and datasets, used again by a later run; none by default.")
    app.run(main)
