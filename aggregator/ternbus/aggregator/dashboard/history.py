"""The last versions as the page draws them, kept in memory: a look at the ledger reads only what is new."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from ternbus.aggregator.store.version_traffic import Traffic

KEPT: Final = 5000  # versions in memory; a curve of more shows no more
RECENT: Final = 100  # that every look reads: an evaluation comes later than its version
DIGEST_CHARS: Final = 12
RATE_VERSIONS: Final = 10  # whose updates make a rate


class History:
    """Rows of versions by number, and the staleness of all updates that were merged into them."""

    def __init__(self) -> None:
        self.rows: dict[int, Mapping[str, Any]] = {}
        self.staleness: Counter[int] = Counter()
        self.weight = 0.0
        self.counted_from: int | None = None  # the first version whose updates ``staleness`` counts
        self._counted_to = 0
        self._up: dict[int, int] = {}
        self._down: dict[int, int] = {}

    @property
    def newest(self) -> int:
        return max(self.rows, default=-1)

    def lacks(self, versions: Sequence[Mapping[str, Any]]) -> bool:
        """Whether versions between those known and these were not read."""
        return bool(versions) and bool(self.rows) and versions[0]["version"] > self.newest + 1

    @property
    def counted_to(self) -> int:
        """The newest version whose updates are counted; before the first look those of old versions are left out."""
        return max(self._counted_to, self.newest - KEPT)

    def take(self, versions: Iterable[Mapping[str, Any]], traffic: Traffic) -> None:
        """Add what a look found: rows as of the status, and the traffic above ``counted_to``."""
        self.rows |= {row["version"]: row for row in versions}
        for number in sorted(self.rows)[:-KEPT]:
            del self.rows[number]
        self._up = {number: size for number, size in self._up.items() if number in self.rows} | traffic.up_bytes
        self._down = {number: size for number, size in self._down.items() if number in self.rows} | traffic.down_bytes
        if self.counted_from is None:
            self.counted_from = min(traffic.up_bytes, default=None)
        self.staleness += traffic.staleness
        self.weight += traffic.weight
        self._counted_to = max([self._counted_to, *traffic.up_bytes])

    def columns(self, after: int) -> dict[str, Any]:
        """The versions above ``after``, a list each; a metric has None where a version was not evaluated."""
        rows = [self.rows[number] for number in sorted(self.rows) if number > after]
        numbers = [row["version"] for row in rows]
        names = dict.fromkeys(name for row in rows for name in row["metrics"])
        return {
            "version": numbers,
            "time": [row["time"] for row in rows],
            "updates": [row["updates"] for row in rows],
            "staleness_mean": [row["staleness_mean"] for row in rows],
            "staleness_max": [row["staleness_max"] for row in rows],
            "digest": [row["digest"][:DIGEST_CHARS] for row in rows],
            "up_bytes": [self._up.get(number, 0) for number in numbers],
            "down_bytes": [self._down.get(number) for number in numbers],
            "metrics": {name: [row["metrics"].get(name) for row in rows] for name in names},
        }

    def rate_per_s(self, now: float) -> float | None:
        """Merged updates a second, of the last versions up to ``now``: less where no version comes."""
        last = [self.rows[number] for number in sorted(self.rows)[-RATE_VERSIONS - 1 :]]
        if len(last) < 2 or now <= last[0]["time"]:
            return None
        return float(sum(row["updates"] for row in last[1:]) / (now - last[0]["time"]))

    def up_bytes(self) -> int:
        """Of all versions in memory."""
        return sum(self._up.values())
