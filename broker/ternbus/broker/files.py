"""Files on disk: secrets, key files, atomic durable writes, and locks between processes."""

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, Final

from ternbus.broker import toml
from ternbus.broker.crash_points import reached
from ternbus.broker.errors import WRONG_PATH, ConfigError, StorageError
from ternbus.broker.path_errors import quoted, sentence

KEY_BYTES: Final = 32  # an Ed25519 seed
CHUNK_BYTES: Final = 2**16
LOOK_EVERY_S: Final = 0.02  # between attempts to take a lock
ROOM_BYTES: Final = 1 << 16  # SQLite's smallest file beside a store has half of that


def chunks(path: Path) -> Iterator[bytes]:
    """A file's content in pieces of at most ``CHUNK_BYTES``."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def digest(path: Path) -> bytes:
    """The BLAKE2b-256 of a file."""
    state = blake2b(digest_size=32)
    for chunk in chunks(path):
        state.update(chunk)
    return state.digest()


def load_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file; ConfigError, with the file's name, if it cannot be read or parsed."""
    try:
        with path.open("rb") as file:
            content = file.read(toml.BYTES_MAX + 1)
    except OSError as error:
        raise fault(error, path, "cannot read ") from error
    return toml.loads(content, str(path))


@contextmanager
def replacing(path: Path, *, mode: int = 0o666, concurrent: bool = False) -> Iterator[Path]:
    """Yield an empty file to write, which replaces ``path`` atomically and durably at the end of the block.

    If the block raises, ``path`` does not change. ``mode`` is the mode of the new file, less the umask. Set
    ``concurrent`` if several processes may write ``path`` at the same time. The next call removes a partial file that
    a crash left behind; with ``concurrent``, the next call from a process with the same id.
    """
    if path.is_dir():  # "", "." and "/" too, which have no name to add to
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    partial = path.with_name(f"{path.name}.partial{f'-{os.getpid()}' if concurrent else ''}")
    with naming(path, instead_of=partial):
        partial.unlink(missing_ok=True)  # a file left by a crash may have another mode
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
        try:
            yield partial
            reached("file-written")
            inherit_owner(partial)
            sync(partial)
            reached("file-synced")
            partial.replace(path)
            reached("file-renamed")
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    sync(path.parent)


@contextmanager
def naming(path: Path, *, instead_of: Path | None = None) -> Iterator[None]:
    """Add the file's name to an OSError without one: a full disk shows at a write, which knows a number only.

    An error of ``instead_of``, a file that the user does not know of, names ``path`` too, unless a folder is there.
    """
    try:
        yield
    except OSError as error:
        unknown = instead_of is not None and error.filename == str(instead_of) and error.errno != errno.EISDIR
        if error.filename is None or unknown:
            error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """`fault` in place of an OSError, with the name of the file or folder that is worked on."""
    try:
        yield
    except OSError as error:
        raise fault(error, path) from error


def fault(error: OSError, path: Path, what: str = "") -> ConfigError | StorageError:
    """Why a path could not be used: ConfigError where the path or its permissions are wrong, else StorageError.

    The text begins with ``what`` could not be done; it names the file, or ``path`` where the error names none.
    """
    text = sentence(error, path, what)
    return ConfigError(text) if error.errno in WRONG_PATH else StorageError(text)


