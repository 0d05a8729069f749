"""The newest request for statistics as facts of the ledger: the request, the sum of answers, each device's outcome.

Answers are added up when they come, and none is kept by itself.
"""

import sqlite3
from typing import Any, Final

import msgpack

from ternbus.aggregator.core import records
from ternbus.aggregator.core.statistics import StatisticsState
from ternbus.aggregator.merge.pooled import Pooled
from ternbus.aggregator.store import checksums
from ternbus.broker.protocol.statistics import StatisticsRequest

REQUEST: Final = "statistics"
SUM: Final = "statistics-sum"
OUTCOME: Final = "statistics-of:"  # before a device's name

Written = records.StatisticsAsked | records.StatisticsAnswered | records.StatisticsEnded


def write(db: sqlite3.Connection, record: Written) -> None:
    """Write a record's rows, in the transaction that the caller has begun."""
    match record:
        case records.StatisticsAsked():
            db.execute("DELETE FROM facts WHERE name = ? OR name GLOB ?", (SUM, f"{OUTCOME}*"))
            _set(db, REQUEST, msgpack.packb({"request": record.request, "wait_s": record.wait_s, "open": True}))
        case records.StatisticsAnswered():
            _set(db, OUTCOME + record.device, record.outcome)
            if record.pooled:
                _set(db, SUM, record.pooled)
        case records.StatisticsEnded():
            if (about := _about(db)) is not None:
                _set(db, REQUEST, msgpack.packb({**about, "open": False}))


def read(db: sqlite3.Connection) -> StatisticsState:
    """The newest request, and what has come of it; without a request if there was none."""
    if (about := _about(db)) is None:
        return StatisticsState()
    request = StatisticsRequest.from_meta(msgpack.unpackb(about["request"]))
    content = _fact(db, SUM)
    found = db.execute("SELECT name, value FROM facts WHERE name GLOB ? ORDER BY name", (f"{OUTCOME}*",))
    return StatisticsState(
        pooled=Pooled(request=request) if content is None else Pooled.unpack(request, content),
        wait_s=about["wait_s"],
        is_open=about["open"],
        outcomes={name.removeprefix(OUTCOME): value for name, value in found},
    )


def _about(db: sqlite3.Connection) -> dict[str, Any] | None:
    content = _fact(db, REQUEST)
    return None if content is None else msgpack.unpackb(content)


def _fact(db: sqlite3.Connection, name: str) -> Any:
    row = db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    return None if row is None else row[0]


def _set(db: sqlite3.Connection, name: str, value: object) -> None:
    checksums.insert(db, "facts", (name, value), replace=True)
