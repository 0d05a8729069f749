"""The end of a run: limits on versions and time, and on metrics of the test data."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.direction import ACCURACY, HIGHER, LOWER, Direction, direction_of
from ternbus.lab.scenario.toml_table import Table, within

LARGEST: Final = 1e100


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricLimit:
    """A value of a metric that ends a run: at least, or at most, this number."""

    name: str
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ConfigError("end.metric needs exactly one of the keys at_least and at_most")
        for key, value in (("at_least", self.at_least), ("at_most", self.at_most)):
            if value is not None:
                within(f"end.metric.{key}", value, -LARGEST, LARGEST)

    @property
    def direction(self) -> Direction:
        """The direction of a metric for which this is a limit to reach."""
        return HIGHER if self.at_most is None else LOWER

    def reached(self, values: Mapping[str, float]) -> bool:
        if (value := values.get(self.name)) is None:
            return False
        return (self.at_least is not None and value >= self.at_least) or (
            self.at_most is not None and value <= self.at_most
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The end of a run: the first of these limits that is reached; None means no limit."""

    versions: int | None = None
    seconds: float | None = None
    accuracy: float | None = None
    metric: MetricLimit | None = None

    def __post_init__(self) -> None:
        if self.versions is None and self.seconds is None and not self.limits:
            raise ConfigError("[end] has no limit: set versions, seconds, accuracy or metric")
        if self.versions is not None:
            within("end.versions", self.versions, 1, 10_000_000)
        if self.seconds is not None:
            within("end.seconds", self.seconds, 1, 31_536_000)
        if self.accuracy is not None:
            within("end.accuracy", self.accuracy, 0, 1)

    @property
    def limits(self) -> tuple[MetricLimit, ...]:
        """The limits on metrics."""
        accuracy = () if self.accuracy is None else (MetricLimit(name=ACCURACY, at_least=self.accuracy),)
        return accuracy if self.metric is None else (*accuracy, self.metric)

    def reached(self, *, version: int, seconds: float, evaluations: Iterable[Mapping[str, float]]) -> bool:
        """Whether the run ends at this version and time; ``evaluations`` are the metrics of versions until then."""
        return (
            (self.versions is not None and version >= self.versions)
            or (self.seconds is not None and seconds >= self.seconds)
            or any(limit.reached(values) for values in evaluations for limit in self.limits)
        )

    def missing(self, values: Mapping[str, float]) -> str:
        """A text about the limits on metrics that an evaluation of a version lacks; empty if there are none."""
        names = [limit.name for limit in self.limits if limit.name not in values]
        return f"[end] the evaluation has no {' and no '.join(names)}: it has {', '.join(values)}" if names else ""

    def refuse_start(self, values: Mapping[str, float]) -> None:
        """Raises `ConfigError` for a limit that the initial model, with these metrics, reaches untrained."""
        for limit in self.limits:
            if limit.reached(values):
                raise ConfigError(
                    f"[end] {limit.name}: the initial model already has {values[limit.name]:.4g}, so the run would end "
                    f"before any training: choose a limit that is {limit.direction}"
                )

    def check(self, values: Mapping[str, float], better: Mapping[str, Direction]) -> None:
        """Raises `ConfigError` for a limit that is reached by a model that becomes worse."""
        for limit in self.limits:
            direction = direction_of(limit.name, better)
            if limit.name in values and limit.direction != direction:
                key = "at_most" if direction == LOWER else "at_least"
                raise ConfigError(f"[end] {limit.name} is better when {direction}: set {key}")


def parse(table: Table) -> End | None:
    """The table `[end]` of a scenario; None if it is missing."""
    if not table:
        return None
    versions, seconds, accuracy = table.whole("versions"), table.number("seconds"), table.number("accuracy")
    metric = _metric(table.table("metric"))
    table.refuse_unknown()
    return End(versions=versions, seconds=seconds, accuracy=accuracy, metric=metric)


def _metric(table: Table) -> MetricLimit | None:
    if not table:
        return None
    name, least, most = table.text("name"), table.number("at_least"), table.number("at_most")
    table.refuse_unknown()
    if name is None:
        raise ConfigError('end.metric lacks the key name: write metric = { name = "mae", at_most = 0.3 }')
    return MetricLimit(name=name, at_least=least, at_most=most)
