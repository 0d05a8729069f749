"""The metrics of an aggregator as a table: names, meanings, labels, and how each is read from status and health.

Names and units follow Prometheus' conventions. No label has a value that a peer can choose: devices are counted by
their state, refusals by a reason of a closed set. `federation` is the operator's name of the directory.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ternbus.aggregator.core.findings import Level
from ternbus.aggregator.core.health import Health, State
from ternbus.aggregator.core.registry import ACTIVE, REVOKED
from ternbus.aggregator.dashboard.closed_sets import FINDINGS, LOST, OTHER, REFUSED
from ternbus.aggregator.settings import Settings
from ternbus.broker.protocol.messages import CLOSED, OPEN, PAUSED
from ternbus.broker.server import refusals

VERSIONS: Final = 20  # the newest, over which staleness is averaged
FEDERATION: Final = "federation"  # the label that all samples have
GAUGE, COUNTER = "gauge", "counter"
STATES: Final = (State.FINE, State.DEGRADED, State.DOWN)
ANSWERS: Final = ("accepted", "stale", "invalid", "duplicate", "busy")
CERTIFICATES: Final = {"aggregator": "the aggregator", "authority": "the authority", "broker": "the broker"}

Values = Mapping[str, float]  # by the value of the label


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What there is to tell of a directory at one moment."""

    now: float  # Unix seconds
    software: str
    found: Mapping[str, Any]  # the status, as JSON values
    health: Health
    settings: Settings
    broker_refused: Values | None  # clients and requests, by reason; None: the broker is elsewhere

    @property
    def federation(self) -> str:
        return self.settings.federation

    @property
    def counts(self) -> Mapping[str, Any]:
        return dict(self.found["counts"])

    @property
    def members(self) -> list[Mapping[str, Any]]:
        """Those whose key is valid."""
        return [row for row in self.found["devices"].values() if row["key_state"] == ACTIVE]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A metric: its name, what it means, and the values that its label may have.

    ``read`` gives a value, or one for each value of the label, or None where there is none. A label's value that is
    missing is 0, or left out if ``sparse``; one that is not in ``values`` counts as `other`, where there is that.
    """

    name: str
    help: str
    read: Callable[[Seen], float | Values | None]
    kind: str = GAUGE
    label: str = ""  # beside `federation`
    values: tuple[str, ...] = ()  # of the label; empty: any
    sparse: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        return (FEDERATION, self.label) if self.label else (FEDERATION,)

    def samples(self, seen: Seen) -> list[tuple[tuple[str, ...], float]]:
        """(values of the labels, value) of each sample."""
        value = self.read(seen)
        if value is None:
            return []
        if not isinstance(value, Mapping):
            return [((seen.federation,), value)]
        return [((seen.federation, label), number) for label, number in self._bounded(value).items()]

    def _bounded(self, found: Values) -> Values:
        if not self.values:
            return found
        known = {each: found.get(each, 0.0) for each in self.values if each in found or not self.sparse}
        if OTHER in known:
            known[OTHER] += sum(number for each, number in found.items() if each not in self.values)
        return known


def _one_of(*values: str, is_now: str) -> Values:
    return {each: float(each == is_now) for each in values}


def _counted(states: list[str]) -> Values:
    return {each: float(states.count(each)) for each in set(states)}


def _findings(seen: Seen) -> Values:
    return _counted([each.kind for each in seen.health.findings if each.level is not Level.NOTE])


def _trainers(seen: Seen) -> Values:
    return _counted([row["state"] for row in seen.members if not row["evaluates"]])


def _evaluators(seen: Seen) -> Values:
    judges = [row for row in seen.members if row["evaluates"]]
    return _counted(["offline" if row["state"] == "offline" else "online" for row in judges])


def _helpers(seen: Seen) -> Values | None:
    private = seen.found.get("private")
    return None if private is None else _counted([row["state"] for row in private["helpers"].values()])


def _answered(seen: Seen) -> Values:
    """Of `invalid` the map in the status has messages too; the devices' own counts have updates alone."""
    refused = sum(row["invalid"] for row in seen.found["devices"].values())
    return {**{each: seen.counts[each] for each in ANSWERS if each != "invalid"}, "invalid": refused}


