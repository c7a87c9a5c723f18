"""Benchmarks of the data part: `python -m tests.benchmarks.data [--only=NAME] [--work=DIR]`. Prints one line of JSON.

Every speed is a ratio to a peer measured in the same run, in turn with it; peaks of memory are of child processes.
README.md beside this file says what each measures and what was found.
"""

import concurrent.futures
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import av
import numpy as np
from absl import app, flags

from ivcr_jax.data import batches, packing, pipeline, synth
from ivcr_jax.data.encoding import EncodingConfig
from ivcr_jax.data.store import DialogueStore, VideoStore
from ivcr_jax.data.tokenizer import Tokenizer, train_demo
from tests.data import sources
from tfds_builder.build import build
from tfds_builder.ivcr200k_videos.ivcr200k_videos_dataset_builder import VideosConfig

FLAGS = flags.FLAGS
NAMES = ("dialogues", "packing", "videos", "reading")
flags.DEFINE_multi_enum("only", [], NAMES, "Which to run; all by default.")
flags.DEFINE_string("work", None, "Folder for sources and datasets, used again by a later run; temporary by default.")

INTERACTIONS = 193_434  # of IVCR-200K
CORPUS = 10_000
ROUNDS = 5
REALDATA = pathlib.Path(__file__).resolve().parents[3] / "shared" / "realdata"
THREADS = 2


def in_child(code: str) -> dict[str, float]:
    """Runs code in a process of its own: wall seconds and peak memory in MB, and what it prints as JSON."""
    tail = "\nimport resource\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_rss_mb": round(float(done.stdout.splitlines()[-1])),
    }


