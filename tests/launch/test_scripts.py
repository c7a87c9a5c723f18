"""The shell scripts, run for real; what stands in for gcloud, sbatch and srun writes down how it was called."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
TOOLS = """
bash env sh dirname sed git awk mktemp mkfifo rm cat sleep hostname flock head tar gzip mkdir touch wc grep
""".split()
ODD = ["python", "-m", "x", "--x=a b\"'", "$HOME `id` $(id)", "", "two\nlines", "*", "\\", "日本 & ; | < >", "--", "!x"]

# gcloud, whose world is a folder: requests are files with their states to come, ssh runs the command in this machine's
# shell once for each worker, in a home of its own. A file `script` says what differs.
GCLOUD = """#!{python} -IS
import json, os, pathlib, subprocess, sys, time
here = pathlib.Path({folder!r})
args = sys.argv[1:]
with open(here / "calls", "a") as file:
    file.write(json.dumps(args) + "\\n")
script = json.loads((here / "script").read_text())
flags = dict(arg[2:].split("=", 1) for arg in args if arg.startswith("--") and "=" in arg)
what, name = args[2:4], args[4]
plain = [arg for arg in args[4:] if not arg.startswith("--")]
request = here / "request"
if what == ["queued-resources", "create"]:
    if request.exists() or script.get("taken"):
        sys.exit("ERROR: ALREADY_EXISTS: " + name)
    request.write_text(json.dumps(script["states"]))
elif what == ["queued-resources", "describe"]:
    if script.get("broken"):
        sys.exit("ERROR: no connection")
    if not request.exists():
        sys.exit("ERROR: NOT_FOUND: " + name)
    states = json.loads(request.read_text())
    print("some warning", file=sys.stderr)
    print(states[0], flush=True)
    print("another warning", file=sys.stderr)
    request.write_text(json.dumps(states[1:] or states))
elif what == ["queued-resources", "delete"]:
    failures = script.get("delete_fails", 0)
    if failures:
        (here / "script").write_text(json.dumps(script | {{"delete_fails": failures - 1}}))
        sys.exit("ERROR: not now")
    request.unlink()
elif what == ["tpu-vm", "scp"]:
    source, target = plain
    if source.startswith("pod:"):
        if script.get("scp_fails"):
            sys.exit("ERROR: lost")
        pathlib.Path(target, "result").write_text("42")
    else:
        for worker in range(script["workers"]):
            home = here / f"home-{{worker}}"
            home.mkdir(exist_ok=True)
            (home / target.split(":", 1)[1]).write_bytes(pathlib.Path(source).read_bytes())
elif what == ["tpu-vm", "ssh"]:
    if flags["command"] == "true":
        sys.exit(0)
    started = []
    for worker in range(script["workers"]):
        home = here / f"home-{{worker}}"
        home.mkdir(exist_ok=True)
        env = os.environ | {{"WORKER": str(worker), "TMPDIR": str(home), "HOME": str(home)}}
        started.append(subprocess.Popen(["bash", "-c", flags["command"]], cwd=home, env=env))
    statuses = [each.wait() for each in started]
    sys.exit(next((status for status in statuses if status), 0) if script.get("tells", True) else 0)
else:
    sys.exit(f"unknown: {{what}}")
