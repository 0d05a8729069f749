"""Checked access to the fields of a received ``meta`` map: each function returns a value or raises ProtocolError."""

import math
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any, Final

from ternbus.broker.errors import ProtocolError
from ternbus.broker.printable import printable
from ternbus.broker.protocol.direction import DIRECTIONS, Direction
from ternbus.broker.protocol.frame import COUNTER_MAX, PARTS_MAX, U64
from ternbus.broker.protocol.identity import is_device

ENTRIES_MAX: Final = 32  # in a map of metrics


def get(meta: Mapping[str, Any], key: str) -> Any:
    """The value under ``key``, which must be present."""
    if key not in meta:
        raise ProtocolError("bad-meta", f"{key!r} is missing")
    return meta[key]


def checked_integer(value: object, key: str, low: int = 0, high: int = U64 - 1) -> int:
    """Check an int, not a bool, from ``low`` to ``high``."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ProtocolError("bad-meta", f"{key!r} is not an integer from {low} to {high}")
    return value


def integer(meta: Mapping[str, Any], key: str, low: int = 0, high: int = U64 - 1) -> int:
    """The int under ``key``."""
    return checked_integer(get(meta, key), key, low, high)


def counter(meta: Mapping[str, Any], key: str, low: int = 0) -> int:
    """Check a version, seq, base or session: at most 2**62, so that no peer can exhaust a counter."""
    return integer(meta, key, low, COUNTER_MAX)


def checked_number(value: object, key: str, low: float = -math.inf) -> float:
    """Check a finite number, at least ``low``, and return it as a float."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < low:
        raise ProtocolError("bad-meta", f"{key!r} is not a finite number")
    return float(value)


def number(meta: Mapping[str, Any], key: str, low: float = -math.inf) -> float:
    """The float under ``key``."""
    return checked_number(get(meta, key), key, low)


def boolean(meta: Mapping[str, Any], key: str) -> bool:
    """The bool under ``key``."""
    value = get(meta, key)
    if not isinstance(value, bool):
        raise ProtocolError("bad-meta", f"{key!r} is neither true nor false")
    return value


def text(meta: Mapping[str, Any], key: str) -> str:
    """The str under ``key``."""
    value = get(meta, key)
    if not isinstance(value, str):
        raise ProtocolError("bad-meta", f"{key!r} is not a string")
    return value


def line(meta: Mapping[str, Any], key: str, bytes_max: int) -> str:
    """The str under ``key``, of at most ``bytes_max`` bytes in UTF-8, with ``?`` for what is not printable."""
    value = text(meta, key)
    if len(value.encode("utf-8", "surrogatepass")) > bytes_max:
        raise ProtocolError("bad-meta", f"{key!r} is longer than {bytes_max} bytes")
    return printable(value)


def shown(meta: Mapping[str, Any], key: str, chars_max: int) -> str:
    """The str under ``key``, for people: its first ``chars_max`` characters, with ``?`` for what is not printable.

    It is printed, and must neither be a second line of a log nor do anything to a terminal.
    """
    return printable(text(meta, key)[:chars_max])


def one_of(meta: Mapping[str, Any], key: str, names: tuple[str, ...]) -> str:
    """The str under ``key``, one of ``names``."""
    value = text(meta, key)
    if value not in names:
        raise ProtocolError("bad-meta", f"{key!r} is not one of {', '.join(dict.fromkeys(names))}")
    return value


def binary(meta: Mapping[str, Any], key: str, length: int) -> bytes:
    """The bytes under ``key``, exactly ``length``."""
    value = get(meta, key)
    if not isinstance(value, bytes) or len(value) != length:
        raise ProtocolError("bad-meta", f"{key!r} is not {length} bytes")
    return value


def mapping(meta: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The map from str under ``key``."""
    value = get(meta, key)
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        raise ProtocolError("bad-meta", f"{key!r} is not a map of strings to values")
    return MappingProxyType(value)


def numbers(meta: Mapping[str, Any], key: str) -> Mapping[str, float]:
    """The map from str to float under ``key``, at most `ENTRIES_MAX` entries."""
    values = mapping(meta, key)
    if len(values) > ENTRIES_MAX:
        raise ProtocolError("bad-meta", f"{key!r} has more than {ENTRIES_MAX} entries")
    return MappingProxyType({name: checked_number(value, f"{key}.{name[:40]}") for name, value in values.items()})


def directions(meta: Mapping[str, Any], key: str, names: Collection[str]) -> Mapping[str, Direction]:
    """The map from some of ``names`` to their directions under ``key``."""
    values = mapping(meta, key)
    for name, value in values.items():
        if name not in names or value not in DIRECTIONS:
            raise ProtocolError("bad-meta", f"{f'{key}.{name[:40]}'!r} is no direction of one of the values")
    return values


def counts(meta: Mapping[str, Any], key: str, entries_max: int, high: int) -> Mapping[str, int]:
    """The map from str to int, from 0 to ``high``, under ``key``, of at most ``entries_max`` entries."""
    values = mapping(meta, key)
    if len(values) > entries_max:
        raise ProtocolError("bad-meta", f"{key!r} has more than {entries_max} entries")
    return MappingProxyType(
        {name: checked_integer(value, f"{key}.{name[:40]}", high=high) for name, value in values.items()}
    )


def device(meta: Mapping[str, Any]) -> str:
    """The device name under ``device``."""
    name = text(meta, "device")
    if not is_device(name):
        raise ProtocolError("bad-meta", "'device' is not a valid name")
    return name


def part_range(row: object) -> tuple[int, int]:
    """Check a pair [first, last] of part numbers."""
    if not isinstance(row, list) or len(row) != 2:
        raise ProtocolError("bad-meta", "a range is not [first, last]")
    first, last = (checked_integer(number, "parts", 0, PARTS_MAX - 1) for number in row)
    if first > last:
        raise ProtocolError("bad-meta", "a range ends before it begins")
    return first, last
