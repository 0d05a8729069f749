"""A private device that crashes between any two actions, with an aggregator that lies in receipts to get more of it.

Scales are such that every draw is exact: what training gave must be in the one update on its version, and nowhere
twice. Nothing ever comes back, and each base has one content, with one context, one set of seeds, under every number
and key.
"""

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule

from support.at_length import at_length, in_every_run
from support.crashing_device import DEVICE, KEY, Answers, CrashingDevice
from support.private_sums import helper_key, opened, seeds_in, terms_for
from support.scripted_aggregator import Message
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame, parse
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.messages import Offer, Update
from ternbus.broker.protocol.parts import Whole
from ternbus.broker.protocol.schema import Vector
from ternbus.broker.protocol.ternary import Block
from ternbus.broker.sums.terms import Terms, digest_of
from ternbus.edge.core import events
from ternbus.edge.core.actions import StartTraining
from ternbus.edge.core.state import AnsweredUpdate, OutstandingUpdate, State
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.private_sum import encode
from ternbus.edge.learn.sum_content import SumContent, value
from ternbus.edge.plan.sum_policy import SumPolicy

KEYS = tuple(Identity(bytes([each]) * 32) for each in range(40, 44))  # of renewals
SCALE = 16.0  # with as many levels, every whole number is a level; at half of it, too
FRAME_BYTES = (2000, 1700)


class PrivateAnswers(Answers):
    """The aggregator and the helper together, who may open one update: so what it carries is known."""

    terms: Terms  # for the layout alone
    device: Identity = KEY
    seen: dict[int, set[tuple[bytes, bytes, bytes]]]  # by base: context, words, seed
    frames: dict[int, Frame]  # by seq: a part of each update, with its boxes

    def value_of(self, about: Update, whole: Whole) -> Vector:
        assert (about.codec, about.sealed, about.samples, about.min) == ("private", True, 1, 5)
        return value(self.scripted.schema, self.terms, self.words(about, whole))

    def words(self, about: Update, whole: Whole) -> bytes:
        frame = self.frames[whole.seq]
        (seed,) = seeds_in(frame, self.device.public)
        words = opened(self.terms, whole, self.device, whole.body, [seed]).tobytes()
        self.seen.setdefault(about.base, set()).add((about.context, words, seed))
        return words


