"""The last answers to each device, and the situation of the running process; only the status reads them.

Counts of refused updates are rows of ``counts`` that name their device. They are written once a second, so that a flood
costs little. The situation is that of the last look at the status.
"""

import json
import sqlite3
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ternbus.aggregator.core import records
from ternbus.aggregator.core.situation import Situation
from ternbus.aggregator.store import checksums

TALLY: Final = "device"  # the first part of a count's name: of one device
IN_A_ROW, AT = "in-a-row", "at"  # the last part; or an outcome
SITUATION, LOSSES = "situation", "losses"  # facts


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """A device's refused updates: how many, how many since the last accepted one, and the last one's time (Unix s)."""

    invalid: int = 0
    stale: int = 0
    in_a_row: int = 0
    at: int = 0


def refused(db: sqlite3.Connection, found: Mapping[str, records.RefusedUpdates], now: float) -> None:
    """Add to the counts of devices, of what came since the last time."""
    for device, new in found.items():
        _count(db, device, "invalid", "value + :number", new.invalid)
        _count(db, device, "stale", "value + :number", new.stale)
        _count(db, device, IN_A_ROW, ":number" if new.after_accepted else "value + :number", new.in_a_row)
        _count(db, device, AT, ":number", int(now))


def _count(db: sqlite3.Connection, device: str, what: str, change: str, number: int) -> None:
    name = f"{TALLY}:{device}:{what}"
    if not checksums.update(db, "counts", {"value": change}, "name = :name", {"name": name, "number": number}):
        checksums.insert(db, "counts", (name, number))


def tallies(db: sqlite3.Connection) -> Mapping[str, Tally]:
    """By device; of one without refused updates an empty one."""
    found: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for name, value in db.execute("SELECT name, value FROM counts WHERE name GLOB ?", (f"{TALLY}:*",)):
        _, device, what = name.split(":", 2)
        found[device][what.replace("-", "_")] = value
    known = Tally.__dataclass_fields__
    rows = {
        device: Tally(**{name: value for name, value in row.items() if name in known}) for device, row in found.items()
    }
    return defaultdict(Tally, rows)


def situation(db: sqlite3.Connection, record: records.SituationTold, now: float) -> None:
    """Write the situation down; losses of before stay, of devices that have said none since the start."""
    table = record.situation.as_json()
    new = table.pop(LOSSES)
    checksums.insert(db, "facts", (SITUATION, json.dumps({AT: now, **table})), replace=True)
    if new:
        checksums.insert(db, "facts", (LOSSES, json.dumps({**losses(db), **new})), replace=True)


def losses(db: sqlite3.Connection) -> dict[str, float]:
    """The loss of each device's last training, as it said."""
    return _fact(db, LOSSES) or {}


def last_situation(db: sqlite3.Connection) -> tuple[float, Situation] | None:
    """When the situation was written down (Unix seconds), and what it was; None: never."""
    table = _fact(db, SITUATION)
    if table is None:
        return None
    at = float(table.pop(AT))
    return at, Situation.from_json(table)


def _fact(db: sqlite3.Connection, name: str) -> dict[str, Any] | None:
    row = db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    return None if row is None else json.loads(row[0])
