"""What a run tells: lines, files for TensorBoard, a profile, speed by the clock."""

import json
import math
import struct
import subprocess
import sys

import jax.numpy as jnp
import pytest
from tensorboardX.proto import event_pb2

from ivcr_jax import telemetry
from ivcr_jax.telemetry import LogConfig, Telemetry
from tests.training.conftest import lines


class Clock:
    """A time that passes only when told to; the device takes a second for each step."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(telemetry.time, "monotonic", lambda: self.now)
        get = telemetry.jax.device_get
        monkeypatch.setattr(telemetry.jax, "device_get", lambda tree: (self.wait(1.0), get(tree))[1])

    def wait(self, seconds):
        self.now += seconds

    def batches(self, count, wait):
        for _ in range(count):
            self.wait(wait)
            yield {}


def made(workdir, *, step=0, flops=600.0, peak=1000.0, **config):
    return Telemetry(workdir, LogConfig(**config), step=step, steps=10, flops=flops, peak=peak)


def metrics(loss, skipped=0):
    """As a step hands them out."""
    values = {"loss": loss, "lm": loss, "tokens": 50.0, "frames": 6.0, "skipped": float(skipped)}
    return {name: jnp.float32(value) for name, value in values.items()}


def test_numbers_come_one_step_late_and_means_are_over_a_stretch(tmp_path, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    log = made(tmp_path, every=2, tensorboard=False)
    clock.wait(1000)  # getting ready does not count
    stream = log.batches(clock.batches(5, wait=0.5))
    assert log.step(0, (next(stream), metrics(8.0))[1]) is None
    for step in range(1, 5):
        next(stream)
        assert log.step(step, metrics(8.0 - step))["loss"] == 9.0 - step
    assert [row["step"] for row in lines(tmp_path)] == [2, 4]
    assert log.flush()["loss"] == 4.0 and log.flush() is None
    clock.wait(5000)  # validating and saving do not count
    stream = log.batches(clock.batches(9, wait=0.25))
    for step in range(5, 8):
        next(stream)
        log.step(step, metrics(1.0))
    log.close()
    rows = lines(tmp_path)
    assert [row["step"] for row in rows] == [2, 4, 5, 6]
    second = rows[1]
    assert second["loss"] == 5.0 and second["step_seconds"] == pytest.approx(1.5)
    assert second["loader_wait_share"] == pytest.approx(1 / 3)
    assert second["tokens_per_second"] == pytest.approx(50 / 1.5)
    assert second["frames_per_second"] == pytest.approx(6 / 1.5)
    assert second["flops_per_second"] == pytest.approx(400)
    assert second["mfu"] == pytest.approx(0.4)
    assert rows[3]["step_seconds"] == pytest.approx(1.5), "from the first batch of the stretch on"
    shown = capsys.readouterr().out
    assert "step 4/10  loss 5.000  lm 5.000  1500 ms  33 tokens/s  4 frames/s  MFU 40 %  loader 33 %" in shown
    assert "left 00:00:09" in shown


def test_a_number_that_is_none_is_null_and_the_line_is_json(tmp_path):
    log = made(tmp_path, every=1, tensorboard=False, peak=None)
    log.step(0, metrics(math.nan, skipped=1))
    log.flush()
    log.write(1, {"validation/loss": math.inf})
    log.close()

    def refuse(name):
        raise AssertionError(name)

    rows = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] is None and "mfu" not in rows[0] and rows[1]["validation/loss"] is None
    assert rows[0]["memory_bytes"] > 1e6


def test_a_restart_cuts_off_what_is_done_again(tmp_path):
    log = made(tmp_path, every=1, tensorboard=False)
    for step in range(1, 6):
        log.write(step, {"loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    log = made(tmp_path, step=3, every=1, tensorboard=False)
    assert [row["loss"] for row in lines(tmp_path)] == [1, 2, 3]
    log.write(4, {"loss": 44.0})
    log.close()
    assert [row["loss"] for row in lines(tmp_path)] == [1, 2, 3, 44]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def events(folder):
    """What a reader of TensorBoard's files finds: records of a length, its checksum, an event and its checksum."""
    for path in sorted(folder.iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            yield event_pb2.Event.FromString(data[place + 12 : place + 12 + length])
            place += 12 + length + 4


def test_tensorboard_gets_the_same(tmp_path):
    log = made(tmp_path, every=1)
    log.write(1, {"loss": 2.5})
    log.write(2, {"loss": 1.5, "validation/lm": 0.5})
    log.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    path.rename(path.with_name("0"))  # names tell the second, which may be the same; this one is read first
    made(tmp_path, step=1, every=1).close()
    found = [*events(tmp_path / "tensorboard")]
    scalars = [(event.step, value.tag, value.simple_value) for event in found for value in event.summary.value]
    assert scalars == [(1, "loss", 2.5), (2, "loss", 1.5), (2, "validation/lm", 0.5)]
    # What tells a reader to forget the steps that are done again.
    begun = [event.step for event in found if event.session_log.status == event.session_log.START]
    assert begun == [1, 2]


def test_a_profile_of_the_steps_asked_for(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(telemetry.jax.profiler, "start_trace", lambda path: said.append((step, path)))
    monkeypatch.setattr(telemetry.jax.profiler, "stop_trace", lambda: said.append(step))
    for end, expected in ((10, [(3, str(tmp_path / "profile")), 5]), (5, [(3, str(tmp_path / "profile")), 4])):
        said.clear()
        log = made(tmp_path, profile_from=3, profile_steps=2, tensorboard=False)
        for step in range(end):
            log.step(step, metrics(1.0))
        log.close()
        assert said == expected, "a run that ends within the window writes what it has"


@pytest.mark.slow
def test_a_profile_is_written(tmp_path):
    log = made(tmp_path, profile_from=0, profile_steps=1, tensorboard=False)
    for step in range(2):
        log.step(step, metrics(1.0))
    log.close()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_memory_is_this_processs_own():
    """Not its parent's, whose peak a child begins with in getrusage."""
    size = 1_500_000_000  # more than a process takes that imports jax, with whatever plugins are installed
    big = bytearray(size)
    big[::4096] = b"x" * len(big[::4096])
    code = "import jax; from ivcr_jax.telemetry import memory; print(memory())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 50e6 < float(said) < size
    assert telemetry.memory() > size


def test_pytorch_is_not_loaded_with_it():
    """TensorBoard's writer loads it, which takes longer than all else that a command loads."""
    code = "import sys, ivcr_jax.telemetry; print({'tensorboardX', 'torch'} & {*sys.modules})"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"
