"""All metrics in the ledger: those of evaluators on the test data, and those of devices on their own data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ternbus.aggregator.store.device_metrics import DeviceMetrics, Report
from ternbus.broker.protocol.direction import Direction, direction_of, primary_of


@dataclass(slots=True, kw_only=True)
class Measurements:
    """Metrics by sender and version, and what they have in common: directions, and the primary metric.

    The word of an evaluator, whom the operator invited as one, counts before that of devices; of several evaluators
    that of the first by name. Of devices, what most of them say counts.
    """

    devices: DeviceMetrics = field(default_factory=DeviceMetrics)
    _tests: dict[int, dict[str, Mapping[str, float]]] = field(default_factory=dict)  # by version and evaluator
    _stated: dict[str, Mapping[str, Direction]] = field(default_factory=dict)  # by evaluator
    _better: dict[str, Direction] | None = None  # as computed since the last addition

    def add_test(self, evaluator: str, version: int, values: Mapping[str, float]) -> None:
        """An evaluator's metrics of a version."""
        self._tests.setdefault(version, {})[evaluator] = values
        self._better = None

    def state(self, evaluator: str, better: Mapping[str, Direction]) -> None:
        """The directions that an evaluator stated last."""
        self._stated[evaluator] = better
        self._better = None

    def add_local(self, report: Report) -> None:
        """A device's metrics on its own data."""
        self.devices.add(report)
        self._better = None

    @property
    def better(self) -> Mapping[str, Direction]:
        """The direction of each metric."""
        if self._better is None:
            names: dict[str, dict[str, None]] = {}  # by evaluator, each once, in the order of their coming
            for row in self._tests.values():
                for evaluator, values in row.items():
                    names.setdefault(evaluator, {}).update(dict.fromkeys(values))
            self._better = self.devices.directions()
            for evaluator in sorted(names, reverse=True):
                stated = self._stated.get(evaluator, {})
                self._better |= {name: direction_of(name, stated) for name in names[evaluator]}
        return self._better

    @property
    def metric(self) -> str | None:
        """The primary metric, of the newest version that has any; None without metrics."""
        for version in sorted(self._tests, reverse=True):
            for evaluator in sorted(self._tests[version]):
                if (found := primary_of(self._tests[version][evaluator])) is not None:
                    return found
        return self.devices.metric()

    def common(self) -> dict[str, Any]:
        """The part of the status that is of all versions: the primary `metric`, directions, and `local`."""
        metric = self.metric
        local = metric if metric in self.devices.directions() else self.devices.metric()
        return {"metric": metric, "better": dict(self.better), "local": self.devices.summary(local, self.better)}

    def version(self, number: int) -> dict[str, Any]:
        """The part of the status that is of one version."""
        evaluations = {name: dict(values) for name, values in sorted(self._tests.get(number, {}).items())}
        return {
            "metrics": next(iter(evaluations.values()), {}),
            "evaluations": evaluations,
            "local": self.devices.version(number, self.better),
        }
