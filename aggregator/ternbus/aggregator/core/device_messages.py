"""The path of a device's message through the core: rate limit, authentication, then the handler of its kind."""

from dataclasses import dataclass

from ternbus.aggregator.core import metrics
from ternbus.aggregator.core.canary import Canary
from ternbus.aggregator.core.clones import Clones
from ternbus.aggregator.core.counters import Counters
from ternbus.aggregator.core.enrollment import Enrollment
from ternbus.aggregator.core.events import Action, MessageArrived, Save
from ternbus.aggregator.core.refusals import Refusals
from ternbus.aggregator.core.registry import Member, Registry
from ternbus.aggregator.core.search import Search
from ternbus.aggregator.core.statistics import FederatedStatistics
from ternbus.aggregator.core.updates import Updates
from ternbus.aggregator.core.work import LARGE_HEADER_BYTES, PATIENCE_S, WorkShares, header_work
from ternbus.aggregator.merge.influence import Measured
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.settings import Settings
from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame, header_bytes, parse
from ternbus.broker.protocol.messages import Metrics, Status
from ternbus.broker.protocol.statistics import StatisticsAnswer


def address_of(topic: str, federation: str) -> topics.Address:
    """What a topic says; ProtocolError for one of another federation, or of none."""
    address = topics.parse(topic)
    if address.federation != federation:
        raise ProtocolError("wrong-federation", address.federation)
    return address


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMessages:
    """Takes in messages on the topics of devices; ProtocolError for one that is dropped."""

    settings: Settings
    model: Model
    registry: Registry
    enrollment: Enrollment
    updates: Updates
    work: WorkShares
    counters: Counters
    refusals: Refusals
    clones: Clones
    canary: Canary
    statistics: FederatedStatistics
    search: Search

    def take(self, event: MessageArrived, address: topics.Address, now: float) -> list[Action]:
        """Take in a message on a topic below ``up/``."""
        name, opened = address.device or "", event.opened
        if opened is not None and opened.decoded_bytes:  # that was done, whatever becomes of the message
            self.work.charge(name, opened.decoded_bytes, now)
        self.enrollment.take_frame(name, now)
        is_late = event.waited_s > PATIENCE_S
        if is_late and header_bytes(event.payload) > LARGE_HEADER_BYTES and self.work.owes(name, now):
            raise ProtocolError("too-much-work", f"{name} has used its share of the work, and sends large headers")
        frame = parse(event.payload) if opened is None else opened.frame
        topics.check(frame, address)
        if (cost := header_work(len(frame.header))) and name in self.registry.members:
            self.work.charge(name, cost, now)
        if frame.kind == "enroll":
            return self.enrollment.enroll(frame, now, event.clock_s)
        verified = b"" if opened is None else opened.public
        sender = self.enrollment.authenticate(frame, verified, now, is_late=is_late)
        if not isinstance(sender, Member):
            return sender
        if frame.kind == "update":
            sender.update_bytes += event.packet_bytes
            self.counters.observe(sender.name, now)
        if frame.kind == "status":
            return self._status(sender, frame, now, event.clock_s)
        sender.heard(now, event.clock_s)
        return self._frame(sender, frame, None if opened is None else opened.content, now, is_late=is_late)

    def _claimed(self, member: Member, version: object, now: float) -> list[Action]:
        return self.refusals.claim(member.name, version, self.model.version, now)

    def _status(self, member: Member, frame: Frame, now: float, clock_s: float) -> list[Action]:
        claimed = self._claimed(member, frame.meta.get("base"), now)
        frame.check_bodiless()
        status, was_online = Status.from_meta(frame.meta), member.online
        self.clones.observe(member, status, frame.seq, self.model.version, now)
        if self.registry.observe(member, status, frame.seq):
            # an `offline` may be one that the broker has retained since long ago
            member.heard(now, clock_s if status.online or was_online else 0.0)
            self.counters.observe(member.name, now)
        return claimed

    def _frame(
        self, member: Member, frame: Frame, ahead: Measured | None, now: float, *, is_late: bool
    ) -> list[Action]:
        if frame.kind == Metrics.KIND and "candidate" in frame.meta:
            return self.canary.report(member, frame)
        claimed = self._claimed(member, frame.meta.get("version" if frame.kind == "metrics" else "base"), now)
        match frame.kind:
            case "update":
                return [*claimed, *self.updates.update(member, frame, now, ahead, is_late=is_late)]
            case "offer":
                return [*claimed, *self.updates.offer(member, frame, now)]
            case StatisticsAnswer.KIND:
                return [*claimed, *self.statistics.take(member, frame, now)]
            case _:  # the topics that a device may write on leave only metrics
                bytes_max = self.settings.limits.metrics_bytes
                received = metrics.received(member, frame, version=self.model.version, bytes_max=bytes_max)
                self.canary.observe(received)
                self.search.observe(member.name, received.metrics)
                return [*claimed, Save(record=received)]
