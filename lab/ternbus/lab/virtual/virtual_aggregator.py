"""The simulated aggregator: the real core in virtual time, with an unlimited line to the broker."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, assert_never

from ternbus.aggregator.core import events, records
from ternbus.aggregator.core.core import Core
from ternbus.broker.link.link import packet_bytes
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.schema import Vector
from ternbus.lab.virtual.clock import Alarm, Clock
from ternbus.lab.virtual.memory_broker import PROTOCOL, Line, MemoryBroker
from ternbus.lab.virtual.memory_ledger import Ledger

VersionMade = Callable[[int, Vector], None]
HEAD: Final = 1  # number of a publication


class VirtualAggregator:
    """Performs the actions of a core. ``open_core`` opens the core from the ledger, at the start and after a crash.

    ``made`` is called with each new version and its vector after both have been published.
    """

    def __init__(
        self, clock: Clock, broker: MemoryBroker, ledger: Ledger, open_core: Callable[[], Core], made: VersionMade
    ) -> None:
        self.core = open_core()
        self._clock = clock
        self._ledger = ledger
        self._open_core = open_core
        self._made = made
        self._session = broker.session(self, Line())
        self._alarm = self._new_alarm()

    def start(self) -> None:
        self._perform(self.core.start(self._clock.now))
        self._handle(events.TimeReached())

    def kill(self) -> None:
        """Simulate SIGKILL: state that is not in the ledger is lost."""
        self._alarm.off()
        self._session.cut()

    def restart(self) -> None:
        self.core = self._open_core()
        self._alarm = self._new_alarm()
        self.start()

    # callbacks of the session

    def connected(self) -> None:
        self._handle(events.Connected(frame_bytes=self.core.settings.limits.frame_bytes))

    def disconnected(self, reason: str) -> None:  # noqa: ARG002 - signature of the callback
        self._handle(events.Disconnected())

    def arrived(self, topic: str, payload: bytes, *, retained: bool) -> None:  # noqa: ARG002 - signature of the callback
        size_bytes = packet_bytes(topic, len(payload), PROTOCOL)
        self._handle(events.MessageArrived(topic=topic, payload=payload, packet_bytes=size_bytes))

    def acknowledged(self, seq: int) -> None:
        """Of heads only, which a snapshot may follow; a simulated broker keeps all that it is given."""
        if seq == HEAD and self._head in self.core.awaited:
            self._handle(events.Published(topic=self._head))

    @property
    def _head(self) -> str:
        return topics.head(self.core.settings.federation)

    def _new_alarm(self) -> Alarm:
        core = self.core
        return Alarm(self._clock, lambda: core.deadline, lambda: self._handle(events.TimeReached()))

    def _handle(self, event: events.Event) -> None:
        self._perform(self.core.handle(event, self._clock.now))
        self._alarm.look()

    def _perform(self, actions: Iterable[events.Action]) -> None:
        """Perform actions as the service does: write all records first, then the other actions in order."""
        ordered = list(actions)
        batch = [action.record for action in ordered if isinstance(action, events.Save)]
        if batch:
            self._ledger.write(batch, self._clock.now)
        for action in ordered:
            match action:
                case events.Publish():
                    seq = HEAD if action.topic == self._head else 0
                    self._session.publish(action.topic, action.payload, retain=action.retain, seq=seq)
                case events.RepublishRetained():
                    for topic in action.topics:
                        self._session.publish(topic, self._ledger.frame(topic), retain=True)
                case events.Subscribe():
                    self._session.subscribe(action.filters)
                case events.Connect():
                    self._session.connect(action.will_topic, action.will_payload)
                case events.Stop():
                    self._session.disconnect()
                case events.Save() | events.Log() | events.Unsubscribe():
                    continue
                case _:
                    assert_never(action)
        for record in batch:
            if isinstance(record, records.VersionMade):
                # After the messages just published, which reach the broker at the same virtual time.
                self._clock.at(self._clock.now, partial(self._made, record.version, self.core.model.published))
