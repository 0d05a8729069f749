"""Keys, invitations and revocations as rows of the ledger."""

import sqlite3
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from ternbus.aggregator.core import records
from ternbus.aggregator.core.registry import DEVICE, EVALUATOR, Invited
from ternbus.aggregator.store import checksums, set_rows
from ternbus.aggregator.store.revocations import Revocation
from ternbus.aggregator.store.schema import DROPPED
from ternbus.broker.protocol.identity import key_id
from ternbus.broker.protocol.messages import PRIVATE

ACTIVE_KEY: Final = "device = :device AND state = 'active'"
ENROLLED: Final = {
    "public": ":public",
    "proof": ":proof",
    "state": "'active'",
    "enrolled_at": ":now",
    "role": ":role",
    "revoked_at": "NULL",
    "why": "''",
}
REVOKED_ROW: Final = {"state": "'revoked'", "revoked_at": ":now", "why": ":why"}


def enroll(db: sqlite3.Connection, record: records.DeviceEnrolled, now: float) -> None:
    device = record.device
    checksums.update(db, "keys", {"state": "'replaced'"}, ACTIVE_KEY, {"device": device})
    checksums.insert(db, "keys", (device, key_id(record.public), record.public, "active", 0, "", "", 0, -1))
    row = {"public": record.public, "proof": record.proof, "now": float(now), "role": record.role, "device": device}
    if not checksums.update(db, "devices", ENROLLED, "name = :device", row):
        values = (device, record.public, record.proof, "active", float(now), None, "", "", -1, "", None, 0, record.role)
        checksums.insert(db, "devices", values)
    db.execute("DELETE FROM invitations WHERE device = ?", (device,))


def revoke(db: sqlite3.Connection, record: records.DeviceRevoked, now: float) -> None:
    device = record.device
    checksums.update(db, "keys", {"state": "'revoked'"}, ACTIVE_KEY, {"device": device})
    row = {"now": float(now), "why": record.why, "device": device}
    checksums.update(db, "devices", REVOKED_ROW, "name = :device", row)
    db.execute("DELETE FROM invitations WHERE device = ?", (device,))
    if record.drop:
        drop(db, "device = :device AND merged IS NULL", {"device": device})


def trainers(db: sqlite3.Connection) -> list[str]:
    """The devices that train by an active key."""
    rows = db.execute("SELECT name FROM devices WHERE state = 'active' AND role != ? ORDER BY name", (EVALUATOR,))
    return [name for (name,) in rows]


def revocations(db: sqlite3.Connection) -> list[Revocation]:
    """The keys that are void for good."""
    rows = db.execute(
        "SELECT k.device, k.public, d.why, d.revoked_at, d.public FROM keys k JOIN devices d ON d.name = k.device"
        " WHERE k.state = 'revoked' ORDER BY k.device"
    )
    return [
        Revocation(device=device, public=public, why=why if public == newest else "", revoked_at=revoked_at or 0.0)
        for device, public, why, revoked_at, newest in rows
    ]


def take_revocations(
    db: sqlite3.Connection, found: Iterable[Revocation], now: float, *, keep: bool = False
) -> list[Revocation]:
    """Make keys void that another copy of this ledger knows to be; those that were not yet.

    Updates that wait to be merged are dropped with the key, unless ``keep``: beside a process, its buffer has them.
    A device that is not known here becomes one whose key is void, so that it is told so.
    """
    taken = []
    for each in found:
        row = db.execute(
            "SELECT state FROM keys WHERE device = ? AND key = ?", (each.device, key_id(each.public))
        ).fetchone()
        if row == ("revoked",):
            continue
        taken.append(each)
        about = {"device": each.device, "key": key_id(each.public), "public": each.public}
        if row is None:
            checksums.insert(db, "keys", (each.device, about["key"], each.public, "revoked", 0, "", "", 0, -1))
        checksums.update(db, "keys", {"state": "'revoked'"}, "device = :device AND key = :key", about)
        if not db.execute("SELECT 1 FROM devices WHERE name = ?", (each.device,)).fetchone():
            blank = ("", "", -1, "", None, 0, DEVICE)
            checksums.insert(db, "devices", (each.device, each.public, b"", "active", float(now), None, *blank))
        revoked = {"now": each.revoked_at or float(now), "why": each.why, **about}
        if checksums.update(db, "devices", REVOKED_ROW, "name = :device AND public = :public", revoked):
            db.execute("DELETE FROM invitations WHERE device = ?", (each.device,))
            if not keep:
                set_rows.revoke(db, each.device)
                drop(db, f"device = :device AND merged IS NULL AND codec != '{PRIVATE}'", about)
    return taken


def drop(db: sqlite3.Connection, where: str, parameters: Mapping[str, object]) -> int:
    """Accepted updates are never to be merged; how many."""
    change = {"merged": str(DROPPED), "segment": "NULL", f"merged IS {DROPPED}": "1"}
    return checksums.update(db, "updates", change, where, parameters)


def metrics_seq(db: sqlite3.Connection, device: str, seq: int) -> None:
    """The newest metrics under a device's key have this number."""
    row = {"seq": seq, "device": device}
    checksums.update(db, "keys", {"metrics_seq": ":seq"}, "device = :device AND state = 'active'", row)


def invite(
    db: sqlite3.Connection,
    codes: Mapping[str, str],
    made_at: float,
    expires_at: float,
    evaluators: Collection[str] = (),
) -> None:
    """Open invitations by device, in place of those that were open before; times in Unix seconds.

    Who is a member keeps its role with its new key, unless it is now among the ``evaluators``.
    """
    roles = dict(db.execute("SELECT name, role FROM devices WHERE state = 'active'").fetchall())
    roles |= dict.fromkeys(evaluators, EVALUATOR)
    for device, code in codes.items():
        row = (device, code, float(made_at), float(expires_at), roles.get(device, DEVICE))
        checksums.insert(db, "invitations", row, replace=True)


def cancel(db: sqlite3.Connection, record: records.InvitationCancelled) -> None:
    db.execute("DELETE FROM invitations WHERE device = ?", (record.device,))


def known(db: sqlite3.Connection, now: float) -> set[str]:
    """Devices that have ever joined, or have an open invitation at ``now`` (Unix seconds)."""
    rows = db.execute("SELECT name FROM devices UNION SELECT device FROM invitations WHERE expires_at > ?", (now,))
    return {name for (name,) in rows}


def codes(db: sqlite3.Connection) -> dict[str, Invited]:
    """Invitations that nobody has used, by device; among them those that have expired."""
    rows = db.execute("SELECT device, code, role, expires_at FROM invitations")
    return {device: Invited(code=code, role=role, expires_at=expires_at) for device, code, role, expires_at in rows}


def dropped(db: sqlite3.Connection, device: str) -> int:
    """How many of a device's accepted updates were dropped, since it was revoked."""
    row = db.execute("SELECT count(*) FROM updates WHERE merged = ? AND device = ?", (DROPPED, device))
    return int(row.fetchone()[0])
