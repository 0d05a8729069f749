"""A device's new key, got by a new invitation in a folder beside the device's.

Until the aggregator has taken the new key nothing of the device changes: a refused renewal costs nothing, and an
interrupted one is repeated with the same invitation, which finds the same key again.
"""

from dataclasses import replace

from ternbus.broker.errors import ConfigError
from ternbus.broker.exit_codes import EXIT_DONE, EXIT_REFUSED
from ternbus.broker.protocol.invitation import Invitation
from ternbus.edge.core.actions import Stop
from ternbus.edge.learn.task import Task
from ternbus.edge.shell import agent
from ternbus.edge.shell.directory import DeviceDirectory, Settings
from ternbus.edge.shell.service import Report
from ternbus.edge.shell.succession import succeed


def renew(home: DeviceDirectory, invitation: Invitation, task: Task, options: agent.Options, report: Report) -> Stop:
    """Enrol a new key with this invitation, then make it the device's. ConfigError where it is not for this device."""
    settings = home.settings()
    if settings.code:
        raise ConfigError(f"{home.folder} has not finished joining; run `ternbus edge join` again, without --renew")
    theirs = (invitation.federation, invitation.device, invitation.aggregator_key.lower())
    if theirs != (settings.federation, settings.device, settings.aggregator_key.lower()):
        raise ConfigError(
            f"the invitation is for {invitation.device!r} in {invitation.federation!r}, or by another aggregator; "
            f"{home.folder} is {settings.device!r} in {settings.federation!r}: ask for another invitation"
        )
    with home.held():
        beside = home.beside()
        if beside.exists() and not beside.settings().code:
            succeed(home)  # an earlier one was cut short behind its last message
        elif beside.exists() and beside.settings().code != invitation.code:
            beside.discard()  # it was begun with another invitation, by which its key may be spent
        stop = agent.join(beside, _prepare(beside, invitation, settings), task, options, report)
        if stop.code == EXIT_DONE:
            succeed(home)
            return replace(stop, reason=f"{settings.device} has a new key")
        if stop.code == EXIT_REFUSED:
            beside.discard()
        return stop


def _prepare(beside: DeviceDirectory, invitation: Invitation, settings: Settings) -> Settings:
    return beside.prepare(
        invitation,
        task=settings.task,
        data=settings.data_folder,
        partition=settings.partition,
        seed=int(settings.seed or 0),
        username=settings.username,
        password_file=settings.password_path,
        promise=settings.promise,
    )
