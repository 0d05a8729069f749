"""The check that a ledger holds what was written to it: the rows that a start reads, or all."""

import json
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import Final

from ternbus.aggregator.settings import Settings
from ternbus.aggregator.store import checksums, influence_rows, merge_log
from ternbus.aggregator.store.ledger import Ledger
from ternbus.aggregator.store.remedy import remedy
from ternbus.aggregator.store.schema import DROPPED, SCHEMA_SQL
from ternbus.broker.errors import CorruptError, ProtocolError
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.merge_log import Audit
from ternbus.broker.protocol.messages import PRIVATE

WHOLE: Final = (  # tables which a start reads
    "facts", "devices", "keys", "invitations", "snapshots", "server", "metrics", "helpers", "terms", "contexts",
    "private_updates", "sets",
)  # fmt: skip
UNREADABLE: Final = (CorruptError, sqlite3.Error, UnicodeError)  # what reading a damaged ledger may raise
NAMED_MAX: Final = 3  # damaged rows in an error
SLOTS_MAX: Final = 65_535  # `downlink.slots`
FAULTS_MAX: Final = 1000  # of one kind, in a list


def check_start(ledger: Ledger, settings: Settings, public: bytes) -> None:
    """Raise CorruptError where a row that a start reads is not as it was written.

    The frames that the broker retains are checked when they are published again, files when they are read.
    """
    db = ledger.db
    found = list(islice((fault for table in WHOLE for fault in checksums.damaged(db, table)), NAMED_MAX + 1))
    if not found:
        (start,) = db.execute("SELECT version FROM server").fetchone() or (0,)
        oldest = min(start, ledger.version - settings.staleness.max)
        about = {"oldest": oldest}
        late = f"merged > :oldest OR merged = {DROPPED} OR merged IS NULL"
        if settings.merge.is_bounded:
            late += f" OR id IN ({influence_rows.NEWEST})"
        found = [
            *islice(checksums.damaged(db, "updates", late, about), NAMED_MAX + 1),
            *islice(checksums.damaged(db, "versions", "version > ?", (start,)), NAMED_MAX + 1),
        ]
    if found:
        more = " and more" if len(found) > NAMED_MAX else ""
        raise ledger.corrupt(f"{', '.join(found[:NAMED_MAX])}{more} is not as it was written")
    audit, last = Audit(public=public), ledger.last_entry()
    entry = audit.take(last)
    if entry is None or entry.version != ledger.version:
        raise ledger.corrupt(f"the log's entry of version {ledger.version} is not as it was written")
    if (fault := next(_lost_frames(ledger), None)) is not None:
        raise ledger.corrupt(fault)


def faults(ledger: Ledger, public: bytes) -> Iterator[str]:
    """Everything in the ledger, and in the files that it names, that is not as it was written; but for the log."""
    yield from _of_sqlite(ledger)
    for table in checksums.COLUMNS:
        yield from _reading(f"the table {table}", _rows(ledger, table))
    yield from _reading("the deltas", _deltas(ledger))
    yield from _reading("the bodies of updates", _bodies(ledger))
    yield from _reading("the vectors", _vectors(ledger))
    yield from _reading("the retained messages", _frames(ledger, public))
    yield from _reading("the retained deltas", _lost_deltas(ledger))
    yield from _reading("the archives", _archives(ledger))


def _of_sqlite(ledger: Ledger) -> Iterator[str]:
    """Its pages, and whether its tables are those of this format."""
    yield from _reading("the ledger", _pages(ledger))
    with closing(sqlite3.connect(":memory:")) as new:
        new.executescript(SCHEMA_SQL)
        expected = _tables(new)
    try:
        found = _tables(ledger.db)
    except (sqlite3.Error, UnicodeError):
        found = {}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            yield f"the definition of {checksums.shown([name])} is not that of this format"


def _pages(ledger: Ledger) -> Iterator[str]:
    for (line,) in ledger.db.execute("PRAGMA integrity_check"):
        if line != "ok":
            yield f"SQLite finds: {checksums.shown([line])}"


def _tables(db: sqlite3.Connection) -> dict[str, str]:
    rows = db.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL")
    return {name: " ".join(sql.split()) for name, sql in rows}


def _reading(what: str, found: Iterator[str]) -> Iterator[str]:
    """Faults as they are found; what cannot be read to its end is one more."""
    try:
        yield from islice(found, FAULTS_MAX)
    except (sqlite3.Error, UnicodeError, ValueError, TypeError, RecursionError) as error:
        yield f"{what} cannot be read: {checksums.shown([error])}"