def in_turn(ours: Callable[[], object], peer: Callable[[], object]) -> dict[str, object]:
    """Times both in turn: of rounds, peer seconds / our seconds (over 1: we are faster), median, smallest, largest."""
    ours(), peer()  # warm caches and code
    times = {"ours": [], "peer": []}
    for _ in range(ROUNDS):
        for name, function in (("ours", ours), ("peer", peer)):
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    ratios = sorted(peer / own for own, peer in zip(times["ours"], times["peer"], strict=True))
    return {
        "ratio": [round(ratio, 2) for ratio in (ratios[ROUNDS // 2], ratios[0], ratios[-1])],
        "ours_seconds": round(sorted(times["ours"])[ROUNDS // 2], 2),
        "peer_seconds": round(sorted(times["peer"])[ROUNDS // 2], 2),
    }


def _big_source(work: pathlib.Path) -> pathlib.Path:
    folder = work / "big"
    if not (folder / "IVCR-200K.json").exists():
        synth.generate(folder, videos=CORPUS, interactions=INTERACTIONS, render=False)
    return folder


def bench_dialogues(work: pathlib.Path) -> dict[str, object]:
    """The dialogues of a source of IVCR-200K's size, from JSON to ArrayRecord."""
    source = _big_source(work)
    data = work / "big_data"
    if data.exists():
        shutil.rmtree(data)
    code = (
        f"from tfds_builder.build import build\nbuild('ivcr200k', manual_dir={str(source)!r}, data_dir={str(data)!r})"
    )
    size = (source / "IVCR-200K.json").stat().st_size / 2**20
    return {"interactions": INTERACTIONS, "json_mb": round(size), **in_child(code)}


def bench_packing(work: pathlib.Path) -> dict[str, object]:
    """Positions that hold nothing, on the source of IVCR-200K's size, at the published sizes."""
    source = _big_source(work)
    data = work / "big_data"
    if not data.exists():
        build("ivcr200k", manual_dir=source, data_dir=data)
    features = work / "big_features"
    truth = [json.loads(line) for line in (source / "truth.jsonl").read_text().splitlines()]
    if not features.exists():  # 64 frames a video, of the true durations; what they show does not matter here
        times = np.arange(64, dtype=np.float32)
        nothing = np.zeros((64, 1), np.float16)
        videos = ((row["video"].rsplit(".", 1)[0], row["duration"], times, nothing) for row in truth)
        sources.write_features(features, videos, shape=(1,), dtype=np.float16, fingerprint="nothing")
    dialogues, videos = DialogueStore(data, "train"), VideoStore(features)
    tokenizer = _tokenizer(dialogues, 8000)
    found = {}
    for layout in ("isolated", "inline"):
        for seq_len in (2048, 4096, 8192):
            config = batches.PackConfig(
                EncodingConfig(layout=layout), seq_len=seq_len, video_slots=seq_len // 64, max_turns=seq_len // 128
            )
            start = time.perf_counter()
            plan = packing.make_plan(dialogues, videos, tokenizer, config, keep_chat=True, seed=0, threads=THREADS)
            report = plan.report(seq_len)
            found[f"{layout}_{seq_len}"] = {
                "wasted": round(report["wasted"], 4),
                "rows": report["rows"],
                "dialogues": report["dialogues"],
                "lost": report["lost"],
                "seconds": round(time.perf_counter() - start, 1),
            }
    return found


def _tokenizer(dialogues: DialogueStore, vocab_size: int) -> Tokenizer:
    some = range(min(len(dialogues), 2000))
    texts = [text for i in some for turn in dialogues[i].turns for text in (turn.user, turn.answer)]
    wording = "[INST] <<SYS>> <</SYS>> [/INST] Candidate videos : Current video : The video contains frames sampled at"
    return train_demo([*texts, *[wording] * 100], vocab_size)


def _long_source(work: pathlib.Path) -> pathlib.Path:
    """Videos like real ones: 30 s, 25 frames a second, 320 x 240."""
    folder = work / "long"
    if not (folder / "IVCR-200K.json").exists():
        synth.generate(folder, videos=32, interactions=96, size=(320, 240), fps=25, seconds=30.0)
    return folder


def _tree(work: pathlib.Path, name: str, files: list[pathlib.Path], copies: int) -> pathlib.Path:
    """A source whose videos are `copies` links to each file."""
    for file in files:
        for copy in range(copies):
            link = work / name / "videos" / f"copy{copy}" / file.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(file.resolve())
    return work / name


def bench_videos(work: pathlib.Path) -> dict[str, object]:
    """Building 64 frames of 224 x 224 a video, against PyAV decoding the same frames and throwing them away."""
    drawn = sorted((_long_source(work) / "videos").rglob("*.*"))
    found: dict[str, object] = {"threads": THREADS, "synthetic": _build_against_decode(work, "drawn", drawn, 4)}
    if REALDATA.is_dir():
        real = sorted(path for path in (REALDATA / "clips").iterdir() if path.is_file())
        found["real"] = _build_against_decode(work, "real", real, 4)
    peaks = {}
    for copies in (1, 8):
        tree = _tree(work, f"memory{copies}", drawn, copies)
        code = (
            "from tfds_builder.build import build\n"
            f"build('ivcr200k_videos', manual_dir={str(tree)!r}, data_dir={tempfile.mkdtemp(dir=work)!r})"
        )
        peaks[f"{copies * len(drawn)} videos"] = in_child(code)["peak_rss_mb"]
    return {**found, "peak_rss_mb": peaks}


def _build_against_decode(work: pathlib.Path, name: str, files: list[pathlib.Path], copies: int) -> dict[str, object]:
    tree = _tree(work, name, files, copies)
    every = [str(file) for file in files] * copies

    def ours() -> None:
        build("ivcr200k_videos", manual_dir=tree, data_dir=tempfile.mkdtemp(dir=work))

    def peer() -> None:
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(decode_and_throw_away, every))

    return {"clips": len(every), **in_turn(ours, peer)}


def decode_and_throw_away(path: str, frames: int = 64) -> None:
    """The peer: decodes a file up to its last sampled frame, with one thread, and keeps nothing."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        end = float(container.duration / av.time_base)
        last = end * (1 - 0.5 / frames)
        for frame in container.decode(stream):
            if frame.time is not None and frame.time >= last:
                return


def bench_reading(work: pathlib.Path) -> dict[str, object]:
    """Dialogues a second: packed batches from the stores, against decoding the videos of each dialogue with PyAV."""
    source = _long_source(work)
    data = work / "long_data"
    build("ivcr200k", manual_dir=source, data_dir=data)
    build("ivcr200k_videos", manual_dir=source, data_dir=data, config=VideosConfig(frames=64, size=224))
    dialogues, videos = DialogueStore(data / "ivcr200k", "train"), VideoStore(data / "ivcr200k_videos")
    pack = batches.PackConfig(seq_len=4096, video_slots=32, max_turns=24, frames=64)
    config = pipeline.PipelineConfig(pack=pack, batch_size=1, train=False, threads=THREADS, prefetch=1)
    stream = pipeline.Pipeline(dialogues, videos, _tokenizer(dialogues, 1000), config)
    kept = {record for record, _ in stream.plan.items.tolist()}
    paths = {p.relative_to(source / "videos").with_suffix("").as_posix(): p for p in (source / "videos").rglob("*.*")}
    some = sorted(kept)[:4]

    def ours() -> None:
        for _ in stream:
            pass

    def peer() -> None:
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            for record in some:
                list(pool.map(lambda name: decode_to_array(str(paths[name])), dialogues[record].videos))

    found = in_turn(ours, peer)
    # Both in dialogues a second: the peer reads a few, we read all.
    scale = len(kept) / len(some)
    found["ratio"] = [round(ratio * scale, 2) for ratio in found["ratio"]]
    return {"dialogues": len(kept), "peer_dialogues": len(some), "rows": len(stream.plan), **found}


def decode_to_array(path: str, frames: int = 64, size: int = 224) -> np.ndarray:
    """The peer: the usual loop, u8[T, H, W, 3] of evenly spaced frames, one thread."""
    taken = []
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        end = float(container.duration / av.time_base)
        wanted = (np.arange(frames) + 0.5) * end / frames
        for frame in container.decode(stream):
            if frame.time is not None and len(taken) < frames and frame.time >= wanted[len(taken)]:
                taken.append(frame.to_ndarray(format="rgb24", width=size, height=size))
    return np.stack(taken)


def main(argv: list[str]) -> None:
    del argv
    names = FLAGS.only or NAMES
    with tempfile.TemporaryDirectory() as temporary:
        work = pathlib.Path(FLAGS.work or temporary)
        work.mkdir(parents=True, exist_ok=True)
        results = {name: globals()[f"bench_{name}"](work) for name in names}
    machine = {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine(), "av": av.__version__}
    print(json.dumps({"machine": machine, **results}))


if __name__ == "__main__":
    app.run(main)
