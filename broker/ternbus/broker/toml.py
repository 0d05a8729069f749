"""TOML that somebody else wrote, read within bounds: what comes back can be looked at, shown and written again."""

import tomllib
from typing import Any, Final

from ternbus.broker.errors import ConfigError

DEPTH_MAX: Final = 16  # Ternbus' own files need four; repr and comparison recurse, so depth is bounded once, here
CHARACTERS_MAX: Final = 2**20


def read(text: str, source: str) -> dict[str, Any]:
    """The table in ``text``; ConfigError, naming ``source``, for no TOML, or none that a file of ours can be."""
    if len(text) > CHARACTERS_MAX:
        raise ConfigError(f"{source} is not one of ours: longer than {CHARACTERS_MAX} characters")
    try:
        table = tomllib.loads(text)
    # A TOMLDecodeError is a ValueError. So is what int() says of thousands of digits, which tomllib lets through.
    except ValueError as error:
        raise ConfigError(f"{source} is not TOML: {error}") from error
    except RecursionError as error:
        raise ConfigError(f"{source} is not one of ours: nested deeper than {DEPTH_MAX}") from error
    _check(table, source)
    return table


def _check(table: dict[str, Any], source: str) -> None:
    """Raise ConfigError for what is nested too deep (without recursion) and for integers beyond TOML's 64 bits."""
    level: list[object] = [table]
    for _ in range(DEPTH_MAX):
        below: list[object] = []
        for value in level:
            if isinstance(value, dict):
                below.extend(value.values())
            elif isinstance(value, list):
                below.extend(value)
            elif isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise ConfigError(f"{source} is not TOML: an integer of more than 64 bits")
        level = below
    if level:
        raise ConfigError(f"{source} is not one of ours: nested deeper than {DEPTH_MAX}")
