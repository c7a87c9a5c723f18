"""JobSets: read back as YAML, held against the schema, and as Kubernetes would expand them."""

import os
import pathlib
import random
import re
import subprocess
import sys

import jsonschema
import pytest
import yaml

from launch.gke import ACCELERATORS, Job, render

ROOT = pathlib.Path(__file__).resolve().parents[2]
FLAGS = ("--name=run", "--image=r.example/ivcr:1", "--accelerator=tpu-v5-lite-podslice", "--topology=4x4")


def closed(required, **properties):
    """A JSON schema of an object with these fields and no other."""
    return {"type": "object", "properties": properties, "required": required.split(), "additionalProperties": False}


def texts(*required):
    """Of an object of strings."""
    return {"type": "object", "additionalProperties": {"type": "string"}, "required": list(required)}


def several(of):
    return {"type": "array", "items": of}


# What we use of Kubernetes' core/v1 and batch/v1, and of JobSet's API (jobset.x-k8s.io/v1alpha2). A field that is not
# here is a mistake in the template or to be looked up and added.
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}
COUNT = {"type": "integer", "minimum": 0}
TEXT = {"type": "string"}
TPU = closed("google.com/tpu", **{"google.com/tpu": {"type": "integer", "minimum": 1}})
CONTAINER = closed(
    "name image resources",
    name=NAME,
    image=TEXT,
    command=several(TEXT),
    args=several(TEXT),
    ports=several(closed("containerPort", containerPort={"type": "integer", "minimum": 1, "maximum": 65535})),
    resources=closed("limits", requests=TPU, limits=TPU),
    volumeMounts=several(closed("name mountPath", name=NAME, mountPath={"type": "string", "pattern": "^/[^:]*$"})),
)
POD = closed(
    "containers restartPolicy",
    restartPolicy={"enum": ["Never", "OnFailure"]},  # a Job's Pods; of Always it would be refused
    terminationGracePeriodSeconds=COUNT,
    hostNetwork={"type": "boolean"},
    dnsPolicy={"enum": ["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"]},
    nodeSelector=texts("cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"),
    containers={"type": "array", "items": CONTAINER, "minItems": 1, "maxItems": 1},
    volumes=several(closed("name", name=NAME, persistentVolumeClaim=closed("claimName", claimName=NAME))),
)
JOB = closed(
    "template",
    parallelism=COUNT,
    completions=COUNT,
    completionMode={"enum": ["Indexed", "NonIndexed"]},
    backoffLimit=COUNT,
    template=closed("spec", spec=POD),
)
JOBSET = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=closed("name", name=NAME, labels=texts(), annotations=texts()),
    spec=closed(
        "replicatedJobs",
        failurePolicy=closed("maxRestarts", maxRestarts=COUNT),
        replicatedJobs=several(closed("name template", name=NAME, replicas=COUNT, template=closed("spec", spec=JOB))),
    ),
)


def read(text):
    """The JobSet, which must hold to the schema."""
    found = yaml.safe_load(text)
    jsonschema.validate(found, JOBSET)
    return found


def expanded(word):
    """As kubelet reads an argument: $(NAME) is a variable, $$ is $, any other $ is itself."""

    def one(found):
        assert found[0] == "$$" or not found[0].startswith("$("), f"a variable in {word!r}"
        return "$" if found[0] == "$$" else found[0]

    return re.sub(r"\$\$|\$\([^)]*\)|\$", one, word)


def job(*command, **changes):
    fields = {"name": "run", "image": "r.example/ivcr:1", "accelerator": "tpu-v5-lite-podslice", "topology": "16x16"}
    return Job(**{**fields, "command": command or ("true",), **changes})


def launch(*flags, env=None):
    return subprocess.run(
        [sys.executable, "-m", "launch.gke", *flags], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )


