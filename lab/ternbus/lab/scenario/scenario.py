"""Scenarios: the devices of a federation, their speeds and data, the plan, faults, hostile devices and the end.

This module checks the keys of a scenario's TOML file and their bounds; the aggregator's code checks its own keys.
"""

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Final

from ternbus.aggregator import plan_settings
from ternbus.aggregator.settings import from_table, with_overrides, with_private
from ternbus.broker import toml
from ternbus.broker.errors import ConfigError
from ternbus.broker.files import expanded, load_toml
from ternbus.broker.protocol.invitation import check_broker_url
from ternbus.broker.protocol.messages import PRIVATE
from ternbus.edge.learn import task_loader
from ternbus.edge.learn.partition_spec import LARGEST_SHARE
from ternbus.edge.learn.subnetwork import check_width
from ternbus.lab.hostile import KINDS, STRENGTHS, Behaviour
from ternbus.lab.scenario import availability, end, partitions, private, simulated
from ternbus.lab.scenario.availability import Availability
from ternbus.lab.scenario.end import End as End  # noqa: PLC0414 - a part of this module's interface
from ternbus.lab.scenario.private import Private
from ternbus.lab.scenario.simulated import Simulated
from ternbus.lab.scenario.toml_table import Table, within

ENGINES: Final = ("auto", "mosquitto", "nats")
DEVICES_MAX: Final = 10_000
SYNCHRONOUS_WAIT_S: Final = 86_400.0  # a day, longer than any run, so that only a full buffer makes a version

_ONE_OF_MANY: Final = re.compile(r"(device|helper):(\d{1,4})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """The minimum duration of a training: `median_s` · exp(sigma · z), z standard normal, drawn for each device.

    Devices whose names begin with a key of `factors` take so many times as long.
    """

    sigma: float = 0.7
    median_s: float = 0.5
    factors: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        within("speeds.sigma", self.sigma, 0, 5)
        within("speeds.median_s", self.median_s, 0, 86_400)
        for beginning, factor in self.factors.items():
            if isinstance(factor, bool) or not isinstance(factor, int | float):
                raise ConfigError(f"speeds.factors.{beginning} is {factor!r}: give a number")
            within(f"speeds.factors.{beginning}", factor, 1e-3, 1e3)

    def draw(self, devices: int, seed: int, names: Sequence[str] = ()) -> tuple[float, ...]:
        """The seconds of each device, by default device-0 and so on; they do not depend on the number of devices."""
        generator = random.Random(seed)  # noqa: S311 - reproducible on purpose, no secret
        drawn = (self.median_s * math.exp(self.sigma * generator.gauss(0, 1)) for _ in range(devices))
        names = names or [f"device-{index}" for index in range(devices)]
        return tuple(seconds * self._factor(name) for name, seconds in zip(names, drawn, strict=True))

    def _factor(self, device: str) -> float:
        return math.prod(factor for beginning, factor in self.factors.items() if device.startswith(beginning))


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A fault: a process is killed with SIGKILL after a version, and restarted later."""

    kill: str  # "aggregator", "broker", "device:I" or "helper:I", I from 0
    after_version: int
    restart_after_s: float = 1.0

    def __post_init__(self) -> None:
        if self.kill not in ("aggregator", "broker") and not _ONE_OF_MANY.fullmatch(self.kill):
            raise ConfigError(
                f'[[fault]] kill = "{self.kill}": write "aggregator", "broker", "device:I" or "helper:I", I from 0'
            )
        within("fault.after_version", self.after_version, 0, 10_000_000)
        within("fault.restart_after_s", self.restart_after_s, 0, 86_400)

    @property
    def device(self) -> int | None:
        return self._number("device")

    @property
    def helper(self) -> int | None:
        return self._number("helper")

    def _number(self, kind: str) -> int | None:
        found = _ONE_OF_MANY.fullmatch(self.kill)
        return int(found[2]) if found and found[1] == kind else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hostile:
    """A share of hostile devices, drawn by the scenario's seed; see ``ternbus.lab.hostile.Behaviour``."""

    kind: str
    share: float = 0.2
    strength: float | None = None  # None means the default of the kind
    samples: int = 0  # reported number of samples; 0 means the true number

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f'[[hostile]] kind = "{self.kind}": choose one of {", ".join(KINDS)}')
        within("hostile.share", self.share, 0, 1)
        within("hostile.strength", self.behaviour.strength, 0, 1e6)
        within("hostile.samples", self.samples, 0, 2**32 - 1)

    @property
    def behaviour(self) -> Behaviour:
        strength = STRENGTHS.get(self.kind, 1.0) if self.strength is None else self.strength
        return Behaviour(kind=self.kind, strength=strength, samples=self.samples)


