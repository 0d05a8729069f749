"""Backups: made beside a process that goes on, whole or not there at all, and restored above what devices know."""

import json
import shutil
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from support.core_device import Device as CoreDevice
from support.core_device import profile
from support.old_formats import copy_of, opened
from support.small_world import (
    LAB,
    SHAPES,
    Bench,
    Device,
    float32_block,
    follow,
    make_directory,
    receipts,
    ternary_block,
)
from ternbus.aggregator.core import events
from ternbus.aggregator.core.versions import leap_of
from ternbus.aggregator.shell import administration, backup, log, restoring
from ternbus.aggregator.shell.checking import check
from ternbus.aggregator.shell.cli import app
from ternbus.aggregator.store import control, revocations
from ternbus.aggregator.store import status as statuses
from ternbus.aggregator.store.ledger import LEDGER
from ternbus.broker import files
from ternbus.broker.errors import ConfigError, CorruptError, StorageError
from ternbus.broker.files import lock
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import COUNTER_MAX
from ternbus.broker.protocol.messages import RESTORE_LEAP
from ternbus.edge.core import events as edge_events
from ternbus.edge.core.actions import Publish
from ternbus.edge.core.core import Core
from ternbus.edge.core.state import State


def run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, list(map(str, words)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output


def make_backup(bench: Bench, out: Path) -> Path:
    return backup.backup(bench.directory, out, None, "test").path


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(make_directory(tmp_path / "agg", merge__buffer_size=2, downlink__slots=4))


def merge(bench: Bench, *devices: Device, times: int = 1) -> None:
    for number in range(times):
        for device in devices:
            bench.send(device, float32_block(bench.schema, number), bench.version)


def test_a_backup_made_beside_merges_and_snapshots_is_sound_each_time(bench: Bench, tmp_path: Path) -> None:
    """The files that it copies are removed meanwhile, as the versions that need them go."""
    pi, other = bench.join("pi"), bench.join("other")
    merge(bench, pi, other, times=3)
    with files.lock(bench.directory / control.LOCK), ThreadPoolExecutor(1) as other_thread:  # type: ignore[union-attr]
        copies = [
            other_thread.submit(backup.backup, bench.directory, tmp_path / f"out-{number}", None, "test")
            for number in range(6)
        ]
        while not all(copy.done() for copy in copies):
            merge(bench, pi, other)
            bench.beside.work()
    made = [copy.result() for copy in copies]
    assert [check(each.path).faults for each in made] == [()] * 6
    assert made[-1].version > made[0].version


def test_it_is_for_its_owner_only_and_says_that_it_holds_keys(bench: Bench, tmp_path: Path) -> None:
    code, said = run("backup", bench.directory, tmp_path / "out")
    (made,) = backup.found_in(tmp_path / "out", LAB)
    assert (code, "holds the aggregator's keys" in said, str(made) in said) == (0, True, True)
    assert {path.stat().st_mode & 0o077 for path in [tmp_path / "out", made, *made.rglob("*")]} == {0}
    assert (made / "aggregator.key").read_bytes() == (bench.directory / "aggregator.key").read_bytes()


def test_the_newest_are_kept_and_those_of_another_aggregator_too(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = make_backup(bench, out)
    for day in (1, 2, 3):
        shutil.copytree(first, out / f"{LAB}-2026010{day}T000000Z")
    foreign = Path(shutil.copytree(first, out / f"{LAB}-20250101T000000Z"))
    manifest = (foreign / backup.MANIFEST).read_text()
    (foreign / backup.MANIFEST).write_text(manifest.replace(bench.identity.public.hex(), "00" * 32))
    (out / f"{LAB}-20240101T000000Z.partial").mkdir()
    shutil.rmtree(first)
    removed = backup.backup(bench.directory, out, 2, "test").removed
    assert [path.name for path in removed] == [f"{LAB}-20260101T000000Z", f"{LAB}-20260102T000000Z"]
    left = sorted(path.name for path in out.iterdir() if path.is_dir())
    assert left[:2] == [foreign.name, f"{LAB}-20260103T000000Z"]
    assert (len(left), [name for name in left if name.endswith(".partial")]) == (3, [])


def test_a_folder_that_is_damaged_leaves_no_backup(bench: Bench, tmp_path: Path) -> None:
    with closing(sqlite3.connect(bench.directory / LEDGER, isolation_level=None)) as db:
        db.execute("UPDATE versions SET updates = 77")
    with pytest.raises(CorruptError, match=r"was not kept: versions 0 .* ternbus aggregator check"):
        make_backup(bench, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [backup.LOCK]


def test_a_bit_that_flips_in_any_file_of_a_backup_is_found_and_it_is_not_restored(bench: Bench, tmp_path: Path) -> None:
    made = make_backup(bench, tmp_path / "out")
    for path in (each for each in made.rglob("*") if each.is_file() and each.name != backup.MANIFEST):
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert any(path.name in fault for fault in check(made).faults), path
        with pytest.raises(CorruptError, match="use another backup"):
            restoring.restore(made, tmp_path / "new", "test")
        path.write_bytes(before)
    (made / "vectors" / "1-model.f32").unlink()
    assert any("1-model.f32" in fault for fault in check(made).faults)


def restored(made: Path, directory: Path, clock_s: float = 0.0, **options: Any) -> tuple[Bench, restoring.Restored]:
    done = restoring.restore(made, directory, "test", clock_s=clock_s, **options)
    return Bench(directory), done


def test_a_restored_aggregator_goes_on_with_an_empty_broker_above_all_that_devices_saw(
    bench: Bench, tmp_path: Path
) -> None:
    pi, other = bench.join("pi"), bench.join("other")
    merge(bench, pi, other)
    made = make_backup(bench, tmp_path / "out")
    merge(bench, pi, other, times=3)
    newest, session = bench.head, bench.core.session
    bench.close()
    shutil.rmtree(bench.directory)
    again, done = restored(made, bench.directory)
    assert (done.version, done.aside) == (1 + RESTORE_LEAP, None)
    again.start()  # with nothing retained: nobody shows it a head
    again.tick(seconds=10.0)
    assert again.head.version == 1 + RESTORE_LEAP > newest.version
    assert again.core.session > session + RESTORE_LEAP - 10
    assert follow(again.retained, again.identity.public) == (again.head.version, again.core.model.digest)
    merge(again, pi, other)
    assert again.head.version == 2 + RESTORE_LEAP


MONDAY: Final = 1_800_000_000.0


def numbers(bench: Bench) -> tuple[int, int, int]:
    return bench.version, bench.core._frames.seq, bench.core.session


def test_two_restores_of_one_backup_never_give_the_same_numbers(bench: Bench, tmp_path: Path) -> None:
    """The second one knows nothing of the first: its folder is a new one, or was copied back by hand."""
    pi, other = bench.join("pi"), bench.join("other")
    merge(bench, pi, other)
    made = make_backup(bench, tmp_path / "out")
    first, _ = restored(made, tmp_path / "first", clock_s=MONDAY)
    all_given = [numbers(first)]
    merge(first, pi, other, times=3)
    first.close()
    again, _ = restored(made, tmp_path / "second", clock_s=MONDAY + 60.0)
    all_given.append(numbers(again))
    by_hand = Path(shutil.copytree(made, tmp_path / "third"))
    administration.restored(by_hand, "test", MONDAY + 120.0)
    all_given.append(numbers(Bench(by_hand)))
    for lower, higher in pairwise(all_given):
        assert all(b - a > RESTORE_LEAP / 2 for a, b in zip(lower, higher, strict=True)), (lower, higher)
    assert not log.verify(by_hand, None, None).faults


@given(version=st.integers(0, 2**58), clock_s=st.floats(-1e18, 1e18))
def test_no_clock_breaks_the_bounds_of_a_leap(version: int, clock_s: float) -> None:
    numbers = leap_of(version, clock_s)
    assert numbers % RESTORE_LEAP == 0
    assert RESTORE_LEAP <= numbers <= 2**59
    assert version + numbers < COUNTER_MAX


def test_newer_state_is_replaced_by_force_only_and_kept(bench: Bench, tmp_path: Path) -> None:
    pi, other = bench.join("pi"), bench.join("other")
    made = make_backup(bench, tmp_path / "out")
    merge(bench, pi, other)
    bench.close()
    newest = (bench.directory / LEDGER).read_bytes()
    with pytest.raises(ConfigError, match=r"is at version 1, newer than the backup's 0; add --force"):
        restoring.restore(made, bench.directory, "test")
    assert (bench.directory / LEDGER).read_bytes() == newest
    code, said = run("restore", made, bench.directory, "--force")
    (aside,) = bench.directory.glob("replaced-*")
    assert (code, f"kept in {aside}" in said, (aside / LEDGER).read_bytes() == newest) == (0, True, True)
    assert check(bench.directory).faults == ()


def test_a_damaged_folder_is_replaced_without_force(bench: Bench, tmp_path: Path) -> None:
    made = make_backup(bench, tmp_path / "out")
    bench.close()
    (bench.directory / LEDGER).write_bytes(b"no ledger" * 1000)
    again, done = restored(made, bench.directory)
    assert done.aside is not None
    assert again.version == RESTORE_LEAP


def test_a_folder_that_a_process_serves_is_not_replaced(bench: Bench, tmp_path: Path) -> None:
    made = make_backup(bench, tmp_path / "out")
    held = files.lock(bench.directory / control.LOCK)
    assert held is not None
    with held, pytest.raises(ConfigError, match="another process serves"):
        restoring.restore(made, bench.directory, "test", force=True)


def test_what_is_no_backup_or_is_the_folder_itself_is_not_restored(bench: Bench, tmp_path: Path) -> None:
    made = make_backup(bench, tmp_path / "out")
    bench.close()
    copied = Path(shutil.copytree(bench.directory, tmp_path / "copied"))
    within = Path(shutil.copytree(made, bench.directory / "backups" / made.name))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for source, directory, said in (
        (copied, tmp_path / "new", r"backup.toml is missing; .* ternbus aggregator restored"),
        (tmp_path / "nothing", tmp_path / "new", "there is no .*nothing: give the folder of a backup"),
        (made, made, "are one folder"),
        (within, bench.directory, "or one is in the other"),
        (made, made / "agg", "or one is in the other"),
    ):
        with pytest.raises(ConfigError, match=said):
            restoring.restore(source, directory, "test", force=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "new").exists()


def test_a_folder_of_another_aggregator_is_not_replaced(bench: Bench, tmp_path: Path) -> None:
    made = make_backup(bench, tmp_path / "out")
    model = {"w": [[0.0]]}
    administration.create(
        tmp_path / "foreign", federation="lab", broker="mqtt://127.0.0.1:1", model=_arrays(model), settings={}
    )
    with pytest.raises(ConfigError, match="another aggregator"):
        restoring.restore(made, tmp_path / "foreign", "test")


def _arrays(model: dict[str, Any]) -> dict[str, Any]:
    return {name: np.array(value, np.float32) for name, value in model.items()}


def test_a_copy_of_an_older_format_is_restored_and_migrated(tmp_path: Path) -> None:
    old = copy_of("aggregator-6", tmp_path) / "home"
    (old / backup.MANIFEST).write_text("[files]\n")
    again, done = restored(old, tmp_path / "new")
    assert (done.version, again.version) == (5 + RESTORE_LEAP, 5 + RESTORE_LEAP)


def test_a_copy_of_an_older_format_is_restored_where_a_migration_from_it_left_one_too(tmp_path: Path) -> None:
    old, served = (copy_of("aggregator-8", tmp_path / name) / "home" for name in ("old", "served"))
    (old / backup.MANIFEST).write_text("[files]\n")
    opened(served).close()
    (served / "format-8" / "kept").touch()
    again, _ = restored(old, served)
    assert again.version == 5 + RESTORE_LEAP
    assert (served / "format-8" / "kept").exists()


# --- revocations


def listed(path: Path) -> set[str]:
    return {device for device, _ in revocations.read(path).keys}


def test_a_revocation_is_in_the_folder_s_list_and_beside_the_backups_when_the_command_ends(
    bench: Bench, tmp_path: Path
) -> None:
    bench.join("pi")
    bench.join("other")
    made = make_backup(bench, tmp_path / "out")
    bench.close()
    assert run("revoke", bench.directory, "pi", "--reason", "stolen")[0] == 0
    assert listed(bench.directory / revocations.FILE) == {"pi"}
    assert listed(backup.beside(tmp_path / "out", LAB)) == {"pi"}
    assert run("revoke", bench.directory, "other")[0] == 0
    assert listed(backup.beside(tmp_path / "out", LAB)) == {"pi", "other"}
    assert not (made / revocations.FILE).exists()


def test_who_copies_the_list_of_revoked_keys_waits_for_another_process_that_does(bench: Bench, tmp_path: Path) -> None:
    bench.join("pi")
    make_backup(bench, tmp_path / "out")
    held = lock(bench.directory / backup.SPREADING)
    assert held is not None
    with held:
        said = backup.spread_revocations(bench.directory, LAB, patience_s=0.0)
        assert said == ("another process is still copying it after 0 s",)
    assert backup.spread_revocations(bench.directory, LAB) == ()
    (bench.directory / backup.SPREADING).unlink()
    (bench.directory / backup.SPREADING).mkdir()
    (fault,) = backup.spread_revocations(bench.directory, LAB)
    assert backup.SPREADING in fault


def revoked_all_the_same(bench: Bench, device: str) -> str:
    """What `revoke` says where it revokes a device, and cannot copy that beside all backups."""
    with pytest.raises(
        StorageError, match=f"^{device} is revoked all the same, but the list .* beside the backups: "
    ) as said:
        run("revoke", bench.directory, device)
    assert statuses.read(bench.directory)["devices"][device]["key_state"] == "revoked"
    return str(said.value)


def test_a_revocation_says_which_backups_it_did_not_reach_and_reaches_them_later(bench: Bench, tmp_path: Path) -> None:
    """Of three places one is moved, one is a mount point without its disk, one cannot be written."""
    for device in ("pi", "other", "third"):
        bench.join(device)
    moved, unmounted, full, sound = (tmp_path / name for name in ("moved", "unmounted", "full", "sound"))
    for out in (moved, unmounted, full, sound):
        make_backup(bench, out)
    bench.close()
    for out in (moved, unmounted):
        out.rename(out.with_name(f"{out.name}-away"))
    unmounted.mkdir()
    (backup.beside(full, LAB)).mkdir()
    said = revoked_all_the_same(bench, "pi")
    for out in (moved, unmounted):
        assert f"{out} is away: mount it, or take it out of {bench.directory / backup.PLACE}" in said
    assert str(backup.beside(full, LAB)) in said
    assert (str(sound) in said, listed(backup.beside(sound, LAB)), list(unmounted.iterdir())) == (False, {"pi"}, [])
    unmounted.rmdir()
    for out in (moved, unmounted):
        out.with_name(f"{out.name}-away").rename(out)
    backup.beside(full, LAB).rmdir()
    assert run("revoke", bench.directory, "other")[0] == 0
    assert all(listed(backup.beside(out, LAB)) == {"pi", "other"} for out in (moved, unmounted, full, sound))


def test_as_many_places_of_backups_are_kept_as_fit_the_newest_last(bench: Bench, tmp_path: Path) -> None:
    places = [tmp_path / f"out-{number}" for number in range(backup.PLACES_MAX + 1)]
    bench.join("pi")
    (bench.directory / backup.PLACE).write_text(f'out = "{places[0]}"\n')  # as one place was kept
    assert backup.places(bench.directory) == (places[0],)
    for out in (*places, places[5]):
        make_backup(bench, out) if not out.exists() else backup._remember(bench.directory, out)
    kept = (*places[1:5], *places[6:], places[5])
    assert backup.places(bench.directory) == kept
    bench.close()
    run("revoke", bench.directory, "pi")
    assert all(listed(backup.beside(out, LAB)) == {"pi"} for out in kept)


def test_a_folder_that_cannot_be_written_is_backed_up_with_a_warning(bench: Bench, tmp_path: Path) -> None:
    bench.join("pi")
    bench.revoke("pi")
    (bench.directory / f"{backup.PLACE}.partial").mkdir()  # so that the place cannot be kept
    code, said = run("backup", bench.directory, tmp_path / "out")
    (made,) = backup.found_in(tmp_path / "out", LAB)
    assert (code, check(made).faults, listed(backup.beside(tmp_path / "out", LAB))) == (0, (), {"pi"})
    assert f"ternbus: later revocations will not be copied to {tmp_path / 'out'}: cannot use {bench.directory}" in said


def test_a_backup_needs_no_room_in_a_folder_that_no_process_serves(bench: Bench, tmp_path: Path) -> None:
    pi, other = bench.join("pi"), bench.join("other")
    merge(bench, pi, other)
    bench.close()
    (bench.directory / f"{LEDGER}-shm").symlink_to("nowhere")  # SQLite cannot make it, as on a full disk
    for number in (1, 2):
        made = backup.backup(bench.directory, tmp_path / f"out-{number}", None, "test")
        assert (made.version, check(made.path).faults) == (1, ())
    with files.lock(bench.directory / control.LOCK), pytest.raises(StorageError, match=LEDGER):  # type: ignore[union-attr]
        make_backup(bench, tmp_path / "out")


def test_a_backup_into_the_folder_itself_or_of_a_backup_beside_it_is_refused(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(bench.directory)
    for out in (bench.directory, bench.directory / "b", tmp_path / "link" / "b"):
        with pytest.raises(ConfigError, match=f"^{out} is in {bench.directory}, .* name a folder outside it"):
            make_backup(bench, out)
    assert not (bench.directory / "b").exists()
    made = make_backup(bench, tmp_path)  # the folder may be beside its backups
    with pytest.raises(ConfigError, match=f"^{made} is a backup in {tmp_path}, .* ternbus aggregator restore"):
        backup.backup(made, tmp_path, 1, "test")
    assert check(made).faults == ()


@pytest.mark.parametrize("damage", [b"out = [", b"\xff", b"out = 7", b"out = ['/a', 7]", b"out = 'relative'", b""])
def test_damaged_places_of_backups_stop_neither_a_revocation_nor_a_backup(
    bench: Bench, damage: bytes, tmp_path: Path
) -> None:
    for device in ("pi", "other"):
        bench.join(device)
    bench.close()
    (bench.directory / backup.PLACE).write_bytes(damage)
    damaged = f"{bench.directory / backup.PLACE} "
    said = revoked_all_the_same(bench, "pi")
    assert (damaged in said, "it may be deleted: the next backup writes it anew" in said) == (True, True)
    code, said = run("backup", bench.directory, tmp_path / "out")
    assert (code, damaged in said, listed(backup.beside(tmp_path / "out", LAB))) == (0, True, {"pi"})
    assert run("revoke", bench.directory, "other")[0] == 0
    assert listed(backup.beside(tmp_path / "out", LAB)) == {"pi", "other"}


def test_who_was_revoked_after_the_backup_stays_revoked_when_the_folder_is_gone(bench: Bench, tmp_path: Path) -> None:
    pi, _ = bench.join("pi"), bench.join("other")
    made = make_backup(bench, tmp_path / "out")
    bench.close()
    run("revoke", bench.directory, "pi", "--reason", "stolen")
    shutil.rmtree(bench.directory)
    code, said = run("restore", made, bench.directory)
    assert (code, "revoked after the backup, and again: pi" in said) == (0, True)
    again = Bench(bench.directory)
    (receipt,) = again.send(pi, ternary_block(again.schema, 1), 0)
    assert (receipt.outcome, receipt.reason) == ("revoked", "stolen")


def test_restore_takes_the_list_beside_an_older_backup_where_the_newest_has_none(bench: Bench, tmp_path: Path) -> None:
    bench.join("pi")
    make_backup(bench, tmp_path / "first")
    made = make_backup(bench, tmp_path / "second")
    bench.close()
    run("revoke", bench.directory, "pi")
    backup.beside(tmp_path / "second", LAB).unlink()
    (bench.directory / revocations.FILE).unlink()
    (bench.directory / LEDGER).unlink()
    code, said = run("restore", made, bench.directory)
    assert f"revocations were read from {backup.beside(tmp_path / 'first', LAB)}" in said
    assert (code, "revoked after the backup, and again: pi" in said) == (0, True)


def test_who_joined_and_was_revoked_after_the_backup_is_told_so(bench: Bench, tmp_path: Path) -> None:
    made = make_backup(bench, tmp_path / "out")
    late = bench.join("late")
    bench.close()
    run("revoke", bench.directory, "late")
    again, done = restored(made, bench.directory, force=True)
    assert done.revoked == ("late",)
    (receipt,) = again.send(late, ternary_block(again.schema, 1), 0)
    assert receipt.outcome == "revoked"
    again.invite("late", "another-code-of-an-invitation")
    (receipt,) = receipts(again.receive(late.topic("enroll"), late.enroll("another-code-of-an-invitation")))
    assert (receipt.outcome, "does not return" in receipt.reason) == ("refused", True)


def test_a_revocation_before_a_new_key_does_not_take_the_new_key(bench: Bench, tmp_path: Path) -> None:
    bench.join("pi")
    bench.revoke("pi")
    again = bench.join("pi")
    made = make_backup(bench, tmp_path / "out")
    bench.close()
    back, done = restored(made, tmp_path / "new")
    assert done.revoked == ()
    (receipt,) = back.send(again, ternary_block(back.schema, 1), back.version)
    assert receipt.outcome == "accepted"


def test_restore_says_that_it_found_no_list(bench: Bench, tmp_path: Path) -> None:
    made = make_backup(bench, tmp_path / "out")
    said = run("restore", made, tmp_path / "new")[1]
    assert "no list of revocations was found: revoke again who was revoked after the backup" in said


def test_restored_takes_the_list_beside_the_backups_or_says_that_there_is_none(bench: Bench, tmp_path: Path) -> None:
    bench.join("pi")
    made = make_backup(bench, tmp_path / "out")
    bench.close()
    alone = Path(shutil.copytree(made, tmp_path / "alone"))
    said = run("restored", alone)[1]
    assert "no list of revocations was found: revoke again who was revoked after the backup" in said
    run("revoke", bench.directory, "pi")
    by_hand = Path(shutil.copytree(made, tmp_path / "out" / "agg"))
    said = run("restored", by_hand)[1]
    assert f"revocations were read from {backup.beside(tmp_path / 'out', LAB)}" in said
    assert "revoked after the backup, and again: pi" in said
    assert Bench(by_hand).core.registry.members["pi"].revoked
    assert listed(by_hand / revocations.FILE) == {"pi"}


def test_a_folder_copied_back_by_hand_beside_its_list_takes_the_list(bench: Bench, tmp_path: Path) -> None:
    bench.join("pi")
    old = make_backup(bench, tmp_path / "out")
    bench.close()
    run("revoke", bench.directory, "pi")
    (bench.directory / LEDGER).write_bytes((old / LEDGER).read_bytes())
    with control.exclusive(bench.directory):
        pass
    assert Bench(bench.directory).core.registry.members["pi"].revoked


def test_a_list_only_grows_and_names_its_damaged_lines(bench: Bench, tmp_path: Path) -> None:
    bench.join("pi")
    bench.join("other")
    path = bench.directory / revocations.FILE
    bench.revoke("pi")
    path.write_text(path.read_text().replace('"pi"', '"pj"'))
    bench.revoke("other")
    found = revocations.read(path)
    assert {device for device, _ in found.keys} == {"pi", "other"}  # it is in the ledger too
    assert [json.loads(line)[0] for line in found.damaged] == ["pj"]
    for nonsense in ("[]", "{", "[1, 2, 3, 4, 5]", "[" * 100_000, '["a/b", "", "", 0, 0]'):
        assert revocations.Revocation.parse(nonsense) is None


# --- a folder that was copied back by hand


def test_a_device_that_names_a_newer_version_is_told_in_the_log_and_in_the_status(bench: Bench, tmp_path: Path) -> None:
    pi, other = bench.join("pi"), bench.join("other")
    made = make_backup(bench, tmp_path / "out")
    merge(bench, pi, other, times=3)
    bench.close()
    shutil.copy2(made / LEDGER, bench.directory / LEDGER)
    again = Bench(bench.directory)
    again.start()
    said = [logged(again.receive(pi.topic("status"), pi.status("training", 2, base=3)))]
    said.append(logged(again.receive(pi.topic("update"), *pi.update(ternary_block(again.schema, 1), 3))))
    command = f"ternbus aggregator restored {bench.directory}"
    assert all("names version 3, and the newest here is 0" in line and command in line for line in said)
    again.receive(other.topic("metrics"), other.metrics(2, "local", accuracy=0.5))
    again.tick(seconds=2.0)
    assert statuses.read(bench.directory)["claim"] == {"device": "other", "version": 2}
    assert command in run("status", bench.directory)[1]
    assert not any(isinstance(action, events.Stop) for action in again.last)  # a device's word stops nobody
    again.close()
    administration.restored(bench.directory, "test", 0.0)
    assert statuses.read(bench.directory)["claim"] is None


def test_a_version_that_no_aggregator_comes_to_is_called_a_lie_and_asks_for_no_restore(bench: Bench) -> None:
    pi = bench.join("pi")
    said = logged(bench.receive(pi.topic("status"), pi.status("training", 2, base=COUNTER_MAX)))
    bench.tick(seconds=2.0)
    for text in (said, run("status", bench.directory)[1]):
        assert f"pi names version {COUNTER_MAX}, " in text
        assert "the device lies or errs" in text
        assert "restored" not in text


def test_devices_that_have_nothing_to_send_tell_a_copied_folder_of_it_through_an_empty_broker(
    bench: Bench, tmp_path: Path
) -> None:
    """The device is a real core. It drops the old head, and would otherwise be idle without a word."""
    pi, one, other = (bench.join(name) for name in ("pi", "one", "other"))
    made = make_backup(bench, tmp_path / "out")
    merge(bench, one, other, times=3)
    own = profile(federation=LAB, identity=pi.identity, aggregator_public=bench.identity.public, tensors=SHAPES)
    device = CoreDevice(Core(own, State(key=own.key, enrolled=True)))

    def meet(aggregator: Bench) -> str:
        """Each hears the other over a broker that holds only what this aggregator published; what it logs."""
        aggregator.start()
        aggregator.tick(seconds=10.0)  # until then it waits for a newer head of its own
        device.wait(100)
        done = device.connect()
        done += device.arrive(
            *((topic, aggregator.retained[topic]) for topic in (topics.status(LAB), topics.head(LAB)))
        )
        sent = [action for action in done if isinstance(action, Publish)]
        said = [logged(aggregator.receive(action.topic, action.payload)) for action in sent]
        device.handle(edge_events.Disconnected(reason="gone"))
        aggregator.tick(seconds=2.0)
        return " ".join(said)

    device.handle(edge_events.Started())
    assert "restored" not in meet(bench)
    bench.close()
    shutil.copy2(made / LEDGER, bench.directory / LEDGER)
    again = Bench(bench.directory)
    assert "pi names version 3, and the newest here is 0" in meet(again)
    assert statuses.read(bench.directory)["claim"] == {"device": "pi", "version": 3}
    status = again.core.registry.members["pi"].status
    assert status is not None
    assert status.state == "idle"  # it is not taken for one that trains
    again.close()
    administration.restored(bench.directory, "test", 0.0)
    third = Bench(bench.directory)
    assert "restored" not in meet(third)
    assert device.core.state.head_version == third.version == RESTORE_LEAP
    assert statuses.read(bench.directory)["claim"] is None
    third.close()


def logged(actions: list[events.Action]) -> str:
    return " ".join(action.text for action in actions if isinstance(action, events.Log))
