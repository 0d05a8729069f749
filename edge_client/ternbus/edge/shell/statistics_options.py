"""The options of `ternbus edge join` for federated statistics: whether, and how often a day, the owner allows them."""

from typing import Annotated, Final

import typer

from ternbus.broker.errors import ConfigError

PER_DAY: Final = 4
PER_DAY_MAX: Final = 50

Statistics = Annotated[
    bool,
    typer.Option(
        "--statistics",
        help="Answer the aggregator's requests for statistics of this device's data; see docs/statistics.md.",
    ),
]
StatisticsPerDay = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=PER_DAY_MAX,
        metavar="N",
        help=f"Most requests for statistics a day; with --statistics. [default: {PER_DAY}]",
    ),
]


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
