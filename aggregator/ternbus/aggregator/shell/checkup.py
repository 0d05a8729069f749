"""`ternbus doctor` for an aggregator's directory."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from ternbus.aggregator.core.findings import Level
from ternbus.aggregator.core.registry import ACTIVE
from ternbus.aggregator.shell import administration, examination, transport
from ternbus.aggregator.store import control
from ternbus.aggregator.store.ledger import LEDGER, blaming
from ternbus.aggregator.store.remedy import start_command
from ternbus.broker import checkup
from ternbus.broker.checkup import Grade, Result, failed, ok, warning
from ternbus.broker.errors import FederationError
from ternbus.broker.link.probe import reach
from ternbus.broker.link.tls import TLS_KEY
from ternbus.broker.plural import counted
from ternbus.broker.protocol import topics
from ternbus.broker.version import software

GRADES = {Level.NOTE: Grade.OK, Level.DEGRADED: Grade.WARNING, Level.DOWN: Grade.ERROR}
MARKS = (administration.TOML, LEDGER)  # files that make a directory an aggregator's


def is_home(directory: Path) -> bool:
    return any((directory / name).exists() for name in MARKS)


def examine(directory: Path) -> Iterator[Result]:
    """All checks; a running process is only asked to write down what it knows."""
    yield from checkup.secrets(directory / name for name in (administration.KEY, TLS_KEY))
    try:
        settings = administration.load_settings(directory)
        with blaming(directory):
            seen = examination.look(directory, versions_max=examination.INTERVALS)
    except FederationError as problem:
        yield failed("settings", str(problem))
        return
    yield ok("settings", f"federation {settings.federation} at version {seen.found['version']}")
    for text in settings.warnings:
        yield warning("settings", text, f"look at {directory / administration.TOML}")
    for found in seen.health.findings:
        text, _, mend = found.sentence.partition("; ")
        yield Result(grade=GRADES[found.level], check=found.kind, text=text, mend=mend)
    if seen.health.connected:
        yield ok("broker", f"connected to {settings.broker}")
    elif not control.is_running(directory) and start_command(directory) != "up":  # which starts the broker, too
        yield from reach(partial(transport.connect, directory, settings), topics.status(settings.federation))
    others = {
        name: row["software"]
        for name, row in seen.found["devices"].items()
        if row["key_state"] == ACTIVE and row["software"] not in {"", software()}
    }
    if others:
        name = min(others)
        text = f"{counted(len(others), 'device')} of another version than {software()}: {name} {others[name]}"
        yield warning("version", text, "install the same version everywhere")
