"""The sound rows of a damaged ledger, by their checksums, and the newest version that they give."""

import shutil
import sqlite3
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ternbus.aggregator.store import checksums, merge_log
from ternbus.aggregator.store.checksums import COLUMNS, KEYS
from ternbus.aggregator.store.ledger import LEDGER, Ledger
from ternbus.aggregator.store.merge_log import Archive
from ternbus.aggregator.store.remedy import restore_backup
from ternbus.aggregator.store.rows import unsigned
from ternbus.aggregator.store.schema import SCHEMA_SQL
from ternbus.aggregator.store.vectors import VECTORS, Vectors
from ternbus.broker.errors import CorruptError, ProtocolError
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.merge_log import Audit, Entry, Signed, unpack
from ternbus.broker.protocol.model_messages import Delta, Head, Snapshot
from ternbus.broker.protocol.parts import Collector
from ternbus.broker.protocol.schema import Schema, Vector, vector_digest, vector_of
from ternbus.broker.protocol.ternary import Block, decode
from ternbus.broker.store_format import checksum

BESIDE: Final = {"updates": "merged, segment", "versions": "body"}  # columns that a row's checksum does not cover
READERS: Final[Mapping[str, Callable[[Mapping[str, Any]], object]]] = {
    "head": Head.from_meta,
    "snapshot": Snapshot.from_meta,
    "delta": Delta.from_meta,
    "terms": dict,  # a map without keys that matter: the terms are the body
}
READ_ERRORS: Final = (sqlite3.Error, UnicodeError)

Row = tuple[Any, ...]


@dataclass(slots=True, kw_only=True)
class Salvaged:
    """The sound rows by table, as ``COLUMNS`` orders them, with ``BESIDE`` at their end; ``lost`` names the others."""

    rows: dict[str, list[Row]]
    log: dict[int, Signed]
    lost: list[str]
    log_is_whole: bool

    @property
    def facts(self) -> dict[str, Any]:
        return {name: value for name, value, *_ in self.rows["facts"]}

    @property
    def newest(self) -> int:
        """The highest version that anything sound names."""
        named = [int(self.facts.get("version", 0)), *self.log, *(int(row[0]) for row in self.rows["versions"])]
        named += [int(row[-2]) for row in self.rows["updates"] if isinstance(row[-2], int)]
        return max([*named, *(head.version for head in self.heads)])

    @property
    def has_all_that_is_logged(self) -> bool:
        """Whether the tables have every version and every update that the log names, and no others."""
        logged = {
            (version, device, seq)
            for version, signed in self.log.items()
            for device, _, seq, _ in Entry.parse(signed.content).named
        }
        first = max(1, min(self.log, default=1))  # some updates of before are not archived
        merged = {(row[-2], row[1], unsigned(row[3])) for row in self.rows["updates"] if (row[-2] or 0) >= first}
        return merged == logged and {row[0] for row in self.rows["versions"]} == self.log.keys()

    @property
    def heads(self) -> list[Head]:
        """The head that was published last, if its frame is sound."""
        return [
            Head.from_meta(parse(payload).meta) for topic, payload, *_ in self.rows["frames"] if topic.endswith("/head")
        ]


def salvage(directory: Path, scratch: Path, public: bytes) -> Salvaged:
    """Read a damaged ledger, through a copy in a folder of its own; CorruptError where SQLite cannot open it."""
    scratch.mkdir(mode=0o700)
    for path in directory.glob(f"{LEDGER}*"):
        shutil.copy2(path, scratch / path.name)
    try:
        _mend_definitions(scratch / LEDGER)
        with closing(sqlite3.connect(scratch / LEDGER, isolation_level=None)) as db:
            db.text_factory = checksums.as_it_is
            db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
            lost: list[str] = []
            rows = {table: _rows(db, table, lost) for table in COLUMNS}
            named = {row[0]: row[1] for row in rows["facts"]}
            archives = merge_log.listed(directory, named.get(merge_log.ARCHIVES))
            log, is_whole = _log(db, public, archives, lost)
        names = named.keys()
        lost += [name for each in checksums.FACTS if each not in names and (name := f"facts {each}") not in lost]
    except READ_ERRORS as error:
        raise CorruptError(
            f"{directory / LEDGER} cannot be opened at all: {checksums.shown([error])}; {restore_backup(directory)}"
        ) from error
    rows["frames"] = [row for row in rows["frames"] if _is_genuine(row, public)]
    return Salvaged(rows=rows, log=log, lost=lost, log_is_whole=is_whole)


