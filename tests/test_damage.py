"""Damage on disk: every bit that flips in what the ledger holds is found by `ternbus aggregator check`."""

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

from support.small_world import Bench, float32_block, make_directory
from ternbus.aggregator.core import events
from ternbus.aggregator.shell.checking import check
from ternbus.aggregator.shell.cli import app
from ternbus.aggregator.store import checksums, control, revocations
from ternbus.aggregator.store.checksums import COLUMNS
from ternbus.aggregator.store.ledger import LEDGER
from ternbus.broker.errors import CorruptError

FLIPS = 250  # a test; each is checked as `check` does it
SEED = 20_260_314
PRIVATE_ROWS: dict[str, tuple[object, ...]] = {  # as a federation with private sums has them
    "helpers": ("h-1", bytes(32), bytes(32), bytes(200), 3, "idle", "ternbus", 1.0, 1.0, "code", 1.0, 2.0),
    "terms": (bytes(32), bytes(500)),
    "contexts": (6, bytes(32), bytes(32), bytes(32)),
    "private_updates": (1, bytes(32), bytes(300), bytes(64), 3, None, "below-min", 7),
    "sets": (bytes(32), bytes(32), 6, 1, 5, "opened", bytes(500), 7),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows in all tables, several snapshots, and an update that waits."""
    bench = Bench(make_directory(tmp_path_factory.mktemp("whole") / "agg", merge__buffer_size=2, downlink__slots=4))
    devices = [bench.join(name) for name in ("pi", "other")]
    judge = bench.join("judge", evaluator=True)
    for version in range(6):
        for device in devices:
            bench.send(device, float32_block(bench.schema, version), bench.version)
        bench.receive(judge.topic("metrics"), judge.metrics(bench.version, accuracy=0.5))
    bench.send(devices[0], float32_block(bench.schema, 99), bench.version)
    bench.invite("guest")
    bench.receive("nonsense", b"")
    bench.handle(events.CountsRequested())
    for table, row in PRIVATE_ROWS.items():
        checksums.insert(bench.ledger.db, table, row)
    bench.close()
    return bench.directory


@pytest.fixture
def home(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "agg"))


def content(path: Path) -> Any:
    """All rows of all tables as SQLite reads them; None where it cannot."""
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?immutable=1", uri=True)) as db:
            db.text_factory = bytes
            return [db.execute(f"SELECT * FROM {table}").fetchall() for table in (*COLUMNS, "log")]
    except (sqlite3.Error, UnicodeDecodeError):
        return None


def faults(home: Path) -> list[str]:
    try:
        return list(check(home).faults)
    except CorruptError as error:
        return [str(error)]


def flip(path: Path, bit: int) -> bytes:
    """Flip one bit of a file; returns the content of before."""
    before = path.read_bytes()
    changed = bytearray(before)
    changed[bit // 8] ^= 1 << bit % 8
    path.write_bytes(changed)
    return before


def test_a_folder_as_it_was_written_is_sound(home: Path) -> None:
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    with closing(sqlite3.connect(home / LEDGER)) as db:
        empty = [table for table in COLUMNS if not db.execute(f"SELECT 1 FROM {table}").fetchone()]
    assert empty == ["requests"]
    shutil.rmtree(home)
    for path, written in before.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(written)
        path.chmod(0o600)
    found = check(home)
    assert (found.faults, found.version, found.updates) == ((), 6, 12)
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before


def test_every_flip_that_changes_what_the_ledger_holds_is_found(home: Path) -> None:
    chance, path = random.Random(SEED), home / LEDGER
    want, size_bits, missed, changed = content(path), 8 * path.stat().st_size, [], 0
    for _ in range(FLIPS):
        bit = chance.randrange(size_bits)
        before = flip(path, bit)
        if content(path) != want:
            changed += 1
            if not faults(home):
                missed.append(bit)
        path.write_bytes(before)
    assert missed == []
    assert changed > FLIPS // 10


@pytest.mark.parametrize("folder", ["bodies", "vectors"])
def test_every_flip_in_a_file_that_the_ledger_names_is_found(home: Path, folder: str) -> None:
    chance, missed = random.Random(SEED), []
    with closing(sqlite3.connect(home / LEDGER)) as db:
        named = {f"{segment}.bodies" for (segment,) in db.execute("SELECT DISTINCT segment FROM updates")}
        named |= {f"{segment}-model.f32" for (segment,) in db.execute("SELECT segment FROM snapshots")}
        named |= {f"{segment}-server.f32" for (segment,) in db.execute("SELECT segment FROM server")}
    paths = [path for path in (home / folder).iterdir() if path.name in named]
    assert paths
    for path in paths:
        for _ in range(10):
            bit = chance.randrange(8 * path.stat().st_size)
            before = flip(path, bit)
            if not any(path.name in fault for fault in faults(home)):
                missed.append((path.name, bit))
            path.write_bytes(before)
    assert missed == []


CHANGES: dict[str, tuple[str, str]] = {
    "devices": ("UPDATE devices SET role = 'evaluator' WHERE name = 'pi'", "devices pi is not as it was written"),
    "keys": ("UPDATE keys SET seq = seq + 1 WHERE device = 'pi'", "keys pi"),
    "facts": ("UPDATE facts SET value = value + 1 WHERE name = 'seq'", "facts seq is not as it was written"),
    "invitations": ("UPDATE invitations SET expires_at = 9e9", "invitations guest"),
    "metrics": ("UPDATE metrics SET samples = 1", "metrics judge"),
    "updates": ("UPDATE updates SET samples = 1 WHERE merged IS NULL", "updates 13"),
}


@pytest.mark.parametrize("table", CHANGES)
def test_what_a_start_reads_is_checked_when_it_starts(home: Path, table: str) -> None:
    change, named = CHANGES[table]
    with closing(sqlite3.connect(home / LEDGER, isolation_level=None)) as db:
        assert db.execute(change).rowcount
    with pytest.raises(CorruptError, match=named):
        Bench(home)


REMOVALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "the delta that a vector needs": (
        lambda home: execute(home, "UPDATE versions SET body = NULL WHERE version = 6"),
        "the delta of version 6 is not there",
    ),
    "the body of a waiting update": (
        lambda home: execute(home, "UPDATE updates SET segment = NULL WHERE merged IS NULL"),
        "update 13 of pi on version 6 has no body",
    ),
    "a merged update": (
        lambda home: execute(home, "DELETE FROM updates WHERE id = 3"),
        "in the log, and not in the ledger",
    ),
    "a table's definition": (lambda home: execute(home, "DROP INDEX updates_by_version"), "updates_by_version"),
    "the key": (lambda home: (home / "aggregator.key").unlink(), "aggregator.key"),
    "the vectors": (lambda home: shutil.rmtree(home / "vectors"), "cannot read"),
}


def execute(home: Path, statement: str) -> None:
    with closing(sqlite3.connect(home / LEDGER, isolation_level=None)) as db:
        db.execute(statement)


@pytest.mark.parametrize("what", REMOVALS)
def test_what_is_gone_is_named(home: Path, what: str) -> None:
    remove, named = REMOVALS[what]
    remove(home)
    assert any(named in fault for fault in faults(home)), faults(home)


def test_check_says_what_is_damaged_with_exit_code_1(home: Path) -> None:
    sound = CliRunner().invoke(app, ["check", str(home)])
    assert (sound.exit_code, "is sound: lab at version 6, 12 updates" in sound.output) == (0, True)
    execute(home, "UPDATE counts SET value = 77")
    done = CliRunner().invoke(app, ["check", str(home)])
    assert (done.exit_code, "counts" in done.output) == (1, True)
    as_json = json.loads(CliRunner().invoke(app, ["check", str(home), "--json"]).output)
    assert (as_json["ok"], len(as_json["faults"]) > 0) == (False, True)


@pytest.mark.parametrize("command", ["status", "metrics", "versions"])
def test_a_command_that_fails_at_a_damaged_row_names_it(whole: Path, tmp_path: Path, command: str) -> None:
    """Commands that only read do not check the whole ledger first: they ended with a traceback."""
    named = []
    for table, column in (("facts", "value"), ("metrics", "entries")):
        home = Path(shutil.copytree(whole, tmp_path / table))
        with closing(sqlite3.connect(home / LEDGER, isolation_level=None)) as db:
            cut = f"UPDATE {table} SET {column} = substr({column}, 1, length({column}) - 1)"
            db.execute(f"{cut} WHERE {column} LIKE '{{%' OR {column} LIKE '[%'")
        failed = CliRunner().invoke(app, [command, str(home)]).exception
        assert failed is None or isinstance(failed, CorruptError), failed
        named += [table] if "is not as it was written; run `ternbus aggregator check" in str(failed) else []
    assert named, "no table was read"


@pytest.mark.parametrize("command", ["status", "status --check", "metrics", "versions", "devices", "invitations"])
def test_a_command_that_fails_at_what_it_shows_of_a_damaged_row_names_it(
    whole: Path, tmp_path: Path, command: str
) -> None:
    """A time of another type, or of no calendar, is read as it is; it ended the command with a traceback."""
    named = []
    for damage in ("'x'", str(2**62)):
        for table, column in (("versions", "made_at"), ("devices", "seen_at"), ("invitations", "expires_at")):
            home = Path(shutil.copytree(whole, tmp_path / f"{table}{len(damage)}"))
            execute(home, f"UPDATE {table} SET {column} = {damage}")
            done = CliRunner().invoke(app, [*command.split(), str(home)])
            failed = done.exception
            assert failed is None or isinstance(failed, CorruptError | SystemExit), failed
            named += (
                [table] if f"{table} " in (said := f"{failed}{done.output}") and "as it was written" in said else []
            )
    assert named, "no damage was met"


def test_a_check_looks_at_the_list_of_revoked_keys_and_its_advice_mends_it(tmp_path: Path) -> None:
    """A list that lacks keys would not keep them revoked; the state is whole, so that a backup is made all the same."""
    with closing(Bench(make_directory(tmp_path / "aggregator"))) as bench:
        bench.start()
        bench.join("pi")

    def run(*words: object) -> tuple[int, str]:
        done = CliRunner().invoke(app, list(map(str, words)))
        return done.exit_code, done.output

    home = bench.directory
    run("revoke", home, "pi")
    assert run("check", home)[0] == 0
    path = home / revocations.FILE
    path.write_text("garbage\n")
    code, said = run("check", home)
    assert code == 1
    assert "2 faults" in said
    assert f"{path} lacks 1 key that the ledger has revoked, of pi: a start adds them" in said
    assert f"{path}: 1 line cannot be read, beginning with 'garbage'" in said
    assert json.loads(run("check", home, "--json")[1])["ok"] is False
    assert run("backup", home, tmp_path / "out")[0] == 0
    with control.exclusive(home):  # as a start does
        pass
    path.write_text(path.read_text().replace("garbage\n", ""))
    assert run("check", home)[0] == 0
    assert [device for device, _ in revocations.read(path).keys] == ["pi"]
