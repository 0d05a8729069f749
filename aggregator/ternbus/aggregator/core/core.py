"""The aggregator as a state machine: events in, actions out, in the order in which they must be done.

It knows the protocol, who may send what, and when to merge. It does no I/O and reads no clock: time comes with each
event. What must survive a crash is a ``Save``, and stands before every action that tells anybody of it.
"""

from collections.abc import Set
from dataclasses import dataclass, field
from functools import partial
from typing import assert_never

from ternbus.aggregator.core import events, metrics, records
from ternbus.aggregator.core.clones import Clones
from ternbus.aggregator.core.counters import Counters
from ternbus.aggregator.core.enrollment import Enrollment
from ternbus.aggregator.core.events import Action, Publish, Save
from ternbus.aggregator.core.frames import FrameWriter
from ternbus.aggregator.core.merge_trigger import RETAINED_S, MergeTrigger
from ternbus.aggregator.core.rate_limit import LogLimit
from ternbus.aggregator.core.refusals import Refusals
from ternbus.aggregator.core.registry import Member, Registry
from ternbus.aggregator.core.retained import Retained
from ternbus.aggregator.core.revocations import Revocations
from ternbus.aggregator.core.updates import Updates
from ternbus.aggregator.core.validation import Validation
from ternbus.aggregator.core.versions import PublishedState, Versions, leap_of
from ternbus.aggregator.core.work import LARGE_HEADER_BYTES, PATIENCE_S, WorkShares, header_work
from ternbus.aggregator.merge.influence import Influence, Measured
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.settings import Settings
from ternbus.broker.backoff import Reconnect
from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.broker.protocol import revocations, topics
from ternbus.broker.protocol.frame import Frame, header_bytes, parse
from ternbus.broker.protocol.identity import AGGREGATOR, Identity
from ternbus.broker.protocol.messages import CLOSED, Status
from ternbus.broker.protocol.schema import Schema


