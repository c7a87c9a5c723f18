"""A config file and its `sweep(add)` -> the runs, each with a name of its own; whatever cannot be is refused here.

A sweep is a function beside `get_config`:

    def sweep(add):
        add()                                                # the configuration as it is
        add(**{"optim.peak_lr": 1e-3, "losses.rank": 2.0})   # fields by their paths
        add("long", **{"optim.peak_lr": 1e-3})               # the config's own argument, and fields

It knows configurations; it starts nothing and touches no device.
"""

import dataclasses
import hashlib
import importlib.util
import pathlib
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from ivcr_jax.config import flat, json_of, listed
from ivcr_jax.training import read_config

LONGEST = 120  # letters of a name; a folder's may have 255


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
      name: of its folder, made of what the sweep gave it alone: neither other runs nor any order change it.
      config: FILE[:ARGUMENT].
      flags: of `ivcr_jax.train`, but for the workdir.
      overrides: the fields that the sweep gave it, by path.
      values: the whole configuration as JSON has it.
    """

    name: str
    config: str
    flags: tuple[str, ...]
    overrides: Mapping[str, Any]
    values: Mapping[str, Any]


def expand(config: str, given: Sequence[str] = ()) -> list[Run]:
    """The runs of a config file's sweep, in the order of its `add`s.

    Args:
      config: FILE[:ARGUMENT], as for `ivcr_jax.train`.
      given: "--config.field=value", for every run.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds no sweep; a field that is not there, or is given twice; a value of another type, or one
        that the configuration refuses; two runs that are the same.
    """
    file, _, argument = config.partition(":")
    module = _load(file)
    if not hasattr(module, "sweep"):
        raise ValueError(f"{file}: found no sweep(add), expected one beside get_config")
    runs: list[Run] = []

    def add(own: str | None = None, /, **overrides: Any) -> None:
        argument_of_run = argument if own is None else own
        runs.append(_run(module, file, argument_of_run, "" if own is None else own, given, overrides))

    module.sweep(add)
    if not runs:
        raise ValueError(f"{file}: sweep(add) added no run, expected at least one")
    for place, run in enumerate(runs):
        for other in runs[:place]:
            if run.values == other.values or run.name == other.name:
                raise ValueError(f"{file}: {run.name!r} and {other.name!r} are the same configuration, expected one")
    return runs


def _run(
    module: ModuleType, file: str, argument: str, own: str, given: Sequence[str], overrides: Mapping[str, Any]
) -> Run:
    said = ", ".join([repr(own)] * bool(own) + [f"{name}={value!r}" for name, value in sorted(overrides.items())])
    where = f"{file}: add({said})"
    twice = sorted({*overrides} & {flag.removeprefix("--config.").partition("=")[0] for flag in given})
    if twice:
        raise ValueError(f"{where}: {listed(twice)} is given on the command line too; expected it once")
    values = _configured(module, file, argument, given)
    for path, value in overrides.items():
        _set(values, path, value, where)
    try:
        whole = json_of(read_config(values))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    held = flat(whole)
    fields = {path: held[path] for path in sorted(overrides)}
    own_flags = [f"--config.{path}={_written(value)}" for path, value in fields.items()]
    # What will be run is what was asked for: the command line has its own way to read tuples and texts.
    if json_of(read_config(_configured(module, file, argument, [*given, *own_flags]))) != whole:
        raise ValueError(f"{where}: found a value that no command line can say, expected numbers, texts and tuples")
    spelled = f"{file}:{argument}" if argument else file
    return Run(_name(own, fields), spelled, (f"--config={spelled}", *given, *own_flags), fields, whole)


def _load(file: str) -> ModuleType:
    if not pathlib.Path(file).is_file():
        raise FileNotFoundError(f"--config: found no file {file}, expected configs/X.py[:argument]")
    spec = importlib.util.spec_from_file_location(pathlib.Path(file).stem, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--config: {file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _configured(module: ModuleType, file: str, argument: str, given: Sequence[str]) -> ConfigDict:
    """What `get_config` gives, with flags read as `ivcr_jax.train` reads them."""
    try:
        values = module.get_config(argument) if argument else module.get_config()
    except ValueError as error:
        raise ValueError(f"--config={file}:{argument}: {error}") from None
    known = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", values, flag_values=known, sys_argv=["", *given])
        known(["", *given])
    except AttributeError as error:
        lacking = str(error).strip("'\"")
        flag = next((each for each in given if lacking in each), "--config")
        raise ValueError(f"{flag}: the configuration has no {lacking!r}") from None
    except flags.Error as error:
        raise ValueError(" ".join(str(error).split())) from None
    return values


def _set(values: ConfigDict, path: str, value: Any, where: str) -> None:
    """Sets a field. Raises ValueError where there is none; of what type it must be, the configuration says later."""
    *parts, last = path.split(".")
    part = values
    for number, name in enumerate([*parts, last]):
        if not isinstance(part, ConfigDict) or name not in part:
            above = ".".join(["config", *parts[:number]])
            known = sorted(part) if isinstance(part, ConfigDict) else []
            raise ValueError(f"{where}: {above} has no field {name!r}; it has {listed(known, 30) or 'none'}")
        if name == last and number == len(parts):
            if isinstance(part[name], ConfigDict) or part[name] is None:
                raise ValueError(f"{where}: config.{path} is a part of the configuration, expected one of its fields")
            with part.ignore_type():
                part[name] = value
            return
        part = part[name]


def _written(value: Any) -> str:
    """A value from JSON as a flag says it."""
    return value if isinstance(value, str) else repr(_tuples(value))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _name(own: str, fields: Mapping[str, Any]) -> str:
    """ "losses.rank=2.0,optim.peak_lr=0.001"; where that is no name for a folder, as much of it as is, and its hash."""
    said = ",".join([f"arg={own}"] * bool(own) + [f"{path}={_written(value)}" for path, value in fields.items()])
    plain = re.sub(r"[^A-Za-z0-9._,=+-]+", "-", said)
    if plain != said or len(said) > LONGEST:
        plain = f"{plain[: LONGEST - 9]}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"
    return plain or "base"
