"""The running aggregator: it owns connection, ledger and clock, and performs the core's actions in order."""

import queue
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final, assert_never

from ternbus.aggregator.core import events, records
from ternbus.aggregator.core.core import Core
from ternbus.aggregator.core.events import Opened
from ternbus.aggregator.merge.background import adders_for, summing
from ternbus.aggregator.shell import backup, transport
from ternbus.aggregator.shell.administration import exclusive, open_core
from ternbus.aggregator.shell.preverify import WORTHWHILE_BYTES, Preverifier
from ternbus.aggregator.store import control, disk
from ternbus.aggregator.store.ledger import Ledger, writing
from ternbus.aggregator.transport_settings import TransportSettings
from ternbus.broker.crash_points import publishing, reached
from ternbus.broker.errors import LinkError
from ternbus.broker.link.link import (
    Arrived,
    Connected,
    Disconnected,
    Link,
    LinkEvent,
    PacketTooLargeError,
    Published,
    Refused,
    Token,
    packet_bytes,
)
from ternbus.broker.log_levels import ERROR, WARNING
from ternbus.broker.log_output import WriteLog
from ternbus.broker.protocol import topics

BATCH: Final = 64  # events whose records share one fsync
MEASURE_S: Final = 5.0  # how often the free space of the disk is looked at
POLL_S: Final = 0.1  # how often the ledger is looked at for what commands have asked
SPREAD_PATIENCE_S: Final = 2.0  # for the lock on the lists beside backups: the command copies them, too
LOG_S: Final = 10.0  # how often a failed attempt to connect is logged
ANSWER_BYTES_MAX: Final = 1 << 24  # to devices, that the broker has not acknowledged; then no more, until it has
GOODBYE_S: Final = 5.0
SWITCH_S: Final = 0.0005


class Interrupted:
    """``stop`` was called; this wakes the loop."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A message in the queue, in order of arrival, with its frame if another thread opens it."""

    arrived: Arrived
    came_at: float
    opened: "Future[Opened | None] | None"


Item = Connected | Disconnected | Published | Refused | Waiting | Interrupted | events.ConnectFailed | events.Refused


