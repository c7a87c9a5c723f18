"""Configurations as plain trees: dataclasses to dicts and back, strictly. Knows no file format and no flag library."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as nested dicts, for JSON or for an ml_collections.ConfigDict."""
    return dataclasses.asdict(config)


def json_of(config: Any) -> dict[str, Any]:
    """A dataclass as it will be when read from JSON: lists for tuples."""
    return json.loads(json.dumps(to_dict(config)))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def from_dict(kind: type[T], values: Mapping[str, Any], name: str = "config") -> T:
    """A dataclass from nested mappings.

    Args:
      kind: the dataclass.
      values: a value for each field, lists for tuples.
      name: of `values`, for messages.

    Raises:
      ValueError: for a field that is missing or unknown, a value of another type, or one the dataclass refuses; the
        sentence names it.
    """
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if sorted(values) != sorted(names):
        missing, unknown = sorted({*names} - {*values}), sorted({*values} - {*names})
        raise ValueError(f"{name}: missing fields {missing or 'none'}, unknown fields {unknown or 'none'}")
    try:
        return kind(**{field: _value(hints[field], values[field], f"{name}.{field}") for field in names})
    except ValueError as error:
        raise error if str(error).startswith(name) else ValueError(f"{name}: {error}") from None


def listed(names: Sequence[str], most: int = 10) -> str:
    """Names for a message: "a, b and 7 more"."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _value(kind: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, name)  # type: ignore[arg-type]
    if typing.get_origin(kind) is types.UnionType:  # a part that a configuration may lack
        (kind,) = (each for each in typing.get_args(kind) if each is not types.NoneType)
        return None if value is None else _value(kind, value, name)
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} is {value!r}; expected several values")
        if kinds[-1] is Ellipsis:
            kinds = kinds[:1] * len(value)
        if len(value) != len(kinds):
            raise ValueError(f"{name} is {value!r}; expected {len(kinds)} values")
        return tuple(_value(each, item, name) for each, item in zip(kinds, value, strict=True))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{name} is {value!r}; expected {kind.__name__}")
    return value
