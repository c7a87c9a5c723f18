"""Runs a command on TPU slices of a GKE cluster: a JobSet, queued by Kueue where a queue is named.

    python -m launch.gke --name=RUN --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=16x16 [--slices=2]
        [--queue=QUEUE] [--claim=CLAIM:/PATH] [--restarts=N] [--dry_run] -- COMMAND...

--dry_run prints the YAML, which is `launch/gke_jobset.yaml` filled in; without it the YAML goes to `kubectl apply`. The
image holds a checkout with all that `setup.py` asks for, and begins in it. docs/launch.md tells how to make one.
"""

import dataclasses
import json
import math
import pathlib
import re
import shutil
import string
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from absl import app, flags

TEMPLATE = pathlib.Path(__file__).with_name("gke_jobset.yaml")
# How many numbers a topology has, by GKE's name of the accelerator.
ACCELERATORS = {
    "tpu-v4-podslice": 3,
    "tpu-v5-lite-podslice": 2,
    "tpu-v5p-slice": 3,
    "tpu-v6e-slice": 2,
    "tpu7x": 3,
}
LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"  # RFC 1123; at most 63 characters


@dataclasses.dataclass(frozen=True)
class Job:
    """A run, as the cluster is to see it. Values that GKE would refuse, or wait for without end, are a ValueError.

    Attributes:
      name: of the JobSet. image: of the container, with its registry.
      accelerator, topology: GKE's names: "tpu-v5-lite-podslice", "16x16".
      command: words, to be run on every host.
      slices: how many such slices work together. queue: Kueue's LocalQueue, "" for none.
      claim: "NAME:/PATH", a PersistentVolumeClaim and where the command sees it; "" for none.
      restarts: how often the whole is made anew after a failure or preemption.
      chips_per_host: 0 for what GKE's usual machines have: four, or all where there are fewer.
    """

    name: str
    image: str
    accelerator: str
    topology: str
    command: Sequence[str]
    slices: int = 1
    queue: str = ""
    claim: str = ""
    restarts: int = 0
    chips_per_host: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", self.name):
            raise ValueError(f"--name is {self.name!r}; expected small letters, digits and hyphens, a letter first")
        if not re.fullmatch(r"[\w.:/@-]+", self.image, re.ASCII):
            raise ValueError(f"--image is {self.image!r}; expected REGISTRY/NAME:TAG")
        if self.accelerator not in ACCELERATORS:
            raise ValueError(f"--accelerator is {self.accelerator!r}; expected one of {', '.join(ACCELERATORS)}")
        axes = ACCELERATORS[self.accelerator]
        if not re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)" + f"{{{axes - 1}}}", self.topology, re.ASCII):
            example = "x".join("4" * axes)
            raise ValueError(f"--topology is {self.topology!r}; expected one like {example} for {self.accelerator}")
        if self.chips % (self.chips_per_host or min(4, self.chips)):
            raise ValueError(
                f"--topology {self.topology} has {self.chips} chips, which --chips_per_host="
                f"{self.chips_per_host or 4} does not divide"
            )
        if self.slices > 1 and self.hosts == 1:
            raise ValueError(
                f"--slices is {self.slices}; GKE joins slices of several hosts, and {self.topology} is one"
            )
        if self.queue and not (re.fullmatch(LABEL, self.queue) and len(self.queue) <= 63):
            raise ValueError(f"--queue is {self.queue!r}; expected the name of a LocalQueue")
        if self.claim and not re.fullmatch(LABEL + r":/[^:\0]+", self.claim):
            raise ValueError(f"--claim is {self.claim!r}; expected CLAIM:/PATH")
        # Names of Pods, which are also host names: NAME-slice-JOB-POD and five letters.
        longest = len(f"{self.name}-slice-{self.slices - 1}-{self.hosts - 1}-12345")
        if longest > 63:
            raise ValueError(f"--name {self.name!r} is {longest - 63} letters too long for the names of its Pods")
        if not self.command:
            raise ValueError("the command is missing; it follows --")
        for word in (*self.command, self.claim):
            if "\0" in word or any("\ud800" <= letter <= "\udfff" for letter in word):
                raise ValueError(f"the command has {word!r}; expected text")

    @property
    def chips(self) -> int:
        """Of a slice."""
        return math.prod(map(int, self.topology.split("x")))

    @property
    def hosts(self) -> int:
        """Of a slice."""
        return self.chips // (self.chips_per_host or min(4, self.chips))


def render(job: Job) -> str:
    """The YAML of a JobSet (jobset.x-k8s.io/v1alpha2)."""
    claim, _, path = job.claim.partition(":")
    values = {
        "name": job.name,
        "labels": {"kueue.x-k8s.io/queue-name": job.queue} if job.queue else {},
        "restarts": job.restarts,
        "slices": job.slices,
        "hosts": job.hosts,
        "accelerator": job.accelerator,
        "topology": job.topology,
        "image": job.image,
        # Kubernetes puts variables in for $(NAME), and makes $ of $$.
        "args": [word.replace("$", "$$") for word in job.command],
        "chips": job.chips // job.hosts,
        "mounts": [{"name": "shared", "mountPath": path}] if claim else [],
        "volumes": [{"name": "shared", "persistentVolumeClaim": {"claimName": claim}}] if claim else [],
    }
    return string.Template(TEMPLATE.read_text()).substitute({name: scalar(value) for name, value in values.items()})


def scalar(value: Any) -> str:
    """JSON that is YAML too: text is quoted, so that no reader takes 1e-4 or `yes` for anything else."""

    def escape(found: re.Match[str]) -> str:
        code = ord(found.group())
        return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"  # YAML has no surrogates, as JSON has

    return re.sub(r"[^ -~]", escape, json.dumps(value, ensure_ascii=False))


def main(argv: list[str]) -> None:
    """Prints the JobSet, or hands it to kubectl."""
    args = flags.FLAGS
    try:
        job = Job(
            args.name, args.image, args.accelerator, args.topology, argv[1:], args.slices, args.queue, args.claim,
            args.restarts, args.chips_per_host,
        )  # fmt: skip
    except ValueError as error:
        sys.exit(f"gke: {error}")
    if args.dry_run:
        print(render(job), end="")
        return
    if not shutil.which("kubectl"):
        sys.exit("gke: found no kubectl on PATH; it has to be installed first")
    sys.exit(subprocess.run(["kubectl", "apply", "-f", "-"], input=render(job), text=True).returncode)


if __name__ == "__main__":
    flags.DEFINE_string("name", None, "Of the JobSet.", required=True)
    flags.DEFINE_string("image", None, "The container's image, with its registry.", required=True)
    flags.DEFINE_string("accelerator", None, "GKE's name of it: " + ", ".join(ACCELERATORS) + ".", required=True)
    flags.DEFINE_string("topology", None, "Of a slice: 16x16, 4x4x4.", required=True)
    flags.DEFINE_integer("slices", 1, "How many slices work together.", lower_bound=1)
    flags.DEFINE_string("queue", "", "The LocalQueue of Kueue; none is queued without.")
    flags.DEFINE_string("claim", "", "CLAIM:/PATH: a PersistentVolumeClaim, and where the command sees it.")
    flags.DEFINE_integer("restarts", 0, "How often all is made anew after failure or preemption.", lower_bound=0)
    flags.DEFINE_integer("chips_per_host", 0, "0: four, or all where a slice has fewer.", lower_bound=0)
    flags.DEFINE_bool("dry_run", False, "Print the YAML, run nothing.")
    app.run(main)
