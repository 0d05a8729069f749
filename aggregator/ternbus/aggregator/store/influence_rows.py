"""Which rows of the ledger tell how much one update may weigh: those of each device's newest merged update."""

import sqlite3
from typing import Final

from ternbus.aggregator.merge.influence import UPDATES_MIN, Influence, Usual

MEASURED: Final = "FROM updates WHERE merged >= 0 AND norm > 0"
NEWEST: Final = f"SELECT max(id) {MEASURED} GROUP BY device"
# All that `recalled` needs: of each device the newest, and that there were enough updates.
NEEDED: Final = f"{NEWEST} UNION SELECT id FROM (SELECT id {MEASURED} ORDER BY id DESC LIMIT {UPDATES_MIN})"  # noqa: S608 - our own text


def recalled(db: sqlite3.Connection) -> Influence:
    """The bound as the merges left it."""
    influence = Influence()
    (updates,) = db.execute(f"SELECT count(*) FROM (SELECT 1 {MEASURED} LIMIT {UPDATES_MIN})").fetchone()  # noqa: S608 - our own text
    # SQLite takes the other columns from the row of the maximum.
    newest = db.execute(f"SELECT device, norm, samples, max(id) {MEASURED} GROUP BY device ORDER BY max(id)")
    influence.recall(((device, Usual(norm, samples)) for device, norm, samples, _ in newest), updates)
    return influence
