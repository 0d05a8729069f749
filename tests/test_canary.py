"""A canary: a group evaluates each version before it is published, and withdraws what makes its metric worse."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from support.small_world import (
    Bench,
    Device,
    float32_block,
    follow,
    frames_of,
    reconfigure,
    refusals,
    saved,
)
from ternbus.aggregator.core import events, records
from ternbus.aggregator.shell import log
from ternbus.aggregator.store import candidate_rows, membership
from ternbus.aggregator.store import status as statuses
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.messages import Metrics
from ternbus.broker.protocol.model_messages import Candidate
from ternbus.broker.protocol.ternary import Block

Make = Callable[..., Bench]
SETTINGS: Mapping[str, object] = {
    "merge__buffer_size": 2,
    "merge__influence_bound": "none",
    "downlink__codec": "float32",
    "downlink__slots": 4,
    "optimizer__name": "fedavgm",
    "canary__group": ("judge", "own"),
}


@dataclass
class World:
    """A bench with two devices that train, and a group of an evaluator and a device that reports."""

    bench: Bench
    trainers: list[Device] = field(default_factory=list)
    made: int = 0

    @classmethod
    def of(cls, bench: Bench) -> "World":
        world = cls(bench)
        world.judge, world.own = bench.join("judge", evaluator=True), bench.join("own")
        world.trainers = [bench.join("pi"), bench.join("other")]
        world.published(0, 0.5)
        return world

    judge: Device = field(init=False)
    own: Device = field(init=False)

    def published(self, version: int, accuracy: float) -> None:
        """Both have evaluated a published version."""
        self.bench.receive(self.judge.topic("metrics"), self.judge.metrics(version, accuracy=accuracy))
        self.bench.receive(self.own.topic("metrics"), self.own.metrics(version, "local", accuracy=accuracy))

    def train(self, devices: Iterable[Device] | None = None) -> list[events.Action]:
        """Each sends an update on the newest version."""
        actions: list[events.Action] = []
        base = self.bench.version
        for device in self.trainers if devices is None else devices:
            self.made += 1
            block = float32_block(self.bench.schema, self.made)
            actions += self.bench.receive(device.topic("update"), *device.update(block, base))
        return actions

    def report(self, device: Device, split: str = "test", candidate: bytes | None = None, **values: float) -> None:
        judged = self.candidate
        metrics = Metrics(
            version=judged.version, samples=10, split=split, values=values,
            candidate=judged.digest if candidate is None else candidate,
        )  # fmt: skip
        self.bench.receive(device.topic("metrics"), device.frame("metrics", metrics.meta()))

    def both(self, accuracy: float) -> None:
        self.report(self.judge, accuracy=accuracy)
        self.report(self.own, "local", accuracy=accuracy)

    @property
    def candidate(self) -> Candidate:
        """The newest that was sent."""
        sent = frames_of(self.bench.published, "candidate")
        return Candidate.from_meta(sent[-1].meta)


@pytest.fixture
def world(make: Make) -> World:
    return World.of(make(**SETTINGS))


def test_a_candidate_goes_to_the_group_alone_and_is_published_as_it_was_evaluated(world: World) -> None:
    bench = world.bench
    actions = world.train()
    assert {action.topic for action in bench.published if "/candidate" in action.topic} == {
        topics.down("lab", name, "candidate") for name in ("judge", "own")
    }
    assert not frames_of(actions, "head")
    assert (bench.version, bench.head.version) == (0, 0)
    sent = frames_of(actions, "candidate")[0]
    candidate = Candidate.from_meta(sent.meta)
    vector = Block.read(bench.schema, candidate.codec, candidate.encoding, sent.body).apply(bench.core.model.published)
    world.both(0.6)
    assert (bench.version, bench.head.digest) == (1, candidate.digest)
    assert bench.core.model.published.tobytes() == vector.tobytes()
    assert follow(bench.retained, bench.identity.public) == (1, candidate.digest)
    (entry,) = [entry for entry, _ in log.entries(bench.directory, 1)]
    assert ([each.device for each in entry.updates], entry.dropped) == (["pi", "other"], ())
    assert log.verify(bench.directory, None, None).faults == []


def test_with_a_canary_versions_have_the_bits_that_they_have_without_one(make: Make) -> None:
    plain = make(**{name: value for name, value in SETTINGS.items() if not name.startswith("canary")})
    worlds = [World.of(plain), World.of(make(**SETTINGS))]
    for each in worlds:
        for _ in range(5):
            each.train()
            if each.bench is not plain:
                each.both(0.5)
    assert worlds[0].bench.version == worlds[1].bench.version == 5
    assert worlds[0].bench.head.digest == worlds[1].bench.head.digest


def test_updates_are_accepted_meanwhile_and_are_the_next_candidate(world: World) -> None:
    bench, third = world.bench, world.bench.join("third")
    world.train()
    first = world.candidate
    world.train([third])
    world.both(0.6)
    assert (bench.version, [each.device for each in bench.core.model.buffer]) == (1, ["third"])
    world.train(world.trainers[:1])
    assert (world.candidate.version, world.candidate.digest != first.digest) == (2, True)
    world.both(0.6)
    assert bench.version == 2
    (entry,) = [entry for entry, _ in log.entries(bench.directory, 2)]
    assert [each.device for each in entry.updates] == ["third", "pi"]


def test_a_bad_candidate_is_withdrawn_and_devices_train_on(world: World) -> None:
    bench = world.bench
    before, server = bench.core.model.published, bench.core.model.server
    world.train()
    digest = world.candidate.digest
    world.both(0.1)
    assert (bench.version, bench.head.version) == (1, 1)
    assert bench.core.model.published.tobytes() == before.tobytes()
    assert bench.core.model.server.target.tobytes() == server.target.tobytes()
    assert bench.head.digest != digest
    assert follow(bench.retained, bench.identity.public) == (1, bench.head.digest)
    (entry,) = [entry for entry, _ in log.entries(bench.directory, 1)]
    assert (entry.updates, [each.update.device for each in entry.dropped]) == ((), ["pi", "other"])
    why = "canary: accuracy 0.1 after 0.5 by judge; accuracy 0.1 after 0.5 by own"
    assert {each.reason for each in entry.dropped} == {why}
    assert log.verify(bench.directory, None, None).faults == []
    assert statuses.read(bench.directory)["counts"]["dropped"] == 2
    world.train()
    world.both(0.5)
    assert bench.version == 2
    assert log.verify(bench.directory, None, None).faults == []


@pytest.mark.parametrize(
    ("judge", "own", "holds"),
    [
        ({"accuracy": 0.49}, {"accuracy": 0.48}, True),
        ({"accuracy": 0.47}, {"accuracy": 0.9}, False),
        ({"accuracy": 0.9}, {"accuracy": 0.4}, False),
        ({}, {"accuracy": 0.9}, False),
        ({"loss": 0.1}, {"accuracy": 0.9}, False),
    ],
)
def test_every_evaluator_has_to_hold_and_half_of_the_devices(
    judge: dict[str, Any], own: dict[str, Any], holds: bool, world: World
) -> None:
    world.train()
    world.report(world.judge, **judge)
    world.report(world.own, "local", **own)
    (entry,) = [entry for entry, _ in log.entries(world.bench.directory, 1)]
    assert bool(entry.updates) == holds


def test_the_direction_and_the_metric_are_those_that_are_stated(make: Make) -> None:
    world = World.of(make(**{**SETTINGS, "canary__metric": "loss", "canary__group": ("judge",)}))
    judge = world.judge
    world.bench.receive(judge.topic("metrics"), judge.metrics(0, accuracy=0.5, loss=1.0))
    world.train()
    world.report(judge, accuracy=0.1, loss=0.5)
    world.train()
    world.report(judge, accuracy=0.9, loss=1.5)
    assert [bool(entry.updates) for entry, _ in log.entries(world.bench.directory)] == [False, True, False]


def test_what_nobody_has_measured_before_is_not_compared(make: Make) -> None:
    bench = make(**SETTINGS)
    world = World(bench)
    world.judge, world.own = bench.join("judge", evaluator=True), bench.join("own")
    world.trainers = [bench.join("pi"), bench.join("other")]
    world.train()
    world.both(0.01)
    assert bool(bench.core.model.server.target.any())
    assert [bool(entry.updates) for entry, _ in log.entries(bench.directory)] == [False, True]


def test_silence_withdraws_a_candidate_and_a_broker_that_is_away_does_not(world: World) -> None:
    bench = world.bench
    world.train()
    world.report(world.judge, accuracy=0.9)
    bench.tick(200.0)
    bench.handle(events.Disconnected())
    assert bench.core.deadline is not None
    assert bench.core.deadline < bench.now + 100.0  # only of the next attempt to connect
    bench.now += 400.0
    bench.connect()
    bench.tick(290.0)
    assert bench.version == 0
    bench.tick(11.0)
    assert bench.version == 1
    (entry,) = [entry for entry, _ in log.entries(bench.directory, 1)]
    assert {each.reason for each in entry.dropped} == {"canary: 1 of 2 reports in 300 s"}


def test_so_many_reports_suffice_as_the_settings_say(make: Make) -> None:
    world = World.of(make(**{**SETTINGS, "canary__min_reports": 1, "canary__patience_s": 20.0}))
    world.train()
    world.report(world.judge, accuracy=0.9)
    assert world.bench.version == 0
    world.bench.tick(20.0)
    (entry,) = [entry for entry, _ in log.entries(world.bench.directory, 1)]
    assert len(entry.updates) == 2


def test_a_member_that_is_gone_does_not_lower_the_number_of_reports_that_was_asked_for(make: Make) -> None:
    world = World.of(make(**{**SETTINGS, "canary__min_reports": 2, "canary__patience_s": 20.0}))
    bench = world.bench
    bench.revoke("judge")
    world.train()
    world.report(world.own, "local", accuracy=0.9)
    assert bench.version == 0
    bench.tick(21.0)
    (entry,) = [entry for entry, _ in log.entries(bench.directory, 1)]
    assert {each.reason for each in entry.dropped} == {"canary: 1 of 2 reports in 20 s"}


def test_a_device_that_praises_a_version_does_not_outweigh_one_that_measures_less(make: Make) -> None:
    world = World.of(make(**{**SETTINGS, "canary__group": ("own", "liar")}))
    liar = world.bench.join("liar")
    world.bench.receive(liar.topic("metrics"), liar.metrics(0, "local", accuracy=0.5))
    world.train()
    world.report(world.own, "local", accuracy=0.1)
    world.report(liar, "local", accuracy=1e300)
    (entry,) = [entry for entry, _ in log.entries(world.bench.directory, 1)]
    assert (entry.updates, len(entry.dropped)) == ((), 2)


def test_a_report_of_a_member_that_was_revoked_since_is_none(world: World) -> None:
    bench = world.bench
    world.train()
    world.report(world.judge, accuracy=0.1)
    bench.revoke("judge")
    assert bench.version == 0
    world.report(world.own, "local", accuracy=0.9)
    (entry,) = [entry for entry, _ in log.entries(bench.directory, 1)]
    assert (len(entry.updates), entry.dropped) == (2, ())


def test_a_candidate_is_sent_again_to_who_has_not_reported(world: World) -> None:
    bench = world.bench
    world.train()
    world.report(world.judge, accuracy=0.9)

    def receivers(actions: Iterable[events.Action]) -> list[str]:
        sent = [action for action in actions if isinstance(action, events.Publish)]
        return [action.topic.split("/")[4] for action in sent if action.topic.endswith("/candidate")]

    assert bench.core.deadline is not None
    assert bench.core.deadline <= bench.now + 30.0
    assert receivers(bench.tick(29.0)) == []
    assert receivers(bench.tick(2.0)) == ["own"]
    assert receivers(bench.tick(31.0)) == []
    assert receivers(bench.tick(31.0)) == ["own"]
    assert receivers(bench.connect()) == ["own"]


def test_only_the_group_reports_once_and_of_this_candidate(world: World) -> None:
    bench = world.bench
    world.train()
    world.report(world.trainers[0], "local", accuracy=0.9)
    world.report(world.own, accuracy=0.9)
    world.report(world.judge, candidate=bytes(32), accuracy=0.9)
    world.report(world.judge, accuracy=0.9)
    world.report(world.judge, accuracy=0.1)
    late = world.candidate.digest
    replayed = world.judge.frame(
        "metrics", Metrics(version=1, samples=1, split="test", values={}, candidate=late).meta(), seq=1
    )
    bench.receive(world.judge.topic("metrics"), replayed)
    world.report(world.own, "local", accuracy=0.9)
    world.report(world.own, "local", candidate=late, accuracy=0.9)
    counted = refusals(bench.tick(2.0))
    assert counted == {"not-in-group": 2, "not-evaluator": 1, "old-candidate": 2, "replayed-metrics": 1}
    assert bench.version == 1
    assert statuses.read(bench.directory)["claim"] is None


def test_under_a_plan_that_hides_devices_metrics_only_evaluators_are_asked(make: Make) -> None:
    world = World.of(make(**{**SETTINGS, "plan__seal": True}))
    for device in world.trainers:
        block = float32_block(world.bench.schema, device.seq)
        frames = device.update(block, 0, seal_to=world.bench.identity.public)
        world.bench.receive(device.topic("update"), *frames)
    assert {action.topic.split("/")[4] for action in world.bench.published if "/candidate" in action.topic} == {"judge"}
    world.report(world.judge, accuracy=0.5)
    assert world.bench.version == 1


# --- crashes, and what else happens while a candidate waits


@pytest.mark.parametrize("accuracy", [0.6, 0.1], ids=["published", "withdrawn"])
def test_a_crash_before_or_after_any_commit_changes_no_bit(accuracy: float, make: Make) -> None:
    """Nothing of an event is saved, or all of it and nothing is published; what was not acknowledged comes again."""

    def run(crash_at: int | None) -> tuple[bytes, list[object], int]:
        world = World.of(make(**SETTINGS))
        bench, done = world.bench, 0

        def feed(topic: str, payload: bytes) -> None:
            """The broker delivers what was not acknowledged once more, after a crash."""
            nonlocal done
            for _ in range(2):
                event = events.MessageArrived(topic=topic, payload=payload)
                actions = bench.core.handle(event, bench.now)
                batch = [action.record for action in actions if isinstance(action, events.Save)]
                if crash_at in {done, done + 1}:
                    bench.ledger.write(batch if crash_at == done else [], now=bench.now)
                    done += 2
                    bench.restart()
                    bench.start()
                    continue
                done += 2
                bench.perform(actions)
                return

        def send(device: Device, frames: list[bytes], kind: str) -> None:
            for frame in frames:
                feed(device.topic(kind), frame)

        for number in range(3):
            for index, device in enumerate(world.trainers):
                block = float32_block(bench.schema, 10 * number + index)
                send(device, device.update(block, bench.version), "update")
            judged = bench.core._merging.canary.candidate
            assert judged is not None
            digest = judged.prepared.merged.digest
            worth = accuracy if number == 1 else 0.5
            for device, split in ((world.judge, "test"), (world.own, "local")):
                metrics = Metrics(
                    version=judged.version, samples=1, split=split, values={"accuracy": worth}, candidate=digest
                )
                send(device, [device.frame("metrics", metrics.meta())], "metrics")
        entries = [
            ([each.device for each in entry.updates], [each.update.device for each in entry.dropped], entry.digest)
            for entry, _ in log.entries(bench.directory)
        ]
        assert log.verify(bench.directory, None, None).faults == []
        assert follow(bench.retained, bench.identity.public) == (3, bench.head.digest)
        return bench.head.digest, [*entries], done

    digest, entries, steps = run(None)
    assert steps > 20
    for step in range(steps):
        assert run(step)[:2] == (digest, entries), step


def test_a_candidate_and_its_reports_survive_a_restart(world: World) -> None:
    bench = world.bench
    third = bench.join("third")
    world.train()
    world.train([third])
    world.report(world.judge, accuracy=0.6)
    digest = world.candidate.digest
    bench.restart()
    bench.start()
    assert world.candidate.digest == digest
    assert frames_of(bench.last, "candidate") == []  # the judge has reported
    assert [each.device for each in bench.core.model.buffer] == ["third"]
    found = statuses.read(bench.directory)["candidate"]
    assert found == {"version": 1, "digest": digest.hex(), "reports": {"judge": {"accuracy": 0.6}}}
    world.report(world.own, "local", accuracy=0.45)  # 0.5 of before is known after the restart
    (entry,) = [entry for entry, _ in log.entries(bench.directory, 1)]
    assert len(entry.dropped) == 2
    assert statuses.read(bench.directory)["candidate"] is None


def test_a_revoked_device_is_in_no_candidate(world: World) -> None:
    bench = world.bench
    third = bench.join("third")
    world.train()
    world.train([third])
    first = world.candidate.digest
    bench.revoke("other")
    assert world.candidate.digest != first
    world.both(0.6)
    (entry,) = [entry for entry, _ in log.entries(bench.directory, 1)]
    assert [each.device for each in entry.updates] == ["pi", "third"]
    world.train(world.trainers[:1])
    bench.revoke("judge")
    world.train([third])
    world.report(world.own, "local", accuracy=0.6)
    assert bench.version == 2
    assert log.verify(bench.directory, None, None).faults == []


def test_a_revoked_device_that_only_waits_does_not_change_what_is_judged_into_something_wrong(world: World) -> None:
    bench = world.bench
    third = bench.join("third")
    world.train()
    world.train([third])
    bench.revoke("third", keep=True)
    before = world.candidate.digest
    bench.restart()
    bench.start()
    assert world.candidate.digest == before
    world.both(0.6)
    assert bench.head.digest == before


def test_a_rollback_withdraws_the_candidate(world: World) -> None:
    bench = world.bench
    world.train()
    world.both(0.6)
    world.train()
    event = events.RollbackRequested(to=0, vector=bench.ledger.vector(0), request=7)
    actions = bench.handle(event)
    assert "2 waiting updates dropped" in next(each.text for each in actions if isinstance(each, events.Log))
    assert bench.ledger.fact(candidate_rows.CANDIDATE) is None
    assert bench.core._merging.canary.candidate is None
    bench.restart()
    bench.start()
    world.train()
    world.both(0.1)  # what was measured before the rollback is no measure
    (entry,) = [entry for entry, _ in log.entries(bench.directory, bench.version)]
    assert len(entry.updates) == 2
    assert log.verify(bench.directory, None, None).faults == []


@pytest.mark.parametrize("change", [{"canary": {"group": []}}, {"optimizer": {"learning_rate": 0.5}}])
def test_a_candidate_of_other_settings_is_dissolved(change: dict[str, dict[str, object]], world: World) -> None:
    bench = world.bench
    world.train()
    reconfigure(bench, **change)
    bench.restart()
    bench.start()
    bench.tick(31.0)
    if "optimizer" in change:
        world.both(0.6)
    assert bench.version == 1
    assert membership.dropped(bench.ledger.db, "pi") == 0
    (entry,) = [entry for entry, _ in log.entries(bench.directory, 1)]
    assert len(entry.updates) == 2


def test_a_closed_federation_keeps_what_nobody_has_judged(world: World) -> None:
    bench = world.bench
    world.train()
    actions = bench.handle(events.StateRequested(state="closed"))
    assert any(isinstance(each, events.Log) and "2 accepted updates stay unmerged" in each.text for each in actions)
    bench.tick(1000.0)
    assert bench.version == 0
    bench.handle(events.StopRequested())
    bench.restart()
    bench.start()
    bench.handle(events.StateRequested(state="open"))
    world.both(0.6)
    assert bench.version == 1


def test_a_backup_that_is_restored_has_no_candidate_and_merges_its_updates(world: World) -> None:
    bench = world.bench
    world.train()
    bench.perform(bench.core.restored(2e9))
    bench.restart()
    bench.start()
    bench.tick(31.0)
    assert world.candidate.version == bench.version + 1 > 2**32
    world.both(0.6)
    assert saved(bench.last, records.VersionMade)[0].updates == 2


def test_a_candidate_that_was_changed_on_disk_is_refused(world: World) -> None:
    bench = world.bench
    world.train()
    body = bytes(bench.ledger.fact(candidate_rows.BODY))
    other = Block.of_float32(bench.schema, np.ones(bench.schema.elements, np.float32))
    with bench.ledger.transaction():
        candidate_rows._set(bench.ledger.db, candidate_rows.BODY, other.content)
        about = bench.ledger.fact(candidate_rows.CANDIDATE).replace("zstd", "raw")
        candidate_rows._set(bench.ledger.db, candidate_rows.CANDIDATE, about)
    assert body
    with pytest.raises(Exception, match="candidate for version 1 does not have its digest"):
        bench.restart()


def test_settings_that_cannot_work_are_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"canary\.group = 'judge' must be a list of strings"):
        make(canary__group="judge")
    with pytest.raises(ConfigError, match="min_reports = 2 is more than"):
        make(canary__group=("judge",), canary__min_reports=2)
