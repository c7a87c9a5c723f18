"""Pods of real processes: killed, stopped, restarted, and none left behind."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from ivcr_jax.config import to_dict
from ivcr_jax.losses import LossConfig
from launch.local_pod import Kill
from tests.training.conftest import STEPS, steps_of, told

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Writes its process id, and behaves as its flags and place say.
CHILD = """
import os, signal, sys, time
flags = dict(arg.removeprefix("--").split("=", 1) for arg in sys.argv[1:])
me = flags["process_id"]
open(f"{flags['folder']}/{me}.pids", "a").write(f"{os.getpid()}\\n")
assert "host_platform_device_count=3" in os.environ["XLA_FLAGS"], os.environ["XLA_FLAGS"]
def saved(*_):
    time.sleep(0.3)
    open(f"{flags['folder']}/{me}.saved", "w")
    sys.exit(0)
if flags.get("saves"):
    signal.signal(signal.SIGTERM, saved)
for step in range(1, int(flags["steps"]) + 1):
    print(f"step {step}/9  loss", flush=True)
    time.sleep(0.1)
if flags.get("fails") == me:
    sys.exit("child: a bad value")
time.sleep(float(flags.get("more", 0)))
"""


def pod(*flags, child=(), processes=3):
    """Starts a pod, of CHILD where `child` has its flags."""
    command = [sys.executable, "-c", CHILD, *child] if child else []
    return subprocess.Popen(
        [sys.executable, "-m", "launch.local_pod", f"--processes={processes}", *flags, "--", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process, status):
    """What it printed, and what it said, until it ended with that status."""
    out, said = process.communicate(timeout=120)
    assert process.returncode == status, out + said
    return out, said


def pids(folder):
    """Of all processes that the pods started, by place; each list in order of the starts."""
    found = {path.stem: [int(line) for line in path.read_text().split()] for path in folder.glob("*.pids")}
    return dict(sorted(found.items()))


def alive(pid):
    try:
        return "State:\tZ" not in pathlib.Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def wait_until(true):
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_all_processes_are_one_job_and_each_has_a_log(tmp_path):
    flags = ("--devices=3", f"--logs={tmp_path}/logs")
    out, _ = finish(pod(*flags, child=[f"--folder={tmp_path}", "--steps=2"]), 0)
    assert out == "step 1/9  loss\nstep 2/9  loss\n"
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {f"process-{n}.log" for n in range(3)}
    assert (tmp_path / "logs" / "process-2.log").read_text() == out
    assert [len(found) for found in pids(tmp_path).values()] == [1, 1, 1]


def test_what_the_first_says_while_others_are_still_started_is_shown_and_what_a_log_held_before_is_not(tmp_path):
    (tmp_path / "process-0.log").write_text("step 7/9  of a run before\n")
    flags = ("--devices=1", "--kill=0@5", f"--logs={tmp_path}")
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.local_pod", "--processes=30", *flags, "--", "sh", "-c", "echo step 1/9"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, said = finish(process, 0)
    assert out == "step 1/9\n" and "all ended before process 0 was to be killed" in said
    assert (tmp_path / "process-0.log").read_text() == "step 7/9  of a run before\nstep 1/9\n"


def test_a_killed_process_takes_the_others_along_and_all_start_again(tmp_path):
    child = [f"--folder={tmp_path}", "--steps=4"]
    _, said = finish(pod("--devices=3", "--kill=1@2", "--restarts=2", f"--logs={tmp_path}", child=child), 0)
    assert "process 1 was killed by SIGKILL" in said and "start 2 of 3" in said
    assert [len(found) for found in pids(tmp_path).values()] == [2, 2, 2]
    # It was killed after the second step was told of, and the others before they came to their last.
    lines = (tmp_path / "process-0.log").read_text().splitlines()
    first = lines[: lines.index("step 1/9  loss", 1)]
    assert 2 <= len(first) < 4


def test_a_pod_that_dies_more_often_than_it_may_ends_with_the_status_of_the_first_dead(tmp_path):
    child = [f"--folder={tmp_path}", "--steps=1", "--fails=2", "--more=60"]
    begun = time.monotonic()
    _, said = finish(pod("--devices=3", "--restarts=1", f"--logs={tmp_path}", child=child), 1)
    assert time.monotonic() - begun < 30
    assert "process 2 ended with status 1" in said and "after 2 starts" in said
    assert "child: a bad value" in (tmp_path / "process-2.log").read_text()
    _, said = finish(
        pod("--devices=3", "--kill=0@0.5s", f"--logs={tmp_path}/killed", child=[f"--folder={tmp_path}", "--steps=50"]),
        128 + signal.SIGKILL,
    )
    assert not any(alive(pid) for found in pids(tmp_path).values() for pid in found)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_the_run_save_and_leaves_no_process(tmp_path, number):
    child = [f"--folder={tmp_path}", "--steps=1", "--saves=yes", "--more=60"]
    process = pod("--devices=3", "--restarts=5", f"--logs={tmp_path}", child=child)
    wait_until(lambda: all((tmp_path / f"process-{n}.log").exists() for n in range(3)))
    wait_until(lambda: all("step 1" in (tmp_path / f"process-{n}.log").read_text() for n in range(3)))
    process.send_signal(number)
    finish(process, 128 + number)
    assert len(list(tmp_path.glob("*.saved"))) == 3
    assert [len(found) for found in pids(tmp_path).values()] == [1, 1, 1]
    assert not any(alive(pid) for found in pids(tmp_path).values() for pid in found)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot tell a process that its parent is gone")
def test_no_process_outlives_a_pod_that_is_killed_itself(tmp_path):
    process = pod("--devices=3", f"--logs={tmp_path}", child=[f"--folder={tmp_path}", "--steps=1", "--more=60"])
    wait_until(lambda: len(pids(tmp_path)) == 3 and all(pids(tmp_path).values()))
    process.kill()
    finish(process, -signal.SIGKILL)
    wait_until(lambda: not any(alive(pid) for found in pids(tmp_path).values() for pid in found))


def test_what_a_dry_run_prints_does_the_same_in_a_shell(tmp_path):
    child = [f"--folder={tmp_path}", "--steps=1", "--odd=a b\"'$HOME"]
    out, _ = finish(pod("--devices=3", f"--logs={tmp_path}/the logs", "--dry_run", child=child), 0)
    assert not (tmp_path / "the logs").exists()
    subprocess.run(["bash", "-c", out], check=True, timeout=60)
    assert len(pids(tmp_path)) == 3
    assert (tmp_path / "the logs" / "process-1.log").read_text() == "step 1/9  loss\n"


@pytest.mark.parametrize(
    ("flags", "child", "sentence"),
    [
        (["--devices=1"], (), "the command is missing"),
        (["--devices=1", "--kill=3@1"], ["--x=1"], "process 3; expected one of 0 to 2"),
        (["--devices=1", "--kill=soon"], ["--x=1"], "'soon'; expected PROCESS@STEP"),
        (["--devices=0"], ["--x=1"], "--devices=0"),
        (["--devices=1", "--device=1"], ["--x=1"], "Unknown command line flag 'device'"),
        ([], ["--x=1"], "--devices must have a value"),
    ],
)
def test_wrong_flags_are_refused_before_anything_starts(flags, child, sentence):
    out, said = finish(pod(*flags, child=child), 1)
    assert sentence in said and "logs in" not in said, said


def test_when_to_kill():
    assert Kill.parse("2@5", 3) == Kill(2, 5, None)
    assert Kill.parse("0@1.5s", 3) == Kill(0, None, 1.5)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_pod_with_a_killed_process_goes_on_bit_for_bit(world, tmp_path):
    # The retriever alone compiles fast, which each of the processes does at each start.
    rules = ((r".*\.vit\.(?!head).*", 0.0), (".*", 1.0))
    config = world.config(losses=LossConfig(0, 0, 0, 0, 0, contrastive=1.0), optim={"rules": rules})
    file = tmp_path / "config.py"
    file.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({to_dict(config)!r})\n"
    )

    def train(name, *flags):
        workdir = tmp_path / name
        command = [sys.executable, "-m", "ivcr_jax.train", f"--config={file}", f"--workdir={workdir}"]
        done = subprocess.run(
            [sys.executable, "-m", "launch.local_pod", "--processes=4", "--devices=2", f"--logs={tmp_path}/{name}-logs"]
            + [*flags, "--", *command],
            cwd=ROOT,
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        logs = {path.name: path.read_text()[-3000:] for path in (tmp_path / f"{name}-logs").iterdir()}
        assert done.returncode == 0, f"{done.stderr}\n{logs}"
        return workdir, done.stdout, done.stderr

    undisturbed, _, _ = train("undisturbed")
    killed, out, said = train("killed", "--kill=2@3", "--restarts=1")
    assert "process 2 was killed by SIGKILL" in said
    resumed = re.search(rf"step (\d+) of {STEPS}: resumed from {re.escape(str(killed))}", out)
    assert resumed and int(resumed[1]) in (2, 4), out
    assert len(told(undisturbed)) == STEPS and told(killed) == told(undisturbed)
    assert steps_of(killed) == steps_of(undisturbed) == [2, 4, 6]
