"""Records as rows of the ledger's tables, in the transaction that the caller has begun."""

import json
import sqlite3
from typing import assert_never

from ternbus.aggregator.core import records
from ternbus.aggregator.core.registry import Answer
from ternbus.aggregator.store import membership
from ternbus.aggregator.store.bodies import Place
from ternbus.broker.protocol.identity import KeyId


def signed(number: int) -> int:
    """An unsigned 64-bit number in SQLite's signed one, the bits unchanged: a peer may send any of them."""
    return number - 2**64 if number >= 2**63 else number


def unsigned(number: int) -> int:
    return number + 2**64 if number < 0 else number


Inserted = (  # all records but those that come with a file: of a body, of vectors
    records.SessionBegun
    | records.SeqReserved
    | records.DeviceEnrolled
    | records.InvitationCancelled
    | records.DeviceRevoked
    | records.UpdateAnswered
    | records.VersionMade
    | records.FramesRetained
    | records.SlotsChanged
    | records.StateChanged
    | records.MetricsReceived
    | records.Observed
    | records.RequestDone
)


def write(db: sqlite3.Connection, record: Inserted, now: float) -> None:
    """Write a record's rows; ``now`` is the time to write beside them (Unix seconds)."""
    match record:
        case records.UpdateAnswered():
            _answered(db, record)
        case records.VersionMade():
            _version(db, record, now)
        case records.FramesRetained():
            _frames(db, record)
        case records.DeviceEnrolled():
            membership.enroll(db, record, now)
        case records.DeviceRevoked():
            membership.revoke(db, record, now)
        case records.InvitationCancelled():
            membership.cancel(db, record)
        case records.MetricsReceived():
            _metrics(db, record, now)
        case records.Observed():
            _observed(db, record, now)
        case records.RequestDone():
            db.execute("UPDATE requests SET done = 1, error = ? WHERE id = ?", (record.error, record.request))
        case _:
            _fact(db, record)


def set_fact(db: sqlite3.Connection, name: str, value: object) -> None:
    db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))


def _fact(
    db: sqlite3.Connection,
    record: records.SeqReserved | records.SessionBegun | records.StateChanged | records.SlotsChanged,
) -> None:
    match record:
        case records.SeqReserved():
            set_fact(db, "seq", record.upto)
        case records.SessionBegun():
            set_fact(db, "session", record.session)
        case records.StateChanged():
            set_fact(db, "state", record.state)
        case records.SlotsChanged():
            set_fact(db, "slots", record.slots)
        case _:
            assert_never(record)


def accepted(db: sqlite3.Connection, record: records.UpdateAccepted, place: Place, now: float) -> None:
    """An accepted update, whose body lies at ``place``."""
    update = record.update
    db.execute(
        "INSERT INTO updates"
        " (device, key, seq, base, digest, staleness, samples, discount,"
        " codec, encoding, segment, place, size, checksum, received_at, epsilon, norm, stated)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            update.device,
            update.key,
            signed(update.seq),
            update.base,
            update.digest,
            update.staleness,
            update.samples,
            update.discount,
            update.codec,
            update.encoding,
            place.segment,
            place.offset,
            place.size_bytes,
            place.checksum,
            now,
            update.epsilon,
            update.norm,
            update.stated,
        ),
    )
    _answer(db, update.device, update.key, Answer(seq=update.seq, outcome="accepted"))


def _answered(db: sqlite3.Connection, record: records.UpdateAnswered) -> None:
    answer = Answer(seq=record.seq, outcome=record.outcome, reason=record.reason)
    _answer(db, record.device, record.key, answer)
    slug = record.reason.partition(":")[0]
    _count(db, f"invalid:{slug}" if record.outcome == "invalid" else record.outcome, 1)


def _answer(db: sqlite3.Connection, device: str, key: KeyId, answer: Answer) -> None:
    db.execute(
        "UPDATE keys SET seq = ?, outcome = ?, reason = ? WHERE device = ? AND key = ?",
        (signed(answer.seq), answer.outcome, answer.reason, device, key),
    )


def _version(db: sqlite3.Connection, record: records.VersionMade, now: float) -> None:
    set_fact(db, "version", record.version)
    if record.updates:
        db.execute("UPDATE updates SET merged = ? WHERE merged IS NULL", (record.version,))
    db.execute(
        "INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            record.version,
            record.digest,
            now,
            record.updates,
            record.staleness_mean,
            record.staleness_max,
            record.codec,
            record.encoding,
            record.body,
        ),
    )
    db.execute("INSERT INTO log VALUES (?, ?)", (record.version, record.entry.pack()))


def _frames(db: sqlite3.Connection, record: records.FramesRetained) -> None:
    for topic, payload in record.frames:
        if payload:
            db.execute("INSERT OR REPLACE INTO frames VALUES (?, ?)", (topic, payload))
        else:
            db.execute("DELETE FROM frames WHERE topic = ?", (topic,))


def _metrics(db: sqlite3.Connection, record: records.MetricsReceived, now: float) -> None:
    metrics = record.metrics
    db.execute(
        "INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?, ?, ?)",
        (record.device, metrics.version, metrics.split, metrics.samples, json.dumps(dict(metrics.values)), now),
    )
    db.execute(
        "UPDATE keys SET metrics_seq = ? WHERE device = ? AND state = 'active'", (signed(record.seq), record.device)
    )


def _observed(db: sqlite3.Connection, record: records.Observed, now: float) -> None:
    for reason, number in record.refused.items():
        _count(db, f"invalid:{reason}", number)
    for outcome, number in record.outcomes.items():
        _count(db, outcome, number)
    for device, size_bytes in record.update_bytes.items():
        db.execute(
            "UPDATE devices SET update_bytes = update_bytes + ?, seen_at = ? WHERE name = ?", (size_bytes, now, device)
        )
    for device, status in record.statuses.items():
        db.execute(
            "UPDATE devices SET status = ?, base = ?, software = ?, seen_at = ? WHERE name = ?",
            (status.state, signed(status.base), status.software, now, device),
        )
    _note_failing(db, {device: status.failing for device, status in record.statuses.items()})


def failing(db: sqlite3.Connection) -> dict[str, str]:
    """Why work fails, by device, as the devices last said; without those whose work does not."""
    row = db.execute("SELECT value FROM facts WHERE name = 'failing'").fetchone()
    found: dict[str, str] = {} if row is None else json.loads(row[0])
    return found


def _note_failing(db: sqlite3.Connection, reasons: dict[str, str]) -> None:
    before = failing(db)
    after = {device: reason for device, reason in (before | reasons).items() if reason}
    if after != before:
        set_fact(db, "failing", json.dumps(after))


def _count(db: sqlite3.Connection, name: str, number: int) -> None:
    db.execute(
        "INSERT INTO counts VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
        (name, number),
    )
