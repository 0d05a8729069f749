"""A folder of every format that an aggregator or a device ever had is opened, and goes on where it was.

tests/fixtures/formats says how each was made. `expected.json` is what the code that wrote it reads in it.
"""

import hashlib
import json
import random
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.old_formats import (
    AGGREGATORS,
    DEVICES,
    FIXTURES,
    JOINED,
    LEDGER,
    OLD_AGGREGATORS,
    OLD_DEVICES,
    copy_of,
    dump,
    expected,
    expected_aggregator,
    opened,
)
from support.small_world import Bench
from ternbus.aggregator.core import events
from ternbus.aggregator.merge.accumulator import Accumulator
from ternbus.aggregator.shell import administration, checking, log, quickstart, repairing
from ternbus.aggregator.store.ledger import KINDS, Ledger
from ternbus.aggregator.store.recovery import Waiting
from ternbus.aggregator.store.rows import unsigned
from ternbus.aggregator.store.schema import FORMAT
from ternbus.broker.errors import ConfigError, CorruptError
from ternbus.broker.model_files import load_safetensors
from ternbus.broker.protocol.merge_log import FIRST, UNKNOWN_DIGEST, Entry, unpack
from ternbus.broker.protocol.schema import Vector, to_vector, vector_digest
from ternbus.command import main
from ternbus.edge.core.state import AnsweredUpdate
from ternbus.edge.shell.directory import DeviceDirectory
from ternbus.edge.store import outbox, outbox_format
from ternbus.edge.store.outbox import Outbox


def tables(path: Path) -> dict[str, str]:
    with closing(sqlite3.connect(path)) as db:
        rows = db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
        return {name: " ".join(sql.split()) for name, sql in rows}


def sha256(vector: Vector | None) -> str | None:
    return None if vector is None else hashlib.sha256(vector.astype("<f4").tobytes()).hexdigest()


def roots(path: Path) -> set[int]:
    """The numbers of the first pages of tables, from 1."""
    with closing(sqlite3.connect(path)) as db:
        return {page for (page,) in db.execute("SELECT rootpage FROM sqlite_schema WHERE type = 'table'")}


def page_bytes(path: Path) -> int:
    with closing(sqlite3.connect(path)) as db:
        return int(db.execute("PRAGMA page_size").fetchone()[0])


def ternbus(*arguments: object) -> int:
    with pytest.raises(SystemExit) as done:
        main(list(map(str, arguments)))
    assert isinstance(done.value.code, int)
    return done.value.code


# --- the aggregator's


@pytest.mark.parametrize("name", AGGREGATORS)
def test_an_aggregator_opens_with_what_it_had(name: str, tmp_path: Path) -> None:
    home, want = copy_of(name, tmp_path) / "home", expected_aggregator(name)
    with closing(opened(home)) as ledger:
        core = administration.open_core(home, ledger, "test")
        assert (core.model.version, core.model.digest.hex()) == (want["version"], want["digest"])
        assert sha256(core.model.server.target) == want["server"]["target_sha256"]
        assert sha256(core.model.server.momentum) == want["server"]["momentum_sha256"]
        kept = {version: vector_digest(ledger.vector(int(version))).hex() for version in want["kept_versions"]}
        assert kept == want["kept_versions"]
        buffer = [[update.device, update.staleness, update.samples] for update in core.model.buffer]
        assert buffer == want["buffer"]
        keys = ledger.db.execute(
            "SELECT device, key, state, seq, outcome, metrics_seq FROM keys ORDER BY device, state"
        )
        for (device, key, state, seq, outcome, metrics_seq), row in zip(keys, want["keys"], strict=True):
            found = [device, key.hex(), state, seq, outcome]
            assert found == [row[each] for each in ("device", "key", "state", "seq", "outcome")]
            assert unsigned(metrics_seq) == max(row["metrics_seq"], 0)
        for device, about in want["devices"].items():
            member = core.registry.members[device]
            assert (member.revoked, member.evaluates) == (about["revoked"], about["evaluates"])
            assert (member.highest_base, sorted(member.bases)) == (about["highest_base"], about["bases"])
        codes = dict(ledger.db.execute("SELECT device, code FROM invitations"))
        assert sorted(codes) == want["invitations"]
        assert len(core.registry.codes) == len(codes)


