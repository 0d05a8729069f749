"""The command `ternbus edge rejoin`: the way back for a device whose counters lead nowhere, or whose outbox is lost."""

from typing import Annotated

import typer

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.shell import agent
from ternbus.edge.shell.agent import Options
from ternbus.edge.shell.arguments import AsJson, Dir, InvitationFile, Timeout, load_invitation
from ternbus.edge.shell.directory import DeviceDirectory, Settings
from ternbus.edge.shell.printer import Printer
from ternbus.edge.store import outbox, outbox_salvage


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
    home, printer = DeviceDirectory(directory), Printer(as_json=as_json)
    asked = load_invitation(invitation, directory)
    settings = home.settings()
    with home.locked():
        outbox_salvage.settle(home.folder)
    _check_account(home, settings, account_lost=account_lost)
    stop = agent.renew(home, asked, load_task(settings.task), Options(timeout_s=timeout), printer, rejoin=True)
    raise typer.Exit(printer.finish(stop, ended=True))


def _check_account(home: DeviceDirectory, settings: Settings, *, account_lost: bool) -> None:
    """Raises `ConfigError` where what was spent of a privacy budget is lost, unless its owner says so."""
    if settings.policy is None or account_lost or outbox.exists(home.folder):
        return
    raise ConfigError(
        f"{home.folder / outbox.FILE} is missing, and with it what this device has spent of its privacy budget: "
        "restore the file, or add --account-lost to begin a new budget"
    )
