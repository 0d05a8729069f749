"""The table of devices: search, order and page of one look, for federations of many devices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ternbus.aggregator.shell.examination import Examination
from ternbus.broker.errors import ConfigError

LIMIT: Final = 50  # rows a page, and at most
SEARCH_CHARS_MAX: Final = 100
ORDERS_MAX: Final = 32  # searches of one look that are remembered
WORST: Final = "wrong"  # the order in which devices with a finding come first, the worst of them before
KEYS: Final = (
    "updates", "staleness", "refused_share", "stale_share", "loss", "seen_at", "bytes", "samples", "software",
    "failing", "epsilon",
)  # fmt: skip
TEXTS: Final = ("name", "state", "answer", "software")
SORTS: Final = (WORST, *TEXTS, "updates", "staleness", "refused_share", "stale_share", "loss", "seen_at", "bytes")


@dataclass(slots=True)
class Devices:
    """The devices of one look; their rows are made when somebody asks."""

    seen: Examination
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _orders: dict[tuple[str, str, bool], list[dict[str, Any]]] = field(default_factory=dict)

    def page(self, *, search: str, sort: str, descending: bool, offset: int, limit: int) -> dict[str, Any]:
        """Some rows, in an order; ConfigError for an order that is none. What is not known comes last in any order."""
        if sort not in SORTS:
            raise ConfigError(f"no such order: {sort[:SEARCH_CHARS_MAX]}; known are {', '.join(SORTS)}")
        rows = self._ordered(search[:SEARCH_CHARS_MAX].casefold().strip(), sort, descending)
        offset = max(0, min(offset, len(rows)))
        return {
            "total": len(self.seen.found["devices"]),
            "matching": len(rows),
            "offset": offset,
            "rows": rows[offset : offset + max(1, min(limit, LIMIT))],
        }

    def _ordered(self, search: str, sort: str, descending: bool) -> list[dict[str, Any]]:
        wanted = (search, sort, descending)
        if wanted not in self._orders:
            if not self._rows:
                self._rows = _rows(self.seen)
            if len(self._orders) >= ORDERS_MAX:
                self._orders.clear()
            rows = [row for row in self._rows if search in _text(row)] if search else self._rows
            known = [row for row in rows if row[sort] is not None]
            # of equals by name, whatever the direction: two stable sorts
            known.sort(key=lambda row: row[sort], reverse=descending)
            self._orders[wanted] = [*known, *(row for row in rows if row[sort] is None)]
        return self._orders[wanted]


def _rows(seen: Examination) -> list[dict[str, Any]]:
    """By name."""
    wrong: dict[str, list[tuple[int, str]]] = {}
    for finding in seen.health.findings:
        if finding.subject:
            wrong.setdefault(finding.subject, []).append((-int(finding.level), finding.text))
    found: Mapping[str, Mapping[str, Any]] = seen.found["devices"]
    return [_row(name, found[name], wrong.get(name, ())) for name in sorted(found)]


def _row(name: str, row: Mapping[str, Any], wrong: Sequence[tuple[int, str]]) -> dict[str, Any]:
    answer = row["answer"]
    return {
        "name": name,
        "state": row["state"] if row["key_state"] == "active" else row["key_state"],
        "role": "evaluator" if row["evaluates"] else "device",
        "answer": None if answer is None else answer["outcome"],
        "reason": "" if answer is None else answer["reason"],
        **{key: row[key] for key in KEYS},
        WORST: wrong[0] if wrong else None,
        "findings": [text for _, text in wrong],
    }


def _text(row: Mapping[str, Any]) -> str:
    """What a search looks in."""
    parts = (*(row[key] or "" for key in TEXTS), row["role"], row["reason"], *row["findings"])
    return "\n".join(parts).casefold()