def test_two_slices_in_a_queue():
    found = read(render(job("python", "-m", "x", slices=2, queue="team", claim="data:/mnt/data", restarts=3)))
    assert found["metadata"] == {
        "name": "run",
        "labels": {"kueue.x-k8s.io/queue-name": "team"},
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    }
    assert found["spec"]["failurePolicy"] == {"maxRestarts": 3}
    (replicated,) = found["spec"]["replicatedJobs"]
    of_job = replicated["template"]["spec"]
    assert (replicated["replicas"], of_job["parallelism"], of_job["completions"]) == (2, 64, 64)
    assert of_job["backoffLimit"] == 0  # one Pod that fails is the whole slice's failure
    pod = of_job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    (container,) = pod["containers"]
    assert container["resources"] == {"requests": {"google.com/tpu": 4}, "limits": {"google.com/tpu": 4}}
    assert container["command"] == ["bash", "launch/stoppable.sh"] and container["args"] == ["python", "-m", "x"]
    assert container["volumeMounts"] == [{"name": "shared", "mountPath": "/mnt/data"}]
    assert pod["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "data"}}]


def test_without_queue_and_claim():
    found = read(render(job()))
    assert found["metadata"]["labels"] == {}
    assert found["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["volumes"] == []


# By Google's tables of machine types: chips of the slice over chips of a ct..-hightpu-4t, and so on.
@pytest.mark.parametrize(
    ("accelerator", "topology", "per_host", "hosts", "chips"),
    [
        ("tpu-v5-lite-podslice", "1x1", 0, 1, 1),
        ("tpu-v5-lite-podslice", "2x2", 0, 1, 4),
        ("tpu-v5-lite-podslice", "2x4", 0, 2, 4),
        ("tpu-v5-lite-podslice", "2x4", 8, 1, 8),
        ("tpu-v6e-slice", "8x8", 0, 16, 4),
        ("tpu-v5p-slice", "2x2x1", 0, 1, 4),
        ("tpu-v5p-slice", "4x4x8", 0, 32, 4),
        ("tpu-v4-podslice", "2x2x4", 0, 4, 4),
        ("tpu7x", "4x4x4", 0, 16, 4),
    ],
)
def test_hosts_of_a_topology(accelerator, topology, per_host, hosts, chips):
    text = render(job(accelerator=accelerator, topology=topology, chips_per_host=per_host))
    of_job = read(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert of_job["parallelism"] == of_job["completions"] == hosts
    assert of_job["template"]["spec"]["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}


def words(rng):
    """Words that a YAML reader, a shell or Kubernetes might take for something else."""
    tricky = ["yes", "1e-4", "0x1f", "null", "~", "- a", "a: b", "#x", "{}", "!!int", "&a", "*a", "", " ", "\t", "%a",
              "'", '"', "\\", "\\n", "\\ud83d\\ude00", "$", "$$", "$(HOME)", "$$(HOME)", "${name}", "${args}", "\n",
              "\r\n", "\x85", "\u2028", "\ufeff", "\x7f", "\x01", "\x1b", "日本", "😀", "e\u0301", "---", "...",
              "<<"]  # fmt: skip
    letters = [chr(rng.choice([rng.randrange(1, 0x300), rng.randrange(0xE000, 0x11000)])) for _ in range(20)]
    parts = rng.choices([*tricky, *letters], k=rng.randrange(0, 6))
    return "".join(parts)


@pytest.mark.parametrize("seed", range(8))
def test_any_command_comes_back_word_for_word(seed):
    rng = random.Random(seed)
    for _ in range(60):
        command = [words(rng) for _ in range(rng.randrange(1, 8))]
        path = "/p" + words(rng).replace(":", "")
        text = render(job(*command, claim=f"c:{path}"))
        found = read(text)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
        assert found["volumeMounts"][0]["mountPath"] == path
        assert [expanded(word) for word in found["args"]] == command
        # Plain lines of ASCII, each value within its own: nothing for another reader to see otherwise.
        assert re.fullmatch(r"[\n -~]*", text) and text.count("\n") == render(job("x")).count("\n")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"name": "Run"}, "--name is 'Run'; expected small letters"),
        ({"name": "a\nkind: Pod"}, "expected small letters"),
        ({"name": "a" * 50}, "--name 'a{50}' is 4 letters too long for the names of its Pods"),
        ({"image": "a b"}, "--image is 'a b'; expected REGISTRY"),
        ({"image": 'a"\nb'}, "expected REGISTRY"),
        ({"accelerator": "v5e"}, "--accelerator is 'v5e'; expected one of tpu-v4-podslice, "),
        ({"topology": "16"}, "--topology is '16'; expected one like 4x4 for tpu-v5-lite"),
        ({"topology": "4x4x4"}, "expected one like 4x4 for"),
        ({"accelerator": "tpu-v5p-slice"}, "expected one like 4x4x4 for tpu-v5p-slice"),
        ({"topology": "0x4"}, "--topology is '0x4'"),
        ({"topology": "3x3"}, "3x3 has 9 chips, which --chips_per_host=4 does not divide"),
        ({"topology": "2x2", "slices": 2}, "--slices is 2; GKE joins slices of several hosts, and 2x2 is one"),
        ({"queue": "a b"}, "--queue is 'a b'; expected the name of a LocalQueue"),
        ({"claim": "data"}, "--claim is 'data'; expected CLAIM:/PATH"),
        ({"claim": "data:relative"}, "expected CLAIM:/PATH"),
        ({"command": ()}, "the command is missing"),
        ({"command": ("a\ud800",)}, "expected text"),
    ],
)
def test_what_a_cluster_would_refuse_is_refused_here(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        job(**changes)


def test_the_longest_name_still_fits():
    longest = "a" * (63 - len("-slice-1-63-12345"))
    assert render(job(name=longest, slices=2))
    with pytest.raises(ValueError, match="1 letters too long"):
        job(name=longest + "a", slices=2)
    assert all(axes in (2, 3) for axes in ACCELERATORS.values())


def kubectl(folder, status):
    """A stand-in that keeps what it is handed; the only program on the PATH it gives."""
    folder.mkdir()
    (folder / "kubectl").write_text(f'#!/bin/sh\necho "$@" >{folder}/args\n/bin/cat >{folder}/yaml\nexit {status}\n')
    (folder / "kubectl").chmod(0o755)
    return os.environ | {"PATH": str(folder)}


@pytest.mark.parametrize("status", [0, 3])
def test_the_same_yaml_goes_to_kubectl(tmp_path, status):
    command = ("--", "python", "--x=a b\"'$(HOME)", "--dry_run")
    shown = launch(*FLAGS, "--dry_run", *command, env=os.environ | {"PATH": str(tmp_path)})  # needs no kubectl
    assert shown.returncode == 0, shown.stderr
    args = read(shown.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0][
        "args"
    ]
    assert tuple(map(expanded, args)) == command[1:]
    done = launch(*FLAGS, *command, env=kubectl(tmp_path / "bin", status))
    assert done.returncode == status, done.stderr
    assert (tmp_path / "bin" / "args").read_text() == "apply -f -\n"
    assert (tmp_path / "bin" / "yaml").read_text() == shown.stdout


def test_wrong_flags_are_refused_before_kubectl_starts(tmp_path):
    env = kubectl(tmp_path / "bin", 0)
    for flags, sentence in (
        (FLAGS, "gke: the command is missing; it follows --"),
        ((*FLAGS[1:], "--", "x"), "--name must have a value"),
        ((*FLAGS, "--slice=2", "--", "x"), "Unknown command line flag 'slice'"),
        ((*FLAGS, "--topology=4", "--", "x"), "gke: --topology is '4'"),
        ((*FLAGS, "--slices=0", "--", "x"), "--slices=0"),
    ):
        done = launch(*flags, env=env)
        assert done.returncode == 1 and sentence in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "bin" / "yaml").exists()
    done = launch(*FLAGS, "--", "x", env=os.environ | {"PATH": str(tmp_path)})
    assert done.returncode == 1 and done.stderr == "gke: found no kubectl on PATH; it has to be installed first\n"
