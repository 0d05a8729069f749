"""Members as the ledger's rows: keys, invitations, revocations."""

import sqlite3
from collections.abc import Collection, Mapping

from ternbus.aggregator.core import records
from ternbus.aggregator.core.registry import DEVICE, EVALUATOR, Invited
from ternbus.aggregator.store.schema import DROPPED
from ternbus.broker.protocol.identity import key_id


def enroll(db: sqlite3.Connection, record: records.DeviceEnrolled, now: float) -> None:
    db.execute("UPDATE keys SET state = 'replaced' WHERE device = ? AND state = 'active'", (record.device,))
    db.execute(
        "INSERT INTO keys (device, key, public, state) VALUES (?, ?, ?, 'active')",
        (record.device, key_id(record.public), record.public),
    )
    db.execute(
        "INSERT INTO devices (name, public, proof, state, enrolled_at, role) VALUES (?, ?, ?, 'active', ?, ?)"
        " ON CONFLICT (name) DO UPDATE SET public = excluded.public, proof = excluded.proof, state = 'active',"
        " enrolled_at = excluded.enrolled_at, role = excluded.role, revoked_at = NULL, why = ''",
        (record.device, record.public, record.proof, now, record.role),
    )
    db.execute("DELETE FROM invitations WHERE device = ?", (record.device,))


def revoke(db: sqlite3.Connection, record: records.DeviceRevoked, now: float) -> None:
    db.execute("UPDATE keys SET state = 'revoked' WHERE device = ? AND state = 'active'", (record.device,))
    db.execute(
        "UPDATE devices SET state = 'revoked', revoked_at = ?, why = ? WHERE name = ?",
        (now, record.why, record.device),
    )
    db.execute("DELETE FROM invitations WHERE device = ?", (record.device,))
    if record.drop:
        db.execute(
            "UPDATE updates SET merged = ?, segment = NULL WHERE device = ? AND merged IS NULL",
            (DROPPED, record.device),
        )


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
    rows = [(device, code, made_at, expires_at, roles.get(device, DEVICE)) for device, code in codes.items()]
    db.executemany("INSERT OR REPLACE INTO invitations VALUES (?, ?, ?, ?, ?)", rows)


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
