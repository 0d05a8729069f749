"""A store that is migrated is the old one or the new one, wherever the process is killed or the disk is full."""

import hashlib
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from support.old_formats import FIXTURES, LEDGER, copy_of, dump, expected, expected_aggregator, opened
from ternbus.aggregator.shell import administration
from ternbus.aggregator.store.schema import FORMAT
from ternbus.broker.errors import ConfigError, StorageError
from ternbus.edge.shell.directory import DeviceDirectory
from ternbus.edge.store import outbox, outbox_format
from ternbus.edge.store.outbox import Outbox

DYING = """
import os, shutil, sqlite3, sys, tempfile
from functools import partial
from pathlib import Path

PREPARE
source, folder, done = Path(sys.argv[1]), Path(sys.argv[2]), 0


class Dying(sqlite3.Connection):
    left = 0

    def execute(self, *arguments):
        Dying.left -= 1
        if Dying.left == 0:
            os.kill(os.getpid(), 9)
        return super().execute(*arguments)

    def executemany(self, *arguments):
        Dying.left -= 1
        if Dying.left == 0:
            os.kill(os.getpid(), 9)
        return super().executemany(*arguments)


while True:
    done += 1
    copy = folder / str(done)
    shutil.copytree(source, copy)
    child = os.fork()
    if child == 0:
        Dying.left = done
        sqlite3.connect = partial(sqlite3.connect, factory=Dying)
        migrate(copy)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        shutil.rmtree(copy)
        break
print(done - 1)
"""


def killed_at_each_statement(prepare: str, source: Path, folder: Path) -> list[Path]:
    """Copies of a folder in which a process was killed while it migrated, before one statement more in each."""
    folder.mkdir()
    script = [sys.executable, "-c", DYING.replace("PREPARE", prepare), str(source), str(folder)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return [folder / str(number) for number in range(1, int(done.stdout) + 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("aggregator-1-blobs", marks=pytest.mark.extended),
        pytest.param("aggregator-1-bodies", marks=pytest.mark.extended),
        "aggregator-1-checksums-momentum",
    ],
)
def test_a_ledger_is_the_old_one_or_the_new_one_wherever_its_migration_is_killed(name: str, tmp_path: Path) -> None:
    home, want = copy_of(name, tmp_path) / "home", expected_aggregator(name)
    before, formats = dump(home / LEDGER), set()
    prepare = (
        "from ternbus.aggregator.store import migration\ndef migrate(home): migration.migrate(home / 'ledger.sqlite')"
    )
    copies = killed_at_each_statement(prepare, home, tmp_path / "killed")
    assert len(copies) > 40
    for copy in copies:
        with closing(sqlite3.connect(copy / LEDGER)) as db:
            ((found,),) = db.execute("SELECT value FROM facts WHERE name = 'format'").fetchall()
        formats.add(found)
        if found == 1:
            assert dump(copy / LEDGER) == before
        with closing(opened(copy)) as ledger:  # the next start goes on
            core = administration.open_core(copy, ledger, "test")
        assert core.model.merge().digest.hex() == want["merged_now"]["digest"]
        assert dump(copy / "format-1" / LEDGER) == before
    assert formats == {1}  # the last statement is the commit; what follows it is one line on stderr


def test_a_device_s_store_is_the_old_one_or_the_new_one_wherever_its_migration_is_killed(tmp_path: Path) -> None:
    folder, want = copy_of("edge-first", tmp_path) / "device", expected("edge-first")
    before = dump(folder / outbox.FILE)
    prepare = (
        "from ternbus.edge.store import outbox\n"
        "from ternbus.broker.protocol.identity import KeyId\n"
        "def migrate(folder):\n"
        "    with outbox.Outbox(folder, KeyId(bytes(8))): pass"
    )
    copies = killed_at_each_statement(prepare, folder, tmp_path / "killed")
    formats = set()
    for copy in copies:
        with closing(sqlite3.connect(copy / outbox.FILE)) as db:
            (found,) = db.execute("PRAGMA user_version").fetchone()
        formats.add(found)
        if found == 0:
            assert dump(copy / outbox.FILE) == before
        with Outbox(copy, DeviceDirectory(copy).identity().key_id) as store:
            assert store.state.outstanding is not None
            assert hashlib.sha256(store.state.outstanding.body).hexdigest() == want["outstanding"]["body_sha256"]
        assert dump(copy / "format-1" / outbox.FILE) == before
    assert formats == {0, outbox_format.FORMAT}


FULL = """
import resource, signal, sys
from pathlib import Path
from ternbus.command import main

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
main(sys.argv[2:])
"""


def with_room_for(size_bytes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command where no file can be larger, beside the fixtures' task."""
    words = [sys.executable, "-c", FULL, str(size_bytes), *map(str, arguments)]
    return subprocess.run(words, cwd=FIXTURES, capture_output=True, text=True, timeout=60, check=False)


def test_a_disk_without_room_leaves_the_old_ledger_and_is_named(tmp_path: Path) -> None:
    home = copy_of("aggregator-1-blobs", tmp_path) / "home"
    before = dump(home / LEDGER)
    done = with_room_for((home / LEDGER).stat().st_size - 2048, "aggregator", "pause", home)
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(f"ternbus: cannot migrate {home / LEDGER} from format 1 to {FORMAT}: ")
    assert done.stderr.endswith("nothing in it was changed\n")
    assert dump(home / LEDGER) == before
    assert not list(home.glob("format-*"))


def test_a_failure_in_the_middle_of_a_migration_leaves_the_old_ledger_and_is_named(tmp_path: Path) -> None:
    home, want = copy_of("aggregator-1-bodies", tmp_path) / "home", expected_aggregator("aggregator-1-bodies")
    before = dump(home / LEDGER)
    in_the_way = home / "vectors" / "6-server.f32"
    in_the_way.mkdir(parents=True)
    said = f"cannot migrate {home / LEDGER} from format 1 to {FORMAT}: cannot use {in_the_way}: it is a folder"
    with pytest.raises(ConfigError, match=f"{re.escape(said)}.*; nothing in it was changed"):
        opened(home)
    assert dump(home / LEDGER) == before
    in_the_way.rmdir()
    with closing(opened(home)) as ledger:
        core = administration.open_core(home, ledger, "test")
    assert core.model.merge().digest.hex() == want["merged_now"]["digest"]


def test_a_disk_without_room_leaves_the_old_store_of_a_device_and_is_named(tmp_path: Path) -> None:
    folder = copy_of("edge-first", tmp_path) / "device"
    with closing(sqlite3.connect(folder / outbox.FILE, isolation_level=None)) as db:
        db.execute("INSERT INTO counters VALUES (?, 1)", ("x" * 50_000,))
    before = dump(folder / outbox.FILE)
    done = with_room_for(40_000, "edge", "run", folder, "--timeout", 0)
    assert done.returncode == 1, done.stderr
    assert f"cannot migrate {folder / outbox.FILE} from format 1 to {outbox_format.FORMAT}: " in done.stderr
    assert dump(folder / outbox.FILE) == before


def test_a_disk_without_room_for_what_a_device_saves_is_named(tmp_path: Path) -> None:
    folder = copy_of("edge-account", tmp_path) / "device"
    with Outbox(folder, DeviceDirectory(folder).identity().key_id) as store:
        store._db.execute("PRAGMA max_page_count = 1")  # as large as it is
        with pytest.raises(StorageError, match=re.escape(f"{folder / outbox.FILE}: database or disk is full")):
            store.save(store.state, None, {f"counter {number}": number for number in range(10_000)})
