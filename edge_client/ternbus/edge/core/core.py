"""The device as a state machine without I/O: events in, actions out; the order of the actions is the promise.

Whatever an event changes in what is kept, one `Save` comes before everything else that it leads to: nothing is
public that is not on disk, and a receipt and what it changes are one durable write.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Final, assert_never

from ternbus.broker.backoff import Reconnect
from ternbus.broker.errors import ProtocolError
from ternbus.broker.exit_codes import EXIT_BUDGET, EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_REFUSED
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.messages import OPEN, Grant, Head, Receipt, Status
from ternbus.broker.protocol.schema import Schema
from ternbus.edge.core import events
from ternbus.edge.core.actions import Action, Connect, Log, Publish, StartTraining, Stop, Subscribe
from ternbus.edge.core.evaluation import EvaluationPolicy
from ternbus.edge.core.events import Event
from ternbus.edge.core.fine_tuning import FineTuning
from ternbus.edge.core.follower import Beginning, Follower
from ternbus.edge.core.pending_state import PendingState
from ternbus.edge.core.presence import Presence
from ternbus.edge.core.profile import ENROLL_SEQ, OFFLINE, Profile, misfit, subscriptions
from ternbus.edge.core.resend import Resend
from ternbus.edge.core.resubscribe import Resubscribe
from ternbus.edge.core.state import State
from ternbus.edge.core.training_policy import TrainingPolicy, sentence, spent
from ternbus.edge.core.uplink import Uplink
from ternbus.edge.core.wait_timer import WaitTimer

FIRST_ENROLL_RESEND_S: Final = 10.0


class Core:
    """One device. Call `handle` with what happened, perform what it returns, and wake it at `due_s`."""

    def __init__(self, member: Profile, kept: State, beginning: Beginning | None = None) -> None:
        self.member = member
        self.memory = PendingState(kept)
        self.follower = Follower(federation=member.federation, beginning=beginning)
        self.uplink = Uplink(member=member, memory=self.memory)
        self.learning = TrainingPolicy(member=member)
        self.evaluating = EvaluationPolicy(member=member, memory=self.memory)
        self.personal = FineTuning(member=member, learning=self.learning, evaluating=self.evaluating)
        self.presence = Presence()
        self.dropped: Counter[str] = Counter()
        self._reconnecting = Reconnect(salt=member.key.hex())
        self._enrolling = Resend(salt=member.key.hex(), first_s=FIRST_ENROLL_RESEND_S)
        self._waiting = WaitTimer(timeout_s=member.timeout_s)
        self._listening = Resubscribe()
        self._online = False  # whether there is a connection
        self._connecting = False
        self._trouble = ""  # why there is none
        self._head_state = ""
        self._heard_about: set[int] = set()  # the last status and metrics: a revocation may answer them
        self._contributed = 0  # updates accepted in this life
        self._fits = False  # the task's model has been held against the federation's schema
        self._leaving = self._stopped = False
        if kept.key != member.key:
            self.memory.replaced(kept.under(member.key))
            self.uplink.renewed()

    @property
    def kept(self) -> State:
        return self.memory.kept

    def handle(self, event: Event, now: float) -> list[Action]:
        """What to do about an event at time `now` (seconds of a clock that only goes forward)."""
        if self._stopped:
            return []
        try:
            actions = self._take(event, now)
        except ProtocolError as error:
            actions = self._drop(error)
        actions += self._work(now)
        return [*self.memory.save(), *actions]

    def due_s(self) -> float | None:
        """When to be woken with `TimeReached`, if nothing happens before."""
        times = [
            None if self._online or self._connecting else self._reconnecting.due_s,
            self.follower.due_s() if self._online else None,
            self._listening.due_s(self.presence.online is not None) if self._online else None,
            self._enroll_due_s(),
            self._send_due_s(),
            self._waiting.due_s(),
            None if self._leaving else self.learning.due_s,
        ]
        return None if self._stopped else min((time for time in times if time is not None), default=None)

    def _take(self, event: Event, now: float) -> list[Action]:  # noqa: PLR0911 - a table, one line an event
        match event:
            case events.Started() | events.TimeReached():
                return []
            case events.Connected():
                return self._connected(event.frame_bytes, now)
            case events.ConnectFailed() | events.Disconnected():
                return self._disconnected(event.reason, now)
            case events.FrameArrived():
                return self._frame(event.topic, event.frame, now)
            case events.FrameMalformed():
                raise ProtocolError(event.reason)
            case events.Published():
                self._acknowledged(event.seq, now)
                return []
            case events.Refused():
                self._acknowledged(event.seq, now)
                text = f"the broker refused a message: {event.reason}"
                return self._rarely("refused", event.reason, text, {"seq": event.seq})
            case events.TrainingFinished():
                return self._trained(event, now)
            case events.TrainingFailed() | events.BudgetSpent():
                return self._not_trained(event)
            case events.Evaluated() | events.FineTuned() | events.FineTuningFailed():
                return self._tried(event)
            case events.StopRequested():
                unfinished = self.member.role == "join"  # to be repeated
                return self._stop(EXIT_FAILED if unfinished else EXIT_DONE, event.reason)
            case _:
                assert_never(event)

    def _work(self, now: float) -> list[Action]:
        """Whatever the state now allows, whichever event led to it."""
        actions = self._connect(now)
        if self._online:
            actions += [*self._listen(now), *self.follower.time_reached(now)]
        actions += self._look_at_schema()
        actions += self._leave_if_done()
        if self._stopped:
            return actions
        actions += self.evaluating.begin(self.follower, busy=self.learning.running is not None)
        actions += [] if self._leaving else self._begin_training(now)
        actions += self._send(now)
        return [*actions, *self._look_who_is_missing(now)]

    # -- the connection

    def _connect(self, now: float) -> list[Action]:
        if self._online or self._connecting or self._stopped or now < self._reconnecting.due_s:
            return []
        self._connecting = True
        # Each attempt is a session of its own: the broker may have accepted one whose answer was lost.
        self.memory.replaced(replace(self.kept, session=self.kept.session + 1))
        will = self.member.status(OFFLINE, seq=self.memory.number(), session=self.kept.session)
        return [Connect(will_topic=will.topic, will_payload=will.payload)]

    def _connected(self, frame_bytes: int, now: float) -> list[Action]:
        self._online, self._connecting, self._trouble = True, False, ""
        self._reconnecting.connected(now)
        self.presence.reconnected()
        self._listening.connected(now)
        self._enrolling.wanted(now)
        self.uplink.connected(frame_bytes, now)
        log = Log(event="connected", text="connected to the broker", fields={"session": self.kept.session})
        subscribe = Subscribe(filters=subscriptions(self.member.federation, self.member.device))
        metrics = self.evaluating.pending.values()
        return [log, subscribe, *self._status(), *self.follower.reconnected(now), *metrics]

    def _listen(self, now: float) -> list[Action]:
        """Ask again for what every connection begins with, where it has not come."""
        if now < self._listening.due_s(self.presence.online is not None):
            return []
        self._listening.asked(now)
        return [Subscribe(filters=(topics.status(self.member.federation), topics.head(self.member.federation)))]

    def _disconnected(self, reason: str, now: float) -> list[Action]:
        known = self._trouble == reason
        self._online, self._connecting, self._trouble = False, False, reason
        self._reconnecting.failed(now)
        self.follower.disconnected()
        return [] if known else [Log(event="disconnected", text=reason, fields={"reason": reason})]

    def _acknowledged(self, seq: int, now: float) -> None:
        self.evaluating.acknowledged(seq)
        if seq == ENROLL_SEQ:
            self._enrolling.acknowledged(now)
        elif self.kept.outstanding is not None and seq == self.kept.outstanding.seq:
            self.uplink.sending.acknowledged(now)

    def _status(self) -> list[Action]:
        """Say what we do; nobody would believe it before the key is known."""
        if not self._online or not self.kept.enrolled or self.member.role == "join":
            return []
        running = self.learning.running
        state, base = ("idle", -1) if running is None else ("training", running.base)
        seq = self.memory.number()
        return [self._remembered(self.member.status(state, seq=seq, session=self.kept.session, base=base))]

    def _tried(self, event: events.Evaluated | events.FineTuned | events.FineTuningFailed) -> list[Action]:
        """Metrics that there is no connection for are sent at the next."""
        done, metrics = self.personal.tried(event)
        return [*done, *map(self._remembered, metrics if self._online else [])]

    def _remembered(self, publish: Publish) -> Publish:
        self._heard_about = {*sorted(self._heard_about)[-7:], publish.seq}
        return publish

    # -- what arrives

    def _frame(self, topic: str, frame: Frame, now: float) -> list[Action]:
        """Check in the protocol's order, then do what the kind asks for."""
        address = topics.parse(topic)
        topics.check(frame, address)
        if address.group == "up" or address.device not in {None, self.member.device}:
            raise ProtocolError("not-ours", topic[:80])
        if frame.key != self.member.aggregator_key:
            raise ProtocolError("unknown-key", "not the aggregator's")
        frame.check_authentic(self.member.aggregator_public)
        if address.part is not None:
            return self.follower.part_arrived(topic, frame, now)
        frame.check_bodiless()
        match frame.kind:
            case Status.KIND:
                if self.presence.heard(Status.from_meta(frame.meta), frame.seq):
                    self._enrolling.wanted(now)
                    self.uplink.sending.wanted(now)
                return []
            case Head.KIND:
                return self._head(frame, now)
            case Grant.KIND:
                return self._grant(frame, now)
            case _:
                return self._receipt(Receipt.from_meta(frame.meta), now)

    def _head(self, frame: Frame, now: float) -> list[Action]:
        head = Head.from_meta(frame.meta)
        self._listening.head_came(now)
        kept = self.kept
        if head.version < kept.head_version or frame.seq < kept.head_seq:
            raise ProtocolError("old-head", f"version {head.version}, seq {frame.seq}")
        if (head.version, frame.seq) != (kept.head_version, kept.head_seq):
            seen = replace(kept, head_version=head.version, head_seq=frame.seq, head_digest=head.digest)
            self.memory.replaced(seen)
        actions: list[Action] = []
        if head.state != self._head_state:
            self._head_state = head.state
            actions.append(Log(event=head.state, text=f"the federation is {head.state}"))
        return [*actions, *self.learning.read_plan(head), *self.follower.head_accepted(head, now)]

    def _grant(self, frame: Frame, now: float) -> list[Action]:
        grant = Grant.from_meta(frame.meta)
        update = self.kept.outstanding
        if not self.member.is_addressed(grant) or update is None or grant.seq != update.seq:
            raise ProtocolError("not-outstanding", "a grant of nothing that was offered")
        return [*self.uplink.granted(grant, frame.seq, now)] if self._may_send() else []

    def _receipt(self, receipt: Receipt, now: float) -> list[Action]:
        update = self.kept.outstanding
        ours = update is not None and receipt.seq == update.seq
        enrolment = receipt.seq == ENROLL_SEQ and not self.kept.enrolled
        known = ours or enrolment or (receipt.outcome == "revoked" and receipt.seq in self._heard_about)
        if not (self.member.is_addressed(receipt) and known):
            raise ProtocolError("not-outstanding", "a receipt for nothing that waits for one")
        if receipt.outcome in {"revoked", "refused"}:
            verb = "revoked this device's key" if receipt.outcome == "revoked" else "refused the invitation"
            reason = f" ({receipt.reason})" if receipt.reason else ""
            return self._stop(EXIT_REFUSED, f"the aggregator has {verb}{reason}; ask its operator for a new invitation")
        if enrolment:
            return self._enrolment(receipt, now)
        actions = self.uplink.answered(receipt, self._schema(), now)
        self._contributed += receipt.outcome == "accepted"
        return actions

    def _enrolment(self, receipt: Receipt, now: float) -> list[Action]:
        if receipt.outcome == "busy":
            self._enrolling.busy(receipt.retry_after_s, now)
            return []
        if receipt.outcome != "enrolled":
            raise ProtocolError("odd-receipt", f"{receipt.outcome!r} for an enrolment")
        self.memory.replaced(replace(self.kept, enrolled=True))
        return [Log(event="enrolled", text=f"enrolled as {self.member.device}"), *self._status()]

    def _drop(self, error: ProtocolError) -> list[Action]:
        """Count what is not to be believed."""
        return self._rarely("dropped", error.reason, f"dropped a message: {error}", {"detail": error.detail})

    def _rarely(self, event: str, reason: str, text: str, fields: Mapping[str, object]) -> list[Action]:
        """Say so the first, tenth, hundredth time: what others can cause must not fill a log."""
        self.dropped[reason] += 1
        count = self.dropped[reason]
        if str(count).strip("0") != "1":
            return []
        return [Log(event=event, text=f"{text} ({count} so far)", fields={"reason": reason, **fields, "count": count})]

    # -- the work

    def _schema(self) -> Schema:
        return self.follower.schema or Schema.parse(self.kept.schema)

    def _look_at_schema(self) -> list[Action]:
        """The federation's schema is fixed, and the task's model must fit it."""
        schema = self.follower.schema
        if schema is None or self._fits:
            return []
        if self.kept.schema not in {b"", schema.encoded}:
            return self._stop(EXIT_CONFIG, "the federation's schema has changed; leave it and join again")
        fault = misfit(schema, self.member.tensors)
        if fault:
            return self._stop(EXIT_CONFIG, fault)
        self._fits = True
        if not self.kept.schema:
            self.memory.replaced(replace(self.kept, schema=schema.encoded))
        return []

    def _leave_if_done(self) -> list[Action]:
        if self._stopped:
            return []
        if self.member.role == "join":
            done = self.kept.enrolled and self._fits
            return self._stop(EXIT_DONE, f"{self.member.device} has joined {self.member.federation}") if done else []
        reason = self.personal.why_leave(self.follower, self._contributed)
        self._leaving = bool(reason)  # not for good: the federation may be opened again
        if not reason:
            return []
        last = self.personal.begin(self.follower)
        if not self.personal.done or self.evaluating.pending:
            return [*last]
        if self.kept.outstanding is not None:
            self.memory.replaced(replace(self.kept, outstanding=None))
        return self._stop(EXIT_DONE, reason)

    def _begin_training(self, now: float) -> list[Action]:
        done = self.learning.begin(self.follower, self.kept, now)
        began = any(isinstance(action, StartTraining) for action in done)
        return [*done, *(self._status() if began else [])]

    def _trained(self, event: events.TrainingFinished, now: float) -> list[Action]:
        job = self.learning.finished(event)
        if job is None:
            return []
        self.uplink.put(event, job.plan, now)
        return [sentence(event), *self._status()]

    def _not_trained(self, event: events.TrainingFailed | events.BudgetSpent) -> list[Action]:
        if isinstance(event, events.BudgetSpent):
            return self._stop(EXIT_BUDGET, spent(event))
        self.memory.replaced(replace(self.kept, account=event.account or self.kept.account))
        return [self.learning.failed(event), *self._status()]

    # -- sending

    def _may_send(self) -> bool:
        head = self.follower.head
        ready = self._online and self.kept.enrolled and self.presence.online
        return bool(ready) and head is not None and head.state == OPEN

    def _send_due_s(self) -> float | None:
        return self.uplink.sending.due_s() if self._may_send() and self.kept.outstanding is not None else None

    def _enroll_due_s(self) -> float | None:
        waiting = self._online and self.presence.online and not self.kept.enrolled
        return self._enrolling.due_s() if waiting else None

    def _send(self, now: float) -> list[Action]:
        enroll_due, send_due, head = self._enroll_due_s(), self._send_due_s(), self.follower.head
        if enroll_due is not None and enroll_due <= now:
            self._enrolling.sent(1, now)
            return [self.member.enroll()]
        if head is not None and send_due is not None and send_due <= now:
            return self.uplink.send(head.direct_parts, now)
        return []

    # -- waiting and leaving

    def _whom_we_miss(self) -> str | None:
        head = self.follower.head
        if not self._online:
            return f"the broker ({self._trouble})" if self._trouble else "the broker"
        if not self.presence.online:
            return "the aggregator"
        if not self.kept.enrolled:
            return "the aggregator to admit this device"
        if head is None:
            return "the aggregator's first head"
        return None if self.follower.synced else f"version {head.version} of the model"

    def _look_who_is_missing(self, now: float) -> list[Action]:
        self._waiting.look(self._whom_we_miss(), now)
        whom = self._waiting.whom
        if self._waiting.is_over(now):
            return self._stop(EXIT_FAILED, f"gave up after waiting {self._waiting.waited_s(now):.0f} s for {whom}")
        if self._waiting.to_say(now):
            return [Log(event="waiting", text=f"waiting for {whom}", fields={"for": whom})]
        return []

    def _stop(self, code: int, reason: str) -> list[Action]:
        self._stopped = True
        goodbye: list[Action] = []
        if self._online and self.kept.enrolled:
            goodbye = [self.member.status(OFFLINE, seq=self.memory.number(), session=self.kept.session)]
        return [*goodbye, Stop(code=code, reason=reason)]
