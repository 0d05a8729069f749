"""What an aggregator has done so far, read from its ledger beside a running process."""

import json
from pathlib import Path
from typing import Any

from ternbus.aggregator.core import disk_guard
from ternbus.aggregator.core.clones import CLONED
from ternbus.aggregator.store import disk
from ternbus.aggregator.store.device_metrics import DeviceMetrics, Report
from ternbus.aggregator.store.ledger import ARCHIVED, Ledger, reading
from ternbus.aggregator.store.rows import failing, unsigned
from ternbus.aggregator.store.schema import DROPPED
from ternbus.broker.protocol.messages import CLOSED


def read(directory: Path) -> dict[str, Any]:
    """The status as JSON values.

    ``versions`` has a row for every version that is not archived, with the newest test metrics that each evaluator sent
    for it, by its name, as ``evaluations``, and those of the first of them by name as ``metrics``; ``devices`` is a map
    by name, its ``epsilon`` what a device says that it has spent of privacy (None: nothing), its ``failing`` why its
    work fails (None: it does not), its ``cloned`` how often two machines were found to use its key; ``local`` is what
    devices report of their own data, see ``local_tests``, over all of them, for a version or of a device, and None
    where nobody does; ``disk`` is the part of the file system that is free, and its state: `enough`, `low`, `full`
    (updates are answered `busy`);
    ``claim`` is the ``device`` that last named a ``version`` newer than the newest here, and that version (None: none
    does): perhaps the folder is an older copy.
    ``counts.unmerged`` are accepted updates that no version has though the federation is closed: a merge takes
    updates of ``merge.min_devices`` devices; ``counts.invalid`` is a map by reason of everything refused.
    """
    with reading(directory) as ledger:
        return _read(ledger)


def invitations(directory: Path, now: float) -> list[dict[str, Any]]:
    """Invitations that nobody has used, as JSON values, without their codes; ``now`` in Unix seconds."""
    with reading(directory) as ledger:
        rows = ledger.db.execute(
            "SELECT i.device, i.role, i.made_at, i.expires_at, d.state FROM invitations i LEFT JOIN devices d"
            " ON d.name = i.device ORDER BY i.device"
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


def _read(ledger: Ledger) -> dict[str, Any]:
    version = ledger.version
    (digest,) = ledger.db.execute("SELECT digest FROM versions WHERE version = ?", (version,)).fetchone()
    (buffer,) = ledger.db.execute("SELECT count(*) FROM updates WHERE merged IS NULL").fetchone()
    tests, free = _local(ledger), disk.free(ledger.path.parent)
    return {
        "federation": ledger.fact("federation"),
        "version": version,
        "digest": digest.hex(),
        "state": ledger.fact("state"),
        "buffer": buffer,
        "disk": {"free": free, "state": disk_guard.state_of(free)},
        "counts": _counts(ledger, unmerged=buffer if ledger.fact("state") == CLOSED else 0),
        "local": tests.summary(),
        "claim": _claim(ledger, version),
        "devices": _devices(ledger, version, tests),
        "versions": _versions(ledger, tests),
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
        if outcome in {CLONED, ARCHIVED.removesuffix(":")}:
            continue  # of one device
        if reason:
            counts["invalid"][reason] = value
        else:
            counts[outcome] = value
    return counts


def _local(ledger: Ledger) -> DeviceMetrics:
    """Of devices that are not revoked."""
    rows = ledger.db.execute(
        "SELECT m.device, m.version, m.samples, m.entries FROM metrics m JOIN devices d ON d.name = m.device"
        " WHERE m.split = 'local' AND d.state = 'active' ORDER BY m.received_at"
    )
    return DeviceMetrics.of(
        Report(device=device, version=version, samples=samples, values=json.loads(entries))
        for device, version, samples, entries in rows
    )


def _devices(ledger: Ledger, version: int, tests: DeviceMetrics) -> dict[str, Any]:
    reasons, archived = failing(ledger.db), ledger.archived()
    rows = ledger.db.execute(
        "SELECT d.name, d.role, d.state, d.why, d.status, d.base, d.software, d.seen_at, d.update_bytes, k.key, k.seq,"
        " (SELECT count(*) FROM updates u WHERE u.device = d.name),"
        " (SELECT max(base) FROM updates u WHERE u.device = d.name),"
        " (SELECT epsilon FROM updates u WHERE u.device = d.name ORDER BY id DESC LIMIT 1),"
        " (SELECT value FROM counts c WHERE c.name = ? || lower(hex(k.key)))"
        " FROM devices d JOIN keys k ON k.device = d.name AND k.public = d.public ORDER BY d.name",
        (f"{CLONED}:",),
    )
    return {
        name: {
            "key": key.hex(),
            "role": role,
            "key_state": state,
            "revoked_why": why,
            "state": status or "offline",
            "failing": reasons.get(name),
            "training_on": unsigned(training_on) if training_on < -1 else training_on,
            "last_seq": unsigned(seq),
            "base": base,
            "staleness": None if base is None else version - base,
            "updates": updates + archived.get(name, 0),
            "bytes": size_bytes,
            "seen_at": seen_at,
            "software": software,
            "epsilon": epsilon,
            "local": tests.device(name),
            "cloned": cloned or 0,
        }
        for (
            name,
            role,
            state,
            why,
            status,
            training_on,
            software,
            seen_at,
            size_bytes,
            key,
            seq,
            updates,
            base,
            epsilon,
            cloned,
        ) in rows
    }


def _versions(ledger: Ledger, tests: DeviceMetrics) -> list[dict[str, Any]]:
    measured: dict[int, dict[str, Any]] = {}
    for version, device, entries in ledger.db.execute(
        "SELECT version, device, entries FROM metrics WHERE split = 'test' ORDER BY device"
    ):
        measured.setdefault(version, {})[device] = json.loads(entries)
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
            "metrics": next(iter(measured.get(version, {}).values()), {}),
            "evaluations": measured.get(version, {}),
            "local": tests.version(version),
        }
        for version, digest, made_at, updates, mean, highest in rows
    ]