"""


class Machine:
    """A folder with stand-ins on a PATH that has nothing but them and the usual tools."""

    def __init__(self, folder):
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool))
        self.script(states=["ACTIVE"], workers=2)

    def script(self, **values):
        (self.folder / "script").write_text(json.dumps(values))

    def put(self, name, text):
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def gcloud(self):
        self.put("gcloud", GCLOUD.format(python=sys.executable, folder=str(self.folder)))

    def checkout(self, *workers):
        """An installed checkout on the workers, as --install would leave it."""
        for worker in workers:
            folder = self.folder / f"home-{worker}" / "ivcr_jax"
            folder.mkdir(parents=True)
            (folder / "launch").symlink_to(LAUNCH)

    def start(self, name, *args, env=None, launch=LAUNCH):
        return subprocess.Popen(
            [str(launch / name), *args],
            cwd=self.folder,
            env={"PATH": str(self.bin), "TMPDIR": str(self.folder), "HOME": str(self.folder)} | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, name, *args, status=0, **more):
        process = self.start(name, *args, **more)
        out, said = process.communicate(timeout=60)
        assert process.returncode == status, f"{process.returncode}\n{out}\n{said}"
        return out, said

    def calls(self, *what):
        """How gcloud was called; those of a kind, or the kinds of all."""
        path = self.folder / "calls"
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [call for call in found if call[2:4] == list(what)] if what else [call[3] for call in found]


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def wait_until(true):
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


TPU = ("--name=pod", "--zone=us-z", "--project=p")
QUEUED = (*TPU, "--accelerator=v5litepod-16", "--runtime=v2-alpha-tpuv5-lite", "--poll=0.05")
SLURM = ("--job_name=ivcr", "--nodes=2", "--gpus_per_node=4")
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh"))
STARTED = {"run_tpu.sh": (TPU, "gcloud"), "queued_resource.sh": (QUEUED, "gcloud"), "slurm.sh": (SLURM, "sbatch")}


def test_shellcheck_finds_nothing():
    tool = pathlib.Path(sys.executable).with_name("shellcheck")
    found = subprocess.run([tool, "-x", *SCRIPTS], cwd=LAUNCH, capture_output=True, text=True)
    assert found.returncode == 0 and len(SCRIPTS) == 6, found.stdout + found.stderr


@pytest.mark.parametrize("name", STARTED)
def test_wrong_flags_are_refused_in_a_sentence_before_anything_starts(machine, name):
    flags, tool = STARTED[name]

    def refused(sentence, *args, status=2):
        _, said = machine.run(name, *args, status=status)
        assert sentence in said and said.count("\n") == 1 and said.startswith(f"{name}: "), said

    for flag in (flag for flag in flags if "poll" not in flag):
        part = flag.split("=")[0]
        refused(f"{part} is missing", *(other for other in flags if other != flag), "--", "true")
        refused(f"{part} is missing", *(other for other in flags if other != flag), f"{part}=", "--", "true")
        refused(f"{part} needs a value", *(other for other in flags if other != flag), part, "--", "true")
    refused("unknown flag --nodse", *flags, "--nodse=3", "--", "true")
    refused("unknown flag '--a b'", *flags, "--a b", "--", "true")
    refused("--dry_run has no value", *flags, "--dry_run=no", "--", "true")
    refused("unknown argument true", *flags, "true")
    refused("the command is missing", *flags)
    refused("the command is missing", *flags, "--")
    refused(f"found no {tool} on PATH", *flags, "--", "true", status=1)
    assert not (machine.folder / "calls").exists()
    # Without the tool what would be run can still be seen, and read about.
    assert tool in machine.run(name, *flags, "--dry_run", "--", "true")[0]
    assert f"launch/{name} --" in machine.run(name, "--help")[0]


@pytest.mark.parametrize(
    ("name", "flag", "sentence"),
    [
        ("run_tpu.sh", "--name=-x", "--name is -x; expected a TPU's name"),
        ("queued_resource.sh", "--name=a b", "--name is 'a b'; expected"),
        ("queued_resource.sh", "--retries=two", "--retries is two; expected a number"),
        ("queued_resource.sh", "--collect=here", "--collect is here; expected FROM:TO"),
        ("slurm.sh", "--job_name=x\n#SBATCH --uid=0", "expected letters"),
        ("slurm.sh", "--nodes=0", "--nodes is 0; expected a number"),
        ("slurm.sh", "--partition=a b", "--partition is 'a b'"),
        ("slurm.sh", "--time=soon", "--time is soon; expected minutes"),
    ],
)
def test_wrong_values_are_refused_by_name(machine, name, flag, sentence):
    assert sentence in machine.run(name, *STARTED[name][0], flag, "--dry_run", "--", "true", status=2)[1]


def words(machine, *args):
    """What a worker got, of a command that writes down its words."""
    seen = machine.folder / "seen"
    recorder = (
        "import json, os, sys; print(json.dumps(sys.argv[1:]), file=open(sys.argv[0] + os.environ['WORKER'], 'w'))"
    )
    (machine.folder / "recorder.py").write_text(recorder.replace("sys.argv[0]", repr(str(seen))))
    return [sys.executable, str(machine.folder / "recorder.py"), *args]


def test_every_worker_gets_the_words_as_they_were(machine):
    machine.gcloud()
    machine.checkout(0, 1)
    command = words(machine, *ODD)
    env = {"JAX_OPTIMIZATION_LEVEL": "O1", "XLA_FLAGS": "--a --b='c d'", "JAX_PLATFORMS": "cpu", "SECRET": "s"}
    out, _ = machine.run("run_tpu.sh", *TPU, "--", *command, env=env)
    for worker in "01":
        assert json.loads((machine.folder / f"seen{worker}").read_text()) == ODD
    (call,) = machine.calls("tpu-vm", "ssh")
    assert {"--zone=us-z", "--project=p", "--worker=all"} <= set(call) and call[4] == "pod"
    sent = shlex.split(call[-1].removeprefix("--command="))
    assert "JAX_OPTIMIZATION_LEVEL=O1" in sent and "XLA_FLAGS=--a --b='c d'" in sent
    assert not any("JAX_PLATFORMS" in word or "SECRET" in word for word in sent)
    assert out.count("ended with status 0") == 2


def test_a_dry_run_pasted_into_a_shell_does_the_same(machine):
    machine.gcloud()
    machine.checkout(0, 1)
    command = words(machine, *ODD)
    out, _ = machine.run("run_tpu.sh", *TPU, "--dry_run", "--", *command)
    assert not machine.calls()
    env = {"PATH": str(machine.bin), "TMPDIR": str(machine.folder)}
    subprocess.run(["bash", "-c", out], env=env, check=True, cwd=machine.folder, timeout=60)
    assert json.loads((machine.folder / "seen1").read_text()) == ODD
    first = machine.calls("tpu-vm", "ssh")
    machine.run("run_tpu.sh", *TPU, "--", *command)
    assert machine.calls("tpu-vm", "ssh") == first * 2


@pytest.mark.parametrize("tells", [True, False])
def test_the_status_is_the_worst_workers(machine, tells):
    machine.gcloud()
    machine.script(workers=3, tells=tells)  # a gcloud that does not tell
    machine.checkout(0, 1, 2)
    out, _ = machine.run("run_tpu.sh", *TPU, "--", "sh", "-c", "exit $((WORKER * 3))", status=6)
    assert [f"ended with status {status}" in out for status in (0, 3, 6)] == [True] * 3


def committed(folder, install):
    """A checkout of the scripts whose installation is this line: what is installed is not what these are about."""
    root = folder / "root"
    shutil.copytree(LAUNCH, root / "launch")
    (root / "launch" / "install_worker.sh").write_text(install)
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b"]
    for line in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *line], check=True)
    return root


def test_the_last_commit_is_installed_and_no_other(machine, tmp_path):
    machine.gcloud()
    root = committed(tmp_path, 'cd "$(dirname "$0")/.." && echo $WORKER >installed\n')
    setup = 'echo "$PWD" >mounted'
    flags = (*TPU, "--install", f"--setup={setup}", "--", "cat", "installed", "mounted")
    out, _ = machine.run("run_tpu.sh", *flags, launch=root / "launch")
    assert {"0", "1", str(tmp_path / "home-0" / "ivcr_jax")} < set(out.splitlines())
    assert [path.name for path in tmp_path.glob("*.tar.gz")] == []
    (root / "launch" / "shell.sh").open("a").write("# changed\n")
    for name, more in (("run_tpu.sh", flags), ("queued_resource.sh", (*QUEUED, "--", "true"))):
        before = len(machine.calls())
        _, said = machine.run(name, *more, launch=root / "launch", status=1)
        assert "not committed" in said and "launch/shell.sh" in said and len(machine.calls()) == before


# A run that saves when it is told to stop, and then ends well.
SAVES = "trap 'touch saved; exit 0' TERM; touch begun; while :; do sleep 0.05; done"


def test_an_interrupt_stops_the_command_on_every_worker(machine):
    machine.gcloud()
    machine.checkout(0, 1)
    process = machine.start("run_tpu.sh", *TPU, "--", "bash", "-c", SAVES)
    homes = [machine.folder / f"home-{worker}" for worker in (0, 1)]
    wait_until(lambda: all((home / "ivcr_jax" / "begun").exists() for home in homes))
    _, said = machine.run("run_tpu.sh", *TPU, "--", "true", status=1)  # one job a TPU
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopping the command on every worker" in said
    assert all((home / "ivcr_jax" / "saved").exists() for home in homes) and out.count("ended with status 143") == 2
    assert not list(machine.folder.glob("tmp.*"))


def stoppable(*args, folder):
    env = os.environ | {"TMPDIR": str(folder)}
    command = [str(LAUNCH / "stoppable.sh"), *args]
    return subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize(
    ("ends", "status"), [("exit 0", 143), ("exit 7", 7), ("sleep 0.4; exit 0", 143), ("sleep 0.4; exit 1", 1)]
)
def test_who_is_told_to_stop_and_ends_well_is_not_done(tmp_path, ends, status):
    process = stoppable("bash", "-c", f"trap '{ends}' TERM; touch begun; while :; do sleep 0.05; done", folder=tmp_path)
    wait_until((tmp_path / "begun").exists)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == status and out.endswith(f"ended with status {status}\n")


def test_one_command_of_a_name_at_a_time(tmp_path):
    assert stoppable("sh", "-c", "exit 5", folder=tmp_path).wait(30) == 5
    first = stoppable("--as=a", "bash", "-c", SAVES, folder=tmp_path)
    wait_until((tmp_path / "begun").exists)
    second = stoppable("--as=a", "true", folder=tmp_path)
    said, _ = second.communicate(timeout=30)
    assert second.returncode == 1 and f"a runs here already, as process {first.pid}" in said
    assert stoppable("--as=b", "true", folder=tmp_path).wait(30) == 0
    assert stoppable("--stop=a", folder=tmp_path).wait(30) == 0
    assert first.wait(30) == 143 and (tmp_path / "saved").exists()
    said, _ = stoppable("--stop=a", folder=tmp_path).communicate(timeout=30)
    assert "nothing runs as a" in said


@pytest.fixture
def queued(machine, tmp_path):
    """queued_resource.sh of a checkout that is committed, whose installation is nothing."""
    machine.gcloud()
    root = committed(tmp_path, "true\n")

    def start(*args, **more):
        return machine.run("queued_resource.sh", *QUEUED, *args, launch=root / "launch", **more)

    start.process = lambda *args: machine.start("queued_resource.sh", *QUEUED, *args, launch=root / "launch")
    return start


def test_a_queued_resource_is_created_awaited_used_collected_and_deleted(machine, queued, tmp_path):
    machine.script(states=["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"], workers=2)
    out, said = queued("--spot", f"--collect=runs/a:{tmp_path}/out", "--", *words(machine, *ODD))
    assert machine.calls() == [
        "describe", "create", *["describe"] * 3, "ssh", "scp", "ssh", "ssh", "scp", "delete"
    ]  # fmt: skip
    assert json.loads((tmp_path / "seen1").read_text()) == ODD
    assert (tmp_path / "out" / "result").read_text() == "42" and not (tmp_path / "request").exists()
    (create,) = machine.calls("queued-resources", "create")
    wanted = {"--node-id=pod", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"}
    assert wanted | {"--zone=us-z", "--project=p", "--async"} <= set(create)
    assert "--worker=0" in machine.calls("tpu-vm", "scp")[1] and "--recurse" in machine.calls("tpu-vm", "scp")[1]
    assert "--force" in machine.calls("queued-resources", "delete")[0]
    assert "pod: WAITING_FOR_RESOURCES" in said and "pod: ACTIVE" in said


def preempted(times):
    """A command of a worker that was taken away so many times, saving each time, and then is done."""
    return ["bash", "-c", f'echo >>"$HOME/starts"; [ $(wc -l <"$HOME/starts") -gt {times} ] || exit 143']


@pytest.mark.parametrize("retries", [2, 3])
def test_preempted_twice_then_done(machine, queued, tmp_path, retries):
    _, said = queued(f"--retries={retries}", f"--collect=a:{tmp_path}/out", "--", *preempted(2))
    assert machine.calls().count("create") == machine.calls().count("delete") == 3
    assert said.count("pod was taken away (status 143, state ACTIVE)") == 2
    assert (tmp_path / "home-1" / "starts").read_text() == "\n" * 3
    assert len(machine.calls("tpu-vm", "scp")) == 3 + 1  # collected once


def test_preempted_more_often_than_it_may_be(machine, queued):
    _, said = queued("--retries=1", "--", *preempted(9), status=143)
    assert machine.calls().count("create") == machine.calls().count("delete") == 2
    assert "taken away 2 times; --retries=1 allows no more" in said


def test_what_the_state_says_counts_where_the_status_says_nothing(machine, queued):
    machine.script(states=["ACTIVE", "SUSPENDED"], workers=2)
    _, said = queued("--retries=1", "--", "sh", "-c", "exit 1", status=1)
    assert machine.calls().count("create") == 2 and "taken away (status 1, state SUSPENDED)" in said


def test_a_command_that_fails_is_not_run_again_and_what_it_wrote_is_collected(machine, queued, tmp_path):
    queued("--retries=3", f"--collect=a:{tmp_path}/out", "--", "sh", "-c", "exit 9", status=9)
    assert machine.calls().count("create") == machine.calls().count("delete") == 1
    assert (tmp_path / "out" / "result").exists()


def test_what_cannot_be_collected_is_said(machine, queued, tmp_path):
    machine.script(states=["ACTIVE"], workers=1, scp_fails=True)
    _, said = queued(f"--collect=a:{tmp_path}/out", "--", "true", status=1)
    assert "a is not collected" in said and machine.calls()[-1] == "delete"


def test_a_request_that_fails_or_is_suspended_ends_before_the_command(machine, queued):
    machine.script(states=["WAITING_FOR_RESOURCES", "FAILED"], workers=2)
    _, said = queued("--retries=3", "--", "true", status=1)
    assert "the request for pod failed" in said and machine.calls()[-1] == "delete"
    assert machine.calls().count("create") == 1
    machine.script(states=["WAITING_FOR_RESOURCES", "SUSPENDED"], workers=2)
    _, said = queued("--retries=2", "--", "true", status=1)
    assert machine.calls().count("create") == 1 + 3 and machine.calls()[-1] == "delete"
    assert not machine.calls("tpu-vm", "ssh")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_while_waiting_deletes_the_request(machine, queued, tmp_path, number, status):
    machine.script(states=["WAITING_FOR_RESOURCES"], workers=2)
    process = queued.process("--poll=60", "--", "true")
    wait_until(lambda: machine.calls()[-2:] == ["create", "describe"])
    time.sleep(0.5)  # it sleeps by now
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == status
    assert machine.calls()[-1] == "delete" and not (tmp_path / "request").exists()


def test_an_interrupt_while_running_lets_the_command_save_and_deletes(machine, queued, tmp_path):
    process = queued.process("--retries=3", "--", "bash", "-c", SAVES)
    homes = [tmp_path / f"home-{worker}" / "ivcr_jax" for worker in (0, 1)]
    wait_until(lambda: all((home / "begun").exists() for home in homes))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130 and all((home / "saved").exists() for home in homes)
    assert machine.calls()[-1] == "delete" and machine.calls().count("create") == 1


def test_somebody_elses_request_is_left_alone(machine, queued, tmp_path):
    (tmp_path / "request").write_text('["ACTIVE"]')
    _, said = queued("--", "true", status=1)
    assert "pod is there already (ACTIVE)" in said and machine.calls() == ["describe"]
    (tmp_path / "request").unlink()
    machine.script(states=["ACTIVE"], workers=1, taken=True)  # between the look and the request
    _, said = queued("--", "true", status=1)
    assert "ALREADY_EXISTS" in said and "delete" not in machine.calls()


def test_a_request_that_cannot_be_deleted_is_tried_again_and_then_told_of(machine, queued):
    machine.script(states=["ACTIVE"], workers=1, delete_fails=1)
    queued("--", "true")
    assert machine.calls().count("delete") == 2
    machine.script(states=["ACTIVE"], workers=1, delete_fails=99)
    _, said = queued("--", "true", status=1)
    assert "pod is not deleted, and costs money: gcloud compute tpus queued-resources delete pod" in said


def test_a_gcloud_that_cannot_tell_is_given_up_before_anything_is_asked_for(machine, queued):
    machine.script(broken=True)
    _, said = queued("--", "true", status=1)
    assert "gcloud cannot tell its state" in said and machine.calls() == ["describe"]


def test_a_dry_run_of_a_queued_resource_is_shell_that_does_the_same(machine, queued, tmp_path):
    machine.script(states=["PROVISIONING", "ACTIVE"], workers=2)
    out, _ = queued(f"--collect=a:{tmp_path}/out", "--retries=2", "--dry_run", "--", *words(machine, *ODD))
    assert not machine.calls()
    (tmp_path / "out").mkdir()
    env = {"PATH": str(machine.bin), "TMPDIR": str(tmp_path)}
    subprocess.run(["bash", "-ec", out], env=env, check=True, cwd=tmp_path, timeout=60)
    assert machine.calls() == ["create", "describe", "describe", "ssh", "scp", "ssh", "ssh", "scp", "delete"]
    assert json.loads((tmp_path / "seen0").read_text()) == ODD


# Slurm in small: sbatch runs the script, srun starts a task for each node, scancel signals the tasks.
SBATCH = """#!/bin/bash
cat > "$HERE/script.sh"
echo Submitted batch job 4100
"""
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] || exit 99
shift
worst=0 pids=()
for rank in 0 1; do SLURM_PROCID=$rank "$@" & pids+=($!); done
echo "${pids[@]}" >"$HERE/tasks"
for pid in "${pids[@]}"; do wait "$pid"; status=$?; [ $status -gt $worst ] && worst=$status; done
exit $worst
"""
SCANCEL = """#!/bin/bash
[ "$*" = "--signal=TERM 4100" ] && kill -TERM $(cat "$HERE/tasks")
"""
SCONTROL = """#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then echo node7; echo node8; else echo "$@" >>"$HERE/scontrol"; fi
"""


