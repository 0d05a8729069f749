"""The device's event loop: one thread that waits for events and performs the core's actions in order."""

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
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
from ternbus.edge.core.state import AnsweredUpdate
from ternbus.edge.learn.subnetwork import Narrowed
from ternbus.edge.learn.task import Trainer
from ternbus.edge.shell.worker import Worker
from ternbus.edge.store.outbox import Outbox

FLUSH_S: Final = 5.0
SAVE_WITHIN_S: Final = 1.0  # a head, which a peer would tell again
# until the broker's acknowledgements are handled, if nothing else happens before: after a publication, and where the
# broker acknowledges nothing for long, for each time that they were looked for in vain twice as long
ACKNOWLEDGED_WITHIN_S: Final = 0.1
ACKNOWLEDGED_WITHIN_MAX_S: Final = 5.0
AT_ONCE: Final = 64  # events
PERSONAL: Final = "personal.safetensors"
FAILED_TRAININGS: Final = "trainings.failed"
Report = Callable[[Log], None]
LinkMaker = Callable[[Callable[[link.LinkEvent], None]], Link]
_Happened = events.Event | link.Connected | link.Disconnected | link.Arrived | link.Refused


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
        limits_frames: bool = False,
    ) -> None:
        """`held` has the held-out data, `narrowed` are sub-networks; `personal` is the file for the owner's model.

        `limits_frames`: the owner has set the largest frame, which a head does not raise.
        """
        self._core = core
        self._outbox = outbox
        self._report = report
        self._personal, self._limits_frames = personal, limits_frames
        self._queue: SimpleQueue[_Happened] = SimpleQueue()
        self._unhandled: deque[None] = deque([None])  # as many as there are events to deal with; `Started` is one
        self._acknowledged: deque[link.Published] = deque()  # they wait for other events, as nothing is urgent in them
        self._link = make_link(self._deliver)
        self._link.holds_s = self._holds_s
        worker = None if trainer is None else Worker(trainer, self._put, min_seconds, held, narrowed)
        self._worker = worker
        self._counters: Counter[str] = Counter(outbox.counters)
        self._tickets: dict[int, int] = {}  # the link's ticket of a publication -> its message's sequence number
        self._patience_s = ACKNOWLEDGED_WITHIN_S  # until acknowledgements are looked for
        self._following: _Happened | None = None  # taken out of the queue already
        self._save_due_s: float | None = None  # when the core's state is saved, if no other save comes before
        self._protocol = 5
        self._stop: Stop | None = None

    def request_stop(self, reason: str) -> None:
        """Stop after the event at hand. Signal handlers may call it: `_put` is reentrant."""
        self._put(events.StopRequested(reason=reason))

    def run(self) -> Stop:
        """Run until the core stops.

        An exception is a fault of the disk or a bug: what nobody would tell again is on disk, and the broker publishes
        the last will.
        """
        try:
            self._handle(events.Started())
            self._unhandled.popleft()
            while self._stop is None:
                happened = self._next()
                self._take(happened)
                if self._save_due_s is not None and time.monotonic() >= self._save_due_s:
                    self._save(durable=False)
                for _ in happened:
                    self._unhandled.popleft()
        except BaseException:
            self._link.abandon()
            raise
        if self._save_due_s is not None:
            self._save(durable=False)
        self._link.disconnect(flush_s=FLUSH_S)
        reached("disconnected")
        self._save()
        return self._stop

    def stop_training(self) -> bool:
        """Stop the training thread. Returns whether it has ended; if not, the caller must end the process."""
        return self._worker is None or self._worker.stop()

    def _deliver(self, event: link.LinkEvent) -> None:
        """Called in the network thread: put the event where `_next` looks."""
        if isinstance(event, link.Published):
            self._acknowledged.append(event)
        else:
            self._put(event)

    def _put(self, event: _Happened) -> None:
        self._unhandled.append(None)
        self._queue.put(event)

    def _holds_s(self, topic: str) -> float:
        """Called in the network thread: how long a message may wait for others, so that the core's thread wakes less.

        Only while that waits itself: what it is about to take in may change what it needs. The queue does not tell of
        that: from Python 3.13 on it is empty before the thread that waited for it has woken up.
        """
        if self._unhandled:
            return 0.0
        is_occupied = self._core.training.is_occupied(self._core.state)
        return self._core.follower.can_wait_s(topic, is_occupied=is_occupied)

    def _next(self) -> list[_Happened]:
        """What has happened: one event, or several messages that wait already."""
        found = [self._following or self._wait()]
        self._following = None
        while isinstance(found[-1], link.Arrived) and len(found) < AT_ONCE and not self._queue.empty():
            found.append(self._queue.get())  # no other thread takes any
        if len(found) > 1 and not isinstance(found[-1], link.Arrived):
            self._following = found.pop()
        return found

    def _wait(self) -> _Happened:
        now = time.monotonic()
        due = [self._core.due_s(), self._save_due_s, now + self._patience_s if self._tickets else None]
        times = [each for each in due if each is not None]
        try:
            return self._queue.get(timeout=max(0.0, min(times) - now) if times else None)
        except Empty:
            self._patience_s = min(2 * self._patience_s, ACKNOWLEDGED_WITHIN_MAX_S)
            self._unhandled.append(None)
            return events.TimeReached()

    def _take(self, happened: Sequence[_Happened]) -> None:
        while self._acknowledged:
            seq = self._tickets.pop(self._acknowledged.popleft().ticket, 0)
            self._core.take(events.Published(seq=seq), time.monotonic())
        match happened[0]:
            case link.Arrived():
                self._take_messages([each for each in happened if isinstance(each, link.Arrived)])
            case link.Connected() as connected:
                self._protocol = connected.protocol
                most_bytes = connected.frame_bytes if self._limits_frames else connected.most_bytes
                self._handle(events.Connected(frame_bytes=connected.frame_bytes, most_bytes=most_bytes))
            case link.Disconnected(reason=reason):
                self._tickets.clear()
                self._handle(events.Disconnected(reason=reason))
            case link.Refused(ticket=ticket, reason=reason):
                self._handle(events.Refused(seq=self._tickets.pop(ticket, 0), reason=reason))
            case events.TrainingFailed() as failed:
                self._counters[FAILED_TRAININGS] += 1
                self._handle(failed)
                self._save()  # `ternbus lab run` counts them
            case event:
                self._handle(event)

    def _take_messages(self, messages: Sequence[link.Arrived]) -> None:
        """Take messages in, until the core stops; then perform what follows from all, and acknowledge them."""
        now, tokens = time.monotonic(), list[link.Token]()
        for message in messages:
            tokens.append(message.token)
            if (event := self._received(message)) is not None:
                self._core.take(event, now)
            if self._core.stopped:
                break
        self._perform_all(self._core.proceed(now))
        reached("acknowledge")
        self._link.acknowledge(tokens)

    def _received(self, message: link.Arrived) -> events.FrameArrived | events.FrameMalformed | None:
        """Count a message; its event, unless it is an empty one, which clears a retained topic."""
        kind = _kind(message.topic)
        self._counters[f"received_bytes.{kind}"] += packet_bytes(message.topic, len(message.payload), self._protocol)
        self._counters[f"received.{kind}"] += 1
        if not message.payload:
            return None
        try:
            parsed = frame.parse(message.payload)
        except ProtocolError as error:
            return events.FrameMalformed(reason=error.reason)
        return events.FrameArrived(topic=message.topic, frame=parsed, retained=message.retained)

    def _handle(self, event: events.Event) -> None:
        self._perform_all(self._core.handle(event, time.monotonic()))

    def _perform_all(self, actions: Sequence[Action]) -> None:
        for action in actions:
            self._perform(action)

    def _save(self, answered: AnsweredUpdate | None = None, *, durable: bool = True) -> None:
        """Save the core's state, with all that was put off."""
        reached("save")
        self._outbox.save(self._core.state, answered, self._counters, durable=durable)
        self._save_due_s = None
        reached("saved")

    def _perform(self, action: Action) -> None:
        match action:
            case Save():
                if action.answered is not None:
                    self._counters[f"updates.{action.answered.outcome}"] += 1
                if action.durable or action.answered is not None:
                    self._save(action.answered, durable=action.durable)
                elif self._save_due_s is None:
                    self._save_due_s = time.monotonic() + SAVE_WITHIN_S
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
            self._put(events.ConnectFailed(reason=str(error)))

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
        self._tickets[ticket], self._patience_s = action.seq, ACKNOWLEDGED_WITHIN_S
        kind = _kind(action.topic)
        self._counters[f"sent_bytes.{kind}"] += packet_bytes(action.topic, len(action.payload), self._protocol)
        self._counters[f"sent.{kind}"] += 1


def _kind(topic: str) -> str:
    try:
        return topics.parse(topic).kind
    except ProtocolError:
        return "other"
