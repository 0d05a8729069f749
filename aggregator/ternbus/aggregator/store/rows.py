"""The rows of each record, written in the caller's transaction."""

import json
import sqlite3
import zlib
from typing import Final, assert_never

from ternbus.aggregator.core import records
from ternbus.aggregator.core.registry import Answer
from ternbus.aggregator.store import (
    answers,
    candidate_rows,
    checksums,
    membership,
    private_rows,
    search_rows,
    set_rows,
    statistics_rows,
)
from ternbus.aggregator.store.bodies import Place
from ternbus.aggregator.store.revocations import Revocation
from ternbus.aggregator.store.schema import STATED
from ternbus.broker.protocol.identity import KeyId


def signed(number: int) -> int:
    """An unsigned 64-bit number in SQLite's signed one, the bits unchanged: a peer may send any of them."""
    return number - 2**64 if number >= 2**63 else number


def unsigned(number: int) -> int:
    return number + 2**64 if number < 0 else number


Elsewhere = private_rows.Inserted | set_rows.Written | candidate_rows.Written | statistics_rows.Written
Inserted = (  # all records but those that come with a file: of a body, of vectors
    records.SessionBegun
    | records.SeqReserved
    | records.DeviceEnrolled
    | records.InvitationCancelled
    | records.DeviceRevoked
    | records.KeysRevoked
    | records.UpdateAnswered
    | records.ClosingBegun
    | records.VersionMade
    | records.VersionsWithdrawn
    | records.FramesRetained
    | records.TopicsShown
    | records.SlotsChanged
    | records.StateChanged
    | records.MetricsReceived
    | records.Observed
    | records.SituationTold
    | records.RequestDone
    | Elsewhere
)


ANSWERED: Final = {
    "seq": ":seq",
    "outcome": ":outcome",
    "reason": ":reason",
    "highest_base": "max(highest_base, :base)",
}
CLOSING: Final = "closing"  # a fact: the federation is to be closed when helpers have answered
SHOWN: Final = "shown"  # a fact: topics that the broker may hold for Home Assistant, in JSON
FLOOR: Final = "floor"  # a fact: versions below it were withdrawn by a rollback
ONE_KEY: Final = "device = :device AND key = :key"
SENT: Final = {"update_bytes": "update_bytes + :size", "seen_at": ":now"}
SEEN: Final = {"status": ":status", "base": ":base", "software": ":software", "seen_at": ":now"}


def write(db: sqlite3.Connection, record: Inserted, now: float) -> None:
    """Write a record's rows; ``now`` is the time to write beside them (Unix seconds)."""
    if isinstance(record, Elsewhere):
        _elsewhere(db, record, now)
        return
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
        case records.KeysRevoked():
            revoked = [Revocation(device=device, public=public) for device, public in record.keys]
            membership.take_revocations(db, revoked, now, keep=True)
        case records.InvitationCancelled():
            membership.cancel(db, record)
        case records.MetricsReceived():
            _metrics(db, record, now)
        case records.Observed():
            _observed(db, record, now)
        case records.RequestDone():
            done = {"done": "1", "error": ":error"}
            checksums.update(db, "requests", done, "id = :id", {"error": record.error, "id": record.request})
        case _:
            _fact(db, record, now)


def _elsewhere(db: sqlite3.Connection, record: Elsewhere, now: float) -> None:
    if isinstance(record, set_rows.Written):
        set_rows.write(db, record)
    elif isinstance(record, candidate_rows.Written):
        candidate_rows.write(db, record)
    elif isinstance(record, statistics_rows.Written):
        statistics_rows.write(db, record)
    else:
        private_rows.write(db, record, now)


def set_fact(db: sqlite3.Connection, name: str, value: object) -> None:
    checksums.insert(db, "facts", (name, value), replace=True)


def _fact(
    db: sqlite3.Connection,
    record: records.SeqReserved
    | records.SessionBegun
    | records.ClosingBegun
    | records.StateChanged
    | records.SlotsChanged
    | records.TopicsShown
    | records.SituationTold
    | records.VersionsWithdrawn,
    now: float,
) -> None:
    match record:
        case records.SeqReserved():
            set_fact(db, "seq", record.upto)
        case records.SessionBegun():
            set_fact(db, "session", record.session)
        case records.ClosingBegun():
            set_fact(db, CLOSING, 1)
        case records.StateChanged():
            set_fact(db, "state", record.state)
            db.execute("DELETE FROM facts WHERE name = ?", (CLOSING,))
        case records.SlotsChanged():
            set_fact(db, "slots", record.slots)
        case records.TopicsShown():
            set_fact(db, SHOWN, json.dumps(record.topics))
        case records.SituationTold():
            answers.situation(db, record, now)
        case records.VersionsWithdrawn():
            set_fact(db, FLOOR, record.below)
            membership.drop(db, "merged IS NULL", {})
        case _:
            assert_never(record)


