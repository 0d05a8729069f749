"""One MQTT connection to a broker; with ``client``, the only module that imports paho.

Each connection has one network thread. Only this thread calls paho and delivers events; other threads pass commands
through queues. So no thread waits for paho's locks, and one place limits the unacknowledged data: to what the broker
accepts, and to what the uplink carries well within a keepalive. Each connection has a new paho client: paho's resend
queue does not outlive a connection, because the protocol itself resends.
"""

import logging
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from selectors import EVENT_READ, EVENT_WRITE, DefaultSelector
from typing import Any, Final

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from ternbus.broker.errors import LinkError
from ternbus.broker.link import connect_errors
from ternbus.broker.link.client import BoundedClient
from ternbus.broker.link.events import Arrived, Disconnected, LinkEvent, Published, Refused, Token
from ternbus.broker.link.window import MESSAGES_MAX, Backlog, Window
from ternbus.broker.protocol.endpoint import Endpoint
from ternbus.broker.protocol.frame import FRAME_BYTES, FRAME_BYTES_RANGE

MQTT_5: Final = int(MQTTProtocolVersion.MQTTv5)
MQTT_311: Final = int(MQTTProtocolVersion.MQTTv311)
CONNECT_TIMEOUT_S: Final = 5.0
DISCONNECT_S: Final = 1.0  # to send DISCONNECT through a full socket
ASK_AGAIN_S: Final = 10.0  # until a refused subscription is repeated
SESSION_EXPIRY_S: Final = 7 * 24 * 3600
PACKET_BYTES_OUT: Final = 256 << 20  # the maximum of MQTT
PACKET_BYTES_MIN: Final = FRAME_BYTES_RANGE[0] + 1024  # a broker with a smaller limit accepts no part of a message
UNSUPPORTED_PROTOCOL: Final = 132
KEEPALIVE_TIMEOUT: Final = 141
SESSION_TAKEN_OVER: Final = 142
WAKE: Final = b"\0"
PACKETS_AT_ONCE: Final = 16

_log = logging.getLogger(__name__)


