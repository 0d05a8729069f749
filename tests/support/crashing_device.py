"""A device that crashes between any two actions, on a network that loses, doubles and reorders messages.

A cut of the power takes with it any number of the last saves that were not durable.

Changes are small whole numbers sent as float32, so that every sum is exact: what training gave must at any time be in
what was accepted, in the outstanding update, or in the residual, and nowhere twice.
"""

from copy import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from support.scripted_aggregator import FEDERATION, SHAPES, Message, ScriptedAggregator
from ternbus.broker.protocol.frame import Frame, parse
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.messages import Update
from ternbus.broker.protocol.parts import Collector, Whole
from ternbus.broker.protocol.schema import Vector
from ternbus.broker.protocol.ternary import Block
from ternbus.edge.core import events
from ternbus.edge.core.actions import Action, Connect, Publish, Save, StartTraining, Stop, Subscribe, Unsubscribe
from ternbus.edge.core.core import Core
from ternbus.edge.core.profile import Profile
from ternbus.edge.core.state import AnsweredUpdate, State
from ternbus.edge.learn.sum_content import SumContent
from ternbus.edge.plan.privacy import Cost

DEVICE = "pi"
KEY = Identity(b"d" * 32)
FRAME_BYTES = 2000


@dataclass
class Answers:
    """What an aggregator remembers of one key: the rules of the protocol, written down once more, plainly."""

    scripted: ScriptedAggregator
    key: bytes = KEY.key_id
    highest: int = 0
    answer: str = ""
    bases: set[int] = field(default_factory=set)
    merged: dict[int, Vector] = field(default_factory=dict)  # by seq

    def update(self, whole: Whole, busy: bool) -> Message | None:
        about = Update.from_meta(whole.meta)
        if (known := self.known(whole.seq)) is not None:
            return known
        if busy:
            return self._receipt(whole.seq, "busy", retry_after_s=5.0)
        value = self.value_of(about, whole)
        if about.base in self.bases:
            outcome = "duplicate"
        elif about.base < self.scripted.version - self.scripted.max_staleness:
            outcome = "stale"
        else:
            outcome = "accepted"
            self.bases.add(about.base)
            self.merged[whole.seq] = value
        self.highest, self.answer = whole.seq, outcome
        return self._receipt(whole.seq, outcome)

    def known(self, seq: int) -> Message | None:
        """The answer for a number that was answered, or is below one that was."""
        if seq < self.highest:
            return self._receipt(seq, "duplicate", highest_seq=self.highest)
        return self._receipt(seq, self.answer) if seq == self.highest else None

    def value_of(self, about: Update, whole: Whole) -> Vector:
        return Block.read(self.scripted.schema, about.codec, about.encoding, whole.body).value()

    def _receipt(self, seq: int, outcome: str, **more: float) -> Message:
        return self.scripted.receipt(DEVICE, self.key, seq, outcome, **more)


