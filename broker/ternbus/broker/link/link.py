"""A persistent MQTT session: connect, publish, subscribe and acknowledge as calls, everything else as events."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from ternbus.broker.errors import ConfigError, LinkError
from ternbus.broker.link.connection import MQTT_5, MQTT_311, Connection, UnsupportedProtocolError, Will
from ternbus.broker.link.events import Arrived, Connected, Disconnected, LinkEvent, Published, Refused, Token
from ternbus.broker.link.tls import Tls
from ternbus.broker.protocol.endpoint import Endpoint
from ternbus.broker.protocol.frame import FRAME_BYTES, FRAME_BYTES_TAKEN

__all__ = [
    "Arrived", "Connected", "Disconnected", "Link", "LinkError", "LinkEvent", "PacketTooLargeError", "Published",
    "Refused", "Tls", "Token", "packet_bytes",
]  # fmt: skip

FILTERS_PER_PACKET: Final = 8
HELD_MAX: Final = 8  # messages
PASSING: Final = 32  # messages that are not held after one that was held for nothing
PACKET_RESERVE_BYTES: Final = 1024  # of a broker's maximum packet size, for the packet's header and topic
PACKET_BYTES_IN: Final = FRAME_BYTES_TAKEN + PACKET_RESERVE_BYTES  # unless own frames may be larger


class PacketTooLargeError(LinkError):
    """The publication needs a packet above the broker's maximum packet size."""


