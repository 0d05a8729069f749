"""The migration of the ledger from format 5 to 6: roles of members, and the norms and samples that bound influence."""

import sqlite3
from pathlib import Path
from typing import Final

ADDED: Final = (
    "ALTER TABLE devices ADD COLUMN role TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE invitations ADD COLUMN role TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE updates ADD COLUMN norm REAL",
    "ALTER TABLE updates ADD COLUMN stated INTEGER",
)


def to_6(db: sqlite3.Connection, _folder: Path) -> None:
    """Who is there has no role and stays as it is; no norm is known of what was accepted before."""
    for statement in ADDED:
        db.execute(statement)
