"""The migration of the ledger from format 8 to 9: retained messages lie in a table with row ids.

Without them the messages were a part of the keys that SQLite compares: to find a place it read several of them whole.
"""

import sqlite3
from pathlib import Path

from ternbus.aggregator.store.schema import FRAMES_SQL


def to_9(db: sqlite3.Connection, _folder: Path) -> None:
    """Make the table anew, with the same rows."""
    db.execute("ALTER TABLE frames RENAME TO former_frames")
    db.execute(FRAMES_SQL)
    db.execute("INSERT INTO frames (topic, payload, crc) SELECT topic, payload, crc FROM former_frames ORDER BY topic")
    db.execute("DROP TABLE former_frames")
