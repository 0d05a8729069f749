"""The format of a store in SQLite: an older one is migrated, after a copy, in one transaction; a newer one is refused.

Knows neither tables nor which formats there are: each store brings its own table of steps. Rows have checksums, since
SQLite's pages have none, so that a bit that flips on disk goes unseen.
"""

import logging
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from zlib import crc32

import msgpack

from ternbus.broker import files, path_errors
from ternbus.broker.crash_points import reached
from ternbus.broker.errors import ConfigError, CorruptError, FederationError, StorageError

NO_ACCESS: Final = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY}
IN_USE: Final = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
FAULTS: Final = {*NO_ACCESS, *IN_USE, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PROTOCOL}
DAMAGED: Final = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
RESTORE: Final = "restore it from a backup"
EMPTY: Final = 0  # the format of a store in which nothing was made yet
_PACKER: Final = msgpack.Packer(unicode_errors="surrogateescape")  # what is no UTF-8 is damaged, and is to be named
_log = logging.getLogger(__name__)


def checksum(*values: object) -> int:
    """The CRC-32 of a row's values as SQLite gives them back: int, float, str, bytes or None."""
    return crc32(_PACKER.pack(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """How a store gets from one format to the next that there is."""

    to: int
    change: Callable[[sqlite3.Connection, Path], None]  # within a transaction; the folder is the store's


@dataclass(frozen=True, slots=True, kw_only=True)
class Formats:
    """The formats that one kind of store has had."""

    newest: int
    steps: Mapping[object, Step]  # by the format that each begins with
    read: Callable[[sqlite3.Connection], object]
    write: Callable[[sqlite3.Connection, int], None]
    beside: tuple[str, ...] = ()  # folders with files that rows refer to

    def refusal(self, path: Path, found: object, older: str = "") -> ConfigError | CorruptError:
        """Why a store of another format than the newest cannot be used; ``older`` is what to do about an older one."""
        text = f"{path} has format {found}; this version of Ternbus reads {self.newest}"
        if found in self.steps:
            return ConfigError(f"{text}: {older}")
        if isinstance(found, int) and found > self.newest:
            return ConfigError(f"{text}: install a newer Ternbus")
        return CorruptError(f"{text}: no version of Ternbus wrote such a file; restore it from a backup")

    def advance(self, db: sqlite3.Connection, folder: Path) -> None:
        """Take every step that is left; the caller has begun a transaction, and ends it."""
        while (found := self.read(db)) != self.newest:
            step = self.steps[found]
            step.change(db, folder)
            self.write(db, step.to)


def migrate(db: sqlite3.Connection, path: Path, formats: Formats) -> None:
    """Bring a store that nobody else writes to the newest format, or leave it as it is.

    ``db`` is in autocommit mode. The store as it was before is in the folder ``format-N`` beside it.
    ConfigError where its format is not known, or where it cannot be migrated.
    """
    found = formats.read(db)
    if found == formats.newest:
        return
    if found not in formats.steps:
        raise formats.refusal(path, found)
    try:
        db.execute("BEGIN IMMEDIATE")
        copy = None if found == EMPTY else _copy(path, path.parent / f"format-{found}", formats.beside)
        reached("format-copied")
        formats.advance(db, path.parent)
        reached("format-changed")
        db.execute("COMMIT")
        reached("format-committed")
    except BaseException as error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        shutil.rmtree(path.parent / f"format-{found}.partial", ignore_errors=True)
        fault = error if isinstance(error, FederationError) else _reason(path, error)
        if fault is None:
            raise
        what = f"make {path}" if found == EMPTY else f"migrate {path} from format {found} to {formats.newest}"
        raise type(fault)(f"cannot {what}: {fault}; nothing in it was changed") from error
    if copy is not None:
        _log.warning("%s: migrated from format %s to %d; as it was before: %s", path, found, formats.newest, copy)


def _reason(path: Path, error: BaseException) -> FederationError | None:
    """Why a migration failed; None for a bug."""
    if isinstance(error, OSError):
        return files.fault(error, path)
    if isinstance(error, sqlite3.Error):
        return _fault(path, error, str(error)) or ConfigError(str(error))
    return None


def unreadable(path: Path, error: sqlite3.Error | UnicodeDecodeError, remedy: str = RESTORE) -> FederationError:
    """Why a store cannot be opened, and what to do; ``remedy`` is for one that is damaged, or is none."""
    text = f"cannot read {path}: {error}"
    fault = _fault(path, error, text) if isinstance(error, sqlite3.Error) else None
    return fault or CorruptError(f"{text}; {remedy}")


@contextmanager
def opening(path: Path, connect: Callable[[], sqlite3.Connection], remedy: str) -> Iterator[sqlite3.Connection]:
    """A connection to a store, which is closed again where what opens it fails; errors are those of ``unreadable``."""
    db = None
    try:
        db = connect()
        yield db
    except BaseException as error:
        if db is not None:
            db.close()
        if isinstance(error, sqlite3.DatabaseError | UnicodeDecodeError):
            raise unreadable(path, error, remedy) from error
        raise


@contextmanager
def naming(path: Path, remedy: str = RESTORE) -> Iterator[None]:
    """CorruptError, StorageError or ConfigError, with the store's path, in place of SQLite's errors.

    ``remedy`` is for a store that is damaged. Any other error is a bug, and stays SQLite's.
    """
    try:
        yield
    except UnicodeDecodeError as error:  # of damaged text, which SQLite may quote in an error too
        raise unreadable(path, error, remedy) from error
    except sqlite3.Error as error:
        if _code(error) in DAMAGED:
            raise unreadable(path, error, remedy) from error
        if str(path) in str(error):  # named within already
            raise
        raise _fault(path, error, f"{path}: {error}") or type(error)(f"{path}: {error}") from error


def _fault(path: Path, error: sqlite3.Error, text: str) -> StorageError | ConfigError | None:
    """What the disk, or the permissions on it, did not allow; None where SQLite's error says neither."""
    code = _code(error)
    if code in IN_USE:
        return StorageError(f"{text}; another process uses it; stop that process or try again")
    if code in NO_ACCESS and path.is_dir():
        return None
    if code in NO_ACCESS and files.is_read_only(path.parent):
        return StorageError(f"{text}, since the file system is read-only; {path_errors.WRITABLE_AGAIN}")
    if code in NO_ACCESS and not _is_permitted(path):
        return ConfigError(f"{text}; check the permissions of the file and of its folder")
    if code == sqlite3.SQLITE_FULL:
        return StorageError(f"{text}; {path_errors.MAKE_ROOM}")
    if code == sqlite3.SQLITE_IOERR and files.is_full(path.parent):  # as where it cannot make its `-shm` file
        return StorageError(f"{text}: the disk is full; {path_errors.MAKE_ROOM}")
    return StorageError(text) if code in FAULTS else None


def _is_permitted(path: Path) -> bool:
    """Whether this user may write the file and its folder."""
    return all(os.access(each, os.W_OK) for each in (path, path.parent) if each.exists())


def _code(error: Exception) -> int:
    """SQLite's primary result code; 0 for an error of Python's module."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF


def copies(folder: Path) -> list[Path]:
    """The folders in which migrations left stores as they were before."""
    return sorted(folder.glob("format-[0-9]*"))


def _copy(path: Path, kept: Path, beside: tuple[str, ...]) -> Path:
    """A folder, whole and durable, with the store as it is now and the files that its rows refer to."""
    partial = kept.with_name(f"{kept.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    copy = partial / path.name
    os.close(os.open(copy, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    files.sync(copy)
    for name in beside:
        if (path.parent / name).exists():
            shutil.copytree(path.parent / name, partial / name, copy_function=_link)
            files.sync(partial / name)
    files.sync(partial)
    shutil.rmtree(kept, ignore_errors=True)  # of an attempt that was cut short
    partial.rename(kept)
    files.sync(path.parent)
    return kept


def _link(source: str, target: str) -> None:
    """Another name for a file, which keeps it when the store removes it; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        files.sync(Path(target))
