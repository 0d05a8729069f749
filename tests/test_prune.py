"""`ternbus aggregator prune`: old rows go to an archive, and nothing else changes."""

import json
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from support.small_world import Bench, Device, follow, make_directory, receipts, ternary_block
from ternbus.aggregator.core import events
from ternbus.aggregator.shell import administration, backup, log, restoring
from ternbus.aggregator.shell.checking import check
from ternbus.aggregator.shell.cli import app
from ternbus.aggregator.shell.repairing import repair
from ternbus.aggregator.store import control, merge_log
from ternbus.aggregator.store import status as statuses
from ternbus.aggregator.store.ledger import LEDGER
from ternbus.broker import files
from ternbus.broker.errors import ConfigError, CorruptError

VERSIONS, STALENESS, KEPT = 90, 4, 10
DEVICES = ("pi", "other")


class World:
    """A federation with many versions, and an update that waits."""

    def __init__(self, home: Path) -> None:
        self.bench = Bench(make_directory(home, merge__buffer_size=2, staleness__max=STALENESS, downlink__slots=4))
        self.devices = [self.bench.join(name) for name in DEVICES]
        self.judge = self.bench.join("judge", evaluator=True)
        for number in range(VERSIONS):
            merge(self.bench, self.devices, number)
            self.bench.receive(self.judge.topic("metrics"), self.judge.metrics(number, accuracy=number / 100))
        self.waiting = self.devices[0].update(ternary_block(self.bench.schema, 7), self.bench.version)
        self.bench.receive(self.devices[0].topic("update"), *self.waiting)
        self.bench.handle(events.StopRequested())
        self.bench.close()
        self.home = home


def merge(bench: Bench, devices: list[Device], seed: int) -> None:
    for device in devices:
        bench.send(device, ternary_block(bench.schema, seed), bench.version)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("whole") / "agg")


@pytest.fixture
def home(whole: World, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole.home, tmp_path / "agg"))


def count(home: Path, table: str) -> int:
    with closing(sqlite3.connect(home / LEDGER)) as db:
        return int(db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])


