"""Files that Ternbus keeps: secrets and key files, writes that are whole or not at all, locks between processes."""

import fcntl
import os
import shlex
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from ternbus.broker import toml
from ternbus.broker.errors import ConfigError

KEY_BYTES: Final = 32  # an Ed25519 seed
CHUNK_BYTES: Final = 2**16
LOOK_EVERY_S: Final = 0.02  # at a lock that another process holds


def chunks(path: Path) -> Iterator[bytes]:
    """A file's content in pieces of at most ``CHUNK_BYTES``."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def load_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file that a user may have written; ConfigError names the file and what is wrong with it."""
    try:
        with path.open("rb") as file:
            content = file.read(toml.BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    return toml.loads(content, str(path))


@contextmanager
def replacing(path: Path, *, mode: int = 0o666, concurrent: bool = False) -> Iterator[Path]:
    """An empty file to write, which takes the place of ``path`` when the block ends and is on stable storage then.

    If the block raises, ``path`` stays as it was. ``mode`` is that of the new file, less the umask. What a crash
    leaves behind is overwritten by the next attempt; with ``concurrent``, for a file that several processes may
    write at once, by the next one of the same process id.
    """
    partial = path.with_name(f"{path.name}.partial{f'-{os.getpid()}' if concurrent else ''}")
    partial.unlink(missing_ok=True)  # it may have another mode
    os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Make a file's content durable, or the names in a folder, which no file's own fsync does."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_secret(path: Path, secret: bytes) -> None:
    """Write a file that only its owner can read, whole or not at all, and on stable storage when this returns."""
    with replacing(path, mode=0o600) as partial:
        partial.write_bytes(secret)


def is_exposed(path: Path) -> bool:
    """Whether others on this machine can do anything with a file; OSError where there is none."""
    return bool(stat.S_IMODE(path.stat().st_mode) & 0o077)


def check_secret(path: Path) -> Path:
    """Return the path of a secret; refuse one that others on this machine can read, with the command that mends it."""
    try:
        exposed = is_exposed(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if exposed:
        raise ConfigError(f"{path} holds a secret that other users can read; run: chmod 600 {shlex.quote(str(path))}")
    return path


def read_secret(path: Path) -> bytes:
    """Read a secret that only its owner can read, else ConfigError."""
    try:
        return check_secret(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def read_password(path: Path) -> str:
    """The first line of a password file, mode 0600; ConfigError where there is none."""
    password = read_secret(path).decode("utf-8", "replace").partition("\n")[0].rstrip("\r")
    if not password:
        raise ConfigError(f"{path} has no password in its first line")
    return password


def write_key(path: Path, seed: bytes) -> None:
    """Write a key file: the 32-byte seed of an Ed25519 key as 64 hex digits, mode 0600."""
    write_secret(path, seed.hex().encode("ascii") + b"\n")


def read_key(path: Path) -> bytes:
    """The seed in a key file that ``write_key`` wrote; ConfigError where it is none."""
    try:
        seed = bytes.fromhex(read_secret(path).decode("ascii").strip())
    except ValueError:
        seed = b""
    if len(seed) != KEY_BYTES:
        raise ConfigError(f"{path} is not a key file (64 hex digits); restore it from a backup")
    return seed


def lock(path: Path, *, patience_s: float = 0.0) -> IO[bytes] | None:
    """Open a file, mode 0600 if it is new, and lock it; None where another process still has it after ``patience_s``.

    The lock holds until every process that has inherited the file has closed it. OSError where it cannot be opened.
    """
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
    deadline = time.monotonic() + patience_s
    while not _try_lock(file, fcntl.LOCK_EX):
        if time.monotonic() >= deadline:
            file.close()
            return None
        time.sleep(LOOK_EVERY_S)
    return file


def is_locked(path: Path) -> bool:
    """Whether a process holds a lock on this file now; False where there is no file.

    It looks with a shared lock, so that a ``lock`` without patience may fail at this moment.
    """
    try:
        file = path.open("r+b")
    except FileNotFoundError:
        return False
    with file:
        return not _try_lock(file, fcntl.LOCK_SH)


def _try_lock(file: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
