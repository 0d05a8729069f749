"""The migration of the ledger from format 8 to 9: retained messages lie in a table with row ids.

Without them the messages were a part of the keys that SQLite compares: to find a place it read several of them whole.
"""

import sqlite3
from contextlib import closing
from pathlib import Path

from ternbus.aggregator.store.schema import FRAMES_SQL
from ternbus.broker import store_format


def to_9(db: sqlite3.Connection, _folder: Path) -> None:
    """Make the table anew, with the same rows.

    Where a page is damaged, with the rows that can be read from both ends; the table of before stays, since SQLite
    cannot free its pages. `ternbus aggregator check` sees it, and `repair`, which needs this format, leaves it out.
    """
    (_, _, path) = db.execute("PRAGMA database_list").fetchone()
    db.execute("ALTER TABLE frames RENAME TO former_frames")
    db.execute(FRAMES_SQL)
    with closing(sqlite3.connect(path)) as beside:
        # a transaction in which a read has failed takes no change: another connection reads the table as it was before
        is_of_8 = "crc" in {row[1] for row in beside.execute("PRAGMA table_info(frames)")}
        rows = (beside, "frames") if is_of_8 else (db, "former_frames")  # which the steps before have read
        is_whole = any(_is_copied(*rows, direction, db) for direction in ("ASC", "DESC"))
    if is_whole:
        db.execute("DROP TABLE former_frames")


def _is_copied(before: sqlite3.Connection, table: str, direction: str, db: sqlite3.Connection) -> bool:
    """Copy rows, the first or the last of them first; whether all could be read."""
    try:
        query = f"SELECT topic, payload, crc FROM {table} ORDER BY topic {direction}"  # noqa: S608 - the words above
        for row in before.execute(query):
            db.execute("INSERT OR IGNORE INTO frames (topic, payload, crc) VALUES (?, ?, ?)", row)
    except sqlite3.DatabaseError as error:
        if error.sqlite_errorcode & 0xFF not in store_format.DAMAGED:
            raise
        return False
    return True
