"""The migration of the ledger from format 6 to 7: checksums of rows, and the highest accepted base of each key."""

import sqlite3
import zlib
from pathlib import Path
from typing import Final

from ternbus.aggregator.store import checksums, format_7

CHECKED: Final = 7  # the first format with checksums
ADDED: Final = (
    "ALTER TABLE keys ADD COLUMN highest_base INTEGER NOT NULL DEFAULT -1",
    "ALTER TABLE versions ADD COLUMN checksum INTEGER",
)


def to_7(db: sqlite3.Connection, _folder: Path) -> None:
    """What the rows hold is taken for sound: nothing tells whether it is."""
    for statement in ADDED:
        db.execute(statement)
    highest = "coalesce((SELECT max(base) FROM updates WHERE updates.device = keys.device), -1)"
    db.execute(f"UPDATE keys SET highest_base = {highest}")  # noqa: S608 - our own text
    bodies = db.execute("SELECT version, body FROM versions WHERE body IS NOT NULL")
    sums = [(zlib.crc32(body), version) for version, body in bodies]
    db.executemany("UPDATE versions SET checksum = ? WHERE version = ?", sums)
    checksums.register(db)
    for table in [each for each in checksums.COLUMNS if each not in format_7.ADDED]:
        db.execute(f"ALTER TABLE {table} ADD COLUMN crc INTEGER NOT NULL DEFAULT 0")
        checksums.renew(db, table)
