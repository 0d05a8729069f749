"""The aggregator's disk: records in, whole state out, in one SQLite file that survives a kill at any moment."""

import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, assert_never

import numpy as np

from aggregator import records
from aggregator.bodies import Bodies, Place
from broker.errors import ConfigError
from broker.identity import key_id
from broker.messages import OPEN
from broker.schema import Schema, Vector, type_f32, vector_digest
from broker.ternary import Block

FORMAT: Final = 1
BODIES: Final = "bodies"
SCHEMA_SQL: Final = """
CREATE TABLE facts (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE devices (
    name TEXT PRIMARY KEY, public BLOB NOT NULL, proof BLOB NOT NULL, state TEXT NOT NULL, enrolled_at REAL NOT NULL,
    status TEXT NOT NULL DEFAULT '', base INTEGER NOT NULL DEFAULT -1, software TEXT NOT NULL DEFAULT '',
    seen_at REAL, update_bytes INTEGER NOT NULL DEFAULT 0);
CREATE TABLE keys (  -- every key that a device ever had, and the last answer given under it
    device TEXT NOT NULL, key BLOB NOT NULL, public BLOB NOT NULL, state TEXT NOT NULL,
    seq INTEGER NOT NULL DEFAULT 0, outcome TEXT NOT NULL DEFAULT '', reason TEXT NOT NULL DEFAULT '',
    metrics_seq INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (device, key)) WITHOUT ROWID;
CREATE TABLE invitations (device TEXT PRIMARY KEY, code TEXT NOT NULL, made_at REAL NOT NULL);
CREATE TABLE updates (  -- one row for every accepted update, for good: the proof that none merged twice
    id INTEGER PRIMARY KEY, device TEXT NOT NULL, key BLOB NOT NULL, seq INTEGER NOT NULL, base INTEGER NOT NULL,
    staleness INTEGER NOT NULL, samples INTEGER NOT NULL, discount REAL NOT NULL, codec TEXT NOT NULL,
    encoding TEXT NOT NULL, segment INTEGER, place INTEGER, size INTEGER, checksum INTEGER,
    received_at REAL NOT NULL, merged INTEGER,
    UNIQUE (device, base));
CREATE INDEX updates_by_version ON updates (merged);
CREATE INDEX updates_by_segment ON updates (segment) WHERE segment IS NOT NULL;
CREATE TABLE versions (
    version INTEGER PRIMARY KEY, digest BLOB NOT NULL, made_at REAL NOT NULL, updates INTEGER NOT NULL,
    staleness_mean REAL NOT NULL, staleness_max INTEGER NOT NULL,
    codec TEXT NOT NULL, encoding TEXT NOT NULL, body BLOB);
CREATE TABLE snapshots (version INTEGER PRIMARY KEY, vector BLOB NOT NULL);
CREATE TABLE server (version INTEGER NOT NULL, target BLOB NOT NULL, momentum BLOB);
CREATE TABLE frames (topic TEXT PRIMARY KEY, payload BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE metrics (
    device TEXT NOT NULL, version INTEGER NOT NULL, split TEXT NOT NULL, samples INTEGER NOT NULL,
    entries TEXT NOT NULL, received_at REAL NOT NULL, PRIMARY KEY (device, version, split)) WITHOUT ROWID;
CREATE TABLE counts (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE requests (
    id INTEGER PRIMARY KEY, what TEXT NOT NULL, argument TEXT NOT NULL, done INTEGER NOT NULL DEFAULT 0,
    error TEXT NOT NULL DEFAULT '');
"""


def signed(number: int) -> int:
    """An unsigned 64-bit number in SQLite's signed one, the bits unchanged: a peer may send any of them."""
    return number - 2**64 if number >= 2**63 else number


def unsigned(number: int) -> int:
    return number + 2**64 if number < 0 else number