def test_a_ledger_with_a_damaged_page_of_retained_messages_is_migrated_and_then_repaired(tmp_path: Path) -> None:
    chance, damaged, unread = random.Random(5), 0, 0
    with closing(sqlite3.connect(copy_of("aggregator-8", tmp_path) / "home" / LEDGER)) as db:
        (first,) = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'frames'").fetchone()
    # the first flip is in what leads to a row's other pages
    for number, place in enumerate([1022, *(chance.randrange(1024) for _ in range(40))]):
        home = copy_of("aggregator-8", tmp_path / str(number)) / "home"
        content = bytearray((home / LEDGER).read_bytes())
        content[(first - 1) * page_bytes(home / LEDGER) + place] ^= 0x40
        (home / LEDGER).write_bytes(content)
        opened(home).close()
        unread += "former_frames" in tables(home / LEDGER)
        if checking.check(home).faults:
            damaged += 1
            repairing.repair(home)
            assert checking.check(home).faults == ()
    assert 0 < unread < damaged < 41


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_sum_in_order_still_comes_to_the_version_that_the_old_code_made(name: str, tmp_path: Path) -> None:
    """To the bit; the exact sum, by which the same buffer is merged now, differs from it by very little."""
    home, want = copy_of(name, tmp_path) / "home", expected(name)["aggregator"]["merged_now"]
    with closing(opened(home)) as ledger:
        first, second = (administration.open_core(home, ledger, "test").model for _ in range(2))
        first.summing = Accumulator
        first.refill(Waiting(ledger, ledger.schema()))
        then, now = first.prepare(), second.prepare()
    assert (then.merged.version, then.merged.digest.hex()) == (want["version"], want["digest"])
    change = then.server.target - first.server.target
    np.testing.assert_allclose(now.server.target, then.server.target, rtol=1e-6, atol=2**-12 * np.abs(change).max())


@pytest.mark.parametrize("name", AGGREGATORS)
def test_an_aggregator_merges_its_buffer_into_the_version_that_it_comes_to(name: str, tmp_path: Path) -> None:
    """One device alone is in the buffers: a plan that seals would hold them over (tests/test_held_over.py)."""
    home, want = copy_of(name, tmp_path) / "home", expected_aggregator(name)
    settings = home / administration.TOML
    settings.write_text(settings.read_text().replace('"seal" = true', '"seal" = false'))
    opened(home).close()
    bench = Bench(home)
    bench.start()
    bench.handle(events.StopRequested())
    assert bench.version == want["merged_now"]["version"]
    assert bench.core.model.digest.hex() == want["merged_now"]["digest"]
    bench.close()
    assert log.verify(home, None, None).faults == []
    ledger = Ledger(home / LEDGER)
    with closing(ledger):
        assert vector_digest(ledger.vector(want["merged_now"]["version"])).hex() == want["merged_now"]["digest"]
        core = administration.open_core(home, ledger, "test")
        assert (core.model.digest.hex(), core.model.buffer) == (want["merged_now"]["digest"], [])


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_command_migrates_and_another_exports_the_model(name: str, tmp_path: Path) -> None:
    home, want = copy_of(name, tmp_path) / "home", expected_aggregator(name)
    assert ternbus("aggregator", "pause", home) == 0
    assert ternbus("aggregator", "export", home, tmp_path / "model.safetensors") == 0
    with closing(Ledger(home / LEDGER, read_only=True)) as ledger:
        assert ledger.fact("state") == "paused"
        vector = to_vector(ledger.schema(), load_safetensors(tmp_path / "model.safetensors"))
    assert vector_digest(vector).hex() == want["digest"]


@pytest.mark.parametrize("name", OLD_AGGREGATORS)
def test_a_migrated_ledger_has_the_tables_and_facts_of_a_new_one(name: str, tmp_path: Path) -> None:
    home = copy_of(name, tmp_path) / "home"
    opened(home).close()
    model = {"weight": [[0.0] * 16] * 16, "bias": [0.0] * 16}
    administration.create(
        tmp_path / "new",
        federation="fixture",
        broker="mqtt://127.0.0.1:1",
        model={key: as_array(value) for key, value in model.items()},
    )
    assert tables(home / LEDGER) == tables(tmp_path / "new" / LEDGER)
    with closing(Ledger(home / LEDGER)) as old, closing(Ledger(tmp_path / "new" / LEDGER)) as new:
        names = [{name for (name,) in each.db.execute("SELECT name FROM facts")} for each in (old, new)]
        assert old.db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert old.fact("format") == FORMAT
    assert names[0] == names[1] - {KINDS}  # an older federation goes by the tensors' names


