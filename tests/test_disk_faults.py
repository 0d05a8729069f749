"""A disk that is full, fails or must not be written: what is raised, which file it names, how a command ends."""

import errno
import os
import re
import resource
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.small_disk import LIMITED, make_read_only
from support.small_world import BROKER_URL, LAB, Bench, Lazy, initial_model, ternary_block
from ternbus.aggregator.core import events, records
from ternbus.aggregator.shell import administration, backup
from ternbus.aggregator.store import copying
from ternbus.aggregator.store.bodies import Bodies
from ternbus.aggregator.store.ledger import LEDGER
from ternbus.broker import files, path_errors
from ternbus.broker.complaint import complaint
from ternbus.broker.errors import ConfigError, CorruptError, StorageError
from ternbus.broker.model_files import save_safetensors
from ternbus.broker.store_format import naming, unreadable

Raised = type[StorageError | ConfigError | CorruptError]


def sqlite_error(code: int) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("what SQLite says")
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    ("code", "raised", "exit_code"),
    [
        (sqlite3.SQLITE_FULL, StorageError, 1),
        (sqlite3.SQLITE_IOERR_READ, StorageError, 1),
        (sqlite3.SQLITE_IOERR_FSYNC, StorageError, 1),
        (sqlite3.SQLITE_READONLY, StorageError, 1),
        (sqlite3.SQLITE_CANTOPEN, StorageError, 1),  # as of a full disk: nothing is wrong with the permissions
        (sqlite3.SQLITE_BUSY, StorageError, 1),
        (sqlite3.SQLITE_CORRUPT, CorruptError, 2),
        (sqlite3.SQLITE_NOTADB, CorruptError, 2),
    ],
)
def test_what_sqlite_says_is_a_fault_of_the_disk_or_a_corrupt_store(
    tmp_path: Path, code: int, raised: Raised, exit_code: int
) -> None:
    path = tmp_path / "store.sqlite"
    path.touch()
    with pytest.raises(raised) as running, naming(path, "do this"):
        raise sqlite_error(code)
    for error in (running.value, unreadable(path, sqlite_error(code), "do this")):
        assert type(error) is raised
        assert f"{path}: what SQLite says" in str(error)
        assert ("do this" in str(error)) == (raised is CorruptError)
        assert complaint(error) == (str(error), exit_code)


