"""The input of a health examination, as values."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ternbus.aggregator.core.situation import Situation


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceView:
    """What the ledger says of one member whose key is valid; times are Unix seconds, None: never."""

    name: str
    state: str  # idle, training, offline
    evaluates: bool = False
    joined_at: float | None = None
    seen_at: float | None = None
    failing: str = ""
    outcome: str = ""  # the last answer
    reason: str = ""
    refused_in_a_row: int = 0
    updates: int = 0  # accepted
    loss: float | None = None
    cloned: bool = False
    waits: bool = False  # an update of it waits for a merge

    @property
    def online(self) -> bool:
        return self.state != "offline"

    @property
    def trains(self) -> bool:
        return not self.evaluates


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """A certificate that the federation needs."""

    name: str
    days_left: float


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What was seen of an aggregator at the time ``now``; all times are Unix seconds."""

    now: float
    federation: str
    directory: str = "DIR"  # as commands take it
    broker: str = "BROKER"  # the broker's directory, where it is on this machine
    start: str = "run"  # the command that starts it; up: with its own broker
    state: str  # open, paused, closed
    version: int
    running: bool  # a process serves the directory
    answers: bool = True  # and does what commands ask
    situation: Situation | None = None  # of the running process; None: it has not told any
    made_at: float = 0.0  # the newest version
    intervals_s: tuple[float, ...] = ()  # between the last versions
    buffer: int = 0
    buffer_devices: int = 0
    min_devices: int = 1
    min_key: str = "merge.min_devices"  # the setting that says so
    max_wait_s: float = 0.0
    disk_free: float = 1.0  # share of the file system
    broker_disk_full: bool = False  # of a broker whose directory is on this machine
    certificates: tuple[Certificate, ...] = ()
    devices: tuple[DeviceView, ...] = ()
    evaluated: Mapping[str, int] = field(default_factory=dict)  # evaluator -> newest version that it has measured
    claim: tuple[str, int] | None = None  # a device that names a version which is not here
    group: tuple[str, ...] = ()  # that evaluates candidates
    candidate: int | None = None  # that is evaluated now
    reports: frozenset[str] = frozenset()  # who has reported on it
    withdrawn: int = 0  # candidates in a row, up to the newest version
    waits_for_helpers: Mapping[str, str] = field(default_factory=dict)  # of private sums: helper -> why, in words
    dropped: str = ""  # why the newest private updates that waited are in no version; empty: they are in one
