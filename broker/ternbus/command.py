"""The command line `ternbus`: a group of commands, of which only the one that runs is imported."""

import importlib
import os
import sqlite3
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final, NamedTuple, NoReturn

import typer
from typer.core import TyperGroup
from typer.main import get_command, get_group

from ternbus.broker.errors import ConfigError, CorruptError, LinkError, StorageError
from ternbus.broker.exit_codes import EXIT_CONFIG, EXIT_FAILED, EXIT_INTERRUPTED
from ternbus.broker.version import software


class Command(NamedTuple):
    """The module with a command's typer app `app`, and its line in `ternbus --help`."""

    module: str
    help: str


COMMANDS: Final[Mapping[str, Command]] = {
    "broker": Command("ternbus.broker.cli", "Run a broker: mosquitto, or nats-server from its wheel."),
    "aggregator": Command(
        "ternbus.aggregator.shell.cli", "Run the server: accept updates, merge them, publish the model."
    ),
    "edge": Command("ternbus.edge.shell.cli", "Run a device: follow the model, train, send updates."),
    "lab": Command("ternbus.lab.cli", "Run a whole federation on this machine and report its results."),
}


class LazyGroup(TyperGroup):
    """A group that lists commands by name and help alone, and imports a command's module when the command runs.

    `ternbus edge` therefore does not load the aggregator or the lab, which saves memory on devices.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Like typer's method, but return the imported command instead of its placeholder.

        The types are `Any` because typer's own have no public names.
        """
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None:
            command = get_group(importlib.import_module(COMMANDS[name].module).app)
        return name, command, rest


app = typer.Typer(
    name="ternbus",
    cls=LazyGroup,
    help="Asynchronous federated learning over MQTT, with signed, ternary-compressed updates.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _name, _command in COMMANDS.items():
    app.add_typer(typer.Typer(), name=_name, help=_command.help)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(software())
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line (default: this process's arguments) and exit with a code of `exit_codes`."""
    code: int | str | None = 0
    try:
        # Not app(), which would install a hook that prints local variables in tracebacks, including keys.
        get_command(app)(arguments, prog_name="ternbus")
    except (ConfigError, CorruptError) as error:
        code = _complain(error, EXIT_CONFIG)
    except (LinkError, StorageError, sqlite3.Error) as error:
        code = _complain(error, EXIT_FAILED)
    except OSError as error:  # for example a full disk: not a defect of the program, so without a traceback
        if isinstance(error, BrokenPipeError):
            raise
        code = _complain(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", EXIT_FAILED)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except SystemExit as done:
        code = done.code
    sys.exit(code if _flushed() else EXIT_FAILED)


def _complain(error: object, code: int) -> int:
    typer.echo(f"ternbus: {error}", err=True)
    return code


def _flushed() -> bool:
    """Flush standard output; return False, without a traceback, if its reader has ended (`ternbus … | head -1`)."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True
