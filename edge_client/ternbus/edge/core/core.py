"""The device's state machine without I/O: events in, actions out.

If events change the `State`, one `Save` comes before every other action that follows from them. So the device publishes
nothing that is not saved, and a receipt and its effects are one write.

The states of connection and work are in the docstring of the package.
"""

from collections import Counter
from dataclasses import replace
from typing import assert_never

from ternbus.broker.errors import ProtocolError
from ternbus.broker.exit_codes import EXIT_BUDGET, EXIT_DONE, EXIT_FAILED, EXIT_REFUSED
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.messages import OPEN, Grant, Receipt, Status
from ternbus.broker.protocol.model_messages import Candidate, Head
from ternbus.broker.protocol.statistics import KEY as STATISTICS
from ternbus.edge.core import events
from ternbus.edge.core.actions import Action, Connect, Log, Publish, StartTraining, Stop, Subscribe
from ternbus.edge.core.enrollment import Enrollment, stopped_by
from ternbus.edge.core.evaluation import EvaluationPolicy
from ternbus.edge.core.events import Event
from ternbus.edge.core.fine_tuning import FineTuning
from ternbus.edge.core.follower import Follower, InitialModel
from ternbus.edge.core.foreign_numbers import ForeignNumbers
from ternbus.edge.core.log_sampler import LogSampler
from ternbus.edge.core.measuring import Measuring
from ternbus.edge.core.own_status import OwnStatus
from ternbus.edge.core.pending_state import PendingState
from ternbus.edge.core.presence import Presence
from ternbus.edge.core.private_terms import PrivateTerms
from ternbus.edge.core.profile import ENROLL_SEQ, Profile, subscriptions
from ternbus.edge.core.receipts import ENDINGS, describe_refusal, ends, is_for_good
from ternbus.edge.core.reconnection import Reconnection
from ternbus.edge.core.resubscribe import Resubscribe
from ternbus.edge.core.schema_check import SchemaCheck
from ternbus.edge.core.state import OLD_HEAD, State
from ternbus.edge.core.training_policy import TrainingPolicy, budget_spent, describe
from ternbus.edge.core.uplink import Uplink
from ternbus.edge.core.wait_timer import WaitTimer, awaited_of


