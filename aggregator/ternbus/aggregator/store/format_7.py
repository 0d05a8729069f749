"""The migration of the ledger from format 7 to 8: empty tables for private sums."""

import sqlite3
from pathlib import Path
from typing import Final

from ternbus.aggregator.store.schema import PRIVATE_SQL

ADDED: Final = ("helpers", "terms", "contexts", "private_updates", "sets")  # tables


def to_8(db: sqlite3.Connection, _folder: Path) -> None:
    """No federation of before had private sums."""
    for statement in PRIVATE_SQL.split(";\n"):
        db.execute(statement)
