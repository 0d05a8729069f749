"""`ternbus aggregator repair`: a damaged folder goes on from its last sound version, and names what it lost."""

import json
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from support.small_world import Bench, Device, float32_block, follow, make_directory, ternary_block
from ternbus.aggregator.core import events
from ternbus.aggregator.shell import log, repairing
from ternbus.aggregator.shell.checking import check
from ternbus.aggregator.shell.cli import app
from ternbus.aggregator.store import control
from ternbus.aggregator.store.ledger import LEDGER
from ternbus.broker import files
from ternbus.broker.errors import ConfigError, CorruptError
from ternbus.broker.protocol.messages import RESTORE_LEAP

FLIPS = 60
SEED = 20_260_401


class World:
    """A folder with six versions, two snapshots, an update that waits, and its devices."""

    def __init__(self, directory: Path, **settings: object) -> None:
        self.bench = Bench(make_directory(directory, merge__buffer_size=2, downlink__slots=8, **settings))
        self.devices = [self.bench.join(name) for name in ("pi", "other")]
        gone = self.bench.join("gone")
        for number in range(6):
            merge(self.bench, self.devices, number)
        self.bench.send(self.devices[0], float32_block(self.bench.schema, 99), self.bench.version)
        self.bench.revoke(gone.name)
        self.bench.invite("guest")
        self.bench.close()
        self.home = directory


def repair(home: Path) -> repairing.Repaired:
    """At a time of day before any clock's, so that numbers go up by the least."""
    return repairing.repair(home, clock_s=0.0)


def merge(bench: Bench, devices: list[Device], seed: int) -> None:
    for device in devices:
        bench.send(device, float32_block(bench.schema, seed), bench.version)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("whole") / "agg", optimizer__name="fedavgm")


@pytest.fixture
def home(whole: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole.home, tmp_path / "agg"))


def execute(home: Path, statement: str) -> None:
    with closing(sqlite3.connect(home / LEDGER, isolation_level=None)) as db:
        assert db.execute(statement).rowcount


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def goes_on(home: Path, devices: list[Device]) -> Bench:
    """The federation makes another version, devices can follow it, and the folder is sound."""
    bench = Bench(home)
    bench.start()
    bench.tick(seconds=10.0)
    version = bench.version
    merge(bench, devices, 1)
    merge(bench, devices, 2)
    assert bench.version > version
    assert follow(bench.retained, bench.identity.public) == (bench.version, bench.core.model.digest)
    bench.close()
    assert check(home).faults == ()
    return bench


def test_a_sound_folder_is_left_as_it_is(home: Path) -> None:
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file() and path.name != control.LOCK}
    done = CliRunner().invoke(app, ["repair", str(home)])
    assert (done.exit_code, "is sound at version 6: nothing was changed" in done.output) == (0, True)
    assert {path: path.read_bytes() for path in before} == before
    assert not list(home.glob("damaged-*"))


@pytest.mark.parametrize("damage", ["flip", "lose"])
def test_a_damaged_snapshot_is_made_anew_and_nothing_is_lost(whole: World, home: Path, damage: str) -> None:
    with closing(sqlite3.connect(home / LEDGER)) as db:
        ((segment,),) = db.execute("SELECT segment FROM snapshots ORDER BY version DESC LIMIT 1").fetchall()
    path = home / "vectors" / f"{segment}-model.f32"
    before = path.read_bytes()
    path.unlink() if damage == "lose" else flip(path, 100)
    done = repair(home)
    assert (done.version, done.lost) == (6, ())
    assert "was made anew, from the one before and the deltas" in done.done[0]
    assert (path.read_bytes(), done.aside is not None) == (before, True)
    goes_on(home, whole.devices)


def test_a_damaged_server_state_begins_anew_from_the_newest_version(whole: World, home: Path) -> None:
    path = home / "vectors" / f"{server_segment(home)}-server.f32"
    flip(path, 50)
    digest = Bench(whole.home).core.model.digest
    done = repair(home)
    assert (done.version, done.lost) == (6 + RESTORE_LEAP, ())
    bench = Bench(home)
    assert (bench.core.model.digest, len(bench.core.model.buffer)) == (digest, 1)
    bench.close()
    goes_on(home, whole.devices)


def newest_bodies(home: Path) -> Path:
    return max((home / "bodies").iterdir(), key=lambda path: int(path.stem))


