"""The table `[simulate]` of a scenario: what only `lab simulate` knows."""

from dataclasses import dataclass

from ternbus.lab.scenario.toml_table import Table, within


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """Settings of `lab simulate` only: the devices' network lines, and the jitter of training durations.

    A training lasts the device's duration by `Speeds` times exp(jitter · z), z standard normal, drawn each time.
    """

    jitter: float = 0.0
    up_mbit_s: float = 0.0  # 0 means unlimited
    down_mbit_s: float = 0.0  # 0 means unlimited
    latency_s: float = 0.02  # one way
    evaluate_every: int = 1  # versions

    def __post_init__(self) -> None:
        within("simulate.jitter", self.jitter, 0, 5)
        within("simulate.up_mbit_s", self.up_mbit_s, 0, 1e6)
        within("simulate.down_mbit_s", self.down_mbit_s, 0, 1e6)
        within("simulate.latency_s", self.latency_s, 0, 3600)
        within("simulate.evaluate_every", self.evaluate_every, 1, 1_000_000)


def parse(table: Table) -> Simulated:
    """The settings in a parsed table; ConfigError for an unknown key."""
    given = {
        "jitter": table.number("jitter"),
        "up_mbit_s": table.number("up_mbit_s"),
        "down_mbit_s": table.number("down_mbit_s"),
        "latency_s": table.number("latency_s"),
        "evaluate_every": table.whole("evaluate_every"),
    }
    table.refuse_unknown()
    return Simulated(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]  # read by kind above