def is_read_only(path: Path) -> bool:
    """Whether the file system of a file or folder is mounted for reading only, as a failing disk ends up."""
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def is_full(folder: Path) -> bool:
    """Whether the folder's file system has no room for a small file; not where it is gone, or does not answer."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize < ROOM_BYTES


def sync(path: Path) -> None:
    """Write a file's content, or a folder's entries, to stable storage; a file's fsync does not cover its folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def expanded(path: Path) -> Path:
    """The path with the home folder instead of `~`; unchanged if there is no such user."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 - Path.expanduser raises RuntimeError


def check_readable(path: Path, what: str) -> None:
    """Raises `ConfigError`, which names ``what`` the path is, if nothing is there or this user cannot read it."""
    if not path.exists():
        raise ConfigError(f"{what}: {path} does not exist; correct the path")
    if not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise ConfigError(f"{what}: this user cannot read {path}; check its permissions")


def write_text(path: Path, text: str) -> None:
    """Write a text file, in UTF-8; an OSError names it. ConfigError for a text with a file name that is no text."""
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:  # a lone surrogate: Python's form of an undecodable byte in a file name
        around = text[max(0, error.start - 40) : error.end + 20]
        raise ConfigError(f"{path} cannot hold {around!r}, which is not UTF-8: rename the file or folder") from error
    with naming(path):
        path.write_bytes(encoded)
        inherit_owner(path)


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make a folder, and those above it, where they do not exist."""
    missing = [each for each in (path, *path.absolute().parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True, mode=mode)
    for each in reversed(missing):
        inherit_owner(each)


def inherit_owner(path: Path) -> None:
    """Under root, give what was made to the owner of its folder, who could not use it otherwise."""
    give_to_owner_of(path.parent, path)


def give_to_owner_of(other: Path, path: Path) -> None:
    """Under root, give ``path`` to the owner of ``other``."""
    if os.geteuid() == 0:
        owner = other.stat()
        os.chown(path, owner.st_uid, owner.st_gid)


def write_secret(path: Path, secret: bytes) -> None:
    """Write a file with mode 0600 atomically and durably."""
    with replacing(path, mode=0o600) as partial:
        partial.write_bytes(secret)


def is_exposed(path: Path) -> bool:
    """Whether other users of this machine can read or change a secret; OSError if there is no such file.

    A group that may only read was chosen where nobody may write (0440, as in Kubernetes), or the file is another
    user's: a umask makes our own 0640 by chance. Where the file system is read-only here, nobody can change the mode:
    a secret of Docker is there for everybody in the container.
    """
    found = path.stat()
    is_chosen = not found.st_mode & 0o222 or not _can_close(found)
    return bool(found.st_mode & (0o037 if is_chosen else 0o077)) and not is_read_only(path)


def closing(path: Path) -> str:
    """The command that closes a secret to other users, and leaves it to this one."""
    taken = "" if _can_close(path.stat()) else f"sudo chown {os.geteuid()} {quoted(path)} && sudo "
    return f"{taken}chmod 600 {quoted(path)}"


def _can_close(found: os.stat_result) -> bool:
    return os.geteuid() in {0, found.st_uid}


def check_secret(path: Path) -> Path:
    """Return the path of a secret; ConfigError, with the command that corrects it, if other users can read it."""
    try:
        exposed = is_exposed(path)
    except OSError as error:
        raise fault(error, path, "cannot read ") from error
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: give the path of a file that holds the secret")
    if exposed:
        raise ConfigError(f"{path} holds a secret that other users can read; run: {closing(path)}")
    return path


def read_secret(path: Path) -> bytes:
    """The content of a secret; ConfigError if it cannot be read, or if other users can read it."""
    try:
        return check_secret(path).read_bytes()
    except OSError as error:
        raise fault(error, path, "cannot read ") from error


def read_password(path: Path) -> str:
    """The password in the first line of a secret file; ConfigError if that line is empty, or no UTF-8."""
    try:
        password = read_secret(path).partition(b"\n")[0].decode().rstrip("\r")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} has a password that is not UTF-8; save the file as UTF-8 text") from error
    if not password:
        raise ConfigError(f"{path} has no password in its first line; write the password there")
    return password


def write_key(path: Path, seed: bytes) -> None:
    """Write a key file: the 32-byte seed of an Ed25519 key as 64 hex digits, mode 0600."""
    write_secret(path, seed.hex().encode("ascii") + b"\n")


def read_key(path: Path) -> bytes:
    """The 32-byte seed in a key file of ``write_key``; ConfigError if the file is not one."""
    try:
        seed = bytes.fromhex(read_secret(path).decode("ascii").strip())
    except ValueError:
        seed = b""
    except ConfigError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise ConfigError(f"{error}; restore it from a backup") from error
        raise
    if len(seed) != KEY_BYTES:
        raise ConfigError(f"{path} is not a key file (64 hex digits); restore it from a backup")
    return seed


def lock(path: Path, *, patience_s: float = 0.0) -> IO[bytes] | None:
    """Open a file, with mode 0600 if it is new, and lock it; None if another process holds the lock for ``patience_s``.

    The lock holds until every process that inherited the file has closed it. OSError if the file cannot be opened.
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
    """Whether a process holds a lock on this file now; False if there is no file.

    The test takes a shared lock for a moment, in which a ``lock`` without patience fails.
    """
    try:
        file = path.open("rb")  # not to write: a folder to read only has its status too
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