@dataclass(slots=True, kw_only=True)
class Core:
    """One federation's aggregator. ``handle`` takes every event."""

    settings: Settings
    identity: Identity
    schema: Schema
    model: Model
    registry: Registry
    published: PublishedState
    seq: int  # the highest that was reserved
    session: int
    software: str = "ternbus"
    influence: Influence = field(default_factory=Influence)
    _frames: FrameWriter = field(init=False)
    _updates: Updates = field(init=False)
    _versions: Versions = field(init=False)
    _retained: Retained = field(init=False)
    _clones: Clones = field(init=False)
    _enrollment: Enrollment = field(init=False)
    _refusals: Refusals = field(init=False)
    _revocations: Revocations = field(init=False)
    _counters: Counters = field(default_factory=Counters)
    _merge_trigger: MergeTrigger = field(init=False)
    work: WorkShares = field(init=False)
    validation: Validation = field(init=False)
    _reconnect: Reconnect = field(init=False)
    _told_held: bool = False  # the operator knows that the buffer lacks devices
    _is_linked: bool = False  # there is a connection, or one is being made
    _now: float = 0.0

    def __post_init__(self) -> None:
        settings = self.settings
        self._frames = FrameWriter(settings, self.identity, self.schema, self.seq)
        log_limit = LogLimit(settings.limits.log_lines_per_minute)
        self._refusals = Refusals(counters=self._counters, log_limit=log_limit)
        self.work = WorkShares(settings.limits.work_bytes_per_s)
        self.validation = Validation(settings, self.identity, self.schema, self.influence)
        self._updates = Updates(
            settings=settings,
            work=self.work,
            model=self.model,
            validation=self.validation,
            frames=self._frames,
            counters=self._counters,
            log_limit=log_limit,
            closed=self.published.state == CLOSED,
        )
        self._enrollment = Enrollment(
            settings=settings, registry=self.registry, updates=self._updates, refusals=self._refusals
        )
        self._versions = Versions(settings=settings, model=self.model, published=self.published, frames=self._frames)
        online = partial(self._status, "online")
        self._retained = Retained(versions=self._versions, refusals=self._refusals, say_online=online)
        self._clones = Clones(refusals=self._refusals)
        self._revocations = Revocations(
            federation=settings.federation,
            identity=self.identity,
            registry=self.registry,
            frames=self._frames,
            published=self.published,
        )
        self._merge_trigger = MergeTrigger(
            settings=settings.merge, min_interval_s=settings.downlink.min_interval_s, min_devices=settings.min_devices
        )
        self._reconnect = Reconnect(salt=self.identity.public.hex())

    @property
    def deadline(self) -> float | None:
        """When ``TimeReached`` is due at the latest."""
        dues = [
            self._reconnect.due_s if self._wants_connection else None,
            self._merge_trigger.due_s(self.model.buffer, self.registry.online, self._now),
            self._versions.confirm_by,
            self._counters.due,
            self._retained.due,
        ]
        return min((due for due in dues if due is not None), default=None)

    @property
    def awaited(self) -> Set[str]:
        """Topics of retained messages whose acknowledgement by the broker matters: ``Published`` tells of these."""
        return self._retained.awaited

    def start(self, now: float) -> list[Action]:
        """What is to be done before the first event."""
        self._now = now
        if self.model.buffer:
            self._merge_trigger = self._merge_trigger.first_accepted(now)
        return [*self._versions.renew(), *self._revocations.publish()]

    def handle(self, event: events.Event, now: float) -> list[Action]:
        """Take in one event at ``now`` (seconds, never going back); return what is to be done, in order."""
        self._now = now
        actions = self._take(event)
        actions += self._on_time()
        return actions

    def restored(self, clock_s: float) -> list[Action]:
        """This state is an older copy: go above every number that a device may have seen (protocol, section 14)."""
        numbers = leap_of(self._versions.model.version, clock_s)
        self._frames.leap(numbers)
        self.session += numbers
        begun = Save(record=records.SessionBegun(session=self.session))
        return [begun, *self._versions.leap(numbers)]

    def _take(self, event: events.Event) -> list[Action]:  # noqa: C901, PLR0911, PLR0912 - a table, one line an event
        match event:
            case events.MessageArrived():
                return self._message(event)
            case events.MessagesDropped():
                return self._refusals.refuse(event.reason, f"dropped {event.detail}", self._now, event.count)
            case events.Connected():
                return self._connected(event)
            case events.ConnectFailed() | events.Disconnected():
                return self._disconnected()
            case events.Published():
                return self._retained.acknowledged(event.topic, self._now)
            case events.Refused():
                return self._retained.refused(event.topic, event.reason, self._now)
            case events.InvitationsRead():
                self._enrollment.invite(event.codes)
                return self._done(event.request)
            case events.CancelRequested() | events.RevokeRequested():
                return self._membership(event)
            case events.StateRequested():
                return self._change_state(event)
            case events.CountsRequested():
                return [*self._count(), *self._done(event.request)]
            case events.DiskChecked():
                return self._updates.disk_checked(event.free)
            case events.TimeReached():
                return self._connect()
            case events.StopRequested():
                return self._stop()
            case _:
                assert_never(event)

    # --- connection

    @property
    def _wants_connection(self) -> bool:
        return not (self._is_linked or self._updates.stopping)

    def _connect(self) -> list[Action]:
        if not self._wants_connection or self._now < self._reconnect.due_s:
            return []
        self._is_linked = True
        self.session += 1
        begun = Save(record=records.SessionBegun(session=self.session))
        reserved, (topic, payload) = self._frames.status("offline", self.session, self.software)
        return [begun, *reserved, events.Connect(will_topic=topic, will_payload=payload)]

    def _connected(self, event: events.Connected) -> list[Action]:
        self._is_linked = True
        self._reconnect.connected(self._now)
        federation = self.settings.federation
        filters = (f"{topics.root(federation)}/up/#", topics.head(federation), topics.status(federation))
        actions: list[Action] = [events.Subscribe(filters=(*filters, *self._revocations.subscriptions()))]
        if self._updates.stopping:
            return actions  # the last status was published
        actions += self._status("online")
        self._versions.confirm_by = self._now + RETAINED_S
        self._merge_trigger = self._merge_trigger.connected(self._now)
        actions += self._versions.fit(event.frame_bytes)
        if self.session == 1 and self._versions.confirm_by is not None:
            actions += self._versions.republish()  # the broker cannot have anything of ours yet
        return actions

    def _disconnected(self) -> list[Action]:
        self._is_linked = False
        self._merge_trigger = self._merge_trigger.disconnected()
        self._versions.confirm_by = None
        return self._retained.disconnected(self._now, is_contested=self._reconnect.failed(self._now))

    def _stop(self) -> list[Action]:
        """Finish what is accepted, then publish that this is offline. What lacks devices stays for the next start."""
        self._updates.stopping = True
        return [*self._merge_all(), *self._count(), *self._status("offline"), events.Stop()]

    def _status(self, state: str) -> list[Action]:
        reserved, (topic, payload) = self._frames.status(state, self.session, self.software)
        return [*reserved, Publish(topic=topic, payload=payload, retain=True)]

    # --- messages

    def _message(self, event: events.MessageArrived) -> list[Action]:
        """Take in what the broker delivered; whatever is wrong with it is counted, and that is all."""
        what = "a message"
        try:
            address = self._address(event.topic)
            what = f"{address.kind} of {address.device or AGGREGATOR}"
            if address.group != "up":
                return self._own(event, address)
            return self._from_device(event, address) if event.payload else []  # an empty one clears what was retained
        except ProtocolError as error:
            return self._refusals.drop(what, error, self._now)

    def _address(self, topic: str) -> topics.Address:
        address = topics.parse(topic)
        if address.federation != self.settings.federation:
            raise ProtocolError("wrong-federation", address.federation)
        return address

    def _from_device(self, event: events.MessageArrived, address: topics.Address) -> list[Action]:
        name, opened = address.device or "", event.opened
        if opened is not None and opened.decoded_bytes:  # that was done, whatever becomes of the message
            self.work.charge(name, opened.decoded_bytes, self._now)
        self._enrollment.take_frame(name, self._now)
        is_late = event.waited_s > PATIENCE_S
        if is_late and header_bytes(event.payload) > LARGE_HEADER_BYTES and self.work.owes(name, self._now):
            raise ProtocolError("too-much-work", f"{name} has used its share of the work, and sends large headers")
        frame = parse(event.payload) if opened is None else opened.frame
        topics.check(frame, address)
        if (cost := header_work(len(frame.header))) and name in self.registry.members:
            self.work.charge(name, cost, self._now)
        if frame.kind == "enroll":
            return self._enrollment.enroll(frame, self._now, event.clock_s)
        verified = b"" if opened is None else opened.public
        sender = self._enrollment.authenticate(frame, verified, self._now, is_late=is_late)
        if not isinstance(sender, Member):
            return sender
        if frame.kind == "update":
            sender.update_bytes += event.packet_bytes
            self._counters.observe(sender.name, self._now)
        return self._frame(sender, frame, None if opened is None else opened.content, is_late=is_late)

    def _frame(self, member: Member, frame: Frame, ahead: Measured | None, *, is_late: bool) -> list[Action]:
        if frame.kind != "status":  # the broker delivers a retained one again, long after it was said
            member.pace.heard(self._now)
        named = frame.meta.get("version" if frame.kind == "metrics" else "base")
        claimed = self._refusals.claim(member.name, named, self.model.version, self._now)
        match frame.kind:
            case "update":
                return [*claimed, *self._update(member, frame, ahead, is_late=is_late)]
            case "offer":
                return [*claimed, *self._updates.offer(member, frame, self._now)]
            case "status":
                frame.check_bodiless()
                status = Status.from_meta(frame.meta)
                self._clones.observe(member, status, frame.seq, self.model.version, self._now)
                if self.registry.observe(member, status, frame.seq):
                    member.pace.heard(self._now)
                    self._counters.observe(member.name, self._now)
                return claimed
            case _:  # the topics that a device may write on leave only metrics
                bytes_max = self.settings.limits.metrics_bytes
                return [*claimed, metrics.received(member, frame, version=self.model.version, bytes_max=bytes_max)]

    def _update(self, member: Member, frame: Frame, ahead: Measured | None, *, is_late: bool) -> list[Action]:
        was_empty = not self.model.buffer
        actions = self._updates.update(member, frame, self._now, ahead, is_late=is_late)
        if was_empty and self.model.buffer:
            self._told_held = False
            self._merge_trigger = self._merge_trigger.first_accepted(self._now)
        return actions

    # --- our own retained frames, as the broker has them

    def _own(self, event: events.MessageArrived, address: topics.Address) -> list[Action]:
        """They tell whether the broker lost any, and nothing else."""
        self._enrollment.take_own(address.kind, event.payload, self._now)
        if address.kind == "head":
            return self._own_head(event, address) if self._versions.confirm_by is not None else []
        if address.kind == "snapshot":
            return self._retained.part_arrived(event.topic, event.payload, self._now)
        if address.kind == "status" and event.payload and not self._updates.stopping:
            return self._own_status(event, address)
        return self._revocations.arrived(event, address) if address.kind == revocations.KIND else []

    def _own_head(self, event: events.MessageArrived, address: topics.Address) -> list[Action]:
        if event.payload == self.published.head_frame:
            self._versions.confirm_by = None
            return self._retained.confirmed(self._now)
        newer = self._versions.newer(event.payload, address)
        if newer is None:
            return self._versions.republish()
        self._updates.stopping = True
        error = (
            f"the broker holds version {newer}, signed by this aggregator, whose ledger knows only "
            f"{self.model.version}: was it restored from a backup? Then run: ternbus aggregator restored DIR"
        )
        return [events.Stop(error=error)]

    def _own_status(self, event: events.MessageArrived, address: topics.Address) -> list[Action]:
        """A last will that comes while we are connected is answered in a session above its own."""
        frame = parse(event.payload)
        topics.check(frame, address)
        frame.check_authentic(self.identity.public)
        status = Status.from_meta(frame.meta)
        if status.state != "offline" or status.session < self.session:
            return []
        self.session = status.session + 1
        begun = Save(record=records.SessionBegun(session=self.session))
        return [begun, *self._status("online")]

    # --- what the operator asks for

    def _membership(self, event: events.CancelRequested | events.RevokeRequested) -> list[Action]:
        try:
            if isinstance(event, events.RevokeRequested):
                actions = [*self._enrollment.revoke(event), *self._revocations.publish()]
            else:
                actions = self._enrollment.cancel(event.device)
        except ConfigError as error:
            return self._done(event.request, str(error))
        return [*actions, *self._done(event.request)]

    def _change_state(self, event: events.StateRequested) -> list[Action]:
        actions = self._merge_all() if event.state == CLOSED else []
        if event.state != self.published.state:
            actions += self._versions.change_state(event.state)
            self._updates.closed = event.state == CLOSED
            actions.append(events.Log(text=f"the federation is {event.state}"))
            if event.state == CLOSED and self.model.buffer:
                actions += self._tell_held()
        return [*actions, *self._done(event.request)]

    def _done(self, request: int, error: str = "") -> list[Action]:
        return [Save(record=records.RequestDone(request=request, error=error))] if request or error else []

    # --- time

    def _on_time(self) -> list[Action]:
        """Whatever is due now, whichever event was taken."""
        actions: list[Action] = []
        if self._merge_trigger.is_due(self.model.buffer, self.registry.online, self._now):
            actions += self._merge()
        if not self._told_held and self._merge_trigger.held(self.model.buffer, self._now):
            actions += self._tell_held()
        if self._versions.confirm_by is not None and self._versions.confirm_by <= self._now:
            actions += self._versions.republish()
        actions += [*self._retained.on_time(self._now), *self._clones.tell()]
        if self._counters.due is not None and self._counters.due <= self._now:
            actions += self._count()
        return actions

    def _merge_all(self) -> list[Action]:
        """Merge what is there, since nothing may come any more; what lacks devices is held over."""
        return self._merge() if self._merge_trigger.may_merge(self.model.buffer) else []

    def _tell_held(self) -> list[Action]:
        """Tell the operator, once for each buffer, that it lacks devices."""
        self._told_held = True
        devices = len({update.device for update in self.model.buffer})
        text = (
            f"{len(self.model.buffer)} accepted updates of {devices} device{'s' if devices > 1 else ''} stay unmerged: "
            f"a version is made of at least {self.settings.min_devices} devices (merge.min_devices); "
            "the ledger keeps them"
        )
        return [events.Log(text=text)]

    def _merge(self) -> list[Action]:
        self._merge_trigger = self._merge_trigger.merged(self._now)
        for update in self.model.buffer:
            self.registry.members[update.device].waiting_bytes = 0
        self.influence.merged(self.model.buffer)
        return self._versions.merge()

    def _count(self) -> list[Action]:
        return [Save(record=self._counters.take(self.registry))]
