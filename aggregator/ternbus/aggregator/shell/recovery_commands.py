"""`ternbus aggregator check`: whether a folder holds what was written to it, as a command."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ternbus.aggregator.shell import checking
from ternbus.aggregator.shell.arguments import AsJson
from ternbus.broker.exit_codes import EXIT_FAILED


def check(
    directory: Annotated[Path, typer.Argument(metavar="DIR|BACKUP", help="Directory of an aggregator, or a backup.")],
    as_json: AsJson = False,
) -> None:
    """Check every checksum, every file, the log of merges, and that it opens. Exit code 1 if there are faults.

    Nothing in the folder is changed, whether or not a process serves it. `ternbus aggregator repair` goes on from the
    last version that is sound.

    Example: ternbus aggregator check agg
    """
    found = checking.check(directory)
    if as_json:
        facts = {"ok": not found.faults, "faults": list(found.faults), "federation": found.federation}
        counts = {"version": found.version, "updates": found.updates, "log_entries": found.log_entries}
        typer.echo(json.dumps({**facts, **counts}))
    elif found.faults:
        typer.echo("\n".join([f"{directory} is not as it was written: {len(found.faults)} faults", *found.faults]))
    else:
        typer.echo(
            f"{directory} is sound: {found.federation} at version {found.version}, "
            f"{found.updates} updates in {found.log_entries} entries of the log"
        )
    if found.faults:
        raise typer.Exit(EXIT_FAILED)
