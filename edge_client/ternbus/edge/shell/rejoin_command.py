"""The command `ternbus edge rejoin`: the way back for a device whose counters lead nowhere, or whose outbox is lost."""

from typing import Annotated

import typer

from ternbus.broker.json_output import json_output
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.shell import agent
from ternbus.edge.shell.arguments import AsJson, Dir, Timeout
from ternbus.edge.shell.directory import DeviceDirectory
from ternbus.edge.shell.invitations import InvitationFile, load_invitation
from ternbus.edge.shell.options import Options
from ternbus.edge.shell.printer import Printer


def rejoin(
    *,
    invitation: InvitationFile,
    directory: Dir,
    account_lost: Annotated[
        bool, typer.Option("--account-lost", help="Rejoin though the record of the privacy budget is lost.")
    ] = False,
    timeout: Timeout = None,
    as_json: AsJson = False,
) -> None:
    """Join again under the same name, with a new key and new counters.

    Use it for a device that ignores every version because it once saw a far higher one, or whose outbox.db is gone.
    Get an invitation for the device's name with `ternbus aggregator invite`. Settings, data, the personal model,
    the receipts and the privacy account stay; an update without a receipt is dropped. `ternbus edge join --renew`
    replaces the key only.

    Example: ternbus edge rejoin pi-7.toml pi-7
    """
    home = DeviceDirectory(directory)
    asked = load_invitation(invitation, directory)
    settings = home.settings()
    options = Options(timeout_s=timeout)
    with json_output(as_json) as output:
        printer, task = Printer(as_json=as_json, output=output), load_task(settings.task)
        stop = agent.renew(home, asked, task, options, printer, rejoin=True, account_lost=account_lost)
        raise typer.Exit(printer.finish(stop, ended=True))
