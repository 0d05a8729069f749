"""What an aggregator has done so far, read from its ledger beside a running process."""

import json
from pathlib import Path
from typing import Any

from aggregator.ledger import Ledger, unsigned


def read(directory: Path) -> dict[str, Any]:
    """The status as JSON values.

    ``versions`` has a row for every version, with the newest test metrics that any evaluator sent for it; ``devices``
    is a map by name; ``counts.invalid`` is a map by reason of everything refused.
    """
    ledger = Ledger(directory / "ledger.sqlite", read_only=True)
    try:
        ledger.db.execute("BEGIN")  # one moment for all of it
        return _read(ledger)
    finally:
        ledger.close()


def _read(ledger: Ledger) -> dict[str, Any]:
    version = int(ledger.fact("version"))
    (digest,) = ledger.db.execute("SELECT digest FROM versions WHERE version = ?", (version,)).fetchone()
    (buffer,) = ledger.db.execute("SELECT count(*) FROM updates WHERE merged IS NULL").fetchone()
    return {
        "federation": ledger.fact("federation"),
        "version": version,
        "digest": digest.hex(),
        "state": ledger.fact("state"),
        "buffer": buffer,
        "counts": _counts(ledger),
        "devices": _devices(ledger, version),
        "versions": _versions(ledger),
    }


def _counts(ledger: Ledger) -> dict[str, Any]:
    accepted, merged = ledger.db.execute("SELECT count(*), count(merged) FROM updates").fetchone()
    counts: dict[str, Any] = {
        "accepted": accepted,
        "merged": merged,
        "stale": 0,
        "duplicate": 0,
        "busy": 0,
        "invalid": {},
    }
    for name, value in ledger.db.execute("SELECT name, value FROM counts ORDER BY name"):
        outcome, _, reason = name.partition(":")
        if reason:
            counts["invalid"][reason] = value
        else:
            counts[outcome] = value
    return counts


def _devices(ledger: Ledger, version: int) -> dict[str, Any]:
    rows = ledger.db.execute(
        "SELECT d.name, d.state, d.status, d.base, d.software, d.seen_at, d.update_bytes, k.key, k.seq,"
        " (SELECT count(*) FROM updates u WHERE u.device = d.name),"
        " (SELECT max(base) FROM updates u WHERE u.device = d.name)"
        " FROM devices d JOIN keys k ON k.device = d.name AND k.public = d.public ORDER BY d.name"
    )
    return {
        name: {
            "key": key.hex(),
            "key_state": state,
            "state": status or "offline",
            "training_on": unsigned(training_on) if training_on < -1 else training_on,
            "last_seq": unsigned(seq),
            "base": base,
            "staleness": None if base is None else version - base,
            "updates": updates,
            "bytes": size_bytes,
            "seen_at": seen_at,
            "software": software,
        }
        for name, state, status, training_on, software, seen_at, size_bytes, key, seq, updates, base in rows
    }


def _versions(ledger: Ledger) -> list[dict[str, Any]]:
    measured = {
        version: json.loads(entries)
        for version, entries in ledger.db.execute(
            "SELECT version, entries FROM metrics WHERE split = 'test' ORDER BY received_at"
        )
    }
    rows = ledger.db.execute(
        "SELECT version, digest, made_at, updates, staleness_mean, staleness_max FROM versions ORDER BY version"
    )
    return [
        {
            "version": version,
            "digest": digest.hex(),
            "time": made_at,
            "updates": updates,
            "staleness_mean": mean,
            "staleness_max": highest,
            "metrics": measured.get(version, {}),
        }
        for version, digest, made_at, updates, mean, highest in rows
    ]