class UnsupportedProtocolError(LinkError):
    """The broker does not support this version of MQTT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Will:
    """The last will: the broker publishes it, retained, if the connection is lost."""

    topic: str
    payload: bytes


class Connection:
    """One connection: ``open``, then ``start``, then ``close``. ``Disconnected`` reports an end without ``close``."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        number: int,
        protocol: int,
        client_id: str,
        will: Will,
        receive_maximum: int,
        packet_bytes_in: int,
        qos_1_below: str | None,
        keepalive_s: int,
        deliver: Callable[[LinkEvent], None],
        tick: Callable[[], float],
    ) -> None:
        self.number = number
        self.alive = False
        self.session_present = False
        self.limits: Mapping[str, int] = {}  # what the broker told of itself, by MQTT 5's names
        self.packet_bytes_max = PACKET_BYTES_OUT
        # the receive maximum of messages, of the default frame size
        self._backlog = Backlog(messages_max=receive_maximum, bytes_max=receive_maximum * FRAME_BYTES)
        self.client = BoundedClient(client_id, protocol, self._backlog, packet_bytes_in)
        self.client.will_set(will.topic, will.payload, qos=1, retain=True)
        self._endpoint = endpoint
        self._protocol = protocol
        self._client_id = client_id
        self._receive_maximum = receive_maximum
        self._packet_bytes_in = packet_bytes_in
        self._qos_1_below = qos_1_below
        self.dropped = 0  # messages of QoS 0 on such topics
        self._keepalive_s = keepalive_s
        self._deliver, self._tick = deliver, tick
        self._happened: list[LinkEvent] = []  # while packets are read
        self._answer: ReasonCode | None = None
        self._reason = "the connection to the broker was lost"
        self._retains = True  # unless the broker says otherwise, which only MQTT 5 can
        self._leaving = self._closing = self._aborting = self._woken = False
        self._commands: deque[Callable[[], object]] = deque()
        self._waiting: deque[tuple[int, str, bytes, bool]] = deque()
        self._events = 0  # the events of the socket that the selector waits for
        self._window = Window(patience_s=keepalive_s / 4)
        self._filters: dict[int, list[str]] = {}  # unacknowledged subscriptions, by mid
        self._refused: deque[tuple[float, list[str]]] = deque()  # (time of the next attempt, refused subscriptions)
        self._issued = self._settled = self._refusals = 0  # each is written by one thread only, so no lock is needed
        self._idle = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"link to {endpoint}", daemon=True)
        self._selector = DefaultSelector()
        self._wake_receiver, self._wake_sender = socket.socketpair()

    @property
    def outstanding(self) -> int:
        """The number of publications that the broker has not acknowledged."""
        return self._issued - self._settled

    def open(self) -> None:
        """Connect and wait for CONNACK; LinkError if the broker does not accept the connection."""
        self._listen()
        try:
            self._handshake(time.monotonic() + CONNECT_TIMEOUT_S)
            self.alive = True
        except OSError as error:
            raise LinkError(connect_errors.explain(self._endpoint, error)) from error
        finally:
            if not self.alive:
                self._release()

    def start(self) -> None:
        """Start the network thread, which delivers events."""
        self._thread.start()

    def subscribe(self, filters: list[str]) -> None:
        self._command(lambda: self._subscribe(filters))

    def unsubscribe(self, filters: list[str]) -> None:
        self._command(lambda: self._unsubscribe(filters))

    def acknowledge(self, tokens: Sequence[Token]) -> None:
        if tokens:
            self._command(lambda: self._acknowledge(tokens))

    def publish(self, ticket: int, topic: str, payload: bytes, retain: bool) -> None:
        self._issued += 1
        self._waiting.append((ticket, topic, payload, retain))
        self._wake()

    def close(self, flush_s: float) -> None:
        """Wait at most ``flush_s`` for acknowledgements, then disconnect; no message that arrives now is delivered."""
        self._leaving = True
        self._command(self._backlog.lift)  # unread messages may precede the acknowledgements
        with self._idle:
            self._idle.wait_for(lambda: not self.outstanding or not self.alive, flush_s)
        self._closing = True
        self._command(self.client.disconnect)
        self._thread.join(DISCONNECT_S)
        self.abandon()

    def abandon(self) -> None:
        """Close the connection without DISCONNECT, so that the broker publishes the last will; deliver nothing more."""
        self._leaving = self._closing = self._aborting = True
        self._wake()
        self._thread.join()

    def _command(self, command: Callable[[], object]) -> None:
        self._commands.append(command)
        self._wake()

    def _wake(self) -> None:
        if not self._woken:  # otherwise a byte is in the socket already, and the thread will look at the queues
            self._woken = True
            with suppress(OSError):  # the network thread has ended
                self._wake_sender.send(WAKE)

    def _listen(self) -> None:
        self.client.on_connect = self._on_connect
        self.client.on_disconnect = self._on_disconnect
        self.client.on_message = self._on_message
        self.client.on_publish = self._on_publish
        self.client.on_subscribe = self._on_subscribe

    def _handshake(self, deadline: float) -> None:
        options: dict[str, Any] = {}
        if self._protocol == MQTT_5:
            properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
            properties.SessionExpiryInterval = SESSION_EXPIRY_S
            properties.ReceiveMaximum = self._receive_maximum
            properties.MaximumPacketSize = self._packet_bytes_in
            options = {"clean_start": False, "properties": properties}
        self.client.connect(self._endpoint.host, self._endpoint.port, self._keepalive_s, **options)
        sock = self.client.socket()
        if isinstance(sock, socket.socket):
            _prepare(sock, self._keepalive_s)
            self._selector.register(self._wake_receiver, EVENT_READ)
        while self._answer is None and self.client.socket() is not None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise LinkError(connect_errors.silent(self._endpoint))
            self._turn(left_s)
        if self._answer is None:
            raise connect_errors.UnansweredError(connect_errors.closed(self._endpoint))
        if self._answer.value == UNSUPPORTED_PROTOCOL:
            # nats-server answers MQTT 5 with return code 1 of 3.1.1, which paho translates to reason code 132 of MQTT 5
            raise UnsupportedProtocolError(f"the broker at {self._endpoint} supports neither MQTT 5 nor 3.1.1")
        if self._answer.is_failure:
            code = self._answer
            raise LinkError(connect_errors.refused(self._endpoint, self._client_id, code.value, code.getName()))
        if not self._retains:
            raise LinkError(connect_errors.no_retain(self._endpoint))
        if self.packet_bytes_max < PACKET_BYTES_MIN:
            raise LinkError(
                f"the broker at {self._endpoint} accepts packets of at most {self.packet_bytes_max} bytes, Ternbus "
                f"needs {PACKET_BYTES_MIN}: raise its maximum packet size"
            )

    def _run(self) -> None:
        try:
            while self.client.socket() is not None and not self._aborting:
                self._ask_again(time.monotonic())
                self._feed()
                self._turn(min(self._keepalive_s / 4, self._tick()))
        finally:  # also after an exception, which would be a bug: otherwise the service would wait for ever
            self.alive = False
            self._release()
            with self._idle:
                self._idle.notify_all()
            self._hand_over()
            if not self._closing:
                self._deliver(Disconnected(reason=self._reason))

    def _feed(self) -> None:
        while self._commands:
            self._commands.popleft()()
        while self._waiting and self._window.is_open and self.client.socket() is not None:
            ticket, topic, payload, retain = self._waiting.popleft()
            mid = self.client.publish(topic, payload, qos=1, retain=retain).mid
            self._window.sent(mid, ticket=ticket, size_bytes=len(payload), now=time.monotonic())

    def _turn(self, timeout_s: float) -> None:
        """Wait for the socket or a wake-up; read a packet, write pending data, check the keepalive."""
        sock = self.client.socket()
        if sock is None:
            return
        self._watch(sock)
        # the selector does not see data that were read ahead, or that TLS has already decrypted
        is_here = self.client.has_more or (isinstance(sock, ssl.SSLSocket) and sock.pending() > 0)
        is_here = is_here and not self.client.is_paused
        for key, ready in self._selector.select(0 if is_here else timeout_s):
            if key.fileobj is self._wake_receiver:
                self._wake_receiver.recv(len(WAKE))
                self._woken = False
                continue
            if ready & EVENT_READ:
                self._read()
            if ready & EVENT_WRITE:
                self.client.loop_write()
        if is_here:
            self._read()
        self.client.loop_misc()

    def _read(self) -> None:
        """Read while packets come, a few: other work must not wait for long, nor any message precede the welcome."""
        for _ in range(PACKETS_AT_ONCE if self.alive else 1):
            before = self.client.packets
            self.client.loop_read()
            if self.client.packets == before or not self.client.may_have_more:
                break
        self._hand_over()

    def _hand_over(self) -> None:
        """Deliver what was read, at once: its receiver wakes up once for all of it."""
        happened, self._happened = self._happened, []
        for event in happened:
            self._deliver(event)

    def _watch(self, sock: Any) -> None:
        """Set the events that the selector waits for: no reads while the backlog of received messages is full."""
        events = (0 if self.client.is_paused else EVENT_READ) | (EVENT_WRITE if self.client.want_write() else 0)
        if events == self._events:
            return
        if not self._events:
            self._selector.register(sock, events)
        elif not events:
            self._selector.unregister(sock)
        else:
            self._selector.modify(sock, events)
        self._events = events

    def _acknowledge(self, tokens: Sequence[Token]) -> None:
        for token in tokens:
            self._backlog.released(token.size_bytes)
        self.client.acknowledge([token.mid for token in tokens if token.mid])  # QoS 0 has none, and no acknowledgement

    def _subscribe(self, filters: list[str]) -> None:
        _, mid = self.client.subscribe([(topic, 1) for topic in filters])
        if mid is not None:
            self._filters[mid] = filters

    def _unsubscribe(self, filters: list[str]) -> None:
        self._refused = deque((due, [each for each in some if each not in filters]) for due, some in self._refused)
        self.client.unsubscribe(filters)

    def _ask_again(self, now: float) -> None:
        while self._refused and self._refused[0][0] <= now:
            _, filters = self._refused.popleft()
            if filters:
                self._subscribe(filters)

    def _release(self) -> None:
        if (sock := self.client.socket()) is not None:
            sock.close()
        self._selector.close()
        self._wake_receiver.close()
        self._wake_sender.close()

    # paho's callbacks, in the network thread. An exception would end the thread, so they only count and queue.

    def _on_connect(
        self, _c: Client, _u: object, flags: ConnectFlags, code: ReasonCode, extra: Properties | None
    ) -> None:
        limits: dict[str, int] = extra.json() if extra is not None else {}  # type: ignore[no-untyped-call]
        self.limits = limits
        self.session_present = flags.session_present
        self.packet_bytes_max = limits.get("MaximumPacketSize", self.packet_bytes_max)
        self._retains = bool(limits.get("RetainAvailable", 1))
        self._window.messages_max = min(self._window.messages_max, limits.get("ReceiveMaximum", MESSAGES_MAX))
        self._answer = code

    def _on_disconnect(self, _c: Client, _u: object, flags: DisconnectFlags, code: ReasonCode, _p: object) -> None:
        if self.client.fault:
            self._reason = self.client.fault
        elif flags.is_disconnect_packet_from_server:
            self._reason = f"the broker ended the connection: {code.getName()}"
            if code.value == SESSION_TAKEN_OVER:
                self._reason += f"; another client uses the client id {self._client_id!r}: stop one of them"
        elif code.value == KEEPALIVE_TIMEOUT:
            self._reason = f"the broker did not answer for {self._keepalive_s} s{self._window.suspicion}"
        else:
            self._reason += self._window.suspicion

    def _on_message(self, client: Client, _u: object, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:  # an invalid topic, which a broker should have refused
            client.ack(message.mid, message.qos)
            return
        if message.qos == 0 and self._qos_1_below is not None and topic.startswith(self._qos_1_below):
            self.dropped += 1
            return
        if self._leaving:
            return  # unacknowledged, so the broker delivers it again at the next connection
        payload = bytes(message.payload)  # no copy: it is bytes
        self._backlog.arrived(len(payload))
        token = Token(connection=self.number, mid=message.mid, size_bytes=len(payload))
        arrived = Arrived(topic=topic, payload=payload, retained=message.retain, token=token, qos=message.qos)
        self._happened.append(arrived)

    def _on_publish(self, _c: Client, _u: object, mid: int, code: ReasonCode, _p: object) -> None:
        ticket = self._window.answered(mid, now=time.monotonic())
        self._settled += 1
        if not self.outstanding:
            with self._idle:
                self._idle.notify_all()
        refused = code.is_failure
        self._happened.append(Refused(ticket=ticket, reason=code.getName()) if refused else Published(ticket=ticket))

    def _on_subscribe(self, _c: Client, _u: object, mid: int, codes: list[ReasonCode], _p: object) -> None:
        filters = self._filters.pop(mid, [])
        waiting = {topic for _, some in self._refused for topic in some}  # each once, however often it is asked for
        refused = [
            topic for topic, code in zip(filters, codes, strict=False) if code.is_failure and topic not in waiting
        ]
        if not refused:
            return
        self._refusals += 1
        if str(self._refusals).strip("0") == "1":
            why = f"refuses the subscription to {', '.join(refused)} ({self._refusals} so far)"
            _log.warning("the broker at %s %s", self._endpoint, why)
        # repeated later, because an overloaded nats-server also refuses
        self._refused.append((time.monotonic() + ASK_AGAIN_S, refused))


def _prepare(sock: socket.socket, keepalive_s: int) -> None:
    """Send small packets at once, and let the kernel detect a lost peer within a keepalive."""
    options = [
        (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", max(1, keepalive_s // 2)),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", max(1, keepalive_s // 6)),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", keepalive_s * 1000),
    ]
    for level, name, value in options:
        if hasattr(socket, name):  # some systems lack some of them
            sock.setsockopt(level, getattr(socket, name), value)
