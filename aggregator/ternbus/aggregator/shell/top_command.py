"""The command `ternbus top`."""

import sys
from functools import partial
from typing import Annotated

import typer

from ternbus.aggregator.shell import administration, examination
from ternbus.aggregator.shell.arguments import Dir
from ternbus.aggregator.store.ledger import blaming
from ternbus.broker.errors import ConfigError
from ternbus.broker.path_errors import quoted

app = typer.Typer(rich_markup_mode=None, context_settings={"help_option_names": ["-h", "--help"]})


@app.command()
def top(
    directory: Dir,
    every: Annotated[float, typer.Option(min=0.5, max=3600, metavar="SECONDS", help="Time between two looks.")] = 2.0,
) -> None:
    """Show an aggregator live in the terminal.

    It shows health, devices and versions, also over ssh; q ends it.

    It needs the extra `top`.

    Example: ternbus top agg
    """
    settings = administration.load_settings(directory)
    streams = (sys.stdin, sys.stdout, sys.stderr)  # closed ones are None; textual fills a file with codes of a screen
    if not all(each and each.isatty() for each in streams):
        raise ConfigError(f"`ternbus top` needs a terminal: use `ternbus aggregator status {quoted(directory)}`")
    try:
        from ternbus.aggregator.shell.top import VERSIONS_MAX, Top  # noqa: PLC0415 - a library that only this needs
    except ModuleNotFoundError as error:
        raise ConfigError("`ternbus top` needs textual; run: pip install 'ternbus[top]'") from error
    look = partial(examination.look, directory, VERSIONS_MAX)
    Top(look, broker=settings.broker, every_s=every, blaming=partial(blaming, directory)).run()