def _mend_definitions(path: Path) -> None:
    """Put the definitions of this format's tables in place of damaged ones, by the tables' names."""
    with closing(sqlite3.connect(":memory:")) as new:
        new.executescript(SCHEMA_SQL)
        good = dict(new.execute("SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL").fetchall())
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.text_factory = bytes
        db.execute("PRAGMA writable_schema = ON")
        with suppress(*READ_ERRORS):
            for number, name, sql in db.execute("SELECT rowid, name, sql FROM sqlite_schema").fetchall():
                wanted = good.get(bytes(name or b"").decode("utf-8", "replace"))
                if wanted is None or sql is None:
                    continue
                if sql.decode("utf-8", "replace").split() != wanted.split():
                    db.execute("UPDATE sqlite_schema SET sql = ? WHERE rowid = ?", (wanted, number))


def _rows(db: sqlite3.Connection, table: str, lost: list[str]) -> list[Row]:
    """From the first row to where the table can no longer be read, and from its last row back to there."""
    size = KEYS.get(table, 1)
    columns = ", ".join([*COLUMNS[table], *([BESIDE[table]] if table in BESIDE else []), "crc"])
    found: dict[Row, Row] = {}
    unread = False
    for direction in ("ASC", "DESC"):
        try:
            order = ", ".join(f"{each} {direction}" for each in _order(db, table, size))
            rows = db.execute(f"SELECT {columns} FROM {table} NOT INDEXED ORDER BY {order}")  # noqa: S608 - our own names
            while (row := rows.fetchone()) is not None:
                if checksum(*row[: len(COLUMNS[table])]) == row[-1]:
                    found[row[:size]] = row[:-1]
                elif direction == "ASC":
                    lost.append(f"{table} {checksums.shown(row[:size])}")
            if not unread:
                break
        except READ_ERRORS as error:
            if not unread:
                lost.append(f"rows of {table} ({checksums.shown([error])})")
            unread = True
    return [found[key] for key in sorted(found)] if table != "metrics" else list(found.values())


def _order(db: sqlite3.Connection, table: str, size: int) -> Sequence[str]:
    """The order in which a table lies in the file; another one is sorted first, and a sort needs every row."""
    try:
        db.execute(f"SELECT rowid FROM {table} LIMIT 0")  # noqa: S608 - our own names
    except sqlite3.OperationalError:  # the table is WITHOUT ROWID
        return [str(number) for number in range(1, size + 1)]
    return ["rowid"]


def _log(
    db: sqlite3.Connection, public: bytes, archives: list[Archive], lost: list[str]
) -> tuple[dict[int, Signed], bool]:
    """The ledger's entries, and whether they and those in archives are one whole chain.

    Else the log cannot be shown to anybody any more.
    """
    audit, entries = Audit(public=public), {}
    try:
        for archive in archives:
            for _, packed in archive.entries(None):
                audit.take(unpack(packed))
    except (*READ_ERRORS, CorruptError, ProtocolError) as error:
        audit.faults.append(checksums.shown([error]))
    try:
        for version, packed in db.execute("SELECT version, entry FROM log NOT INDEXED ORDER BY version"):
            signed = unpack(packed)
            entry = audit.take(signed)
            if entry is not None and entry.version == version:
                entries[version] = signed
    except (*READ_ERRORS, ProtocolError, TypeError) as error:
        audit.faults.append(checksums.shown([error]))
    if audit.finish():
        lost.append(f"the log of merges ({audit.faults[0]})")
        return entries, False
    return entries, True


def _is_genuine(row: Row, public: bytes) -> bool:
    try:
        frame = parse(row[1])
        topics.check(frame, topics.parse(row[0]))
        frame.check_authentic(public)
        READERS[frame.kind](frame.meta)
    except (ProtocolError, KeyError):
        return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Sound:
    """A version whose vector has the digest that the log names."""

    version: int
    vector: Vector
    schema: Schema