def as_array(value: object) -> Any:
    return np.array(value, np.float32)


@pytest.mark.parametrize("name", OLD_AGGREGATORS)
def test_the_ledger_of_before_is_kept_with_the_files_that_it_names(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home = copy_of(name, tmp_path) / "home"
    before = dump(home / LEDGER)
    bodies = {path.name: path.read_bytes() for path in home.glob("bodies/*")}
    opened(home).close()
    copy = home / "format-1"
    assert f"{home / LEDGER}: migrated from format 1 to {FORMAT}; as it was before: {copy}" in caplog.messages
    assert dump(copy / LEDGER) == before
    assert {path.name: path.read_bytes() for path in copy.glob("bodies/*")} == bodies
    assert (copy.stat().st_mode & 0o777, (copy / LEDGER).stat().st_mode & 0o777) == (0o700, 0o600)
    caplog.clear()
    opened(home).close()
    assert caplog.messages == []


@pytest.mark.parametrize("name", OLD_AGGREGATORS)
def test_the_log_of_a_migrated_ledger_begins_with_its_newest_version(name: str, tmp_path: Path) -> None:
    home, want = copy_of(name, tmp_path) / "home", expected_aggregator(name)
    with closing(opened(home)) as ledger:
        ((version, packed),) = ledger.db.execute("SELECT version, entry FROM log").fetchall()
        digests = {digest for (digest,) in ledger.db.execute("SELECT digest FROM updates")}
    entry = Entry.parse(unpack(packed).content)
    assert (version, entry.version, entry.digest.hex()) == (want["version"], want["version"], want["digest"])
    assert (entry.previous, entry.updates) == (FIRST, ())
    assert digests == {UNKNOWN_DIGEST}
    audit = log.verify(home, None, None)
    assert (audit.faults, audit.begins) == ([], want["version"])


def test_log_verify_says_where_the_log_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = copy_of("aggregator-1-bodies", tmp_path) / "home"
    opened(home).close()
    assert ternbus("aggregator", "log", "verify", home) == 0
    assert "it begins with version 5: the aggregator kept no log before" in capsys.readouterr().out
    assert ternbus("aggregator", "log", "verify", home, "--json") == 0
    assert json.loads(capsys.readouterr().out)["begins"] == 5


def test_another_digest_of_a_version_from_before_the_log_is_still_found(tmp_path: Path) -> None:
    home = copy_of("aggregator-1-bodies", tmp_path) / "home"
    with closing(opened(home)) as ledger:
        ledger.db.execute("UPDATE versions SET digest = ? WHERE version = 5", (bytes(32),))
    assert log.verify(home, None, None).faults == ["version 5 has another digest in the ledger than in the log"]


def test_bodies_that_the_second_layout_added_to_a_ledger_of_the_third_get_their_checksums(tmp_path: Path) -> None:
    home, want = copy_of("aggregator-1-checksums", tmp_path) / "home", expected_aggregator("aggregator-1-checksums")
    with closing(sqlite3.connect(home / LEDGER, isolation_level=None)) as db:
        db.execute("UPDATE updates SET checksum = NULL WHERE id = (SELECT max(id) FROM updates)")
    with closing(opened(home)) as ledger:
        core = administration.open_core(home, ledger, "test")
    assert core.model.merge().digest.hex() == want["merged_now"]["digest"]


def test_an_invitation_that_had_no_end_gets_the_usual_one(tmp_path: Path) -> None:
    home = copy_of("aggregator-1-blobs", tmp_path) / "home"
    settings = administration.load_settings(home)
    with closing(opened(home)) as ledger:
        ((made_at, expires_at),) = ledger.db.execute("SELECT made_at, expires_at FROM invitations").fetchall()
    assert expires_at >= made_at + settings.invitations.expire_after_s


@pytest.mark.parametrize(
    "command", [("status",), ("export", "out"), ("log", "show"), ("log", "verify"), ("invitations",)]
)
def test_a_command_that_only_reads_says_which_one_migrates(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = copy_of("aggregator-1-bodies", tmp_path) / "home"
    before = (home / LEDGER).read_bytes()
    last = [tmp_path / command[1]] if command[0] == "export" else []
    assert ternbus("aggregator", *(word for word in command if word != "out"), home, *last) == 2
    error = capsys.readouterr().err
    assert f"{home / LEDGER} has format 1; this version of Ternbus reads {FORMAT}" in error
    assert f"`ternbus aggregator run {home}` migrates it" in error
    assert (home / LEDGER).read_bytes() == before


@pytest.mark.parametrize("command", ["run", "status", "pause"])
def test_a_ledger_of_a_newer_format_is_refused_in_words(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = copy_of("aggregator-5", tmp_path) / "home"
    with closing(sqlite3.connect(home / LEDGER, isolation_level=None)) as db:
        db.execute("UPDATE facts SET value = 99 WHERE name = 'format'")
    assert ternbus("aggregator", command, home) == 2
    error = capsys.readouterr().err
    said = f"ternbus: {home / LEDGER} has format 99; this version of Ternbus reads {FORMAT}: install a newer Ternbus\n"
    assert error == said


def test_a_ledger_of_no_format_that_ever_was_is_refused_in_words(tmp_path: Path) -> None:
    home = copy_of("aggregator-5", tmp_path) / "home"
    with closing(sqlite3.connect(home / LEDGER, isolation_level=None)) as db:
        db.execute("UPDATE facts SET value = 3 WHERE name = 'format'")
    with pytest.raises(CorruptError, match=r"has format 3; .* no version of Ternbus wrote such a file"):
        opened(home)


def test_up_migrates_before_it_invites(tmp_path: Path) -> None:
    home = copy_of("aggregator-1-bodies", tmp_path) / "home"
    first = quickstart.First(model=None, federation="fixture", host="127.0.0.1", port=1883, tls=False)
    assert quickstart.prepare(home, first, "mqtt://127.0.0.1:1883", ["new"]) == [home / "invitations" / "new.toml"]
    with closing(Ledger(home / LEDGER, read_only=True)) as ledger:
        assert ledger.fact("format") == FORMAT


def test_a_migration_without_the_key_leaves_the_ledger_as_it_was(tmp_path: Path) -> None:
    home = copy_of("aggregator-1-blobs", tmp_path) / "home"
    before = dump(home / LEDGER)
    (home / "aggregator.key").unlink()
    with pytest.raises(ConfigError, match=r"aggregator\.key"):
        opened(home)
    assert dump(home / LEDGER) == before


def test_a_start_that_is_refused_leaves_the_ledger_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = copy_of("aggregator-1-blobs", tmp_path) / "home"
    before = dump(home / LEDGER)
    (home / "aggregator.key").chmod(0o644)
    for command in ("run", "pause"):
        assert ternbus("aggregator", command, home) == 2
        assert f"chmod 600 {home / 'aggregator.key'}" in capsys.readouterr().err
    assert dump(home / LEDGER) == before
    assert not (home / "format-1").exists()


@pytest.mark.parametrize("command", ["run", "status", "export"])
def test_a_damaged_ledger_is_named_with_what_to_do(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = copy_of("aggregator-5", tmp_path) / "home"
    with (home / LEDGER).open("r+b") as file:
        for root in roots(home / LEDGER) - {1}:
            file.seek((root - 1) * page_bytes(home / LEDGER))
            file.write(b"\xff" * 64)
    assert ternbus("aggregator", command, home, *([tmp_path / "m"] if command == "export" else [])) == 2
    said = capsys.readouterr().err
    assert said.endswith(
        f"cannot read {home / LEDGER}: database disk image is malformed; run `ternbus aggregator check {home}` to see "
        f"what is damaged, then restore it from a backup or run `ternbus aggregator repair {home}`\n"
    ), said


def test_settings_that_are_gone_are_named_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = copy_of("aggregator-5", tmp_path) / "home"
    (home / "aggregator.toml").unlink()
    assert ternbus("aggregator", "run", home) == 2
    assert capsys.readouterr().err == (
        f"ternbus: {home / 'aggregator.toml'} does not exist; restore it from a backup\n"
    )


def test_an_empty_settings_file_is_named_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    home = copy_of("aggregator-5", tmp_path) / "home"
    (home / "aggregator.toml").write_bytes(b"")
    assert ternbus("aggregator", "status", home) == 2
    assert "aggregator.toml: 'federation' is missing; add it, or restore the file" in capsys.readouterr().err


# --- the device's


@pytest.mark.parametrize("name", DEVICES)
def test_a_reader_sees_what_a_device_of_each_format_had_and_leaves_it_so(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, want = copy_of(name, tmp_path) / "device", expected(name)
    before = dump(folder / outbox.FILE)
    code = ternbus("edge", "status", folder, "--json")
    printed = capsys.readouterr()
    assert dump(folder / outbox.FILE) == before
    assert not list(folder.glob("format-*"))
    if name.endswith("-empty"):
        assert (code, "is missing or empty: restore it" in printed.err) == (2, True)
        return
    found = json.loads(printed.out)
    waiting = want["outstanding"]
    assert (code, found["joined"], found["version"]) == (0, want["joined"], want["head_version"])
    assert (found["base"], found["accepted"]) == (want["answered_base"], want["accepted"])
    assert found["counters"] == want["counters"]
    assert found["digest"] == want.get("head_digest", "")
    if waiting is None:
        assert found["outstanding"] is None
    else:
        assert (found["outstanding"]["seq"], found["outstanding"]["base"]) == (waiting["seq"], waiting["base"])


@pytest.mark.parametrize("name", JOINED)
def test_a_device_of_each_format_goes_on_with_what_it_had(name: str, tmp_path: Path) -> None:
    folder, want = copy_of(name, tmp_path) / "device", expected(name)
    with Outbox(folder, DeviceDirectory(folder).identity().key_id) as store:
        state, waiting = store.state, want["outstanding"]
        for number in ("enrolled", "seq_limit", "session", "head_version", "head_seq", "answered_base", "evaluated"):
            assert getattr(state, number) == want[number]
        assert state.key.hex() == want["key"]
        assert hashlib.sha256(state.schema).hexdigest() == want["schema_sha256"]
        assert sha256(state.residual) == want["residual_sha256"]
        assert (state.head_digest.hex(), state.protected) == (want.get("head_digest", ""), want.get("protected", ""))
        assert state.account.epsilon == want.get("epsilon", 0.0)
        assert state.outstanding is not None
        assert (state.outstanding.seq, state.outstanding.base) == (waiting["seq"], waiting["base"])
        assert hashlib.sha256(state.outstanding.body).hexdigest() == waiting["body_sha256"]  # what is sent again
        assert dict(state.outstanding.metrics) == waiting["metrics"]
        answered = AnsweredUpdate(
            seq=waiting["seq"], base=waiting["base"], outcome="accepted", version=5, key=state.key, digest=b"d" * 32
        )
        store.save(state, answered, store.counters)
    newest, *others = outbox.answers(folder)
    assert newest == answered
    assert [(each.seq, each.base, each.outcome, each.version, each.digest.hex()) for each in others] == [
        (row["seq"], row["base"], row["outcome"], row["version"], row.get("digest", ""))
        for row in want["receipts_newest_first"]
    ]


@pytest.mark.parametrize("name", DEVICES)
def test_a_store_has_its_format_once_it_was_opened_to_write(name: str, tmp_path: Path) -> None:
    folder = copy_of(name, tmp_path) / "device"
    before = dump(folder / outbox.FILE)
    key = DeviceDirectory(folder).identity().key_id
    with Outbox(folder, key) as store:
        store.save(store.state, None, store.counters)
    with closing(sqlite3.connect(folder / outbox.FILE)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (outbox_format.FORMAT,)
        names = {name for (name,) in db.execute("SELECT name FROM kept")}
        columns = {row[1] for row in db.execute("PRAGMA table_info(receipts)")}
    (tmp_path / "new").mkdir()
    with Outbox(tmp_path / "new", key) as fresh:
        fresh.save(fresh.state, None, {})
    with closing(sqlite3.connect(tmp_path / "new" / outbox.FILE)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (outbox_format.FORMAT,)
        assert names == {name for (name,) in db.execute("SELECT name FROM kept")}
        assert columns == {row[1] for row in db.execute("PRAGMA table_info(receipts)")}
    if name in OLD_DEVICES:
        assert dump(folder / "format-1" / outbox.FILE) == before
        assert (folder / "format-1" / outbox.FILE).stat().st_mode & 0o777 == 0o600
    else:
        number = 3 if name.startswith("edge-3") else 2
        assert dump(folder / f"format-{number}" / outbox.FILE) == before


def test_a_first_format_that_newer_code_has_added_names_to_is_told_by_its_columns(tmp_path: Path) -> None:
    folder = copy_of("edge-first", tmp_path) / "device"
    with closing(sqlite3.connect(folder / outbox.FILE, isolation_level=None)) as db:
        db.execute("INSERT INTO kept VALUES ('head_digest', x''), ('protected', 'none')")
        db.execute("""INSERT INTO kept VALUES ('account', '{"spent": [], "epsilon": 0.5, "delta": 0.0}')""")
    with Outbox(folder, DeviceDirectory(folder).identity().key_id) as store:
        assert (store.state.protected, store.state.account.epsilon) == ("none", 0.5)
    assert {each.digest for each in outbox.answers(folder)} == {b""}


def test_a_store_of_a_newer_format_is_refused_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of("edge-account", tmp_path) / "device"
    with closing(sqlite3.connect(folder / outbox.FILE, isolation_level=None)) as db:
        db.execute("PRAGMA user_version = 99")
    said = (
        f"{folder / outbox.FILE} has format 99; "
        f"this version of Ternbus reads {outbox_format.FORMAT}: install a newer Ternbus"
    )
    assert ternbus("edge", "status", folder) == 2
    assert capsys.readouterr().err == f"ternbus: {said}\n"
    with pytest.raises(ConfigError, match=re.escape(said)):
        Outbox(folder, DeviceDirectory(folder).identity().key_id)


def test_a_store_that_is_no_database_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of("edge-account", tmp_path) / "device"
    (folder / outbox.FILE).write_bytes(b"no database, but longer than its header would be" * 100)
    assert ternbus("edge", "status", folder) == 2
    assert capsys.readouterr().err == (
        f"ternbus: cannot read {folder / outbox.FILE}: file is not a database; "
        f"{outbox_format.remedy(folder / outbox.FILE)}\n"
    )


@pytest.mark.parametrize("lost", ["removed", "emptied", "never saved in"])
def test_a_device_that_has_joined_does_not_begin_a_new_store(lost: str, tmp_path: Path) -> None:
    folder = copy_of("edge-account", tmp_path) / "device"
    (folder / outbox.FILE).unlink()
    if lost == "emptied":
        (folder / outbox.FILE).touch()
    elif lost == "never saved in":
        with Outbox(folder, DeviceDirectory(folder).identity().key_id):
            pass
    for command in ("run", "evaluate", "status"):
        words = [sys.executable, "-c", "from ternbus.command import main; main()", "edge", command, str(folder)]
        done = subprocess.run(words, cwd=FIXTURES, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 2, done.stderr
        assert f"{folder / outbox.FILE} is missing or empty: restore it from a backup (under differ" in done.stderr
        assert "an older one has forgotten what was spent since" in done.stderr
        assert f"`ternbus edge rejoin INVITATION.toml {folder}`; its privacy account is lost" in done.stderr
    assert (folder / outbox.FILE).exists() == (lost != "removed")


def test_to_leave_a_federation_removes_the_copy_of_the_old_store(tmp_path: Path) -> None:
    folder = copy_of("edge-first", tmp_path) / "device"
    with Outbox(folder, DeviceDirectory(folder).identity().key_id):
        pass
    assert (folder / "format-1" / outbox.FILE).exists()
    DeviceDirectory(folder).erase()
    assert not folder.exists()


def test_a_device_checks_the_log_of_an_aggregator_that_was_migrated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixture = copy_of("aggregator-1-blobs", tmp_path)
    home, south = fixture / "home", fixture / "devices" / "south"
    opened(home).close()
    assert ternbus("aggregator", "log", "export", home, tmp_path / "log") == 0
    assert ternbus("edge", "verify", south, tmp_path / "log") == 0
    printed = capsys.readouterr().out
    accepted = expected("aggregator-1-blobs")["devices"]["south"]["accepted"]
    assert f"{accepted} more were accepted before the aggregator kept a log, and cannot be checked" in printed
