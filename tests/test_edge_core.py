"""The device's state machine, the protocol's sentences for devices one by one; no network, no disk, no clock."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np
import pytest

from support.scripted_aggregator import FEDERATION, SHAPES, Message, ScriptedAggregator
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame, parse
from ternbus.broker.protocol.identity import Identity, enroll_proof, seal
from ternbus.broker.protocol.messages import Enroll, Metrics, Offer, Status, Update
from ternbus.broker.protocol.schema import Schema, Vector
from ternbus.broker.protocol.ternary import Block
from ternbus.edge.core import events
from ternbus.edge.core.actions import (
    Action,
    Connect,
    Log,
    Publish,
    Save,
    SavePersonal,
    StartEvaluation,
    StartFineTuning,
    StartTraining,
    Stop,
    Subscribe,
)
from ternbus.edge.core.core import Core
from ternbus.edge.core.profile import ENROLL_SEQ, Profile, Role
from ternbus.edge.core.state import State

T = TypeVar("T")
DEVICE = "pi"
AGGREGATOR_KEY = Identity(b"a" * 32)
DEVICE_KEY = Identity(b"d" * 32)
TENSORS = {name: tuple(shape) for name, shape in SHAPES.items()}
FRAME_BYTES = 120 * 1024


def member(role: Role = "train", **changes: Any) -> Profile:
    return Profile(
        **{  # type: ignore[arg-type]
            "federation": FEDERATION,
            "device": DEVICE,
            "identity": DEVICE_KEY,
            "aggregator_public": AGGREGATOR_KEY.public,
            "seal": lambda plain: b"sealed:" + plain,
            "role": role,
            "tensors": TENSORS,
            **changes,
        }
    )


@dataclass
class Device:
    """A core, its disk, and what it has done since it was last asked."""

    core: Core
    now: float = 0.0
    disk: State | None = None
    actions: list[Action] = field(default_factory=list)

    def handle(self, event: events.Event) -> list[Action]:
        done = self.core.handle(event, self.now)
        for action in done:
            if isinstance(action, Save):
                self.disk = action.kept
        self.actions += done
        return done

    def arrive(self, *messages: Message) -> list[Action]:
        return [
            action
            for topic, payload in messages
            for action in self.handle(events.FrameArrived(topic=topic, frame=parse(payload)))
        ]

    def wait(self, seconds: float) -> list[Action]:
        """Time passes; the core is woken whenever it wanted to be."""
        end, done = self.now + seconds, list[Action]()
        while (due := self.core.due_s()) is not None and due <= end:
            self.now = max(self.now, due)
            done += self.handle(events.TimeReached())
        self.now = end
        return done

    def connect(self) -> list[Action]:
        return self.handle(events.Connected(frame_bytes=FRAME_BYTES))

    def reborn(self, **changes: Any) -> "Device":
        """The process again, from what is on disk."""
        assert self.disk is not None
        life = Device(Core(replace(self.core.member, **changes), self.disk), now=self.now, disk=self.disk)
        life.handle(events.Started())
        return life


def device(role: Role = "train", kept: Mapping[str, Any] | None = None, **changes: Any) -> Device:
    """A device that has started and is connected."""
    about = member(role, **changes)
    born = Device(Core(about, State(key=about.key, **{"enrolled": True, **(kept or {})})))
    born.handle(events.Started())
    born.connect()
    return born


def aggregator(**settings: Any) -> ScriptedAggregator:
    return ScriptedAggregator(identity=AGGREGATOR_KEY, **settings)


def following(
    role: Role = "train", scripted: ScriptedAggregator | None = None, **changes: Any
) -> tuple[ScriptedAggregator, Device]:
    """A device that holds the newest version; if it trains, it has begun to."""
    scripted = scripted or aggregator()
    born = device(role, **changes)
    born.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
    return scripted, born


def trained(
    job: StartTraining, change: float = 1.0, residual: Vector | None = None, **changes: Any
) -> events.TrainingFinished:
    total = np.full(job.schema.elements, change, dtype=np.float32)
    if job.residual is not None:
        total += job.residual
    fields = {"samples": 10, "metrics": {"loss": 0.5}, **changes}
    return events.TrainingFinished(
        base=job.base, block=Block.of_float32(job.schema, total), residual=residual, **fields
    )


def sending(**settings: Any) -> tuple[ScriptedAggregator, Device, Frame]:
    """A device whose first update, on version 0, is on its way."""
    scripted, born = following(scripted=aggregator(**settings))
    done = born.handle(trained(only(born.actions, StartTraining)))
    return scripted, born, update_in(done)


def only(actions: list[Action], kind: type[T]) -> T:
    (found,) = [action for action in actions if isinstance(action, kind)]
    return found


def of(actions: list[Action], kind: type) -> list[Any]:
    return [action for action in actions if isinstance(action, kind)]


def published(actions: list[Action], kind: str) -> list[Frame]:
    frames = [parse(action.payload) for action in actions if isinstance(action, Publish)]
    return [frame for frame in frames if frame.kind == kind]


def update_in(actions: list[Action]) -> Frame:
    (frame,) = published(actions, "update")
    return frame


def logged(actions: list[Action]) -> list[str]:
    return [action.event for action in actions if isinstance(action, Log)]


def test_the_will_is_a_signed_offline_of_the_session_and_both_are_on_disk_before_the_connection() -> None:
    born = Device(Core(member(), State(key=DEVICE_KEY.key_id, enrolled=True, session=6)))
    save, connect = born.handle(events.Started())
    assert isinstance(save, Save)
    assert isinstance(connect, Connect)
    will = parse(connect.will_payload)
    will.check_authentic(DEVICE_KEY.public)
    assert connect.will_topic == topics.up(FEDERATION, DEVICE, "status")
    status = Status.from_meta(will.meta)
    assert (status.state, status.session, save.kept.session) == ("offline", 7, 7)
    assert will.seq < save.kept.seq_limit


def test_at_every_connect_it_subscribes_anew_and_publishes_its_status_retained() -> None:
    born = device()
    for _ in range(2):
        born.handle(events.Disconnected(reason="gone"))
        will = parse(only(born.wait(30), Connect).will_payload)
        done = born.connect()
        assert only(done, Subscribe).filters == (
            "ternbus/1/fed/all/status",
            "ternbus/1/fed/all/head",
            "ternbus/1/fed/down/pi/#",
            "ternbus/1/fed/all/delta/#",
        )
        (publish,) = of(done, Publish)
        frame = parse(publish.payload)
        assert publish.retain
        assert Status.from_meta(frame.meta).state == "idle"
        assert frame.meta["session"] == will.meta["session"]
        assert frame.seq > will.seq


def test_reconnects_back_off_to_half_a_minute() -> None:
    born = Device(Core(member(), State(key=DEVICE_KEY.key_id, enrolled=True)))
    born.handle(events.Started())
    waits = []
    for attempt in range(12):
        done = born.handle(events.ConnectFailed(reason="refused"))
        assert ("disconnected" in logged(done)) == (attempt == 0)
        due = born.core._reconnecting.due_s
        waits.append(due - born.now)
        born.wait(due - born.now)
    assert 0.1 <= waits[0] <= 0.2
    assert all(0.1 * 2**attempt <= wait <= 0.2 * 2**attempt for attempt, wait in enumerate(waits[:7]))
    assert all(15 <= wait <= 30 for wait in waits[-3:])
    born.connect()
    born.now += 60
    born.handle(events.Disconnected(reason="gone"))
    assert born.core._reconnecting.due_s - born.now <= 0.2


def test_no_sequence_number_is_used_twice_over_crashes() -> None:
    born = device()
    seen = set[int]()
    for _ in range(5):
        frames = published(born.actions, "status")
        for _ in range(40):
            born.handle(events.Disconnected(reason="gone"))
            born.wait(30)
            frames += published(born.connect(), "status")
        assert seen.isdisjoint(frame.seq for frame in frames)
        seen.update(frame.seq for frame in frames)
        born = born.reborn()
        born.connect()


def test_the_enrolment_is_the_same_frame_each_time_until_it_is_answered() -> None:
    born = device("join", kept={"enrolled": False}, code="secret")
    scripted = aggregator()
    assert published(born.actions, "enroll") == []  # nobody is there to hear it
    (frame,) = published(born.arrive(scripted.status()), "enroll")
    assert frame.seq == ENROLL_SEQ
    assert Enroll.from_meta(frame.meta).public_key == DEVICE_KEY.public
    assert frame.body == enroll_proof("secret", FEDERATION, DEVICE, DEVICE_KEY.public)
    born.handle(events.Published(seq=ENROLL_SEQ))
    assert published(born.wait(9.9), "enroll") == []
    assert published(born.wait(5), "enroll") == [frame]
    again = born.reborn()
    again.connect()
    assert published(again.arrive(scripted.status()), "enroll") == [frame]
    again.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, ENROLL_SEQ, "busy", retry_after_s=100))
    assert published(again.wait(99), "enroll") == []
    assert published(again.wait(30), "enroll") == [frame]
    again.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, ENROLL_SEQ, "accepted"))
    assert again.core.dropped["odd-receipt"] == 1
    done = again.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, ENROLL_SEQ, "enrolled"))
    assert again.disk is not None
    assert again.disk.enrolled
    assert of(done, Stop) == []
    done = again.arrive(scripted.head(), *scripted.snapshot())
    assert only(done, Stop).code == 0
    assert published(done, "status")[-1].meta["state"] == "offline"


def test_a_join_that_is_interrupted_is_no_success() -> None:
    born = device("join", kept={"enrolled": False})
    assert only(born.handle(events.StopRequested(reason="SIGINT")), Stop).code == 1


@pytest.mark.parametrize("outcome", ["refused", "revoked"])
def test_a_device_that_is_not_wanted_stops_and_says_so(outcome: str) -> None:
    scripted = aggregator()
    born = device("join", kept={"enrolled": False}, code="secret")
    born.arrive(scripted.status())
    done = born.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, ENROLL_SEQ, outcome, reason="spent"))
    stop = only(done, Stop)
    assert stop.code == 3
    assert "(spent)" in stop.reason
    assert born.core.due_s() is None
    assert born.handle(events.TimeReached()) == []


def test_a_revocation_may_answer_a_status() -> None:
    scripted, born = following()
    seq = published(born.actions, "status")[-1].seq
    assert only(born.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, seq, "revoked")), Stop).code == 3


def test_the_newest_version_is_trained_on_and_the_status_says_so() -> None:
    scripted, born = following()
    job = only(born.actions, StartTraining)
    assert (job.base, job.vector.tobytes()) == (0, scripted.vectors[0].tobytes())
    assert Status.from_meta(published(born.actions, "status")[-1].meta).base == 0
    done = born.handle(trained(job))
    assert [status.meta["state"] for status in published(done, "status")] == ["idle"]
    assert of(born.arrive(scripted.head()), StartTraining) == []  # its update has no answer yet


def test_an_update_is_on_disk_before_it_is_sent() -> None:
    _, born = following()
    job = only(born.actions, StartTraining)
    done = born.handle(
        trained(job, residual=np.ones(job.schema.elements, np.float32), metrics={"loss": 1.0, "bad": float("nan")})
    )
    assert isinstance(done[0], Save)
    kept = done[0].kept
    frame = update_in(done)
    assert kept.outstanding is not None
    assert kept.outstanding.seq == frame.seq
    assert kept.residual is not None
    update = Update.from_meta(frame.meta)
    assert (update.base, update.samples, dict(update.metrics)) == (0, 10, {"loss": 1.0})
    block = Block.read(job.schema, update.codec, update.encoding, frame.body)
    assert (block.value() == 1).all()


def test_a_sealed_update_binds_key_and_number() -> None:
    scripted = aggregator(plan={"seal": True})
    _, born = following(scripted=scripted, seal=lambda plain: seal(AGGREGATOR_KEY.public, plain))
    frame = update_in(born.handle(trained(only(born.actions, StartTraining))))
    assert frame.meta["sealed"]
    plain = AGGREGATOR_KEY.unseal(frame.body)
    assert plain[:16] == DEVICE_KEY.key_id + frame.seq.to_bytes(8, "little")
    update = Update.from_meta(frame.meta)
    assert dict(update.metrics) == {}  # anybody could read them
    assert (Block.read(scripted.schema, update.codec, update.encoding, plain[16:]).value() == 1).all()
    born.handle(events.Disconnected(reason="gone"))
    born.wait(30)
    born.connect()
    assert update_in(born.arrive(scripted.status())) == frame


def test_an_accepted_update_is_forgotten_and_the_next_is_on_a_newer_version() -> None:
    scripted, born, frame = sending()
    done = born.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "accepted"))
    save = only(done, Save)
    assert save.answered is not None
    assert (save.answered.seq, save.answered.base, save.answered.outcome) == (frame.seq, 0, "accepted")
    assert (save.kept.outstanding, save.kept.answered_base, save.kept.accepted) == (None, 0, 1)
    assert of(done, StartTraining) == []
    again = born.reborn()
    again.connect()
    assert of(again.arrive(scripted.status(), scripted.head(), *scripted.snapshot()), StartTraining) == []
    scripted.advance()
    assert only(again.arrive(*scripted.delta(1), scripted.head()), StartTraining).base == 1


@pytest.mark.parametrize("outcome", ["duplicate", "invalid"])
def test_an_update_that_is_not_wanted_is_forgotten_and_its_base_not_trained_on_again(outcome: str) -> None:
    scripted, born, frame = sending()
    done = born.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, outcome, reason="why"))
    assert born.disk is not None
    assert (born.disk.outstanding, born.disk.answered_base, born.disk.accepted) == (None, 0, 0)
    assert born.disk.residual is None
    assert of(done, StartTraining) == []


def test_a_stale_update_goes_back_into_the_residual_in_the_same_write_that_forgets_it() -> None:
    scripted, born, frame = sending()
    save = only(born.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "stale")), Save)
    assert save.kept.outstanding is None
    assert save.kept.residual is not None
    assert (save.kept.residual == 1).all()
    scripted.advance()
    job = only(born.arrive(*scripted.delta(1), scripted.head()), StartTraining)
    assert job.residual is save.kept.residual
    kept_back = np.full(job.schema.elements, 0.5, np.float32)
    frame = update_in(born.handle(trained(job, residual=kept_back)))
    update = Update.from_meta(frame.meta)
    assert (Block.read(job.schema, update.codec, update.encoding, frame.body).value() == 2).all()
    save = only(born.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "stale")), Save)
    assert save.kept.residual is not None
    assert (save.kept.residual == 2.5).all()


def test_a_stale_receipt_after_a_restart_needs_no_model() -> None:
    scripted, born, frame = sending()
    again = born.reborn()
    again.connect()
    save = only(again.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "stale")), Save)
    assert save.kept.residual is not None
    assert (save.kept.residual == 1).all()


def test_busy_is_no_answer_the_update_waits_as_long_as_it_was_asked_to() -> None:
    scripted, born, frame = sending()
    done = born.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "busy", retry_after_s=20.0))
    assert of(done, Save) == []
    born.handle(events.Disconnected(reason="gone"))
    born.wait(1)
    born.connect()
    assert published(born.arrive(scripted.status()), "update") == []
    assert published(born.wait(18), "update") == []
    assert published(born.wait(8), "update") == [frame]


def test_a_counter_from_an_old_copy_of_the_disk_goes_on_above_the_highest_answered() -> None:
    scripted, born, frame = sending()
    receipt = scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "duplicate", highest_seq=5000)
    done = born.arrive(receipt)
    again = update_in(done)
    assert again.seq == 5001
    assert (again.meta, again.body) == (frame.meta, frame.body)
    assert isinstance(done[0], Save)
    assert done[0].kept.outstanding is not None
    assert done[0].kept.outstanding.seq == 5001
    assert done[0].kept.seq_limit > 5001
    born.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, 5001, "duplicate", highest_seq=2**63))
    assert born.disk is not None
    assert born.disk.outstanding is None


def test_an_update_is_sent_again_60_s_after_the_last_puback_then_doubling_to_an_hour() -> None:
    _, born, frame = sending()
    born.now += 5
    born.handle(events.Published(seq=frame.seq))
    gaps, last = [], born.now
    for _ in range(9):
        while not (done := published(born.wait(1), "update")):
            pass
        assert done == [frame]
        gaps.append(born.now - last)
        last = born.now
        born.handle(events.Published(seq=frame.seq))
    for number, gap in enumerate(gaps):
        least = min(60 * 2**number, 3600)
        assert least <= gap <= 1.25 * least + 1
    assert len({round(gap / min(60 * 2**number, 3600), 3) for number, gap in enumerate(gaps)}) > 3  # jitter


def test_what_the_broker_has_not_acknowledged_is_given_more_time() -> None:
    _, born, frame = sending()
    assert published(born.wait(590), "update") == []
    assert published(born.wait(200), "update") == [frame]


def test_an_update_is_sent_again_after_a_reconnect_and_when_the_aggregator_comes() -> None:
    scripted, born, frame = sending()
    born.handle(events.Disconnected(reason="gone"))
    born.wait(1)
    assert published(born.connect(), "update") == []  # whether the aggregator is there is not known yet
    assert published(born.arrive(scripted.status(session=1)), "update") == [frame]
    assert published(born.arrive(scripted.status(session=1)), "update") == []
    assert published(born.arrive(scripted.status(session=2)), "update") == [frame]
    born.arrive(scripted.status("offline", session=2))
    assert published(born.wait(10_000), "update") == []
    assert published(born.arrive(scripted.status(session=2)), "update") == []  # offline is final within a session
    assert published(born.arrive(scripted.status(session=1)), "update") == []
    assert published(born.arrive(scripted.status(session=3)), "update") == [frame]


def test_an_old_status_within_a_session_is_ignored() -> None:
    scripted, born = aggregator(), device()
    old = scripted.status(session=1)
    born.arrive(scripted.status(session=1))
    born.handle(events.Disconnected(reason="gone"))
    born.wait(1)
    born.connect()
    born.arrive(old)
    assert born.core.presence.online is None


def test_a_receipt_or_grant_for_something_else_is_ignored() -> None:
    scripted, born, frame = sending()
    key = DEVICE_KEY.key_id
    topic = topics.down(FEDERATION, DEVICE, "receipt")
    _, foreign = scripted.receipt("other", key, frame.seq, "accepted")
    bad = [
        scripted.receipt(DEVICE, key, frame.seq + 1, "accepted"),
        scripted.receipt(DEVICE, b"k" * 8, frame.seq, "accepted"),
        (topic, foreign),
        scripted.receipt("other", key, frame.seq, "accepted"),
        scripted.grant(DEVICE, key, frame.seq + 1, [[0, 0]]),
        scripted.receipt(DEVICE, key, frame.seq, "enrolled"),
    ]
    assert published(born.arrive(*bad), "update") == []
    assert born.core.dropped == {"not-outstanding": 4, "not-ours": 1, "odd-receipt": 1}
    assert born.disk is not None
    assert born.disk.outstanding is not None


def test_what_is_not_the_aggregators_is_dropped_and_counted_in_the_protocols_order() -> None:
    scripted, born = following()
    kept = born.disk
    topic, payload = scripted.head()
    forged = ScriptedAggregator(identity=Identity(b"f" * 32))
    flipped = bytearray(scripted.head()[1])
    flipped[8 + int.from_bytes(flipped[4:8], "little")] ^= 1
    born.arrive(
        forged.head(),
        ("ternbus/1/other/all/head", payload),
        (topics.status(FEDERATION), payload),
        (topic, bytes(flipped)),
        (topic, payload + b"body"),
        (
            topics.up(FEDERATION, DEVICE, "status"),
            published(born.actions, "status")[0] and of(born.actions, Publish)[0].payload,
        ),
        (topic, scripted.cut("head", parse(payload).meta, b"x" * 3000)[0]),
    )
    born.handle(events.FrameMalformed(reason="not-a-frame"))
    assert born.core.dropped == {
        "unknown-key": 1,
        "wrong-federation": 1,
        "wrong-topic": 1,
        "bad-signature": 1,
        "bad-digest": 1,
        "not-ours": 1,
        "bad-body": 1,
        "not-a-frame": 1,
    }
    assert born.disk is kept


def test_drops_are_logged_the_first_tenth_and_hundredth_time() -> None:
    born = device()
    done = [action for _ in range(120) for action in born.handle(events.FrameMalformed(reason="not-a-frame"))]
    assert [action.fields["count"] for action in of(done, Log)] == [1, 10, 100]


def test_a_head_below_the_highest_accepted_is_a_replay_also_after_a_restart() -> None:
    scripted, born = following()
    old = scripted.head()
    scripted.advance()
    same_version_later = scripted.head(version=0, digest=parse(old[1]).meta["digest"])
    born.arrive(*scripted.delta(1), scripted.head())
    again = born.reborn()
    again.connect()
    for life in (born, again):
        life.arrive(scripted.status(), old, same_version_later, scripted.head(seq=1))
        assert life.core.dropped["old-head"] == 3
    assert again.core.follower.head is None
    assert again.disk is not None
    assert again.disk.head_version == 1


def test_the_same_head_again_is_no_news() -> None:
    scripted, born = aggregator(), device()
    head = scripted.head()
    assert len(of(born.arrive(head), Save)) == 1
    assert of(born.arrive(head), Save) == []
    assert born.core.dropped == {}


def test_paused_follows_and_keeps_what_is_outstanding_but_sends_nothing() -> None:
    scripted, born, frame = sending()
    scripted.state = "paused"
    scripted.advance()
    born.arrive(*scripted.delta(1), scripted.head())
    assert born.core.follower.version == 1
    born.handle(events.Disconnected(reason="gone"))
    born.wait(1)
    born.connect()
    assert published(born.arrive(scripted.status(), scripted.head()) + born.wait(5000), "update") == []
    assert published(born.arrive(scripted.grant(DEVICE, DEVICE_KEY.key_id, frame.seq, [[0, 0]])), "update") == []
    scripted.state = "open"
    assert published(born.arrive(scripted.head()), "update") == [frame]


def test_paused_begins_no_training() -> None:
    _, born = following(scripted=aggregator(state="paused"))
    assert of(born.actions, StartTraining) == []


def test_closed_forgets_what_is_outstanding_and_ends_the_device() -> None:
    scripted, born, _ = sending()
    scripted.state = "closed"
    done = born.arrive(scripted.head())
    assert only(done, Save).kept.outstanding is None
    assert only(done, Stop).code == 0
    assert published(done, "status")[-1].meta["state"] == "offline"
    fresh = device()
    assert only(fresh.arrive(scripted.head()), Stop).reason == "the federation is closed"


def test_a_plan_that_is_nonsense_is_not_trained_by() -> None:
    scripted, born = following(scripted=aggregator(plan={"batch_size": -1}))
    assert "bad-plan" in logged(born.actions)
    assert of(born.actions, StartTraining) == []
    scripted.plan = {"batch_size": 7, "house": "rule"}
    plan = only(born.arrive(scripted.head()), StartTraining).plan
    assert (plan.batch_size, dict(plan.extra)) == (7, {"house": "rule"})


def test_the_federations_plan_goes_before_the_tasks_own() -> None:
    _, born = following(scripted=aggregator(plan={"batch_size": 7}), default_plan={"batch_size": 3, "local_epochs": 2})
    plan = only(born.actions, StartTraining).plan
    assert (plan.batch_size, plan.local_epochs) == (7, 2)


def test_training_that_fails_is_tried_again_on_the_next_version_only() -> None:
    scripted, born = following()
    done = born.handle(events.TrainingFailed(base=0, reason="diverged"))
    assert "training-failed" in logged(done)
    assert of(done + born.arrive(scripted.head()), StartTraining) == []
    scripted.advance()
    assert only(born.arrive(*scripted.delta(1), scripted.head()), StartTraining).base == 1


def test_a_result_that_nobody_waits_for_is_ignored() -> None:
    _, born, _ = sending()
    job = only(born.actions, StartTraining)
    kept = born.disk
    assert of(born.handle(trained(job)), Save) == []
    assert born.disk is kept


def test_the_seed_differs_by_device_and_version_and_is_the_same_again() -> None:
    scripted, born = following()
    seeds = [only(born.actions, StartTraining).seed]
    seeds.append(only(following(scripted=aggregator())[1].actions, StartTraining).seed)
    seeds.append(only(following(scripted=aggregator(plan={"seed": 1}))[1].actions, StartTraining).seed)
    assert seeds[0] == seeds[1] != seeds[2]
    assert scripted.version == 0


def contributed(scripted: ScriptedAggregator, born: Device, done: list[Action]) -> int | None:
    """The version that the device has begun to train on, if any. Its update is accepted at once."""
    for job in of(done, StartTraining):
        frame = update_in(born.handle(trained(job)))
        born.arrive(scripted.receipt(DEVICE, frame.key, frame.seq, "accepted"))
        return int(job.base)
    return None


def taking_turns(**plan: float) -> tuple[ScriptedAggregator, Device, Callable[[], bool]]:
    """A device that has just had its turn, and what makes a version and says whether the device trains on it."""
    scripted, born = following(scripted=aggregator(plan=plan))

    def advance() -> bool:
        scripted.advance()
        done = born.arrive(*scripted.delta(scripted.version), scripted.head())
        return contributed(scripted, born, done) is not None

    trains = contributed(scripted, born, born.actions) is not None
    while not trains:
        trains = advance()
    return scripted, born, advance


def test_a_device_that_takes_part_in_a_third_trains_on_every_third_version() -> None:
    scripted, _, advance = taking_turns(participation=1 / 3)
    assert scripted.version < 3
    assert [advance() for _ in range(9)] == [False, False, True] * 3


def test_a_version_that_lasts_passes_the_turns_on_and_none_is_taken_twice() -> None:
    scripted, born, advance = taking_turns(participation=1 / 3, turn_s=100.0)
    assert not advance()  # this one and the next are others'
    assert logged(born.actions)[-1] == "resting"
    assert logged(born.wait(199.9)) == logged(born.arrive(scripted.head())) == []  # said once
    assert contributed(scripted, born, born.wait(0.2)) == scripted.version
    assert born.core.learning.due_s is None
    assert [advance() for _ in range(6)] == [False, False, False, False, True, False]


def test_a_large_update_is_offered_and_sent_by_grant() -> None:
    scripted, born = following(scripted=aggregator(direct_parts=1))
    job = only(born.actions, StartTraining)
    big = np.random.default_rng(1).normal(size=job.schema.elements).astype(np.float32)
    born.core.uplink.frame_bytes = 2000
    event = replace(trained(job), block=Block.of_float32(job.schema, big))
    done = born.handle(event)
    (frame,) = published(done, "offer")
    assert published(done, "update") == []
    assert Offer.from_meta(frame.meta) == Offer(base=0, parts=3)
    key = DEVICE_KEY.key_id
    grant = scripted.grant(DEVICE, key, frame.seq, [[2, 9], [0, 0], [2, 2]], deadline_s=20.0)
    parts = published(born.arrive(grant), "update")
    assert [part.part for part in parts] == [0, 2]
    assert {part.seq for part in parts} == {frame.seq}
    assert of(born.arrive(grant), Publish) == []  # once is enough
    assert published(born.wait(19), "offer") == []
    assert published(born.wait(2), "offer") == [frame]
    scripted.direct_parts = 3
    born.arrive(scripted.head())
    born.handle(events.Disconnected(reason="gone"))
    born.wait(1)
    born.handle(events.Connected(frame_bytes=2000))
    assert len(published(born.arrive(scripted.status()), "update")) == 3


def test_an_update_that_no_longer_fits_is_cut_and_signed_anew_under_a_new_number() -> None:
    scripted = aggregator(plan={"seal": True}, direct_parts=8)
    _, born = following(scripted=scripted)
    job = only(born.actions, StartTraining)
    big = np.random.default_rng(1).normal(size=job.schema.elements).astype(np.float32)
    (frame,) = published(born.handle(replace(trained(job), block=Block.of_float32(job.schema, big))), "update")
    born.handle(events.Disconnected(reason="gone"))
    born.wait(1)
    born.handle(events.Connected(frame_bytes=2000))
    parts = published(born.arrive(scripted.status()), "update")
    assert len(parts) == 3
    assert {part.seq for part in parts} == {parts[0].seq}
    assert parts[0].seq > frame.seq
    (before,) = [save.answered for save in of(born.actions, Save) if save.answered is not None]
    header = blake2b(frame.header, digest_size=32).digest()
    assert (before.seq, before.outcome) == (frame.seq, "renumbered")  # it may have been accepted
    assert before.digest == blake2b(header, digest_size=32).digest()
    assert born.disk is not None
    assert born.disk.outstanding is not None
    plain = b"".join(part.body for part in parts).removeprefix(b"sealed:")
    assert plain[:16] == DEVICE_KEY.key_id + parts[0].seq.to_bytes(8, "little")
    born.handle(events.Published(seq=frame.seq))  # of the old number: means nothing now


def test_a_new_key_enrols_anew_and_signs_what_is_outstanding_anew() -> None:
    scripted, born, frame = sending()
    fresh = Identity(b"n" * 32)
    again = born.reborn(identity=fresh, code="second")
    again.connect()
    done = again.arrive(scripted.status(), scripted.head())
    assert published(done, "update") == []
    (enroll,) = published(done, "enroll")
    assert enroll.key == fresh.key_id
    done = again.arrive(scripted.receipt(DEVICE, fresh.key_id, ENROLL_SEQ, "enrolled"))
    update = update_in(done)
    assert (update.key, update.body, update.meta) == (fresh.key_id, frame.body, frame.meta)
    assert update.seq != ENROLL_SEQ
    assert Device(Core(member(identity=fresh), State(key=DEVICE_KEY.key_id))).core.kept.outstanding is None


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({**TENSORS, "w": (20, 50)}, "tensor 'w' is (20, 50) in the task and (50, 20) in the federation"),
        ({"w": (50, 20)}, "tensor 'b' is missing in the task"),
        ({**TENSORS, "c": (3,)}, "tensor 'c' is (3,) in the task and missing in the federation"),
    ],
)
def test_a_task_that_does_not_fit_is_a_configuration_error_that_names_the_tensor(tensors: Any, words: str) -> None:
    _, born = following(tensors=tensors)
    stop = only(born.actions, Stop)
    assert stop.code == 2
    assert words in stop.reason


def test_a_task_is_checked_again_when_another_one_fitted_before() -> None:
    scripted, born, _ = sending()
    again = born.reborn(tensors={**TENSORS, "c": (3,)})
    again.connect()
    assert only(again.arrive(scripted.status(), scripted.head(), *scripted.snapshot()), Stop).code == 2


def test_another_schema_than_the_one_joined_is_not_followed() -> None:
    other = Schema.of({"x": (9,)})
    _, born = following(kept={"schema": other.encoded})
    assert only(born.actions, Stop).code == 2


def test_it_says_for_whom_it_waits_every_ten_seconds() -> None:
    born = Device(Core(member(), State(key=DEVICE_KEY.key_id, enrolled=True)))
    born.handle(events.Started())
    assert logged(born.wait(25)) == ["waiting"] * 3
    born.handle(events.ConnectFailed(reason="refused"))
    born.wait(1)
    born.connect()
    scripted = aggregator()
    born.wait(5)
    born.arrive(scripted.status())
    born.wait(5)
    born.arrive(scripted.head())
    born.wait(5)
    texts = [action.text for action in of(born.actions, Log) if action.event == "waiting"]
    assert texts[3:] == [
        "waiting for the aggregator",
        "waiting for the aggregator's first head",
        "waiting for version 0 of the model",
    ]
    born.arrive(*scripted.snapshot())
    assert logged(born.wait(100)) == []


def test_an_enrolment_without_an_answer_is_waited_for_too() -> None:
    born = device("join", kept={"enrolled": False}, code="c", timeout_s=20.0)
    scripted = aggregator()
    born.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
    stop = only(born.wait(21), Stop)
    assert stop.code == 1
    assert "gave up after waiting 20 s for the aggregator to admit this device" in stop.reason


def test_it_gives_up_only_when_told_to() -> None:
    born = Device(Core(member(timeout_s=60.0), State(key=DEVICE_KEY.key_id, enrolled=True)))
    born.handle(events.Started())
    born.handle(events.ConnectFailed(reason="refused"))
    done = born.wait(59)
    assert of(done, Stop) == []
    for _ in range(100):
        if (stops := of(born.wait(1), Stop)) or of(born.handle(events.ConnectFailed(reason="refused")), Stop):
            break
    assert "the broker (refused)" in (stops or of(born.actions, Stop))[0].reason


def test_it_stops_after_so_many_accepted_updates() -> None:
    scripted, born = following(versions=2)
    for version in range(2):
        frame = update_in(born.handle(trained(of(born.actions, StartTraining)[-1])))
        done = born.arrive(scripted.receipt(DEVICE, DEVICE_KEY.key_id, frame.seq, "accepted"))
        assert len(of(done, Stop)) == (version == 1)
        scripted.advance()
        born.arrive(*scripted.delta(version + 1), scripted.head())


def test_a_stop_says_goodbye_if_somebody_listens() -> None:
    born = device()
    done = born.handle(events.StopRequested(reason="SIGTERM"))
    assert [type(action) for action in done] == [Publish, Stop]
    assert only(done, Stop).code == 0
    alone = Device(Core(member(), State(key=DEVICE_KEY.key_id, enrolled=True)))
    assert [type(action) for action in alone.handle(events.StopRequested(reason="SIGTERM"))] == [Stop]


def test_a_refusal_of_the_broker_is_said_and_the_update_tried_again_later() -> None:
    _, born, frame = sending()
    done = born.handle(events.Refused(seq=frame.seq, reason="Quota exceeded"))
    assert logged(done) == ["refused"]
    assert published(born.wait(80), "update") == [frame]


def test_a_broker_that_refuses_everything_does_not_fill_the_log() -> None:
    born = device()
    done = [action for _ in range(1000) for action in born.handle(events.Refused(seq=9, reason="Quota exceeded"))]
    assert [log.fields["count"] for log in of(done, Log)] == [1, 10, 100, 1000]


def test_the_evaluator_takes_each_version_once_and_the_newest_whenever_free() -> None:
    scripted, born = following("evaluate")
    job = only(born.actions, StartEvaluation)
    assert (job.version, job.vector.tobytes()) == (0, scripted.vectors[0].tobytes())
    for _ in range(2):
        scripted.advance()
        assert of(born.arrive(*scripted.delta(scripted.version), scripted.head()), StartEvaluation) == []
    done = born.handle(events.Evaluated(version=0, samples=9, values={"accuracy": 0.5, "loss": 2.0}))
    assert isinstance(done[0], Save)
    assert done[0].kept.evaluated == 0
    (frame,) = published(done, "metrics")
    assert Metrics.from_meta(frame.meta) == Metrics(
        version=0, samples=9, split="test", values={"accuracy": 0.5, "loss": 2.0}
    )
    assert only(done, StartEvaluation).version == 2
    assert published(born.actions, "update") == []
    again = born.reborn()
    again.connect()
    done = again.arrive(
        scripted.status(), scripted.head(), *scripted.snapshot(), *scripted.delta(1), *scripted.delta(2)
    )
    assert only(done, StartEvaluation).version == 2


def test_metrics_are_published_until_the_broker_has_them() -> None:
    _, born = following("evaluate")
    born.handle(events.Disconnected(reason="gone"))
    done = born.handle(events.Evaluated(version=0, samples=9, values={"accuracy": 0.5}))
    assert published(done, "metrics") == []
    born.wait(1)
    (frame,) = published(born.connect(), "metrics")
    born.handle(events.Published(seq=frame.seq))
    born.handle(events.Disconnected(reason="gone"))
    born.wait(1)
    assert published(born.connect(), "metrics") == []


def test_metrics_that_nobody_takes_are_bounded() -> None:
    _, born = following("evaluate")
    for version in range(100):
        born.handle(events.Evaluated(version=version, samples=9, values={}))
    assert len(born.core.evaluating.pending) == 64


def test_the_evaluator_of_a_closed_federation_evaluates_the_last_version_first() -> None:
    scripted, born = following("evaluate")
    scripted.state = "closed"
    assert of(born.arrive(scripted.head()), Stop) == []
    done = born.handle(events.Evaluated(version=0, samples=9, values={"accuracy": 0.5}))
    assert of(done, Stop) == []
    (frame,) = published(done, "metrics")
    assert only(born.handle(events.Published(seq=frame.seq)), Stop).code == 0


def test_the_evaluator_stops_after_so_many_versions() -> None:
    scripted, born = following("evaluate", versions=1)
    scripted.advance()
    born.arrive(*scripted.delta(1), scripted.head())
    done = born.handle(events.Evaluated(version=0, samples=9, values={"accuracy": 0.5}))
    assert of(done, StartEvaluation) == []
    (frame,) = published(done, "metrics")
    assert only(born.handle(events.Published(seq=frame.seq)), Stop).code == 0


def test_an_update_of_a_training_that_ends_while_disconnected_is_sent_later() -> None:
    scripted, born = following()
    born.handle(events.Disconnected(reason="gone"))
    done = born.handle(trained(only(born.actions, StartTraining)))
    assert of(done, Publish) == []
    assert only(done, Save).kept.outstanding is not None
    born.wait(1)
    born.connect()
    assert len(published(born.arrive(scripted.status(), scripted.head()), "update")) == 1


# --- what versions are worth on data held out, and a model of the device's own

VALUES = {"accuracy": 0.5, "loss": 2.0}


def tried(version: int = 0) -> events.Evaluated:
    return events.Evaluated(version=version, samples=9, values=VALUES)


def metrics_in(actions: list[Action]) -> Metrics:
    (frame,) = published(actions, "metrics")
    return Metrics.from_meta(frame.meta)


def test_a_device_that_reports_tries_a_version_before_it_trains_on_it_and_calls_it_local() -> None:
    scripted, born = following(reports=True)
    kinds = [type(action) for action in born.actions if isinstance(action, StartEvaluation | StartTraining)]
    assert kinds == [StartEvaluation, StartTraining]
    done = born.handle(tried())
    assert only(done, Save).kept.evaluated == 0
    assert metrics_in(done) == Metrics(version=0, samples=9, split="local", values=VALUES)
    scripted.advance()
    assert of(born.arrive(*scripted.delta(1), scripted.head()), StartEvaluation) == []  # it is training
    assert only(born.handle(trained(only(born.actions, StartTraining))), StartEvaluation).version == 1


def test_a_device_that_was_not_allowed_to_reports_nothing() -> None:
    _, born = following()
    assert of(born.actions, StartEvaluation) == []


PRIVATE = {"dp": "device", "dp_clip": 1.0, "dp_noise": 1.0, "dp_epsilon": 8.0}


@pytest.mark.parametrize("plan", [{"seal": True}, PRIVATE, {"batch_size": -1}])
def test_metrics_of_a_devices_own_data_stay_here_where_the_plan_seals_or_adds_noise_or_cannot_be_read(
    plan: dict[str, Any],
) -> None:
    _, born = following(scripted=aggregator(plan=plan), reports=True)
    done = born.handle(tried())
    assert logged(done) == ["evaluated"]
    assert published(done, "metrics") == []
    judged = following("evaluate", aggregator(plan=plan))[1].handle(tried())
    assert metrics_in(judged).split == "test"  # the test data are the task's


def test_many_reports_do_not_end_a_device_that_was_to_make_so_many_updates() -> None:
    scripted, born = following(reports=True, versions=2)
    done = born.handle(tried())
    for version in (1, 2):
        scripted.advance()
        born.arrive(*scripted.delta(version), scripted.head())
        done += born.handle(tried(version))
    assert of(done, Stop) == []


def test_a_device_that_reports_tries_the_last_version_before_it_leaves() -> None:
    scripted, born = following(reports=True)
    born.handle(tried())
    scripted.advance()
    scripted.state = "closed"
    assert of(born.arrive(*scripted.delta(1), scripted.head()), Stop) == []
    assert only(born.handle(trained(only(born.actions, StartTraining))), StartEvaluation).version == 1
    done = born.handle(tried(1))
    assert of(done, Stop) == []
    reports = published(born.actions, "metrics")
    assert [frame.meta["version"] for frame in reports] == [0, 1]
    for frame in reports:
        done = born.handle(events.Published(seq=frame.seq))
    assert only(done, Stop).code == 0


def closed(**changes: Any) -> tuple[Device, StartFineTuning]:
    """A device that makes a model of its own from the last version, which is 1."""
    scripted, born = following(fine_tune=3.0, **changes)
    scripted.advance()
    scripted.state = "closed"
    born.arrive(*scripted.delta(1), scripted.head())
    for version in (0, 1) if changes.get("reports") else ():
        born.handle(tried(version))
    born.handle(trained(only(born.actions, StartTraining)))
    if changes.get("reports"):
        for frame in published(born.actions, "metrics"):
            born.handle(events.Published(seq=frame.seq))
        born.handle(tried(1))
    return born, only(born.actions, StartFineTuning)


def tuned(version: int = 1) -> events.FineTuned:
    better = {"accuracy": 0.75, "loss": 1.0}
    return events.FineTuned(version=version, samples=9, before=VALUES, after=better, tensors={"w": np.ones(2)})


def test_before_it_leaves_a_device_makes_a_model_of_its_own_and_tells_its_owner_only() -> None:
    born, job = closed()
    assert (job.version, job.plan.local_epochs) == (1, 3.0)
    assert of(born.actions, Stop) == []
    assert of(born.handle(events.TimeReached()), StartFineTuning) == []  # it is on its way
    done = born.handle(tuned())
    kinds = [type(action) for action in done if not isinstance(action, Publish)]
    assert kinds in ([SavePersonal, Log, Stop], [Save, SavePersonal, Log, Stop])
    saved = only(done, SavePersonal)
    assert saved.about.startswith("pi: own model from version 1, on 9 samples held out: accuracy 0.5000 -> 0.7500")
    assert published(done, "metrics") == []


def test_what_the_own_model_gains_is_reported_where_the_owner_allows_it() -> None:
    born, _ = closed(reports=True)
    done = born.handle(tuned())
    assert of(done, Stop) == []
    assert metrics_in(done) == Metrics(
        version=1, samples=9, split="local", values={**VALUES, "personal_accuracy": 0.75, "personal_loss": 1.0}
    )
    for frame in published(born.actions, "metrics"):
        done = born.handle(events.Published(seq=frame.seq))
    assert only(done, Stop).code == 0


def test_a_model_of_its_own_that_came_to_nothing_keeps_nobody() -> None:
    born, _ = closed()
    done = born.handle(events.FineTuningFailed(version=1, reason="diverged"))
    assert logged(done) == ["fine-tuning-failed"]
    assert of(done, SavePersonal) == []
    assert only(done, Stop).code == 0


def test_without_a_plan_that_can_be_followed_there_is_no_model_of_its_own() -> None:
    scripted, born = following(scripted=aggregator(plan={"batch_size": -1}), fine_tune=3.0)
    scripted.state = "closed"
    assert only(born.arrive(scripted.head()), Stop).code == 0


def test_after_so_many_updates_the_own_model_is_made_and_nothing_else_trained() -> None:
    scripted, born = following(fine_tune=1.0, versions=1)
    update = update_in(born.handle(trained(only(born.actions, StartTraining))))
    scripted.advance()
    born.arrive(*scripted.delta(1), scripted.head())
    done = born.arrive(scripted.receipt(DEVICE, update.key, update.seq, "accepted"))
    assert only(done, StartFineTuning).version == 1
    assert of(done, StartTraining) == []
    assert only(born.handle(tuned()), Stop).code == 0


def test_a_federation_that_opens_again_while_the_own_model_is_made_is_trained_for() -> None:
    scripted, born = following(fine_tune=1.0)
    scripted.state = "closed"
    assert len(of(born.arrive(scripted.head()), StartFineTuning)) == 1
    scripted.advance()
    scripted.state = "open"
    born.arrive(*scripted.delta(1), scripted.head())
    born.handle(trained(only(born.actions, StartTraining)))
    assert of(born.handle(tuned(0)), Stop) == []
    (frame,) = published(born.actions, "update")
    assert only(born.arrive(scripted.receipt(DEVICE, frame.key, frame.seq, "accepted")), StartTraining).base == 1
