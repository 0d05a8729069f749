"""TOML: a parser with bounds on size, depth and integers, and a writer."""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

from ternbus.broker.errors import ConfigError

DEPTH_MAX: Final = 16  # files of Ternbus need 4; the bound protects repr and comparison, which are recursive
BYTES_MAX: Final = 2**20
BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")

Place = tuple[str, ...]  # the keys from the root to a value or a table; () is the root


def loads(content: str | bytes, source: str) -> dict[str, Any]:
    """Parse a file's content; bytes must be UTF-8, with or without a byte order mark.

    ConfigError, which names ``source``, for invalid TOML and for content beyond the bounds.
    """
    text = content if isinstance(content, str) else _decoded(content, source)
    if len(text) > BYTES_MAX:
        raise _too_long(source)
    try:
        table = tomllib.loads(text.removeprefix("\ufeff"))
    # A TOMLDecodeError is a ValueError. int() raises a ValueError for thousands of digits, which tomllib accepts.
    except ValueError as error:
        is_there = str(error).startswith(("Cannot declare", "Cannot overwrite"))
        remedy = "; this section or key is there already: change it where it is" if is_there else ""
        raise ConfigError(f"{source} is not valid TOML: {error}{remedy}") from error
    except RecursionError as error:
        raise ConfigError(f"{source} is too deeply nested for a Ternbus file: more than {DEPTH_MAX} levels") from error
    _check(table, source)
    return table


def toml_value(text: str) -> object:
    """A value of a command line: TOML where it is TOML, else the string itself."""
    try:
        return loads(f"value = {text}", "the value")["value"]
    except ConfigError:
        return text


def dumps(table: Mapping[str, Any], comments: Mapping[Place, str] = MappingProxyType({})) -> str:
    """Write a table of strings, booleans, numbers, lists and tables, so that ``loads`` returns an equal table.

    A table's comment is above its values and may have several lines; a value's comment is at the end of its line.
    ConfigError for values that TOML cannot hold: integers beyond 64 bits, and file names that are not UTF-8.
    """
    _check(table, "the table to write")
    return "\n".join(_lines(table, (), comments)) + "\n"


def _decoded(content: bytes, source: str) -> str:
    if len(content) > BYTES_MAX:
        raise _too_long(source)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{source} is not valid TOML: byte {error.start} is not UTF-8; save the file as UTF-8"
        ) from error


def _too_long(source: str) -> ConfigError:
    return ConfigError(f"{source} is too large for a Ternbus file: more than {BYTES_MAX} bytes")


def _check(table: Mapping[str, Any], source: str) -> None:
    """Raise ConfigError for a table that is nested too deep and for integers beyond 64 bits, without recursion."""
    level: list[object] = [table]
    for _ in range(DEPTH_MAX):
        below: list[object] = []
        for value in level:
            if isinstance(value, Mapping):
                below.extend(value.values())
            elif isinstance(value, list | tuple):
                below.extend(value)
            elif isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ConfigError(f"{source} is not valid TOML: an integer of more than 64 bits")
        level = below
    if level:
        raise ConfigError(f"{source} is too deeply nested for a Ternbus file: more than {DEPTH_MAX} levels")


def _lines(table: Mapping[str, Any], place: Place, comments: Mapping[Place, str]) -> Iterator[str]:
    """A table's lines: its comment, its values, then its subtables, each with a heading."""
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
            raise TypeError(f"not a TOML value: {value!r}")


def _key(key: str) -> str:
    return key if BARE_KEY.fullmatch(key) else _quoted(key)


def _quoted(text: str) -> str:
    """A TOML basic string: a JSON string with DEL escaped, and without surrogate escapes beyond 16 bits."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate: Python's form of an undecodable byte in a file name
        raise ConfigError(f"{text!r} is not UTF-8 and cannot be written to a TOML file; rename the file") from error
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
