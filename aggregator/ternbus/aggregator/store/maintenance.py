"""Maintenance of a ledger's files in another thread. Nothing is lost if a crash prevents it."""

import sqlite3
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from ternbus.aggregator.store import checksums
from ternbus.broker.crash_points import reached


def checkpoint(path: Path) -> None:
    """Move SQLite's write-ahead log into its file. Else a commit does so now and then, and everything waits."""
    name = f"{path.absolute().as_uri()}?mode=rw"  # never make one: an empty file looks damaged
    with closing(sqlite3.connect(name, isolation_level=None, timeout=30.0, uri=True)) as db:
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA wal_checkpoint(PASSIVE)")
    reached("log-moved")


def remove(paths: Iterable[Path]) -> None:
    """Remove files that nothing refers to any more; those of hundreds of megabytes take the disk a while."""
    for path in paths:
        path.unlink(missing_ok=True)
        reached("file-removed")


def simulate(db: sqlite3.Connection) -> None:
    """Prepare a new ledger for a simulation: its clock begins at 0, and nobody waits for the disk."""
    db.execute("PRAGMA synchronous = OFF")
    checksums.update(db, "versions", {"made_at": "0.0"}, "1", {})
