"""An MQTT broker in memory: topics, retained messages, wills, sessions, and simulated network lines.

It implements the part of MQTT that the cores use, in virtual time: QoS 1 with persistent sessions. If a connection is
lost, uplink messages in flight are lost, and downlink messages in flight are delivered again.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count
from typing import Final, Protocol

from ternbus.broker.errors import ProtocolError
from ternbus.broker.link.link import packet_bytes
from ternbus.broker.protocol import topics
from ternbus.lab.virtual.clock import Clock

QUEUED_MAX: Final = 4000  # for a disconnected client; further messages are dropped, as by mosquitto
ROUND_TRIPS: Final = 2  # to connect: one for TCP, one for CONNECT and CONNACK
PROTOCOL: Final = 5
REQUEST_BYTES: Final = 8  # of a SUBSCRIBE or UNSUBSCRIBE packet without its filters


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """The network line of a client; ``latency_s`` is one way."""

    up_bits_s: float = math.inf
    down_bits_s: float = math.inf
    latency_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """The bytes of all devices' PUBLISH packets until a version was made, by kind of message."""

    update: int
    delta: int
    snapshot: int


class Client(Protocol):
    """The callbacks of a session's client."""

    def connected(self) -> None: ...
    def disconnected(self, reason: str) -> None: ...
    def arrived(self, topic: str, payload: bytes, *, retained: bool) -> None: ...
    def acknowledged(self, seq: int) -> None: ...