class CrashingPrivateDevice(CrashingDevice):
    """The device of before, with pins; it also renews its key, and is lied to."""

    WRITTEN = ("disk", "records", "left")
    answers: PrivateAnswers

    def prepare(self) -> None:
        self.scripted.direct_parts = 0  # each update is offered first, so that one may be late before it was sent
        self.terms = terms_for(self.scripted.schema, bits=8, levels=16, scales=(SCALE, SCALE))
        self.scripted.plan = {"codec": "private", "error_feedback": True, "terms": digest_of(self.terms.content())}
        self.scripted.plan["schema"] = self.scripted.schema.digest
        self.retained |= dict(self.terms_messages())
        self.profile = replace(self.profile, sums=SumPolicy(helpers=(helper_key(1).public,)))
        self.answers = self.new_answers(KEY, {})
        self.left = np.zeros(self.scripted.schema.elements, np.float32)  # what answered updates carried
        self.out: set[int] = set()  # bases of which a frame was published
        self.renewals = 0

    def new_answers(self, identity: Identity, seen: dict[int, set[tuple[bytes, bytes, bytes]]]) -> PrivateAnswers:
        answers = PrivateAnswers(self.scripted, identity.key_id)
        answers.terms, answers.device, answers.seen, answers.frames = self.terms, identity, seen, {}
        return answers

    def terms_messages(self) -> list[Message]:
        frames = self.scripted.cut("terms", {}, self.terms.content())
        return [(topics.terms(self.profile.federation, part), frame) for part, frame in enumerate(frames)]

    def before_the_head(self) -> list[Message]:
        self.scripted.plan["terms"] = digest_of(self.terms.content())
        return self.terms_messages()

    def is_wanted(self, topic: str, filters: tuple[str, ...]) -> bool:
        return topic in filters or ("/terms/" in topic and any(each.endswith("/terms/#") for each in filters))

    def encoded(
        self, job: StartTraining, change: Vector, block: Block, kept_back: Vector
    ) -> tuple[Block | SumContent, Vector | None]:
        assert job.sums is not None
        assert job.residual is None
        return encode(job.schema, job.sums.terms, job.plan, change, samples=1, random_source=RandomSource()), None

    def check_public(self, frame: Frame) -> None:
        super().check_public(frame)
        assert frame.kind in {"status", "offer", "update", "enroll"}
        if frame.kind == "update":
            base = frame.meta["base"]
            assert self.disk.left >= base  # on disk before it leaves
            self.out.add(base)
            self.answers.frames.setdefault(frame.seq, frame)

    def save(self, state: State, answered: AnsweredUpdate | None) -> None:
        before, after = self.disk.outstanding, state.outstanding
        if before is after is None and state.answered_base > self.disk.answered_base:  # late when training ended
            assert self.change is not None
            assert state.local == self.local
            self.gained += self.change
            self.left += self.change
            self.disk = replace(self.disk, local=state.local)
        if before is not None and after is None:
            self.gone(before, answered)
            answered = answered or AnsweredUpdate(
                seq=before.seq, base=before.base, outcome="withdrawn", version=0, key=self.disk.key, digest=b""
            )
        elif before is not None and after is not None:
            assert (after.base, after.encoded) == (before.base, before.encoded)
            assert before.private is not None
            assert after.private is not None
            assert after.private.seeds == before.private.seeds
            assert after.private.context == before.private.context
            assert (after.private.boxes == before.private.boxes) == (
                after.seq == before.seq and state.key == self.disk.key
            )
        super().save(state, answered)

    def gone(self, update: OutstandingUpdate, answered: AnsweredUpdate | None) -> None:
        """Account for an update that has an end: it was answered, or was late before a frame of it was out."""
        self.left += self.carried(update)
        assert answered is not None or update.base not in self.out

    def carried(self, update: OutstandingUpdate) -> Vector:
        assert update.private is not None
        return value(self.scripted.schema, Terms.parse(update.private.terms), update.encoded)

    def receive(self, payload: bytes, busy: bool = False) -> None:
        frame = parse(payload)
        if frame.key != self.answers.key:
            return
        if frame.kind == "enroll":
            self.down.append(self.scripted.receipt(DEVICE, self.answers.key, frame.seq, "enrolled"))
        if frame.kind == "offer":
            self.offered(frame, Offer.from_meta(frame.meta))
        super().receive(payload, busy)

    def offered(self, frame: Frame, offer: Offer) -> None:
        if (known := self.answers.known(frame.seq)) is not None:
            self.down.append(known)
            return
        if offer.base < self.scripted.version - self.scripted.max_staleness:
            self.answers.highest, self.answers.answer = frame.seq, "stale"
            self.down.append(self.scripted.receipt(DEVICE, self.answers.key, frame.seq, "stale"))
        else:
            parts = [[0, offer.parts - 1]]
            self.down.append(self.scripted.grant(DEVICE, self.answers.key, frame.seq, parts))

    # -- what may happen besides

    @precondition(lambda self: self.disk.outstanding is not None and self.connected)
    @rule(outcome=st.sampled_from(["stale", "duplicate", "invalid", "accepted"]))
    def the_aggregator_lies(self, outcome: str) -> None:
        """It settles the outstanding update as it likes, whether it has it or not."""
        update = self.disk.outstanding
        assert update is not None
        topic, payload = self.scripted.receipt(DEVICE, self.answers.key, update.seq, outcome)
        self.handle(events.FrameArrived(topic=topic, frame=parse(payload), retained=True))

    @precondition(lambda self: self.disk.outstanding is not None and self.connected)
    @rule(ahead=st.integers(1, 200))
    def the_aggregator_has_it_renumbered(self, ahead: int) -> None:
        update = self.disk.outstanding
        assert update is not None
        topic, payload = self.scripted.receipt(
            DEVICE, self.answers.key, update.seq, "duplicate", highest_seq=update.seq + ahead
        )
        self.handle(events.FrameArrived(topic=topic, frame=parse(payload), retained=True))

    @precondition(lambda self: self.renewals < len(KEYS))
    @rule()
    def the_key_is_renewed(self) -> None:
        identity = KEYS[self.renewals]
        self.renewals += 1
        self.crash_after = None
        self.profile = replace(self.profile, identity=identity)
        self.answers = self.new_answers(identity, self.answers.seen)
        self.start()

    @precondition(lambda self: self.crash_after is None)
    @rule(messages=st.integers(0, 4), change=st.integers(-4, 4))
    def the_device_comes_far(self, messages: int, change: int) -> None:
        """Else few examples reach an update of which something was sent."""
        self.aggregator_comes_or_goes(9, online=True)
        self.the_network_works_for_a_while(40)
        if self.job is not None:
            self.finish_training(change)
        self.the_network_works_for_a_while(messages)

    @rule(scale=st.sampled_from([SCALE, SCALE / 2]))
    def new_terms(self, scale: float) -> None:
        """They are named by the next head only."""
        self.terms = replace(self.terms, scales=(scale, scale), levels=16)

    # -- what must hold

    @invariant()
    def nothing_is_lost_and_nothing_counts_twice(self) -> None:
        if not hasattr(self, "disk"):
            return
        assert self.disk.residual is None
        total = self.left.copy()
        if self.disk.outstanding is not None:
            total += self.carried(self.disk.outstanding)
        np.testing.assert_array_equal(total, self.gained)

    @invariant()
    def each_base_has_one_content_with_one_context_and_one_seed(self) -> None:
        if not hasattr(self, "disk"):
            return
        seen = self.answers.seen
        assert all(len(each) == 1 for each in seen.values())
        for place in (0, 2):  # context, seed
            assert len({next(iter(each))[place] for each in seen.values()}) == len(seen)

    def teardown(self) -> None:
        """With an honest network it comes to an end; what was lied about is lost, and nothing else."""
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
        assert self.disk.outstanding is None
        assert self.disk.answered_base == self.scripted.version
        assert not [each for each in self.sent if each[1] == "metrics"]


TestCrashingPrivateDevice = in_every_run(CrashingPrivateDevice, max_examples=30, stateful_step_count=80)
TestCrashingPrivateDeviceAtLength = at_length(CrashingPrivateDevice, max_examples=200, stateful_step_count=80)
