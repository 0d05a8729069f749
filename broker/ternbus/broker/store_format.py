"""The format of a store in SQLite: an older one is migrated, after a copy, in one transaction; a newer one is refused.

Knows neither tables nor which formats there are: each store brings its own table of steps.
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

from ternbus.broker import files
from ternbus.broker.errors import ConfigError, CorruptError

NO_ACCESS: Final = {sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY}
DAMAGED: Final = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
EMPTY: Final = 0  # the format of a store in which nothing was made yet
_log = logging.getLogger(__name__)


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
        formats.advance(db, path.parent)
        db.execute("COMMIT")
    except BaseException as error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        shutil.rmtree(path.parent / f"format-{found}.partial", ignore_errors=True)
        if not isinstance(error, sqlite3.Error | OSError):
            raise
        what = f"make {path}" if found == EMPTY else f"migrate {path} from format {found} to {formats.newest}"
        raise ConfigError(f"cannot {what}: {_reason(error)}; nothing in it was changed") from error
    if copy is not None:
        _log.warning("%s: migrated from format %s to %d; as it was before: %s", path, found, formats.newest, copy)


def _reason(error: sqlite3.Error | OSError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def unreadable(path: Path, error: sqlite3.Error | UnicodeDecodeError) -> ConfigError | CorruptError:
    """That a store cannot be opened or read, why, and what to do."""
    code = _code(error)
    if code == sqlite3.SQLITE_BUSY:
        remedy = "another process uses it; stop that process or try again"
    elif code in NO_ACCESS and not path.is_dir():
        remedy = "check the permissions of the file and of its folder"
    else:
        return CorruptError(f"cannot read {path}: {error}; restore it from a backup")
    return ConfigError(f"cannot read {path}: {error}; {remedy}")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the store's path to SQLite's errors; CorruptError if the store is damaged."""
    try:
        yield
    except UnicodeDecodeError as error:  # of damaged text, which SQLite may quote in an error too
        raise unreadable(path, error) from error
    except sqlite3.Error as error:
        if _code(error) in DAMAGED:
            raise unreadable(path, error) from error
        raise type(error)(f"{path}: {error}") from error


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
