"""The scenario of a run: what the caller chooses, checked by the names that there are."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from numbers import Real
from typing import Any, Final

import numpy as np

from ternbus.aggregator.search_settings import SearchSettings
from ternbus.aggregator.settings import SECTIONS
from ternbus.broker.errors import ConfigError
from ternbus.broker.plural import counted
from ternbus.broker.protocol import plan_keys
from ternbus.broker.spelling import refuse_unknown
from ternbus.lab.scenario.availability import Availability
from ternbus.lab.scenario.end import End
from ternbus.lab.scenario.private import Private
from ternbus.lab.scenario.scenario import Fault, Hostile, Local, Narrow, Scenario, Speeds
from ternbus.lab.scenario.simulated import Simulated
from ternbus.lab.scenario.toml_table import within

ONE: Final = {"end": End, "narrow": Narrow, "local": Local, "simulate": Simulated, "availability": Availability}
SEVERAL: Final = {"faults": Fault, "hostile": Hostile}
FURTHER: Final = ("sync", *ONE, *SEVERAL, "private", "dense", "allow_plan_keys")
LISTS: Final = ("dense", "allow_plan_keys")
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
    for name in given.more:
        if name not in (*named, *FURTHER) and (place := _place_of(name)):
            raise ConfigError(f"simulate() has no argument {name!r}: it is {place}")
    refuse_unknown(given.more, [*named, *FURTHER], "simulate() has no argument")
    merge, settings = plain("merge", given.merge), plain("settings", given.settings)
    refuse_unknown(merge, MERGE, "merge has no key")
    for name in settings:
        if dotted := [each for each in SETTINGS if each.startswith(f"{name}.")]:
            raise ConfigError(f"settings has no section {name!r}, but keys with a dot: {', '.join(dotted)}")
        if name.startswith("plan.") and (place := _place_of(name.removeprefix("plan."))):
            raise ConfigError(f"settings has no key {name!r}: it is {place}")
    refuse_unknown(settings, SETTINGS, "settings has no key")
    more = _of_kinds(given.more)
    versions = None if given.versions is None else whole("versions", given.versions)
    more.setdefault("end", End(versions=versions))
    return replace(
        base,
        seed=whole("seed", given.seed),
        plan=plain("plan", given.plan),
        aggregator={**{f"merge.{name}": value for name, value in merge.items()}, **settings},
        speeds=speeds_of(given.speeds, names),
        **more,
    )


def _place_of(name: str) -> str:
    """What a key is that stands in another place than among the arguments; empty if there is none."""
    if name in plan_keys.KEYS:
        return f"a key of the plan, plan={{{name!r}: …}}, in a sweep 'plan.{name}'"
    if name in MERGE:
        return f"a key of the merge, merge={{{name!r}: …}}, in a sweep 'merge.{name}'"
    if dotted := [each for each in SETTINGS if each.endswith(f".{name}")]:
        return f"a key of the settings, settings={{{dotted[0]!r}: …}}"
    return f"a field of local, local=Local({name}=…)" if name in {each.name for each in fields(Local)} else ""


def plain(name: str, given: Any) -> dict[str, Any]:
    """The argument's keys and values, with Python's numbers in place of numpy's. Raises `ConfigError` for no dict."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{name} is {given!r}, but must be a dict of key to value")
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in given.items()}


def whole(name: str, given: Any) -> int:
    """A whole number, of Python or of numpy. Raises `ConfigError` for anything else."""
    if isinstance(given, bool) or not isinstance(given, int | np.integer):
        raise ConfigError(f"{name} is {given!r}, but must be a whole number")
    return int(given)


def is_number(given: object) -> bool:
    """Whether it is a real number: of Python, of numpy, or of another class of numbers."""
    return isinstance(given, Real | Decimal) and not isinstance(given, bool)


def _of_kinds(given: Mapping[str, Any]) -> dict[str, Any]:
    """Further fields of a scenario. Raises `ConfigError` for what is not of the field's class, such as a dict."""
    found = dict(given)
    if not isinstance(sync := found.get("sync", False), bool):
        raise ConfigError(f"sync is {sync!r}, but must be True or False")
    for name in LISTS:
        if isinstance(text := found.get(name), str):
            raise ConfigError(f"{name} is one text: give a list of them, as [{text!r}]")
    for name, kind in {**ONE, **SEVERAL, "private": Private}.items():
        if found.get(name) is None:
            continue
        values = found[name] if name in SEVERAL and isinstance(found[name], list | tuple) else [found[name]]
        for each in values:
            if not isinstance(each, kind):
                raise ConfigError(f"{name} has {each!r}: give {kind.__name__}(…) of ternbus.lab")
        if name in SEVERAL:
            found[name] = tuple(values)
    return found


def speeds_of(given: Any, names: Sequence[str]) -> Speeds:
    """The speeds: as they are; the same number of seconds for all; or one for each device, in order or by name."""
    if given is None or isinstance(given, Speeds):
        return given or Speeds()
    if isinstance(given, np.ndarray) and given.ndim == 0:
        given = given.item()
    if isinstance(given, str) or not (is_number(given) or isinstance(given, Iterable)):
        raise ConfigError(f"speeds is {given!r}: give the seconds of a training, one number or one for each device")
    if isinstance(given, Mapping):
        refuse_unknown(given, names, "speeds: there is no device")
        if missing := [name for name in names if name not in given]:
            raise ConfigError(f"speeds has no seconds for {missing[0]}: give one for each device, or a number for all")
        given = [given[name] for name in names]
    seconds = [given] * len(names) if is_number(given) else list(given)
    if len(seconds) != len(names):
        raise ConfigError(
            f"speeds has {counted(len(seconds), 'number')} for {counted(len(names), 'device')}: give one for each"
        )
    for each in seconds:
        if not is_number(each):
            raise ConfigError(f"speeds has {each!r}, but must have numbers of seconds")
        within("speeds", float(each), 0, 86_400)
    return GivenSpeeds(seconds=tuple(map(float, seconds)))