def packet_bytes(topic: str, payload_bytes: int, protocol: int) -> int:
    """The size on the wire of a QoS 1 PUBLISH packet without properties (MQTT 5.0 §3.3)."""
    remaining = 2 + len(topic.encode()) + 2 + (1 if protocol == MQTT_5 else 0) + payload_bytes
    return 1 + -(-remaining.bit_length() // 7) + remaining


class Link:
    """A persistent session with one broker. One thread may call its methods; another thread calls ``deliver``.

    ``deliver`` must only put the event into a queue.
    """

    def __init__(
        self,
        url: str,
        *,
        client_id: str,
        deliver: Callable[[LinkEvent], None],
        frame_bytes: int = FRAME_BYTES,
        receive_maximum: int = 64,
        qos_1_below: str | None = None,
        keepalive_s: int = 30,
        username: str | None = None,
        password: str | None = None,
        no_tls: bool = False,
        tls: Tls | None = None,
    ) -> None:
        """Check the arguments, without a connection; ConfigError for an invalid URL, keepalive or certificate.

        Messages of QoS 0 on topics that begin with ``qos_1_below`` are dropped unread and counted in ``dropped``: no
        receive maximum limits a flood of them. ``no_tls``: the password may be sent unencrypted.
        """
        self._endpoint = Endpoint.parse(url)
        if keepalive_s < 1:
            raise ConfigError(f"invalid keepalive of {keepalive_s} s: use at least 1 s")
        if password is not None:
            self._endpoint.check_password(no_tls=no_tls)
        if tls is not None and not self._endpoint.tls:
            raise ConfigError(f"certificates given for {self._endpoint}, a URL without TLS: use mqtts://")
        self._tls_context = (tls or Tls()).context() if self._endpoint.tls else None
        self._client_id = client_id
        self._deliver = deliver
        self.holds_s: Callable[[str], float] = lambda _: 0.0
        """How long a message on a topic may wait for others, to be delivered together with them."""
        self._held: list[Arrived] = []
        self._held_until_s = 0.0
        self._passing = 0  # messages that are not held
        self._frame_bytes = frame_bytes
        self._receive_maximum = receive_maximum
        self._qos_1_below = qos_1_below
        self._dropped_before = 0  # on earlier connections
        self._keepalive_s = keepalive_s
        self._username, self._password = username, password
        self._protocol = MQTT_5
        self._numbers = itertools.count(1)
        self._tickets = itertools.count(1)
        self._connection: Connection | None = None

    @property
    def connected(self) -> bool:
        """Whether there is a connection; a lost one may take up to a keepalive to be noticed."""
        return self._connection is not None and self._connection.alive

    @property
    def dropped(self) -> int:
        """How many messages came at QoS 0 where none should."""
        return self._dropped_before + (self._connection.dropped if self._connection is not None else 0)

    @property
    def outstanding(self) -> int:
        """The number of publications on this connection that the broker has not acknowledged."""
        return self._connection.outstanding if self._connection is not None else 0

    @property
    def protocol(self) -> int:
        """The version of MQTT on the last connection: 5, or 4 for 3.1.1."""
        return self._protocol

    @property
    def session_present(self) -> bool:
        """Whether the broker had a session of this client when it accepted this connection."""
        return self._connection is not None and self._connection.session_present

    @property
    def limits(self) -> Mapping[str, int]:
        """What the broker told of itself on this connection, by the names of MQTT 5's properties."""
        return self._connection.limits if self._connection is not None else {}

    def connect(self, will_topic: str, will_payload: bytes) -> Connected:
        """Connect with a retained last will, or raise LinkError, within 7 s (14 s if 3.1.1 is tried after MQTT 5).

        The returned ``Connected`` is also delivered, before any other event of the connection.
        """
        self.disconnect(flush_s=0.0)
        will = Will(topic=will_topic, payload=will_payload)
        try:
            connection = self._open(will)
        except UnsupportedProtocolError:
            if self._protocol == MQTT_311:
                raise
            connection = self._open(will, protocol=MQTT_311)
            self._protocol = MQTT_311
        most_bytes = connection.packet_bytes_max - PACKET_RESERVE_BYTES
        connected = Connected(
            session_present=connection.session_present,
            protocol=self._protocol,
            frame_bytes=min(self._frame_bytes, most_bytes),
            most_bytes=most_bytes,
        )
        self._connection = connection
        self._deliver(connected)
        connection.start()
        return connected

    def _open(self, will: Will, protocol: int | None = None) -> Connection:
        connection = Connection(
            self._endpoint,
            number=next(self._numbers),
            protocol=protocol or self._protocol,
            client_id=self._client_id,
            will=will,
            receive_maximum=self._receive_maximum,
            qos_1_below=self._qos_1_below,
            packet_bytes_in=max(PACKET_BYTES_IN, self._frame_bytes + PACKET_RESERVE_BYTES),
            keepalive_s=self._keepalive_s,
            deliver=self._take,
            tick=self._tick,
        )
        if self._username is not None:
            connection.client.username_pw_set(self._username, self._password)
        if self._tls_context is not None:
            connection.client.tls_set_context(self._tls_context)
        connection.open()
        return connection

    def _take(self, event: LinkEvent) -> None:
        """In the network thread: deliver an event, with what was held, unless it can wait itself."""
        if isinstance(event, Arrived):
            self._passing -= self._passing > 0
            can_hold = not self._passing and len(self._held) < HELD_MAX
            if can_hold and (wait_s := self.holds_s(event.topic)):
                self._held_until_s = self._held_until_s if self._held else time.monotonic() + wait_s
                self._held.append(event)
                return
        if not isinstance(event, Published):  # which nobody waits for
            self._let_go()
        self._deliver(event)

    def _tick(self) -> float:
        """In the network thread: deliver what was held for long enough; in how many seconds this is to be called."""
        left_s = self._held_until_s - time.monotonic() if self._held else math.inf
        if left_s > 0:
            return left_s
        self._passing = PASSING  # it was for nothing: little comes, or the broker waits for an acknowledgement
        self._let_go()
        return math.inf

    def _let_go(self) -> None:
        held, self._held = self._held, []
        for each in held:
            self._deliver(each)

    def subscribe(self, filters: Sequence[str]) -> None:
        """Subscribe with QoS 1; a refused subscription is logged and repeated. LinkError if not connected."""
        connection = self._alive()
        for start in range(0, len(filters), FILTERS_PER_PACKET):
            connection.subscribe(list(filters[start : start + FILTERS_PER_PACKET]))

    def unsubscribe(self, filters: Sequence[str]) -> None:
        """Unsubscribe. LinkError if not connected."""
        connection = self._alive()
        for start in range(0, len(filters), FILTERS_PER_PACKET):
            connection.unsubscribe(list(filters[start : start + FILTERS_PER_PACKET]))

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> int:
        """Queue a publication with QoS 1; return the ticket of its later ``Published`` or ``Refused`` event.

        LinkError if not connected. PacketTooLargeError for a packet above the broker's maximum: mosquitto would end
        the connection, at each attempt.
        """
        connection = self._alive()
        size_bytes = packet_bytes(topic, len(payload), self._protocol)
        if size_bytes > connection.packet_bytes_max:
            raise PacketTooLargeError(
                f"{topic} needs a packet of {size_bytes} bytes, but the broker at {self._endpoint} accepts "
                f"{connection.packet_bytes_max}: raise its maximum packet size"
            )
        ticket = next(self._tickets)
        connection.publish(ticket, topic, payload, retain)
        return ticket

    def acknowledge(self, tokens: Iterable[Token]) -> None:
        """Acknowledge messages, in order of arrival. A token of an older connection is ignored."""
        if self._connection is not None:
            number = self._connection.number
            self._connection.acknowledge([token for token in tokens if token.connection == number])

    def disconnect(self, flush_s: float = 5.0) -> None:
        """Wait at most ``flush_s`` for acknowledgements, then disconnect without a last will.

        No ``Disconnected`` and no later event is delivered.
        """
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close(flush_s)
            self._held = []  # they come again
            self._dropped_before += connection.dropped

    def abandon(self) -> None:
        """Close the connection without DISCONNECT: for a process that dies, so that the broker publishes its last will.

        Publications without an acknowledgement may be lost. No ``Disconnected`` and no later event is delivered.
        """
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abandon()
            self._held = []
            self._dropped_before += connection.dropped

    def _alive(self) -> Connection:
        if self._connection is None or not self._connection.alive:
            raise LinkError(f"not connected to {self._endpoint}")
        return self._connection
