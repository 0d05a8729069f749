"""What each version cost to make and to send, and how stale its updates were: for curves over versions."""

from collections import Counter
from dataclasses import dataclass, field

from ternbus.aggregator.store import tags
from ternbus.aggregator.store.ledger import Ledger


@dataclass(slots=True, kw_only=True)
class Traffic:
    """Of some versions: sizes in bytes by version, and how many merged updates had which staleness."""

    up_bytes: Counter[int] = field(default_factory=Counter)  # of its updates as they were sent, without frames
    down_bytes: dict[int, int] = field(default_factory=dict)  # of its delta, of versions whose delta is kept
    staleness: Counter[int] = field(default_factory=Counter)
    weight: float = 0.0  # the sum of the updates' staleness discounts, each from 0 to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """Which versions can be had back: those from ``oldest`` on, and those with a name."""

    oldest: int
    tags: dict[str, int]  # name -> version


def read(ledger: Ledger, after: int) -> Traffic:
    """Of the versions above ``after``. An update that waits or was dropped is in none."""
    found = Traffic()
    merged = ledger.db.execute(
        "SELECT merged, staleness, count(*), total(size), total(discount) FROM updates WHERE merged > ?"
        " GROUP BY merged, staleness",
        (max(after, 0),),  # a dropped one has -1
    )
    for version, staleness, count, size, weight in merged:
        found.staleness[staleness] += count
        found.up_bytes[version] += int(size)
        found.weight += weight
    deltas = "SELECT version, length(body) FROM versions WHERE version > ? AND body IS NOT NULL"
    found.down_bytes.update(ledger.db.execute(deltas, (after,)).fetchall())
    return found


def kept(ledger: Ledger) -> Kept:
    """Which versions a tag, an export or a rollback can name."""
    (oldest,) = ledger.db.execute("SELECT min(version) FROM snapshots").fetchone()
    return Kept(oldest=int(oldest), tags={name: tag.version for name, tag in tags.read(ledger).items()})
