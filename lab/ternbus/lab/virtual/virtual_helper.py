"""The simulated helper of private sums: the real core in virtual time, with an unlimited line to the broker."""

from collections.abc import Callable
from typing import assert_never

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import frame
from ternbus.helper.core import events
from ternbus.helper.core.actions import Action, Connect, Log, Note, Publish, Save, Stop, Subscribe
from ternbus.helper.core.core import Core
from ternbus.helper.core.profile import Profile
from ternbus.helper.core.records import MemoryRecords
from ternbus.helper.core.state import State
from ternbus.lab.virtual.clock import Alarm, Clock
from ternbus.lab.virtual.memory_broker import Line, MemoryBroker


class VirtualHelper:
    """Performs the actions of a core. Its database is in memory and is kept over `kill`.

    ``left`` is called when the helper stops.
    """

    def __init__(self, clock: Clock, broker: MemoryBroker, profile: Profile, left: Callable[[Stop], None]) -> None:
        self.state = State.new(profile.random, clock.now)
        self.records = MemoryRecords(roster=profile.roster)
        self._clock = clock
        self._profile = profile
        self._left = left
        self._session = broker.session(self, Line())
        self.core, self._alarm = self._begin()

    @property
    def name(self) -> str:
        return self._profile.helper

    def start(self) -> None:
        self._handle(events.Started(unix_s=self._clock.now))

    def kill(self) -> None:
        """Simulate SIGKILL: state that is not in the database is lost."""
        self._alarm.off()
        self._session.cut()

    def restart(self) -> None:
        self.core, self._alarm = self._begin()
        self.start()

    # callbacks of the session

    def connected(self) -> None:
        self._handle(events.Connected(frame_bytes=frame.FRAME_BYTES))

    def disconnected(self, reason: str) -> None:
        self._handle(events.Disconnected(reason=reason))

    def arrived(self, topic: str, payload: bytes, *, retained: bool) -> None:  # noqa: ARG002 - signature of the callback
        if not payload:  # the removal of a retained message
            return
        try:
            parsed = frame.parse(payload)
        except ProtocolError as error:
            self._handle(events.FrameMalformed(reason=error.reason))
        else:
            self._handle(events.FrameArrived(topic=topic, frame=parsed))

    def acknowledged(self, seq: int) -> None:
        """Ignored: a helper does not wait for acknowledgements."""

    def _begin(self) -> tuple[Core, Alarm]:
        core = Core(self._profile, self.state, self.records)
        return core, Alarm(self._clock, core.due_s, self._wake)

    def _wake(self) -> None:
        self._handle(events.TimeReached(unix_s=self._clock.now))

    def _handle(self, event: events.Event) -> None:
        for action in self.core.handle(event, self._clock.now):
            self._perform(action)
        self._alarm.look()

    def _perform(self, action: Action) -> None:
        match action:
            case Save():
                self.state = action.state
                if action.step is not None:
                    self.records.write(action.step)
            case Connect():
                self._session.connect(action.will_topic, action.will_payload)
            case Subscribe():
                self._session.subscribe(action.filters)
            case Publish():
                self._session.publish(action.topic, action.payload, retain=action.retain, seq=action.seq)
            case Stop():
                self._session.disconnect()
                self._left(action)
            case Note() | Log():
                return
            case _:
                assert_never(action)