def run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(map(str, words)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def state(home: Path) -> dict[str, Any]:
    """The status, without what is of the moment or of single versions."""
    found = statuses.read(home)
    return {name: value for name, value in found.items() if name not in {"versions", "disk"}}


def goes_on(home: Path, whole: World) -> Bench:
    bench = Bench(home)
    bench.start()
    bench.tick(seconds=10.0)
    version = bench.version
    merge(bench, whole.devices, 1)
    merge(bench, whole.devices, 2)
    assert bench.version > version
    assert follow(bench.retained, bench.identity.public) == (bench.version, bench.core.model.digest)
    return bench


def test_old_rows_are_in_the_archive_and_the_ledger_is_smaller(home: Path) -> None:
    before, size = state(home), (home / LEDGER).stat().st_size
    rows = {table: count(home, table) for table in ("updates", "versions", "log", "metrics")}
    newest = statuses.read(home)["version"]
    code, said = run("prune", home, "--keep-versions", KEPT, "--json")
    found = json.loads(said)
    assert (code, found["before"]) == (0, newest - KEPT + 1)
    assert found["rows"]["versions"] == found["rows"]["log"] == newest - KEPT + 1
    assert min(found["rows"].values()) > 0
    for table, number in rows.items():
        assert count(home, table) == number - found["rows"][table]
    assert (state(home), len(statuses.read(home)["versions"])) == (before, KEPT)
    assert (home / LEDGER).stat().st_size < size
    assert check(home).faults == ()
    made = Path(found["archive"])
    assert (made.stat().st_mode & 0o777, made.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def test_the_log_is_the_same_bytes_as_before(home: Path, tmp_path: Path) -> None:
    log.export(home, tmp_path / "before")
    before = log.verify(home, None, None)
    for kept in (30, KEPT):
        administration.prune(home, kept)
        log.export(home, tmp_path / "after")
        assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()
    found = log.verify(home, None, None)
    assert (found.faults, found.entries, found.last) == ([], before.entries, before.last)
    assert [path.name for path in sorted((home / merge_log.FOLDER).iterdir())] == ["1.sqlite", "2.sqlite"]
    assert [entry.version for entry, _ in log.entries(home, 5)] == [5]


def test_a_second_prune_finds_nothing_more(home: Path) -> None:
    administration.prune(home, KEPT)
    code, said = run("prune", home, "--keep-versions", KEPT)
    assert (code, "has no rows to archive" in said) == (0, True)
    assert administration.prune(home, KEPT).path is None


def test_the_federation_goes_on_as_if_nothing_had_been_archived(whole: World, home: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(home, tmp_path / "other"))
    administration.prune(home, 1)
    pruned, kept = Bench(home), Bench(other)
    assert pruned.core.model.digest == kept.core.model.digest
    assert pruned.core.validation.influence == kept.core.validation.influence
    members = [{name: (each.highest_base, each.bases, each.answer, each.evaluates, each.pace) for name, each
                in bench.core.registry.members.items()} for bench in (pruned, kept)]  # fmt: skip
    assert members[0] == members[1]
    pruned.close()
    kept.close()
    assert goes_on(home, whole).core.model.digest == goes_on(other, whole).core.model.digest


def test_an_update_that_was_archived_is_a_duplicate_still(whole: World, home: Path) -> None:
    administration.prune(home, 1)
    bench = Bench(home)
    bench.start()
    bench.tick(seconds=10.0)
    pi, outcomes = whole.devices[0], []
    for payloads in (whole.waiting, pi.update(ternary_block(bench.schema, 3), 3)):
        (receipt,) = receipts(bench.receive(pi.topic("update"), *payloads))
        outcomes.append(receipt.outcome)
    assert outcomes == ["accepted", "duplicate"]  # the first is the answer that it had
    assert statuses.read(home)["devices"]["pi"]["updates"] == VERSIONS + 1
    bench.close()


def test_what_is_not_stale_stays_and_a_setting_that_reaches_further_back_is_refused(home: Path) -> None:
    newest = statuses.read(home)["version"]
    done = administration.prune(home, 1)
    assert done.before <= newest - STALENESS
    path = home / administration.TOML
    path.write_text(path.read_text().replace(f"[staleness]\nmax = {STALENESS} ", "[staleness]\nmax = 50 "))
    with pytest.raises(ConfigError, match=rf"staleness\.max = 50 reaches below version {done.before}"):
        Bench(home)


def test_an_archive_that_is_damaged_or_gone_is_found_by_check_and_by_the_log(home: Path) -> None:
    path = administration.prune(home, KEPT).path
    assert path is not None
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert any("1.sqlite is not as it was written" in fault for fault in check(home).faults)
    assert any("1.sqlite is not as it was written" in fault for fault in log.verify(home, None, None).faults)
    with pytest.raises(CorruptError, match=r"1\.sqlite is not as it was written"):
        log.export(home, home / "out")
    path.unlink()
    assert any("cannot read" in fault and "1.sqlite" in fault for fault in check(home).faults)


def test_a_damaged_row_is_not_archived(home: Path) -> None:
    with closing(sqlite3.connect(home / LEDGER, isolation_level=None)) as db:
        db.execute("UPDATE updates SET samples = 77 WHERE id = 1")
    rows = count(home, "updates")
    with pytest.raises(CorruptError, match="updates 1 is not as it was written"):
        administration.prune(home, KEPT)
    assert (count(home, "updates"), list((home / merge_log.FOLDER).iterdir())) == (rows, [])


def test_a_running_aggregator_is_not_pruned(home: Path) -> None:
    with files.lock(home / control.LOCK), pytest.raises(ConfigError, match="stop it first"):  # type: ignore[union-attr]
        administration.prune(home, KEPT)


def test_a_backup_has_the_archives_and_is_restored_with_them(whole: World, home: Path, tmp_path: Path) -> None:
    administration.prune(home, KEPT)
    made = backup.backup(home, tmp_path / "out", None, "test").path
    restoring.restore(made, tmp_path / "new", "test")
    assert (check(tmp_path / "new").faults, log.verify(tmp_path / "new", None, None).begins) == ((), 0)
    goes_on(tmp_path / "new", whole).close()


@pytest.mark.parametrize("damage", ["updates", "log", "archive"])
def test_a_pruned_ledger_can_be_repaired(whole: World, home: Path, damage: str) -> None:
    path = administration.prune(home, KEPT).path
    before = state(home)
    assert path is not None
    if damage == "archive":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        change = {"updates": "samples = 77 WHERE id = 175", "log": f"entry = x'00' WHERE version = {VERSIONS - 1}"}
        with closing(sqlite3.connect(home / LEDGER, isolation_level=None)) as db:
            assert db.execute(f"UPDATE {damage} SET {change[damage]}").rowcount
    done = repair(home)
    assert done.aside is not None
    found = log.verify(home, None, None)
    assert (found.faults, found.begins == 0) == ([], damage == "updates")
    assert (done.aside / merge_log.FOLDER / path.name).exists()
    assert state(home)["counts"]["accepted"] == before["counts"]["accepted"] - (damage == "updates")
    goes_on(home, whole).close()
    assert check(home).faults == ()
