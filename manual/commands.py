"""docs/reference/cli.md: every command, argument and option, as the command line itself declares them."""

import importlib
import math
import re
from collections.abc import Iterator
from enum import Enum
from typing import Any

from typer.main import get_command

from manual.markdown import code, number, paragraphs, table
from manual.source import comments
from ternbus.broker import exit_codes
from ternbus.command import COMMANDS

HEAD = """\
# Commands

<!-- python -m manual --write -->

This page is made from the code. Every command has `--help` (`-h`), and says there the same.
`ternbus --version` prints the version. An option that may be given several times is marked `…`.
"""
EXAMPLE = re.compile(r"^Examples?: (.*)$", flags=re.MULTILINE)
STATED = re.compile(r"(.*?)\s*\[default: (.*)\]", flags=re.DOTALL)
KINDS = {int: "N", float: "NUMBER", str: "TEXT"}


def page() -> str:
    """The text of the page."""
    apps = {name: importlib.import_module(command.module).app for name, command in COMMANDS.items()}
    sections = [_section(f"ternbus {name}", get_command(app), depth=2) for name, app in apps.items()]
    return "\n".join([HEAD, _exit_codes(), *sections]).rstrip("\n") + "\n"


def _exit_codes() -> str:
    """A row for each code in `ternbus.broker.exit_codes`, with the comment behind it."""
    about = comments(exit_codes)
    codes = sorted((value, name) for name, value in vars(exit_codes).items() if name.startswith("EXIT_"))
    rows = [(str(value), about[name]) for value, name in codes]
    return "\n".join(["## Exit codes", "", table(["code", "meaning"], rows), ""])


def _section(name: str, command: Any, depth: int) -> str:
    """A command and, if it is a group, the commands within."""
    lines = [f"{'#' * depth} {name}", ""]
    within = {each: found for each, found in getattr(command, "commands", {}).items() if not found.hidden}
    lines += [*_help(command.help or ""), ""]
    if within:
        rows = [(f"[{each}](#{f'{name} {each}'.replace(' ', '-')})", _first(found)) for each, found in within.items()]
        lines += [table(["command", "what it does"], rows), ""]
        lines += [_section(f"{name} {each}", found, min(depth + 1, 4)) for each, found in within.items()]
        return "\n".join(lines)
    arguments, options = _parameters(command)
    words = " ".join([name, *(_usage(each) for each in arguments), *(["[OPTIONS]"] if options else [])])
    lines += [code(words), ""]
    if arguments:
        lines += [
            table(["argument", "meaning", "default"], ((code(_argument(each)), *_about(each)) for each in arguments)),
            "",
        ]
    if options:
        lines += [table(["option", "meaning", "default"], ((_names(each), *_about(each)) for each in options)), ""]
    return "\n".join(lines)


def _help(text: str) -> Iterator[str]:
    """The paragraphs of a command's help, and its examples as a block."""
    yield paragraphs(EXAMPLE.sub("", text))
    if examples := EXAMPLE.findall(text):
        yield "\n".join(["", "```text", *examples, "```"])


def _first(command: Any) -> str:
    return str(command.help or "").partition("\n\n")[0]


def _parameters(command: Any) -> tuple[list[Any], list[Any]]:
    """The arguments and the options that a user sees, but `--help`."""
    shown = [each for each in command.params if not each.hidden and each.name != "help"]
    return (
        [each for each in shown if each.param_type_name == "argument"],
        [each for each in shown if each.param_type_name == "option"],
    )


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return f"{name.strip('[]…')}{'…' if parameter.nargs != 1 or parameter.multiple else ''}"


def _usage(parameter: Any) -> str:
    return _argument(parameter) if parameter.required else f"[{_argument(parameter)}]"


def _names(option: Any) -> str:
    """The names of an option, with what it takes: `-o`, `--out FILE`."""
    names = ", ".join([*option.opts, *option.secondary_opts])
    return code(names) if option.is_flag else f"{code(f'{names} {_value(option)}')}{' …' if option.multiple else ''}"


def _value(option: Any) -> str:
    """What an option takes: its metavar, its choices, or its type and its bounds."""
    if option.metavar:
        return str(option.metavar)
    kind = option.type_descriptor.annotation
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "|".join(each.value for each in kind)
    return _bounded(KINDS.get(kind, "PATH"), option.min, option.max)


def _bounded(name: str, low: float | None, high: float | None) -> str:
    """`N ≥ 1`, `N 1 to 4`; a bound of the machine's whole numbers is none."""
    if high is not None and high < 2**62:
        return f"{name} ≤ {number(high)}" if low is None else f"{name} {number(low)} to {number(high)}"
    return name if low is None else f"{name} ≥ {number(low)}"


def _about(parameter: Any) -> tuple[str, str]:
    """What a parameter means, and its default, which the help may say in words."""
    found = STATED.fullmatch(parameter.help or "")
    return (found[1], found[2]) if found else (parameter.help or "", _default(parameter))


def _default(parameter: Any) -> str:
    """The default as a user would write it; nothing for a switch that is off."""
    value = parameter.default
    if parameter.required:
        return "required"
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    if callable(value) or value in (None, "", False, [], ()):
        return ""
    if isinstance(value, Enum):
        value = value.value
    if isinstance(value, float) and math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        value = int(value)
    return "on" if value is True else code(str(value))
