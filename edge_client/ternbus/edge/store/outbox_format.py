"""The formats that the outbox has had, its tables, and the way from each format to the next.

The file's `user_version` is its format. The first two formats left it 0 and are told by what the tables hold. A change
of what the outbox holds raises ``FORMAT`` and adds a step here.
"""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

from ternbus.broker import store_format
from ternbus.broker.errors import ConfigError, CorruptError
from ternbus.broker.store_format import EMPTY, Formats, Step
from ternbus.edge.plan.privacy import Account

FORMAT: Final = 2
_TABLES_2: Final = (
    "CREATE TABLE IF NOT EXISTS kept (name TEXT PRIMARY KEY, value) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS residual (id INTEGER PRIMARY KEY CHECK (id = 0), vector BLOB NOT NULL)",
    """CREATE TABLE IF NOT EXISTS outstanding (
    id INTEGER PRIMARY KEY CHECK (id = 0), seq TEXT NOT NULL, base TEXT NOT NULL, samples INTEGER NOT NULL,
    metrics TEXT NOT NULL, codec TEXT NOT NULL, encoding TEXT NOT NULL, encoded BLOB NOT NULL, sealed BLOB NOT NULL,
    frame_bytes INTEGER NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS receipts (
    number INTEGER PRIMARY KEY, key BLOB NOT NULL, seq TEXT NOT NULL, base TEXT NOT NULL, outcome TEXT NOT NULL,
    version TEXT NOT NULL, digest BLOB NOT NULL)""",
    "CREATE TABLE IF NOT EXISTS counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID",
)
_NAMES_2: Final = {"account": Account().dumps(), "head_digest": b"", "protected": ""}  # in `kept`; nothing is known


def _to_2(db: sqlite3.Connection, _: Path) -> None:
    """Make what is missing. A receipt of before has the empty digest, of which `edge verify` says that it is none."""
    for statement in _TABLES_2:
        db.execute(statement)
    if "digest" not in _columns(db, "receipts"):
        db.execute("ALTER TABLE receipts ADD COLUMN digest BLOB NOT NULL DEFAULT x''")
    if db.execute("SELECT 1 FROM kept").fetchone():  # or nothing was saved yet
        db.executemany("INSERT OR IGNORE INTO kept VALUES (?, ?)", _NAMES_2.items())


def _read(db: sqlite3.Connection) -> int:
    if number := _number(db):
        return number
    if not _columns(db, "receipts"):
        return EMPTY
    names = {name for (name,) in db.execute("SELECT name FROM kept")}
    complete = "digest" in _columns(db, "receipts") and _columns(db, "counters")
    return 2 if complete and (not names or names >= _NAMES_2.keys()) else 1


def _number(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _write(db: sqlite3.Connection, number: int) -> None:
    db.execute(f"PRAGMA user_version = {number}")  # which takes no parameter; within a transaction, as the rest


def _columns(db: sqlite3.Connection, table: str) -> set[str]:
    return {row[1] for row in db.execute(f"PRAGMA table_info({table})")}


FORMATS: Final = Formats(
    newest=FORMAT,
    steps={EMPTY: Step(to=2, change=_to_2), 1: Step(to=2, change=_to_2)},
    read=_read,
    write=_write,
)


def open_for_writing(path: Path) -> sqlite3.Connection:
    """The store of a device whose folder is held: made if there is none, migrated if it is of an older format.

    ConfigError where it is no such store, or of a newer format.
    """
    db = _connect(path)
    try:
        store_format.migrate(db, path, FORMATS)
        if not _number(db):
            _write(db, FORMAT)  # the file is of this format from before it had a number
    except (ConfigError, CorruptError):
        db.close()
        raise
    except sqlite3.DatabaseError as error:
        db.close()
        raise store_format.unreadable(path, error) from error
    return db


def open_for_reading(path: Path) -> sqlite3.Connection:
    """The store beside whoever holds the folder. One of an older format stays as it is; its copy in memory is migrated.

    ConfigError where it is no such store, or of a newer format.
    """
    db = _connect(path)
    try:
        found = _read(db)
        if found == FORMAT:
            return db
        if found not in FORMATS.steps:
            raise FORMATS.refusal(path, found)
        with closing(db):
            memory = sqlite3.connect(":memory:", isolation_level=None)
            db.backup(memory)
    except (ConfigError, CorruptError):
        db.close()
        raise
    except sqlite3.DatabaseError as error:
        db.close()
        raise store_format.unreadable(path, error) from error
    FORMATS.advance(memory, path.parent)
    return memory


def _connect(path: Path) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(path, timeout=10.0, isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
    except sqlite3.DatabaseError as error:
        raise store_format.unreadable(path, error) from error
    return db
