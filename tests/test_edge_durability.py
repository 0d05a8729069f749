"""Which saves of a device are durable, and that a cut of the power takes none but those that it is told again."""

import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crash.federation import preload_in
from support.core_device import (
    DEVICE,
    aggregator,
    connected,
    following,
    of,
    only,
    sending,
    trained,
    update_in,
)
from support.durable_saves import ANSWERED, KEY, SAVES, SCHEMA, WAITING, an_update
from ternbus.edge.core import events
from ternbus.edge.core.actions import Save, StartTraining
from ternbus.edge.core.state import ANSWERED as RECEIVED
from ternbus.edge.core.state import HEARD, PrivatePart, State
from ternbus.edge.plan.privacy import Account, Cost
from ternbus.edge.store.outbox import FILE, Outbox

CHANGED: dict[str, Any] = {
    "key": bytes(8), "enrolled": False, "seq_limit": 99, "session": 9, "head_version": 6, "head_seq": 60,
    "head_digest": b"h", "answered_base": 5, "evaluated": 6, "accepted": 5, "receipt_seq": 61, "schema": b"s",
    "residual": np.ones(SCHEMA.elements, np.float32), "outstanding": an_update(8), "local": b"l",
    "protected": "device", "account": Account(spent=(Cost(kind="device", noise=1.0, rate=1.0, steps=1),)), "left": 5,
    "cards": {b"c": 1}, "refusal": "no", "statistics": None,
}  # fmt: skip


# -- what a state tells


@pytest.mark.parametrize("name", [each.name for each in fields(State)])
def test_a_change_of_anything_but_what_a_message_says_again_is_durable(name: str) -> None:
    assert replace(WAITING, **{name: CHANGED[name]}).tells_more_than(WAITING) == (name not in HEARD)
    assert not WAITING.tells_more_than(WAITING)


@pytest.mark.parametrize("name", [each.name for each in fields(State) if each.name != "outstanding"])
def test_the_receipt_of_an_update_that_is_on_disk_is_told_again_with_all_its_effects(name: str) -> None:
    assert replace(ANSWERED, **{name: CHANGED[name]}).tells_more_than(WAITING) == (name not in HEARD | RECEIVED)


def test_where_no_update_is_on_disk_nothing_says_its_effects_again() -> None:
    assert replace(ANSWERED, accepted=2).tells_more_than(ANSWERED)
    assert WAITING.tells_more_than(ANSWERED)


def test_another_number_of_an_update_is_durable() -> None:
    private = PrivatePart(terms=b"t", context=bytes(32), min=5, seeds=(bytes(32),))
    assert replace(WAITING, outstanding=replace(an_update(), private=private)).tells_more_than(WAITING)


# -- what a device does


def durable(actions: list[Any]) -> list[bool]:
    return [save.durable for save in of(actions, Save)]


def test_of_the_way_of_an_update_one_save_is_durable() -> None:
    scripted, device = following()
    scripted.advance()
    stored = device.handle(trained(only(device.actions, StartTraining)))
    frame = update_in(stored)
    assert durable(stored) == [True]
    assert durable(device.arrive(scripted.receipt(DEVICE, KEY, frame.seq, "accepted"))) == [False]
    assert durable(device.arrive(*scripted.delta(1), scripted.head())) == [False]


@pytest.mark.parametrize("outcome", ["accepted", "stale", "duplicate", "invalid"])
def test_the_receipt_that_a_power_cut_took_comes_again_and_has_the_same_effect(outcome: str) -> None:
    scripted, device, frame = sending()
    waiting = device.disk
    receipt = scripted.receipt(DEVICE, KEY, frame.seq, outcome)
    assert durable(device.arrive(receipt)) == [False]
    answered, device.disk = device.disk, waiting
    again = device.restarted()
    again.connect()
    sent = again.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
    assert update_in(sent).header == frame.header
    again.arrive(scripted.receipt(DEVICE, KEY, frame.seq, outcome))
    assert answered is not None
    assert again.disk is not None
    assert again.disk.outstanding is None
    assert (again.disk.accepted, again.disk.answered_base) == (answered.accepted, answered.answered_base)
    residuals = [None if each.residual is None else each.residual.tobytes() for each in (again.disk, answered)]
    assert residuals[0] == residuals[1]


def test_what_makes_numbers_sessions_and_membership_is_durable() -> None:
    device = connected(state={"enrolled": False}, code="c" * 32)
    assert durable(device.actions) == [True]  # a session, and a block of numbers for its last will
    scripted = aggregator()
    device.arrive(scripted.status())
    enrolled = device.arrive(scripted.receipt(DEVICE, KEY, 1, "enrolled"))
    assert durable(enrolled)[0]
    scripted, device, frame = sending()
    behind = scripted.receipt(DEVICE, KEY, frame.seq, "duplicate", highest_seq=frame.seq + 100)
    assert durable(device.arrive(behind)) == [True]  # the update has another number
    device.handle(events.Disconnected(reason="gone"))
    assert durable(device.wait(60.0)) == [True]


# -- what is on the disk


def numbers(state: State) -> tuple[int, ...]:
    return (
        state.head_version, state.head_seq, state.receipt_seq, state.accepted, state.answered_base, state.seq_limit,
        -1 if state.outstanding is None else state.outstanding.seq,
    )  # fmt: skip


def test_a_cut_of_the_power_leaves_a_beginning_of_what_was_saved_since_the_durable_save(tmp_path: Path) -> None:
    """SQLite's log is written in order and has checksums: wherever it ends on disk, whole saves are read."""
    home = tmp_path / "home"
    home.mkdir()
    log = home / f"{FILE}-wal"
    with Outbox(home, KEY) as outbox:
        outbox.save(*SAVES[0][:2], {})
        synced = log.stat().st_size
        for state, answered, durable in SAVES[1:-1]:
            outbox.save(state, answered, {}, durable=durable)
        content, store = log.read_bytes(), (home / FILE).read_bytes()
    assert len(content) > synced
    found = []
    for number, size in enumerate([*range(synced, len(content), 1000), len(content)]):
        cut = tmp_path / str(number)
        cut.mkdir()
        (cut / FILE).write_bytes(store)
        torn = content[:size] + bytes(len(content) - size)  # a file may have got its length before its content
        (cut / f"{FILE}-wal").write_bytes(torn if number % 2 else content[:size])
        with Outbox(cut, KEY) as outbox:
            found.append([numbers(state) for state, _, _ in SAVES].index(numbers(outbox.state)))
    assert found == sorted(found)
    assert set(found) == {0, 1, 2, 3}


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_no_other_save_waits_for_the_disk(tmp_path: Path) -> None:
    """On a disk whose syncs fail, from the first or a later one on, only durable saves fail, and each of them does."""
    preload = preload_in(tmp_path, "cc")
    failed = []
    for first in range(1, 20):
        home = tmp_path / f"home-{first}"
        home.mkdir()
        with Outbox(home, KEY):
            pass
        environment = {"LD_PRELOAD": str(preload), "FAILING_DISK": f"unsynced:{first}:{home}"}
        environment["PYTHONPATH"] = str(Path(__file__).parent)
        command = [sys.executable, "-m", "support.durable_saves", str(home)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        if not done.stdout:
            break
        failed.append(int(done.stdout))
    assert set(failed) == {0, 4}
    assert failed == sorted(failed)
