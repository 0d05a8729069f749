"""A new key takes the old one's place: everything else of the device stays as it is, and a crash in between is mended.

The new key is enrolled in a folder of its own beside the device's (`renewing.py`). Here what it needs is
copied over; the folder goes last, so that whatever was cut short is done again at the next start.
"""

from dataclasses import replace
from typing import Final

from ternbus.broker.errors import ConfigError
from ternbus.broker.files import read_secret, write_secret
from ternbus.broker.link.tls import CA, CERTIFICATE, TLS_KEY
from ternbus.broker.protocol.identity import Identity, seal
from ternbus.edge.core.pending_state import PendingState
from ternbus.edge.core.profile import Profile
from ternbus.edge.core.state import State
from ternbus.edge.core.uplink import Uplink
from ternbus.edge.shell.directory import KEY, DeviceDirectory, Settings
from ternbus.edge.shell.outbox import Outbox

FILES: Final = (CA, CERTIFICATE, TLS_KEY, KEY)


def succeed(home: DeviceDirectory) -> None:
    """Finish a renewal whose key is enrolled, if there is one. The folder is held.

    ConfigError while nobody knows which of the two keys the aggregator takes.
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


def inherited(kept: State, enrolled: State, settings: Settings, identity: Identity) -> State:
    """What the device keeps under its new key: all but the counters that ``enrolled`` has begun for that key.

    The update without an answer is numbered, and if need be sealed, anew.
    """
    memory = PendingState(
        replace(
            kept.under(identity.key_id),
            enrolled=True,
            seq_limit=enrolled.seq_limit,
            session=enrolled.session,
        )
    )
    public = bytes.fromhex(settings.aggregator_key)
    member = Profile(
        federation=settings.federation,
        device=settings.device,
        identity=identity,
        aggregator_public=public,
        seal=lambda plain: seal(public, plain),
        role="train",
    )
    Uplink(member=member, memory=memory).renewed()
    return memory.kept
