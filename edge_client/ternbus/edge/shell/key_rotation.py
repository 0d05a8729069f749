"""Key rotation: a new invitation enrolls a new key, which then replaces the device's old key.

`ternbus edge join --renew` keeps the counters and the outstanding update. `ternbus edge rejoin` starts the counters
anew: for a device that has seen a version or a number so high that it would ignore everything below it for ever.

The new key is enrolled in a subdirectory (`DeviceDirectory.renewal`). The device does not change until the aggregator
admits the key: after a refusal the old key stays in use, and an interrupted rotation is repeated with the same
invitation and the same new key. Then the files of the new key are copied over the old ones. The subdirectory is removed
last, so that the next start repeats a copy that a crash interrupted.
"""

from dataclasses import replace
from typing import Final

from ternbus.broker.crash_points import reached
from ternbus.broker.errors import ConfigError
from ternbus.broker.files import read_secret, write_secret
from ternbus.broker.link.tls import CA, CERTIFICATE, TLS_KEY
from ternbus.broker.protocol.endpoint import Endpoint
from ternbus.broker.protocol.identity import Identity, seal
from ternbus.broker.protocol.invitation import Invitation
from ternbus.edge.core.pending_state import PendingState
from ternbus.edge.core.profile import Profile
from ternbus.edge.core.state import State
from ternbus.edge.core.uplink import Uplink
from ternbus.edge.shell.directory import KEY, DeviceDirectory, Settings
from ternbus.edge.store import outbox as outboxes
from ternbus.edge.store.outbox import Outbox

FILES: Final = (CA, CERTIFICATE, TLS_KEY, KEY)  # the key last: it decides which key the device uses


def check(home: DeviceDirectory, invitation: Invitation) -> None:
    """Raises `ConfigError` if the device has not joined, or the invitation is for another device."""
    settings = home.settings()
    if settings.code:
        raise ConfigError(f"{home.folder} has not finished joining: run `ternbus edge join` again, without --renew")
    invited = (invitation.federation, invitation.device, invitation.aggregator_key.lower())
    if invited != (settings.federation, settings.device, settings.aggregator_key.lower()):
        raise ConfigError(
            f"the invitation is for {invitation.device!r} in {invitation.federation!r}, or of another aggregator, but "
            f"{home.folder} is {settings.device!r} in {settings.federation!r}: use an invitation for this device"
        )


def check_account(home: DeviceDirectory) -> None:
    """Raises `ConfigError` if what the device has spent of its owner's privacy budget is lost.

    A device without an owner's budget may have spent something under a plan's; with the outbox, that is lost too.
    """
    if home.settings().policy is not None and not outboxes.exists(home.folder):
        raise ConfigError(
            f"{home.folder / outboxes.FILE} is missing or empty, and with it what this device has spent of its privacy "
            "budget: restore a copy of it that was made after the last training, or add --account-lost to "
            f"`ternbus edge rejoin INVITATION.toml {home.quoted}` to begin a new budget"
        )


def begin(
    home: DeviceDirectory, invitation: Invitation, *, rejoin: bool = False
) -> tuple[DeviceDirectory, Settings] | None:
    """The directory in which to enroll the new key, and its settings. The device's directory must be locked.

    None if an earlier rotation was interrupted after its key was enrolled: it is finished, and the invitation, which
    may be the one that it used, is not needed.
    """
    renewal = home.renewal()
    if renewal.exists() and not renewal.settings().code:
        is_enough = bool(renewal.settings().rejoin) or not rejoin
        finish(home)
        if is_enough:
            return None
    elif renewal.exists() and renewal.settings().code != invitation.code:
        renewal.discard()  # its invitation is another, and may have been used with its key
    settings = home.settings()
    prepared = renewal.prepare(
        invitation,
        task=settings.task,
        data=settings.data_folder,
        partition=settings.partition,
        seed=int(settings.seed or 0),
        username=settings.username,
        password_file=settings.password_path,
        no_tls=settings.may_lack_tls and not Endpoint.parse(invitation.broker).tls,  # no way back without the owner
        policy=settings.policy,
        sums=settings.sums,
    )
    if rejoin:  # written before the invitation is used: an interrupted rotation is finished in the same way
        prepared = replace(prepared, rejoin="yes")
        renewal.write(prepared)
    return renewal, prepared


def finish(home: DeviceDirectory) -> None:
    """Make an enrolled new key the device's, if there is one. The device's directory must be locked.

    Raises `ConfigError` while it is unknown which of the two keys the aggregator accepts.
    """
    renewal = home.renewal()
    if not renewal.exists():
        return
    renewed = renewal.settings()
    if renewed.code:
        command = "edge rejoin" if renewed.rejoin else "edge join --renew"
        raise ConfigError(
            f"the key rotation of {home.folder} was interrupted, and it is not known which key is valid: "
            f"run `ternbus {command} INVITATION.toml {home.quoted}` again"
        )
    identity, settings = renewal.identity(), home.settings()
    settings = replace(settings, broker=renewed.broker, no_tls=renewed.no_tls)
    with Outbox(renewal.folder, identity.key_id) as outbox:
        enrolled = outbox.state
    with Outbox(home.folder, identity.key_id) as outbox:
        if outbox.state.key != identity.key_id or not outbox.state.enrolled:
            if renewed.rejoin:
                state = numbered(outbox.state.rejoined(identity.key_id), enrolled)
            else:
                state = inherited(outbox.state, enrolled, settings, identity)
            outbox.save(state, None, outbox.counters)
    reached("rotation-saved")
    for name in FILES:
        if (renewal.folder / name).exists():
            write_secret(home.folder / name, read_secret(renewal.folder / name))
            reached("rotation-copied")
    home.write(settings)
    reached("rotation-settings-written")
    renewal.discard()


def numbered(state: State, enrolled: State) -> State:
    """The state of an enrolled key: what belongs to the key continues from ``enrolled``."""
    counters = {name: getattr(enrolled, name) for name in ("seq_limit", "session", "receipt_seq")}
    return replace(state, enrolled=True, **counters)


def inherited(state: State, enrolled: State, settings: Settings, identity: Identity) -> State:
    """The device's state under the new key; sequence numbers and session continue from ``enrolled``.

    The outstanding update is renumbered, and sealed anew if it was sealed.
    """
    pending = PendingState(numbered(state.with_key(identity.key_id), enrolled))
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
