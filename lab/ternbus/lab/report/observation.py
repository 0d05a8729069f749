"""The state of a federation at one moment, from the aggregator's status and the devices' counters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from ternbus.broker.protocol.direction import ACCURACY, LOSS, Direction, direction_of, sign_of
from ternbus.edge.shell.service import FAILED_TRAININGS


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One row of the live table."""

    name: str
    state: str
    base: int | None
    updates: int
    staleness: float | None
    bytes_up: int
    failures: int = 0  # trainings that failed, in all
    failing: str | None = None  # why the last one did, as the device says
    samples: int | None = None  # of its newest update
    epsilon: float | None = None  # of privacy, that it says to have spent
    classes: Mapping[str, int] | None = None  # samples that it trains on, by class
    local: Mapping[str, Any] | None = None  # its newest metrics on its own data; see ternbus.aggregator.store


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One version of the model; `seconds` is the time since version 0; None marks a missing measurement."""

    version: int
    seconds: float
    updates: int
    staleness: float | None  # mean over its updates
    staleness_max: int | None
    accuracy: float | None
    loss: float | None
    evaluations: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # metrics by evaluator
    # metrics on the devices' own data; see ternbus.aggregator.store.device_metrics
    local: Mapping[str, Any] | None = None

    @property
    def metrics(self) -> Mapping[str, float]:
        """Those of the first evaluator by name."""
        return next(iter(self.evaluations.values()), {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """The state that progress and report show."""

    state: str
    accepted: int
    rejected: int
    bytes_up: int  # PUBLISH packets on …/update that the devices sent
    bytes_down: int  # PUBLISH packets of deltas that the devices received
    began: float  # when version 0 was made, Unix time in seconds
    counts: Mapping[str, Any]
    devices: tuple[Device, ...]
    versions: tuple[Version, ...]
    local: Mapping[str, Any] | None = None  # over all devices, the newest report of each
    metric: str | None = None  # the primary one
    better: Mapping[str, Direction] = field(default_factory=dict)  # of each metric its direction
    dropped: Mapping[str, int] = field(default_factory=dict)  # private updates that no version contains, by reason
    search: Mapping[str, Any] | None = None  # in the federation; see ternbus.aggregator.core.search_state
    evaluators_failing: Mapping[str, str] = field(default_factory=dict)  # why the last evaluation of each failed

    @classmethod
    def read(
        cls,
        status: Mapping[str, Any],
        counters: Mapping[str, Mapping[str, int]],
        classes: Mapping[str, Mapping[str, int]] | None = None,
    ) -> Self:
        """From the JSON of `aggregator status` and the counters of each device, without the evaluator.

        `classes` has the samples of each class of devices that do not report them.
        """
        known = classes or {}
        rows = tuple(
            _device(name, status["devices"].get(name, {}), counted, known.get(name))
            for name, counted in counters.items()
        )
        began = float(status["versions"][0]["time"])
        counts = status["counts"]
        return cls(
            state=status["state"],
            accepted=counts["accepted"],
            rejected=counts["stale"] + sum(counts["invalid"].values()),
            bytes_up=sum(row.bytes_up for row in rows),
            bytes_down=sum(counted.get("received_bytes.delta", 0) for counted in counters.values()),
            began=began,
            counts=counts,
            devices=rows,
            versions=tuple(_version(row, began) for row in status["versions"]),
            local=status.get("local"),
            metric=status.get("metric"),
            better=status.get("better") or {},
            dropped=status.get("private", {}).get("dropped", {}),
            search=status.get("search"),
            evaluators_failing={
                name: row["failing"]
                for name, row in status["devices"].items()
                if name not in counters and row.get("failing")
            },
        )

    @property
    def version(self) -> int:
        return self.versions[-1].version

    @property
    def last(self) -> Version:
        return self.versions[-1]

    @property
    def evaluated(self) -> Version | None:
        """The newest version with metrics of the test data."""
        return next((version for version in reversed(self.versions) if version.metrics), None)

    def newest(self, metric: str) -> float | None:
        """The value of a metric in the newest version that has it."""
        return next((row.metrics[metric] for row in reversed(self.versions) if metric in row.metrics), None)

    def best(self, metric: str) -> Version | None:
        """The first version with the best value of a metric, by its direction."""
        sign = sign_of(direction_of(metric, self.better))
        known = [version for version in self.versions if metric in version.metrics]
        return max(known, key=lambda version: sign * version.metrics[metric], default=None)


def _device(name: str, row: Mapping[str, Any], counted: Mapping[str, int], classes: Mapping[str, int] | None) -> Device:
    return Device(
        name=name,
        state=row.get("state") or "starting",
        base=row.get("base"),
        updates=row.get("updates") or 0,
        staleness=row.get("staleness"),
        bytes_up=counted.get("sent_bytes.update", 0),
        failures=counted.get(FAILED_TRAININGS, 0),
        failing=row.get("failing"),
        samples=row.get("samples"),
        epsilon=row.get("epsilon"),
        classes=row.get("classes") or classes,
        local=row.get("local"),
    )


def _version(row: Mapping[str, Any], began: float) -> Version:
    metrics = row.get("metrics") or {}
    return Version(
        version=row["version"],
        seconds=row["time"] - began,
        updates=row["updates"],
        staleness=row.get("staleness_mean"),
        staleness_max=row.get("staleness_max"),
        accuracy=metrics.get(ACCURACY),
        loss=metrics.get(LOSS),
        evaluations=row.get("evaluations") or {},
        local=row.get("local"),
    )