def _refused(seen: Seen) -> Values:
    return {reason: count for reason, count in seen.counts["invalid"].items() if reason not in LOST}


def _lost(seen: Seen) -> Values:
    return {reason: count for reason, count in seen.counts["invalid"].items() if reason in LOST}


def _mean_staleness(seen: Seen) -> float | None:
    rows = [row for row in seen.found["versions"] if row["updates"]]
    total = sum(row["updates"] for row in rows)
    return sum(row["staleness_mean"] * row["updates"] for row in rows) / total if total else None


def _score(seen: Seen) -> tuple[int, float] | None:
    """The newest of the last versions that has the primary metric of an evaluator, and its value."""
    metric = seen.found["metric"]
    measured = [(row["version"], row["metrics"][metric]) for row in seen.found["versions"] if metric in row["metrics"]]
    return max(measured) if measured else None


def _expiries(seen: Seen) -> Values:
    days = {each.name: each.days_left for each in seen.health.certificates}
    return {label: seen.now + 86400 * days[name] for label, name in CERTIFICATES.items() if name in days}


FAMILIES: Final = (
    Family(
        name="ternbus_build_info",
        help="1; the software that reads the directory.",
        label="version",
        read=lambda seen: {seen.software: 1.0},
    ),
    Family(
        name="ternbus_health",
        help="1 for the health in one word, 0 for the others; `ternbus aggregator status` says what is wrong.",
        label="state",
        values=tuple(each.name.lower() for each in STATES),
        read=lambda seen: {seen.health.state.name.lower(): 1.0},
    ),
    Family(
        name="ternbus_findings",
        help="Things to mend, by kind (docs/operating.md); those that are only noted are left out.",
        label="kind",
        values=(*FINDINGS, OTHER),
        read=_findings,
    ),
    Family(
        name="ternbus_running",
        help="1 while a process serves the directory and answers.",
        read=lambda seen: float(seen.health.running_since is not None),
    ),
    Family(
        name="ternbus_start_timestamp_seconds",
        help="Start of the process; missing while none runs.",
        read=lambda seen: seen.health.running_since,
    ),
    Family(
        name="ternbus_broker_connected",
        help="1 while the process has a connection to its broker.",
        read=lambda seen: float(seen.health.connected),
    ),
    Family(
        name="ternbus_federation_state",
        help="1 for the state of the federation, 0 for the others.",
        label="state",
        values=(OPEN, PAUSED, CLOSED),
        read=lambda seen: _one_of(OPEN, PAUSED, CLOSED, is_now=seen.health.federation_state),
    ),
    Family(
        name="ternbus_head_version", help="Number of the newest version.", read=lambda seen: float(seen.health.version)
    ),
    Family(
        name="ternbus_head_timestamp_seconds",
        help="When the newest version was made.",
        read=lambda seen: seen.health.made_at,
    ),
    Family(
        name="ternbus_version_interval_seconds",
        help="Usual time between versions, the median of the last 20; missing while there are fewer than 5.",
        read=lambda seen: seen.health.usual_s,
    ),
    Family(
        name="ternbus_buffer_updates",
        help="Accepted updates that wait for a merge.",
        read=lambda seen: float(seen.health.buffer),
    ),
    Family(
        name="ternbus_awaited_devices",
        help="Devices online that the next version waits for.",
        read=lambda seen: float(seen.health.waits_for_count),
    ),
    Family(
        name="ternbus_staleness_mean_versions",
        help="Mean staleness of the updates in the last 20 versions; missing while these have none.",
        read=_mean_staleness,
    ),
    Family(
        name="ternbus_staleness_bound_versions",
        help="The largest staleness of an accepted update: staleness.max.",
        read=lambda seen: float(seen.settings.staleness.max),
    ),
    Family(
        name="ternbus_evaluated_version",
        help="The newest of the last 20 versions that an evaluator has measured; missing if there is none.",
        read=lambda seen: None if (found := _score(seen)) is None else float(found[0]),
    ),
    Family(
        name="ternbus_evaluation_score",
        help="The primary metric of that version on the test data.",
        read=lambda seen: None if (found := _score(seen)) is None else found[1],
    ),
    Family(
        name="ternbus_devices",
        help="Devices with a valid key that train, by the state that they state.",
        label="state",
        values=("training", "idle", "offline"),
        read=_trainers,
    ),
    Family(
        name="ternbus_evaluators",
        help="Members with a valid key that only evaluate.",
        label="state",
        values=("online", "offline"),
        read=_evaluators,
    ),
    Family(
        name="ternbus_helpers",
        help="Helpers of private sums; missing in a federation without.",
        label="state",
        values=("online", "offline"),
        read=_helpers,
    ),
    Family(
        name="ternbus_revoked_devices",
        help="Devices whose key is revoked.",
        read=lambda seen: float(sum(row["key_state"] == REVOKED for row in seen.found["devices"].values())),
    ),
    Family(
        name="ternbus_privacy_epsilon_max",
        help="The largest epsilon that a device says it has spent; missing without differential privacy.",
        read=lambda seen: max((row["epsilon"] for row in seen.members if row["epsilon"] is not None), default=None),
    ),
    Family(
        name="ternbus_updates_answered",
        help="Answers to updates. busy: not now; duplicate: the number was answered before.",
        kind=COUNTER,
        label="outcome",
        values=ANSWERS,
        read=_answered,
    ),
    Family(
        name="ternbus_updates_merged",
        help="Accepted updates that are in a version.",
        kind=COUNTER,
        read=lambda seen: seen.counts["merged"],
    ),
    Family(
        name="ternbus_updates_dropped",
        help="Accepted updates that are in no version: their device was revoked, or versions were withdrawn.",
        kind=COUNTER,
        read=lambda seen: seen.counts["dropped"],
    ),
    Family(
        name="ternbus_updates_bounded",
        help="Accepted updates that merge.influence_bound made smaller.",
        kind=COUNTER,
        read=lambda seen: seen.counts["bounded"],
    ),
    Family(
        name="ternbus_received_bytes",
        help="Bytes of all updates on the wire, by MQTT packets.",
        kind=COUNTER,
        read=lambda seen: sum(row["bytes"] for row in seen.found["devices"].values()),
    ),
    Family(
        name="ternbus_messages_refused",
        help="Messages and updates refused, by reason.",
        kind=COUNTER,
        label="reason",
        values=(*REFUSED, OTHER),
        read=_refused,
    ),
    Family(
        name="ternbus_publications_lost",
        help="Publications of the aggregator that the broker refused, did not keep, or took too slowly.",
        kind=COUNTER,
        label="reason",
        values=LOST,
        read=_lost,
    ),
    Family(
        name="ternbus_broker_refused",
        help="What the broker refused, by reason (`ternbus broker refusals`); missing where it is on another machine.",
        kind=COUNTER,
        label="reason",
        values=(*refusals.REASONS, OTHER),
        read=lambda seen: seen.broker_refused,
    ),
    Family(
        name="ternbus_disk_free_ratio",
        help="Free part of the file system with the directory.",
        read=lambda seen: seen.health.disk_free,
    ),
    Family(
        name="ternbus_certificate_expiry_timestamp_seconds",
        help="When a certificate expires; missing where it is on another machine.",
        label="certificate",
        values=tuple(CERTIFICATES),
        sparse=True,
        read=_expiries,
    ),
)
