"""TOML: read within bounds, so that what comes back can be looked at and shown; written so that it is read again."""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from ternbus.broker.errors import ConfigError

DEPTH_MAX: Final = 16  # Ternbus' own files need four; repr and comparison recurse, so depth is bounded once, here
BYTES_MAX: Final = 2**20
BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")

Place = tuple[str, ...]  # the keys that lead to a value or a table; () is the file


def loads(content: str | bytes, source: str) -> dict[str, Any]:
    """The table in a file's content, in bytes UTF-8, with or without a byte order mark.

    ConfigError, naming ``source``, for no TOML, or none that a file of ours can be.
    """
    text = content if isinstance(content, str) else _decoded(content, source)
    if len(text) > BYTES_MAX:
        raise _too_long(source)
    try:
        table = tomllib.loads(text.removeprefix("\ufeff"))
    # A TOMLDecodeError is a ValueError. So is what int() says of thousands of digits, which tomllib lets through.
    except ValueError as error:
        raise ConfigError(f"{source} is not TOML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{source} is not one of ours: nested deeper than {DEPTH_MAX}") from error
    _check(table, source)
    return table


def dumps(table: Mapping[str, Any], comments: Mapping[Place, str] = MappingProxyType({})) -> str:
    """The text of a file in which ``loads`` finds this table: strings, booleans, numbers, and lists and tables of them.

    A table's comment stands at its head and may have several lines; a value's stands behind it. ConfigError for what
    TOML cannot hold: integers beyond 64 bits, and the name of a file that is no UTF-8.
    """
    _check(table, "what is to be written")
    return "\n".join(_lines(table, (), comments)) + "\n"


def _decoded(content: bytes, source: str) -> str:
    if len(content) > BYTES_MAX:
        raise _too_long(source)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not TOML: byte {error.start} is not UTF-8") from error


def _too_long(source: str) -> ConfigError:
    return ConfigError(f"{source} is not one of ours: longer than {BYTES_MAX} bytes")


def _check(table: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError for what is nested too deep (without recursion) and for integers beyond TOML's 64 bits."""
    level: list[object] = [table]
    for _ in range(DEPTH_MAX):
        below: list[object] = []
        for value in level:
            if isinstance(value, Mapping):
                below.extend(value.values())
            elif isinstance(value, list | tuple):
                below.extend(value)
            elif isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ConfigError(f"{source} is not TOML: an integer of more than 64 bits")
        level = below
    if level:
        raise ConfigError(f"{source} is not one of ours: nested deeper than {DEPTH_MAX}")


def _lines(table: Mapping[str, Any], place: Place, comments: Mapping[Place, str]) -> Iterator[str]:
    """A table's lines: its comment, its values, then the tables below it, each under its name."""
    yield from (f"# {line}" for line in comments.get(place, "").splitlines())
    tables = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    for key, value in table.items():
        if key not in tables:
            comment = comments.get((*place, key))
            yield f"{_key(key)} = {_value(value)}" + (f"  # {comment}" if comment else "")
    for key, value in tables.items():
        below = (*place, key)
        yield from ("", f"[{'.'.join(map(_key, below))}]")
        yield from _lines(value, below, comments)


def _value(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return _quoted(value)
        case int():
            return str(int(value))
        case float():
            return repr(float(value))  # inf and nan are TOML too
        case Mapping():
            return f"{{{', '.join(f'{_key(key)} = {_value(below)}' for key, below in value.items())}}}"
        case list() | tuple():
            return f"[{', '.join(map(_value, value))}]"
        case _:
            raise TypeError(f"no TOML value: {value!r}")


def _key(key: str) -> str:
    return key if BARE_KEY.fullmatch(key) else _quoted(key)


def _quoted(text: str) -> str:
    """A basic string: JSON's, if it escapes DEL and writes what lies beyond 16 bits as it is, not as two surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate: how Python shows a byte of a name that it cannot decode
        raise ConfigError(f"{text!r} is not UTF-8 and cannot be kept in a TOML file; rename it") from error
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
