"""The records that the core saves. Each is one fact, and durable before the actions that follow from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ternbus.aggregator.core.registry import DEVICE
from ternbus.aggregator.core.search_state import SearchState
from ternbus.aggregator.core.situation import Situation
from ternbus.aggregator.merge.accepted import AcceptedUpdate
from ternbus.aggregator.merge.optimizer import ServerState
from ternbus.aggregator.merge.recipe import Recipe
from ternbus.aggregator.sums.private_sets import PrivateUpdate
from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.merge_log import Signed
from ternbus.broker.protocol.messages import Metrics, Status
from ternbus.broker.protocol.model_messages import SnapshotRef
from ternbus.broker.protocol.schema import Vector


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionBegun:
    """A connection attempt with this session number is about to be made."""

    session: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SeqReserved:
    """No sequence number up to this one will be used again after a restart."""

    upto: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceEnrolled:
    """A key is admitted for a device; it spends the invitation and replaces the key before it."""

    device: str
    public: bytes
    proof: bytes
    role: str = DEVICE


@dataclass(frozen=True, slots=True, kw_only=True)
class InvitationCancelled:
    """A device's open invitation is void."""

    device: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRevoked:
    """A device's key, and its open invitation, are void for good."""

    device: str
    why: str
    drop: bool  # of its accepted updates, those that no version has yet are never to be merged


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysRevoked:
    """Keys, each of a device, are void for good: a list says so that this aggregator published once."""

    keys: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateAccepted:
    """An update that will be merged, and its block as it came (unsealed); of a private one its words, masked."""

    update: AcceptedUpdate
    body: bytes
    private: PrivateUpdate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateAnswered:
    """An update that will not be merged, and what its sender was told."""

    device: str
    key: KeyId
    seq: int
    outcome: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdatesDropped:
    """Private updates on a base, each of a device, that no version will contain."""

    base: int
    devices: tuple[str, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SetMade:
    """Private updates whose sum helpers are asked to prepare; ``staleness`` is that of all of them."""

    digest: bytes
    context: bytes
    base: int
    staleness: int
    devices: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SetOpening:
    """All helpers are prepared, and are asked to open the set: it is never abandoned."""

    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SetOpened:
    """The sum of a set's words, without masks: the next version has it."""

    digest: bytes
    total: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAbandoned:
    """The set is never opened; its updates are in none, and helpers are asked to give them free."""

    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SetForgotten:
    """Nobody is asked for the set any more."""

    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AsksCounted:
    """The sets for which each helper has not answered: a hint for those who look at the status."""

    unanswered: Mapping[str, tuple[bytes, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosingBegun:
    """The operator wants the federation closed; helpers are waited for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionMade:
    """A merge of all updates that no version has yet, or of sets of private ones, and the block that made it."""

    version: int
    digest: bytes
    updates: int
    staleness_mean: float
    staleness_max: int
    codec: str
    encoding: str
    body: bytes
    entry: Signed  # of the log of merges; it names all private updates that were dropped before
    sets: tuple[bytes, ...] | None = None  # of private updates, by digest; None: there are none in this federation
    candidate: str = ""  # what becomes of one: `published` as this version, or `withdrawn` in its favour
    search: SearchState | None = field(default=None, repr=False)  # of the federation, if it has one


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateMade:
    """Every accepted update that no version has yet is in this candidate for the next one."""

    version: int
    digest: bytes
    codec: str
    encoding: str
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateEvaluated:
    """A device evaluated the candidate."""

    device: str
    seq: int
    metrics: Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateDissolved:
    """There is no candidate any more; its updates wait as before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotTaken:
    """The whole state at a version; what led up to it is no longer needed to start again."""

    version: int
    published: Vector
    server: ServerState
    named: SnapshotRef
    recipe: Recipe  # by which the merges that follow are made
    at_leisure: bool = False  # nothing that follows depends on it: its vectors may become durable later


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionsWithdrawn:
    """A rollback: updates on versions below ``below`` are stale, and those that wait are never to be merged."""

    below: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FramesRetained:
    """Frames by topic that the broker retains from now on; an empty one clears its topic."""

    frames: tuple[tuple[str, bytes], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TopicsShown:
    """All topics that the broker may hold for Home Assistant: what is there and no longer wanted is cleared."""

    topics: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotsChanged:
    """Deltas are laid out over another number of slots from now on."""

    slots: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChanged:
    """Open, paused or closed."""

    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsReceived:
    """A device evaluated a version."""

    device: str
    seq: int
    metrics: Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusedUpdates:
    """A device's updates that were invalid or stale; ``in_a_row`` are the last of them without an accepted one."""

    invalid: int = 0
    stale: int = 0
    in_a_row: int = 0
    after_accepted: bool = False  # an accepted one came before these: they do not add to those counted before


@dataclass(frozen=True, slots=True, kw_only=True)
class Observed:
    """What is only counted or hinted at, gathered since the last such record."""

    refused: Mapping[str, int]  # frames dropped, by reason
    outcomes: Mapping[str, int]  # answers that no other record stands for: a lower seq, busy
    update_bytes: Mapping[str, int]  # PUBLISH packets on ``update``, by device
    statuses: Mapping[str, Status]  # the last one of each device
    claim: tuple[str, int] | None = None  # a device, and the version that it names and that there is not yet
    refused_updates: Mapping[str, RefusedUpdates] = field(default_factory=dict)  # by device


@dataclass(frozen=True, slots=True, kw_only=True)
class SituationTold:
    """What the running process knows beside its ledger: for those who look at the status, and nothing else."""

    situation: Situation


@dataclass(frozen=True, slots=True, kw_only=True)
class HelperEnrolled:
    """A helper has shown that it has its pinned key; it spends the invitation."""

    helper: str
    public: bytes
    proof: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class HelperInvitationCancelled:
    """A helper's open invitation is void."""

    helper: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HelperObserved:
    """What a helper said last; ``count`` is the highest number of steps that it has stated, -1 for none."""

    helper: str
    count: int
    status: Status | None = None
    answered: bool = False  # it answered for a set


@dataclass(frozen=True, slots=True, kw_only=True)
class CardReceived:
    """A helper's newest card: content and signature."""

    helper: str
    card: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class TermsMade:
    """Terms of private sums, which contexts name by their digest."""

    digest: bytes
    content: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextBegun:
    """Updates on ``base`` have this context and no other; bases below ``oldest`` are stale."""

    base: int
    model: bytes
    plan: bytes
    terms: bytes
    oldest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsAsked:
    """Devices are asked for statistics of their data; what was asked before is forgotten, with its answers."""

    request: bytes  # as in heads
    wait_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsAnswered:
    """A device has answered a request for statistics, or not; ``pooled`` is the new sum, empty where it is the old."""

    device: str
    outcome: str
    pooled: bytes = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsEnded:
    """No more answers are taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestDone:
    """What a command asked for is in force."""

    request: int
    error: str = ""


Record = (
    SessionBegun
    | SeqReserved
    | DeviceEnrolled
    | InvitationCancelled
    | DeviceRevoked
    | KeysRevoked
    | UpdateAccepted
    | UpdateAnswered
    | UpdatesDropped
    | SetMade
    | SetOpening
    | SetOpened
    | SetAbandoned
    | SetForgotten
    | AsksCounted
    | ClosingBegun
    | VersionMade
    | CandidateMade
    | CandidateEvaluated
    | CandidateDissolved
    | SnapshotTaken
    | VersionsWithdrawn
    | FramesRetained
    | TopicsShown
    | SlotsChanged
    | StateChanged
    | MetricsReceived
    | Observed
    | SituationTold
    | HelperEnrolled
    | HelperInvitationCancelled
    | HelperObserved
    | CardReceived
    | TermsMade
    | ContextBegun
    | StatisticsAsked
    | StatisticsAnswered
    | StatisticsEnded
    | RequestDone
)
