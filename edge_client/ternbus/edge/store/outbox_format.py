"""The formats that the outbox has had, its tables, and the way from each format to the next.

The file's `user_version` is its format. The first two formats left it 0 and are told by what the tables hold. A change
of what the outbox holds raises ``FORMAT`` and adds a step here, but for a name in `kept` that may be missing.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

from ternbus.broker import store_format
from ternbus.broker.errors import CorruptError
from ternbus.broker.path_errors import quoted
from ternbus.broker.store_format import EMPTY, Formats, Step, checksum
from ternbus.edge.plan.privacy import Account

FORMAT: Final = 4
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
TABLES: Final = {
    # ``crc`` is a row's checksum. The names of `WHOLE` in `kept` hold those of the tables of that name.
    "kept": "CREATE TABLE kept (name TEXT PRIMARY KEY, value, crc INTEGER NOT NULL) WITHOUT ROWID",
    "residual": "CREATE TABLE residual (id INTEGER PRIMARY KEY CHECK (id = 0), vector BLOB NOT NULL)",
    "outstanding": """CREATE TABLE outstanding (
    id INTEGER PRIMARY KEY CHECK (id = 0), seq TEXT NOT NULL, base TEXT NOT NULL, samples INTEGER NOT NULL,
    metrics TEXT NOT NULL, codec TEXT NOT NULL, encoding TEXT NOT NULL, encoded BLOB NOT NULL, sealed BLOB NOT NULL,
    frame_bytes INTEGER NOT NULL)""",
    "receipts": """CREATE TABLE receipts (
    number INTEGER PRIMARY KEY, key BLOB NOT NULL, seq TEXT NOT NULL, base TEXT NOT NULL, outcome TEXT NOT NULL,
    version TEXT NOT NULL, digest BLOB NOT NULL, crc INTEGER NOT NULL)""",
    "counters": """CREATE TABLE counters (
    name TEXT PRIMARY KEY, value INTEGER NOT NULL, crc INTEGER NOT NULL) WITHOUT ROWID""",
    # of an outstanding update of a private sum; seeds and boxes are those of all helpers, one after the other
    "private": """CREATE TABLE private (
    id INTEGER PRIMARY KEY CHECK (id = 0), terms BLOB NOT NULL, context BLOB NOT NULL, min INTEGER NOT NULL,
    seeds BLOB NOT NULL, boxes BLOB NOT NULL)""",
}
COLUMNS: Final = {  # that a checksum covers
    "kept": "name, value",
    "residual": "vector",
    "outstanding": "seq, base, samples, metrics, codec, encoding, encoded, sealed, frame_bytes",
    "receipts": "key, seq, base, outcome, version, digest",
    "counters": "name, value",
    "private": "terms, context, min, seeds, boxes",
}
NAMES: Final = {  # that `kept` has as soon as anything was saved
    "enrolled", "seq_limit", "session", "head_version", "head_seq", "answered_base", "evaluated", "accepted", "key",
    "schema", "head_digest", "protected", "account", "residual", "outstanding",
    "private",
}  # fmt: skip
NAMED_MAX: Final = 3  # in an error
_TABLES_3: Final = tuple(name for name in TABLES if name != "private")
WHOLE: Final = ("residual", "outstanding", "private")  # tables of one row at most, whose checksum is in `kept`
_REPLACE: Final = {  # a row, beside what `COLUMNS` has its id or its checksum
    table: f"REPLACE INTO {table} ({f'id, {names}' if table in WHOLE else f'{names}, crc'}) "  # noqa: S608 - our own names
    f"VALUES ({', '.join('?' * (names.count(',') + 2))})"
    for table, names in COLUMNS.items()
}
_NAMES_2: Final = {"account": Account().dumps(), "head_digest": b"", "protected": ""}  # in `kept`; nothing is known


def _to_2(db: sqlite3.Connection, _: Path) -> None:
    """Make what is missing. A receipt of before has the empty digest, of which `edge verify` says that it is none."""
    for statement in _TABLES_2:
        db.execute(statement)
    if "digest" not in _columns(db, "receipts"):
        db.execute("ALTER TABLE receipts ADD COLUMN digest BLOB NOT NULL DEFAULT x''")
    if db.execute("SELECT 1 FROM kept").fetchone():  # or nothing was saved yet
        db.executemany("INSERT OR IGNORE INTO kept VALUES (?, ?)", _NAMES_2.items())


def _to_3(db: sqlite3.Connection, _: Path) -> None:
    """Give what is there its checksums. The tables are made anew, as in a new store."""
    is_used = db.execute("SELECT 1 FROM kept").fetchone() is not None
    for table in _TABLES_3:
        db.execute(f"ALTER TABLE {table} RENAME TO old")
        db.execute(TABLES[table])
        order = "number" if table == "receipts" else "1"
        for row in db.execute(f"SELECT {COLUMNS[table]} FROM old ORDER BY {order}").fetchall():  # noqa: S608 - our own names
            insert(db, table, row)
        db.execute("DROP TABLE old")
    if is_used:
        for table in ("residual", "outstanding"):
            insert(db, "kept", (table, whole_checksum(db, table)))


def _to_4(db: sqlite3.Connection, _: Path) -> None:
    """Make the table of private sums, which is empty: an older version sent no such updates."""
    db.execute(TABLES["private"])
    if db.execute("SELECT 1 FROM kept").fetchone():
        insert(db, "kept", ("private", ""))


def _make(db: sqlite3.Connection, _: Path) -> None:
    for definition in TABLES.values():
        db.execute(definition)


def insert(db: sqlite3.Connection, table: str, row: Sequence[object]) -> None:
    """Write a row of the newest format, in place of one of the same name; ``row`` is in the order of ``COLUMNS``."""
    values = tuple(row)
    db.execute(_REPLACE[table], (0, *values) if table in WHOLE else (*values, checksum(*values)))


def insert_all(db: sqlite3.Connection, table: str, rows: Iterable[Sequence[object]]) -> None:
    """Write several rows with one call, as `insert` does one; not of a table with one row at most."""
    db.executemany(_REPLACE[table], [(*row, checksum(*row)) for row in rows])


def whole_checksum(db: sqlite3.Connection, table: str) -> str:
    """What `kept` says of a table with one row at most."""
    row = db.execute(f"SELECT {COLUMNS[table]} FROM {table}").fetchone()  # noqa: S608 - our own names
    return "" if row is None else str(checksum(*row))


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
    steps={
        EMPTY: Step(to=FORMAT, change=_make),
        1: Step(to=2, change=_to_2),
        2: Step(to=3, change=_to_3),
        3: Step(to=4, change=_to_4),
    },
    read=_read,
    write=_write,
)


# Of what a device has spent since, an old copy knows nothing: its owner has to decide.
RESTORE: Final = (
    "restore it from a backup (under differential privacy one that was made after the last training: an older one "
    "has forgotten what was spent since)"
)


def remedy(path: Path) -> str:
    """What to do about a damaged store."""
    folder = quoted(path.parent)
    return (
        f"{RESTORE}; or ask for an invitation, and `ternbus edge join --renew INVITATION.toml "
        f"{folder}` keeps what can be read; where that is refused, move the file away and run "
        f"`ternbus edge rejoin INVITATION.toml {folder}`"
    )


def naming(path: Path) -> AbstractContextManager[None]:
    """`store_format.naming`, with what to do about a damaged outbox."""
    return store_format.naming(path, remedy(path))


def check(db: sqlite3.Connection, path: Path) -> None:
    """Raise CorruptError where a store of the newest format, or what is in it, is not as it was written."""
    try:
        found = list(islice(_damaged(db), NAMED_MAX + 1))
    except (sqlite3.Error, UnicodeDecodeError) as error:
        raise store_format.unreadable(path, error, remedy(path)) from error
    if found:
        more = " and more" if len(found) > NAMED_MAX else ""
        raise CorruptError(f"{path}: {', '.join(found[:NAMED_MAX])}{more} is not as it was written; {remedy(path)}")


def _damaged(db: sqlite3.Connection) -> Iterator[str]:
    for (line,) in db.execute("PRAGMA quick_check"):
        if line != "ok":
            yield f"a page ({line})"
    definitions = db.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL").fetchall()
    if sorted(sql for (sql,) in definitions) != sorted(TABLES.values()):
        yield "the definition of a table"
        return
    for table in TABLES.keys() - WHOLE:
        yield from (f"a row of {table}" for *_, is_sound in rows(db, table) if not is_sound)
    kept = {name: value for name, value, _ in rows(db, "kept")}
    if not kept:  # nothing was saved yet
        return
    yield from (table for table in WHOLE if kept.get(table) != whole_checksum(db, table))
    yield from (f"{name} in kept" for name in NAMES - kept.keys())


def rows(db: sqlite3.Connection, table: str, order: str = "") -> Iterator[tuple[Any, ...]]:
    """The columns of each row with a checksum of its own, and whether it has that checksum."""
    before, db.text_factory = db.text_factory, _as_it_is
    try:
        for *values, crc in db.execute(f"SELECT {COLUMNS[table]}, crc FROM {table} {order}"):  # noqa: S608 - our own names
            yield *values, crc == checksum(*values)
    finally:
        db.text_factory = before


def _as_it_is(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")


def open_for_writing(path: Path) -> sqlite3.Connection:
    """The store of a device whose folder is held: made if there is none, migrated if it is of an older format.

    ConfigError where it is of a newer format, CorruptError where it is no such store or damaged.
    """
    with _opening(path) as db:
        store_format.migrate(db, path, FORMATS)
        check(db, path)
        return db


def open_for_reading(path: Path) -> sqlite3.Connection:
    """The store beside whoever holds the folder. One of an older format stays as it is; its copy in memory is migrated.

    ConfigError where it is of a newer format, CorruptError where it is no such store or damaged.
    """
    with _opening(path) as db:
        found = _read(db)
        if found == FORMAT:
            db.execute("BEGIN")  # all that is read is of one moment
            check(db, path)
            return db
        if found not in FORMATS.steps:
            raise FORMATS.refusal(path, found)
        connect = partial(sqlite3.connect, ":memory:", isolation_level=None)
        with closing(db), store_format.opening(path, connect, remedy(path)) as memory:
            db.backup(memory)
            FORMATS.advance(memory, path.parent)
            return memory


@contextmanager
def _opening(path: Path) -> Iterator[sqlite3.Connection]:
    connect = partial(sqlite3.connect, path, timeout=10.0, isolation_level=None)
    with store_format.opening(path, connect, remedy(path)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        yield db