def accepted(db: sqlite3.Connection, number: int, record: records.UpdateAccepted, place: Place, now: float) -> None:
    """An accepted update, whose body lies at ``place``; its ``number`` is above all before it."""
    update = record.update
    values = (
        number,
        update.device,
        update.key,
        signed(update.seq),
        update.base,
        update.digest,
        update.staleness,
        update.samples,
        float(update.discount),
        update.codec,
        update.encoding,
        place.offset,
        place.size_bytes,
        place.checksum,
        float(now),
        update.epsilon,
        update.norm,
        update.stated,
    )
    checksums.insert(db, "updates", values, segment=place.segment)
    search_rows.accepted(db, number, update)
    if record.private is not None:
        set_rows.accepted(db, number, record.private)
    _answer(db, update.device, update.key, Answer(seq=update.seq, outcome="accepted"), base=update.base)


def _answered(db: sqlite3.Connection, record: records.UpdateAnswered) -> None:
    answer = Answer(seq=record.seq, outcome=record.outcome, reason=record.reason)
    _answer(db, record.device, record.key, answer)
    slug = record.reason.partition(":")[0]
    _count(db, f"invalid:{slug}" if record.outcome == "invalid" else record.outcome, 1)


def _answer(db: sqlite3.Connection, device: str, key: KeyId, answer: Answer, base: int = -1) -> None:
    """The last answer under a key; ``base`` is that of an accepted update."""
    row = {"device": device, "key": key, "outcome": answer.outcome, "reason": answer.reason, "base": base}
    checksums.update(db, "keys", ANSWERED, ONE_KEY, {"seq": signed(answer.seq), **row})


def _version(db: sqlite3.Connection, record: records.VersionMade, now: float) -> None:
    set_fact(db, "version", record.version)
    if record.sets is not None:
        set_rows.merged(db, record.version, record.sets)
    elif record.candidate:
        candidate_rows.decided(db, record)
    elif record.updates:
        db.execute("UPDATE updates SET merged = ? WHERE merged IS NULL", (record.version,))
    search_rows.made(db, record.search)
    values = (
        record.version,
        record.digest,
        float(now),
        record.updates,
        float(record.staleness_mean),
        record.staleness_max,
        record.codec,
        record.encoding,
        zlib.crc32(record.body),
    )
    checksums.insert(db, "versions", values, body=record.body)
    db.execute("INSERT INTO log VALUES (?, ?)", (record.version, record.entry.pack()))


def _frames(db: sqlite3.Connection, record: records.FramesRetained) -> None:
    for topic, payload in record.frames:
        if payload:
            checksums.insert(db, "frames", (topic, payload), replace=True)
        else:
            db.execute("DELETE FROM frames WHERE topic = ?", (topic,))


def _metrics(db: sqlite3.Connection, record: records.MetricsReceived, now: float) -> None:
    metrics = record.metrics
    entries = json.dumps(dict(metrics.values))
    values = (record.device, metrics.version, metrics.split, metrics.samples, entries, float(now))
    checksums.insert(db, "metrics", values, replace=True)
    _state(db, record, now)
    membership.metrics_seq(db, record.device, signed(record.seq))


def _state(db: sqlite3.Connection, record: records.MetricsReceived, now: float) -> None:
    """What holds for all of a device's metrics is kept once: an earlier Ternbus reads none of these rows."""
    known = db.execute(
        "SELECT entries FROM metrics WHERE device = ? AND version = 0 AND split = ?", (record.device, STATED)
    ).fetchone()
    stated = {"better": dict(record.metrics.better), "classes": dict(record.metrics.classes)}
    if stated != (json.loads(known[0]) if known is not None else {"better": {}, "classes": {}}):
        checksums.insert(db, "metrics", (record.device, 0, STATED, 0, json.dumps(stated), float(now)), replace=True)


def _observed(db: sqlite3.Connection, record: records.Observed, now: float) -> None:
    for reason, number in record.refused.items():
        _count(db, f"invalid:{reason}", number)
    for outcome, number in record.outcomes.items():
        _count(db, outcome, number)
    answers.refused(db, record.refused_updates, now)
    if record.claim is not None:
        set_fact(db, "claim", json.dumps(record.claim))
    for device, size_bytes in record.update_bytes.items():
        seen = {"size": size_bytes, "now": float(now), "device": device}
        checksums.update(db, "devices", SENT, "name = :device", seen)
    for device, status in record.statuses.items():
        seen = {"status": status.state, "base": signed(status.base), "software": status.software}
        checksums.update(db, "devices", SEEN, "name = :device", {**seen, "now": float(now), "device": device})
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
    if not checksums.update(db, "counts", {"value": "value + :more"}, "name = :name", {"more": number, "name": name}):
        checksums.insert(db, "counts", (name, number))
