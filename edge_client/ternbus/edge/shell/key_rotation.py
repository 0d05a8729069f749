"""Key rotation: a new invitation enrolls a new key, which then takes the place of the device's old one.

The new key is enrolled in a folder of its own inside the device's (`DeviceDirectory.beside`). Until the aggregator has
admitted it nothing of the device changes: a refused rotation costs nothing, and an interrupted one is repeated with the
same invitation, which finds the same key again. Then what the new key needs is copied over, and everything else of the
device stays. The folder goes last, so that a copy that a crash cut short is made again at the next start.
"""

from dataclasses import replace
from typing import Final

from ternbus.broker.errors import ConfigError
from ternbus.broker.files import read_secret, write_secret
from ternbus.broker.link.tls import CA, CERTIFICATE, TLS_KEY
from ternbus.broker.protocol.identity import Identity, seal
from ternbus.broker.protocol.invitation import Invitation
from ternbus.edge.core.pending_state import PendingState
from ternbus.edge.core.profile import Profile
from ternbus.edge.core.state import State
from ternbus.edge.core.uplink import Uplink
from ternbus.edge.shell.directory import KEY, DeviceDirectory, Settings
from ternbus.edge.shell.outbox import Outbox

FILES: Final = (CA, CERTIFICATE, TLS_KEY, KEY)  # the key last: with it the device is the new one


def check(home: DeviceDirectory, invitation: Invitation) -> None:
    """ConfigError where the device has not joined, or the invitation is for another."""
    settings = home.settings()
    if settings.code:
        raise ConfigError(f"{home.folder} has not finished joining; run `ternbus edge join` again, without --renew")
    invited = (invitation.federation, invitation.device, invitation.aggregator_key.lower())
    if invited != (settings.federation, settings.device, settings.aggregator_key.lower()):
        raise ConfigError(
            f"the invitation is for {invitation.device!r} in {invitation.federation!r}, or by another aggregator; "
            f"{home.folder} is {settings.device!r} in {settings.federation!r}: ask for another invitation"
        )


def begin(home: DeviceDirectory, invitation: Invitation) -> tuple[DeviceDirectory, Settings]:
    """The folder in which the new key is to be enrolled, and its settings. The device's folder is held."""
    beside = home.beside()
    if beside.exists() and not beside.settings().code:
        finish(home)  # an earlier rotation that was enrolled and then cut short
    elif beside.exists() and beside.settings().code != invitation.code:
        beside.discard()  # it was begun with another invitation, which may have been used with its key
    settings = home.settings()
    prepared = beside.prepare(
        invitation,
        task=settings.task,
        data=settings.data_folder,
        partition=settings.partition,
        seed=int(settings.seed or 0),
        username=settings.username,
        password_file=settings.password_path,
        promise=settings.promise,
    )
    return beside, prepared


def finish(home: DeviceDirectory) -> None:
    """Make an enrolled new key the device's, if there is one. The device's folder is held.

    ConfigError while it is unknown which of the two keys the aggregator takes.
    """
    beside = home.beside()
    if not beside.exists():
        return
    renewed = beside.settings()
    if renewed.code:
        raise ConfigError(
            f"a new key for {home.folder} was begun, and which one is good is not known yet: "
            f"run `ternbus edge join --renew INVITATION {home.folder}` again"
        )
    identity, settings = beside.identity(), replace(home.settings(), broker=renewed.broker)
    with Outbox(beside.folder, identity.key_id) as outbox:
        enrolled = outbox.kept
    with Outbox(home.folder, identity.key_id) as outbox:
        if outbox.kept.key != identity.key_id or not outbox.kept.enrolled:
            outbox.save(inherited(outbox.kept, enrolled, settings, identity), None, outbox.counters)
    for name in FILES:
        if (beside.folder / name).exists():
            write_secret(home.folder / name, read_secret(beside.folder / name))
    home.write(settings)
    beside.discard()


def inherited(state: State, enrolled: State, settings: Settings, identity: Identity) -> State:
    """The device's state under the new key: all but the counters, which ``enrolled`` has begun for that key.

    The outstanding update is renumbered, and sealed anew if it was sealed.
    """
    pending = PendingState(
        replace(
            state.with_key(identity.key_id),
            enrolled=True,
            seq_limit=enrolled.seq_limit,
            session=enrolled.session,
        )
    )
    public = bytes.fromhex(settings.aggregator_key)
    profile = Profile(
        federation=settings.federation,
        device=settings.device,
        identity=identity,
        aggregator_public=public,
        seal=lambda plain: seal(public, plain),
        role="train",
    )
    Uplink(profile=profile, pending=pending).key_changed()
    return pending.state
