"""The tables of the ledger, and the number of their format."""

from typing import Final

FORMAT: Final = 9
DROPPED: Final = -1  # in place of the version that an update was merged into: its device was revoked before
# In place of a split: the row of what a device stated last beside its metrics' values. Its version is 0; a question
# that says so is answered by the key, and else by all rows of the device.
STATED: Final = "stated"
# ``crc`` is a row's checksum: checksums.py
# With row ids: else a payload would be a part of the key, and SQLite would read several whole to find a row's place.
FRAMES_SQL: Final = (
    "CREATE TABLE frames (topic TEXT PRIMARY KEY, payload BLOB NOT NULL, crc INTEGER NOT NULL DEFAULT 0)"
)
# Of private sums (docs/protocol.md, section 16); without rows in a federation that has none.
PRIVATE_SQL: Final = """
CREATE TABLE helpers (  -- ``card`` is the newest; ``code`` that of an open invitation, else empty
    name TEXT PRIMARY KEY, public BLOB NOT NULL DEFAULT x'', proof BLOB NOT NULL DEFAULT x'',
    card BLOB NOT NULL DEFAULT x'', count INTEGER NOT NULL DEFAULT -1, status TEXT NOT NULL DEFAULT '',
    software TEXT NOT NULL DEFAULT '', seen_at REAL, answered_at REAL, code TEXT NOT NULL DEFAULT '',
    made_at REAL NOT NULL DEFAULT 0, expires_at REAL NOT NULL DEFAULT 0, crc INTEGER NOT NULL DEFAULT 0);
CREATE TABLE terms (digest BLOB PRIMARY KEY, content BLOB NOT NULL, crc INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
CREATE TABLE contexts (  -- the one that updates on a base have; digests of model, plan and terms
    base INTEGER PRIMARY KEY, model BLOB NOT NULL, plan BLOB NOT NULL, terms BLOB NOT NULL,
    crc INTEGER NOT NULL DEFAULT 0);
CREATE TABLE private_updates (  -- beside ``updates``: what helpers are asked by; ``why`` it was dropped, if it was
    update_id INTEGER PRIMARY KEY, context BLOB NOT NULL, header BLOB NOT NULL, signature BLOB NOT NULL,
    min INTEGER NOT NULL, set_digest BLOB, why TEXT NOT NULL DEFAULT '', logged INTEGER,  -- the version that says so
    crc INTEGER NOT NULL DEFAULT 0);
CREATE INDEX private_updates_by_set ON private_updates (set_digest) WHERE set_digest IS NOT NULL;
CREATE TABLE sets (  -- until a start needs them no more; ``devices`` were in it, ``sum`` is of their words
    digest BLOB PRIMARY KEY, context BLOB NOT NULL, base INTEGER NOT NULL, staleness INTEGER NOT NULL,
    devices INTEGER NOT NULL, state TEXT NOT NULL, sum BLOB, merged INTEGER, crc INTEGER NOT NULL DEFAULT 0);
"""
SCHEMA_SQL: Final = f"""
CREATE TABLE facts (name TEXT PRIMARY KEY, value, crc INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
CREATE TABLE devices (
    name TEXT PRIMARY KEY, public BLOB NOT NULL, proof BLOB NOT NULL, state TEXT NOT NULL, enrolled_at REAL NOT NULL,
    revoked_at REAL, why TEXT NOT NULL DEFAULT '', status TEXT NOT NULL DEFAULT '', base INTEGER NOT NULL DEFAULT -1,
    software TEXT NOT NULL DEFAULT '', seen_at REAL, update_bytes INTEGER NOT NULL DEFAULT 0,
    role TEXT NOT NULL DEFAULT '', crc INTEGER NOT NULL DEFAULT 0);
CREATE TABLE keys (  -- every key that a device ever had, and the last answer given under it
    device TEXT NOT NULL, key BLOB NOT NULL, public BLOB NOT NULL, state TEXT NOT NULL,
    seq INTEGER NOT NULL DEFAULT 0, outcome TEXT NOT NULL DEFAULT '', reason TEXT NOT NULL DEFAULT '',
    metrics_seq INTEGER NOT NULL DEFAULT 0, highest_base INTEGER NOT NULL DEFAULT -1,
    crc INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (device, key)) WITHOUT ROWID;
CREATE TABLE invitations (device TEXT PRIMARY KEY, code TEXT NOT NULL, made_at REAL NOT NULL, expires_at REAL NOT NULL,
    role TEXT NOT NULL DEFAULT '', crc INTEGER NOT NULL DEFAULT 0);
CREATE TABLE updates (  -- one row for every accepted update, for good: the proof that none merged twice
    id INTEGER PRIMARY KEY, device TEXT NOT NULL, key BLOB NOT NULL, seq INTEGER NOT NULL, base INTEGER NOT NULL,
    digest BLOB NOT NULL, staleness INTEGER NOT NULL, samples INTEGER NOT NULL, discount REAL NOT NULL,
    codec TEXT NOT NULL, encoding TEXT NOT NULL, segment INTEGER, place INTEGER, size INTEGER, checksum INTEGER,
    received_at REAL NOT NULL, merged INTEGER,  -- NULL: in the buffer; -1: dropped
    epsilon REAL, norm REAL, stated INTEGER, crc INTEGER NOT NULL DEFAULT 0,  -- as its device says
    UNIQUE (device, base));
CREATE INDEX updates_by_version ON updates (merged);
CREATE INDEX updates_by_segment ON updates (segment) WHERE segment IS NOT NULL;
CREATE TABLE versions (
    version INTEGER PRIMARY KEY, digest BLOB NOT NULL, made_at REAL NOT NULL, updates INTEGER NOT NULL,
    staleness_mean REAL NOT NULL, staleness_max INTEGER NOT NULL,
    codec TEXT NOT NULL, encoding TEXT NOT NULL, body BLOB, checksum INTEGER,
    crc INTEGER NOT NULL DEFAULT 0);
CREATE TABLE log (version INTEGER PRIMARY KEY, entry BLOB NOT NULL);  -- of merges, for good: docs/log.md
-- vectors/SEGMENT-model.f32 and, where a start begins, vectors/SEGMENT-server.f32
CREATE TABLE snapshots (version INTEGER PRIMARY KEY, segment INTEGER NOT NULL, checksum INTEGER NOT NULL,
    crc INTEGER NOT NULL DEFAULT 0);
CREATE TABLE server (version INTEGER NOT NULL, segment INTEGER NOT NULL, checksum INTEGER NOT NULL,
    crc INTEGER NOT NULL DEFAULT 0);
{FRAMES_SQL};
CREATE TABLE metrics (
    device TEXT NOT NULL, version INTEGER NOT NULL, split TEXT NOT NULL, samples INTEGER NOT NULL,
    entries TEXT NOT NULL, received_at REAL NOT NULL, crc INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (device, version, split)) WITHOUT ROWID;
CREATE TABLE counts (name TEXT PRIMARY KEY, value INTEGER NOT NULL, crc INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
CREATE TABLE requests (
    id INTEGER PRIMARY KEY, what TEXT NOT NULL, argument TEXT NOT NULL, done INTEGER NOT NULL DEFAULT 0,
    error TEXT NOT NULL DEFAULT '', crc INTEGER NOT NULL DEFAULT 0);
{PRIVATE_SQL}"""
