"""A ledger in memory that keeps only what a report needs: contributions, versions, metrics and counts."""

from collections import Counter
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any, Protocol

from ternbus.aggregator.core import records
from ternbus.aggregator.core.search_state import SearchState
from ternbus.aggregator.merge.accepted import WITHDRAWN
from ternbus.aggregator.store.device_metrics import Report
from ternbus.aggregator.store.measurements import Measurements
from ternbus.broker.protocol.messages import CLOSED, OPEN, Status


class Ledger(Protocol):
    """The ledger of a simulated aggregator: `MemoryLedger` or the real one."""

    def write(self, batch: Iterable[records.Record], now: float | None = None) -> None: ...
    def frame(self, topic: str) -> bytes: ...


@dataclass(slots=True, kw_only=True)
class Contribution:
    """An accepted update; ``merged`` is the version that contains it, ``dropped`` why none ever will."""

    device: str
    base: int
    staleness: int
    samples: int
    epsilon: float | None = None
    merged: int | None = None
    dropped: str = ""


@dataclass(slots=True, kw_only=True)
class _Version:
    made: records.VersionMade | None  # None for version 0, which is not the result of a merge
    seconds: float


class MemoryLedger:
    """Accepts the records of the real ledger, and returns the same status."""

    def __init__(self, frames: Iterable[tuple[str, bytes]]) -> None:
        self.contributions: list[Contribution] = []
        self.digests: dict[int, bytes] = {}
        self._frames = dict(frames)
        self._buffer: list[Contribution] = []
        self._judged: list[Contribution] = []  # those of the buffer that a candidate has
        self.merged_sets = 0
        self._sets: dict[bytes, frozenset[tuple[str, int]]] = {}  # (device, base) of private updates, by digest
        self._versions = [_Version(made=None, seconds=0.0)]
        self._measurements = Measurements()
        self._classes: dict[str, Mapping[str, int]] = {}
        self._statuses: dict[str, Status] = {}
        self._counts: Counter[str] = Counter()
        self._invalid: Counter[str] = Counter()
        self._state = OPEN
        self._search: SearchState | None = None

    def frame(self, topic: str) -> bytes:
        return self._frames.get(topic, b"")

    def write(self, batch: Iterable[records.Record], now: float | None = None) -> None:
        for record in batch:
            self._write(record, now or 0.0)

    def status(self) -> dict[str, Any]:
        """The part of `ternbus.aggregator.store.status.read` that the report uses."""
        accepted = Counter(each.device for each in self.contributions)
        dropped = sum(1 for each in self.contributions if each.dropped)
        counts = {"accepted": accepted.total(), "merged": accepted.total() - len(self._buffer) - dropped}
        counts["dropped"] = dropped
        counts["unmerged"] = len(self._buffer) if self._state == CLOSED else 0
        counts |= {outcome: self._counts[outcome] for outcome in ("stale", "duplicate", "busy")}
        reasons = Counter(each.dropped.partition(":")[0] for each in self.contributions if each.dropped)
        return {
            "state": self._state,
            "counts": {**counts, "invalid": dict(self._invalid)},
            "private": {"dropped": dict(sorted(reasons.items()))},
            **self._measurements.common(),
            "devices": self._devices(accepted),
            "search": None if self._search is None else self._search.status(),
            "versions": [self._version(number) for number in range(len(self._versions))],
        }

    def _write(self, record: records.Record, now: float) -> None:
        match record:
            case records.UpdateAccepted():
                update = record.update
                row = Contribution(
                    device=update.device,
                    base=update.base,
                    staleness=update.staleness,
                    samples=update.samples,
                    epsilon=update.epsilon,
                )
                self.contributions.append(row)
                self._buffer.append(row)
            case records.UpdateAnswered():
                self._answered(record)
            case records.CandidateMade():
                self._judged = [*self._buffer]
            case records.VersionMade():
                self._versions.append(_Version(made=record, seconds=now))
                self.digests[record.version] = record.digest
                self._search = record.search
                self._merged(record)
            case records.SetMade():
                self._sets[record.digest] = frozenset((device, record.base) for device in record.devices)
            case records.UpdatesDropped():
                for row in self._take({(device, record.base) for device in record.devices}):
                    row.dropped = record.reason
            case records.FramesRetained():
                self._keep(record)
            case records.MetricsReceived():
                self._measured(record)
            case records.Observed():
                self._statuses |= record.statuses
                self._counts.update(record.outcomes)
                self._invalid.update(record.refused)
            case records.StateChanged():
                self._state = record.state
            case _:
                return  # records that only a restart needs

    def _merged(self, record: records.VersionMade) -> None:
        """All that waits is in a version, but of private updates only those of its sets."""
        if record.candidate:
            names = {(row.device, row.base) for row in self._judged}
        elif record.sets is None:
            names = {(row.device, row.base) for row in self._buffer} if record.updates else set()
        else:
            names = {name for digest in record.sets for name in self._sets.pop(digest)}
            self.merged_sets += len(record.sets)
        for row in self._take(names):
            if record.candidate == WITHDRAWN:
                row.dropped = "canary"
            else:
                row.merged = record.version

    def _take(self, names: Set[tuple[str, int]]) -> list[Contribution]:
        """The rows of updates that wait no longer."""
        taken = [row for row in self._buffer if (row.device, row.base) in names]
        self._buffer = [row for row in self._buffer if (row.device, row.base) not in names]
        return taken

    def _measured(self, record: records.MetricsReceived) -> None:
        about = record.metrics
        if about.split == "test":
            self._measurements.add_test(record.device, about.version, dict(about.values))
            self._measurements.state(record.device, about.better)
        else:
            self._classes[record.device] = about.classes
            report = Report(
                device=record.device,
                version=about.version,
                samples=about.samples,
                values=dict(about.values),
                better=about.better,
            )
            self._measurements.add_local(report)

    def _answered(self, record: records.UpdateAnswered) -> None:
        if record.outcome == "invalid":
            self._invalid[record.reason.partition(":")[0]] += 1
        else:
            self._counts[record.outcome] += 1

    def _keep(self, record: records.FramesRetained) -> None:
        for topic, payload in record.frames:
            if payload:
                self._frames[topic] = payload
            else:
                self._frames.pop(topic, None)

    def _devices(self, accepted: Counter[str]) -> dict[str, dict[str, Any]]:
        bases: dict[str, int] = {}
        spent: dict[str, float | None] = {}
        samples: dict[str, int] = {}
        for row in self.contributions:
            samples[row.device] = row.samples
            spent[row.device] = row.epsilon
            bases[row.device] = max(row.base, bases.get(row.device, -1))
        newest = len(self._versions) - 1
        known = {**dict.fromkeys(accepted), **self._statuses}  # statuses are kept now and then: an update may be first
        return {
            name: {
                "state": None if status is None else status.state,
                "failing": None if status is None else status.failing or None,
                "base": bases.get(name),
                "staleness": newest - bases[name] if name in bases else None,
                "updates": accepted[name],
                "samples": samples.get(name),
                "epsilon": spent.get(name),
                "local": self._measurements.devices.device(name, self._measurements.better),
                "classes": dict(self._classes.get(name, {})) or None,
            }
            for name, status in known.items()
        }

    def _version(self, number: int) -> dict[str, Any]:
        row = self._versions[number]
        made = row.made
        return {
            "version": number,
            "time": row.seconds,
            "updates": made.updates if made is not None else 0,
            "staleness_mean": made.staleness_mean if made is not None else 0.0,
            "staleness_max": made.staleness_max if made is not None else 0,
            **self._measurements.version(number),
        }
