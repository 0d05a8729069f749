"""The ledger: it stores the core's records in one SQLite file, and survives a kill at any moment."""

import json
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final

from ternbus.aggregator.core import records
from ternbus.aggregator.merge.optimizer import ServerState
from ternbus.aggregator.store import checksums, lost_ledger, membership, migration, revocations, rows, set_rows
from ternbus.aggregator.store.bodies import BODIES, Bodies, Place
from ternbus.aggregator.store.maintenance import checkpoint, remove
from ternbus.aggregator.store.remedy import remedy
from ternbus.aggregator.store.schema import FORMAT, SCHEMA_SQL
from ternbus.aggregator.store.vectors import VECTORS, Vectors
from ternbus.broker import store_format
from ternbus.broker.crash_points import reached
from ternbus.broker.errors import ConfigError, CorruptError, ProtocolError
from ternbus.broker.protocol.merge_log import Signed, unpack
from ternbus.broker.protocol.messages import OPEN
from ternbus.broker.protocol.schema import Schema, Vector, vector_digest
from ternbus.broker.protocol.tensor_kinds import TensorKinds
from ternbus.broker.protocol.ternary import Block

LEDGER: Final = "ledger.sqlite"
CHECKPOINT_S: Final = 1.0
KINDS: Final = "kinds"  # the name of a fact
FAULTS: Final = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)  # that a damaged row may cause
ARCHIVED: Final = "archived:"  # before a device's name: the count of its updates in archives


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """A snapshot whose vectors are on disk, with the files' checksums."""

    record: records.SnapshotTaken
    segment: int
    model: int
    server: int


