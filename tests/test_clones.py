"""Two machines with one device's key are named at both ends; a device that comes back in an honest way is not."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.core_device import DEVICE, DEVICE_KEY, logged, of, sending, update_in
from support.core_device import Device as CoreDevice
from support.scripted_aggregator import ScriptedAggregator
from support.small_world import LAB, Bench, Device, make_directory, scratch, ternary_block
from ternbus.aggregator.core import events
from ternbus.aggregator.core.clones import WITHIN_S
from ternbus.aggregator.shell.status_text import summary
from ternbus.aggregator.store import status as statuses
from ternbus.broker.backoff import CUT_SHORT
from ternbus.broker.protocol.identity import KeyId
from ternbus.edge.core import events as edge_events
from ternbus.edge.core.actions import Log
from ternbus.edge.core.foreign_numbers import CERTAIN, cloned_counter
from ternbus.edge.core.state import State
from ternbus.edge.store import outbox
from ternbus.edge.store.outbox import Outbox

Make = Callable[..., Bench]


# The aggregator


def connect(bench: Bench, device: Device, session: int) -> list[str]:
    """A machine of the device begins a session on the newest version, taking its last will's number first."""
    device.next_seq()
    return lines(bench.receive(device.topic("status"), device.status("training", session, base=bench.version)))


def advance(bench: Bench, other: Device) -> None:
    """Another device's update makes a version."""
    before = bench.version
    assert bench.send(other, ternary_block(bench.schema, before), before)[0].outcome == "accepted"
    assert bench.version == before + 1


def lines(actions: Iterable[Any]) -> list[str]:
    return [action.text for action in actions if isinstance(action, events.Log) and "use the key of" in action.text]


def clone_of(device: Device) -> Device:
    return Device(device.name, device.schema, device.identity, device.seq)


def mark(bench: Bench) -> int:
    bench.tick(1.0)
    found = statuses.read(bench.directory)["devices"]["pi"]["cloned"]
    assert isinstance(found, int)
    return found


def test_two_machines_whose_numbers_rise_before_they_train_are_told_apart_by_their_sessions(make: Make) -> None:
    """An update waits on each, and its answer raises the number above the other's before a training says the version.

    The first began an hour before the second. Each status before that answer is idle, so it names no version.
    """
    bench = make(merge__buffer_size=1)
    pi, other = bench.join("pi"), bench.join("other")
    twin = clone_of(pi)
    said: list[str] = []
    for turn in range(8):
        for machine, session in ((pi, 1000 + turn), (twin, 3_600_000 + turn)):
            advance(bench, other)
            bench.receive(machine.topic("status"), machine.status("idle", session))
            machine.seq = max(pi.seq, twin.seq)
            status = machine.status("training", session, base=bench.version)
            said += lines(bench.receive(machine.topic("status"), status))
    (line,) = said
    assert "two machines use the key of pi" in line
    numbers = re.search(r"now (\d+) in session (\d+), after (\d+) and (\d+)", line)
    assert numbers is not None
    seq, session, seq_before, session_before = map(int, numbers.groups())
    assert (seq > seq_before, session < session_before) == (True, True)
    assert mark(bench) == 2


@pytest.mark.parametrize("ahead", [1, 1000])
def test_two_machines_that_take_turns_are_named_once_and_marked(make: Make, ahead: int) -> None:
    """In step, or with one of them far behind."""
    bench = make(merge__buffer_size=1)
    pi, other = bench.join("pi"), bench.join("other")
    twin = clone_of(pi)
    pi.seq += ahead
    said: list[str] = []
    for session in range(2, 12):
        said += connect(bench, pi, session + ahead)
        advance(bench, other)
        said += connect(bench, twin, session)
        bench.tick(20.0)
    (line,) = said
    assert "two machines use the key of pi: it signs lower sequence numbers or sessions after higher" in line
    assert f"ternbus aggregator revoke {bench.directory} pi" in line
    assert mark(bench) == 3
    text = summary(statuses.read(bench.directory))
    assert "pi: two machines use its key; revoke it, and invite each machine by its own name" in text
    assert ", cloned?" in text
    assert "cloned" not in str(statuses.read(bench.directory)["counts"])
    pi = bench.join("pi")  # under a fresh key
    assert mark(bench) == 0


def test_a_device_that_restarts_crashes_and_reconnects_is_no_clone(make: Make) -> None:
    bench = make(merge__buffer_size=1)
    pi, other = bench.join("pi"), bench.join("other")
    for session in range(1, 30):
        assert connect(bench, pi, session) == []
        will = pi.seq - 1
        for state in ("training", "idle"):
            payload = pi.status(state, session, base=bench.version if state == "training" else -1)
            assert lines(bench.receive(pi.topic("status"), payload, payload)) == []  # delivered twice
        bench.receive(pi.topic("status"), pi.status("offline", session, seq=will))
        pi.seq += 64 * (session % 3)  # a crash skips the rest of a block
        advance(bench, other)
        if session % 10 == 0:
            bench.connect()
    assert mark(bench) == 0


