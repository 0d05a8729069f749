"""The helper's state machine without I/O: events in, actions out.

If an event changes the `State`, one `Save` comes before every other action of the event. So no answer leaves before
what it says is on disk. The states of the connection:

    connection    meaning                                  entered by                      status published
    disconnected  the next attempt has a time              the start, ConnectFailed,       by the broker: the last
                                                           Disconnected                    will, "offline"
    connecting    `Connect` is not answered yet            the time of the next attempt    none
    enrolling     the enrollment is sent until a receipt   Connected, with a key that is   none
                  admits the key                           not enrolled
    looking       the helper waits for what the broker     Connected; enrollment           none
                  retains of its own status and card
    ready         asks are answered, one for each event    its own card comes back         "online"
    stopped       every event is ignored                   `Stop`, with its exit code      "offline"

While looking, the helper publishes its card without retaining it, on a topic that it has subscribed to. When that card
arrives, everything that the broker retained has arrived before it; the helper looks twice. If the broker shows a higher
count than the state has, or an ask does, the state is an old copy, and the helper stops: it has forgotten sets that it
opened.
"""

from collections import Counter
from dataclasses import replace
from typing import Final, assert_never

from ternbus.broker.backoff import Reconnect, Retry, contested
from ternbus.broker.errors import LinkError, ProtocolError
from ternbus.broker.exit_codes import EXIT_CONFIG, EXIT_DONE, EXIT_REFUSED
from ternbus.broker.protocol import meta_fields, topics
from ternbus.broker.protocol.frame import COUNTER_MAX, FRAME_BYTES, Frame
from ternbus.broker.protocol.messages import Receipt, Status
from ternbus.broker.protocol.parts import Collector
from ternbus.broker.sums.sets import ASK_BYTES_MAX, AskStep
from ternbus.broker.sums.terms import SignedCard
from ternbus.helper.core import events
from ternbus.helper.core.actions import Action, Connect, Log, Note, Publish, Save, Stop, Subscribe
from ternbus.helper.core.answers import Answers, WaitingAsks, refusal
from ternbus.helper.core.ask_check import AskRefusedError
from ternbus.helper.core.events import Event
from ternbus.helper.core.presence import Presence
from ternbus.helper.core.profile import ENROLL_SEQ, OFFLINE, ONLINE, Profile
from ternbus.helper.core.records import Records, Step
from ternbus.helper.core.state import SEQ_BLOCK, State

ASKS_MAX: Final = 16  # that wait, or are assembled
LOOK_AGAIN_S: Final = 10.0
LOOKS: Final = 2  # nats-server may deliver only some of what it retains to a client that has just connected
CLOCK_S: Final = 3600.0  # between looks at the age of the box key
# An aggregator can state any count. Above this one there is room for what `restored` adds, and for all that follows.
ASKED_COUNT_MAX: Final = COUNTER_MAX // 2
BEHIND: Final = (
    "this helper's database is an older copy: {who} shows {seen}, and the database has {own}; an older copy has "
    "forgotten which sets were opened, so it opens none; run `ternbus helper restored {directory}`, which makes a new "
    "box key"
)


