"""The aggregator as a state machine: events in, actions out, in the order in which they must be done.

It knows the protocol, who may send what, and when to merge. It does no I/O and reads no clock: time comes with each
event. What must survive a crash is a ``Save``, and stands before every action that tells anybody of it.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from functools import partial

from ternbus.aggregator.core import events, records
from ternbus.aggregator.core.canary import Canary, Recalled
from ternbus.aggregator.core.clones import Clones
from ternbus.aggregator.core.counters import Counters
from ternbus.aggregator.core.device_messages import DeviceMessages, address_of
from ternbus.aggregator.core.enrollment import Enrollment
from ternbus.aggregator.core.events import Action, Publish, Save
from ternbus.aggregator.core.frames import FrameWriter
from ternbus.aggregator.core.home_assistant import HomeAssistant
from ternbus.aggregator.core.merge_trigger import RETAINED_S
from ternbus.aggregator.core.merging import Merging
from ternbus.aggregator.core.private import Private
from ternbus.aggregator.core.rate_limit import LogLimit
from ternbus.aggregator.core.refusals import Refusals
from ternbus.aggregator.core.registry import Invited, Registry
from ternbus.aggregator.core.requests import Asked, Requests
from ternbus.aggregator.core.retained import Retained
from ternbus.aggregator.core.revocations import Revocations
from ternbus.aggregator.core.search import Search
from ternbus.aggregator.core.set_merging import SetMerging
from ternbus.aggregator.core.sets import Held
from ternbus.aggregator.core.statistics import FederatedStatistics, StatisticsState
from ternbus.aggregator.core.updates import Updates
from ternbus.aggregator.core.validation import Validation
from ternbus.aggregator.core.versions import PublishedState, Versions, leap_of
from ternbus.aggregator.core.watch import Watch
from ternbus.aggregator.core.work import WorkShares
from ternbus.aggregator.merge.influence import Influence
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.settings import Settings
from ternbus.aggregator.sums.state import PrivateSums
from ternbus.broker.backoff import Reconnect
from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.broker.protocol import revocations, topics
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.identity import AGGREGATOR, Identity
from ternbus.broker.protocol.messages import CLOSED, PAUSED, Status
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
    directory: str = "DIR"  # as commands take it
    influence: Influence = field(default_factory=Influence)
    sums: PrivateSums | None = None  # only of a federation with private sums
    helper_codes: Mapping[str, Invited] = field(default_factory=dict)
    held: Held = field(default_factory=Held)  # private updates that no version contains
    recalled: Recalled = field(default_factory=Recalled)  # of the canary
    statistics: StatisticsState = field(default_factory=StatisticsState)
    is_closing: bool = False  # of a federation with private sums, whose helpers are waited for
    search: Search = field(default_factory=Search)
    _frames: FrameWriter = field(init=False)
    _updates: Updates = field(init=False)
    _versions: Versions = field(init=False)
    _retained: Retained = field(init=False)
    _clones: Clones = field(init=False)
    _devices: DeviceMessages = field(init=False)
    _enrollment: Enrollment = field(init=False)
    _refusals: Refusals = field(init=False)
    _private: Private | None = field(init=False)
    _revocations: Revocations = field(init=False)
    _requests: Requests = field(init=False)
    _statistics: FederatedStatistics = field(init=False)
    _counters: Counters = field(default_factory=Counters)
    _merging: Merging = field(init=False)  # of plain updates
    work: WorkShares = field(init=False)
    validation: Validation = field(init=False)
    _reconnect: Reconnect = field(init=False)
    _watch: Watch = field(init=False)
    _is_linked: bool = False  # there is a connection, or one is being made
    _now: float = 0.0
    taken: list[Action] = field(default_factory=list)  # of the event at hand, for `Model.begins`

    def __post_init__(self) -> None:
        settings = self.settings
        self._frames = FrameWriter(settings, self.identity, self.schema, self.seq)
        limit = LogLimit(settings.limits.log_lines_per_minute)
        self._refusals = Refusals(counters=self._counters, log_limit=limit, directory=self.directory)
        self.work = WorkShares(settings.limits.work_bytes_per_s)
        self.validation = Validation(
            settings, self.identity, self.schema, self.influence, self.sums, self.published, self.search
        )
        self._updates = Updates(
            settings=settings, work=self.work, model=self.model, validation=self.validation, frames=self._frames,
            counters=self._counters, log_limit=self._refusals.log_limit,
            closed=self.published.state == CLOSED or self.is_closing,
        )  # fmt: skip
        self._enrollment = Enrollment(
            settings=settings, registry=self.registry, updates=self._updates, refusals=self._refusals
        )
        self._versions = Versions(
            settings=settings, model=self.model, published=self.published, frames=self._frames, search=self.search
        )
        self._private = None if self.sums is None else self._with_private(self.sums)
        self._statistics = FederatedStatistics(self.statistics, self.registry, self._versions, self._updates)
        online = partial(self._status, "online")
        shown = HomeAssistant(versions=self._versions, registry=self.registry, software=self.software)
        self._retained = Retained(versions=self._versions, refusals=self._refusals, shown=shown, say_online=online)
        self._clones = Clones(refusals=self._refusals)
        self._merging = Merging(
            settings=settings, model=self.model, registry=self.registry, versions=self._versions,
            influence=self.influence, canary=Canary.of(settings, self.registry, self._versions, self.recalled),
        )  # fmt: skip
        self._devices = DeviceMessages(
            settings=settings, model=self.model, registry=self.registry, enrollment=self._enrollment,
            updates=self._updates, work=self.work, counters=self._counters, refusals=self._refusals,
            clones=self._clones, canary=self._merging.canary, statistics=self._statistics, search=self.search,
        )  # fmt: skip
        self._revocations = Revocations(
            federation=settings.federation, identity=self.identity, registry=self.registry, frames=self._frames,
            published=self.published,
        )  # fmt: skip
        self._requests = Requests(
            enrollment=self._enrollment, revocations=self._revocations, merging=self._merging, private=self._private,
            statistics=self._statistics,
        )  # fmt: skip
        self._reconnect, self._watch = Reconnect(salt=self.identity.public.hex()), Watch(self.registry, self._retained)

    def _with_private(self, sums: PrivateSums) -> Private:
        private = Private.of(
            self.settings,
            sums,
            held=self.held,
            is_closing=self.is_closing,
            codes=self.helper_codes,
            registry=self.registry,
            versions=self._versions,
            refusals=self._refusals,
        )
        self._updates.sets = private.merging.sets
        return private

    @property
    def _merges(self) -> Merging | SetMerging:
        return self._merging if self._private is None else self._private.merging

    @property
    def deadline(self) -> float | None:
        """When ``TimeReached`` is due at the latest."""
        dues = [
            self._reconnect.due_s if self._wants_connection else None,
            self._merges.due_s(self._now),
            self._versions.confirm_by,
            self._counters.due,
            self._retained.due,
            self._statistics.due,
            None if self._private is None else self._private.due,
        ]
        return min((due for due in dues if due is not None), default=None)

    @property
    def awaited(self) -> Set[str]:
        """Topics of retained messages whose acknowledgement by the broker matters: ``Published`` tells of these."""
        return self._retained.acknowledgements

    def start(self, now: float) -> list[Action]:
        """What is to be done before the first event."""
        self._now = now
        self._watch.started(now)
        self._statistics.start(now)
        if self.model.buffer:
            self._merging.first_accepted(now)
        begun = self.recalled.start()
        begun += [] if self._private is None else self._private.start(now)  # before any head is published
        return [*begun, *self._versions.renew(), *self._revocations.publish()]

    def handle(self, event: events.Event, now: float) -> list[Action]:
        """Take in one event at ``now`` (seconds, never going back); return what is to be done, in order."""
        self._now = now
        self.taken = self._take(event)
        return [*self.taken, *self._on_time()]

    def restored(self, clock_s: float) -> list[Action]:
        """After ``start``, this state is an older copy: go above every number that a device may have seen.

        See section 14 of the protocol.
        """
        numbers = leap_of(self._versions.model.version, clock_s)
        settled = self._merging.canary.dissolve()
        settled += [] if self._private is None else self._private.merging.settle(self._now)
        self._frames.leap(numbers)
        self.session += numbers
        return [*settled, Save(record=records.SessionBegun(session=self.session)), *self._versions.leap(numbers)]

    def _take(self, event: events.Event) -> list[Action]:  # noqa: C901, PLR0911, PLR0912 - a table, one line an event
        match event:
            case events.MessageArrived():
                return self._message(event)
            case events.MessagesDropped():
                return self._refusals.refuse(event.reason, f"dropped {event.detail}", self._now, event.count)
            case events.Connected():
                return self._connected(event)
            case events.ConnectFailed() | events.Disconnected():
                return self._disconnected(event.reason)
            case events.Published():
                return self._retained.acknowledged(event.topic, self._now)
            case events.Refused():
                return self._retained.refused(event.topic, event.reason, self._now)
            case events.InvitationsRead():
                self._enrollment.invite(event.codes)
                if self._private is not None:
                    self._private.invite(event.helpers)
                return self._done(event.request)
            case events.StateRequested():
                return self._change_state(event)
            case events.CountsRequested():
                asked = [] if self._private is None else self._private.merging.count()
                told = self._watch.told(self._merges.waiting(self._now), event, self._now)
                return [self._count(), *asked, told, *self._done(event.request)]
            case events.DiskChecked():
                return self._updates.disk_checked(event.free)
            case events.TimeReached():
                return self._connect()
            case events.StopRequested():
                return self._stop()
            case _:
                return self._request(event)

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
        self._watch.connected(self._now)
        self._reconnect.connected(self._now)
        federation = self.settings.federation
        filters = [f"{topics.root(federation)}/up/#", topics.head(federation), topics.status(federation)]
        filters += [] if self._private is None else self._private.subscriptions()
        actions: list[Action] = [events.Subscribe(filters=(*filters, *self._revocations.subscriptions()))]
        if self._updates.stopping:
            return actions  # the last status was published
        actions += self._status("online")
        self._versions.confirm_by = self._now + RETAINED_S
        self._merges.connected(self._now)
        self._retained.connected(self._now)
        actions += self._versions.fit(event, is_first=self.session == 1)
        if self.session == 1 and self._versions.confirm_by is not None:
            actions += self._versions.republish(why="")  # the broker cannot have anything of ours yet
        if self._private is not None:
            actions += self._private.merging.ask_all(self._now)
        return actions

    def _disconnected(self, reason: str) -> list[Action]:
        self._is_linked = False
        self._watch.disconnected(reason, self._now)
        self._merges.disconnected()
        self._versions.confirm_by = None
        return self._retained.disconnected(self._now, is_contested=self._reconnect.failed(self._now))

    def _stop(self) -> list[Action]:
        """Finish what is accepted, then publish that this is offline. What lacks devices stays for the next start."""
        self._updates.stopping = True
        told = self._watch.told(self._merges.waiting(self._now), events.CountsRequested(), self._now)
        merged = self._merges.merge_all(self._now)
        gone = [*self._retained.shown.stop(self._now), *self._status("offline")]
        return [*merged, self._count(), told, *gone, events.Stop()]

    def _status(self, state: str) -> list[Action]:
        reserved, (topic, payload) = self._frames.status(state, self.session, self.software)
        self._retained.status_frame = payload
        return [*reserved, Publish(topic=topic, payload=payload, retain=True)]

    # --- messages

    def _message(self, event: events.MessageArrived) -> list[Action]:
        """Take in what the broker delivered; whatever is wrong with it is counted, and that is all."""
        what = "a message"
        try:
            address = address_of(event.topic, self.settings.federation)
            what = f"{address.kind} of {address.device or AGGREGATOR}"
            if address.group == "help":
                return self._from_helper(event, address)
            if address.group != "up":
                return self._own(event, address)
            return self._from_device(event, address) if event.payload else []  # an empty one clears what was retained
        except ProtocolError as error:
            return self._refusals.drop(what, error, self._now)

    def _from_helper(self, event: events.MessageArrived, address: topics.Address) -> list[Action]:
        if self._private is None:
            raise ProtocolError("unknown-topic", "this federation has no helpers")
        return self._private.take(event, address, self._now) if event.payload else []

    def _from_device(self, event: events.MessageArrived, address: topics.Address) -> list[Action]:
        was_empty = not self.model.buffer
        actions = self._devices.take(event, address, self._now)
        if was_empty and self.model.buffer:
            self._merging.first_accepted(self._now)
        return actions

    # --- our own retained frames, as the broker has them

    def _own(self, event: events.MessageArrived, address: topics.Address) -> list[Action]:
        """They tell whether the broker lost any, and nothing else."""
        self._enrollment.take_own(address.kind, event.payload, self._now)
        if address.kind == "head" and self._versions.confirm_by is not None:
            return self._own_head(event, address)
        if address.kind in {"head", "snapshot", "delta", topics.TERMS}:
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
            f"the broker holds version {newer}, signed by this aggregator, whose ledger knows only {self.model.version}"
            ": was it restored from a backup, or its -wal file lost? Then run: ternbus aggregator restored "
            f"{self.directory}"
        )
        return [events.Stop(error=error)]

    def _own_status(self, event: events.MessageArrived, address: topics.Address) -> list[Action]:
        """A last will that comes while we are connected is answered in a session above its own."""
        if event.payload == self._retained.status_frame:
            return self._retained.part_arrived(event.topic, event.payload, self._now)
        frame = parse(event.payload)
        topics.check(frame, address)
        frame.check_authentic(self.identity.public)
        status = Status.from_meta(frame.meta)
        if status.state != "offline" or status.session < self.session:
            return []
        self.session = status.session + 1
        begun = Save(record=records.SessionBegun(session=self.session))
        return [begun, *self._status("online")]

    # --- what the operator asks for, and what is due

    def _request(self, event: Asked) -> list[Action]:
        try:
            actions = self._requests.take(event, self._now)
        except ConfigError as error:
            return self._done(event.request, str(error))
        return [*actions, *self._done(event.request)]

    def _change_state(self, event: events.StateRequested) -> list[Action]:
        if self._updates.closed and event.state == PAUSED:  # it would open the federation again, without a word
            return self._done(event.request, "closed, or closing: `ternbus aggregator resume` opens the federation")
        self._updates.closed = event.state == CLOSED
        return [*self._merges.change_state(event.state, self._now), *self._done(event.request)]

    def _done(self, request: int, error: str = "") -> list[Action]:
        return [Save(record=records.RequestDone(request=request, error=error))] if request or error else []

    def _on_time(self) -> list[Action]:
        """Whatever is due now, whichever event was taken."""
        actions = self._merges.on_time(self._now)
        if self._versions.confirm_by is not None and self._versions.confirm_by <= self._now:
            actions += self._versions.republish()
        if self._private is not None and not self._updates.stopping:
            actions += self._private.on_time(self._now)
        actions += [*self._statistics.on_time(self._now), *self._retained.on_time(self._now), *self._clones.tell()]
        if self._counters.due is not None and self._counters.due <= self._now:
            actions.append(self._count())
        return actions

    def _count(self) -> Action:
        return Save(record=self._counters.take(self.registry))