class Ledger:
    """One connection to DIR/ledger.sqlite. ``write`` makes records durable; other processes read beside it."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        if not path.exists():
            raise ConfigError(
                f"{path.parent} holds no aggregator; make one with: ternbus aggregator init {path.parent} …"
            )
        self.path = path
        try:
            self.db = sqlite3.connect(path, isolation_level=None, timeout=30.0)
            self.db.execute("PRAGMA query_only = ON" if read_only else "PRAGMA synchronous = FULL")
            found = self.fact("format")
            self.bodies = Bodies(path.parent / BODIES, int(self.fact("segment") or 0))
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{path} cannot be read as a ledger: {error}") from error
        if found != FORMAT:
            self.close()
            raise ConfigError(f"{path} has format {found}; this version of Ternbus reads {FORMAT}")

    @classmethod
    def create(cls, path: Path, facts: dict[str, Any]) -> "Ledger":
        """Make the file, readable by its owner only."""
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        db = sqlite3.connect(path, isolation_level=None)
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(SCHEMA_SQL)
        rows = {"format": FORMAT, "state": OPEN, "version": 0, "seq": 0, "session": 0, **facts}
        db.executemany("INSERT INTO facts VALUES (?, ?)", rows.items())
        db.close()
        return cls(path)

    def close(self) -> None:
        self.bodies.close()
        self.db.close()

    def fact(self, name: str) -> Any:
        row = self.db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    def change_count(self) -> int:
        """A number that changes when another connection has committed something."""
        return int(self.db.execute("PRAGMA data_version").fetchone()[0])

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, on stable storage when it ends."""
        self.db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    def write(self, batch: Iterable[records.Record], now: float | None = None) -> None:
        """Make records durable, in order, with one fsync; ``now`` is the time to write beside them (Unix seconds)."""
        moment = time.time() if now is None else now
        with self.transaction():
            for record in batch:
                self._write(record, moment)
            self.bodies.sync()  # before the rows that refer to them
        self._drop_bodies()

    def _drop_bodies(self) -> None:
        """After a snapshot: begin another file, and remove those that no update in the buffer needs."""
        segment = int(self.fact("segment") or 0)
        if segment != self.bodies.segment:
            self.bodies.begin(segment)
            (oldest,) = self.db.execute("SELECT min(segment) FROM updates WHERE segment IS NOT NULL").fetchone()
            self.bodies.drop_below(segment if oldest is None else oldest)

    def _write(self, record: records.Record, now: float) -> None:
        match record:
            case records.UpdateAccepted():
                self._accepted(record, now)
            case records.UpdateAnswered():
                self._answered(record)
            case records.VersionMade():
                self._version(record, now)
            case records.SnapshotTaken():
                self._snapshot(record)
            case records.FramesKept():
                self._frames(record)
            case records.DeviceEnrolled():
                self._enrolled(record, now)
            case records.MetricsReceived():
                self._metrics(record, now)
            case records.Observed():
                self._observed(record, now)
            case records.RequestDone():
                self.db.execute("UPDATE requests SET done = 1, error = ? WHERE id = ?", (record.error, record.request))
            case _:
                self._fact(record)

    def _fact(
        self, record: records.SeqReserved | records.SessionBegun | records.StateChanged | records.SlotsChanged
    ) -> None:
        match record:
            case records.SeqReserved():
                self._set("seq", record.upto)
            case records.SessionBegun():
                self._set("session", record.session)
            case records.StateChanged():
                self._set("state", record.state)
            case records.SlotsChanged():
                self._set("slots", record.slots)
            case _:
                assert_never(record)

    def _set(self, name: str, value: object) -> None:
        self.db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    def _accepted(self, record: records.UpdateAccepted, now: float) -> None:
        place = self.bodies.append(record.body)
        self.db.execute(
            "INSERT INTO updates"
            " (device, key, seq, base, staleness, samples, discount,"
            " codec, encoding, segment, place, size, checksum, received_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                record.device,
                record.key,
                signed(record.seq),
                record.base,
                record.staleness,
                record.samples,
                record.discount,
                record.codec,
                record.encoding,
                place.segment,
                place.offset,
                place.size_bytes,
                place.checksum,
                now,
            ),
        )
        self._answer(record.device, record.key, record.seq, "accepted", "")

    def _answered(self, record: records.UpdateAnswered) -> None:
        self._answer(record.device, record.key, record.seq, record.outcome, record.reason)
        slug = record.reason.partition(":")[0]
        self._count(f"invalid:{slug}" if record.outcome == "invalid" else record.outcome, 1)

    def _answer(self, device: str, key: bytes, seq: int, outcome: str, reason: str) -> None:
        self.db.execute(
            "UPDATE keys SET seq = ?, outcome = ?, reason = ? WHERE device = ? AND key = ?",
            (signed(seq), outcome, reason, device, key),
        )

    def _version(self, record: records.VersionMade, now: float) -> None:
        self._set("version", record.version)
        if record.updates:
            self.db.execute("UPDATE updates SET merged = ? WHERE merged IS NULL", (record.version,))
        self.db.execute(
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

    def _snapshot(self, record: records.SnapshotTaken) -> None:
        """Keep the state; drop the bodies that led to it, and the vectors from which no kept version is made."""
        self.db.execute(
            "INSERT OR REPLACE INTO snapshots VALUES (?, ?)", (record.version, record.published.astype(type_f32).data)
        )
        momentum = record.server.momentum
        self.db.execute("DELETE FROM server")
        self.db.execute(
            "INSERT INTO server VALUES (?, ?, ?)",
            (record.version, record.server.target.data, None if momentum is None else momentum.data),
        )
        named = record.named
        place = json.dumps([named.version, named.parts, named.content_bytes, named.place])
        self._set("snapshot", place)
        about = record.optimizer
        self._set("optimizer", json.dumps([about.name, about.learning_rate, about.momentum]))
        self.db.execute("UPDATE updates SET segment = NULL WHERE segment IS NOT NULL AND merged IS NOT NULL")
        self._set("segment", int(self.fact("segment") or 0) + 1)
        oldest = record.version - int(self.fact("slots") or 0) + 1
        row = self.db.execute("SELECT max(version) FROM snapshots WHERE version <= ?", (max(oldest, 0),)).fetchone()
        if row[0] is not None:
            self.db.execute("DELETE FROM snapshots WHERE version < ?", (row[0],))
            self.db.execute("UPDATE versions SET body = NULL WHERE version <= ? AND body IS NOT NULL", (row[0],))

    def _frames(self, record: records.FramesKept) -> None:
        for topic, payload in record.frames:
            if payload:
                self.db.execute("INSERT OR REPLACE INTO frames VALUES (?, ?)", (topic, payload))
            else:
                self.db.execute("DELETE FROM frames WHERE topic = ?", (topic,))

    def _enrolled(self, record: records.DeviceEnrolled, now: float) -> None:
        self.db.execute("UPDATE keys SET state = 'replaced' WHERE device = ? AND state = 'active'", (record.device,))
        self.db.execute(
            "INSERT INTO keys (device, key, public, state) VALUES (?, ?, ?, 'active')",
            (record.device, key_id(record.public), record.public),
        )
        self.db.execute(
            "INSERT INTO devices (name, public, proof, state, enrolled_at) VALUES (?, ?, ?, 'active', ?)"
            " ON CONFLICT (name) DO UPDATE SET public = excluded.public, proof = excluded.proof, state = 'active',"
            " enrolled_at = excluded.enrolled_at",
            (record.device, record.public, record.proof, now),
        )
        self.db.execute("DELETE FROM invitations WHERE device = ?", (record.device,))

    def _metrics(self, record: records.MetricsReceived, now: float) -> None:
        about = record.metrics
        self.db.execute(
            "INSERT OR REPLACE INTO metrics VALUES (?, ?, ?, ?, ?, ?)",
            (record.device, about.version, about.split, about.samples, json.dumps(dict(about.values)), now),
        )
        self.db.execute(
            "UPDATE keys SET metrics_seq = ? WHERE device = ? AND state = 'active'",
            (signed(record.seq), record.device),
        )

    def _observed(self, record: records.Observed, now: float) -> None:
        for reason, number in record.refused.items():
            self._count(f"invalid:{reason}", number)
        for outcome, number in record.outcomes.items():
            self._count(outcome, number)
        for device, size_bytes in record.update_bytes.items():
            self.db.execute(
                "UPDATE devices SET update_bytes = update_bytes + ?, seen_at = ? WHERE name = ?",
                (size_bytes, now, device),
            )
        for device, status in record.statuses.items():
            self.db.execute(
                "UPDATE devices SET status = ?, base = ?, software = ?, seen_at = ? WHERE name = ?",
                (status.state, signed(status.base), status.software, now, device),
            )

    def _count(self, name: str, number: int) -> None:
        self.db.execute(
            "INSERT INTO counts VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
            (name, number),
        )

    # --- reading

    def schema(self) -> Schema:
        return Schema.parse(self.fact("schema"))

    def vector(self, version: int) -> Vector:
        """The published vector of a version that is still kept; ConfigError says which are."""
        schema, newest = self.schema(), int(self.fact("version"))
        row = self.db.execute(
            "SELECT version, vector FROM snapshots WHERE version <= ? ORDER BY version DESC LIMIT 1", (version,)
        ).fetchone()
        if row is None or version > newest:
            (oldest,) = self.db.execute("SELECT min(version) FROM snapshots").fetchone()
            raise ConfigError(f"version {version} is not kept; kept are {oldest} to {newest}")
        vector = np.frombuffer(row[1], dtype=type_f32).astype(np.float32)
        deltas = self.db.execute(
            "SELECT version, digest, codec, encoding, body FROM versions WHERE version > ? AND version <= ?"
            " ORDER BY version",
            (row[0], version),
        )
        for number, digest, codec, encoding, body in deltas:
            vector = Block.read(schema, codec, encoding, body).apply(vector)
            if vector_digest(vector) != digest:
                raise ConfigError(f"{self.path}: version {number} does not have its digest; restore it from a backup")
        return vector

    def body(self, segment: int, offset: int, size_bytes: int, checksum: int) -> bytes:
        """An accepted update's block as it came, where ``updates`` says that it is kept."""
        return self.bodies.read(Place(segment=segment, offset=offset, size_bytes=size_bytes, checksum=checksum))

    def frame(self, topic: str) -> bytes:
        row = self.db.execute("SELECT payload FROM frames WHERE topic = ?", (topic,)).fetchone()
        return b"" if row is None else bytes(row[0])

    def codes(self) -> dict[str, str]:
        """The codes of open invitations, by device."""
        return dict(self.db.execute("SELECT device, code FROM invitations").fetchall())

    def open_requests(self) -> list[tuple[int, str, str]]:
        """(id, what, argument) of what commands have asked for, oldest first."""
        return self.db.execute("SELECT id, what, argument FROM requests WHERE done = 0 ORDER BY id").fetchall()
