"""The options of `ternbus edge join` for private sums: what the device's owner pins."""

from typing import Annotated

import typer

from ternbus.broker.errors import ConfigError
from ternbus.broker.sums import bfv
from ternbus.broker.sums.terms import AGGREGATOR, BFV, MASK
from ternbus.edge.plan.sum_policy import MIN, SumPolicy

Private = Annotated[
    bool,
    typer.Option("--private", help="Send updates to private sums only; nobody then sees one alone. With --helper."),
]
Helpers = Annotated[
    list[str] | None,
    typer.Option(
        "--helper",
        metavar="KEY",
        help="Key of a helper that you trust, as `ternbus helper status` shows it; repeatable.",
    ),
]
PrivateMin = Annotated[
    int | None, typer.Option(metavar="N", help=f"Smallest number of devices in a sum; with --private. [default: {MIN}]")
]
PrivateRoster = Annotated[
    str,
    typer.Option(metavar="KIND", help='"own" if helpers must admit devices themselves; with --private.'),
]
PrivateKind = Annotated[
    str,
    typer.Option(
        metavar="KIND",
        help=f"Kind of the sums: {MASK}, or {BFV}, encrypted, for parties that all follow the protocol; with "
        f"--private. [default: {MASK}]",
    ),
]
PrivateColluding = Annotated[
    int,
    typer.Option(
        metavar="N",
        help='Devices of a sum that may help whoever sees it; for the epsilon of dp = "sum"; with --private.',
    ),
]


def pinned(
    private: bool, helpers: list[str], least: int | None, roster: str, colluding: int, *, kind: str
) -> SumPolicy | None:
    """What the options pin of private sums; None without --private."""
    if private and not helpers:
        raise ConfigError(
            "--private needs --helper KEY for each helper that you trust: an aggregator that names the helpers could "
            "be its own"
        )
    if not private and (helpers or least is not None or roster or colluding or kind):
        raise ConfigError(
            "--helper, --private-min, --private-roster, --private-kind and --private-colluding are for private sums: "
            "add --private"
        )
    if kind == BFV:
        bfv.require()
    least = MIN if least is None else least
    return SumPolicy.of(helpers, least, roster or AGGREGATOR, colluding, kind=kind or MASK) if private else None