@dataclass(frozen=True, slots=True, kw_only=True)
class Local:
    """Evaluation on held-out data of each device: of each version, and of a model fine-tuned by the device at the end.

    Hostile devices hold no data out and report no metrics.
    """

    hold_out: float = 0.0  # share of each device's data
    fine_tune: float = 0.0  # epochs

    def __post_init__(self) -> None:
        within("local.hold_out", self.hold_out, 0, LARGEST_SHARE)
        within("local.fine_tune", self.fine_tune, 0, 1e4)
        if self.fine_tune and not self.hold_out:
            raise ConfigError("local.fine_tune needs held-out data for evaluation: set local.hold_out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Narrow:
    """A share of the devices, drawn by the scenario's seed, that train a narrower sub-network."""

    share: float = 0.0
    width: float = 0.5

    def __post_init__(self) -> None:
        within("narrow.share", self.share, 0, 1)
        check_width(self.width)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """The scenario of one lab run. The defaults are those of `ternbus lab run` without a file."""

    task: str = "digits"
    devices: int = partitions.DEVICES_OF_DATA  # by default 8, or as many as the data have owners
    seed: int = 0
    data: Path | None = None
    partition: str = partitions.AUTO
    dense: tuple[str, ...] = ()  # patterns of tensors that stay float32, as in `aggregator init --dense`
    sync: bool = False
    speeds: Speeds = field(default_factory=Speeds)
    plan: Mapping[str, object] = field(default_factory=dict)
    engine: str = "auto"
    broker_url: str | None = None  # an existing broker; None starts a broker for the run
    allow_plan_keys: tuple[str, ...] = ()  # as `aggregator init --allow-plan-key`; `plan_check` checks the others
    aggregator: Mapping[str, object] = field(default_factory=dict)  # dotted keys of aggregator.toml
    end: End = field(default_factory=lambda: End(versions=60))
    faults: tuple[Fault, ...] = ()
    hostile: tuple[Hostile, ...] = ()
    narrow: Narrow = field(default_factory=Narrow)
    local: Local = field(default_factory=Local)
    private: Private | None = None  # None: plain updates
    simulate: Simulated = field(default_factory=Simulated)
    availability: Availability = field(default_factory=Availability)
    source: str = field(default="the scenario", compare=False)  # its file, for errors

    def __post_init__(self) -> None:
        partitions.check(self.partition)
        if self.devices == partitions.DEVICES_OF_DATA:
            if partitions.by_label(self.partition):  # until the data are read, check the rest with any number
                replace(self, devices=DEVICES_MAX)
                return
            object.__setattr__(self, "devices", partitions.DEVICES)
        within("devices", self.devices, 1, DEVICES_MAX)
        within("seed", self.seed, 0, 2**32 - 1)
        if self.engine not in ENGINES:
            raise ConfigError(f"broker.engine is {self.engine!r}: choose one of {', '.join(ENGINES)}")
        if self.broker_url is not None:
            check_broker_url(self.broker_url)
        plan_settings.read(self.plan, None, "plan")  # by the names that the scenario has
        table: dict[str, object] = {"federation": "lab", "broker": "mqtt://localhost"}
        with_overrides(table, with_private(self.settings({})))
        settings = from_table(table, "[aggregator]")
        if settings.min_devices > self.devices:
            raise ConfigError(
                f"a version is made of updates of at least {settings.min_devices} devices (aggregator.merge.min_devices"
                f"{', 2 where plan.seal is true' if not settings.merge.min_devices else ''}): devices = {self.devices} "
                "is too few"
            )
        if self.private is not None:
            self._check_private(self.private)
        for fault in self.faults:
            self._check(fault)
        if self.narrow.share and self.local.fine_tune:
            raise ConfigError(
                "local.fine_tune works with full-width models only: remove local.fine_tune or narrow.share"
            )
        if sum(self._counts()) > self.devices:
            raise ConfigError("[[hostile]] the sum of the shares is above 1: lower share")

    @cached_property  # asked for once for each device; a class with slots has no place for it
    def behaviours(self) -> Mapping[int, Behaviour]:
        """The behaviour of each hostile device, by number."""
        order = random.Random(f"{self.seed}/hostile").sample(range(self.devices), self.devices)  # noqa: S311 - reproducible on purpose
        kinds = [each.behaviour for each, count in zip(self.hostile, self._counts(), strict=True) for _ in range(count)]
        return dict(sorted(zip(order, kinds, strict=False)))

    @cached_property
    def widths(self) -> tuple[float, ...]:
        """The width of each device's sub-network; 1 is the whole model, which hostile devices always train."""
        count = round(self.narrow.share * self.devices)
        drawn = random.Random(f"{self.seed}/narrow").sample(range(self.devices), count)  # noqa: S311 - reproducible on purpose
        chosen = set(drawn) - set(self.behaviours)
        return tuple(self.narrow.width if index in chosen else 1.0 for index in range(self.devices))

    def _counts(self) -> list[int]:
        return [round(each.share * self.devices) for each in self.hostile]

    def partition_of(self, device: int) -> str:
        """The device's part of the data, in the form of `edge join --partition`."""
        return partitions.part_of(self.partition, device, self.devices, self.seed)

    @property
    def chosen_plan(self) -> dict[str, object]:
        """The keys of the plan that the scenario chooses: with private sums, their codec too."""
        return ({} if self.private is None else {"codec": PRIVATE}) | dict(self.plan)

    def settings(self, default_plan: Mapping[str, object]) -> dict[str, object]:
        """The aggregator's settings with dotted keys: of the task's plan, of the scenario, then of a barrier."""
        plan = {**default_plan, **self.chosen_plan}
        about = {} if self.private is None else self.private.settings()
        settings = {**{f"plan.{name}": value for name, value in plan.items()}, **about, **self.aggregator}
        if self.sync:
            settings |= {
                "merge.buffer_size": self.devices,
                "merge.max_wait_s": SYNCHRONOUS_WAIT_S,
                "staleness.max": 0,
            }
        return settings

    def _check_private(self, about: Private) -> None:
        about.check_devices(self.devices)
        if self.local.hold_out:
            raise ConfigError(
                "local.hold_out: with [private] devices send nothing but private updates, so no metrics of their own "
                "data; remove one of them"
            )
        if self.narrow.share:
            raise ConfigError(
                "narrow.share: with [private] all devices are of full width, since a sum would show what only a few of "
                "them train; remove one of them"
            )

    def _check(self, fault: Fault) -> None:
        helpers = 0 if self.private is None else self.private.helpers
        if fault.helper is not None and fault.helper >= helpers:
            which = f"use a helper from 0 to {helpers - 1}" if helpers else "there are helpers only with [private]"
            raise ConfigError(f'[[fault]] kill = "{fault.kill}": {which}')
        if fault.device is not None and fault.device >= self.devices:
            raise ConfigError(f'[[fault]] kill = "{fault.kill}": use a device from 0 to {self.devices - 1}')
        if fault.device is not None and not self.availability.is_always:
            raise ConfigError(f'[[fault]] kill = "{fault.kill}": [availability] says when devices are lost; remove one')
        if fault.kill == "broker" and self.broker_url is not None:
            raise ConfigError(
                '[[fault]] kill = "broker": the lab cannot kill the broker of broker.url; remove one of them'
            )
        if self.end.versions is not None and fault.after_version >= self.end.versions:
            raise ConfigError(
                f"[[fault]] after_version = {fault.after_version}: the run ends at version {self.end.versions}; "
                "use a smaller number"
            )


def load(path: Path, changes: Mapping[str, object] = MappingProxyType({})) -> Scenario:
    """The scenario in a TOML file, with changed keys. Raises `ConfigError`, which names the file and the key."""
    return _named({**from_folder(load_toml(path), path.parent), **changes}, str(path))


def from_folder(table: Mapping[str, object], folder: Path) -> dict[str, object]:
    """A scenario's table whose relative paths, of `task` and `data`, count from the folder of its file."""
    task, data = table.get("task"), table.get("data")
    found = dict(table)
    if isinstance(task, str):
        found["task"] = task_loader.from_folder(task, folder)
    if isinstance(data, str) and data[:1] != "~":
        found["data"] = str(folder / data)
    return found


def loads(text: str, source: str) -> Scenario:
    """The scenario in a TOML text; errors name `source`."""
    return _named(toml.loads(text, source), source)


def _named(table: Mapping[str, object], source: str) -> Scenario:
    try:
        return replace(parse(table), source=source)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def parse(table: Mapping[str, object]) -> Scenario:
    """The scenario in a parsed TOML table. A missing key has its default; `ConfigError` for an unknown key."""
    top = Table(table, "")
    broker, sums = top.table("broker"), top.table("private")
    given = {
        "task": top.text("task"),
        "devices": top.whole("devices"),
        "seed": top.whole("seed"),
        "data": None if (data := top.text("data")) is None else expanded(Path(data)),
        "partition": top.text("partition"),
        "dense": top.texts("dense"),
        "sync": top.switch("sync"),
        "engine": broker.text("engine"),
        "broker_url": broker.text("url"),
        "speeds": _speeds(top.table("speeds")),
        "plan": top.table("plan").rest(),
        "allow_plan_keys": top.texts("allow_plan_keys"),
        "aggregator": _dotted(top.table("aggregator").rest()),
        "end": end.parse(top.table("end")),
        "hostile": tuple(_hostile(row) for row in top.rows("hostile")),
        "faults": tuple(_fault(row) for row in top.rows("fault")),
        "narrow": _narrow(top.table("narrow")),
        "local": _local(top.table("local")),
        "private": private.parse(sums) if "private" in table else None,
        "simulate": simulated.parse(top.table("simulate")),
        "availability": availability.parse(top.table("availability")),
    }
    broker.refuse_unknown()
    top.refuse_unknown()
    return Scenario(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]  # read by kind above


def _speeds(table: Table) -> Speeds:
    given = {"sigma": table.number("sigma"), "median_s": table.number("median_s")}
    factors = table.table("factors").rest()
    table.refuse_unknown()
    return Speeds(**{name: value for name, value in given.items() if value is not None}, factors=factors)  # type: ignore[arg-type]  # `Speeds` checks them


def _fault(table: Table) -> Fault:
    kill, after = table.text("kill"), table.whole("after_version")
    restart = table.number("restart_after_s")
    table.refuse_unknown()
    if kill is None or after is None:
        raise ConfigError("[[fault]] needs the keys kill and after_version")
    return Fault(kill=kill, after_version=after, restart_after_s=1.0 if restart is None else restart)


def _hostile(table: Table) -> Hostile:
    kind = table.text("kind")
    given = {"share": table.number("share"), "strength": table.number("strength"), "samples": table.whole("samples")}
    table.refuse_unknown()
    if kind is None:
        raise ConfigError(f"[[hostile]] needs the key kind: {', '.join(KINDS)}")
    return Hostile(kind=kind, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]  # read by kind above


def _narrow(table: Table) -> Narrow:
    given = {"share": table.number("share"), "width": table.number("width")}
    table.refuse_unknown()
    return Narrow(**{name: value for name, value in given.items() if value is not None})


def _local(table: Table) -> Local:
    given = {"hold_out": table.number("hold_out"), "fine_tune": table.number("fine_tune")}
    table.refuse_unknown()
    return Local(**{name: value for name, value in given.items() if value is not None})


def _dotted(table: Mapping[str, object]) -> dict[str, object]:
    """{"merge": {"buffer_size": 4}} -> {"merge.buffer_size": 4}, as in `aggregator init --set`."""
    dotted: dict[str, object] = {}
    for section, keys in table.items():
        if section == "plan":
            raise ConfigError("[aggregator.plan]: move these keys to the table [plan]")
        if not isinstance(keys, Mapping):
            raise ConfigError(
                f"aggregator.{section} is not in a section: write [aggregator.SECTION], as in aggregator.toml"
            )
        dotted |= {f"{section}.{name}": value for name, value in keys.items()}
    return dotted
