"""The migration of the ledger from format 1 to 5: vectors and bodies move to files, and the log of merges begins.

Format 1 had three layouts, told apart by the columns of ``updates``: bodies in the ledger; bodies in files; bodies in
files, with checksums. Of no update it kept the digest that the log of merges names, so the log begins with the version
at which the ledger is migrated, and what was accepted before has ``UNKNOWN_DIGEST`` there.
"""

import json
import sqlite3
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from ternbus.aggregator import settings as configuration
from ternbus.aggregator.merge.recipe import Recipe
from ternbus.aggregator.settings import MergeSettings, Settings
from ternbus.aggregator.store.bodies import BODIES, Bodies, Place
from ternbus.aggregator.store.remedy import remedy
from ternbus.aggregator.store.vectors import VECTORS, Vectors
from ternbus.broker import files
from ternbus.broker.errors import CorruptError
from ternbus.broker.files import load_toml, read_key
from ternbus.broker.protocol import merge_log
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.schema import Vector, type_f32

# Of format 5, word for word; later formats leave it as it is.
TABLES: Final = {
    "devices": """
CREATE TABLE devices (
    name TEXT PRIMARY KEY, public BLOB NOT NULL, proof BLOB NOT NULL, state TEXT NOT NULL, enrolled_at REAL NOT NULL,
    revoked_at REAL, why TEXT NOT NULL DEFAULT '', status TEXT NOT NULL DEFAULT '', base INTEGER NOT NULL DEFAULT -1,
    software TEXT NOT NULL DEFAULT '', seen_at REAL, update_bytes INTEGER NOT NULL DEFAULT 0)""",
    "keys": """
CREATE TABLE keys (  -- every key that a device ever had, and the last answer given under it
    device TEXT NOT NULL, key BLOB NOT NULL, public BLOB NOT NULL, state TEXT NOT NULL,
    seq INTEGER NOT NULL DEFAULT 0, outcome TEXT NOT NULL DEFAULT '', reason TEXT NOT NULL DEFAULT '',
    metrics_seq INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (device, key)) WITHOUT ROWID""",
    "invitations": """
CREATE TABLE invitations (device TEXT PRIMARY KEY, code TEXT NOT NULL, made_at REAL NOT NULL, expires_at REAL NOT NULL)
""",
    "updates": """
CREATE TABLE updates (  -- one row for every accepted update, for good: the proof that none merged twice
    id INTEGER PRIMARY KEY, device TEXT NOT NULL, key BLOB NOT NULL, seq INTEGER NOT NULL, base INTEGER NOT NULL,
    digest BLOB NOT NULL, staleness INTEGER NOT NULL, samples INTEGER NOT NULL, discount REAL NOT NULL,
    codec TEXT NOT NULL, encoding TEXT NOT NULL, segment INTEGER, place INTEGER, size INTEGER, checksum INTEGER,
    received_at REAL NOT NULL, merged INTEGER,  -- NULL: in the buffer; -1: dropped
    epsilon REAL,  -- as its device says
    UNIQUE (device, base))""",
    "snapshots": """
CREATE TABLE snapshots (version INTEGER PRIMARY KEY, segment INTEGER NOT NULL, checksum INTEGER NOT NULL)""",
    "server": """
CREATE TABLE server (version INTEGER NOT NULL, segment INTEGER NOT NULL, checksum INTEGER NOT NULL)""",
}
LOG: Final = "CREATE TABLE log (version INTEGER PRIMARY KEY, entry BLOB NOT NULL)"
INDICES: Final = (
    "CREATE INDEX updates_by_version ON updates (merged)",
    "CREATE INDEX updates_by_segment ON updates (segment) WHERE segment IS NOT NULL",
)


def to_5(db: sqlite3.Connection, folder: Path) -> None:
    """ConfigError where settings, key or a body that is needed cannot be read."""
    settings = configuration.from_table(load_toml(folder / "aggregator.toml"), str(folder / "aggregator.toml"))
    identity = Identity(read_key(folder / "aggregator.key"))
    _write_recipe(db, settings)
    _move_vectors(db, folder)
    _rebuild_updates(db, folder)
    _rebuild_members(db, settings)
    _begin_log(db, identity)
    files.sync(folder)


def _fact(db: sqlite3.Connection, name: str) -> Any:
    row = db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    return None if row is None else row[0]


@contextmanager
def _rebuilt(db: sqlite3.Connection, table: str) -> Iterator[None]:
    """Make a table as format 5 has it, for the block to fill; the one from before is ``before`` meanwhile."""
    db.execute(f"ALTER TABLE {table} RENAME TO before")
    db.execute(TABLES[table])
    yield
    db.execute("DROP TABLE before")


def _write_recipe(db: sqlite3.Connection, settings: Settings) -> None:
    """By what the merges since the snapshot were made. The first layout has only the settings for it."""
    optimizer, usual = settings.optimizer, MergeSettings()
    if (written := _fact(db, "optimizer")) is not None:
        name, learning_rate, momentum = json.loads(written)
        optimizer = replace(optimizer, name=name, learning_rate=learning_rate, momentum=momentum)
    merge = replace(settings.merge, rule=usual.rule, max_share=usual.max_share)  # there was no other way yet
    db.execute("DELETE FROM facts WHERE name = 'optimizer'")
    recipe = Recipe(merge=merge, optimizer=optimizer, averages_statistics=False, exact_sums=False)
    db.execute("INSERT INTO facts VALUES ('recipe', ?)", (recipe.dumps(),))


