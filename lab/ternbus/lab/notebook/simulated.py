"""The scenario of a run: what the caller chooses, checked by the names that there are."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

from ternbus.aggregator.search_settings import SearchSettings
from ternbus.aggregator.settings import SECTIONS
from ternbus.broker.errors import ConfigError
from ternbus.lab.scenario.end import End
from ternbus.lab.scenario.scenario import Scenario, Speeds
from ternbus.lab.scenario.toml_table import within
from ternbus.lab.spelling import refuse_unknown

FURTHER: Final = (
    "sync", "end", "faults", "hostile", "narrow", "local", "private", "simulate", "dense", "allow_plan_keys",
)  # fmt: skip
SETTINGS: Final = tuple(
    f"{section}.{each.name}"
    for section, kind in {**SECTIONS, "search": SearchSettings}.items()
    for each in fields(kind)
)
MERGE: Final = tuple(name.removeprefix("merge.") for name in SETTINGS if name.startswith("merge."))


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenSpeeds(Speeds):
    """The seconds of a training of each device, in place of draws."""

    seconds: tuple[float, ...] = ()

    def draw(self, devices: int, seed: int, names: Sequence[str] = ()) -> tuple[float, ...]:  # noqa: ARG002 - as of `Speeds`
        return self.seconds[:devices]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """The arguments of a run that its scenario is made of."""

    versions: int | None
    seed: int
    plan: Mapping[str, object] | None = None
    merge: Mapping[str, object] | None = None
    settings: Mapping[str, object] | None = None
    speeds: Any = None
    more: Mapping[str, Any] = field(default_factory=dict)

    def flat(self) -> dict[str, object]:
        """What was chosen, with dotted names."""
        found = {f"plan.{name}": value for name, value in (self.plan or {}).items()}
        found |= {f"merge.{name}": value for name, value in (self.merge or {}).items()}
        found |= {**(self.settings or {}), **self.more, "versions": self.versions, "seed": self.seed}
        return found | ({} if self.speeds is None else {"speeds": self.speeds})


def scenario_of(base: Scenario, given: Choices, names: Sequence[str], simulate: Callable[..., Any]) -> Scenario:
    """The federation's scenario with these choices. Raises `ConfigError` for a name or a value that is wrong.

    ``simulate`` is the method that was called, whose arguments an error names.
    """
    named = [each.name for each in inspect.signature(simulate).parameters.values() if each.kind is each.KEYWORD_ONLY]
    refuse_unknown(given.more, [*named, *FURTHER], "simulate() has no argument")
    merge, settings = given.merge or {}, given.settings or {}
    refuse_unknown(merge, MERGE, "merge has no key")
    refuse_unknown(settings, SETTINGS, "settings has no key")
    more = dict(given.more)
    more.setdefault("end", End(versions=given.versions))
    return replace(
        base,
        seed=given.seed,
        plan=dict(given.plan or {}),
        aggregator={**{f"merge.{name}": value for name, value in merge.items()}, **settings},
        speeds=speeds_of(given.speeds, names),
        **more,
    )


def speeds_of(given: Any, names: Sequence[str]) -> Speeds:
    """The speeds: as they are; the same number of seconds for all; or one for each device, in order or by name."""
    if given is None or isinstance(given, Speeds):
        return given or Speeds()
    if isinstance(given, Mapping):
        refuse_unknown(given, names, "speeds: there is no device")
        if missing := [name for name in names if name not in given]:
            raise ConfigError(f"speeds has no seconds for {missing[0]}: give one for each device, or a number for all")
        given = [given[name] for name in names]
    seconds = [given] * len(names) if isinstance(given, int | float) else list(given)
    if len(seconds) != len(names):
        raise ConfigError(f"speeds has {len(seconds)} numbers for {len(names)} devices: give one for each")
    for each in seconds:
        within("speeds", each, 0, 86_400)
    return GivenSpeeds(seconds=tuple(map(float, seconds)))