def server_segment(home: Path) -> int:
    with closing(sqlite3.connect(home / LEDGER)) as db:
        return int(db.execute("SELECT segment FROM server").fetchone()[0])


LOSSES: dict[str, tuple[Callable[[Path], object], str]] = {
    "the newest delta": (
        lambda home: execute(home, "UPDATE versions SET body = x'00' WHERE version = 6"),
        "version 6, of 2 updates",
    ),
    "a device": (lambda home: execute(home, "UPDATE devices SET public = x'00' WHERE name = 'pi'"), "devices pi"),
    "a key": (lambda home: execute(home, "UPDATE keys SET seq = 7 WHERE device = 'pi'"), "keys pi"),
    "a merged update": (lambda home: execute(home, "UPDATE updates SET samples = 1 WHERE id = 3"), "updates 3"),
    "the number of the last message": (
        lambda home: execute(home, "UPDATE facts SET value = 1 WHERE name = 'seq'"),
        "facts seq",
    ),
    "the session": (lambda home: execute(home, "DELETE FROM facts WHERE name = 'session'"), "session"),
    "the parts of the snapshot": (
        lambda home: execute(home, "UPDATE facts SET value = '[6, 3000000000, 1, 0]' WHERE name = 'snapshot'"),
        "facts snapshot",
    ),
    "the place of the snapshot": (
        lambda home: execute(home, f"UPDATE facts SET value = '{'[' * 5000}' WHERE name = 'snapshot'"),
        "facts snapshot",
    ),
    "the log": (lambda home: execute(home, "UPDATE log SET entry = x'00' WHERE version = 2"), "the log of merges"),
    "the body that waits": (
        lambda home: flip(newest_bodies(home), newest_bodies(home).stat().st_size - 9),
        "update 13 of pi on version 6, which was accepted",
    ),
    "an index": (lambda home: execute_script(home, "DROP INDEX updates_by_version"), ""),
}


def test_a_delta_that_no_device_could_be_given_again_is_found_and_made_needless(whole: World, home: Path) -> None:
    execute(home, "DELETE FROM frames WHERE topic LIKE '%/delta/6/0'")
    (fault,) = check(home).faults
    assert fault.endswith("/all/delta/6/0, of version 6, is lost")
    done = repair(home)
    assert (done.version, done.lost) == (6 + RESTORE_LEAP, ())
    goes_on(home, whole.devices)


def test_numbers_that_are_damaged_are_named_and_mended(whole: World, home: Path) -> None:
    """No slot, from which nothing can be computed, or a head of which no end of deltas would lead."""
    for change in ("value = 0 WHERE name = 'slots'", "value = 9000000000000 WHERE name = 'version'"):
        copy = Path(shutil.copytree(home, home.with_name(f"copy-{len(change)}")))
        execute(copy, f"UPDATE facts SET {change}")
        assert any("facts" in fault for fault in check(copy).faults)
        repair(copy)
        goes_on(copy, whole.devices)


def execute_script(home: Path, script: str) -> None:
    with closing(sqlite3.connect(home / LEDGER, isolation_level=None)) as db:
        db.executescript(script)


@pytest.mark.parametrize("what", LOSSES)
def test_what_is_lost_is_named_and_the_federation_goes_on(whole: World, home: Path, what: str) -> None:
    damage, named = LOSSES[what]
    damage(home)
    damaged = (home / LEDGER).read_bytes()
    done = CliRunner().invoke(app, ["repair", str(home)])
    assert done.exit_code == 0, done.output
    assert named in done.output, done.output
    (aside,) = home.glob("damaged-*")
    assert (aside / LEDGER).read_bytes() == damaged
    bench = Bench(home)
    assert (bench.version % RESTORE_LEAP, bench.version > RESTORE_LEAP) == (6, True)
    assert bench.core.registry.members["gone"].revoked
    bench.close()
    goes_on(home, whole.devices)
    assert log.verify(home, None, None).faults == []


def test_numbers_that_are_lost_are_above_all_that_were_used(whole: World, home: Path) -> None:
    execute(home, "DELETE FROM facts WHERE name IN ('seq', 'session', 'version')")
    repair(home)
    before, after = Bench(whole.home), Bench(home)
    assert after.version == 6 + RESTORE_LEAP
    assert after.core.session > before.core.session + RESTORE_LEAP
    assert after.core._frames.seq > before.core._frames.seq + RESTORE_LEAP


