"""Help as plain text: typer's tables cut options and values where the terminal is narrow, and these must be typed."""

from collections.abc import Sequence
from typing import Any, Final

import typer
from typer.core import TyperGroup

UNBROKEN: Final = "\u2011"  # in place of a hyphen while lines are broken
_Context: Any = TyperGroup.context_class  # typer's own has no public name


class WholeNames(_Context.formatter_class):  # type: ignore[misc]  # the base has the type Any, as above
    """A formatter that breaks no line within `--an-option`: typer does, at each hyphen."""

    def write_text(self, text: str) -> None:
        super().write_text(text.replace("-", UNBROKEN))

    def write_dl(self, rows: Sequence[tuple[str, str]], *args: Any, **options: Any) -> None:
        super().write_dl([(name, about.replace("-", UNBROKEN)) for name, about in rows], *args, **options)

    def getvalue(self) -> str:
        return str(super().getvalue()).replace(UNBROKEN, "-")


_Context.formatter_class = WholeNames  # of groups and commands alike: no argument of a Typer chooses it


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
