"""The device's event loop: one thread that waits for events and performs the core's actions in order."""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Final

from ternbus.broker.crash_points import publishing, reached
from ternbus.broker.errors import LinkError, ProtocolError
from ternbus.broker.link import link
from ternbus.broker.link.link import Link, packet_bytes
from ternbus.broker.model_files import save_safetensors
from ternbus.broker.protocol import frame, topics
from ternbus.edge.core import events
from ternbus.edge.core.actions import (
    Action,
    Connect,
    Log,
    Publish,
    Save,
    SaveModel,
    StartEvaluation,
    StartFineTuning,
    StartStatistics,
    StartTraining,
    Stop,
    Subscribe,
    Unsubscribe,
)
from ternbus.edge.core.core import Core
from ternbus.edge.core.foreign_numbers import CLONED, cloned_counter
from ternbus.edge.learn.subnetwork import Narrowed
from ternbus.edge.learn.task import Trainer
from ternbus.edge.shell.worker import Worker
from ternbus.edge.store.outbox import Outbox

FLUSH_S: Final = 5.0
PERSONAL: Final = "personal.safetensors"
FAILED_TRAININGS: Final = "trainings.failed"
Report = Callable[[Log], None]
LinkMaker = Callable[[Callable[[link.LinkEvent], None]], Link]
_Happened = events.Event | link.LinkEvent


class Service:
    """Runs a core with a link, an outbox and a trainer until the core stops."""

    def __init__(
        self,
        core: Core,
        *,
        outbox: Outbox,
        make_link: LinkMaker,
        report: Report,
        trainer: Trainer | None = None,
        held: Trainer | None = None,
        narrowed: Narrowed | None = None,
        min_seconds: float = 0.0,
        personal: Path = Path(PERSONAL),
    ) -> None:
        """`held` has the held-out data, `narrowed` are sub-networks; `personal` is the file for the owner's model."""
        self._core = core
        self._outbox = outbox
        self._report = report
        self._personal = personal
        self._queue: SimpleQueue[_Happened] = SimpleQueue()
        self._link = make_link(self._queue.put)
        worker = None if trainer is None else Worker(trainer, self._queue.put, min_seconds, held, narrowed)
        self._worker = worker
        self._counters: Counter[str] = Counter(outbox.counters)
        self._tickets: dict[int, int] = {}  # the link's ticket of a publication -> its message's sequence number
        self._protocol = 5
        self._stop: Stop | None = None

    def request_stop(self, reason: str) -> None:
        """Stop after the event at hand. Signal handlers may call it: a SimpleQueue's put is reentrant."""
        self._queue.put(events.StopRequested(reason=reason))

    def run(self) -> Stop:
        """Run until the core stops.

        An exception is a fault of the disk or a bug: the state is on disk, and the broker publishes the last will.
        """
        try:
            self._handle(events.Started())
            while self._stop is None:
                self._take(self._next())
        except BaseException:
            self._link.abandon()
            raise
        self._link.disconnect(flush_s=FLUSH_S)
        reached("disconnected")
        self._outbox.save(self._core.state, None, self._counters)
        return self._stop

    def stop_training(self) -> bool:
        """Stop the training thread. Returns whether it has ended; if not, the caller must end the process."""
        return self._worker is None or self._worker.stop()

    def _next(self) -> _Happened:
        due = self._core.due_s()
        try:
            return self._queue.get(timeout=None if due is None else max(0.0, due - time.monotonic()))
        except Empty:
            return events.TimeReached()

    def _take(self, happened: _Happened) -> None:
        match happened:
            case link.Arrived():
                self._arrived(happened)
            case link.Connected():
                self._protocol = happened.protocol
                self._handle(events.Connected(frame_bytes=happened.frame_bytes))
            case link.Disconnected():
                self._tickets.clear()
                self._handle(events.Disconnected(reason=happened.reason))
            case link.Published():
                self._handle(events.Published(seq=self._tickets.pop(happened.ticket, 0)))
            case link.Refused():
                seq = self._tickets.pop(happened.ticket, 0)
                self._handle(events.Refused(seq=seq, reason=happened.reason))
            case events.TrainingFailed():
                self._counters[FAILED_TRAININGS] += 1
                self._handle(happened)
                self._outbox.save(self._core.state, None, self._counters)  # `ternbus lab run` counts them
            case _:
                self._handle(happened)

    def _arrived(self, message: link.Arrived) -> None:
        kind = _kind(message.topic)
        self._counters[f"received_bytes.{kind}"] += packet_bytes(message.topic, len(message.payload), self._protocol)
        self._counters[f"received.{kind}"] += 1
        if message.payload:  # an empty one clears a retained topic
            try:
                parsed = frame.parse(message.payload)
            except ProtocolError as error:
                self._handle(events.FrameMalformed(reason=error.reason))
            else:
                self._handle(events.FrameArrived(topic=message.topic, frame=parsed, retained=message.retained))
        reached("acknowledge")
        self._link.acknowledge(message.token)

    def _handle(self, event: events.Event) -> None:
        for action in self._core.handle(event, time.monotonic()):
            self._perform(action)

    def _perform(self, action: Action) -> None:
        match action:
            case Save():
                if action.answered is not None:
                    self._counters[f"updates.{action.answered.outcome}"] += 1
                reached("save")
                self._outbox.save(action.state, action.answered, self._counters, durable=action.durable)
                reached("saved")
            case Connect():
                self._connect(action)
            case Subscribe() | Unsubscribe() | Publish():
                self._use_link(action)
            case StartTraining() | StartEvaluation() | StartFineTuning() | StartStatistics():
                assert self._worker is not None  # noqa: S101 - the roles "join" and "export" start no job
                reached("start-job")
                self._worker.start(action)
            case SaveModel():
                reached("save-personal")
                save_safetensors(self._personal, action.tensors, action.metadata)
            case Stop():
                reached("stop")
                self._stop = action
            case Log():
                if action.event == CLONED:  # kept for `edge status`, which holds for a key
                    self._counters[cloned_counter(self._core.state.key)] += 1
                self._report(action)

    def _connect(self, action: Connect) -> None:
        reached("connect")
        try:
            self._link.connect(action.will_topic, action.will_payload)
        except LinkError as error:
            self._queue.put(events.ConnectFailed(reason=str(error)))

    def _use_link(self, action: Subscribe | Unsubscribe | Publish) -> None:
        """Send the action. Without a connection it is lost, as in the network: the link reports `Disconnected`."""
        try:
            match action:
                case Subscribe():
                    reached("subscribe")
                    self._link.subscribe(action.filters)
                case Unsubscribe():
                    self._link.unsubscribe(action.filters)
                case Publish():
                    self._publish(action)
        except LinkError:
            self._counters["unsent"] += 1

    def _publish(self, action: Publish) -> None:
        publishing(action.topic)
        ticket = self._link.publish(action.topic, action.payload, retain=action.retain)
        self._tickets[ticket] = action.seq
        kind = _kind(action.topic)
        self._counters[f"sent_bytes.{kind}"] += packet_bytes(action.topic, len(action.payload), self._protocol)
        self._counters[f"sent.{kind}"] += 1


def _kind(topic: str) -> str:
    try:
        return topics.parse(topic).kind
    except ProtocolError:
        return "other"
