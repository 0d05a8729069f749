"""The token by which a person acts in the dashboard: a secret in the aggregator's directory, and its command."""

import re
import secrets
from pathlib import Path
from typing import Annotated, Final

import typer

from ternbus.aggregator.shell import administration
from ternbus.aggregator.shell.arguments import Dir
from ternbus.broker.errors import ConfigError
from ternbus.broker.files import read_secret, storing, write_secret
from ternbus.broker.path_errors import quoted

FILE: Final = "dashboard.token"
AUDIT: Final = "dashboard-audit.jsonl"
AUDIT_BEFORE: Final = f"{AUDIT}.1"
TOKEN_BYTES: Final = 32
TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{40,100}")


def read(directory: Path) -> str:
    """The token; ConfigError where there is none, where it is none, or where other users can read it."""
    path = directory / FILE
    token = read_secret(path).decode("ascii", "replace").strip()
    if not TOKEN.fullmatch(token):
        command = f"ternbus aggregator dashboard-token {quoted(directory)} --new"
        raise ConfigError(f"{path} is no token; make a new one: {command}")
    return token


def make(directory: Path) -> str:
    """A new token in place of the one before, whose sessions end."""
    token = secrets.token_urlsafe(TOKEN_BYTES)
    with storing(directory / FILE):
        write_secret(directory / FILE, token.encode() + b"\n")
    return token


def ensure(directory: Path) -> str:
    """The token, made where there is none."""
    return read(directory) if (directory / FILE).exists() else make(directory)


def dashboard_token(
    directory: Dir,
    new: Annotated[
        bool, typer.Option("--new", help="Make a new token; who is logged in by the old one is not.")
    ] = False,
) -> None:
    """Print the token that the dashboard asks for before it changes anything. It is in DIR/dashboard.token.

    Example: ternbus aggregator dashboard-token agg
    """
    administration.load_settings(directory)
    typer.echo(make(directory) if new else ensure(directory))
