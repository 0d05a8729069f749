"""Which rows of the ledger tell how much one update may weigh: those of each device's newest merged update."""

import sqlite3

from ternbus.aggregator.merge.influence import DEVICES_MIN, MERGES, UPDATES_MIN, Influence, Usual

MEASURED = "FROM updates WHERE merged >= :since AND norm > 0"
NEWEST = f"SELECT max(id) {MEASURED} GROUP BY device"
# All that `recalled` needs: of each device the newest, that there was each merge, that there were enough updates.
NEEDED = f"""{NEWEST} UNION SELECT max(id) {MEASURED} GROUP BY merged
    UNION SELECT id FROM (SELECT id {MEASURED} ORDER BY id DESC LIMIT {UPDATES_MIN})"""  # noqa: S608 - our own text


def recalled(db: sqlite3.Connection) -> Influence:
    """The bound as the merges left it."""
    influence, versions = Influence(), _versions(db)
    if versions:
        since = {"since": oldest(db)}
        query = f"SELECT count(*) FROM (SELECT 1 {MEASURED} LIMIT {UPDATES_MIN})"  # noqa: S608 - our own text
        (updates,) = db.execute(query, {"since": 0}).fetchone()
        # SQLite takes the other columns from the row of the maximum.
        newest = db.execute(
            f"SELECT device, merged, norm, samples, max(id) {MEASURED} GROUP BY device ORDER BY max(id)", since
        )
        usual = ((device, Usual(merged, norm, samples)) for device, merged, norm, samples, _ in newest)
        influence.recall(usual, updates, reversed(versions))
    return influence


def oldest(db: sqlite3.Connection) -> int:
    """The oldest version whose updates have to be looked at: a start does not read all that were ever merged."""
    versions = _versions(db)
    if len(versions) < MERGES:
        return 0
    query = f"SELECT count(*) FROM (SELECT DISTINCT device {MEASURED} LIMIT {DEVICES_MIN})"  # noqa: S608 - our own text
    (devices,) = db.execute(query, {"since": versions[-1]}).fetchone()
    return versions[-1] if devices == DEVICES_MIN else 0


def _versions(db: sqlite3.Connection) -> list[int]:
    """Those that were made of measured updates, newest first."""
    query = f"SELECT DISTINCT merged {MEASURED} ORDER BY merged DESC LIMIT {MERGES}"
    return [version for (version,) in db.execute(query, {"since": 0})]
