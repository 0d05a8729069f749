"""What the ledger keeps of private sums: restarts, restores, lost helpers, damage, and what commands show of it."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from support.set_world import World, content_of
from support.small_world import Bench, make_directory, receipts, scratch
from ternbus.aggregator import settings as configuration
from ternbus.aggregator.core import events
from ternbus.aggregator.shell import administration, log, repairing
from ternbus.aggregator.store import membership, private_status, recovery, soundness, status
from ternbus.aggregator.store.revocations import Revocation
from ternbus.broker.errors import CorruptError
from ternbus.broker.protocol.merge_log import Entry, unpack
from ternbus.broker.protocol.messages import PRIVATE, Update
from ternbus.broker.sums.masks import BOX_BYTES
from ternbus.broker.sums.sets import ABANDONED, PREPARED, REFUSED, Answer
from ternbus.command import main
from ternbus.lab.virtual.memory_ledger import MemoryLedger


def ternbus(arguments: list[str]) -> object:
    with pytest.raises(SystemExit) as done:
        main(arguments)
    return done.value.code


def held_at(step: str, *helpers: str, **settings: Any) -> tuple[World, list[Any]]:
    """A world in which no ask of this step reaches a helper."""
    world = World(*helpers, **settings)
    devices = world.begin()
    world.lose = lambda topic: topic.endswith("/ask") and world.asked[-1][1] == step
    world.give_all(devices)
    world.settle()
    return world, devices


def go_on(world: World) -> None:
    world.lose = lambda topic: False
    world.tick(400.0)
    world.settle()


@pytest.mark.parametrize("step", ["prepare", "open"])
def test_a_set_in_flight_survives_a_restart_and_is_asked_for_again(step: str) -> None:
    world, devices = held_at(step, "h-1", "h-2")
    world.restart()
    assert [name for name, asked in world.asked[-2:] if asked == step] == ["h-1", "h-2"]
    go_on(world)
    assert world.merged().keys() == {(each.name, each.seq) for each in devices}


def test_an_abandoned_set_is_abandoned_again_after_a_restart_until_every_helper_has_answered() -> None:
    world = World("h-1", "h-2")
    devices = world.begin(6)
    world.down.add("h-2")
    world.give_all(devices)
    world.settle()
    world.revoke(devices[0].name)
    world.settle()
    world.restart()
    assert sorted(world.states()) == ["abandoned", "made"]
    steps = world.asked[-4:]
    assert ("h-2", "abandon") in steps
    assert ("h-2", "prepare") not in steps[steps.index(("h-2", "abandon")) :]  # one thing after the other
    world.settle()
    world.down.clear()
    go_on(world)
    assert world.states() == []
    assert len(world.merged()) == 5


def test_a_helper_that_cannot_abandon_a_set_any_more_is_not_asked_for_ever() -> None:
    world, devices = held_at("prepare")
    world.revoke(devices[0].name)
    (digest,) = world.ledger.db.execute("SELECT digest FROM sets WHERE state = 'abandoned'").fetchone()
    world.say_as("h-1", Answer(outcome=PREPARED, set=digest, count=1))  # from before
    assert "abandoned" in world.states()
    world.say_as("h-1", Answer(outcome=REFUSED, set=digest, count=1, reason="opened"))
    assert "abandoned" not in world.states()


def test_answers_to_what_was_not_asked_change_nothing() -> None:
    world, _ = held_at("prepare", "h-1", "h-2")
    (digest,) = world.ledger.db.execute("SELECT digest FROM sets").fetchone()
    world.say_as("h-1", Answer(outcome=ABANDONED, set=digest, count=1))
    world.say_as("h-1", Answer(outcome=PREPARED, set=digest, count=1))
    world.say_as("h-1", Answer(outcome=PREPARED, set=digest, count=1))
    assert world.states() == ["made"]
    world.say_as("h-2", Answer(outcome=PREPARED, set=digest, count=1))
    assert world.states() == ["opening"]
    world.say_as("h-2", Answer(outcome=PREPARED, set=digest, count=1))
    assert world.states() == ["opening"]


def test_a_sum_that_is_known_is_merged_after_a_restart() -> None:
    world = World(merge__buffer_size=3, merge__max_wait_s=1000.0)
    devices = world.begin(6)
    world.give_all(devices[:3])
    world.lose = lambda topic: topic.endswith("/ask")
    world.give_all(devices[3:])
    world.settle()
    (first,) = world.ledger.db.execute("SELECT digest FROM sets ORDER BY rowid LIMIT 1").fetchone()
    world.lose = lambda topic: topic.endswith("/ask") and first not in world.published[-1].payload
    world.tick(20.0)
    world.settle()
    assert world.states() == ["opened", "made"]
    world.restart()
    assert world.version == 0
    world.lose = lambda topic: False
    world.tick(1001.0)
    world.settle()
    assert len(world.merged()) == 6
    target = world.core.model.server.target
    world.restart()
    assert np.array_equal(world.core.model.server.target, target)


def test_a_start_adds_the_sets_of_a_version_in_the_order_of_its_merge() -> None:
    """A sum of floats has another last bit in another order, and the rows of the sets lie in that of their opening."""
    world = World(merge__buffer_size=3, merge__max_wait_s=1000.0, private__samples=100.0)
    devices = world.begin(9)
    world.lose = lambda topic: topic.endswith("/ask")
    for number, device in enumerate(devices):
        content = content_of(world.terms_of[0], device.name, weight=100 + 17 * number)
        assert world.give(device, 0, content).outcome == "accepted"
    world.settle()
    made = [digest for (digest,) in world.ledger.db.execute("SELECT digest FROM sets ORDER BY rowid")]
    assert len(made) == 3
    go_on(world)
    (merged,) = [entry.sets for entry in world.entries() if entry.sets]
    assert sorted(each.digest for each in merged) == sorted(made)
    with world.ledger.db as db:
        db.execute("UPDATE sets SET rowid = -rowid")
    target = world.core.model.server.target
    world.restart()
    assert np.array_equal(world.core.model.server.target, target)


def test_an_answer_may_come_in_parts() -> None:
    world = World(model={"w": np.ones((60, 100), np.float32)})
    devices = world.begin()
    helper = world.helpers["h-1"]
    helper.core._frame_bytes = 2048
    world.give_all(devices)
    world.settle()
    assert world.version == 1


def without(world: World, helper: str) -> None:
    """The operator takes a helper out of aggregator.toml, and restarts."""
    settings = administration.load_settings(world.directory)
    private = settings.private
    assert private is not None
    left = {name: key for name, key in private.helpers.items() if name != helper}
    changed = replace(settings, private=replace(private, helpers=left))
    (world.directory / administration.TOML).write_text(configuration.dumps(changed))


@pytest.mark.parametrize("step", ["prepare", "open"])
def test_a_set_of_a_helper_that_the_operator_takes_out_is_dropped(step: str) -> None:
    world, devices = held_at(step, "h-1", "h-2")
    without(world, "h-2")
    world.down.add("h-2")
    world.restart()
    go_on(world)
    assert world.version > 0
    base = world.version
    world.give_all(devices, base)
    go_on(world)
    assert len(world.merged()) == 6
    assert set(world.dropped().values()) == {"helper-lost: h-2 is no helper of this federation any more"}
    assert world.states() == []


def test_a_set_that_nobody_can_be_told_to_abandon_is_forgotten_at_the_start() -> None:
    world, devices = held_at("prepare", "h-1", "h-2")
    world.revoke(devices[0].name)
    world.lose = lambda topic: False
    world.down.add("h-2")
    world.tick(20.0)
    world.settle()
    assert "abandoned" in world.states()
    without(world, "h-2")
    world.restart()
    assert "abandoned" in world.states()  # of the set that its helper is lost to
    go_on(world)
    assert world.states() == []


def test_a_restored_ledger_makes_sets_of_what_suffices_and_drops_the_rest() -> None:
    world = World(merge__buffer_size=10)
    devices = world.begin(7)
    world.give_all(devices[:5])
    world.close()
    administration.restored(world.directory, "test", 1.8e9)
    world.recover()
    assert world.version >= 2**32
    assert world.states() == ["made"]
    world.now += 1000.0
    world.start()
    go_on(world)
    assert world.merged().keys() == {(each.name, each.seq) for each in devices[:5]}
    (merged,) = [each for entry in world.entries() for each in entry.sets]
    assert (merged.base, merged.weight) == (0, 1.0)  # not as stale as the leap makes it
    base = world.version
    world.give_all(devices[:2], base)
    world.close()
    administration.restored(world.directory, "test", 1.9e9)
    world.recover()
    assert world.dropped().keys() == {(each.name, each.seq) for each in devices[:2]}
    assert log.verify_ledger(world.ledger, world.identity.public, None).faults == []


@pytest.mark.parametrize(("step", "stays"), [("", False), ("prepare", False), ("open", True)])
def test_a_key_that_another_copy_knows_to_be_revoked_is_dropped_at_the_start(step: str, *, stays: bool) -> None:
    if step:
        world, devices = held_at(step)
    else:
        world = World(merge__buffer_size=10)
        devices = world.begin()
        world.give_all(devices)
    with world.ledger.transaction():
        known = Revocation(device=devices[0].name, public=devices[0].identity.public)
        membership.take_revocations(world.ledger.db, [known], 0.0)
    world.restart()
    go_on(world)
    assert len(world.merged()) == (6 if stays else 5)
    assert list(world.dropped().values()) == ([] if stays else ["revoked"])
    assert list(soundness.faults(world.ledger, world.identity.public)) == []


# --- damage


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("UPDATE sets SET sum = zeroblob(8)", "the sum of a set on version 0"),
        ("UPDATE sets SET base = 7", "the context of private updates on version 7"),
        ("DELETE FROM sets", "names other sets than those of version 1"),
    ],
)
def test_a_sum_that_is_not_as_it_was_written_stops_the_start(
    statement: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World()
    world.give_all(world.begin())
    world.settle()
    world.ledger.db.execute(statement)
    monkeypatch.setattr(soundness, "check_start", lambda *_: None)
    with pytest.raises(CorruptError, match=what):
        recovery.recover(world.ledger, administration.load_settings(world.directory), world.identity, "test")


def test_a_set_whose_members_are_lost_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    world, _ = held_at("prepare")
    world.ledger.db.execute("DELETE FROM private_updates WHERE update_id = 1")
    monkeypatch.setattr(soundness, "check_start", lambda *_: None)
    with pytest.raises(CorruptError, match="is not as it was made"):
        recovery.recover(world.ledger, administration.load_settings(world.directory), world.identity, "test")


@pytest.mark.parametrize(
    ("step", "statement", "merged", "reasons"),
    [
        ("prepare", "UPDATE private_updates SET min = 7 WHERE update_id = 1", 5, {"damaged"}),
        ("open", "UPDATE private_updates SET min = 7 WHERE update_id = 1", 0, {"damaged"}),
        ("prepare", "", 5, {"damaged"}),  # a body
        ("open", "", 0, {"damaged"}),
        ("open", "UPDATE sets SET devices = 7", 6, set()),  # the same set is made again
        ("prepare", "UPDATE contexts SET plan = zeroblob(32)", 0, {"damaged"}),
        ("prepare", "UPDATE counts SET value = 7", 6, set()),
        ("open", "UPDATE counts SET value = 7", 6, set()),
    ],
)
def test_a_repaired_ledger_has_no_set_that_lacks_a_part(
    step: str, statement: str, merged: int, reasons: set[str]
) -> None:
    world, _ = held_at(step)
    world.handle(events.CountsRequested())
    world.ledger.db.execute("INSERT OR IGNORE INTO counts VALUES ('busy', 1, 0)")
    world.ledger.db.execute(statement)
    world.close()
    if not statement:
        (body,) = (world.directory / "bodies").iterdir()
        body.write_bytes(b"?" + body.read_bytes()[1:])
    repairing.repair(world.directory, clock_s=1.8e9)
    world.recover()
    assert list(soundness.faults(world.ledger, world.identity.public)) == []
    world.now += 1000.0
    world.start()
    go_on(world)
    base = world.version
    world.give_all(list(map(world.member, ("a", "b", "c"))), base)  # an entry in the log names what was dropped
    go_on(world)
    found = {reason.partition(":")[0] for reason in world.dropped().values()}
    assert (len(world.merged()) - 3, found) == (merged, reasons)
    assert len(world.merged()) + len(world.dropped()) == 9
    world.restart()


# --- what commands show


def test_the_status_says_who_waits_for_whom(capsys: pytest.CaptureFixture[str]) -> None:
    world = World("h-1", "h-2", staleness__max=0)
    devices = world.begin(8)
    world.down.add("h-2")
    world.give_all(devices[:6])
    world.settle()
    world.give_all(devices[6:])
    world.handle(events.CountsRequested())
    found = private_status.read(world.directory, administration.load_settings(world.directory))["private"]
    (digest,) = world.ledger.db.execute("SELECT digest FROM sets").fetchone()
    assert found["groups"] == [{"base": 0, "updates": 2}]
    assert found["sets"] == [
        {"set": digest.hex(), "base": 0, "devices": 6, "state": "made", "waits_for": ["h-2"]}
    ]  # fmt: skip
    world.handle(events.StateRequested(state="closed"))
    world.close()
    assert ternbus(["aggregator", "status", str(world.directory)]) == 0
    text = capsys.readouterr().out
    assert "the federation closes when the helpers have answered" in text
    assert "a set of 6 updates on version 0 is made, waits for h-2" in text
    assert "private updates dropped so far: 2 below-min" in text
    world.recover()
    world.down.clear()
    world.start()
    go_on(world)
    world.close()
    assert ternbus(["aggregator", "status", str(world.directory), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["private"]["sets"], found["private"]["closing"], found["state"]) == ([], False, "closed")
    assert (found["counts"]["merged"], found["counts"]["dropped"]) == (6, 2)


def test_the_log_shows_sets_and_what_was_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    world = World(roster="own")
    devices = world.begin()
    for device in devices[1:]:
        world.helpers["h-1"].records.admit(device.name, device.identity.public)
    world.give_all(devices)
    world.settle()
    world.close()
    show = ["aggregator", "log", "show", str(world.directory)]
    assert ternbus(show) == 0
    text = capsys.readouterr().out
    assert "5 updates" in text
    assert "dropped: refused: helper h-1: not-admitted" in text
    assert ternbus([*show, "--device", "pi-1", "--json"]) == 0
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [each["device"] for each in row["sets"][0]["members"]] == ["pi-1"]
    assert row["dropped"] == []
    assert ternbus([*show, "--device", "pi-0", "--json"]) == 0
    (row,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (row["sets"], row["dropped"][0]["device"]) == ([], "pi-0")
    assert ternbus(["aggregator", "log", "verify", str(world.directory)]) == 0
    world.recover()
    world.ledger.db.execute("UPDATE updates SET merged = 1 WHERE device = 'pi-0'")
    world.close()
    assert ternbus(["aggregator", "log", "verify", str(world.directory)]) == 1
    assert "says that update 2 of pi-0 was dropped: it was not" in capsys.readouterr().out


def test_a_plain_federation_takes_no_private_update_and_its_log_is_as_it_was() -> None:
    bench = Bench(make_directory(scratch() / "agg"))
    bench.start()
    pi = bench.join("pi")
    update = Update(
        base=0, samples=1, codec=PRIVATE, encoding="raw", sealed=True, context=bytes(32), min=3,
        boxes=(bytes(BOX_BYTES),),
    )  # fmt: skip
    (receipt,) = receipts(bench.receive(pi.topic("update"), pi.frame("update", update.meta(), body=b"x")))
    assert (receipt.outcome, receipt.reason.partition(":")[0]) == ("invalid", "not-private")
    (packed,) = bench.ledger.db.execute("SELECT entry FROM log").fetchone()
    assert b"dropped" not in unpack(packed).content
    assert Entry.parse(unpack(packed).content).sets == ()


def test_close_says_that_helpers_are_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    world, _ = held_at("prepare")
    world.close()
    assert ternbus(["aggregator", "close", str(world.directory)]) == 0
    assert "paused; it closes when the helpers have answered" in capsys.readouterr().out
    world.recover()
    world.start()
    go_on(world)
    assert (world.head.state, len(world.merged())) == ("closed", 6)
    world.close()
    assert ternbus(["aggregator", "close", str(world.directory)]) == 0
    assert capsys.readouterr().out == "closed\n"


class Twice(World):
    """It writes what it saves into a ledger of a simulation, too."""

    def perform(self, actions: Sequence[events.Action]) -> list[events.Action]:
        self.memory = getattr(self, "memory", None) or MemoryLedger([])
        batch = [action.record for action in actions if isinstance(action, events.Save)]
        self.memory.write(batch, self.now)
        return super().perform(actions)


def test_the_ledger_of_a_simulation_counts_private_updates_as_the_real_one() -> None:
    world = Twice(roster="own", staleness__max=0)
    devices = world.begin(8)
    for device in devices[1:]:
        world.helpers["h-1"].records.admit(device.name, device.identity.public)
    world.give_all(devices[:7])
    world.settle()
    world.give_all(devices[:4])
    counts = ("accepted", "merged", "dropped", "unmerged")
    for state in ("open", "closed"):
        world.handle(events.StateRequested(state=state))
        world.settle()
        world.tick(1000.0)
        found, simulated = status.read(world.directory)["counts"], world.memory.status()["counts"]
        assert {name: found[name] for name in counts} == {name: simulated[name] for name in counts}
    assert (found["merged"], found["dropped"]) == (9, 2)
    merged = {(each.device, each.base): each.merged for each in world.memory.contributions if not each.dropped}
    assert merged == {
        (device, base): version
        for device, base, version in world.ledger.db.execute(
            "SELECT device, base, merged FROM updates WHERE merged >= 0"
        )
    }
