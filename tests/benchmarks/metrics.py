"""Scoring a large result file: `python -m tests.benchmarks.metrics [--predictions=200000]`.

A made-up IVCR-200K.json of test dialogues of three turns, its samples, and a perfect result file; each mode of
`ivcr_jax.metrics.official` in a process of its own, reading the files included. Prints one JSON object.
"""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from ivcr_jax.metrics import published, raw

FLAGS = flags.FLAGS
TURNS = 3


def dialogue(number: int) -> dict[str, object]:
    """A search, a moment in what was found, another search; every other one in Chinese."""
    messages: list[dict[str, object]] = []
    for turn in range(TURNS):
        listed = [f"Corpus/video_{(number + turn * 7 + place) % 12000:05d}.mp4" for place in range(10)]
        place = (number + turn) % 10
        start = float(number % 60 + turn)
        gt_se = [start, start + 7.5] if turn == 1 else [-1, -1]
        when = f" at {start}s-{start + 7.5}s" if turn == 1 else ""
        wording = "与提问相符的是 video {}{}。" if number % 2 else "The given query happens in video {}{}. It fits."
        answer = {"from": "gpt", "value": wording.format(place + 1, when), "video_id": listed[place], "gt_se": gt_se}
        asked = f"Which shows event {number} of {turn}, or one much like it, seen from the side?"
        messages += [{"from": "human", "value": asked, "text_id": number}, answer | {"candidate_videos": listed}]
    return {"split": "test", "type": [1 + number % 6], "conversations": messages}


def make(paths: dict[str, str], predictions: int) -> None:
    """Writes the three files."""
    published.write_json(paths["raw"], [dialogue(number) for number in range(-(-predictions // TURNS))])
    samples, _ = published.convert(raw.read_rows(paths["raw"]))
    published.write_json(paths["dialogues"], [sample.messages for sample in samples])
    published.write_predictions(paths["predictions"], samples, [sample.messages[-1]["content"] for sample in samples])


def measure(arguments: list[str]) -> dict[str, object]:
    """Seconds of the wall and of processors, the peak of memory in MB, and R@1, of one run of the command."""
    begun = time.perf_counter()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen([sys.executable, "-m", "ivcr_jax.metrics.official", *arguments], stdout=out)
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{arguments}: failed")
        wall = time.perf_counter() - begun
        out.seek(0)
        found = json.loads(out.read().splitlines()[-1])
    return {
        "seconds": round(wall, 1),
        "core_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_mb": round(used.ru_maxrss / 1024),
        "r1": found["overall"]["r1"],
    }


def main(argv: list[str]) -> None:
    """Prints what was measured."""
    del argv
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: f"{folder}/{name}.json" for name in ("predictions", "dialogues", "raw")}
        # In a process of its own: a child's peak is never under what its parent holds.
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(paths, FLAGS.predictions))
        maker.start()
        maker.join()
        arguments = [f"--{name}={path}" for name, path in paths.items()]
        found = {
            "predictions": FLAGS.predictions,
            "mb": {name: round(os.path.getsize(path) / 1e6) for name, path in paths.items()},
            "corrected": measure(arguments),
            "as published": measure([*arguments, "--as_published"]),
        }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    flags.DEFINE_integer("predictions", 200_000, "How many, or up to two more.", lower_bound=1)
    app.run(main)
