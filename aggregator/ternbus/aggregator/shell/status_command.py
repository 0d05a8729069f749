"""The command `ternbus aggregator status`, for people, programs and monitors; the health comes first."""

import json
import time
from pathlib import Path
from typing import Annotated, Final

import typer

from ternbus.aggregator.core.health import State, monitor_text
from ternbus.aggregator.shell import administration, examination, health_text, status_text
from ternbus.aggregator.shell.arguments import AsJson, DirAsRoot
from ternbus.aggregator.shell.examination import Examination
from ternbus.aggregator.store.ledger import blaming
from ternbus.broker.errors import FederationError
from ternbus.broker.folder_owner import act_as_owner

VERSIONS_MAX: Final = 100

Check = Annotated[
    bool,
    typer.Option(
        "--check", help="Print one line for a monitor; exit code 0 fine, 1 degraded, 2 down, 3 unknown (Nagios)."
    ),
]


def status(directory: DirAsRoot, as_json: AsJson = False, check: Check = False) -> None:
    """Show the health, the version, the buffer, counters, devices and the last versions.

    Health comes first: whether a process serves DIR and reaches its broker, the age of the last version, whom the next
    one waits for, disk, certificates, and what is wrong with which device. `--json` has the last 100 versions.

    With `--check` the exit code is 0 if nothing is wrong, 1 if something is and versions are still made, 2 if none can
    be made, 3 if DIR cannot be read. Without it the exit code is 0 if DIR can be read.

    Example: ternbus aggregator status agg --check
    """
    if not check:
        act_as_owner(directory)
        with blaming(directory):
            typer.echo(_shown(directory, as_json=as_json))
        return
    try:
        act_as_owner(directory)
        with blaming(directory):
            health = examination.look(directory, examination.INTERVALS).health
            line = json.dumps(health.as_json()) if as_json else health.line()
    except (FederationError, OSError) as error:
        typer.echo(monitor_text(State.UNKNOWN.name, str(error)))
        raise typer.Exit(State.UNKNOWN) from error
    typer.echo(line)
    raise typer.Exit(health.state)


def _shown(directory: Path, *, as_json: bool) -> str:
    seen = looked(directory, VERSIONS_MAX if as_json else examination.INTERVALS)
    if as_json:
        return json.dumps(seen.found)
    opening = health_text.lines(seen.health, time.time(), administration.load_settings(directory).broker)
    return "\n".join([*opening, "", status_text.summary(seen.found)])


def looked(directory: Path, versions_max: int) -> Examination:
    """The examination; where the running process does not answer, a line on standard error says so."""
    found = examination.look(directory, versions_max)
    if found.fault:
        typer.echo(f"ternbus: as the ledger has it: {found.fault}", err=True)
    return found
