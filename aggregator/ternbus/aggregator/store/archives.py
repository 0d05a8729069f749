"""Old rows of the ledger in files beside it: ``archive/NUMBER.sqlite``, with the tables that grow with every update.

A start reads none of them. The log of merges includes them, so its chain is complete after pruning.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ternbus.aggregator.core import pace
from ternbus.aggregator.store import checksums, influence_rows, merge_log
from ternbus.aggregator.store.ledger import ARCHIVED, Ledger
from ternbus.aggregator.store.rows import set_fact
from ternbus.broker import files, store_format
from ternbus.broker.crash_points import reached

# What goes, by table, and what names its rows. A start looks at the updates merged last and at each device's newest.
OLD: Final = {
    "updates": f"""merged >= 0 AND merged < :before AND segment IS NULL AND id < (SELECT max(id) FROM updates)
        AND id NOT IN ({influence_rows.NEEDED})
        AND id NOT IN (SELECT id FROM (SELECT id, row_number() OVER (PARTITION BY device ORDER BY base DESC) AS place
            FROM updates) WHERE place <= :newest)""",  # noqa: S608 - our own text
    "versions": "version < :before",
    "log": "version < :before",
    "metrics": """version < :before AND (device, version, split)
        NOT IN (SELECT device, max(version), split FROM metrics GROUP BY device, split)""",
}
KEYS: Final = {"updates": "id", "versions": "version", "log": "version", "metrics": "device, version, split"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """The archive that was made, if there was anything to archive; ``rows`` is how many it has by table."""

    path: Path | None
    before: int  # versions below are archived
    rows: dict[str, int]


def prune(ledger: Ledger, keep_versions: int, max_staleness: int) -> Pruned:
    """Move rows of all but the newest versions to a new archive; the caller holds the directory's lock.

    They are deleted when the archive is durable. What a start and the judgement of late updates need stays, also below
    the versions that are kept. CorruptError where a row is not as it was written.
    """
    before = _boundary(ledger, keep_versions, max_staleness)
    if not ledger.db.execute("SELECT 1 FROM versions WHERE version < ?", (before,)).fetchone():
        return Pruned(path=None, before=before, rows=dict.fromkeys(OLD, 0))
    named = json.loads(ledger.fact(merge_log.ARCHIVES) or "[]")
    path = ledger.path.parent / merge_log.FOLDER / f"{len(named) + 1}.sqlite"  # of an attempt that was cut short, too
    with files.storing(path):
        files.make_folder(path.parent, 0o700)
        with files.replacing(path, mode=0o600) as partial:
            _fill(ledger, partial, before)
    digest = files.digest(path).hex()
    reached("archive-written")
    with _attached(ledger, path):
        rows = {table: ledger.db.execute(f"SELECT count(*) FROM archive.{table}").fetchone()[0] for table in OLD}  # noqa: S608 - our own names
        with ledger.transaction():
            _count(ledger.db)
            for table, key in KEYS.items():
                ledger.db.execute(f"DELETE FROM main.{table} WHERE ({key}) IN (SELECT {key} FROM archive.{table})")  # noqa: S608 - our own names
            set_fact(ledger.db, merge_log.ARCHIVES, json.dumps([*named, [path.name, digest, before]]))
            compared_from = int(ledger.fact(merge_log.COMPARED_FROM) or 0)
            set_fact(ledger.db, merge_log.COMPARED_FROM, max(before, compared_from))
    reached("rows-removed")
    ledger.db.execute("VACUUM")  # or the file stays as large as it was
    return Pruned(path=path, before=before, rows=rows)


def _boundary(ledger: Ledger, keep_versions: int, max_staleness: int) -> int:
    """The oldest version that stays: at least those that can be exported, that a start reads, that are not stale."""
    (kept,) = ledger.db.execute(
        "SELECT min(version) FROM (SELECT version FROM versions ORDER BY version DESC LIMIT ?)", (keep_versions,)
    ).fetchone()
    (snapshot,) = ledger.db.execute("SELECT min(version) FROM snapshots").fetchone()
    (start,) = ledger.db.execute("SELECT version FROM server").fetchone()
    return int(min(kept, snapshot, start, ledger.version - max_staleness))


def _fill(ledger: Ledger, path: Path, before: int) -> None:
    tables = [
        ledger.db.execute("SELECT sql FROM sqlite_schema WHERE name = ?", (table,)).fetchone()[0] for table in OLD
    ]
    with store_format.naming(path), closing(sqlite3.connect(path, isolation_level=None)) as db:
        for definition in tables:
            db.execute(definition)
    with _attached(ledger, path), ledger.transaction():
        for table, where in OLD.items():
            ledger.db.execute(
                f"INSERT INTO archive.{table} SELECT * FROM main.{table} WHERE {where}",  # noqa: S608 - our own names
                {"before": before, "newest": pace.RECENT + 1},
            )
    with store_format.naming(path), closing(sqlite3.connect(path, isolation_level=None)) as db:
        for table in OLD.keys() & checksums.COLUMNS.keys():
            for damaged in checksums.damaged(db, table):
                raise ledger.corrupt(f"{damaged} is not as it was written")


@contextmanager
def _attached(ledger: Ledger, path: Path) -> Iterator[None]:
    ledger.db.execute("ATTACH ? AS archive", (str(path),))
    try:
        yield
    finally:
        ledger.db.execute("DETACH archive")


def _count(db: sqlite3.Connection) -> None:
    """How many updates of each device are archived, which the status still counts."""
    for device, number in db.execute("SELECT device, count(*) FROM archive.updates GROUP BY device").fetchall():
        row = db.execute("SELECT value FROM counts WHERE name = ?", (f"{ARCHIVED}{device}",)).fetchone()
        total = number + (row[0] if row else 0)
        checksums.insert(db, "counts", (f"{ARCHIVED}{device}", total), replace=True)
