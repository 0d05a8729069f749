"""The findings of an examination, as values: level, subject, start, and what to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from ternbus.broker.plural import counted

NAMES_MAX: Final = 3


class Level(IntEnum):
    """How bad a finding is; a note is nothing to mend."""

    NOTE = 0
    DEGRADED = 1
    DOWN = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong, or worth a note; ``since`` is in Unix seconds, None: not known."""

    level: Level = Level.NOTE
    kind: str  # a name for programs
    text: str
    subject: str = ""  # a device; empty: the whole federation
    since: float | None = None

    @property
    def sentence(self) -> str:
        return f"{self.subject} {self.text}" if self.subject else self.text


def unmerged(count: int, of: str = "") -> str:
    """That so many accepted updates are in no version of a closed federation; ``of`` says whose they are."""
    return f"{counted(count, 'accepted update')}{of} {'stays' if count == 1 else 'stay'} unmerged"


def of_devices(names: Sequence[str], noun: str = "device") -> str:
    """The names, of many only the first: `pi-1, pi-2, pi-3 and 9 more devices`."""
    shown, more = ", ".join(names[:NAMES_MAX]), len(names) - NAMES_MAX
    return f"{shown} and {more} more {noun}{'' if more == 1 else 's'}" if more > 0 else shown
