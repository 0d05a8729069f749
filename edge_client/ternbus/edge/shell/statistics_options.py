"""The options of `ternbus edge join` for federated statistics: whether, and how often a day, the owner allows them."""

from typing import Annotated

import typer

from ternbus.edge.shell.statistics_limit import PER_DAY, PER_DAY_MAX

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