class Core:
    """One helper. Call `handle` with each event, perform the actions that it returns, and wake it at `due_s`."""

    def __init__(self, profile: Profile, state: State, records: Records) -> None:
        self.profile = profile
        self.state = self._saved = state
        self.presence = Presence()
        self.dropped: Counter[str] = Counter()
        self._answers = Answers(profile=profile, records=records)
        self._step: Step | None = None  # to save with the state
        self._collector = Collector(ASKS_MAX, ASK_BYTES_MAX)
        self._waiting = WaitingAsks(number_max=ASKS_MAX, bytes_max=ASK_BYTES_MAX)
        self._next_seq = state.seq_limit  # an earlier process may have used all numbers below it
        self._reconnect = Reconnect(salt=profile.identity.key_id.hex())
        self._enroll = Retry(salt=profile.identity.key_id.hex())
        self._frame_bytes = FRAME_BYTES
        self._unix_s = self._unix_at = 0.0  # the time of day at a time of the clock
        self._clock_due_s = 0.0
        self._reason = ""  # why there is no connection
        self._online = self._connecting = self._stopped = False
        self._looking = 0  # the number of the card that is to come back; 0: it has
        self._looks_left = 0
        self._look_due_s = 0.0

    @property
    def is_ready(self) -> bool:
        """Whether it answers asks."""
        return self._online and self.state.enrolled and not self._looking and not self._stopped

    def handle(self, event: Event, now: float) -> list[Action]:
        """The actions for an event at time `now`, in seconds of a monotonic clock."""
        if self._stopped:
            return []
        try:
            actions = self._dispatch(event, now)
        except ProtocolError as error:
            actions = self._sampled("dropped", error.reason, f"dropped a message: {error}")
        if not self._stopped:
            actions += self._proceed(now)
        return [*self._save(), *actions]

    def due_s(self) -> float | None:
        """The time at which to handle `TimeReached`, if no event comes before."""
        if self._stopped:
            return None
        times = [self._clock_due_s]
        if not self._online and not self._connecting:
            times.append(self._reconnect.due_s)
        if self._online and self._looking:
            times.append(self._look_due_s)
        if self._may_enroll():
            times.append(self._enroll.due_s)
        if self.is_ready and len(self._waiting):
            times.append(0.0)
        return min(times)

    def _dispatch(self, event: Event, now: float) -> list[Action]:
        match event:
            case events.Started() | events.TimeReached():
                self._unix_s, self._unix_at = event.unix_s, now
                return self._show(0, 0, "an earlier run")
            case events.Connected():
                return self._connected(event.frame_bytes, now)
            case events.ConnectFailed() | events.Disconnected():
                return self._disconnected(event.reason, now)
            case events.FrameArrived():
                return self._frame(self.profile.checked(event.topic, event.frame), now)
            case events.FrameMalformed():
                raise ProtocolError(event.reason)
            case events.Refused():
                return self._sampled("refused", event.reason, f"the broker refused a message: {event.reason}")
            case events.StopRequested():
                return self._stop(EXIT_DONE, event.reason)
            case _:
                assert_never(event)

    def _proceed(self, now: float) -> list[Action]:
        """The actions that the new state allows, whichever event led to it."""
        actions = [*self._connect(now), *self._rotate(now)]
        if self._may_enroll() and now >= self._enroll.due_s:
            self._enroll.failed(now)  # unless a receipt comes before the next attempt
            actions.append(self.profile.enroll())
        if self._online and self._looking and now >= self._look_due_s:
            actions += self._look(now, self._looks_left)
        if self.is_ready and len(self._waiting):
            actions += self._answer(now)
        return actions

    def _time(self, now: float) -> float:
        """The time of day."""
        return self._unix_s + now - self._unix_at

    def _save(self) -> list[Action]:
        if self.state is self._saved:
            return []
        save = Save(state=self.state, step=self._step)
        self._saved, self._step = self.state, None
        return [save]

    def _seq(self) -> int:
        """A sequence number that is never used again, also after a crash: the next save reserves its block."""
        seq = self._next_seq
        self._next_seq += 1
        if seq >= self.state.seq_limit:
            self.state = replace(self.state, seq_limit=seq + SEQ_BLOCK)
        return seq

    def _sampled(self, event: str, reason: str, text: str) -> list[Action]:
        """Count a reason that peers can cause, and log the 1st, 10th, 100th time."""
        self.dropped[reason] += 1
        count = self.dropped[reason]
        if str(count).strip("0") != "1":
            return []
        return [Log(event=event, text=f"{text} ({count} so far)", fields={"reason": reason, "count": count})]

    # -- the connection

    def _connect(self, now: float) -> list[Action]:
        if self._online or self._connecting or now < self._reconnect.due_s:
            return []
        self._connecting = True
        # Each attempt has its own session number: the broker may have accepted an attempt whose answer was lost.
        self.state = replace(self.state, session=self.state.session + 1)
        will = self._status(OFFLINE)
        return [Connect(will_topic=will.topic, will_payload=will.payload)]

    def _connected(self, frame_bytes: int, now: float) -> list[Action]:
        self._online, self._connecting, self._reason = True, False, ""
        self._frame_bytes = frame_bytes
        self._reconnect.connected(now)
        self._enroll.succeeded()
        self.presence.reconnected()
        log = Log(event="connected", text="connected to the broker", fields={"session": self.state.session})
        note = Note(facts={"broker": "connected", "aggregator": "unknown"})
        if self.state.enrolled:
            return [log, note, *self._look(now, LOOKS)]
        return [log, note, Subscribe(filters=self.profile.subscriptions)]

    def _disconnected(self, reason: str, now: float) -> list[Action]:
        self._online, self._connecting = False, False
        self._looking = 0
        self._collector.clear()
        self._waiting.clear()
        known, self._reason = self._reason == reason, reason
        logs: list[Action] = [Note(facts={"broker": reason, "aggregator": "unknown"})]
        logs += [] if known else [Log(event="disconnected", text=reason, fields={"reason": reason})]
        if self._reconnect.failed(now):
            logs.append(Log(event="contested", text=contested(self.profile.helper), fields={}))
        return logs

    def _look(self, now: float, looks: int) -> list[Action]:
        """Let the broker show what it retains of this helper: all of it comes before the card published here."""
        self._looks_left = looks
        self._looking = self._seq()
        self._look_due_s = now + LOOK_AGAIN_S
        return [Subscribe(filters=self.profile.subscriptions), self._card(self._looking, retain=False)]

    def _status(self, state: str) -> Publish:
        return self.profile.status(state, seq=self._seq(), session=self.state.session, count=self.state.count)

    def _card(self, seq: int | None = None, *, retain: bool = True) -> Publish:
        seq = self._seq() if seq is None else seq
        return self.profile.publish_card(self.state.box_key, seq=seq, count=self.state.count, retain=retain)

    # -- messages that arrive

    def _frame(self, frame: Frame, now: float) -> list[Action]:
        """Handle a checked frame by its kind."""
        if frame.kind == AskStep.KIND:
            if (ask := self._collector.add(frame)) is not None:
                self._waiting.add(ask)
            return []
        if frame.sender == self.profile.helper:
            return self._own(frame, now)
        frame.check_bodiless()
        if frame.kind == Status.KIND:
            return self._aggregator(Status.from_meta(frame.meta), frame.seq, now)
        if frame.kind == Receipt.KIND:
            return self._receipt(Receipt.from_meta(frame.meta), frame.seq, now)
        raise ProtocolError("not-ours", f"a message of kind {frame.kind}")

    def _own(self, frame: Frame, now: float) -> list[Action]:
        """What the broker has of this helper's own status and card."""
        number = 0
        if frame.kind == topics.CARD:
            number = SignedCard.of_body(frame.body).card.number
        count = meta_fields.counter(frame.meta, "count") if "count" in frame.meta else 0
        stop = self._show(count, number, "the broker")
        if stop or frame.kind != topics.CARD or frame.seq != self._looking:
            return stop
        if self._looks_left > 1:
            return self._look(now, self._looks_left - 1)
        self._looking, self._clock_due_s = 0, 0.0
        ready = Log(event="ready", text="ready to answer", fields={"count": self.state.count})
        return [self._card(), self._status(ONLINE), ready]

    def _show(self, count: int, number: int, who: str) -> list[Action]:
        """Stop if others have seen more than this state knows."""
        self.state = self.state.seen(count=count, number=number)
        if not self.state.is_behind:
            return []
        seen = f"count {self.state.seen_count} and box key {self.state.seen_number}"
        own = f"count {self.state.count} and box key {self.state.box_key.number}"
        return self._stop(EXIT_CONFIG, BEHIND.format(who=who, seen=seen, own=own, directory=self.profile.directory))

    def _aggregator(self, status: Status, seq: int, now: float) -> list[Action]:
        """The aggregator's own status; when it comes online it gets the card, or the enrollment."""
        if not self.presence.status_arrived(status, seq):
            return []
        state = ONLINE if status.online else OFFLINE
        log = Log(event=f"aggregator-{state}", text=f"the aggregator is {state}")
        if status.online:
            self._enroll.due_s = min(self._enroll.due_s, now)
        card = [self._card()] if status.online and self.is_ready else []
        return [Note(facts={"aggregator": state}), log, *card]

    def _may_enroll(self) -> bool:
        return self._online and not self.state.enrolled and bool(self.presence.online)

    def _receipt(self, receipt: Receipt, seq: int, now: float) -> list[Action]:
        if not self.profile.is_addressed(receipt) or seq <= self.state.receipt_seq:
            raise ProtocolError("not-outstanding", "a receipt that is not for this helper, or came before")
        enrolling = receipt.seq == ENROLL_SEQ and not self.state.enrolled
        if receipt.outcome == "busy" and enrolling:
            self._enroll.due_s = now + receipt.retry_after_s
            return []
        if receipt.outcome == "enrolled" and enrolling:
            self.state = replace(self.state, enrolled=True, receipt_seq=seq)
            log = Log(event="enrolled", text=f"enrolled as helper {self.profile.helper}")
            return [log, *self._look(now, LOOKS)]
        endings = {"revoked", "refused"} if enrolling else {"revoked", "unknown"}
        if receipt.outcome in endings:
            self.state = replace(self.state, receipt_seq=seq)
            return self._stop(EXIT_REFUSED, _refusal(receipt, self.profile.directory))
        raise ProtocolError("odd-receipt", f"{receipt.outcome!r} for no enrollment of this helper")

    # -- answers

    def _answer(self, now: float) -> list[Action]:
        """Answer the ask that has waited longest; the others have their turn at the next events."""
        ask = self._waiting.next()
        unix_s = self._time(now)
        if stop := self._show(min(AskStep.from_meta(ask.meta).count, ASKED_COUNT_MAX), 0, "the aggregator"):
            return stop
        reply = self._answers.reply(ask, self.state, unix_s)
        seq = self._seq()
        try:
            frames = self.profile.answer(reply.answer, reply.body, seq=seq, frame_bytes=self._frame_bytes)
        except LinkError as error:
            reply = refusal(reply.answer.set, self.state, AskRefusedError("too-large", str(error)))
            frames = self.profile.answer(reply.answer, b"", seq=seq, frame_bytes=self._frame_bytes)
        if reply.step is not None:
            self.state, self._step = replace(reply.state, seq_limit=self.state.seq_limit), reply.step
        outcome = reply.answer.outcome
        note = Note(
            facts={"answered_s": unix_s, "answer": reply.text},
            counters=(f"answers.{outcome}", *((f"refused.{reply.reason}",) if reply.reason else ())),
        )
        log = Log(event=outcome, text=reply.text, fields={"set": reply.answer.set.hex(), "count": reply.answer.count})
        # The card comes first: whoever sees the answer could see the count on the broker before.
        card = [self._card()] if reply.step is not None or reply.reason in {"old-card", "foreign-terms"} else []
        return [*card, *frames, note, log]

    # -- box keys, and the end

    def _rotate(self, now: float) -> list[Action]:
        if now < self._clock_due_s:
            return []
        self._clock_due_s = now + CLOCK_S
        before = self.state.box_key
        if self.is_ready:  # an old copy must not make up the number of a lost key
            self.state = self.state.rotated(self.profile.random, self._time(now))
        if self.state.box_key is before:
            return []
        number = self.state.box_key.number
        return [self._card(), Log(event="box-key", text=f"box key {number} is in use", fields={"number": number})]

    def _stop(self, code: int, reason: str) -> list[Action]:
        ready = self.is_ready
        self._stopped = True
        return [*([self._status(OFFLINE)] if ready else []), Stop(code=code, reason=reason)]


def _refusal(receipt: Receipt, directory: str) -> str:
    reason = f" ({receipt.reason})" if receipt.reason else ""
    match receipt.outcome:
        case "revoked":
            text = "the aggregator has revoked this helper's key"
        case "unknown":
            text = "the aggregator does not know this helper"
        case _:
            text = "the aggregator has refused the invitation"
    command = f"ternbus helper init {directory} --invitation FILE"
    return f"{text}{reason}; ask its operator for a new invitation and run: {command}"
