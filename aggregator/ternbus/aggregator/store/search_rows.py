"""The search as facts of the ledger, of which an earlier Ternbus reads none: state, steps, and the arms of updates."""

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from ternbus.aggregator.core.search_state import SearchState
from ternbus.aggregator.merge.accepted import AcceptedUpdate
from ternbus.aggregator.store import checksums
from ternbus.aggregator.store.schema import STATED
from ternbus.broker.protocol.messages import Metrics

STATE: Final = "search"
STEP: Final = "search:"  # before the number of a step
ARM: Final = "arm:"  # before the id of an accepted update that no version has yet


def accepted(db: sqlite3.Connection, number: int, update: AcceptedUpdate) -> None:
    """Write the arm of an accepted update with this id, if it counts for one."""
    if update.arm is not None:
        checksums.insert(db, "facts", (f"{ARM}{number}", json.dumps([update.arm, update.seconds, update.gain])))


def arm_of(content: str | None) -> dict[str, Any]:
    """What ``accepted`` has written, as fields of an `AcceptedUpdate`."""
    return {} if content is None else dict(zip(("arm", "seconds", "gain"), json.loads(content), strict=True))


def made(db: sqlite3.Connection, state: SearchState | None) -> None:
    """Write the state with a version, whose updates are marked as merged."""
    db.execute(
        "DELETE FROM facts WHERE name GLOB ? AND"
        " substr(name, ?) NOT IN (SELECT CAST(id AS TEXT) FROM updates WHERE merged IS NULL)",
        (f"{ARM}*", len(ARM) + 1),
    )
    if state is None:
        db.execute("DELETE FROM facts WHERE name = ? OR name GLOB ?", (STATE, f"{STEP}*"))
        return
    newest = len(state.steps) - 1
    if newest == 0:  # a search that has begun: steps of an earlier one are none of its own
        db.execute("DELETE FROM facts WHERE name GLOB ?", (f"{STEP}*",))
    _set(db, STATE, state.as_json())
    _set(db, f"{STEP}{newest}", asdict(state.steps[newest]))


def read(db: sqlite3.Connection) -> SearchState | None:
    """The state as the newest version left it."""
    table = _state(db)
    if table is None:
        return None
    rows = db.execute("SELECT name, value FROM facts WHERE name GLOB ?", (f"{STEP}*",))
    steps = {int(name.removeprefix(STEP)): json.loads(value) for name, value in rows}
    return SearchState.from_json(table, tuple(steps[number] for number in sorted(steps)))


def status(db: sqlite3.Connection) -> dict[str, Any] | None:
    """The search as JSON values; None without one."""
    state = read(db)
    return None if state is None else state.status()


def judgements(db: sqlite3.Connection, since: int) -> Sequence[tuple[str, Metrics]]:
    """Evaluators' metrics of the versions from one on, by name."""
    rows = db.execute(
        "SELECT m.device, m.version, m.samples, m.entries, s.entries FROM metrics m LEFT JOIN metrics s"
        " ON s.device = m.device AND s.version = 0 AND s.split = ? WHERE m.split = 'test' AND m.version >= ?"
        " ORDER BY m.device, m.version",
        (STATED, since),
    )
    return [
        (
            device,
            Metrics(
                version=version,
                samples=samples,
                split="test",
                values=json.loads(entries),
                better={} if stated is None else json.loads(stated)["better"],
            ),
        )
        for device, version, samples, entries, stated in rows
    ]


def _state(db: sqlite3.Connection) -> dict[str, Any] | None:
    row = db.execute("SELECT value FROM facts WHERE name = ?", (STATE,)).fetchone()
    return None if row is None else json.loads(row[0])


def _set(db: sqlite3.Connection, name: str, value: object) -> None:
    checksums.insert(db, "facts", (name, json.dumps(value)), replace=True)
