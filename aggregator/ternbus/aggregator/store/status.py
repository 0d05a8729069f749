"""The status of an aggregator, read from its ledger while a process may be writing."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ternbus.aggregator.core import disk_guard
from ternbus.aggregator.core.clones import CLONED
from ternbus.aggregator.core.registry import HELPER
from ternbus.aggregator.store import candidate_rows, device_rows, disk, metric_rows, search_rows
from ternbus.aggregator.store.answers import TALLY
from ternbus.aggregator.store.ledger import ARCHIVED, Ledger, reading
from ternbus.aggregator.store.measurements import Measurements
from ternbus.aggregator.store.schema import DROPPED
from ternbus.broker.protocol.messages import CLOSED


def read(directory: Path, versions_max: int | None = None) -> dict[str, Any]:
    """The status as JSON values.

    ``versions`` has a row for every version that is not archived, or of them the last ``versions_max``, with the newest
    test metrics that each evaluator sent for it, by its name, as ``evaluations``, and those of the first of them by
    name as ``metrics``; ``metric`` is the primary one, and ``better`` the direction of each; ``devices`` is a map by
    name, its ``samples`` those of its newest update, its ``epsilon`` what a device says that it has spent of privacy
    (None: nothing), its ``failing`` why its work fails (None: it does not), its ``cloned`` how often two machines were
    found to use its key, its ``classes`` on how many samples of each class it trains (None: it does not say); ``local``
    is what devices report of their own data, see ``device_metrics``, over all of them, for a version or of a device,
    and None where nobody does; ``disk`` is the part of the file system that is free, and its state: `enough`, `low`,
    `full` (updates are answered `busy`); ``claim`` is the ``device`` that last named a ``version`` newer than the
    newest here, and that version (None: none does): perhaps the folder is an older copy; ``candidate`` is what is
    evaluated before it becomes a version, with its ``reports`` by device (None: nothing is); ``search`` is what
    `SearchState.status` says of the search in the federation (None: there is none). ``counts.unmerged`` are
    accepted updates that no version has though the federation is closed: a merge takes updates of ``merge.min_devices``
    devices; ``counts.invalid`` is a map by reason of everything refused.

    Metrics are read of the versions in ``versions``, and of each sender its newest: a metric that only older ones had
    is not in ``better``, and one of a device's own model is that of one of its last 100 versions.
    """
    with reading(directory) as ledger:
        return read_ledger(ledger, versions_max)


def invitations(directory: Path, now: float) -> list[dict[str, Any]]:
    """Invitations that nobody has used, as JSON values, without their codes; ``now`` in Unix seconds."""
    with reading(directory) as ledger:
        rows = ledger.db.execute(
            "SELECT i.device, i.role, i.made_at, i.expires_at, d.state FROM invitations i LEFT JOIN devices d"
            " ON d.name = i.device UNION ALL"
            " SELECT name, ?, made_at, expires_at, iif(proof = x'', NULL, 'active') FROM helpers WHERE code != ''"
            " ORDER BY 1",
            (HELPER,),
        ).fetchall()
    return [
        {
            "device": device,
            "role": role,
            "state": "expired" if expires_at <= now else "open",
            "made_at": made_at,
            "expires_at": expires_at,
            "key_state": key_state,  # of the key that it will replace, if the device has one
        }
        for device, role, made_at, expires_at, key_state in rows
    ]


def read_ledger(ledger: Ledger, versions_max: int | None = None, also: Collection[int] = ()) -> dict[str, Any]:
    """The same of a ledger that is open; the versions in ``also`` come too."""
    version = ledger.version
    (digest,) = ledger.db.execute("SELECT digest FROM versions WHERE version = ?", (version,)).fetchone()
    (buffer,) = ledger.db.execute("SELECT count(*) FROM updates WHERE merged IS NULL").fetchone()
    (first,) = ledger.db.execute(
        "SELECT min(version) FROM (SELECT version FROM versions ORDER BY version DESC LIMIT ?)",
        (-1 if versions_max is None else versions_max,),
    ).fetchone()
    stated, free = metric_rows.stated(ledger), disk.free(ledger.path.parent)
    measured = metric_rows.shown(ledger, stated, 0 if versions_max is None else first, also)
    return {
        "federation": ledger.fact("federation"),
        "version": version,
        "digest": digest.hex(),
        "state": ledger.fact("state"),
        "buffer": buffer,
        "disk": {"free": free, "state": disk_guard.state_of(free)},
        "counts": _counts(ledger, unmerged=buffer if ledger.fact("state") == CLOSED else 0),
        **measured.common(),
        "claim": _claim(ledger, version),
        "devices": device_rows.read(ledger, version, measured, stated),
        "candidate": candidate_rows.status(ledger.db),
        "search": search_rows.status(ledger.db),
        "versions": _versions(ledger, measured, first, also),
    }


def _claim(ledger: Ledger, newest: int) -> dict[str, Any] | None:
    device, version = json.loads(ledger.fact("claim") or '["", -1]')
    return {"device": device, "version": version} if version > newest else None


def _counts(ledger: Ledger, unmerged: int) -> dict[str, Any]:
    accepted, merged, dropped = ledger.db.execute(
        "SELECT count(*), count(*) FILTER (WHERE merged >= 0), count(*) FILTER (WHERE merged = ?) FROM updates",
        (DROPPED,),
    ).fetchone()
    archived = sum(ledger.archived().values())
    counts: dict[str, Any] = {
        "accepted": accepted + archived,
        "merged": merged + archived,
        "dropped": dropped,
        "unmerged": unmerged,
        "stale": 0,
        "duplicate": 0,
        "busy": 0,
        "bounded": 0,
        "invalid": {},
    }
    for name, value in ledger.db.execute("SELECT name, value FROM counts ORDER BY name"):
        outcome, _, reason = name.partition(":")
        if outcome in {CLONED, ARCHIVED.removesuffix(":"), TALLY}:
            continue  # of one device
        if reason:
            counts["invalid"][reason] = value
        else:
            counts[outcome] = value
    return counts


def _versions(ledger: Ledger, measured: Measurements, first: int, also: Collection[int]) -> list[dict[str, Any]]:
    rows = ledger.db.execute(
        "SELECT version, digest, made_at, updates, staleness_mean, staleness_max FROM versions"
        " WHERE version IN (SELECT version FROM versions WHERE version >= ? UNION SELECT value FROM json_each(?))"
        " ORDER BY version",
        (first, json.dumps(list(also))),
    )
    return [
        {
            "version": version,
            "digest": digest.hex(),
            "time": made_at,
            "updates": updates,
            "staleness_mean": mean,
            "staleness_max": highest,
            **measured.version(version),
        }
        for version, digest, made_at, updates, mean, highest in rows
    ]
