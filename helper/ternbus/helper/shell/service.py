"""The helper's event loop: one thread that waits for events and performs the core's actions in order."""

import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Final

from ternbus.broker.crash_points import publishing, reached
from ternbus.broker.errors import LinkError, ProtocolError
from ternbus.broker.link import link
from ternbus.broker.link.link import Link
from ternbus.broker.protocol import frame
from ternbus.helper.core import events
from ternbus.helper.core.actions import Action, Connect, Log, Note, Publish, Save, Stop, Subscribe
from ternbus.helper.core.core import Core
from ternbus.helper.store.store import HelperStore

FLUSH_S: Final = 5.0
LinkMaker = Callable[[Callable[[link.LinkEvent], None]], Link]
_Happened = events.Event | link.LinkEvent


class Service:
    """Runs a core with a link and a store until the core stops."""

    def __init__(
        self,
        core: Core,
        *,
        store: HelperStore,
        make_link: LinkMaker,
        report: Callable[[Log], None],
        enrolled: Callable[[], None],
    ) -> None:
        """``enrolled`` is called when the enrollment is on disk."""
        self._core = core
        self._store = store
        self._report = report
        self._enrolled = enrolled
        self._queue: SimpleQueue[_Happened] = SimpleQueue()
        self._link = make_link(self._queue.put)
        self._seqs: dict[int, int] = {}  # the link's ticket of a publication -> its message's sequence number
        self._stop: Stop | None = None

    def request_stop(self, reason: str) -> None:
        """Stop after the event at hand. Signal handlers may call it: a SimpleQueue's put is reentrant."""
        self._queue.put(events.StopRequested(reason=reason))

    def run(self) -> Stop:
        """Run until the core stops. An exception is a fault of the disk or a bug: what was answered is on disk."""
        try:
            self._handle(events.Started(unix_s=time.time()))
            while self._stop is None:
                self._take(self._next())
        except BaseException:
            self._link.abandon()
            raise
        self._link.disconnect(flush_s=FLUSH_S)
        return self._stop

    def _next(self) -> _Happened:
        due = self._core.due_s()
        try:
            return self._queue.get(timeout=None if due is None else max(0.0, due - time.monotonic()))
        except Empty:
            return events.TimeReached(unix_s=time.time())

    def _take(self, happened: _Happened) -> None:
        match happened:
            case link.Arrived():
                self._arrived(happened)
            case link.Connected():
                self._handle(events.Connected(frame_bytes=happened.frame_bytes))
            case link.Disconnected():
                self._seqs.clear()
                self._handle(events.Disconnected(reason=happened.reason))
            case link.Published():
                self._seqs.pop(happened.ticket, None)
            case link.Refused():
                self._handle(events.Refused(seq=self._seqs.pop(happened.ticket, 0), reason=happened.reason))
            case _:
                self._handle(happened)

    def _arrived(self, message: link.Arrived) -> None:
        if message.payload:  # an empty one clears a retained topic
            try:
                parsed = frame.parse(message.payload)
            except ProtocolError as error:
                self._handle(events.FrameMalformed(reason=error.reason))
            else:
                self._handle(events.FrameArrived(topic=message.topic, frame=parsed))
        reached("acknowledge")
        self._link.acknowledge([message.token])

    def _handle(self, event: events.Event) -> None:
        for action in self._core.handle(event, time.monotonic()):
            self._perform(action)

    def _perform(self, action: Action) -> None:
        match action:
            case Save():
                self._save(action)
            case Connect():
                self._connect(action)
            case Subscribe() | Publish():
                self._use_link(action)
            case Note():
                self._store.note(action)
            case Stop():
                reached("stop")
                self._stop = action
            case Log():
                self._report(action)

    def _save(self, action: Save) -> None:
        before = self._store.state
        reached("save")
        self._store.save(action.state, action.step)
        reached("saved")
        if action.state.enrolled and before is not None and not before.enrolled:
            self._enrolled()

    def _connect(self, action: Connect) -> None:
        reached("connect")
        try:
            self._link.connect(action.will_topic, action.will_payload)
        except LinkError as error:
            self._queue.put(events.ConnectFailed(reason=str(error)))

    def _use_link(self, action: Subscribe | Publish) -> None:
        """Send the action. Without a connection it is lost, as in the network: the link reports `Disconnected`."""
        try:
            if isinstance(action, Subscribe):
                reached("subscribe")
                self._link.subscribe(action.filters)
            else:
                publishing(action.topic)
                ticket = self._link.publish(action.topic, action.payload, retain=action.retain)
                self._seqs[ticket] = action.seq
        except LinkError:
            return
