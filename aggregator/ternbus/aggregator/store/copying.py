"""A consistent copy of a ledger and its files, while a process goes on writing and removing."""

import os
import sqlite3
from contextlib import ExitStack, closing
from pathlib import Path
from typing import IO, Final

from ternbus.aggregator.store import control, merge_log, tags
from ternbus.aggregator.store.bodies import BODIES
from ternbus.aggregator.store.ledger import LEDGER, Ledger
from ternbus.aggregator.store.vectors import VECTORS
from ternbus.broker import files, store_format
from ternbus.broker.errors import CorruptError, StorageError
from ternbus.broker.path_errors import quoted

TRIES: Final = 20  # a running process may remove a file between the moment of the copy and the opening of it
CHUNK_BYTES: Final = 2**20
OF_THE_SOURCE: Final = {  # SQLite reports all that fails in a copy as of the new file
    *store_format.DAMAGED,
    *store_format.IN_USE,
    sqlite3.SQLITE_IOERR_READ,
    sqlite3.SQLITE_IOERR_SHORT_READ,
}


def copy(directory: Path, target: Path) -> int:
    """Copy into a folder that is there; everything is durable but the folder itself. Returns the copy's version.

    CorruptError where a file that the ledger names is not there, and no process is about to remove it.
    """
    for _ in range(TRIES):
        with closing(_open(directory)) as ledger, ledger.one_moment(), ExitStack() as opened:
            version = ledger.version  # the moment is that of the first read
            try:
                sources = {name: opened.enter_context((directory / name).open("rb")) for name in _named(ledger)}
            except FileNotFoundError as error:
                missing = error.filename
                continue
            _copy_ledger(ledger.db, target / LEDGER)
            for name, source in sources.items():  # what is open can be removed, and read all the same
                (target / name).parent.mkdir(mode=0o700, exist_ok=True)
                copy_file(source, target / name)
            for folder in (BODIES, VECTORS, merge_log.FOLDER, tags.FOLDER):
                if (target / folder).exists():
                    files.sync(target / folder)
            return version
    command = f"ternbus aggregator check {quoted(directory)}"
    raise CorruptError(f"{missing} is not there, though the ledger names it; run: {command}")


def _open(directory: Path) -> Ledger:
    """SQLite makes the index of a log even to read, for which a full disk has no room: without it if nobody writes."""
    path = directory / LEDGER
    try:
        return Ledger(path, read_only=True)
    except StorageError:
        log = path.with_name(f"{LEDGER}-wal")
        if files.is_locked(directory / control.LOCK) or (log.exists() and log.stat().st_size):
            raise
        log.unlink(missing_ok=True)  # which the attempt made, or an earlier one
        return Ledger(path, read_only=True, untouched=True)


def _named(ledger: Ledger) -> list[Path]:
    """The files that rows refer to, relative to the directory."""
    bodies = ledger.db.execute("SELECT DISTINCT segment FROM updates WHERE segment IS NOT NULL").fetchall()
    models = ledger.db.execute("SELECT segment FROM snapshots").fetchall()
    servers = ledger.db.execute("SELECT segment FROM server").fetchall()
    return [
        *(Path(BODIES, f"{segment}.bodies") for (segment,) in bodies),
        *(Path(VECTORS, f"{segment}-model.f32") for (segment,) in models),
        *(Path(VECTORS, f"{segment}-server.f32") for (segment,) in servers),
        *(archive.path.relative_to(ledger.path.parent) for archive in merge_log.archives(ledger)),
        *(tags.path(Path(), name) for name in tags.read(ledger)),
    ]


def _copy_ledger(source: sqlite3.Connection, target: Path) -> None:
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    with closing(sqlite3.connect(target)) as db:
        try:
            source.backup(db)
        except sqlite3.Error as error:
            if {error.sqlite_errorcode, error.sqlite_errorcode & 0xFF} & OF_THE_SOURCE:
                raise
            with store_format.naming(target):
                raise
    files.sync(target)


def copy_file(source: IO[bytes], target: Path) -> None:
    """Copy an open file into a new one, durably and for its owner only; an OSError names the file that it is of."""
    descriptor = os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    with files.naming(target), os.fdopen(descriptor, "wb") as copied:
        while chunk := _read(source):
            copied.write(chunk)
        copied.flush()
        os.fsync(copied.fileno())


def _read(source: IO[bytes]) -> bytes:
    with files.naming(Path(source.name)):
        return source.read(CHUNK_BYTES)
