"""`ternbus doctor`: what is wrong with a broker, an aggregator, a device or a helper, and what to do about it.

The components do not know each other, so this module knows only the names of their examinations, as the command does.
"""

import importlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Final

import typer

from ternbus.broker import checkup
from ternbus.broker.checkup import Grade, Result, error, failed
from ternbus.broker.errors import FederationError
from ternbus.broker.link.probe import probe
from ternbus.broker.server import broker_checkup
from ternbus.broker.server.running import is_home

app = typer.Typer(rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]})

EXAMINATIONS: Final[Mapping[str, str]] = {
    "aggregator": "ternbus.aggregator.shell.checkup",
    "device": "ternbus.edge.shell.checkup",
    "helper": "ternbus.helper.shell.checkup",
}
STORES: Final = ("ledger.sqlite", "outbox.db", "helper.db")
MARKS: Final = {Grade.OK: "ok", Grade.WARNING: "warning", Grade.ERROR: "error"}
HERE: Final = "this machine"


@app.command()
def doctor(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="DIR|URL",
            help="Directories of a broker, an aggregator, a device or a helper, or a broker's URL. "
            "[default: the directories in this folder]",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
) -> None:
    """Examine a broker, an aggregator, a device or a helper, and say what to mend.

    It examines this machine, and the directories and brokers that are named, and changes nothing. Of each it looks at
    settings, keys and their modes, stores, clock, disk, certificates, versions, and whether the broker can be reached;
    of a broker's URL at packet size, QoS, retained messages, sessions and access list. Each fault comes with
    what to do.

    Exit codes: 0 nothing to mend, 1 warnings only, 2 an error.

    Example: ternbus doctor agg mqtt://192.168.1.10
    """
    named = [*(targets or _found_here())]
    found = {HERE: [*checkup.machine()], **{target: [*examine(target)] for target in named}}
    if as_json:
        typer.echo(json.dumps({target: [each.as_json() for each in results] for target, results in found.items()}))
    else:
        for target, results in found.items():
            typer.echo("\n".join([target, *map(_line, results)]))
    raise typer.Exit(checkup.worst(each for results in found.values() for each in results))


def examine(target: str) -> Iterator[Result]:
    """All checks of a broker's URL or of a directory."""
    if "://" in target:
        yield from probe(target)
        return
    directory = Path(target)
    if not directory.is_dir():
        yield error("folder", f"{target} is no directory, and no URL such as mqtt://HOST:PORT")
        return
    kinds = [*_kinds(directory)]
    if not kinds:
        yield error("folder", f"{target} is the directory of no broker, aggregator, device or helper")
        return
    yield checkup.writable(directory)
    yield checkup.disk(directory)
    yield from checkup.ahead((directory / name for name in STORES), time.time())
    try:
        yield from broker_checkup.of_client(directory)
        for kind in kinds:
            module = importlib.import_module(EXAMINATIONS[kind]) if kind in EXAMINATIONS else broker_checkup
            yield from module.examine(directory)
    except (FederationError, OSError) as problem:
        yield failed("examination", str(problem))


def _kinds(directory: Path) -> Iterator[str]:
    """What a directory is of."""
    if is_home(directory):
        yield "broker"
    for kind, module in EXAMINATIONS.items():
        if importlib.import_module(module).is_home(directory):
            yield kind


def _found_here() -> list[str]:
    folders = [Path(), *sorted(each for each in Path().iterdir() if each.is_dir())]
    return [str(each) for each in folders if any(_kinds(each))]


def _line(result: Result) -> str:
    mend = f"\n{'':25}-> {result.mend}" if result.mend else ""
    return f"  {MARKS[result.grade]:8} {result.check:13} {result.text}{mend}"