@contextmanager
def _quick_handover() -> Iterator[None]:
    """Let threads that numpy, zstd or a hash set free have the interpreter back soon: a tenth more updates a second."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@dataclass(slots=True)
class Service:
    """Serves one directory until ``stop`` is called (from a signal handler, or any thread)."""

    directory: Path
    software: str
    log: WriteLog
    transport: TransportSettings | None = None  # instead of what aggregator.toml says
    beside: AbstractContextManager[object] = field(default_factory=nullcontext)  # entered while this directory is ours
    adders: int = field(default_factory=adders_for)  # threads that add up updates of a large model
    _queue: "queue.SimpleQueue[Item]" = field(default_factory=queue.SimpleQueue)
    _opening: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="preverifier")
    )
    _preverifier: Preverifier = field(init=False)
    _ledger: Ledger = field(init=False)
    _core: Core = field(init=False)
    _link: Link = field(init=False)
    _actions: list[events.Action] = field(default_factory=list)  # of the turn at hand, without those of its last event
    _topics: dict[int, str] = field(default_factory=dict)  # of publications without an answer, by ticket
    _answers: dict[int, int] = field(default_factory=dict)  # bytes of those that are receipts and grants
    _answer_bytes: int = 0  # of all of them
    _unsent: int = 0  # receipts and grants, because of `ANSWER_BYTES_MAX`, that are not counted yet
    _protocol: int = 5
    _heard_at: float = 0.0  # when the broker acknowledged a publication last, or had none to acknowledge
    _logged_at: float = -LOG_S
    _change_count: int = -1
    _polled_at: float = 0.0
    _measured_at: float = -MEASURE_S
    _interrupted: bool = False
    _stopped: bool = False
    _dropped: int = 0  # messages that the link dropped and that are counted already

    def stop(self) -> None:
        """End soon: what is accepted is finished first, and what waits to be taken in comes again at the next start."""
        self._interrupted = True
        self._queue.put(Interrupted())

    def run(self) -> None:
        """Serve; return when stopped. ConfigError where the directory or the broker's address is wrong."""
        with (
            exclusive(self.directory),
            ThreadPoolExecutor(1, thread_name_prefix="vectors") as beside,
            ThreadPoolExecutor(1, thread_name_prefix="bodies") as ahead,
            ThreadPoolExecutor(self.adders, thread_name_prefix="adding") as adding,
            writing(self.directory, beside) as self._ledger,
            self.beside,
            _quick_handover(),
        ):
            self._core = open_core(self.directory, self._ledger, self.software)
            self._core.model.sum_by(partial(summing, adding, self.adders))
            core = self._core
            core.model.begins = partial(self._append_ahead, ahead)
            self._preverifier = Preverifier(
                registry=core.registry, validation=core.validation, model=core.model, work=core.work
            )
            self._serve()

    def _serve(self) -> None:
        settings = self._core.settings
        self._link = transport.connect(self.directory, settings, self._deliver, self.transport)
        try:
            self._perform(self._core.start(time.monotonic()))
            self.log(
                f"federation {settings.federation!r} at version {self._core.model.version}, broker {settings.broker}",
                event="started",
                fields={"version": self._core.model.version, "broker": settings.broker},
            )
            while not self._stopped:
                self._turn()
        except BaseException:
            self._link.abandon()  # so that the broker publishes the last will: `offline`
            raise
        else:
            self._link.disconnect(GOODBYE_S)
        finally:
            self._opening.shutdown(cancel_futures=True)

    def _deliver(self, event: LinkEvent) -> None:
        """Called in the network thread: put into the queue, and no more."""
        self._queue.put(self._waiting(event) if isinstance(event, Arrived) else event)

    def _waiting(self, arrived: Arrived) -> Waiting:
        came_at = time.monotonic()
        if len(arrived.payload) < WORTHWHILE_BYTES:
            return Waiting(arrived, came_at, None)
        return Waiting(arrived, came_at, self._opening.submit(self._open, arrived, came_at))

    def _open(self, arrived: Arrived, came_at: float) -> Opened | None:
        return self._preverifier.open(arrived.topic, arrived.payload, time.monotonic() - came_at)

    def _turn(self) -> None:
        """One round: look for requests, take in what has come, tell the core the time."""
        now = time.monotonic()
        if now - self._polled_at >= POLL_S:
            self._polled_at = now
            self._poll()
        if now - self._measured_at >= MEASURE_S:
            self._measured_at = now
            self._perform(self._core.handle(events.DiskChecked(free=disk.free(self.directory)), now))
        batch = self._next_batch()
        actions = self._actions = []
        tokens: list[Token] = []
        for event in batch:
            if self._interrupted:
                break  # what the core was not handed is not acknowledged
            actions += self._translate(event, tokens)
        actions += self._count_dropped()
        last = events.StopRequested() if self._interrupted else events.TimeReached()
        actions += self._core.handle(last, time.monotonic())
        self._perform(actions)
        if tokens:
            reached("acknowledge")
            self._link.acknowledge(tokens)

    def _append_ahead(self, thread: ThreadPoolExecutor) -> None:
        """As a merge begins: have the bodies of what it merges written, for which the disk takes as long."""
        saves = [action for action in (*self._actions, *self._core.taken) if isinstance(action, events.Save)]
        bodies = [save.record.body for save in saves if isinstance(save.record, records.UpdateAccepted)]
        if bodies:
            self._ledger.bodies.append_ahead(bodies, thread)

    def _next_batch(self) -> list[Item]:
        """Everything that waits, at most BATCH; nothing if a deadline comes first."""
        now = time.monotonic()
        poll_at, deadline = self._polled_at + POLL_S, self._core.deadline
        due = poll_at if deadline is None else min(poll_at, deadline)
        batch: list[Item] = []
        with suppress(queue.Empty):
            batch.append(self._queue.get(timeout=max(0.0, due - now)))
            while len(batch) < BATCH:
                batch.append(self._queue.get_nowait())
        return batch

    def _translate(self, event: Item, tokens: list[Token]) -> list[events.Action]:
        now = time.monotonic()
        match event:
            case Waiting():
                opened = None if event.opened is None else event.opened.result()
                actions = self._message(event, opened, tokens)
                self._preverifier.close(opened)
                return actions
            case Connected():
                self._protocol = event.protocol
                version = "5" if event.protocol == 5 else "3.1.1"
                self.log(f"connected (MQTT {version})", event="connected", fields={"mqtt": version})
                most_bytes = event.most_bytes if event.protocol == 5 else 0  # 3.1.1 has no words for it
                return self._core.handle(events.Connected(frame_bytes=event.frame_bytes, most_bytes=most_bytes), now)
            case Disconnected():
                self._topics.clear()
                self._answers.clear()
                self._answer_bytes = 0
                self.log(f"connection lost: {event.reason}", level=WARNING, event="disconnected")
                return self._core.handle(events.Disconnected(reason=event.reason), now)
            case events.ConnectFailed() | events.Refused():
                return self._core.handle(event, now)
            case Interrupted():
                return []  # ``_turn`` looks at what it stands for
            case Refused():
                topic = self._settled(event.ticket)
                return self._core.handle(events.Refused(topic=topic, reason=event.reason), now)
            case Published():
                topic = self._settled(event.ticket)
                return self._core.handle(events.Published(topic=topic), now) if topic in self._core.awaited else []
            case _:
                assert_never(event)

    def _message(self, waiting: Waiting, opened: Opened | None, tokens: list[Token]) -> list[events.Action]:
        arrived, now = waiting.arrived, time.monotonic()
        tokens.append(arrived.token)
        event = events.MessageArrived(
            topic=arrived.topic,
            payload=arrived.payload,
            packet_bytes=packet_bytes(arrived.topic, len(arrived.payload), self._protocol),
            opened=opened,
            clock_s=time.time(),
            waited_s=now - waiting.came_at,
        )
        return self._core.handle(event, now)

    def _settled(self, ticket: int) -> str:
        """The topic of a publication that the broker has acknowledged or refused."""
        self._heard_at = time.monotonic()
        self._answer_bytes -= self._answers.pop(ticket, 0)
        return self._topics.pop(ticket)

    @property
    def _unacknowledged_s(self) -> float:
        """How long the broker has answered no publication, while it has some to answer."""
        return time.monotonic() - self._heard_at if self._topics else 0.0

    def _count_dropped(self) -> list[events.Action]:
        if self._link.dropped == self._dropped and not self._unsent:
            return []
        at_qos_0, self._dropped = self._link.dropped - self._dropped, self._link.dropped
        unsent, self._unsent = self._unsent, 0
        found = (
            ("qos-0", at_qos_0, "a publication at QoS 0"),
            ("unacknowledged", unsent, "an answer to a device: the broker acknowledges those before too slowly"),
        )
        dropped = [events.MessagesDropped(reason=why, count=count, detail=what) for why, count, what in found if count]
        return [action for event in dropped for action in self._core.handle(event, time.monotonic())]

    def _perform(self, actions: Iterable[events.Action]) -> None:
        """Do the actions in order, but every record first and with one fsync: to publish later is always safe."""
        ordered = list(actions)
        batch = [action.record for action in ordered if isinstance(action, events.Save)]
        if batch:
            reached("save")
            self._ledger.write(batch)
            reached("saved")
            self._spread_revocations(batch)
        for action in ordered:
            match action:
                case events.Save():
                    continue
                case events.Publish():
                    self._publish(action.topic, action.payload, retain=action.retain)
                case events.RepublishRetained():
                    reached("republish")
                    self._republish(action)
                case events.Subscribe():
                    reached("subscribe")
                    with suppress(LinkError):  # lost again already: the next connection subscribes
                        self._link.subscribe(action.filters)
                case events.Unsubscribe():
                    with suppress(LinkError):
                        self._link.unsubscribe(action.filters)
                case events.Log():
                    self.log(action.text, level=action.level, event=action.event, fields=action.fields)
                case events.Stop():
                    reached("stop")
                    self._stopped = True
                    if action.error:
                        raise LinkError(action.error)  # the broker caused it, so a supervisor may restart the process
                case events.Connect():
                    self._connect(action)
                case _:
                    assert_never(action)

    def _republish(self, action: events.RepublishRetained) -> None:
        if action.why:
            count = len(action.topics)
            messages = "1 retained message" if count == 1 else f"{count} retained messages"
            self.log(f"publishing {messages} again: {action.why}", level=WARNING, event="republished")
        for topic in action.topics:
            self._publish(topic, self._ledger.frame(topic), retain=True)

    def _spread_revocations(self, batch: list[records.Record]) -> None:
        if not any(isinstance(record, records.DeviceRevoked | records.KeysRevoked) for record in batch):
            return
        federation = self._core.settings.federation
        for fault in backup.spread_revocations(self.directory, federation, patience_s=SPREAD_PATIENCE_S):
            self.log(backup.NOT_COPIED + fault, level=ERROR, event="revocations")

    def _publish(self, topic: str, payload: bytes, *, retain: bool) -> None:
        is_answer = not retain and topics.parse(topic).group == "down"
        if is_answer and self._answer_bytes > ANSWER_BYTES_MAX:
            self._unsent += 1  # the device asks again
            return
        publishing(topic)
        try:
            ticket = self._link.publish(topic, payload, retain=retain)
            if not self._topics:
                self._heard_at = time.monotonic()
            self._topics[ticket] = topic
            if is_answer:
                self._answers[ticket] = len(payload)
                self._answer_bytes += len(payload)
        except PacketTooLargeError:
            self._queue.put(events.Refused(topic=topic, reason="Packet too large"))
        except LinkError:
            return  # what matters is sent again at the next connection

    def _connect(self, action: events.Connect) -> None:
        reached("connect")
        try:
            self._link.connect(action.will_topic, action.will_payload)
        except LinkError as error:
            self._queue.put(events.ConnectFailed(reason=str(error)))
            if time.monotonic() - self._logged_at >= LOG_S:
                self._logged_at = time.monotonic()
                self.log(f"waiting for the broker: {error}", level=WARNING, event="waiting")

    def _poll(self) -> None:
        """See what commands have asked for since the last look."""
        change_count = self._ledger.change_count()
        if change_count == self._change_count:
            return
        self._change_count = change_count
        for request, what, argument in self._ledger.open_requests():
            event = control.event(self._ledger, what, argument, request)
            if isinstance(event, events.CountsRequested):
                event = replace(event, unacknowledged_s=self._unacknowledged_s)
            self._perform(self._core.handle(event, time.monotonic()))
