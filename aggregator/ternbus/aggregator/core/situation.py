"""The state of a running aggregator that is not in its ledger: connection, awaited devices, losses.

The core saves it when somebody looks at the status, and at a stop.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Self

NAMED_MAX: Final = 100  # devices that are named; the rest is counted


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """For which devices' updates the next version waits, and who has been silent for too long to be waited for."""

    devices: tuple[str, ...] = ()  # at most `NAMED_MAX`
    count: int = 0  # of all of them
    silent: Mapping[str, float] = field(default_factory=dict)  # device -> seconds since it was heard; at most as many
    for_s: float = 0.0  # since the version before, or since an update came into the empty buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """All durations are in seconds, up to the moment of the situation."""

    running_s: float
    connected_s: float | None  # None: there is no connection
    lost_s: float | None  # without a connection, since it was lost or since the start; None: there is one
    fault: str = ""  # why there is none
    unacknowledged_s: float = 0.0  # how long the broker has acknowledged nothing of what it was sent
    withheld: str = ""  # a retained message that the broker refused or dropped, and what to do
    waiting: Waiting = field(default_factory=Waiting)
    losses: Mapping[str, float] = field(default_factory=dict)  # of devices' last trainings, as they say

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Self:
        """The situation that ``as_json`` gave; what a later version has beside that is left out."""
        waiting = {**table["waiting"], "devices": tuple(table["waiting"]["devices"])}
        return cls(**_known(cls, {**table, "waiting": Waiting(**_known(Waiting, waiting))}))


def _known(of: Any, table: Mapping[str, Any]) -> dict[str, Any]:
    names = {each.name for each in fields(of)}
    return {name: value for name, value in table.items() if name in names}