def newest_sound(found: Salvaged, directory: Path) -> Sound | None:
    """From the newest snapshot that is sound, on disk or as it was published, through the deltas behind it."""
    digests = _digests(found)
    for sound in _snapshots(found, directory):
        if vector_digest(sound.vector) == digests.get(sound.version):
            return _follow(sound, found, digests)
    return None


def _follow(sound: Sound, found: Salvaged, digests: dict[int, bytes]) -> Sound:
    for version, _, _, _, _, _, codec, encoding, crc, body in found.rows["versions"]:
        if version != sound.version + 1 or not isinstance(body, bytes) or zlib.crc32(body) != crc:
            continue
        vector = Block.read(sound.schema, codec, encoding, body).apply(sound.vector)
        if vector_digest(vector) == digests.get(version):
            sound = Sound(version=version, vector=vector, schema=sound.schema)
    return sound


def _digests(found: Salvaged) -> dict[int, bytes]:
    """Of versions' vectors, as the signed log has them, or the table of versions where it was migrated."""
    logged = {version: Entry.parse(signed.content).digest for version, signed in found.log.items()}
    return {row[0]: row[1] for row in found.rows["versions"]} | logged


def _snapshots(found: Salvaged, directory: Path) -> list[Sound]:
    """Every snapshot that can be read, the newest first; what a disk gave back is to be compared with its digest."""
    snapshots = list(_published(found))
    schemas = [Schema.parse(found.facts["schema"])] if "schema" in found.facts else []
    for schema in [*schemas, *(sound.schema for sound in snapshots)][:1]:
        for version, segment, crc in found.rows["snapshots"]:
            with suppress(CorruptError):
                vector = Vectors(directory / VECTORS).read(f"{segment}-model", crc)
                snapshots.append(Sound(version=version, vector=vector, schema=schema))
    return sorted(snapshots, key=lambda sound: -sound.version)


def _published(found: Salvaged) -> Iterator[Sound]:
    """What the broker was given to retain."""
    collector = Collector(messages_max=2, bytes_max=2**62)
    for topic, payload in found.rows["frames"]:
        if "/all/snapshot/" in topic and (whole := collector.add(parse(payload))) is not None:
            about = Snapshot.from_meta(whole.meta)
            content = decode(whole.body, about.encoding, about.content_bytes)
            schema = Schema.parse(content[: about.schema_bytes])
            vector = vector_of(content[about.schema_bytes :], schema)
            yield Sound(version=about.version, vector=vector, schema=schema)


def rebuild_snapshots(ledger: Ledger) -> list[str]:
    """Make damaged snapshots of a ledger whose rows are sound anew, from the one before and the deltas; what was done.

    One that has none before it is given up, if a start does not begin there. CorruptError where nothing helps.
    """
    done = []
    snapshots = ledger.db.execute("SELECT version, segment, checksum FROM snapshots ORDER BY version").fetchall()
    start, _ = ledger.server()
    for index, (version, segment, crc) in enumerate(snapshots):
        with suppress(CorruptError):
            ledger.vectors.read(f"{segment}-model", crc)
            continue
        if index == 0 or ledger.db.execute("SELECT 1 FROM snapshots WHERE version < ?", (version,)).fetchone() is None:
            if version >= start:
                raise ledger.corrupt(f"the snapshot of version {version} cannot be made anew")
            ledger.db.execute("DELETE FROM snapshots WHERE version = ?", (version,))
            ledger.db.execute("UPDATE versions SET body = NULL WHERE version <= ?", (snapshots[index + 1][0],))
            done.append(f"versions {version} to {snapshots[index + 1][0] - 1} can no longer be exported")
            continue
        ledger.vectors.write(f"{segment}-model", [_made_anew(ledger, version)])
        done.append(f"the snapshot of version {version} was made anew, from the one before and the deltas")
    return done


def _made_anew(ledger: Ledger, version: int) -> Vector:
    (before, segment, crc) = ledger.db.execute(
        "SELECT version, segment, checksum FROM snapshots WHERE version < ? ORDER BY version DESC LIMIT 1", (version,)
    ).fetchone()
    vector = ledger.vectors.read(f"{segment}-model", crc)
    for number, digest, block in ledger.deltas(ledger.schema(), before, version):
        vector = block.apply(vector)
        ledger.check_digest(number, digest, vector_digest(vector))
    return vector