class Ledger:
    """One connection to DIR/ledger.sqlite. ``write`` makes records durable; other processes read beside it.

    ``untouched`` is for a folder that no process serves: reading it then changes no file in it.
    ``beside`` is a thread for what may become durable later: the vectors of a snapshot taken at leisure. Until they
    are, a start begins at the snapshot before, and all that it needs for that is kept.
    """

    def __init__(
        self, path: Path, *, read_only: bool = False, untouched: bool = False, beside: Executor | None = None
    ) -> None:
        if not path.exists():
            raise lost_ledger.missing(path)
        self.path, self._remedy = path, remedy(path.parent)
        connect = partial(_connect, path, read_only=read_only, untouched=untouched)
        with store_format.opening(path, connect, self._remedy) as self.db:
            self.db.execute("PRAGMA query_only = ON" if read_only else "PRAGMA synchronous = FULL")
            self.db.execute("PRAGMA secure_delete = FAST")  # or spent codes would stay in the page, as free space
            checksums.register(self.db)
            found = self.fact("format")
            with self.blaming_rows():
                self.bodies = Bodies(path.parent / BODIES, int(self.fact("segment") or 0))
            self.vectors = Vectors(path.parent / VECTORS)
            self._updates: int | None = None  # the highest id of one, as soon as it is asked for
            self._begun = False  # another file of bodies
            self._beside, self._unneeded, self._checkpoint_at = beside, False, time.monotonic()
            if beside is not None:
                self.db.execute("PRAGMA wal_autocheckpoint = 0")  # else a commit does it, and everything waits
                self.db.execute("PRAGMA cache_spill = 0")  # a snapshot's frames are more than the cache, once
            self.keep = 0  # versions, the newest; 0: as many as there are slots for deltas on the broker
            self.leaving: Callable[[int], None] | None = None  # called before versions below one are forgotten
            self._pending: Future[_Written] | None = None
            self._checkpoint: Future[None] | None = None
            if found != FORMAT:
                raise migration.refusal(path, found)

    @classmethod
    def create(cls, path: Path, facts: dict[str, Any]) -> "Ledger":
        """Make the file, readable by its owner only."""
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        rows = {"format": FORMAT, "state": OPEN, "version": 0, "seq": 0, "session": 0, **facts}
        with store_format.naming(path), closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(SCHEMA_SQL)
            for fact in rows.items():
                checksums.insert(db, "facts", fact)
        return cls(path)

    def close(self) -> None:
        if self._pending is not None:
            self.write([])
        self.bodies.close()
        self.db.close()

    def naming(self) -> AbstractContextManager[None]:
        """StorageError or CorruptError, with the file's name and what to do, in place of SQLite's errors."""
        return store_format.naming(self.path, self._remedy)

    @contextmanager
    def blaming_rows(self) -> Iterator[None]:
        """CorruptError in place of an error that a row may have caused which is not as it was written."""
        try:
            yield
        except FAULTS as error:
            for fault in chain.from_iterable(checksums.damaged(self.db, table) for table in checksums.COLUMNS):
                raise self.corrupt(f"{fault} is not as it was written") from error
            raise

    def fact(self, name: str) -> Any:
        row = self.db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else row[0]

    @contextmanager
    def one_moment(self) -> Iterator[None]:
        """What is read within is of one moment, whatever another process writes meanwhile."""
        with self.naming():
            self.db.execute("BEGIN")
            try:
                yield
            finally:
                self.db.execute("COMMIT")

    def change_count(self) -> int:
        """A number that changes when another connection has committed something."""
        return int(self.db.execute("PRAGMA data_version").fetchone()[0])

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, on stable storage when it ends; StorageError where the disk does not take it."""
        with self.naming():
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.db.execute("COMMIT")
            except BaseException:
                if self.db.in_transaction:  # SQLite itself rolls back at some errors of the disk
                    self.db.execute("ROLLBACK")
                raise

    def write(self, batch: Iterable[records.Record], now: float | None = None) -> None:
        """Make records durable, in order, with one fsync; ``now`` is the time to write beside them (Unix seconds)."""
        moment = time.time() if now is None else now
        with self.transaction():
            self._settle(wait=not batch)
            for record in batch:
                self._write(record, moment)
            self.bodies.sync()  # before the rows that refer to them
            reached("bodies-synced")
        self._drop()
        if self._beside is not None and time.monotonic() - self._checkpoint_at >= CHECKPOINT_S:
            self._clear_log(self._beside)

    def _clear_log(self, beside: Executor) -> None:
        """Have SQLite's write-ahead log moved into the file, beside what follows."""
        if self._checkpoint is not None:
            if not self._checkpoint.done():
                return
            if not self.path.exists():
                raise lost_ledger.missing(self.path)
            self._checkpoint.result()
        self._checkpoint, self._checkpoint_at = beside.submit(checkpoint, self.path), time.monotonic()

    def _drop(self) -> None:
        """After a snapshot: begin another file of bodies, and remove files that nothing refers to any more."""
        if not (self._begun or self._unneeded):
            return
        segment = int(self.fact("segment") or 0)
        if segment != self.bodies.segment:
            self.bodies.begin(segment)
            reached("segment-begun")
        self._begun = False
        if self._unneeded:
            self._unneeded = False
            (oldest,) = self.db.execute("SELECT min(segment) FROM updates WHERE segment IS NOT NULL").fetchone()
            kept = [f"{kept}-model" for (kept,) in self.db.execute("SELECT segment FROM snapshots")]
            (start,) = self.db.execute("SELECT segment FROM server").fetchone()
            coming = [f"{segment}-model", f"{segment}-server"]  # perhaps they are being written
            unneeded = self.vectors.beyond([*kept, f"{start}-server", *coming])
            unneeded += self.bodies.below(segment if oldest is None else oldest)
            if self._beside is None:
                remove(unneeded)
            else:
                self._beside.submit(remove, unneeded)

    def _write(self, record: records.Record, now: float) -> None:
        match record:
            case records.UpdateAccepted():
                rows.accepted(self.db, self._next_update(), record, self.bodies.append(record.body), now)
            case records.SnapshotTaken():
                self._snapshot(record)
            case records.DeviceRevoked() | records.KeysRevoked():
                rows.write(self.db, record, now)
                revoked = membership.revocations(self.db)
                revocations.add(self.path.with_name(revocations.FILE), revoked)  # more in the list does no harm
            case _:
                rows.write(self.db, record, now)

    def _next_update(self) -> int:
        """An id above those of all updates; after a transaction that failed, some numbers are left out."""
        if self._updates is None:
            (self._updates,) = self.db.execute("SELECT coalesce(max(id), 0) FROM updates").fetchone()
        self._updates += 1
        return self._updates

    def _set(self, name: str, value: object) -> None:
        rows.set_fact(self.db, name, value)

    def _snapshot(self, record: records.SnapshotTaken) -> None:
        """Say where it lies on the broker; keep its vectors now, or beside what follows."""
        named = record.named
        self._set("snapshot", json.dumps([named.version, named.parts, named.content_bytes, named.place]))
        segment = int(self.fact("segment") or 0) + 1
        self._set("segment", segment)
        self._begun = True
        self._settle(wait=True)  # one at a time, in their order
        if record.at_leisure and self._beside is not None:
            self._pending = self._beside.submit(self._write_vectors, record, segment)
        else:
            self._keep(self._write_vectors(record, segment))

    def _write_vectors(self, record: records.SnapshotTaken, segment: int) -> "_Written":
        """Touches nothing but files that no row names yet: it may run in another thread, and be for nothing."""
        model = self.vectors.write(f"{segment}-model", [record.published])
        server = self.vectors.write(f"{segment}-server", record.server.vectors)
        reached("vectors-written")
        return _Written(record=record, segment=segment, model=model, server=server)

    def _settle(self, *, wait: bool) -> None:
        """Build on the vectors that were written meanwhile, if they are all there."""
        if self._pending is not None and (wait or self._pending.done()):
            pending, self._pending = self._pending, None
            self._keep(pending.result())

    def _keep(self, written: "_Written") -> None:
        """Begin here at the next start; let go of the bodies that led to it, and of what no kept version needs."""
        record, segment = written.record, written.segment
        checksums.insert(self.db, "snapshots", (record.version, segment, written.model), replace=True)
        self.db.execute("DELETE FROM server")
        checksums.insert(self.db, "server", (record.version, segment, written.server))
        self._set("recipe", record.recipe.dumps())
        self.db.execute(
            "UPDATE updates SET segment = NULL WHERE segment IS NOT NULL AND merged <= ?", (record.version,)
        )
        set_rows.forget_merged(self.db, record.version)
        (oldest,) = self.db.execute(  # by their count: after a rollback or a restore numbers are left out
            "SELECT min(version) FROM (SELECT version FROM versions WHERE version <= ? ORDER BY version DESC LIMIT ?)",
            (record.version, self.keep or int(self.fact("slots") or 1)),
        ).fetchone()
        row = self.db.execute("SELECT max(version) FROM snapshots WHERE version <= ?", (oldest,)).fetchone()
        if row[0] is not None:
            if self.leaving is not None:
                self.leaving(row[0])
            self.db.execute("DELETE FROM snapshots WHERE version < ?", (row[0],))
            self.db.execute("UPDATE versions SET body = NULL WHERE version <= ? AND body IS NOT NULL", (row[0],))
        self._unneeded = True

    # --- reading

    @property
    def version(self) -> int:
        """The newest one."""
        return int(self.fact("version"))

    def accepted(self) -> int:
        """How many updates were accepted, with those that are archived."""
        kept = int(self.db.execute("SELECT count(*) FROM updates").fetchone()[0])
        return kept + sum(self.archived().values())

    def archived(self) -> dict[str, int]:
        """How many updates of each device are archived; all of them are merged."""
        rows = self.db.execute("SELECT name, value FROM counts WHERE name GLOB ?", (f"{ARCHIVED}*",))
        return {name.removeprefix(ARCHIVED): value for name, value in rows}

    def schema(self) -> Schema:
        return Schema.parse(self.fact("schema"))

    def kinds(self) -> TensorKinds:
        """Of the model's tensors; by their names in a federation from before there were kinds."""
        text = self.fact(KINDS)
        if text is None:
            return TensorKinds.by_name(tensor.name for tensor in self.schema().tensors)
        return TensorKinds.loads(text)

    def vector(self, version: int) -> Vector:
        """The published vector of a version that is still kept; ConfigError says which are."""
        schema, newest = self.schema(), self.version
        row = self.db.execute(
            "SELECT segment, checksum, version FROM snapshots WHERE version <= ? ORDER BY version DESC LIMIT 1",
            (version,),
        ).fetchone()
        exists = self.db.execute("SELECT 1 FROM versions WHERE version = ?", (version,)).fetchone()
        if row is None or version > newest or not exists:
            (oldest,) = self.db.execute("SELECT min(version) FROM snapshots").fetchone()
            raise ConfigError(f"version {version} is not kept; kept are {oldest} to {newest}")
        vector = self.vectors.read(f"{row[0]}-model", row[1])
        for number, digest, block in self.deltas(schema, row[2], version):
            vector = block.apply(vector)
            self.check_digest(number, digest, vector_digest(vector))
        return vector

    def deltas(self, schema: Schema, after: int, last: int) -> Iterator[tuple[int, bytes, Block]]:
        """(version, digest, block that made it) of the versions after one, up to ``last``."""
        found = self.db.execute(
            "SELECT version, digest, codec, encoding, body, checksum FROM versions WHERE version > ? AND version <= ?"
            " ORDER BY version",
            (after, last),
        ).fetchall()
        for version, digest, codec, encoding, body, checksum in found:
            if not isinstance(body, bytes) or zlib.crc32(body) != checksum:
                raise self.corrupt(f"the delta of version {version} is damaged")
            yield version, digest, Block.read(schema, codec, encoding, body)

    def check_digest(self, version: int, expected: bytes, found: bytes) -> None:
        """Raise CorruptError where a version that was made again is not what it was."""
        if found != expected:
            raise self.corrupt(f"version {version} does not have its digest")

    def corrupt(self, what: str) -> CorruptError:
        return CorruptError(f"{self.path}: {what}; {self._remedy}")

    def server(self) -> tuple[int, ServerState]:
        """The version at which a start begins, and the server's state then."""
        version, segment, checksum = self.db.execute("SELECT version, segment, checksum FROM server").fetchone()
        content = self.vectors.read(f"{segment}-server", checksum)
        return version, ServerState(*content.reshape(-1, self.schema().elements))

    def body(self, segment: int, offset: int, size_bytes: int, checksum: int) -> bytes:
        """An accepted update's block as it came, where ``updates`` says that it is kept."""
        return self.bodies.read(Place(segment=segment, offset=offset, size_bytes=size_bytes, checksum=checksum))

    def last_entry(self) -> Signed:
        """The newest version's entry in the log of merges."""
        return self.entry(self.version)

    def entry(self, version: int) -> Signed:
        """A version's entry in the log of merges; CorruptError without one."""
        row = self.db.execute("SELECT entry FROM log WHERE version = ?", (version,)).fetchone()
        try:
            return unpack(b"" if row is None else row[0])
        except ProtocolError as error:
            raise self.corrupt(f"the log of merges lacks version {version}") from error

    def frame(self, topic: str) -> bytes:
        row = self.db.execute("SELECT payload, crc FROM frames WHERE topic = ?", (topic,)).fetchone()
        if row is None:
            return b""
        if row[1] != store_format.checksum(topic, row[0]):
            raise self.corrupt(f"the retained message of {topic} is damaged")
        return bytes(row[0])

    def open_requests(self) -> list[tuple[int, str, str]]:
        """(id, what, argument) of what commands have asked for, oldest first."""
        return self.db.execute("SELECT id, what, argument FROM requests WHERE done = 0 ORDER BY id").fetchall()