def _rows(ledger: Ledger, table: str) -> Iterator[str]:
    return (f"{row} is not as it was written" for row in checksums.damaged(ledger.db, table))


def _deltas(ledger: Ledger) -> Iterator[str]:
    """Those that a vector is made of must be there; older ones are dropped."""
    (oldest,) = ledger.db.execute("SELECT min(version) FROM snapshots").fetchone()
    for version, body, checksum in ledger.db.execute("SELECT version, body, checksum FROM versions ORDER BY version"):
        if body is None and version > oldest:
            yield f"the delta of version {version} is not there"
        elif body is not None and (not isinstance(body, bytes) or zlib.crc32(body) != checksum):
            yield f"the delta of version {version} is not as it was written"


def _bodies(ledger: Ledger) -> Iterator[str]:
    """Those that a start adds up again must be there; older ones are dropped."""
    (start,) = ledger.db.execute("SELECT version FROM server").fetchone()
    rows = ledger.db.execute(
        "SELECT id, device, base, segment, place, size, checksum FROM updates"
        " WHERE segment IS NOT NULL OR merged IS NULL OR (merged > ? AND codec != ?) ORDER BY segment, place",
        (start, PRIVATE),  # what merged private updates come to is in their set's row
    )
    for number, device, base, segment, offset, size_bytes, checksum in rows:
        what = f"update {number} of {device} on version {base}"
        if segment is None:
            yield f"{what} has no body"
            continue
        try:
            ledger.body(segment, offset, size_bytes, checksum)
        except CorruptError as error:
            yield f"{what}: {_short(error, ledger.path.parent)}"


def _vectors(ledger: Ledger) -> Iterator[str]:
    files = [
        (f"{segment}-{kind}", checksum)
        for table, kind in (("snapshots", "model"), ("server", "server"))
        for segment, checksum in ledger.db.execute(f"SELECT segment, checksum FROM {table}")  # noqa: S608 - from here
    ]
    for name, checksum in files:
        try:
            ledger.vectors.read(name, checksum)
        except CorruptError as error:
            yield _short(error, ledger.path.parent)


def _archives(ledger: Ledger) -> Iterator[str]:
    for archive in merge_log.archives(ledger):
        try:
            archive.check()
        except CorruptError as error:
            yield _short(error, ledger.path.parent)


def _short(error: CorruptError, directory: Path) -> str:
    """Without what to do about it, which a list says once."""
    return str(error).removesuffix(f"; {remedy(directory)}")


def _lost_frames(ledger: Ledger) -> Iterator[str]:
    """The frames of head and newest snapshot, with which every device begins, that are not there."""
    federation, (_, parts, _, place) = ledger.fact("federation"), json.loads(ledger.fact("snapshot"))
    for topic in chain([topics.head(federation)], (topics.snapshot(federation, place, part) for part in range(parts))):
        if ledger.db.execute("SELECT 1 FROM frames WHERE topic = ?", (topic,)).fetchone() is None:
            yield f"the retained message of {checksums.shown([topic])} is lost"


def _frames(ledger: Ledger, public: bytes) -> Iterator[str]:
    """Each is signed, and lies where its header says; those with which a device begins are there."""
    for topic, payload in ledger.db.execute("SELECT topic, payload FROM frames ORDER BY topic"):
        try:
            frame = parse(payload)
            topics.check(frame, topics.parse(topic))
            frame.check_authentic(public)
        except ProtocolError as error:
            yield f"the retained message of {checksums.shown([topic])} is not as it was written: {error}"
    yield from _lost_frames(ledger)


def _lost_deltas(ledger: Ledger) -> Iterator[str]:
    """The frames of deltas from the newest snapshot to the head that are not there, for a broker that loses its own.

    Those that cannot be read `_frames` has named.
    """
    federation, slots = ledger.fact("federation"), ledger.fact("slots")
    since, *_ = json.loads(ledger.fact("snapshot"))
    if not 0 <= ledger.version - since <= min(slots, SLOTS_MAX):  # a damaged row says so, which is named elsewhere
        return
    for version in range(since + 1, ledger.version + 1):
        part, parts = 0, 1
        while part < parts:
            topic = topics.delta(federation, version % slots, part)
            row = ledger.db.execute("SELECT payload FROM frames WHERE topic = ?", (topic,)).fetchone()
            try:
                frame = None if row is None else parse(row[0])
            except ProtocolError:
                break
            if frame is None or frame.meta.get("version") != version:
                yield f"the retained message of {checksums.shown([topic])}, of version {version}, is lost"
                break
            part, parts = part + 1, frame.parts