def test_a_folder_restored_from_an_old_copy_is_no_clone(make: Make) -> None:
    """Its numbers go back, once, and then rise above all before; without a clock its sessions go back too."""
    bench = make(merge__buffer_size=1)
    pi, other = bench.join("pi"), bench.join("other")
    for session in range(1, 40):
        if session % 10 == 0:
            pi.seq = 2
        pi.seq += session % 10 * session
        assert connect(bench, pi, session if session < 20 else session - 15) == []
        advance(bench, other)
        bench.tick(WITHIN_S / 10)
    assert mark(bench) == 0


REPLAYS = st.lists(st.tuples(st.integers(0, 400), st.booleans(), st.booleans()), min_size=20, max_size=60)


@settings(max_examples=30)
@given(orders=REPLAYS, restored_at=st.none() | st.integers(0, 20), has_clock=st.booleans())
def test_no_broker_makes_one_machine_look_like_two(
    orders: list[tuple[int, bool, bool]], restored_at: int | None, has_clock: bool
) -> None:
    """It delivers what the machine ever signed, in any order, as often as it likes; also once a folder is restored.

    Where the machine's clock is wrong then, its sessions go back too, and its numbers rise above all by an answer.
    """
    bench = Bench(make_directory(scratch() / "aggregator", merge__buffer_size=1))
    bench.start()
    pi, other = bench.join("pi"), bench.join("other")
    signed: list[bytes] = []
    for turn, (chosen, makes_version, is_delivered) in enumerate(orders):
        if turn == restored_at:
            pi.seq = 1 if has_clock else pi.seq + 10
        session = turn if restored_at is None or turn < restored_at or has_clock else turn - restored_at
        if makes_version:
            advance(bench, other)
        pi.next_seq()
        signed.append(pi.status(("training", "idle")[chosen % 2], session, base=bench.version))
        if is_delivered or restored_at is not None:  # else it is held back, perhaps until later
            bench.receive(pi.topic("status"), signed[-1])
        bench.receive(pi.topic("status"), signed[chosen % len(signed)])
    assert mark(bench) == 0
    bench.close()


def test_an_aggregator_whose_connections_are_cut_short_guesses_at_another_of_its_name(make: Make) -> None:
    bench = make()
    (part,) = bench.core.awaited
    bench.handle(events.Published(topic=part))
    said: list[str] = []
    for _ in range(3 * CUT_SHORT):
        said += [action.text for action in bench.handle(events.Disconnected()) if isinstance(action, events.Log)]
        bench.dial()
        bench.handle(events.Connected(frame_bytes=120 * 1024))
    (line,) = said
    assert f"another client with this name, 'aggregator-{LAB}'" in line
    assert "too large a message" not in line


# The device


def behind(scripted: ScriptedAggregator, device: CoreDevice, seq: int, highest: int) -> list[Any]:
    return device.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, seq, "duplicate", highest_seq=highest))


def test_a_device_whose_numbers_are_used_by_another_machine_says_so_once() -> None:
    scripted, device, frame = sending()
    events_logged: list[str] = []
    for turn in range(2 * CERTAIN):
        done = behind(scripted, device, frame.seq, frame.seq + 100)
        frame = update_in(done)
        events_logged += logged(done)
        assert ("cloned" in events_logged) == (turn >= CERTAIN - 1)
    assert events_logged.count("cloned") == 1
    (log,) = [log for log in of(device.actions, Log) if log.event == "cloned"]
    assert f"another machine uses the key of {DEVICE}" in log.text


def test_a_restored_folder_is_not_taken_for_another_machine() -> None:
    """An answer of before waits at the broker; then the counter is raised, once."""
    scripted, device, frame = sending()
    key = DEVICE_KEY.key_id
    device.arrive(scripted.receipt(DEVICE, key, 5000, "accepted"), scripted.receipt(DEVICE, key, 4990, "accepted"))
    frame = update_in(behind(scripted, device, frame.seq, 5001))
    for _ in range(CERTAIN):
        behind(scripted, device, frame.seq - 1, frame.seq)  # its own numbers, late
        device.arrive(scripted.receipt(DEVICE, b"k" * 8, 9000, "accepted"))  # another key's
    assert "cloned" not in logged(device.actions)


def test_a_device_whose_connections_are_cut_short_guesses_at_another_of_its_name() -> None:
    _, device, _ = sending()
    for _ in range(3 * CUT_SHORT):
        device.handle(edge_events.Disconnected(reason="gone"))
        device.now = device.core._reconnect.due_s
        device.handle(edge_events.TimeReached())
        device.connect()
    (log,) = [log for log in of(device.actions, Log) if log.event == "contested"]
    assert f"another client with this name, {DEVICE!r}" in log.text


def test_the_mark_in_a_device_s_folder_is_of_its_present_key(tmp_path: Path) -> None:
    key = DEVICE_KEY.key_id
    with Outbox(tmp_path, key) as kept:
        kept.save(State(key=key), None, {cloned_counter(key): 1})
        assert outbox.summary(tmp_path).is_cloned
        kept.save(State(key=KeyId(b"renewed!")), None, {})
        assert not outbox.summary(tmp_path).is_cloned
