"""Sections of aggregator.toml: keys with their meaning and bounds, read into a dataclass."""

from collections.abc import Mapping, Set
from dataclasses import Field, field, fields
from typing import Any

from ternbus.aggregator.plan_settings import is_plain
from ternbus.broker.errors import ConfigError
from ternbus.broker.spelling import meant


def key(default: Any, doc: str, *, low: float | None = None, high: float | None = None, one_of: Any = None) -> Any:
    """A field of a section: its default, its meaning, its bounds or choices."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "one_of": one_of})


def section(kind: type, table: object, where: str, retired: Set[str] = frozenset()) -> Any:
    """The dataclass ``kind`` from a table; ConfigError names the key that is wrong, and what it may be.

    Keys in ``retired`` are ignored: files of older versions have them.
    """
    if not isinstance(table, Mapping):
        raise ConfigError(f"{where} must be a table")
    table = {name: value for name, value in table.items() if name not in retired}
    known = {entry.name: entry for entry in fields(kind)}
    for name in table:
        if name not in known:
            raise ConfigError(f"{where}.{name} is unknown{meant(name, known)}; known are {', '.join(known)}")
    return kind(**{name: _value(known[name], value, f"{where}.{name}") for name, value in table.items()})


def _value(entry: Field[Any], value: object, where: str) -> Any:
    about = entry.metadata
    if isinstance(entry.default, tuple):
        if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
            raise ConfigError(f"{where} = {value!r} must be a list of strings")
        return tuple(value)
    if about["one_of"] is not None:
        if value not in about["one_of"] or type(value) is not type(entry.default):  # 6.0 is equal to 6
            raise ConfigError(f"{where} = {value!r} must be one of {', '.join(map(str, about['one_of']))}")
        return value
    return _number(type(entry.default), value, about["low"], about["high"], where)


def _number(kind: type, value: object, low: float | None, high: float | None, where: str) -> Any:
    wanted = int | float if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{where} = {value!r} must be {'a number' if kind is float else kind.__name__}")
    if isinstance(value, int | float) and not (
        is_plain(value) and (low is None or value >= low) and (high is None or value <= high)
    ):
        raise ConfigError(f"{where} = {value!r} must be {_interval(low, high)}")
    return kind(value)


def _interval(low: float | None, high: float | None) -> str:
    return f"at least {low:g}" if high is None else f"from {low:g} to {high:g}"
