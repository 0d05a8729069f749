"""docs/reference/settings.md: every key of every settings file, from the definitions that check it."""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any

from manual import scenario
from manual.markdown import code, interval, paragraphs, table
from manual.source import comments, field_comments
from ternbus.aggregator.plan_settings import PlanCheck
from ternbus.aggregator.private_settings import PrivateSettings
from ternbus.aggregator.search_settings import SearchSettings
from ternbus.aggregator.settings import NEW_HOME, SECTIONS
from ternbus.broker.protocol import plan_keys
from ternbus.broker.server import directory as broker_directory
from ternbus.edge.plan.plan import Plan
from ternbus.edge.shell import directory as device_directory
from ternbus.helper.shell import directory as helper_directory

HEAD = """\
# Settings

<!-- python -m manual --write -->

This page is made from the code that checks the files. A key that is not here is refused by name,
and so is a value out of its range. Ranges include their ends. `_s` at the end of a name means
seconds.
"""
AGGREGATOR = """\
## aggregator.toml

`ternbus aggregator init` writes the file, with the meaning of each key beside it, and
`--set SECTION.KEY=VALUE` sets one. Changes are in force after a restart. Two keys stand above the
sections: `federation`, its name, and `broker`, its URL. The [keys of the plan](#the-plan) are in
the section `[plan]`.
"""
PLAN = """\
## The plan

What devices are asked to do: the section `[plan]` of aggregator.toml and of a scenario, and a
task's `default_plan`. A key of the federation replaces one of the task.
[tasks.md](../tasks.md#local-training) has the formulas, [privacy.md](../privacy.md) the keys that
begin with `dp`. A key marked * is one that every device follows, whatever its software; Ternbus
devices follow all of them.
"""
OTHERS: dict[str, tuple[type, str]] = {
    "edge.toml": (
        device_directory.Settings,
        """\
A device's own settings. `ternbus edge join` writes the file, by its
[options](cli.md#ternbus-edge-join). Every value is a text in quotes, also a number.""",
    ),
    "helper.toml": (
        helper_directory.Settings,
        "The settings of a helper of private sums. `ternbus helper init` writes the file.",
    ),
    "broker.toml": (
        broker_directory.Settings,
        """\
The settings of a broker that Ternbus runs. `ternbus broker init` writes the file; after a change of
`names` run `ternbus broker renew`.""",
    ),
}
COLUMNS = ("key", "type", "default", "range", "unit", "meaning")
TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false", tuple: "list of texts"}
# Of the end of a key's name. The longer ending first.
UNITS = (
    ("_bytes_per_s", "bytes/s"), ("_mbit_s", "Mbit/s"), ("frames_per_s", "frames/s"), ("_per_s", "per second"),
    ("_per_minute", "per minute"), ("_bytes", "bytes"), ("session_min", "minutes"), ("pause_min", "minutes"),
    ("_s", "s"), ("local_seconds", "s"), ("end.seconds", "s"), ("hours", "hours"), ("zones", "hours"),
)  # fmt: skip


def page() -> str:
    """The text of the page."""
    parts = [HEAD, AGGREGATOR, *_aggregator(), PLAN, _plan(), ""]
    for name, (kind, about) in OTHERS.items():
        parts += [f"## {name}", "", about, "", _commented(kind), ""]
    parts += scenario.sections(unit)
    return "\n".join(parts).rstrip("\n") + "\n"


def unit(name: str) -> str:
    """The unit that the end of a key's name says; empty for numbers without one."""
    return next((text for ending, text in UNITS if name.endswith(ending)), "")


def shown(value: object) -> str:
    """A value as TOML has it."""
    match value:
        case bool():
            return code(str(value).lower())
        case str():
            return code(f'"{value}"')
        case tuple():
            return code(f"[{', '.join(map(repr, value))}]")
        case int() | float():
            return code(f"{value}" if isinstance(value, int) else f"{value:g}")
        case _:
            return ""


def _aggregator() -> Iterable[str]:
    others = {"private": PrivateSettings, "search": SearchSettings, "plan_check": PlanCheck}
    for name, kind in {**SECTIONS, **others}.items():
        doc = (kind.__doc__ or "").partition("\n\n")[0].strip()
        begins = [f"`{key}` = {shown(value)}" for key, value in NEW_HOME.items() if key.startswith(f"{name}.")]
        begins = [each for each in begins if not each.endswith("= ")]
        more = f" A new federation begins with {', '.join(begins)}." if begins else ""
        yield f"### [{name}]\n\n{paragraphs(doc + more)}\n"
        yield table(COLUMNS, [_row(name, entry) for entry in fields(kind)]) + "\n"


def _row(section: str, entry: Field[Any]) -> tuple[str, ...]:
    about: Mapping[str, Any] = entry.metadata
    default = entry.default
    choices = about.get("one_of")
    kind = "list of texts" if section == "plan_check" else "table" if default is MISSING else TYPES[type(default)]
    if entry.name == "arms":
        kind = "list of tables"
    if entry.name == "default_plan":
        kind, about = "table", {"doc": "the task's plan, from the model's file; with it devices complete the plan"}
    span = ", ".join(map(str, choices)) if choices else interval(about.get("low"), about.get("high"))
    return (code(entry.name), kind, shown(default), span, unit(entry.name), about.get("doc", ""))


def _plan() -> str:
    """A row for each key that a plan may have."""
    about, defaults = comments(plan_keys), {entry.name: entry.default for entry in fields(Plan)}
    rows = []
    for name, key in plan_keys.KEYS.items():
        kind, span = _about_key(key)
        star = " *" if name in plan_keys.SHARED and name != "error_feedback" else ""
        rows.append((code(name) + star, kind, shown(defaults[name]), span, unit(name), about[name]))
    return table(COLUMNS, rows)


def _about_key(key: plan_keys.Key) -> tuple[str, str]:
    """The type and the range of a plan's key."""
    match key:
        case plan_keys.Number():
            return "whole number" if key.whole else "number", interval(key.low, key.high)
        case plan_keys.Choice():
            return "text", ", ".join(key.names)
        case plan_keys.Switch():
            return "true or false", ""
        case plan_keys.Device():
            return "text", "auto, cpu, cuda, cuda:N, mps"


def _commented(kind: type) -> str:
    """A row for each field of a dataclass, with the comment behind it."""
    about: Mapping[str, str] = field_comments(kind)
    rows = [(code(each.name), _needed(each), about[each.name]) for each in fields(kind)]
    return table(("key", "default", "meaning"), rows)


def _needed(entry: Field[Any]) -> str:
    if entry.default is MISSING and entry.default_factory is MISSING:
        return "needed"
    return shown(entry.default) if entry.default not in ("", MISSING) else ""