class Core:
    """One device. Call `handle` with each event, perform the actions that it returns, and wake it at `due_s`."""

    def __init__(self, profile: Profile, state: State, initial_model: InitialModel | None = None) -> None:
        self.profile = profile
        self.pending = PendingState(state)
        self.follower = Follower(
            federation=profile.federation, initial_model=initial_model, schema_bytes_max=profile.model_size.schema,
            is_private=profile.is_private,
        )  # fmt: skip
        self.terms = PrivateTerms(profile=profile, pending=self.pending)
        self.enrollment = Enrollment(profile=profile, pending=self.pending)
        self.uplink = Uplink(profile=profile, pending=self.pending)
        self.training = TrainingPolicy(profile=profile)
        self.evaluation = EvaluationPolicy(profile=profile, pending=self.pending)
        self.measuring = Measuring(profile=profile, pending=self.pending)
        self.fine_tuning = FineTuning(profile=profile, training=self.training, evaluation=self.evaluation)
        self.presence = Presence()
        self._own_status = OwnStatus(
            profile=profile, pending=self.pending, presence=self.presence, training=self.training,
            evaluation=self.evaluation,
        )  # fmt: skip
        self._sampler = LogSampler()
        self._reconnect = Reconnection(device=profile.device, salt=profile.key.hex())
        self._foreign_numbers = ForeignNumbers(profile=profile, pending=self.pending)
        self._wait_timer = WaitTimer(timeout_s=profile.timeout_s)
        self._resubscribe = Resubscribe()
        self._online = self._connecting = False  # whether there is a connection, or one is being made
        self._leaving = self.stopped = False
        self._accepted, self._logged_head_state = 0, ""  # updates since this process began; and what the log said last
        self._schema_check = SchemaCheck(profile=profile, pending=self.pending)
        self._taken: list[Action] = []  # that follow from events, and that `proceed` returns
        self.uplink.started()

    @property
    def state(self) -> State:
        return self.pending.state

    @property
    def dropped(self) -> Counter[str]:
        """Counts of refused messages, by the protocol's reason or the broker's."""
        return self._sampler.counts

    def handle(self, event: Event, now: float) -> list[Action]:
        """The actions for an event at time `now`, in seconds of a monotonic clock."""
        self.take(event, now)
        return self.proceed(now)

    def take(self, event: Event, now: float) -> None:
        """Take one of several events in; `proceed` returns the actions for all of them. None follow once it stopped."""
        if self.stopped:
            return
        self.follower.postpones = self.training.is_occupied(self.state)
        try:
            self._taken += self._dispatch(event, now)
        except ProtocolError as error:
            self._taken += self._sampler.dropped(error)
            if error.reason == OLD_HEAD and self.presence.head_arrived(is_old=True):
                self._taken += self._status()

    def proceed(self, now: float) -> list[Action]:
        """The actions for the events that were taken in; a `Save` of the state comes first."""
        actions, self._taken = self._taken, []
        actions += [] if self.stopped else self._proceed(now)
        return [*self.pending.save(), *self._sampler.limit(actions, now)]

    def due_s(self) -> float | None:
        """The time at which to handle `TimeReached`, if no event comes before."""
        times = [
            None if self._online or self._connecting else self._reconnect.due_s,
            self.follower.due_s() if self._online else None,
            self.terms.due_s() if self._online else None,
            self._resubscribe.due_s(self.presence.online is not None) if self._online else None,
            self._own_status.due_s if self._online else None,
            self._enroll_due_s(),
            self._send_due_s(),
            self._statistics_due_s(),
            None if self._leaving else self.measuring.begin_due_s,
            self._wait_timer.due_s(),
            None if self._leaving else self.training.due_s,
            self.evaluation.due_s,
        ]
        return None if self.stopped else min((time for time in times if time is not None), default=None)

    def _dispatch(self, event: Event, now: float) -> list[Action]:  # noqa: C901, PLR0911, PLR0912 - a table
        match event:
            case events.Started() | events.TimeReached():
                return []
            case events.Connected():
                return self._connected(event, now)
            case events.ConnectFailed() | events.Disconnected():
                return self._disconnected(event.reason, now)
            case events.FrameArrived():
                return self._frame(event, now)
            case events.FrameMalformed():
                raise ProtocolError(event.reason)
            case events.Published():
                self._acknowledged(event.seq, now)
                return []
            case events.Refused():
                self._acknowledged(event.seq, now)
                told = f"the broker refused a message: {event.reason}", {"seq": event.seq}
                return [*self._sampler.log("refused", event.reason, *told), *self.uplink.refused(event, now)]
            case events.TrainingFinished():
                return self._training_finished(event, now)
            case events.TrainingFailed():
                return [self.training.failed(event, now), *self._status()]
            case events.BudgetSpent():
                if event.final:
                    return self._stop(EXIT_BUDGET, budget_spent(event))
                return [*self.training.unaffordable(event, now), *(self._note_refusal() or self._status())]
            case events.EvaluationFailed():
                return [*self._evaluated(*self.evaluation.failed(event, now)), *self._status()]
            case events.Evaluated():
                recovered = bool(self.evaluation.failures.reason)
                done = self._evaluated(*self.evaluation.finished(event, sealed=self.training.sealed))
                return [*done, *(self._status() if recovered else [])]
            case events.StatisticsMeasured():
                return [self.measuring.finished(event, now)]
            case events.FineTuned() | events.FineTuningFailed():
                return self._evaluated(*self.fine_tuning.finished(event))
            case events.StopRequested():
                return self._stop(*stopped_by(event.reason, self.profile.role))
            case _:
                assert_never(event)

    def _proceed(self, now: float) -> list[Action]:
        """The actions that the new state allows, whichever event led to it."""
        actions = self._connect(now)
        if self._online:
            actions += [*self._subscribe_again(now), *self.follower.time_reached(now), *self.terms.time_reached(now)]
            actions += self._own_status.time_reached(now)
        actions += self.uplink.withdraw(self.follower.head)
        actions += [] if self.training.is_occupied(self.state) else self.follower.check(now)
        actions += [*self._check_schema(), *self._leave_if_done()]
        if self.stopped:
            return actions
        actions += [*self.terms.check(self.training.plan, self.follower.schema), *self._note_refusal()]
        actions += self.evaluation.begin(self.follower, self.training, now)
        if not self._leaving:
            actions += self.measuring.begin(self.training, self.uplink.usual_bytes if self._online else 0, now)
            actions += [] if self.measuring.running else self._begin_training(now)
        actions += self._send(now)
        return [*actions, *self._foreign_numbers.tell(), *self._check_wait(now)]

    # -- the connection

    def _connect(self, now: float) -> list[Action]:
        if self._online or self._connecting or self.stopped or now < self._reconnect.due_s:
            return []
        self._connecting = True
        # Each attempt has its own session number: the broker may have accepted an attempt whose answer was lost.
        self.pending.put(replace(self.state, session=self.state.session + 1))
        will = self._own_status.offline()
        return [Connect(will_topic=will.topic, will_payload=will.payload)]

    def _connected(self, event: events.Connected, now: float) -> list[Action]:
        self._online, self._connecting = True, False
        self._reconnect.connected(now)
        self.presence.reconnected()
        self._resubscribe.connected(now)
        self.enrollment.resend.restart(now)
        self.measuring.reconnected(now)
        log = Log(event="connected", text="connected to the broker", fields={"session": self.state.session})
        told = [log, *self.uplink.connected(event, now)]
        filters = subscriptions(self.profile.federation, self.profile.device, private=self.profile.is_private)
        asked = [*self.follower.reconnected(now), *self.terms.reconnected(now)]
        return [*told, Subscribe(filters=filters), *self._status(), *asked, *self.evaluation.unacknowledged.values()]

    def _subscribe_again(self, now: float) -> list[Action]:
        """Subscribe again to status and head, if they did not arrive."""
        if now < self._resubscribe.due_s(self.presence.online is not None):
            return []
        self._resubscribe.subscribed(now)
        return [Subscribe(filters=(topics.status(self.profile.federation), topics.head(self.profile.federation)))]

    def _disconnected(self, reason: str, now: float) -> list[Action]:
        self._online = self._connecting = False
        self.follower.disconnected()
        self.terms.disconnected()
        return [*self._reconnect.failed(reason, now)]

    def _acknowledged(self, seq: int, now: float) -> None:
        self.evaluation.acknowledged(seq)
        self.measuring.acknowledged(seq, now)
        if seq == ENROLL_SEQ:
            self.enrollment.resend.acknowledged(now)
        else:
            self.uplink.acknowledged(seq, now)

    def _status(self, changed_s: float | None = None) -> list[Action]:
        """The own status; where a training began or ended, at ``changed_s``, it may come later."""
        own = self._own_status
        return [*(own.now() if changed_s is None else own.changed(changed_s))] if self._online else []

    def _note_refusal(self) -> list[Action]:
        """Keep, for its owner and the aggregator's operator, why the device makes no update by this plan."""
        refusal = self.training.refusal or self.terms.refusal
        if self.profile.role not in {"join", "train"} or refusal == self.state.refusal:
            return []
        self.pending.put(replace(self.state, refusal=refusal))
        return self._status()

    def _evaluated(self, done: list[Action], metrics: list[Publish]) -> list[Action]:
        """Publish the metrics; without a connection they are published at the next connect."""
        return [*done, *map(self._own_status.noted, metrics if self._online else [])]

    # -- messages that arrive

    def _frame(self, event: events.FrameArrived, now: float) -> list[Action]:
        """Check the frame in the protocol's order, then handle it by its kind."""
        topic, frame = event.topic, event.frame
        address = self.profile.checked(topic, frame)
        if address.kind == topics.TERMS:
            return self.terms.part_arrived(topic, frame, now)
        if address.part is not None:
            return self.follower.part_arrived(topic, frame, now)
        if frame.kind == Candidate.KIND:
            return [*self.evaluation.candidate_arrived(frame, self.follower)]
        frame.check_bodiless()
        match frame.kind:
            case Status.KIND:
                if self.presence.status_arrived(Status.from_meta(frame.meta), frame.seq):
                    self.enrollment.resend.restart(now)
                    self.uplink.restart(now)
                    self.measuring.resend.restart(now)
                return []
            case Head.KIND:
                return self._head(frame, event.retained, now)
            case Grant.KIND:
                return [*self.uplink.grant_arrived(frame, now, may_send=self._may_send())]
            case _:
                return self._receipt(Receipt.from_meta(frame.meta), frame.seq, now)

    def _head(self, frame: Frame, retained: bool, now: float) -> list[Action]:
        head = Head.from_meta(frame.meta)
        self._resubscribe.head_arrived(now, retained=retained)
        seen = self.state.with_head(head.version, frame.seq, head.digest)
        actions = self.terms.head_accepted(head, frame.meta_bytes, now)
        self.presence.head_arrived(is_old=False)
        if fault := self.profile.size_fault(head.snapshot.content_bytes):
            return self._stop(EXIT_FAILED, fault)
        self.pending.put(seen)
        if head.state != self._logged_head_state:
            self._logged_head_state = head.state
            actions.append(Log(event=head.state, text=f"the federation is {head.state}"))
        asked = self.measuring.head_accepted(head, frame.meta.get(STATISTICS), now)
        actions += [*self.training.read_plan(head, self.state.account), *asked, *self.follower.head_accepted(head, now)]
        return actions + self.uplink.head_accepted(head, now)  # before a grant that waits with it

    def _receipt(self, receipt: Receipt, frame_seq: int, now: float) -> list[Action]:
        self._foreign_numbers.observe(receipt)
        update = self.state.outstanding
        ours = update is not None and receipt.seq == update.seq
        enrollment = receipt.seq == ENROLL_SEQ and not self.state.enrolled
        statistics = self.measuring.owns(receipt.seq)
        recent = receipt.outcome in ENDINGS and receipt.seq in self._own_status.recent_seqs
        if not (self.profile.is_addressed(receipt) and (ours or enrollment or statistics or recent)):
            raise ProtocolError("not-outstanding", "a receipt for no outstanding message of this device")
        if ends(receipt, frame_seq, self.state, enrollment=enrollment):
            return self._stop(EXIT_REFUSED, describe_refusal(receipt))
        if statistics:
            actions: list[Action] = [*self.measuring.answered(receipt, now)]
        elif update is None or enrollment:
            actions = [*self.enrollment.answered(receipt, now)]
            actions += self._status() if actions else []
        else:
            actions = self.uplink.answered(update, receipt, self.follower.schema, now)
            self._accepted += receipt.outcome == "accepted"
            if is_for_good(receipt) and self.profile.role == "train":
                actions += self._stop(EXIT_REFUSED, describe_refusal(receipt))
        if receipt.outcome != "busy":  # which is no answer
            self.pending.put(self.state.with_receipt(frame_seq))
        return actions

    # -- the work

    def _check_schema(self) -> list[Action]:
        """Stop if the federation's schema has changed, or is not that of the task's model."""
        fault = self._schema_check.fault(self.follower.schema)
        return self._stop(EXIT_FAILED, fault) if fault else []  # not EXIT_CONFIG: the schema comes from a peer

    def _leave_if_done(self) -> list[Action]:
        if self.stopped:
            return []
        if self.profile.role == "join":
            ending = self.enrollment.ending(self.follower.head, self.terms.terms, is_checked=self._schema_check.done)
            return [] if ending is None else self._stop(*ending)
        reason = self.fine_tuning.stop_reason(self.follower, self._accepted, is_current=self._resubscribe.is_current)
        self._leaving = bool(reason)  # may become false again: the federation can be reopened
        if not reason:
            return []
        last = self.fine_tuning.begin(self.follower)
        if not self.fine_tuning.done or self.evaluation.unacknowledged:
            return [*last]
        if self.state.outstanding is not None and self.profile.role != "export":
            self.uplink.give_up(self.state.outstanding)
        return [*last, *self._stop(EXIT_DONE, reason)]

    def _begin_training(self, now: float) -> list[Action]:
        done: list[Action] = [*self.training.begin(self.follower, self.terms, self.state, now)]
        done += self._note_refusal()
        return [*done, *(self._status(changed_s=now) if any(isinstance(each, StartTraining) for each in done) else [])]

    def _training_finished(self, event: events.TrainingFinished, now: float) -> list[Action]:
        job = self.training.finished(event)
        if job is None:
            return []
        seq = self.uplink.store(event, job, now)
        return [describe(event, seq), *self._status(changed_s=now)]

    # -- sending

    def _may_send(self) -> bool:
        head = self.follower.head
        ready = self._online and self.state.enrolled and self.presence.online
        return bool(ready) and head is not None and head.state == OPEN

    def _send_due_s(self) -> float | None:
        return self.uplink.resend.due_s() if self._may_send() and self.state.outstanding is not None else None

    def _enroll_due_s(self) -> float | None:
        return self.enrollment.due_s(self.follower.head, self.terms) if self._online and self.presence.online else None

    def _statistics_due_s(self) -> float | None:
        """Also while the head is paused: statistics are asked for before any training."""
        ready = self._online and self.state.enrolled and self.presence.online
        return self.measuring.due_s() if ready else None

    def _send(self, now: float) -> list[Action]:
        enroll_due, send_due = self._enroll_due_s(), self._send_due_s()
        head, update = self.follower.head, self.state.outstanding
        if enroll_due is not None and enroll_due <= now:
            return [*self.enrollment.send(now)]
        due = self._statistics_due_s()
        sent: list[Action] = [*self.measuring.send(now)] if due is not None and due <= now else []
        if head is not None and update is not None and send_due is not None and send_due <= now:
            return [*sent, *self.uplink.send(update, head.direct_parts, now)]
        return sent

    # -- waiting and leaving

    def _check_wait(self, now: float) -> list[Action]:
        if self._online:
            own = self.evaluation if self.profile.role == "evaluate" else self.training
            awaited = awaited_of(self.presence, self.follower, self.terms, own.failures, enrolled=self.state.enrolled)
        else:
            awaited = f"the broker ({self._reconnect.reason})" if self._reconnect.reason else "the broker"
        self._wait_timer.wait_for(awaited, now)
        given_up = self._wait_timer.given_up(now)
        return self._stop(EXIT_FAILED, given_up) if given_up else [*self._wait_timer.report(now)]

    def _stop(self, code: int, reason: str) -> list[Action]:
        self.stopped = True
        goodbye = [self._own_status.offline()] if self._online and self.state.enrolled else []
        return [*goodbye, Stop(code=code, reason=reason)]
