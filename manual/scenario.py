"""The keys of a scenario: from the file of `ternbus lab example`, and the bounds that the lab checks."""

import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from importlib.resources import files
from typing import Any

from manual.errors import ManualError
from manual.markdown import code, interval, paragraphs, table
from manual.source import bounds
from ternbus.lab.scenario import availability, end, private, scenario, simulated

HEAD = """\
## A scenario of the lab

`ternbus lab example` prints a file with all keys. [lab.md](../lab.md) explains runs and
simulations. A table in double brackets may be there several times.
"""
MODULES = (scenario, end, private, simulated, availability)
KINDS: dict[str, type] = {
    "": scenario.Scenario, "speeds": scenario.Speeds, "fault": scenario.Fault, "hostile": scenario.Hostile,
    "narrow": scenario.Narrow, "local": scenario.Local, "end": end.End, "private": private.Private,
    "simulate": simulated.Simulated, "availability": availability.Availability,
}  # fmt: skip
FREE = {"plan": "Every key of [the plan](#the-plan).", "aggregator.merge": "Every section and key of aggregator.toml."}
TYPES = {int: "whole number", float: "number", str: "text", bool: "true or false", list: "list", dict: "table"}
TABLE = re.compile(r"^(?:# )?(\[\[?)([\w.]+)\]\]?(?:\s+# (.*))?$")
KEY = re.compile(r"^(# )?(\w+) = (.+?)(?:\s+# (.*))?$")


Entry = tuple[str, Any, bool, str]  # key, value, whether that is the default, and what is said of it
Bounds = dict[str, tuple[Any, Any]]


@dataclass(slots=True)
class Section:
    """A table of the file: its heading, what is said of it, and the keys in it."""

    name: str
    heading: str
    about: list[str] = field(default_factory=list)
    keys: list[Entry] = field(default_factory=list)


def parsed(text: str) -> Iterator[Section]:
    """The tables of the file, in order; the first has the keys above all tables. One that is there twice is one."""
    section, waiting = Section("", "above the tables"), list[str]()
    seen = {"": section}
    for line in text.splitlines()[1:]:  # the first line is about the file
        if found := TABLE.match(line):
            section = seen.setdefault(found[2], Section(found[2], f"{found[1]}{found[2]}{']' * len(found[1])}"))
            section.about += [*waiting, *([found[3]] if found[3] else [])]
            waiting = []
        elif found := KEY.match(line):
            value = tomllib.loads(f"value = {found[3]}")["value"]
            if found[2] not in [key for key, *_ in section.keys]:
                section.keys.append((found[2], value, not found[1], _meaning(section, found[2], found[4])))
        elif line.startswith("# "):
            waiting.append(line.removeprefix("# "))
        elif waiting and not section.name:  # behind the keys above all tables
            section.about, waiting = [*section.about, *waiting], []
    yield from seen.values()


def _meaning(section: Section, key: str, comment: str | None) -> str:
    if comment is None and section.name not in FREE:
        raise ManualError(f"example.toml of the lab says nothing about {key} in [{section.name}]: add it behind #")
    return comment or ""


def sections(unit: Callable[[str], str]) -> list[str]:
    """The parts of the page."""
    text = (files("ternbus.lab") / "example.toml").read_text(encoding="utf-8")
    limits = {key: span for module in MODULES for key, span in bounds(module).items()}
    lines = [HEAD]
    for section in parsed(text):
        rows = [_row(section, key, limits, unit) for key in section.keys]
        about = FREE.get(section.name, " ".join(section.about))
        heading = "[aggregator.SECTION]" if section.name == "aggregator.merge" else section.heading
        lines += [f"### {heading} of a scenario".replace("above the tables of", "Above the tables of"), ""]
        lines += [paragraphs(_sentence(about)), ""] if about else []
        if section.name not in FREE:
            lines += [table(("key", "type", "default", "range", "unit", "meaning"), rows), ""]
    if limits:
        raise ManualError(f"example.toml of the lab lacks {min(limits)!r}, which the lab checks: add it there")
    return lines


def _sentence(text: str) -> str:
    text = text[0].upper() + text[1:]
    return text if text.endswith(".") else f"{text}."


def _row(section: Section, entry: Entry, limits: Bounds, unit: Callable[[str], str]) -> list[str]:
    key, value, is_default, about = entry
    name = f"{section.name}.{key}" if section.name else key
    span = interval(*limits.pop(name, (None, None)))
    kind = KINDS.get(section.name)
    default = value if is_default else {each.name: each.default for each in fields(kind)}.get(key) if kind else None
    return [code(key), TYPES[type(value)], _toml(default), span, unit(name), about]


def _toml(value: object) -> str:
    match value:
        case bool():
            return code(str(value).lower())
        case str():
            return code(f'"{value}"')
        case int() | float() | list():
            return code(str(value))
        case _:
            return ""
