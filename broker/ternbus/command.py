"""The command line `ternbus`: a group of commands, of which only the one that runs is imported."""

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Final, NamedTuple, NoReturn

import typer
from typer.main import get_command

from ternbus.broker.complaint import complaint
from ternbus.broker.exit_codes import EXIT_FAILED, EXIT_INTERRUPTED
from ternbus.broker.plain_help import PlainGroup
from ternbus.broker.streams import prepare_streams
from ternbus.broker.version import software


class Command(NamedTuple):
    """The module with a command's typer app `app`, and its line in `ternbus --help`.

    ``alone`` are modules with an app of some of its commands, by their names: those that start a service on a device.
    """

    module: str
    help: str
    alone: Mapping[str, str] = {}


WIDTH_MAX: Final = 100  # of help, in characters
COMMANDS: Final[Mapping[str, Command]] = {
    "broker": Command("ternbus.broker.cli", "Run a broker: mosquitto, or nats-server from its wheel."),
    "aggregator": Command(
        "ternbus.aggregator.shell.cli", "Run the server: accept updates, merge them, publish the model."
    ),
    "edge": Command(
        "ternbus.edge.shell.cli",
        "Run a device: follow the model, train, send updates.",
        dict.fromkeys(("run", "evaluate", "export"), "ternbus.edge.shell.run_commands"),
    ),
    "helper": Command(
        "ternbus.helper.shell.cli", "Run a helper of private sums: open sums of updates, never a single one."
    ),
    "lab": Command("ternbus.lab.cli", "Run a whole federation on this machine and report its results."),
    "top": Command("ternbus.aggregator.shell.top_command", "Show an aggregator live in the terminal."),
    "doctor": Command("ternbus.doctor", "Examine a broker, an aggregator, a device or a helper, and say what to mend."),
}


class LazyGroup(PlainGroup):
    """A group that lists commands by name and help alone, and imports a command's module when the command runs.

    `ternbus edge` therefore does not load the aggregator or the lab, which saves memory on devices.
    """

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """Like typer's method, but return the imported command instead of its placeholder.

        The types are `Any` because typer's own have no public names.
        """
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None:
            known = COMMANDS[name]
            module = known.alone.get(rest[0], known.module) if rest else known.module
            command = get_command(importlib.import_module(module).app)
        return name, command, rest


app = typer.Typer(
    name="ternbus",
    cls=LazyGroup,
    help="Asynchronous federated learning over MQTT, with signed, ternary-compressed updates.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDTH_MAX},
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
    prepare_streams()
    try:
        # Not app(), which would install a hook that prints local variables in tracebacks, including keys.
        get_command(app)([*map(_expanded, sys.argv[1:] if arguments is None else arguments)], prog_name="ternbus")
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except SystemExit as done:
        code = done.code
    except Exception as error:
        if (known := complaint(error)) is None:
            raise
        text, code = known
        nameless = isinstance(error, OSError) and error.filename is None
        if not nameless or _flushed():  # else it was standard output, which the flush has named
            _complain(text)
    sys.exit(code if _flushed() else EXIT_FAILED)


def _expanded(argument: str) -> str:
    """The argument with the home folder in place of `~`, which a shell leaves alone in quotes and behind `--out=`."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{os.path.expanduser(value)}" if value.startswith("~") else argument  # noqa: PTH111 - as in files.expanded


def _complain(text: str) -> None:
    with suppress(OSError):  # standard error, too, may be a file on a full disk
        typer.echo(f"ternbus: {text}", err=True)


def _flushed() -> bool:
    """Flush standard output; return False, without a traceback, if its reader has ended (`ternbus … | head -1`)."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            _complain(f"{error.strerror}: standard output")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True