def test_two_repairs_of_one_folder_never_give_the_same_numbers(home: Path, tmp_path: Path) -> None:
    (home / "vectors" / f"{server_segment(home)}-server.f32").unlink()
    shutil.copytree(home, tmp_path / "copy")
    first = repairing.repair(home, clock_s=1_800_000_000.0)
    again = repairing.repair(tmp_path / "copy", clock_s=1_800_000_060.0)
    assert again.version - first.version == RESTORE_LEAP
    assert log.verify(tmp_path / "copy", None, None).faults == []


def test_an_accepted_update_is_not_merged_twice_after_its_row_is_lost(whole: World, home: Path) -> None:
    execute(home, "UPDATE updates SET samples = 1 WHERE id = 11")
    repair(home)
    bench = Bench(home)
    pi = whole.devices[0]
    (receipt,) = bench.send(pi, ternary_block(bench.schema, 1), 5, seq=pi.seq - 1)
    assert receipt.outcome == "duplicate"


def test_where_no_version_is_sound_it_says_to_restore(home: Path) -> None:
    shutil.rmtree(home / "vectors")
    execute(home, "UPDATE frames SET payload = x'00'")
    before = (home / LEDGER).read_bytes()
    with pytest.raises(CorruptError, match="no version is sound; restore a backup"):
        repair(home)
    assert (home / LEDGER).read_bytes() == before
    (home / LEDGER).write_bytes(b"nothing that SQLite knows" * 100)
    with pytest.raises(CorruptError, match="restore a backup"):
        repair(home)
    assert sorted(path.name for path in home.iterdir() if path.is_dir()) == ["bodies"]


def test_a_snapshot_as_it_was_published_helps_where_all_on_disk_are_lost(whole: World, home: Path) -> None:
    shutil.rmtree(home / "vectors")
    assert repair(home).version == 6 + RESTORE_LEAP
    goes_on(home, whole.devices)


@pytest.mark.parametrize("kind", ["head", "snapshot/_/0"])
def test_what_devices_begin_with_is_made_anew_where_the_ledger_lost_it(whole: World, home: Path, kind: str) -> None:
    execute(home, f"DELETE FROM frames WHERE topic LIKE '%/all/{kind}'")
    with pytest.raises(CorruptError, match=r"the retained message of .* is lost; run `ternbus aggregator check"):
        Bench(home)
    assert repair(home).version == 6 + RESTORE_LEAP
    goes_on(home, whole.devices)


def test_a_folder_that_a_process_serves_is_not_repaired(home: Path) -> None:
    held = files.lock(home / control.LOCK)
    assert held is not None
    with held, pytest.raises(ConfigError, match="another process serves"):
        repair(home)


def test_after_any_flip_it_goes_on_or_says_to_restore(whole: World, home: Path, tmp_path: Path) -> None:
    chance, repaired = random.Random(SEED), 0
    for number in range(FLIPS):
        damaged = Path(shutil.copytree(home, tmp_path / str(number)))
        flip(damaged / LEDGER, chance.randrange((home / LEDGER).stat().st_size))
        try:
            done = repair(damaged)
        except CorruptError as error:
            assert "restore a backup" in str(error)
            continue
        repaired += done.aside is not None
        assert check(damaged).faults == ()
        bench = Bench(damaged)
        assert bench.handle(events.StopRequested())
        bench.close()
    assert repaired > FLIPS // 20  # most hit what no row uses


def test_a_script_reads_what_backup_repair_and_restore_did(home: Path, tmp_path: Path) -> None:
    def printed(*words: object) -> Any:
        done = CliRunner().invoke(app, [*map(str, words), "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.output)

    made = printed("backup", home, tmp_path / "out")
    assert (made["version"], made["removed"], made["lacks"]) == (6, [], [])
    assert check(Path(made["path"])).faults == ()
    assert printed("repair", home) == {"version": 6, "aside": None, "done": [], "lost": []}
    back = printed("restore", made["path"], home, "--force")
    assert back["version"] >= 2**32
    assert Path(back["aside"]).is_dir()
    assert printed("restored", home)["version"] > back["version"]


def test_a_lost_key_is_named_with_what_helps(home: Path) -> None:
    (home / "aggregator.key").unlink()
    with pytest.raises(ConfigError, match=r"aggregator\.key: No such file or directory; restore it from a backup"):
        repairing.repair(home)