class CrashingDevice(RuleBasedStateMachine):
    """Rules are what may happen; each may be followed by any other."""

    WRITTEN: ClassVar[tuple[str, ...]] = ("disk", "records")  # what goes back with the disk where the power fails

    @initialize()
    def begin(self) -> None:
        self.scripted = ScriptedAggregator(max_staleness=1)
        self.answers = Answers(self.scripted)
        self.collector = Collector(4, 2**20)
        self.profile = Profile(
            federation=FEDERATION,
            device=DEVICE,
            identity=KEY,
            aggregator_public=self.scripted.identity.public,
            seal=bytes,
            role="train",
            tensors={name: tuple(shape) for name, shape in SHAPES.items()},
        )
        self.retained: dict[str, bytes] = {}
        self.prepare()
        self.retained |= dict([*self.scripted.snapshot(), self.scripted.status(), self.scripted.head()])
        self.now = 0.0
        self.disk = State(key=KEY.key_id, enrolled=True)
        self.records: list[AnsweredUpdate] = []
        self.unsynced: list[dict[str, Any]] = []  # what was on disk before each save since the last durable one
        self.gained = np.zeros(self.scripted.schema.elements, np.float32)  # by trainings whose result was saved
        self.sent: dict[tuple[bytes, str, int, int], bytes] = {}
        self.told: set[int] = set()  # the versions on which an update was made and sent
        self.past: list[Message] = []  # all that was ever delivered
        self.crash_after: int | None = None
        self.start()

    def prepare(self) -> None:
        """Settle what aggregator and device are like, before the first head."""

    def start(self) -> None:
        """The process begins, with nothing but the disk."""
        self.core = Core(self.profile, self.disk)
        self.connected = False
        self.wants_connection = False
        self.job: StartTraining | None = None
        self.result: events.TrainingFinished | None = None
        self.change: Vector | None = None
        self.local = b""  # the device's own tensors after the last training
        self.down: list[Message] = []
        self.up: list[bytes] = []
        self.live: set[str] = set()
        self.handle(events.Started())

    # -- what performs the core's actions, and may stop half-way

    def handle(self, event: events.Event) -> None:
        for action in self.core.handle(event, self.now):
            if self.crash_after is not None:
                if self.crash_after == 0:
                    self.crash_after = None
                    self.start()
                    return
                self.crash_after -= 1
            self.perform(action)

    def perform(self, action: Action) -> None:
        match action:
            case Save(state=state, answered=answered, durable=durable):
                self.unsynced.append({name: copy(getattr(self, name)) for name in self.WRITTEN})
                self.save(state, answered)
                if durable:
                    self.unsynced.clear()
            case Connect(will_payload=will):
                self.check_public(parse(will))
                self.wants_connection = True
            case Subscribe(filters=filters):
                self.live.update(filters)
                self.down += [each for each in self.retained.items() if self.is_wanted(each[0], filters)]
            case Unsubscribe(filters=filters):
                self.live.difference_update(filters)
            case Publish(payload=payload):
                self.check_public(parse(payload))
                if self.connected:
                    self.up.append(payload)
            case StartTraining():
                assert self.job is None
                assert self.disk.outstanding is None
                assert action.base > self.disk.answered_base
                assert action.vector.tobytes() == self.scripted.vectors[action.base].tobytes()
                self.job = action
            case Stop():
                raise AssertionError(action.reason)
            case _:
                pass

    def is_wanted(self, topic: str, filters: tuple[str, ...]) -> bool:
        """Whether a retained message comes by these filters; those of deltas were missed, and are asked for by name."""
        return topic in filters

    def save(self, state: State, answered: AnsweredUpdate | None) -> None:
        assert state.head_version >= self.disk.head_version
        assert state.head_seq >= self.disk.head_seq
        assert state.seq_limit >= self.disk.seq_limit or state.key != self.disk.key
        before, after = self.disk.outstanding, state.outstanding
        if before is None and after is not None:
            assert self.change is not None
            self.gained += self.change
            assert state.local == self.local  # which becomes durable with the update,
        else:
            assert state.local == self.disk.local  # and at no other time
        if before is not None and after is None:
            assert answered is not None
            self.records.append(answered)
        self.disk = state

    def check_public(self, frame: Frame) -> None:
        """Nothing public is unsaved, and no number stands for two messages."""
        assert frame.seq < self.disk.seq_limit
        if frame.kind == "status":
            assert frame.meta["session"] <= self.disk.session
        if frame.kind in {"update", "offer"}:
            assert self.disk.outstanding is not None
            self.told.add(frame.meta["base"])
            assert len(self.told) <= sum(cost.steps for cost in self.disk.account.spent)  # each has been paid for
            assert self.disk.outstanding.seq == frame.seq
        first = self.sent.setdefault((frame.key, frame.kind, frame.seq, frame.part), frame.header + frame.body)
        assert first == frame.header + frame.body

    # -- what may happen

    @rule(after=st.integers(0, 6))
    def crash_soon(self, after: int) -> None:
        self.crash_after = after

    @rule()
    def crash(self) -> None:
        self.start()

    @precondition(lambda self: self.unsynced)
    @rule(data=st.data())
    def the_power_fails(self, data: st.DataObject) -> None:
        """SQLite's log on disk is then any beginning of what was written since the last durable save."""
        for name, value in self.unsynced[data.draw(st.integers(0, len(self.unsynced) - 1))].items():
            setattr(self, name, value)
        self.unsynced.clear()
        self.crash_after = None
        self.start()

    @precondition(lambda self: self.wants_connection)
    @rule(succeeds=st.booleans())
    def connect(self, succeeds: bool) -> None:
        self.wants_connection = False
        self.down, self.up = [], []
        self.connected = succeeds
        self.live = set()
        if succeeds:
            self.handle(events.Connected(frame_bytes=FRAME_BYTES))
        else:
            self.handle(events.ConnectFailed(reason="refused"))

    @precondition(lambda self: self.connected)
    @rule()
    def disconnect(self) -> None:
        self.connected = False
        self.handle(events.Disconnected(reason="gone"))

    @precondition(lambda self: self.connected and self.down)
    @rule(data=st.data(), fate=st.sampled_from(["once", "once", "once", "lost", "again"]))
    def deliver(self, data: st.DataObject, fate: str) -> None:
        chosen = data.draw(st.integers(0, len(self.down) - 1))
        topic, payload = self.down[chosen] if fate == "again" else self.down.pop(chosen)
        if fate != "lost":
            self.arrive(topic, payload)

    @precondition(lambda self: self.up)
    @rule(data=st.data(), fate=st.sampled_from(["once", "once", "lost", "again"]), busy=st.booleans())
    def aggregator_receives(self, data: st.DataObject, fate: str, busy: bool) -> None:
        chosen = data.draw(st.integers(0, len(self.up) - 1))
        payload = self.up[chosen] if fate == "again" else self.up.pop(chosen)
        if fate != "lost":
            self.receive(payload, busy)

    @precondition(lambda self: self.connected and self.past)
    @rule(data=st.data())
    def the_broker_replays(self, data: st.DataObject) -> None:
        topic, payload = self.past[data.draw(st.integers(0, len(self.past) - 1))]
        self.arrive(topic, payload)

    def arrive(self, topic: str, payload: bytes) -> None:
        self.past.append((topic, payload))
        self.handle(events.FrameArrived(topic=topic, frame=parse(payload), retained=True))

    @rule(messages=st.integers(1, 30))
    def the_network_works_for_a_while(self, messages: int) -> None:
        if self.wants_connection:
            self.connect(succeeds=True)
        for _ in range(messages):
            if self.up:
                self.receive(self.up.pop(0))
            elif self.down:
                self.arrive(*self.down.pop(0))

    def receive(self, payload: bytes, busy: bool = False) -> None:
        frame = parse(payload)
        if self.connected:
            self.handle(events.Published(seq=frame.seq))
        whole = self.collector.add(frame) if frame.kind == "update" else None
        if whole is not None and (receipt := self.answers.update(whole, busy)) is not None:
            self.down.append(receipt)

    @rule(snapshot=st.booleans())
    def aggregator_publishes(self, snapshot: bool) -> None:
        self.scripted.advance()
        messages = [*self.scripted.delta(self.scripted.version), *self.before_the_head()]
        if snapshot or self.scripted.version - self.scripted.snapshot_version >= 2:
            messages += self.scripted.new_snapshot()
        messages.append(self.scripted.head())
        self.retained.update(messages)
        if self.connected:
            self.down += [message for message in messages if "/snapshot/" not in message[0] or message[0] in self.live]

    def before_the_head(self) -> list[Message]:
        """What is published with a new version, before the head that needs it."""
        return []

    @rule(session=st.integers(2, 9), online=st.booleans())
    def aggregator_comes_or_goes(self, session: int, online: bool) -> None:
        message = self.scripted.status("online" if online else "offline", session)
        self.retained[message[0]] = message[1]
        self.down += [message] if self.connected else []

    @precondition(lambda self: self.job is not None)
    @rule(change=st.integers(-4, 4))
    def training_ends(self, change: int) -> None:
        self.finish_training(change)

    def finish_training(self, change: int) -> None:
        job, self.job = self.job, None
        assert job is not None
        assert job.local == self.disk.local
        self.local = job.local + b"t"
        self.change = np.full(job.schema.elements, change, np.float32)
        self.change[: 1000 : job.base + 1] += 1
        total = self.change if job.residual is None else self.change + job.residual
        kept_back = np.zeros_like(total)
        kept_back[::7] = total[::7]  # as error feedback would: part of it stays behind
        content, residual = self.encoded(job, self.change, Block.of_float32(job.schema, total - kept_back), kept_back)
        self.handle(
            events.TrainingFinished(
                base=job.base,
                samples=1,
                metrics={},
                content=content,
                residual=residual,
                account=job.account.plus(Cost(kind="device", noise=1.0, rate=1.0, steps=1)),
                local=self.local,
            )
        )

    def encoded(
        self, job: StartTraining, change: Vector, block: Block, kept_back: Vector
    ) -> tuple[Block | SumContent, Vector | None]:
        """What is sent of a change, and what is not."""
        assert job.sums is None
        assert change.size == kept_back.size
        return block, kept_back

    @rule(seconds=st.sampled_from([0.5, 5.0, 35.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        end = self.now + seconds
        for _ in range(200):
            due = self.core.due_s()
            if due is None or due > end:
                break
            self.now = max(self.now, due)
            self.handle(events.TimeReached())
        else:
            raise AssertionError("the core wants to be woken without end")
        self.now = end

    # -- what must hold

    @invariant()
    def nothing_is_lost_and_nothing_counts_twice(self) -> None:
        if not hasattr(self, "disk"):
            return
        total = np.zeros_like(self.gained)
        for record in self.records:
            if record.outcome == "accepted":
                total += self.answers.merged[record.seq]
        if self.disk.residual is not None:
            total += self.disk.residual
        if self.disk.outstanding is not None:
            total += self.disk.outstanding.block(self.scripted.schema).value()
        np.testing.assert_array_equal(total, self.gained)
        bases = [record.base for record in self.records if record.outcome == "accepted"]
        assert len(set(bases)) == len(bases)
        assert {record.outcome for record in self.records} <= {"accepted", "stale"}
        assert self.disk.accepted == len(bases)

    @invariant()
    def a_version_is_bit_exact(self) -> None:
        if hasattr(self, "core") and self.core.follower.version is not None:
            assert self.core.follower.vector is not None
            true = self.scripted.vectors[self.core.follower.version]
            assert self.core.follower.vector.tobytes() == true.tobytes()

    def teardown(self) -> None:
        """With an honest network it gets everywhere: synced, and every update answered."""
        if not hasattr(self, "disk"):
            return
        self.crash_after = None
        self.aggregator_comes_or_goes(10, online=True)
        for _ in range(60):
            if self.wants_connection:
                self.connect(succeeds=True)
            while self.down or self.up:
                while self.up:
                    self.receive(self.up.pop(0))
                if self.down:
                    self.arrive(*self.down.pop(0))
            if self.job is not None:
                self.finish_training(1)
            self.time_passes(35.0)
        assert self.core.follower.version == self.scripted.version
        assert self.disk.outstanding is None
        assert {record.seq for record in self.records if record.outcome == "accepted"} == set(self.answers.merged)
        assert self.disk.answered_base == self.scripted.version