class MemoryBroker:
    """Routes messages between sessions. ``stop`` is a crash that keeps retained and queued messages, but no wills."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.is_up = True
        self.retained: dict[str, bytes] = {}
        self._subscribers: dict[str, dict[Session, None]] = {}  # by filter
        self._patterns: dict[str, None] = {}  # filters with +, which a lookup by topic does not find
        self._sessions: list[Session] = []

    def session(self, client: Client, line: Line) -> "Session":
        """A new session."""
        session = Session(self, client, line)
        self._sessions.append(session)
        return session

    def stop(self) -> None:
        self.is_up = False
        for session in self._sessions:
            session.lose("the broker was stopped")

    def start(self) -> None:
        self.is_up = True

    def route(self, topic: str, payload: bytes, *, retain: bool) -> None:
        """Deliver a message once to every session with a matching subscription."""
        if retain and payload:
            self.retained[topic] = payload
        elif retain:
            self.retained.pop(topic, None)
        for session in self._wanting(topic):
            session.deliver(topic, payload, retained=False)

    def subscribe(self, session: "Session", filters: Iterable[str]) -> None:
        for pattern in filters:
            self._subscribers.setdefault(pattern, {})[session] = None
            if "+" in pattern:
                self._patterns[pattern] = None
            for topic in self._retained_under(pattern):
                session.deliver(topic, self.retained[topic], retained=True)

    def unsubscribe(self, session: "Session", filters: Iterable[str]) -> None:
        for pattern in filters:
            sessions = self._subscribers.get(pattern, {})
            sessions.pop(session, None)
            if not sessions:
                self._subscribers.pop(pattern, None)
                self._patterns.pop(pattern, None)

    def _wanting(self, topic: str) -> dict["Session", None]:
        levels = topic.split("/")
        filters = [topic, *("/".join([*levels[:depth], "#"]) for depth in range(len(levels) + 1))]
        filters += [pattern for pattern in self._patterns if matches(pattern, topic)]
        found = [self._subscribers[each] for each in filters if each in self._subscribers]
        if len(found) == 1:
            return dict(found[0])  # a copy, because a client may unsubscribe during delivery
        return {session: None for sessions in found for session in sessions}

    def _retained_under(self, pattern: str) -> list[str]:
        if "+" in pattern or pattern.endswith("#"):
            return [topic for topic in self.retained if matches(pattern, topic)]
        return [pattern] if pattern in self.retained else []


class Session:
    """The persistent session of one client: subscriptions and undelivered messages are kept over connections.

    ``sent`` and ``carried`` count the bytes of PUBLISH packets by kind, uplink and downlink, when they are sent.
    """

    def __init__(self, broker: MemoryBroker, client: Client, line: Line) -> None:
        self.sent: Counter[str] = Counter()
        self.carried: Counter[str] = Counter()
        self._broker = broker
        self._clock = broker.clock
        self._client = client
        self._line = line
        self._connection = 0  # events of an earlier connection are void
        self._online = False
        self._will = ("", b"")
        self._free_at = [0.0, 0.0]  # when uplink and downlink have sent all earlier packets
        self._numbers = count()
        self._waiting: dict[int, tuple[str, bytes, bool]] = {}  # undelivered messages, in order; whether retained

    def connect(self, will_topic: str, will_payload: bytes) -> None:
        """Begin to connect; the result is a call of `connected` or `disconnected`."""
        self._connection += 1
        self._will = (will_topic, will_payload)
        when = self._clock.now + 2 * ROUND_TRIPS * self._line.latency_s
        self._clock.at(when, partial(self._answered, self._connection))

    def subscribe(self, filters: Iterable[str]) -> None:
        wanted = tuple(filters)
        self._send(_request_bytes(wanted), partial(self._broker.subscribe, self, wanted))

    def unsubscribe(self, filters: Iterable[str]) -> None:
        unwanted = tuple(filters)
        self._send(_request_bytes(unwanted), partial(self._broker.unsubscribe, self, unwanted))

    def publish(self, topic: str, payload: bytes, *, retain: bool = False, seq: int = 0) -> None:
        """QoS 1; ``seq`` comes back with the acknowledgement."""
        if self._online:
            size_bytes = packet_bytes(topic, len(payload), PROTOCOL)
            self.sent[_kind(topic)] += size_bytes
            self._send(size_bytes, partial(self._published, topic, payload, retain, seq))

    def disconnect(self) -> None:
        """Disconnect without a will, after earlier packets have arrived."""
        self._send(0, self._left)

    def cut(self) -> None:
        """End the connection after a crash of the client; the broker publishes the will."""
        was_online = self._online
        self._left()
        if was_online:
            topic, payload = self._will
            self._broker.route(topic, payload, retain=True)

    def lose(self, reason: str) -> None:
        """End the connection after a crash of the broker."""
        if self._online:
            self._left()
            self._client.disconnected(reason)

    def deliver(self, topic: str, payload: bytes, *, retained: bool) -> None:
        """Send the client a message now, or after it has reconnected; ``retained`` is what a subscription asked for."""
        if not self._online and len(self._waiting) >= QUEUED_MAX:
            return
        number = next(self._numbers)
        self._waiting[number] = (topic, payload, retained)
        if self._online:
            self._transmit(number)

    def _answered(self, connection: int) -> None:
        if connection != self._connection:
            return
        if not self._broker.is_up:
            self._client.disconnected("the broker does not answer")
            return
        self._online = True
        self._free_at = [self._clock.now, self._clock.now]
        queued = list(self._waiting)
        self._client.connected()
        for number in queued:
            self._transmit(number)

    def _left(self) -> None:
        self._online = False
        self._connection += 1

    def _send(self, size_bytes: int, do: Callable[[], None]) -> None:
        """Call ``do`` when ``size_bytes`` have reached the broker, if the connection lasts until then."""
        if self._online:
            when = self._through(0, size_bytes, self._line.up_bits_s)
            self._clock.at(when, partial(self._if_connected, self._connection, do))

    def _transmit(self, number: int) -> None:
        topic, payload, _ = self._waiting[number]
        size_bytes = packet_bytes(topic, len(payload), PROTOCOL)
        self.carried[_kind(topic)] += size_bytes
        when = self._through(1, size_bytes, self._line.down_bits_s)
        self._clock.at(when, partial(self._if_connected, self._connection, partial(self._arrived, number)))

    def _through(self, way: int, size_bytes: int, bits_s: float) -> float:
        """The time when the last byte arrives at the other end, after all earlier packets."""
        self._free_at[way] = max(self._clock.now, self._free_at[way]) + 8 * size_bytes / bits_s
        return self._free_at[way] + self._line.latency_s

    def _if_connected(self, connection: int, do: Callable[[], None]) -> None:
        if connection == self._connection:
            do()

    def _arrived(self, number: int) -> None:
        topic, payload, retained = self._waiting.pop(number)
        self._client.arrived(topic, payload, retained=retained)

    def _published(self, topic: str, payload: bytes, retain: bool, seq: int) -> None:
        self._broker.route(topic, payload, retain=retain)
        acknowledge = partial(self._client.acknowledged, seq)
        when = self._clock.now + self._line.latency_s
        self._clock.at(when, partial(self._if_connected, self._connection, acknowledge))


def matches(pattern: str, topic: str) -> bool:
    """Whether the topic filter ``pattern`` matches ``topic`` (MQTT 5.0 §4.7)."""
    wanted, levels = pattern.split("/"), topic.split("/")
    if wanted[-1] == "#":
        wanted.pop()
        if len(levels) < len(wanted):
            return False
        levels = levels[: len(wanted)]
    return len(wanted) == len(levels) and all(each in {"+", level} for each, level in zip(wanted, levels, strict=True))


@lru_cache(maxsize=65_536)
def _kind(topic: str) -> str:
    try:
        return topics.parse(topic).kind
    except ProtocolError:
        return "other"


def _request_bytes(filters: Iterable[str]) -> int:
    return REQUEST_BYTES + sum(3 + len(each) for each in filters)
