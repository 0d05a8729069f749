"""The rollback to an earlier model, by the running process or, without one, by the command."""

import json
import sys
from pathlib import Path
from typing import Annotated, Final

import typer

from ternbus.aggregator.shell import administration
from ternbus.aggregator.shell.administration import FirstModel
from ternbus.aggregator.shell.arguments import Dir
from ternbus.aggregator.shell.version_commands import Named, Number
from ternbus.aggregator.store import control, tags, version_rows
from ternbus.aggregator.store.ledger import reading
from ternbus.broker.errors import ConfigError
from ternbus.broker.model_files import save_safetensors
from ternbus.broker.protocol.schema import to_vector
from ternbus.broker.version import software

FILE: Final = "rollback.safetensors"  # in the directory, while a model of a file is taken over


def rollback(
    directory: Dir,
    number: Number = None,
    named: Named = None,
    model: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Model file with the same tensors, instead of a version.")
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", help="Do not ask for confirmation, which only a terminal is asked.")
    ] = False,
) -> None:
    """Publish an earlier model again, as a new version; the versions since are withdrawn. Also while it runs.

    The new version is downlink.slots + 1 above the newest, so that every device takes its snapshot, and then holds the
    earlier model bit for bit. The server's optimizer begins anew. Updates on withdrawn versions are answered `stale`,
    and those that wait to be merged are dropped. The log of merges has an entry that says so.

    Example: ternbus aggregator rollback agg --version 56
    """
    if sum((number is not None, named is not None, model is not None)) != 1:
        raise ConfigError("give one of --version, --tag and --model")
    administration.load_settings(directory)
    content = None if model is None else FirstModel.load(model)
    with reading(directory) as ledger:
        newest = ledger.version
        if content is None:
            number = version_rows.find(ledger, tag=named, is_best=False) if number is None else number
            tags.vector_of(ledger, number)  # or it cannot be had
        else:
            ledger.kinds().check(content.tensors)
            to_vector(ledger.schema(), content.tensors)  # or it is no model of this federation
    what = f"the model of {model}" if number is None else f"version {number}"
    if not yes and sys.stdin.isatty():
        typer.confirm(f"publish {what} again, and withdraw the versions up to {newest}?", abort=True)
    if number is not None:
        found = to_version(directory, number)
    elif content is not None:
        save_safetensors(directory / FILE, content.tensors, {})
        try:
            found = _ask(directory, {"file": FILE})
        finally:
            (directory / FILE).unlink(missing_ok=True)
    typer.echo(f"version {found} is {what} again; versions up to {newest} are withdrawn")


def to_version(directory: Path, number: int) -> int:
    """Publish a kept version again; the number under which it is back. ConfigError where it cannot be had."""
    return _ask(directory, {"version": number})


def _ask(directory: Path, asked: dict[str, object]) -> int:
    administration.request(directory, control.ROLLBACK, json.dumps(asked), software())
    with reading(directory) as ledger:
        return ledger.version
