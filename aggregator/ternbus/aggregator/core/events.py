"""The core's inputs and outputs: events, named in the past tense, and actions, named in the imperative."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ternbus.aggregator.core.records import Record
from ternbus.aggregator.core.registry import Invited
from ternbus.aggregator.merge.accepted import Journal
from ternbus.aggregator.merge.influence import Measured
from ternbus.broker.log_levels import INFO
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.schema import Vector


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """The broker accepted us; frames may have at most ``frame_bytes``.

    ``most_bytes`` is the largest frame that the broker says it takes; 0 if it does not say.
    """

    frame_bytes: int
    most_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectFailed:
    """What ``Connect`` asked for has led to no connection; ``reason`` says why, for people."""

    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnected:
    """The connection is gone, and with it what was not acknowledged; ``reason`` says why, for people."""

    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The broker acknowledged a retained message, one of ``Core.awaited``; it may not hold it even so."""

    topic: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The broker refused a message, or could not be sent it; ``reason`` in the words of MQTT's reason codes."""

    topic: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A frame that is authentic under this public key; whether the key may still sign is the core's question.

    ``content`` is that of an update in one unsealed part, where that was read ahead. None means nothing.
    ``decoded_bytes`` is the work of that, also where it was in vain.
    """

    frame: Frame
    public: bytes
    content: Measured | None = None
    decoded_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageArrived:
    """An MQTT message, of which nothing is believed yet; ``packet_bytes`` is its size on the wire.

    ``opened`` is the payload's frame where it was looked into ahead. ``clock_s`` is the time of day in Unix seconds,
    against which only the end of an invitation is held. ``waited_s`` is the time since its arrival: if that is long,
    devices are limited to their shares of the work.
    """

    topic: str
    payload: bytes
    packet_bytes: int = 0
    opened: Opened | None = None
    clock_s: float = 0.0
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MessagesDropped:
    """``count`` messages were dropped unread on arrival, all for one reason."""

    reason: str
    count: int
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InvitationsRead:
    """The open invitations by device, and those of helpers by helper, as the ledger has them now."""

    codes: Mapping[str, Invited]
    helpers: Mapping[str, Invited] = field(default_factory=dict)
    request: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelRequested:
    """The operator wants the open invitation of a device, or of a helper, void."""

    device: str
    request: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RevokeRequested:
    """The operator wants a device revoked, told ``why``; its updates in the buffer dropped unless ``keep``.

    ``buffer`` is all that waits for a merge, as the ledger has it.
    """

    device: str
    why: str = ""
    keep: bool = False
    buffer: Journal = field(default_factory=Journal)
    request: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StateRequested:
    """The operator wants the federation open, paused or closed."""

    state: str
    request: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RollbackRequested:
    """The operator wants a model back: ``vector``, that of version ``to``, or of a file (`OTHER_MODEL`).

    ``error`` is why it cannot be had.
    """

    to: int
    vector: Vector | None = None
    error: str = ""
    request: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsRequested:
    """The operator wants statistics of the devices' data, and waits so long; as in `StatisticsRequest`.

    Without ``noise`` it is the plan's.
    """

    kinds: tuple[str, ...]
    features: tuple[str, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    bins: int = 0
    labels: tuple[str, ...] = ()
    noise: float | None = None
    wait_s: float = 60.0
    request: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class CountsRequested:
    """The operator looks at the status: counters and the situation have to be on disk.

    ``unacknowledged_s`` is how long the broker has acknowledged nothing of what it was sent.
    """

    request: int = 0
    unacknowledged_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskChecked:
    """How much of the file system with the ledger is free, from 0 to 1."""

    free: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeReached:
    """Nothing happened but time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequested:
    """The operator ends this process."""


Event = (
    Connected
    | ConnectFailed
    | Disconnected
    | Published
    | Refused
    | MessageArrived
    | MessagesDropped
    | InvitationsRead
    | CancelRequested
    | RevokeRequested
    | StateRequested
    | RollbackRequested
    | StatisticsRequested
    | CountsRequested
    | DiskChecked
    | TimeReached
    | StopRequested
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """Make a record durable."""

    record: Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Connect:
    """Connect to the broker with this last will; ``Connected`` or ``ConnectFailed`` tells how it went."""

    will_topic: str
    will_payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscribe:
    """Subscribe to these filters with QoS 1."""

    filters: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsubscribe:
    """Unsubscribe from these filters."""

    filters: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """Publish with QoS 1. Lost where there is no connection: the protocol sends again what matters."""

    topic: str
    payload: bytes
    retain: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RepublishRetained:
    """Publish the saved frames of these retained topics again, unchanged and in this order; log ``why``, if given."""

    topics: tuple[str, ...]
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """Tell the operator: ``text`` for people, ``event`` and ``fields`` for programs."""

    text: str
    level: str = INFO
    event: str = "note"
    fields: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """All is done: flush, disconnect, exit; with ``error`` where going on would do harm."""

    error: str = ""


Action = Save | Connect | Subscribe | Unsubscribe | Publish | RepublishRetained | Log | Stop
