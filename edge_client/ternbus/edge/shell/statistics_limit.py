"""How many requests for federated statistics a device's owner allows.

The device's process imports this module, which needs no typer.
"""

from typing import Final

from ternbus.broker.errors import ConfigError

PER_DAY: Final = 4
PER_DAY_MAX: Final = 50


def allowed(statistics: bool, per_day: int | None) -> int | None:
    """How many requests a day the options allow; None for none at all."""
    if per_day is not None and not statistics:
        raise ConfigError("--statistics-per-day limits requests for statistics: add --statistics")
    return None if not statistics else per_day or PER_DAY


def check_setting(text: str) -> int | None:
    """The value of `statistics` in edge.toml. Raises `ConfigError` for what is no number of requests."""
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= PER_DAY_MAX):
        raise ConfigError(
            f'edge.toml: statistics is {text!r}: give requests a day, "1" to "{PER_DAY_MAX}", or leave out'
        )
    return int(text)