@pytest.fixture
def slurm(machine):
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL)):
        machine.put(name, text)
    env = {"HERE": str(machine.folder)}

    def submit(*args, **more):
        return machine.run("slurm.sh", *SLURM, *args, env=env, **more)

    def job():
        path = {"PATH": f"{machine.bin}:/usr/bin:/bin", "SLURM_JOB_ID": "4100", "SLURM_JOB_NODELIST": "node[7-8]"}
        return subprocess.Popen(
            ["bash", str(machine.folder / "script.sh")],
            env=path | env | {"SLURM_JOB_NUM_NODES": "2"},
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    submit.job = job
    return submit


def options(text):
    """The #SBATCH lines before the first command, as Slurm reads them."""
    head = text.split("\n\n")[0]
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", head, re.MULTILINE))


def test_a_slurm_job_has_one_process_a_node_with_all_its_gpus(machine, slurm, tmp_path):
    record = (
        "import json, os, sys; found = sys.argv[1:], os.environ['JAX_LOCAL_DEVICE_IDS'], os.getcwd(); "
        "json.dump(found, open('seen' + os.environ['SLURM_PROCID'], 'w'))"
    )
    out, _ = slurm(
        "--partition=a100", "--time=12:00:00", "--cpus_per_node=32", "--", sys.executable, "-c", record, *ODD
    )
    assert out == "Submitted batch job 4100\n"
    found = options((tmp_path / "script.sh").read_text())
    assert found == {
        "job-name": "ivcr", "nodes": "2", "ntasks-per-node": "1", "gpus-per-node": "4", "cpus-per-task": "32",
        "partition": "a100", "time": "12:00:00", "output": "ivcr-%j.log", "open-mode": "append", "requeue": "",
        "signal": "B:USR1@120",
    }  # fmt: skip
    process = slurm.job()
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 0, said
    for rank in (0, 1):
        joined = ["--coordinator=node7:61444", "--processes=2", f"--process_id={rank}"]
        assert json.loads((tmp_path / f"seen{rank}").read_text()) == [[*ODD, *joined], "0,1,2,3", str(tmp_path)]
    assert not (tmp_path / "scontrol").exists()


def test_without_gpus_and_partition_slurm_decides(machine, slurm, tmp_path):
    slurm("--gpus_per_node=0", "--", "true")
    text = (tmp_path / "script.sh").read_text()
    assert not {"gpus-per-node", "partition", "time", "cpus-per-task"} & set(options(text))
    assert "JAX_LOCAL_DEVICE_IDS" not in text


def test_before_its_time_is_over_a_slurm_job_saves_and_queues_again(machine, slurm, tmp_path):
    slurm(
        "--",
        "bash",
        "-c",
        f"cd {tmp_path}; trap 'touch saved; exit 0' TERM; touch begun$SLURM_PROCID; while :; do sleep 0.05; done",
    )
    process = slurm.job()
    wait_until(lambda: len(list(tmp_path.glob("begun?"))) == 2)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=30)
    assert (tmp_path / "scontrol").read_text() == "requeue 4100\n" and (tmp_path / "saved").exists(), said