def test_a_store_on_a_full_disk_says_so_and_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite says `disk I/O error` where it cannot make the file that it shares with other processes."""
    path, shared = tmp_path / "store.sqlite", sqlite_error(sqlite3.SQLITE_IOERR_SHMSIZE)
    assert path_errors.MAKE_ROOM not in str(unreadable(path, shared))
    assert str(unreadable(path, sqlite_error(sqlite3.SQLITE_FULL))).endswith(f"; {path_errors.MAKE_ROOM}")
    monkeypatch.setattr(files, "ROOM_BYTES", 1 << 62)
    assert str(unreadable(path, shared)).endswith(f"what SQLite says: the disk is full; {path_errors.MAKE_ROOM}")


def test_a_store_whose_disk_is_gone_keeps_what_sqlite_says(tmp_path: Path) -> None:
    """As of a drive that was pulled out: nothing can be asked of its folder."""
    path = tmp_path / "gone" / "store.sqlite"
    said = unreadable(path, sqlite_error(sqlite3.SQLITE_IOERR))
    assert (type(said), str(said)) == (StorageError, f"cannot read {path}: what SQLite says")


def test_a_model_that_does_not_fit_is_a_fault_of_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with no_file_larger_than(4000), pytest.raises(StorageError, match=f"^cannot write {path}: ") as raised:
        save_safetensors(path, {"w": np.zeros(10_000, np.float32)}, {})
    assert complaint(raised.value) == (str(raised.value), 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN])
def test_a_store_on_a_read_only_file_system_is_named_with_what_to_do(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_read_only(monkeypatch)
    said = str(unreadable(tmp_path / "store.sqlite", sqlite_error(code)))
    assert said.endswith(f"what SQLite says, since the file system is read-only; {path_errors.WRITABLE_AGAIN}")


def test_a_file_on_a_read_only_file_system_is_named_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=f"; {path_errors.WRITABLE_AGAIN}$"), files.storing(tmp_path / "lock"):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_an_error_of_sqlite_that_is_a_bug_stays_one_and_is_named_once(tmp_path: Path) -> None:
    path = tmp_path / "store.sqlite"
    said = rf"^{path}: what SQLite says$"
    with pytest.raises(sqlite3.OperationalError, match=said), naming(path), naming(path):
        raise sqlite_error(sqlite3.SQLITE_ERROR)


@pytest.mark.parametrize(
    ("number", "raised", "exit_code"),
    [
        (errno.ENOSPC, StorageError, 1),
        (errno.EIO, StorageError, 1),
        (errno.EROFS, StorageError, 1),
        (errno.EDQUOT, StorageError, 1),
        (errno.EACCES, ConfigError, 2),
        (errno.ENOENT, ConfigError, 2),
        (errno.ENOTDIR, ConfigError, 2),
    ],
)
def test_what_the_system_says_is_a_fault_of_the_disk_or_a_mistake(
    tmp_path: Path, number: int, raised: Raised, exit_code: int
) -> None:
    path = tmp_path / "file"
    verb = "write" if exit_code == 1 and number != errno.EIO else "use"
    said = f"cannot {verb} {path}: {os.strerror(number)}"
    with pytest.raises(raised, match=f"^{said}") as stored, files.storing(path):
        raise OSError(number, os.strerror(number))
    assert complaint(stored.value) == (str(stored.value), exit_code)
    with pytest.raises(OSError, match=os.strerror(number)) as named, files.naming(path):
        raise OSError(number, os.strerror(number))
    assert complaint(named.value) == (str(stored.value), exit_code)


def test_a_write_that_does_not_fit_is_named_and_taken_back(make: Callable[..., Bench]) -> None:
    bench = make()
    pages = bench.ledger.db.execute("PRAGMA page_count").fetchone()[0]
    bench.ledger.db.execute(f"PRAGMA max_page_count = {pages}")
    frames = tuple((f"topic/{number}", bytes(5000)) for number in range(20))
    with pytest.raises(StorageError, match=f"^{bench.directory / LEDGER}: database or disk is full"):
        bench.ledger.write([records.SeqReserved(upto=77), records.FramesRetained(frames=frames)])
    assert bench.ledger.fact("seq") != 77
    bench.ledger.db.execute("PRAGMA max_page_count = 100000")
    bench.send(bench.join("pi"), ternary_block(bench.schema, 1), 0)
    assert bench.ledger.db.execute("SELECT count(*) FROM updates").fetchone() == (1,)


def test_a_body_that_does_not_fit_names_its_file(tmp_path: Path) -> None:
    bodies = Bodies(tmp_path / "bodies", 1)
    bodies.append(b"one")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, bodies._descriptor or 0)
    os.close(full)
    named = f"^cannot write {tmp_path / 'bodies' / '1.bodies'}: No space left"
    with pytest.raises(StorageError, match=named):
        bodies.append(b"two")
    with ThreadPoolExecutor(1) as thread:
        bodies.append_ahead([b"two"], thread)
        with pytest.raises(StorageError, match=named):
            bodies.sync()
        bodies.append_ahead([b"two"], thread)
        bodies.close()  # who closes does not ask


@contextmanager
def no_file_larger_than(size_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_backup_that_does_not_fit_names_the_copy_s_file(make: Callable[..., Bench], tmp_path: Path) -> None:
    bench, out = make(), tmp_path / "out"
    bench.close()
    assert (bench.directory / LEDGER).stat().st_size > 2 * 40_000
    with no_file_larger_than(40_000), pytest.raises(StorageError, match=rf"^{out}/.*/{LEDGER}: ") as ledger:
        backup.backup(bench.directory, out, None, "test")
    assert complaint(ledger.value) == (str(ledger.value), 1)
    source = tmp_path / "source"
    source.write_bytes(bytes(1000))
    with no_file_larger_than(500), source.open("rb") as opened, pytest.raises(OSError, match="too large") as copied:
        copying.copy_file(opened, out / "copy")
    assert copied.value.filename == str(out / "copy")
    assert [path.name for path in out.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("room_bytes", [1000, 4096, 40_000])
def test_an_aggregator_that_does_not_fit_is_not_made_and_may_be_tried_again(tmp_path: Path, room_bytes: int) -> None:
    save_safetensors(tmp_path / "model.safetensors", initial_model(), {})
    init = ["aggregator", "init", str(tmp_path / "agg"), "--federation", LAB, "--broker", BROKER_URL, "--model"]
    command = [sys.executable, "-c", LIMITED, str(room_bytes), *init, str(tmp_path / "model.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("ternbus: ")
    assert done.stderr.count("\n") == 1
    assert str(tmp_path / "agg") in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_an_aggregator_whose_making_was_killed_may_be_made_again(tmp_path: Path) -> None:
    """In a folder that was there, the files are moved in one by one, the ledger last."""
    directory, model = tmp_path / "agg", {"w": np.zeros((3, 2), np.float32)}
    directory.mkdir()
    about: dict[str, Any] = {"federation": "lab", "broker": "mqtt://127.0.0.1:1", "model": model}
    administration.create(directory, **about)
    (directory / administration.PARTIAL).mkdir()
    for name in ("ledger.sqlite", "vectors"):
        (directory / name).rename(directory / administration.PARTIAL / name)
    administration.create(directory, **about)
    assert not (directory / administration.PARTIAL).exists()
    assert administration.load_settings(directory).federation == "lab"
    (directory / "ledger.sqlite").unlink()
    with pytest.raises(CorruptError, match=r"ledger.sqlite is missing: restore a backup"):  # its key is kept
        administration.create(directory, **about)


def test_files_are_written_where_an_error_names_them() -> None:
    root = Path(__file__).resolve().parent.parent
    nameless = re.compile(r"(?<!files)(?<!super\(\))\.(write_text|write_bytes)\(")  # help has a write_text, too
    found = {
        path.relative_to(root).as_posix()
        for component in ("broker", "aggregator", "edge_client", "lab")
        for path in (root / component / "ternbus").rglob("*.py")
        if nameless.search(path.read_text(encoding="utf-8"))
    }
    # the second runs alone, and goes on where it cannot write
    assert found == {"broker/ternbus/broker/files.py", "broker/ternbus/broker/server/refusals.py"}


def test_bodies_that_were_appended_ahead_are_appended_once_in_their_order(tmp_path: Path) -> None:
    """A merge takes as long as the disk: both go on beside each other, and two merges may follow in one turn."""
    first, second, third, equal = bytes([1]) * 10, bytes([2]) * 20, bytes([3]) * 30, bytearray([1]) * 10
    bodies, thread = Bodies(tmp_path / "bodies", 1), Lazy()
    bodies.append_ahead([first, second], thread)
    bodies.append_ahead([first, second, third], thread)
    places = [bodies.append(each) for each in (first, second, bytes(equal), third)]
    bodies.sync()
    assert [place.offset for place in places] == [0, 10, 60, 30]
    assert [bodies.read(place) for place in places] == [first, second, first, third]
    assert (tmp_path / "bodies" / "1.bodies").stat().st_size == 70
    bodies.close()


def test_as_a_merge_begins_the_shell_is_told_of_what_was_accepted(make: Callable[..., Bench]) -> None:
    bench = make(merge__buffer_size=1)
    pi, seen = bench.join("pi"), list[list[records.Record]]()

    def begins() -> None:
        seen.append([action.record for action in bench.core.taken if isinstance(action, events.Save)])

    bench.core.model.begins = begins
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    ((accepted,),) = seen
    assert isinstance(accepted, records.UpdateAccepted)
    assert bench.core.model.version == 1
