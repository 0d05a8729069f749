"""The formats that a helper's store has had, its tables, and how it is opened.

The file's `user_version` is its format. Box keys are here and nowhere else: a copy of this file that is put back would
open sets again that it has forgotten.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

from ternbus.broker import store_format
from ternbus.broker.errors import CorruptError
from ternbus.broker.path_errors import quoted
from ternbus.broker.store_format import EMPTY, Formats, Step, checksum

FILE: Final = "helper.db"
ASIDE: Final = "damaged-"  # and a number: a folder with a damaged file, which may have box keys in it
FORMAT: Final = 1
TABLES: Final = {  # ``crc`` is a row's checksum
    "kept": "CREATE TABLE kept (name TEXT PRIMARY KEY, value, crc INTEGER NOT NULL) WITHOUT ROWID",
    "box_keys": """CREATE TABLE box_keys (
    number INTEGER PRIMARY KEY, secret BLOB NOT NULL, made_s REAL NOT NULL, retired_s REAL, crc INTEGER NOT NULL)""",
    "roster": """CREATE TABLE roster (
    public BLOB PRIMARY KEY, device TEXT NOT NULL, active INTEGER NOT NULL, admitted_by TEXT NOT NULL,
    admitted_s REAL NOT NULL, crc INTEGER NOT NULL) WITHOUT ROWID""",
    "used": """CREATE TABLE used (
    device TEXT NOT NULL, base INTEGER NOT NULL, "set" BLOB NOT NULL, crc INTEGER NOT NULL,
    PRIMARY KEY (device, base)) WITHOUT ROWID""",
    "sets": """CREATE TABLE sets (
    digest BLOB PRIMARY KEY, state TEXT NOT NULL, count INTEGER NOT NULL, n INTEGER NOT NULL, base INTEGER NOT NULL,
    context BLOB NOT NULL, written_s REAL NOT NULL, crc INTEGER NOT NULL) WITHOUT ROWID""",
    "log": "CREATE TABLE log (number INTEGER PRIMARY KEY, entry BLOB NOT NULL, crc INTEGER NOT NULL)",
    "notes": "CREATE TABLE notes (name TEXT PRIMARY KEY, value, crc INTEGER NOT NULL) WITHOUT ROWID",
    "counters": """CREATE TABLE counters (
    name TEXT PRIMARY KEY, value INTEGER NOT NULL, crc INTEGER NOT NULL) WITHOUT ROWID""",
}
INDEXES: Final = {
    "used_by_set": 'CREATE INDEX used_by_set ON used ("set")',
    "roster_by_device": "CREATE INDEX roster_by_device ON roster (device)",
}
COLUMNS: Final = {  # that a checksum covers
    "kept": "name, value",
    "box_keys": "number, secret, made_s, retired_s",
    "roster": "public, device, active, admitted_by, admitted_s",
    "used": 'device, base, "set"',
    "sets": "digest, state, count, n, base, context, written_s",
    "log": "number, entry",
    "notes": "name, value",
    "counters": "name, value",
}
NAMED_MAX: Final = 3  # in an error


def _make(db: sqlite3.Connection, _: Path) -> None:
    for definition in (*TABLES.values(), *INDEXES.values()):
        db.execute(definition)


def _read(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _write(db: sqlite3.Connection, number: int) -> None:
    db.execute(f"PRAGMA user_version = {number}")  # which takes no parameter; within a transaction, as the rest


FORMATS: Final = Formats(newest=FORMAT, steps={EMPTY: Step(to=1, change=_make)}, read=_read, write=_write)


def insert(db: sqlite3.Connection, table: str, row: Sequence[object]) -> None:
    """Write a row, in place of one of the same name; ``row`` is in the order of ``COLUMNS``."""
    values = (*row, checksum(*row))
    places = ", ".join("?" for _ in values)
    db.execute(f"REPLACE INTO {table} ({COLUMNS[table]}, crc) VALUES ({places})", values)  # noqa: S608 - our own names


def remedy(path: Path) -> str:
    """What to do about a damaged or missing store."""
    folder = quoted(path.parent)
    return f"move the file away and run `ternbus helper restored {folder}`, which makes a new box key; put no copy back"


def naming(path: Path) -> AbstractContextManager[None]:
    """`store_format.naming`, with what to do about a damaged store."""
    return store_format.naming(path, remedy(path))


def open_for_writing(path: Path) -> sqlite3.Connection:
    """The store of a helper, made if there is none.

    ConfigError where it is of a newer format, CorruptError where it is no such store or damaged.
    """
    path.touch(mode=0o600)
    path.chmod(0o600)
    return _opened(path, TABLES, migrates=True)


def open_for_reading(path: Path) -> sqlite3.Connection:
    """The store beside the process that uses it; only the small tables are checked."""
    return _opened(path, TABLES.keys() - {"used", "sets", "log"}, migrates=False)


def _opened(path: Path, tables: Iterable[str], *, migrates: bool) -> sqlite3.Connection:
    connect = partial(sqlite3.connect, path, timeout=10.0, isolation_level=None)
    with store_format.opening(path, connect, remedy(path)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA secure_delete = ON")  # an erased box key leaves nothing
        if migrates:
            store_format.migrate(db, path, FORMATS)
        elif (found := _read(db)) != FORMAT:
            raise FORMATS.refusal(path, found, "run `ternbus helper run`")
        check(db, path, tables)
        return db


def check(db: sqlite3.Connection, path: Path, tables: Iterable[str]) -> None:
    """Raise CorruptError where the store, or what is in these tables, is not as it was written."""
    found = list(islice(_damaged(db, tables), NAMED_MAX + 1))
    if found:
        more = " and more" if len(found) > NAMED_MAX else ""
        raise CorruptError(f"{path}: {', '.join(found[:NAMED_MAX])}{more} is not as it was written; {remedy(path)}")


def _damaged(db: sqlite3.Connection, tables: Iterable[str]) -> Iterator[str]:
    definitions = {sql for (sql,) in db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")}
    if definitions != {*TABLES.values(), *INDEXES.values()}:
        yield "the definition of a table"
        return
    for table in tables:
        yield from (f"a row of {table}" for *_, is_sound in rows(db, table) if not is_sound)


def rows(db: sqlite3.Connection, table: str) -> Iterator[tuple[Any, ...]]:
    """The columns of each row, and whether it has its checksum."""
    for *values, crc in db.execute(f"SELECT {COLUMNS[table]}, crc FROM {table}"):  # noqa: S608 - our own names
        yield *values, crc == checksum(*values)
