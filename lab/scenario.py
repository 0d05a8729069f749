"""A scenario: what federation the lab runs, how unequal its devices are, what fails when, and when it ends.

Knows the TOML file's keys and their bounds; the aggregator's own keys are checked by the aggregator's own code.
"""

import math
import random
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from aggregator.settings import from_table, with_overrides
from broker.errors import ConfigError
from broker.invitation import check_broker_url
from edge_client.partition import Partition
from lab.tables import Table

ENGINES: Final = ("auto", "mosquitto", "nats")
DEVICES_MAX: Final = 1000
SYNCHRONOUS_WAIT_S: Final = 86_400.0  # a day: longer than any run, so only a full buffer makes a version

_DEVICE: Final = re.compile(r"device:(\d{1,4})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """How long one local training lasts at least: `median_s` · exp(sigma · z), z standard normal, once a device."""

    sigma: float = 0.7
    median_s: float = 0.5

    def __post_init__(self) -> None:
        _within("speeds.sigma", self.sigma, 0, 5)
        _within("speeds.median_s", self.median_s, 0, 86_400)

    def draw(self, devices: int, seed: int) -> tuple[float, ...]:
        """The seconds of each device; a device's own do not depend on how many others there are."""
        generator = random.Random(seed)  # noqa: S311  # an experiment's, to be repeated; no secret
        return tuple(self.median_s * math.exp(self.sigma * generator.gauss(0, 1)) for _ in range(devices))


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """The run ends at whichever of these comes first; None is never."""

    versions: int | None = None
    seconds: float | None = None
    accuracy: float | None = None

    def __post_init__(self) -> None:
        if self.versions is None and self.seconds is None and self.accuracy is None:
            raise ConfigError("[end] needs versions, seconds or accuracy: when does the run end?")
        if self.versions is not None:
            _within("end.versions", self.versions, 1, 10_000_000)
        if self.seconds is not None:
            _within("end.seconds", self.seconds, 1, 31_536_000)
        if self.accuracy is not None:
            _within("end.accuracy", self.accuracy, 0, 1)

    def reached(self, *, version: int, seconds: float, accuracy: float | None) -> bool:
        return (
            (self.versions is not None and version >= self.versions)
            or (self.seconds is not None and seconds >= self.seconds)
            or (self.accuracy is not None and accuracy is not None and accuracy >= self.accuracy)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A process that is killed with SIGKILL once a version is there, and started again later."""

    kill: str  # "aggregator", "broker" or "device:I", I from 0
    after_version: int
    restart_after_s: float = 1.0

    def __post_init__(self) -> None:
        if self.kill not in ("aggregator", "broker") and not _DEVICE.fullmatch(self.kill):
            raise ConfigError(f'[[fault]] kill = "{self.kill}": write "aggregator", "broker" or "device:I", I from 0')
        _within("fault.after_version", self.after_version, 0, 10_000_000)
        _within("fault.restart_after_s", self.restart_after_s, 0, 86_400)

    @property
    def device(self) -> int | None:
        found = _DEVICE.fullmatch(self.kill)
        return int(found[1]) if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """What only `lab simulate` can be told: each device's line, and what real processes bring with them anyway.

    A training lasts what `Speeds` says of its device, times exp(jitter · z), z standard normal, once a training.
    """

    jitter: float = 0.0
    up_mbit_s: float = 0.0  # 0 = unlimited
    down_mbit_s: float = 0.0  # likewise
    latency_s: float = 0.02  # one way
    evaluate_every: int = 1  # versions

    def __post_init__(self) -> None:
        _within("simulate.jitter", self.jitter, 0, 5)
        _within("simulate.up_mbit_s", self.up_mbit_s, 0, 1e6)
        _within("simulate.down_mbit_s", self.down_mbit_s, 0, 1e6)
        _within("simulate.latency_s", self.latency_s, 0, 3600)
        _within("simulate.evaluate_every", self.evaluate_every, 1, 1_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One run of the lab. The defaults are those of `ternbus lab run` without a file."""

    task: str = "digits"
    devices: int = 8
    seed: int = 0
    data: Path | None = None
    partition: str = "dirichlet:0.5"
    sync: bool = False
    speeds: Speeds = field(default_factory=Speeds)
    plan: Mapping[str, object] = field(default_factory=dict)
    engine: str = "auto"
    broker_url: str | None = None  # one that exists; None = the lab starts its own
    aggregator: Mapping[str, object] = field(default_factory=dict)  # dotted keys of aggregator.toml
    end: End = field(default_factory=lambda: End(versions=60))
    faults: tuple[Fault, ...] = ()
    simulate: Simulated = field(default_factory=Simulated)

    def __post_init__(self) -> None:
        _within("devices", self.devices, 1, DEVICES_MAX)
        _within("seed", self.seed, 0, 2**32 - 1)
        if self.engine not in ENGINES:
            raise ConfigError(f"broker.engine is {self.engine!r}: choose {', '.join(ENGINES)}")
        if self.broker_url is not None:
            check_broker_url(self.broker_url)
        Partition.parse(self.partition_of(0))
        with_overrides(table := {"federation": "lab", "broker": "mqtt://localhost"}, self.settings({}))
        from_table(table, "[aggregator]")
        for fault in self.faults:
            self._check(fault)

    def partition_of(self, device: int) -> str:
        """The device's own part, in the form that `edge join --partition` takes."""
        if self.partition == "all":
            return "all"
        part = f"{self.partition}:{device}/{self.devices}"
        return part if self.partition == "iid" else f"{part}:{self.seed}"

    def settings(self, default_plan: Mapping[str, object]) -> dict[str, object]:
        """The aggregator's keys, dotted: the task's plan, then the scenario's, then what a barrier asks for."""
        plan = {**default_plan, **self.plan}
        settings = {**{f"plan.{name}": value for name, value in plan.items()}, **self.aggregator}
        if self.sync:
            settings |= {
                "merge.buffer_size": self.devices,
                "merge.max_wait_s": SYNCHRONOUS_WAIT_S,
                "staleness.max": 0,
            }
        return settings

    def _check(self, fault: Fault) -> None:
        if fault.device is not None and fault.device >= self.devices:
            raise ConfigError(f'[[fault]] kill = "{fault.kill}": the devices are numbered 0 to {self.devices - 1}')
        if fault.kill == "broker" and self.broker_url is not None:
            raise ConfigError('[[fault]] kill = "broker": only a broker that it started; leave out broker.url')
        if self.end.versions is not None and fault.after_version >= self.end.versions:
            raise ConfigError(f"[[fault]] after_version = {fault.after_version}: the run ends at {self.end.versions}")


def load(path: Path) -> Scenario:
    """The scenario in a TOML file. Raises `ConfigError`, which names the file and the key."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    try:
        return parse(table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse(table: Mapping[str, object]) -> Scenario:
    """The scenario in a table as TOML gives it; what is left out has its default, what is unknown is refused."""
    top = Table(table, "")
    broker = top.table("broker")
    given = {
        "task": top.text("task"),
        "devices": top.whole("devices"),
        "seed": top.whole("seed"),
        "data": None if (data := top.text("data")) is None else Path(data),
        "partition": top.text("partition"),
        "sync": top.switch("sync"),
        "engine": broker.text("engine"),
        "broker_url": broker.text("url"),
        "speeds": _speeds(top.table("speeds")),
        "plan": top.table("plan").rest(),
        "aggregator": _dotted(top.table("aggregator").rest()),
        "end": _end(top.table("end")),
        "faults": tuple(_fault(row) for row in top.rows("fault")),
        "simulate": _simulated(top.table("simulate")),
    }
    broker.refuse_unknown()
    top.refuse_unknown()
    return Scenario(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]  # read by kind above


def _speeds(table: Table) -> Speeds:
    given = {"sigma": table.number("sigma"), "median_s": table.number("median_s")}
    table.refuse_unknown()
    return Speeds(**{name: value for name, value in given.items() if value is not None})


def _end(table: Table) -> End | None:
    if not table:
        return None
    versions, seconds, accuracy = table.whole("versions"), table.number("seconds"), table.number("accuracy")
    table.refuse_unknown()
    return End(versions=versions, seconds=seconds, accuracy=accuracy)


def _fault(table: Table) -> Fault:
    kill, after = table.text("kill"), table.whole("after_version")
    restart = table.number("restart_after_s")
    table.refuse_unknown()
    if kill is None or after is None:
        raise ConfigError("[[fault]] needs kill and after_version")
    return Fault(kill=kill, after_version=after, restart_after_s=1.0 if restart is None else restart)


def _simulated(table: Table) -> Simulated:
    given = {
        "jitter": table.number("jitter"),
        "up_mbit_s": table.number("up_mbit_s"),
        "down_mbit_s": table.number("down_mbit_s"),
        "latency_s": table.number("latency_s"),
        "evaluate_every": table.whole("evaluate_every"),
    }
    table.refuse_unknown()
    return Simulated(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]  # read by kind above


def _dotted(table: Mapping[str, object]) -> dict[str, object]:
    """{"merge": {"buffer_size": 4}} -> {"merge.buffer_size": 4}, as `aggregator init --set` writes it."""
    dotted: dict[str, object] = {}
    for section, keys in table.items():
        if section == "plan":
            raise ConfigError("[aggregator.plan]: the plan has a table of its own, [plan]")
        if not isinstance(keys, Mapping):
            raise ConfigError(f"aggregator.{section} stands alone: as in aggregator.toml, write [aggregator.SECTION]")
        dotted |= {f"{section}.{name}": value for name, value in keys.items()}
    return dotted


def _within(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ConfigError(f"{name} is {value:g}, but must be within {least:g} and {most:g}")