def _connect(path: Path, *, read_only: bool, untouched: bool) -> sqlite3.Connection:
    """SQLite cannot read a write-ahead log without its index, and cannot make that in a folder without write access.

    Where there is a log, a connection that may write moves it into the file when it ends; another one does not.
    """
    has_log = path.with_name(f"{path.name}-wal").exists()
    name = f"{path.absolute().as_uri()}?{'mode=ro' if has_log else 'immutable=1'}"
    if untouched or (read_only and not has_log and not os.access(path.parent, os.W_OK)):
        return sqlite3.connect(name, isolation_level=None, timeout=30.0, uri=True)
    return sqlite3.connect(path, isolation_level=None, timeout=30.0)


@contextmanager
def reading(directory: Path) -> Iterator[Ledger]:
    """A directory's ledger beside its writer, as it is at one moment; its rows are checked where reading them fails."""
    with closing(Ledger(directory / LEDGER, read_only=True)) as ledger, ledger.one_moment(), ledger.blaming_rows():
        yield ledger


@contextmanager
def blaming(directory: Path) -> Iterator[None]:
    """As `Ledger.blaming_rows`, for what is made of a ledger's rows once it is closed: most fail as they are shown."""
    try:
        yield
    except FAULTS:
        with reading(directory):
            raise


@contextmanager
def writing(directory: Path, beside: Executor | None = None) -> Iterator[Ledger]:
    """A directory's ledger to write; `naming` holds for all that is done with it."""
    with closing(Ledger(directory / LEDGER, beside=beside)) as ledger, ledger.naming():
        yield ledger