def _move_vectors(db: sqlite3.Connection, folder: Path) -> None:
    """Each snapshot's under a number of its own, above those of the files of bodies that there are."""
    vectors, segment = Vectors(folder / VECTORS), int(_fact(db, "segment") or 0)
    with _rebuilt(db, "snapshots"):
        for version, content in db.execute("SELECT version, vector FROM before ORDER BY version"):
            segment += 1
            checksum = vectors.write(f"{segment}-model", [_vector(content)])
            db.execute("INSERT INTO snapshots VALUES (?, ?, ?)", (version, segment, checksum))
    with _rebuilt(db, "server"):
        ((version, *contents),) = db.execute("SELECT version, target, momentum FROM before").fetchall()
        checksum = vectors.write(f"{segment}-server", [_vector(each) for each in contents if each is not None])
        db.execute("INSERT INTO server VALUES (?, ?, ?)", (version, segment, checksum))
    db.execute("INSERT OR REPLACE INTO facts VALUES ('segment', ?)", (segment,))


def _vector(content: bytes) -> Vector:
    return np.frombuffer(content, type_f32)


def _rebuild_updates(db: sqlite3.Connection, folder: Path) -> None:
    """Without the digest that nobody kept; with every body that is needed in a file, and its checksum."""
    columns = {row[1] for row in db.execute("PRAGMA table_info(updates)")}
    for column in ("segment", "place", "size", "checksum"):
        if column not in columns:
            db.execute(f"ALTER TABLE updates ADD COLUMN {column} INTEGER")
    with _rebuilt(db, "updates"):
        db.execute(
            "INSERT INTO updates (id, device, key, seq, base, digest, staleness, samples, discount, codec, encoding,"
            " segment, place, size, checksum, received_at, merged)"
            " SELECT id, device, key, seq, base, ?, staleness, samples, discount, codec, encoding,"
            " segment, place, size, checksum, received_at, merged FROM before",
            (merge_log.UNKNOWN_DIGEST,),
        )
        if "body" in columns:
            _move_bodies(db, folder)
    for statement in INDICES:
        db.execute(statement)
    _write_checksums(db, folder)


def _move_bodies(db: sqlite3.Connection, folder: Path) -> None:
    """Of what is still to be merged, and of what a start merges again: the first layout has them in the ledger."""
    with closing(Bodies(folder / BODIES, int(_fact(db, "segment")))) as bodies:
        for number, body in db.execute("SELECT id, body FROM before WHERE body IS NOT NULL ORDER BY id"):
            _refer(db, number, bodies.append(body))
        bodies.sync()


def _write_checksums(db: sqlite3.Connection, folder: Path) -> None:
    """Where there is none: in the second layout, and where its commits went on in a ledger of the third."""
    query = "SELECT id, segment, place, size FROM updates WHERE segment IS NOT NULL AND checksum IS NULL"
    for number, segment, offset, size_bytes in db.execute(query).fetchall():
        path = folder / BODIES / f"{segment}.bodies"
        with path.open("rb") as file:
            file.seek(offset)
            body = file.read(size_bytes)
        if len(body) != size_bytes:
            raise CorruptError(f"{path} is damaged; {remedy(folder)}")
        place = Place(segment=segment, offset=offset, size_bytes=size_bytes, checksum=zlib.crc32(body))
        _refer(db, number, place)


def _refer(db: sqlite3.Connection, number: int, place: Place) -> None:
    db.execute(
        "UPDATE updates SET segment = ?, place = ?, size = ?, checksum = ? WHERE id = ?",
        (place.segment, place.offset, place.size_bytes, place.checksum, number),
    )


def _rebuild_members(db: sqlite3.Connection, settings: Settings) -> None:
    """Devices, their keys, and invitations, which had no end and now have the usual one from today."""
    (about,) = db.execute("SELECT sql FROM sqlite_master WHERE name = 'keys'").fetchone()
    with _rebuilt(db, "devices"):
        db.execute(
            "INSERT INTO devices (name, public, proof, state, enrolled_at, status, base, software, seen_at,"
            " update_bytes) SELECT name, public, proof, state, enrolled_at, status, base, software, seen_at,"
            " update_bytes FROM before"
        )
    with _rebuilt(db, "keys"):
        db.execute(
            "INSERT INTO keys (device, key, public, state, seq, outcome, reason, metrics_seq)"
            " SELECT device, key, public, state, seq, outcome, reason, metrics_seq FROM before"
        )
    if "DEFAULT -1" in about:  # the first layout's number for none, which is the highest of all today
        db.execute("UPDATE keys SET metrics_seq = 0 WHERE metrics_seq = -1")
    with _rebuilt(db, "invitations"):
        expires_at = time.time() + settings.invitations.expire_after_s
        db.execute("INSERT INTO invitations SELECT device, code, made_at, ? FROM before", (expires_at,))


def _begin_log(db: sqlite3.Connection, identity: Identity) -> None:
    """With the newest version, whose updates it cannot name."""
    version = int(_fact(db, "version"))
    ((digest,),) = db.execute("SELECT digest FROM versions WHERE version = ?", (version,)).fetchall()
    entry = merge_log.Entry(
        federation=_fact(db, "federation"), version=version, digest=digest, previous=merge_log.FIRST
    )
    db.execute(LOG)
    db.execute("INSERT INTO log VALUES (?, ?)", (version, entry.signed(identity).pack()))
