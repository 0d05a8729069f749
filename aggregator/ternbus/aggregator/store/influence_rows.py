"""The query for the bound on influence: each device's newest merged update."""

import sqlite3
from typing import Final

from ternbus.aggregator.merge.influence import UPDATES_MIN, Influence, Usual

MEASURED: Final = "merged >= 0 AND norm > 0"
# For each device by the index of its bases: a start must not look at every update that there ever was.
_OF_DEVICES: Final = f"""FROM devices JOIN updates ON updates.id =
    (SELECT id FROM updates WHERE device = devices.name AND {MEASURED} ORDER BY base DESC LIMIT 1)"""  # noqa: S608 - our own text
NEWEST: Final = f"SELECT updates.id {_OF_DEVICES}"
# All that `recalled` needs: of each device the newest, and that there were enough updates.
NEEDED: Final = (
    f"{NEWEST} UNION SELECT id FROM (SELECT id FROM updates WHERE {MEASURED} ORDER BY id DESC LIMIT {UPDATES_MIN})"  # noqa: S608 - our own text
)


def recalled(db: sqlite3.Connection) -> Influence:
    """The bound as the merges left it."""
    influence = Influence()
    updates = len(db.execute(f"SELECT 1 FROM updates WHERE {MEASURED} LIMIT {UPDATES_MIN}").fetchall())  # noqa: S608 - our own text
    newest = db.execute(f"SELECT device, updates.base, norm, samples {_OF_DEVICES}")
    influence.recall(((device, Usual(*values)) for device, *values in newest), updates)
    return influence
