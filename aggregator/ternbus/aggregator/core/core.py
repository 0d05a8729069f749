"""The aggregator as a state machine: events in, actions out, in the order in which they must be done.

It knows the protocol, who may say what, and when to merge. It does no I/O and reads no clock: time comes with each
event. What must survive a crash is a ``Save``, and stands before every action that tells anybody of it.
"""

import json
import math
from dataclasses import dataclass, field
from typing import Final, assert_never

from ternbus.aggregator.core import events, records
from ternbus.aggregator.core.counters import Counters
from ternbus.aggregator.core.enrollment import Enrollment
from ternbus.aggregator.core.frames import FrameWriter
from ternbus.aggregator.core.publisher import PublishedState, Publisher
from ternbus.aggregator.core.rate_limit import LogLimit
from ternbus.aggregator.core.registry import Member, Registry
from ternbus.aggregator.core.updates import Updates
from ternbus.aggregator.core.validation import Validation
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.settings import Settings
from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame, parse
from ternbus.broker.protocol.identity import AGGREGATOR, Identity
from ternbus.broker.protocol.messages import CLOSED, Head, Metrics, Status
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import Block

RESTORED: Final = 2**32
ECHO_S: Final = 5.0  # how long the broker has to show us the head that it should have kept


@dataclass(slots=True, kw_only=True)
class Core:
    """One federation's aggregator. ``handle`` is its only door."""

    settings: Settings
    identity: Identity
    schema: Schema
    model: Model
    registry: Registry
    kept: PublishedState
    seq: int  # the highest that was reserved
    session: int
    software: str = "ternbus"
    _outlet: FrameWriter = field(init=False)
    _desk: Updates = field(init=False)
    _press: Publisher = field(init=False)
    _tally: Counters = field(default_factory=Counters)
    _door: Enrollment = field(init=False)
    _lines: LogLimit = field(init=False)
    _actions: list[events.Action] = field(default_factory=list)
    _echo_by: float = 0.0
    _census_by: float | None = None  # until then the broker is still telling us who is online
    _merge_from: float = -math.inf  # not before
    _now: float = 0.0

    def __post_init__(self) -> None:
        self._outlet = FrameWriter(self.settings, self.identity, self.schema, self._save, self.seq)
        self._desk = Updates(
            settings=self.settings,
            model=self.model,
            intake=Validation(self.settings, self.identity, self.schema),
            outlet=self._outlet,
            tally=self._tally,
            do=self._do,
            closed=self.kept.state == CLOSED,
        )
        self._door = Enrollment(
            settings=self.settings, registry=self.registry, desk=self._desk, do=self._do, refuse=self._refuse
        )
        self._lines = LogLimit(self.settings.limits.log_lines_per_minute)
        self._press = Publisher(
            settings=self.settings, model=self.model, kept=self.kept, outlet=self._outlet, do=self._do
        )

    @property
    def deadline(self) -> float | None:
        """When ``TimeReached`` is due at the latest."""
        echo_by = self._echo_by if self._press.in_doubt else None
        dues = [self._desk.merge_by, echo_by, self._tally.due]
        if self.model.buffer:
            dues += [self._census_by, self._merge_from if self._merge_from > self._now else None]
        return min((due for due in dues if due is not None), default=None)

    def handle(self, event: events.Event, now: float) -> list[events.Action]:
        """Take in one event at ``now`` (seconds, never going back); return what is to be done, in order."""
        self._now = now
        self._actions = []
        match event:
            case events.MessageArrived():
                self._message(event)
            case events.Connecting():
                self._connecting()
            case events.Connected():
                self._connected(event)
            case events.Disconnected():
                self._press.in_doubt = False
            case events.InvitationsRead():
                self._door.invite(event.codes)
                self._done(event.request)
            case events.CancelRequested():
                self._done(event.request, self._door.cancel(event.device))
            case events.RevokeRequested():
                self._done(event.request, self._door.revoke(event))
            case events.StateRequested():
                self._change_state(event)
            case events.CountsRequested():
                self._count()
                self._done(event.request)
            case events.TimeReached():
                pass
            case events.StopRequested():
                self._stop()
            case _:
                assert_never(event)
        self._on_time()
        return self._actions

    # --- connection

    def _connecting(self) -> None:
        self.session += 1
        self._save(records.SessionBegun(session=self.session))
        topic, payload = self._outlet.status("offline", self.session, self.software)
        self._do(events.Connect(will_topic=topic, will_payload=payload))

    def _connected(self, event: events.Connected) -> None:
        federation = self.settings.federation
        self._do(
            events.Subscribe(
                filters=(f"{topics.root(federation)}/up/#", topics.head(federation), topics.status(federation))
            )
        )
        if self._desk.stopping:
            return  # the last word was said
        self._publish(self._outlet.status("online", self.session, self.software), retain=True)
        self._press.in_doubt, self._echo_by = True, self._now + ECHO_S
        self._census_by = self._now + ECHO_S
        self._press.fit(event.frame_bytes)
        if self.session == 1 and self._press.in_doubt:
            self._press.republish()  # nothing of ours can be there yet

    def _stop(self) -> None:
        """Finish what is accepted, say goodbye."""
        self._desk.stopping = True
        if self.model.buffer:
            self._merge()
        self._count()
        self._publish(self._outlet.status("offline", self.session, self.software), retain=True)
        self._do(events.Stop())

    # --- messages

    def _message(self, event: events.MessageArrived) -> None:
        """Take in what the broker delivered; whatever is wrong with it is counted, and that is all."""
        about = "a message"
        try:
            address = self._address(event.topic)
            about = f"{address.kind} of {address.device or AGGREGATOR}"
            if address.group != "up":
                self._own(event, address)
            elif event.payload:  # an empty one only clears what was retained
                self._from_device(event, address)
        except ProtocolError as error:
            self._refuse(error.reason, f"dropped {about}: {error}")

    def _refuse(self, reason: str, text: str) -> None:
        """Count what was refused, and tell the operator, who is not to be drowned in it."""
        self._tally.refuse(reason, self._now)
        line = self._lines.write(reason, text, self._now)
        if line:
            self._log(line)

    def _address(self, topic: str) -> topics.Address:
        address = topics.parse(topic)
        if address.federation != self.settings.federation:
            raise ProtocolError("wrong-federation", address.federation)
        return address

    def _from_device(self, event: events.MessageArrived, address: topics.Address) -> None:
        member = self.registry.members.get(address.device or "")
        if member is not None:
            member.take_frame(self._now, self.settings.limits.frames_per_s)
        opened = event.opened
        frame = parse(event.payload) if opened is None else opened.frame
        topics.check(frame, address)
        if frame.kind == "enroll":
            self._door.enroll(frame, self._now, event.clock_s)
        else:
            member = self._door.authenticate(frame, b"" if opened is None else opened.public, self._now)
            if frame.kind == "update":
                member.update_bytes += event.packet_bytes
                self._tally.observe(member.name, self._now)
            self._frame(member, frame, None if opened is None else opened.block)

    def _frame(self, member: Member, frame: Frame, ahead: Block | None) -> None:
        match frame.kind:
            case "update":
                self._desk.update(member, frame, self._now, ahead)
            case "offer":
                self._desk.offer(member, frame, self._now)
            case "status":
                frame.check_bodiless()
                if self.registry.observe(member, Status.from_meta(frame.meta), frame.seq):
                    self._tally.observe(member.name, self._now)
            case _:  # the topics that a device may write on leave only metrics
                self._metrics(member, frame)

    def _own(self, event: events.MessageArrived, address: topics.Address) -> None:
        """Our own retained frames as the broker has them: they tell whether it lost any, and nothing else."""
        if address.kind == "head" and self._press.in_doubt:
            if event.payload == self.kept.head_frame:
                self._press.in_doubt = False
            elif not self._is_older_copy(event, address):
                self._press.republish()
        elif address.kind == "status" and event.payload and not self._desk.stopping:
            frame = parse(event.payload)
            topics.check(frame, address)
            frame.check_authentic(self.identity.public)
            status = Status.from_meta(frame.meta)
            if status.state == "offline" and status.session >= self.session:
                self.session = status.session + 1
                self._save(records.SessionBegun(session=self.session))
                self._publish(self._outlet.status("online", self.session, self.software), retain=True)

    def _is_older_copy(self, event: events.MessageArrived, address: topics.Address) -> bool:
        """Whether the broker shows a head that we signed and do not know: then our state is a copy from before it."""
        try:
            frame = parse(event.payload)
            topics.check(frame, address)
            frame.check_authentic(self.identity.public)
            head = Head.from_meta(frame.meta)
        except ProtocolError:
            return False
        if head.version <= self.model.version and frame.seq <= self._outlet.seq:
            return False
        self._desk.stopping = True
        self._do(
            events.Stop(
                error=f"the broker holds version {head.version}, signed by this aggregator, whose ledger knows only "
                f"{self.model.version}: was it restored from a backup? Then run: ternbus aggregator restored DIR"
            )
        )
        return True

    def _metrics(self, member: Member, frame: Frame) -> None:
        frame.check_bodiless()
        metrics = Metrics.from_meta(frame.meta)
        if metrics.version > self.model.version:
            raise ProtocolError("bad-meta", "metrics of a version that is not yet")
        if frame.seq <= member.metrics_seq:
            raise ProtocolError("replayed-metrics", member.name)
        size_bytes = len(json.dumps(dict(metrics.values)))  # as the ledger keeps them
        if member.metrics_bytes + size_bytes > self.settings.limits.metrics_bytes:
            raise ProtocolError("too-many-metrics", f"more than limits.metrics_bytes of {member.name}")
        member.metrics_bytes += size_bytes
        member.metrics_seq = frame.seq
        if metrics.split == "test" and member.highest_base < 0:
            member.evaluates = True
        self._save(records.MetricsReceived(device=member.name, seq=frame.seq, metrics=metrics))

    # --- the model

    def start(self, now: float) -> list[events.Action]:
        """What is to be done before the first event."""
        self._now, self._actions = now, []
        self._press.renew()
        if self.model.buffer:
            self._desk.merge_by = now + self.settings.merge.max_wait_s
        return self._actions

    def restored(self) -> list[events.Action]:
        """This state is an older copy: go above every number that a device may have seen (protocol, section 14)."""
        self._actions = []
        self._outlet.leap(RESTORED)
        self.session += RESTORED
        self._save(records.SessionBegun(session=self.session))
        self._press.leap(RESTORED)
        return self._actions

    def _merge(self) -> None:
        self._desk.merge_by = None
        self._merge_from = self._now + self.settings.downlink.min_interval_s
        for update in self.model.buffer:
            self.registry.members[update.device].waiting_bytes = 0
        self._press.merge()

    def _change_state(self, event: events.StateRequested) -> None:
        if event.state == CLOSED and self.model.buffer:
            self._merge()
        if event.state != self.kept.state:
            self._press.change_state(event.state)
            self._desk.closed = event.state == CLOSED
            self._log(f"the federation is {event.state}")
        self._done(event.request)

    # --- time and counters

    def _on_time(self) -> None:
        if self._census_by is not None and self._census_by <= self._now:
            self._census_by = None
        if self.model.buffer and self._is_merge_due():
            self._merge()
        if self._press.in_doubt and self._echo_by <= self._now:
            self._press.republish()
        if self._tally.due is not None and self._tally.due <= self._now:
            self._count()

    def _is_merge_due(self) -> bool:
        """Whether it is time: max_wait_s after the first update, or earlier, but not too soon, when all is there."""
        if self._desk.merge_by is not None and self._desk.merge_by <= self._now:
            return True
        full = len(self.model.buffer) >= self.settings.merge.buffer_size
        return self._merge_from <= self._now and (full or self._all_contributed())

    def _all_contributed(self) -> bool:
        """Whether there is nobody online whose update is still to come; evaluators send none."""
        if self._census_by is not None:
            return False
        contributed = {update.device for update in self.model.buffer}
        online, members = self.registry.online, self.registry.members
        return not online.isdisjoint(contributed) and all(
            name in contributed or members[name].evaluates for name in online
        )

    def _count(self) -> None:
        self._save(self._tally.take(self.registry))

    # --- actions

    def _done(self, request: int, error: str = "") -> None:
        if request or error:
            self._save(records.RequestDone(request=request, error=error))

    def _save(self, record: records.Record) -> None:
        self._do(events.Save(record=record))

    def _publish(self, message: tuple[str, bytes], *, retain: bool = False) -> None:
        self._do(events.Publish(topic=message[0], payload=message[1], retain=retain))

    def _log(self, text: str) -> None:
        self._do(events.Log(text=text))

    def _do(self, action: events.Action) -> None:
        self._actions.append(action)
