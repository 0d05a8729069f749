"""Arguments and options that several commands of `ternbus aggregator` share."""

from pathlib import Path
from typing import Annotated

import typer

from ternbus.broker.folder_owner import as_owner
from ternbus.broker.sums.terms import BFV, MASK

Dir = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of the aggregator.", callback=as_owner)]
# Of commands that also read or write elsewhere, where root may and the directory's owner perhaps may not. Files that
# they replace or make in the directory, as SQLite does, get the owner of their folder.
DirAsRoot = Annotated[Path, typer.Argument(metavar="DIR", help="Directory of the aggregator.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Setting of aggregator.toml, for example merge.buffer_size=1; repeatable."
    ),
]
Private = Annotated[
    bool, typer.Option("--private", help="Private sums: no single update is ever seen; see docs/private-sums.md.")
]
PrivateKind = Annotated[
    str,
    typer.Option(
        metavar="KIND",
        help=f"Kind of private sums: {MASK}, or {BFV}, encrypted, for parties that all follow the protocol; with "
        f"--private. [default: {MASK}]",
    ),
]
HelperCards = Annotated[
    list[Path] | None,
    typer.Option("--helper", metavar="FILE", help="Card of a helper, its card.toml; with --private; repeatable."),
]
InvitedHelpers = Annotated[
    list[str] | None,
    typer.Option("--helper", metavar="NAME", help="Helper of private sums to invite; repeatable."),
]
ExpiresIn = Annotated[
    str | None,
    typer.Option(
        metavar="TIME",
        help="Lifetime of the invitation: 30m, 12h, 7d, 2w. [default: invitations.expire_after_s, 7d]",
    ),
]
AllowPlanKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-plan-key",
        metavar="NAME",
        help="Plan key to accept although neither Ternbus nor the task knows it; repeatable.",
    ),
]
