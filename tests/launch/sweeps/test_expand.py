"""What a sweep's `add`s become: names, flags, and what is refused before anything starts."""

import dataclasses
import importlib
import itertools
import json
import os
import pathlib
import subprocess
import sys

import pytest

from configs import interllava_7b, tiny
from ivcr_jax.config import to_dict
from ivcr_jax.train import flat
from ivcr_jax.training import read_config
from launch.expand import expand
from tests.training.conftest import ROOT

SWEEPS = sorted(path for path in (ROOT / "configs" / "sweeps").glob("*.py") if path.name != "__init__.py")


@pytest.fixture
def file(tmp_path, monkeypatch):
    """(runs) -> a config file on configs/tiny.py whose sweep adds them: (argument, overrides) each."""
    monkeypatch.chdir(ROOT)

    def write(*runs):
        path = tmp_path / f"sweep{len(list(tmp_path.iterdir()))}.py"
        path.write_text(
            f"from configs.tiny import get_config\n\n\ndef sweep(add):\n    for own, fields in {list(runs)!r}:\n"
            "        add(own, **fields)\n"
        )
        return str(path)

    return write


def test_a_run_has_the_fields_it_was_given_and_no_other(file):
    rules = ((".*vit.*", 0.0), ("a, b=(c)", 2.0), (".*", 1.0))
    fields = {
        "optim.peak_lr": 1e-3,
        "losses.rank": 2,  # a float is meant
        "data.keep_chat": True,
        "seed": 7,
        "init": "a folder/with, signs",
        "optim.rules": rules,
    }
    given = ["--config.steps=12", "--config.mesh.fsdp=-1"]
    (run,) = expand(file(("retriever", fields)), given)
    base = tiny.config("retriever")
    expected = dataclasses.replace(
        base,
        optim=dataclasses.replace(base.optim, peak_lr=1e-3, rules=rules),
        losses=dataclasses.replace(base.losses, rank=2.0),
        data=dataclasses.replace(base.data, keep_chat=True),
        mesh=dataclasses.replace(base.mesh, fsdp=-1),
        seed=7,
        init="a folder/with, signs",
        steps=12,
    )
    assert run.values == json.loads(json.dumps(dataclasses.asdict(expected)))
    assert {*run.overrides} == {*fields} and run.config.endswith(":retriever")
    # And ivcr_jax.train, given these flags, has the same.
    code = (
        "import json, sys\nfrom absl import app, flags\nfrom ml_collections import config_flags\n"
        "from ivcr_jax import train\nfrom ivcr_jax.training import read_config\n"
        "config_flags.DEFINE_config_file('config', None, '', lock_config=True)\n"
        "app.run(lambda _: print(json.dumps(train.json_of(read_config(flags.FLAGS.config)))), flags_parser=train.parse)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *run.flags],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == run.values


def test_names_tell_what_differs_and_depend_on_nothing_else(file):
    runs = [
        (None, {}),
        (None, {"optim.peak_lr": 1e-3, "losses.rank": 2.0}),
        ("long", {}),
        ("long", {"seed": 3}),
        (None, {"init": "/data/a b", "seed": 1}),
        (None, {"data.dialogues": "x" * 300}),
        (None, {"data.dialogues": "x" * 301}),
    ]
    names = [run.name for run in expand(file(*runs))]
    assert names[:4] == ["base", "losses.rank=2.0,optim.peak_lr=0.001", "arg=long", "arg=long,seed=3"]
    assert names[4].startswith("init=-data-a-b,seed=1-") and len(names[4]) == len("init=-data-a-b,seed=1-") + 8
    assert len({*names}) == len(names) and max(map(len, names)) <= 120
    assert not any(set(name) & set("/ :'\"()") for name in names)
    for order in itertools.islice(itertools.permutations(range(len(runs))), 0, None, 997):
        assert [run.name for run in expand(file(*(runs[place] for place in order)))] == [
            names[place] for place in order
        ]
    # Spelled otherwise, and with others beside it.
    (alone,) = expand(file((None, {"losses.rank": 2, "optim.peak_lr": 0.1e-2})))
    assert alone.name == names[1]


@pytest.mark.parametrize(
    "runs, given, sentence",
    [
        ([], [], "sweep(add) added no run, expected at least one"),
        ([(None, {"optim.learning_rate": 1})], [], "config.optim has no field 'learning_rate'; it has b2, clip, "),
        ([(None, {"lr": 1})], [], "add(lr=1): config has no field 'lr'; it has accumulate, "),
        ([(None, {"steps.more": 1})], [], "config.steps has no field 'more'; it has none"),
        ([(None, {"optim": 1})], [], "config.optim is a part of the configuration, expected one of its fields"),
        ([(None, {"steps": 1.5})], [], "add(steps=1.5): config.steps is 1.5; expected int"),
        ([(None, {"steps": True})], [], "config.steps is True; expected int"),
        ([(None, {"optim.peak_lr": "1e-3"})], [], "config.optim.peak_lr is '1e-3'; expected float"),
        ([(None, {"init": 5})], [], "config.init is 5; expected str"),
        ([(None, {"steps": 0})], [], "steps is 0; expected at least 1"),
        ([(None, {"optim.rules": ((".*", -1.0),)})], [], "the factor of '.*' is -1.0; expected 0 or more"),
        ([("nix", {})], [], "found stage 'nix', expected one of retriever, both"),
        ([(None, {}), (None, {"seed": 0})], [], "'seed=0' and 'base' are the same configuration, expected one"),
        ([("both", {}), (None, {})], [], "'base' and 'arg=both' are the same configuration, expected one"),
        ([(None, {"seed": 1}), (None, {"seed": 2}), (None, {"seed": 1})], [], "'seed=1' and 'seed=1' are the same"),
        ([(None, {"seed": 1})], ["--config.seed=2"], "add(seed=1): seed is given on the command line too"),
        ([(None, {})], ["--config.nix=2"], "--config.nix=2: the configuration has no 'nix'"),
        ([(None, {})], ["--config.steps=many"], "flag --config.steps=many: invalid literal for int()"),
        ([(None, {})], ["--config.steps"], "Missing value for flag --config.steps"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(file, runs, given, sentence):
    with pytest.raises(ValueError) as told:
        expand(file(*runs), given)
    assert sentence in str(told.value) and "\n" not in str(told.value)


def test_files_that_are_none(file, tmp_path):
    with pytest.raises(FileNotFoundError, match="--config: found no file nowhere.py, expected configs/X.py"):
        expand("nowhere.py:x")
    with pytest.raises(ValueError, match=r"configs/tiny.py: found no sweep\(add\), expected one beside get_config"):
        expand("configs/tiny.py")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="text is no Python file"):
        expand(str(tmp_path / "text"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_sweeps_that_come_with_it_expand_against_the_real_configs(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    relative = str(pathlib.Path("configs/sweeps") / path.name)
    for argument in ("retriever", "both") if path.stem == "tiny" else ("", "v5e:16x16", "v5e:16x16:frames"):
        runs = expand(f"{relative}:{argument}".rstrip(":"), ["--config.init=MODEL"])
        base = read_config((tiny if path.stem == "tiny" else interllava_7b).get_config(argument or ""))
        for run in runs:
            wanted = json.loads(json.dumps(dataclasses.asdict(base))) | {"init": "MODEL"}
            for field, value in run.overrides.items():
                part = wanted
                *parts, last = field.split(".")
                for name in parts:
                    part = part[name]
                assert last in part
                part[last] = value
            assert run.values == wanted


@pytest.mark.parametrize("config", ["tiny", "tiny:retriever", "retriever", "retriever:tiny", "interllava_7b"])
def test_any_number_of_a_config_can_be_set_from_a_command_line(config):
    """Where a config file has 0 for a number with a fraction, ml_collections would take whole numbers alone."""
    name, _, argument = config.partition(":")
    values = importlib.import_module(f"configs.{name}").get_config(*[argument] * bool(argument))
    read = flat(to_dict(read_config(values)))
    assert {path: type(value) for path, value in flat(values.to_dict()).items()} == {
        path: type(value) for path, value in read.items()
    }


def test_what_the_real_sweeps_vary(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert [path.stem for path in SWEEPS] == ["candidates", "frames", "lora", "loss_weights", "tiny"]
    found = {path.stem: expand(str(path)) for path in SWEEPS}
    assert {name: len(runs) for name, runs in found.items()} == {
        "candidates": 3, "frames": 4, "loss_weights": 10, "lora": 9, "tiny": 6
    }  # fmt: skip
    for run in found["lora"]:
        lora = run.values["model"]["lora"]
        assert lora["alpha"] / lora["rank"] == 1
