"""What the page shows of one look at the aggregator, as JSON values; of devices only how many there are."""

import math
from collections.abc import Mapping
from typing import Any, Final

from ternbus.aggregator.dashboard.history import History
from ternbus.aggregator.settings import Settings
from ternbus.aggregator.shell.examination import Examination
from ternbus.aggregator.store.version_traffic import Kept

FINDINGS_MAX: Final = 50  # the worst ones
RECENT_VERSIONS: Final = 30  # that come with every look
HELPER_KEYS: Final = ("state", "enrolled", "waits_for", "seen_at", "answered_at")


def finite(value: Any) -> Any:
    """The value with None in place of numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value


def of(seen: Examination, history: History, kept: Kept, settings: Settings, now: float) -> dict[str, Any]:
    """The state of the federation at the time ``now`` (Unix seconds)."""
    found, health = seen.found, seen.health.as_json()
    findings = health["findings"]
    return {
        "at": now,
        "fault": seen.fault,
        "federation": found["federation"],
        "broker": settings.broker,
        "health": {**health, "findings": findings[:FINDINGS_MAX], "findings_count": len(findings)},
        "head": {
            "version": found["version"],
            "digest": found["digest"],
            "state": found["state"],
            "made_at": health["made_at"],
        },
        "buffer": {"updates": found["buffer"], "size": settings.merge.buffer_size},
        "disk": found["disk"],
        "metric": found["metric"],
        "better": found["better"],
        "work": _work(found, history),
        "rejections": _rejections(found["counts"]),
        "staleness": {
            "updates": [[value, history.staleness[value]] for value in sorted(history.staleness)],
            "from_version": history.counted_from,
            "bound": settings.staleness.max,
        },
        "rate_per_s": history.rate_per_s(now),
        "bytes": {
            "up": sum(row["bytes"] for row in found["devices"].values()),
            "delta": history.columns(history.newest - 1)["down_bytes"][-1] if history.rows else None,
        },
        "kept_from": kept.oldest,
        "tags": kept.tags,
        "devices": len(found["devices"]),
        "helpers": _helpers(found.get("private")),
        "recent": history.columns(history.newest - RECENT_VERSIONS),
    }


def _work(found: Mapping[str, Any], history: History) -> dict[str, Any]:
    """What became of the updates that devices have trained and sent."""
    counts, devices = found["counts"], found["devices"].values()
    stale, invalid = sum(row["stale"] for row in devices), sum(row["invalid"] for row in devices)
    sent = counts["accepted"] + stale + invalid
    lost = stale + invalid + counts["dropped"]
    merged = sum(history.staleness.values())
    return {
        "accepted": counts["accepted"],
        "merged": counts["merged"],
        "stale": stale,
        "invalid": invalid,
        "dropped": counts["dropped"],
        "share": lost / sent if sent else None,
        "mean_weight": history.weight / merged if merged else None,  # of merged ones, by their staleness
    }


def _rejections(counts: Mapping[str, Any]) -> list[list[Any]]:
    """[reason, count], the most frequent first; everything that was not accepted, of whatever kind."""
    found = {name: counts[name] for name in ("stale", "duplicate", "busy") if counts[name]} | counts["invalid"]
    return [[name, count] for name, count in sorted(found.items(), key=lambda row: (-row[1], row[0]))]


def _helpers(private: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if private is None:
        return None
    return {name: {key: row[key] for key in HELPER_KEYS} for name, row in private["helpers"].items()}