def test_a_slurm_job_that_fails_or_is_cancelled_does_not_queue_again(machine, slurm, tmp_path):
    slurm("--", "sh", "-c", "exit $((SLURM_PROCID * 5))")
    process = slurm.job()
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 5, said
    slurm("--", "bash", "-c", f"cd {tmp_path}; touch begun; exec sleep 5")
    process = slurm.job()
    wait_until((tmp_path / "begun").exists)
    process.send_signal(signal.SIGTERM)  # as scancel does to the script and to the tasks
    subprocess.run(["bash", "-c", f"kill -TERM $(cat {tmp_path}/tasks)"], check=True)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM and not (tmp_path / "scontrol").exists()


def test_a_dry_run_of_a_slurm_job_is_shell_that_submits_the_same(machine, slurm, tmp_path):
    command = ["sh", "-c", "true", "a\nSCRIPT\nSCRIPT_\nb", *ODD]
    slurm("--", *command)
    submitted = (tmp_path / "script.sh").read_text()
    (tmp_path / "script.sh").unlink()
    out, _ = slurm("--dry_run", "--", *command)
    assert not (tmp_path / "script.sh").exists()
    env = {"PATH": str(machine.bin), "HERE": str(tmp_path)}
    subprocess.run(["bash", "-c", out], env=env, check=True, timeout=30)
    assert (tmp_path / "script.sh").read_text() == submitted


def test_the_scripts_hold_no_secret_and_no_name_of_a_project():
    for path in LAUNCH.glob("*.*"):
        text = path.read_text()
        assert not re.search(r"AKIA|ghp_|PRIVATE KEY|password|token *=|gserviceaccount|us-central|europe-west", text), (
            path
        )
