"""What a run tells: metrics as JSON lines and for TensorBoard, progress on the terminal, a profile when asked for.

Numbers are read from the device one step late, so that it never waits for the host. It knows no model.
"""

import dataclasses
import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath

from ivcr_jax.data.manifest import atomic

METRICS = "metrics.jsonl"
SHOWN = ("loss", "lm", "rank", "moment", "contrastive")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Attributes: every: steps from one line to the next. profile_from, profile_steps: of a profiler window, written
    below WORKDIR/profile; 0 steps for none. tensorboard: whether to write for it."""

    every: int = 50
    profile_from: int = 10
    profile_steps: int = 0
    tensorboard: bool = True


class Telemetry:
    """The log of a run; only the first process writes.

    Args:
      workdir: where to. What an earlier start wrote there of steps past `step`, and will be done again, is cut off.
      config: of the log.
      step: done so far. steps: of the run in all.
      flops: of a step, over all devices; peak: FLOP/s of all devices, or None where it is not known.
    """

    def __init__(
        self, workdir: epath.PathLike, config: LogConfig, *, step: int, steps: int, flops: float, peak: float | None
    ) -> None:
        self._config, self._steps, self._flops, self._peak = config, steps, flops, peak
        self._workdir = epath.Path(workdir)
        self._first = jax.process_index() == 0
        self._board = None
        if self._first:
            path = self._workdir / METRICS
            _cut(path, step)
            self._file = path.open("a")
            if config.tensorboard:
                import tensorboardX  # which loads PyTorch where there is one: seconds, of every command's start

                self._board = tensorboardX.SummaryWriter(str(self._workdir / "tensorboard"), purge_step=step + 1)
        self._late: tuple[int, Mapping[str, jax.Array]] | None = None
        self._profiling = False
        self._begin()

    def _begin(self) -> None:
        """A new stretch of steps to take means over; validating and saving, between stretches, do not count."""
        self._since, self._waited, self._done = time.monotonic(), 0.0, 0
        self._tokens = self._frames = 0.0

    def batches(self, stream: Iterator[Any]) -> Iterator[Any]:
        """The stream, with the time waited for it taken."""
        while True:
            if not self._done and self._late is None:
                self._begin()  # a stretch begins with its first batch, after what was done since the last
            started = time.monotonic()
            try:
                batch = next(stream)
            except StopIteration:
                return
            self._waited += time.monotonic() - started
            yield batch

    def step(self, step: int, metrics: Mapping[str, jax.Array]) -> dict[str, float] | None:
        """Takes a step's metrics, still on the device, and hands out those of the step before, as numbers."""
        self._profile(step)
        before, self._late = self._late, (step, metrics)
        return None if before is None else self._note(*before)

    def flush(self) -> dict[str, float] | None:
        """Hands out the last step's metrics; a new stretch begins."""
        before, self._late = self._late, None
        found = None if before is None else self._note(*before, always=True)
        self._begin()
        return found

    def _note(self, step: int, metrics: Mapping[str, jax.Array], always: bool = False) -> dict[str, float]:
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        self._done += 1
        self._tokens += values["tokens"]
        self._frames += values["frames"]
        if always or (step + 1) % self._config.every == 0:
            seconds = (time.monotonic() - self._since) / self._done
            speed = {
                "step_seconds": seconds,
                "tokens_per_second": self._tokens / seconds / self._done,
                "frames_per_second": self._frames / seconds / self._done,
                "flops_per_second": self._flops / seconds,
                "loader_wait_share": self._waited / seconds / self._done,
                "memory_bytes": memory(),
            }
            if self._peak:
                speed["mfu"] = self._flops / seconds / self._peak
            self.write(step + 1, values | speed)
            self._say(step + 1, values, speed)
            self._begin()
        return values

    def _say(self, step: int, values: Mapping[str, float], speed: Mapping[str, float]) -> None:
        losses = "  ".join(f"{name} {values[name]:.3f}" for name in SHOWN if name in values)
        left = time.strftime("%H:%M:%S", time.gmtime((self._steps - step) * speed["step_seconds"]))
        used = f"  MFU {100 * speed['mfu']:.0f} %" if "mfu" in speed else ""
        skipped = f"  skipped {values['skipped']:.0f}" if values["skipped"] else ""
        self.say(
            f"step {step}/{self._steps}  {losses}  {1000 * speed['step_seconds']:.0f} ms  "
            f"{speed['tokens_per_second']:.0f} tokens/s  {speed['frames_per_second']:.0f} frames/s{used}  "
            f"loader {100 * speed['loader_wait_share']:.0f} %  {speed['memory_bytes'] / 1e9:.1f} GB{skipped}  "
            f"left {left}"
        )

    def say(self, line: str) -> None:
        """A line for the person at the terminal."""
        if self._first:
            print(line, flush=True)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics after `step` steps, to all files. A value that is no number is written as null."""
        if not self._first:
            return
        plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "time": time.time(), **plain}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def _profile(self, step: int) -> None:
        config = self._config
        if not config.profile_steps or not self._first:
            return
        if step == config.profile_from:
            jax.profiler.start_trace(str(self._workdir / "profile"))
            self._profiling = True
        elif step == config.profile_from + config.profile_steps and self._profiling:
            jax.profiler.stop_trace()
            self._profiling = False

    def close(self) -> None:
        """Writes out what is left."""
        if self._profiling:
            jax.profiler.stop_trace()
        if self._first:
            self._file.close()
        if self._board is not None:
            self._board.close()


def rows(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """What a run wrote so far: `step`, `time` (seconds), and metrics by name, None for one that was no number."""
    path = epath.Path(workdir) / METRICS
    text = path.read_text() if path.exists() else ""
    # Of a run that goes on, or was killed, half a last line may be there.
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last_validation(workdir: epath.PathLike, step: int) -> dict[str, Any] | None:
    """The newest metrics of validation that a run wrote up to a step, or None where there are none.

    Returns a dict of `step` and `metrics`, by name; one that was no number is None.
    """
    found, prefix = None, "validation/"
    for row in rows(workdir):
        metrics = {name.removeprefix(prefix): value for name, value in row.items() if name.startswith(prefix)}
        if metrics and row["step"] <= step:
            found = {"step": row["step"], "metrics": metrics}
    return found


def memory() -> float:
    """Bytes: the most that was in use on a device, or, where it does not say (a CPU), by this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return float(stats.get("peak_bytes_in_use", stats["bytes_in_use"]))
    # Not getrusage: a process begins with what its parent had.
    found = re.search(r"VmHWM:\s+(\d+) kB", epath.Path("/proc/self/status").read_text())
    return 1024.0 * int(found.group(1)) if found else math.nan


def _cut(path: epath.Path, step: int) -> None:
    """Keeps of a file of metrics the whole lines up to a step."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        # A process that was killed may have left half a line, always the last.
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    with atomic(path) as aside:
        aside.write_text("".join(kept))
