"""The sections [versions] and [canary] of aggregator.toml: which versions can be had, and who looks at them first."""

from dataclasses import dataclass

from ternbus.aggregator.sections import key
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.identity import check_device


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSettings:
    """How many versions are kept, besides those with a tag."""

    keep: int = key(0, "number of the newest versions kept, to export or to go back to; 0 = downlink.slots", low=0)
    keep_best: int = key(
        0,
        "number of versions kept beside them: those with the best metric of the first evaluator, in DIR/tagged",
        low=0,
        high=1000,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CanarySettings:
    """Who evaluates each version before it is published, and when that publishes it."""

    group: tuple[str, ...] = key(
        (), "evaluators, and devices that report metrics, that evaluate each version first; [] = nobody"
    )
    metric: str = key("", "metric that must not become worse; empty = the primary one")
    tolerance: float = key(0.02, "by how much it may become worse, in its own unit", low=0, high=1e9)
    patience_s: float = key(
        300.0, "seconds until a version is withdrawn of which too few have reported", low=0.01, high=1e7
    )
    min_reports: int = key(0, "number of the group that must have reported by then; 0 = all", low=0, high=100_000)

    def check(self, where: str, *, is_private: bool) -> None:
        """Refuse what cannot work; ConfigError says why."""
        try:
            for name in self.group:
                check_device(name)
        except ConfigError as error:
            raise ConfigError(f"{where}.group: {error}") from error
        if self.min_reports > len(set(self.group)):
            raise ConfigError(f"{where}.min_reports = {self.min_reports} is more than {where}.group has names")
        if self.group and is_private:
            raise ConfigError(f"{where}.group: with private sums no device says what a version is worth; leave it out")
