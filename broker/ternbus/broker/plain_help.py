"""Help as plain text: typer's tables cut options and values where the terminal is narrow, and these must be typed."""

from typing import Any

import typer
from typer.core import TyperGroup


class PlainGroup(TyperGroup):
    """A group that lists its commands with their whole first sentences, of which typer cuts the end.

    The types are `Any` because typer's own have no public names.
    """

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        listed = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        rows = [(name, each.get_short_help_str(len(each.help or ""))) for name, each in listed.items() if each]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def command_group(about: str) -> typer.Typer:
    """An app of several commands, whose help is plain text; without a command it is printed."""
    return typer.Typer(cls=PlainGroup, no_args_is_help=True, rich_markup_mode=None, help=about)
