"""The health of a federation with private sums: helpers that are away or refuse, and too few devices."""

import sqlite3
import time
from contextlib import closing

import pytest

from support.set_world import World
from ternbus.aggregator.core import events
from ternbus.aggregator.core.health import Health
from ternbus.aggregator.shell import administration, examination
from ternbus.aggregator.store import control, set_rows
from ternbus.aggregator.store.schema import DROPPED, SCHEMA_SQL


def _health(world: World, monkeypatch: pytest.MonkeyPatch) -> Health:
    """As a status command sees it beside the process."""
    world.handle(events.CountsRequested())
    monkeypatch.setattr(administration, "flush_counts", lambda _: None)
    monkeypatch.setattr(control, "is_running", lambda _: True)
    return examination.look(world.directory).health


def _wrong(health: Health) -> list[tuple[str, str]]:
    """Of private sums: in this world devices say nothing of themselves."""
    return [(each.kind, each.text) for each in health.findings if each.kind in {"helpers", "dropped", "held"}]


def test_a_helper_that_is_away_is_named_though_nothing_waits_for_it_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World("h-1", "h-2")
    devices = world.begin()
    world.give_all(devices)
    world.settle()
    assert _wrong(_health(world, monkeypatch)) == []
    world.cut_helper("h-2")
    assert _wrong(_health(world, monkeypatch)) == [
        (
            "helpers",
            "private updates wait for the helper h-2: it is offline; its operator starts it: ternbus helper run",
        )
    ]


def test_a_helper_that_has_admitted_nobody_is_named_until_a_sum_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(roster="own")
    devices = world.begin()
    world.give_all(devices)
    world.settle()
    ((kind, text),) = _wrong(_health(world, monkeypatch))
    assert kind == "dropped"
    assert text.startswith("the newest private updates were dropped: refused: helper h-1: not-admitted: the update of")
    assert text.endswith("; its operator lets devices in: ternbus helper admit")
    for device in devices:
        world.helpers["h-1"].records.admit(device.name, device.identity.public)
        world.say(device, "idle", 0)
    world.tick(1000.0)  # a version of no update lets them train again
    world.give_all(devices)
    world.settle()
    assert len(world.merged()) == len(devices)
    assert _wrong(_health(world, monkeypatch)) == []


def test_devices_whose_updates_were_dropped_have_sent_and_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the next version of no update, which is not made at once a second time."""
    world = World(roster="own")
    devices = world.begin()
    for base in (0, 1):
        assert world.version == base
        for device in devices:
            world.say(device, "idle", base)
        assert _health(world, monkeypatch).waits_for == tuple(each.name for each in devices)
        world.give_all(devices)
        world.settle()
    assert (world.version, len(world.dropped())) == (1, 6)
    assert [kind for kind, _ in _wrong(_health(world, monkeypatch))] == ["dropped"]
    assert _health(world, monkeypatch).waits_for == ()


def test_updates_of_too_few_devices_for_a_sum_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.give_all(world.begin(4)[:2])
    later = time.time() + 1000.0
    monkeypatch.setattr(time, "time", lambda: later)
    text = "2 updates of 2 devices wait: a version has updates of 3 devices or more (private.min)"
    assert _wrong(_health(world, monkeypatch)) == [("held", text)]


@pytest.mark.parametrize("first", [True, False])
def test_a_device_that_one_helper_refuses_is_named_whenever_its_update_came(first: bool) -> None:
    refused = [("d", DROPPED, "refused: helper h-1: not-admitted: the update of d")]
    merged = [(device, 8, "") for device in "abc"]
    rows = refused + merged if first else merged + refused
    with closing(sqlite3.connect(":memory:")) as db:
        db.executescript(SCHEMA_SQL)
        for number, (device, version, why) in enumerate(rows):
            row = (number, device, b"k", 1, 7, b"", 0, 1, 1.0, "private", "raw", 0.0, version)
            names = (
                "id, device, key, seq, base, digest, staleness, samples, discount, codec, encoding, received_at, merged"
            )
            db.execute(f"INSERT INTO updates ({names}) VALUES ({', '.join('?' * len(row))})", row)
            if why:
                names = "update_id, context, header, signature, min, why"
                db.execute(f"INSERT INTO private_updates ({names}) VALUES (?, x'', x'', x'', 3, ?)", (number, why))
        assert set_rows.status(db)["refused"] == refused[0][2]
