"""One connection to a broker: with ``client``, the only module that knows paho, and what paho's pitfalls are.

A connection has one network thread, which alone touches paho and alone delivers events. Whoever uses it gives it
commands through queues; so no lock of paho's is ever waited for, and how much may be under way at a time (what the
broker takes, and what the uplink carries well within a keepalive) is decided in one place. A fresh paho client
serves every connection: nothing of paho's own resend queue survives it, the protocol resends.
"""

import logging
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable
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
GOODBYE_S: Final = 1.0  # for a DISCONNECT to leave a full socket
ASK_AGAIN_S: Final = 10.0  # for a subscription that was refused
SESSION_EXPIRY_S: Final = 7 * 24 * 3600
PACKET_BYTES_OUT: Final = 256 << 20  # MQTT cannot express more
PACKET_BYTES_MIN: Final = FRAME_BYTES_RANGE[0] + 1024  # with less a broker takes no part of a message
UNSUPPORTED_PROTOCOL: Final = 132
KEEPALIVE_TIMEOUT: Final = 141
SESSION_TAKEN_OVER: Final = 142
WAKE: Final = b"\0"
PACKETS_AT_ONCE: Final = 16

_log = logging.getLogger(__name__)


class UnsupportedProtocolError(LinkError):
    """The broker does not speak this version of MQTT."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Will:
    """What the broker publishes, retained, when the connection dies."""

    topic: str
    payload: bytes


class Connection:
    """From ``open`` over ``start`` to ``close``, or to the end that ``Disconnected`` reports."""

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
    ) -> None:
        self.number = number
        self.alive = False
        self.session_present = False
        self.packet_bytes_max = PACKET_BYTES_OUT
        # as many bytes as so many messages have whose sender takes the largest frame that needs no agreement
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
        self._deliver = deliver
        self._answer: ReasonCode | None = None
        self._reason = "the connection to the broker was lost"
        self._leaving = self._closing = self._aborting = self._woken = False
        self._commands: deque[Callable[[], object]] = deque()
        self._waiting: deque[tuple[int, str, bytes, bool]] = deque()
        self._events = 0  # what the selector watches the socket for
        self._window = Window(patience_s=keepalive_s / 4)
        self._filters: dict[int, list[str]] = {}  # by mid: asked for, not answered
        self._refused: deque[tuple[float, list[str]]] = deque()  # and when to ask again
        self._issued = self._settled = 0  # each written by one thread only, so that no lock is needed
        self._idle = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"link to {endpoint}", daemon=True)
        self._selector = DefaultSelector()
        self._ear, self._bell = socket.socketpair()

    @property
    def outstanding(self) -> int:
        """How many publications the broker has not answered yet."""
        return self._issued - self._settled

    def open(self) -> None:
        """Connect and wait for the broker's answer; LinkError for any but a welcome."""
        self._listen()
        try:
            self._shake_hands(time.monotonic() + CONNECT_TIMEOUT_S)
            self.alive = True
        except OSError as error:
            raise LinkError(connect_errors.explain(self._endpoint, error)) from error
        finally:
            if not self.alive:
                self._release()

    def start(self) -> None:
        """From here on the network thread delivers what happens."""
        self._thread.start()

    def subscribe(self, filters: list[str]) -> None:
        self._command(lambda: self._subscribe(filters))

    def unsubscribe(self, filters: list[str]) -> None:
        self._command(lambda: self._unsubscribe(filters))

    def acknowledge(self, token: Token) -> None:
        self._command(lambda: self._acknowledge(token))

    def publish(self, ticket: int, topic: str, payload: bytes, retain: bool) -> None:
        self._issued += 1
        self._waiting.append((ticket, topic, payload, retain))
        self._wake()

    def close(self, flush_s: float) -> None:
        """Wait for what is outstanding, then take leave. No message that comes from here on is delivered."""
        self._leaving = True
        self._command(self._backlog.lift)  # the answers may lie behind what was not read
        with self._idle:
            self._idle.wait_for(lambda: not self.outstanding or not self.alive, flush_s)
        self._closing = True
        self._command(self.client.disconnect)
        self._thread.join(GOODBYE_S)
        self._aborting = True
        self._wake()
        self._thread.join()

    def _command(self, command: Callable[[], object]) -> None:
        self._commands.append(command)
        self._wake()

    def _wake(self) -> None:
        if not self._woken:  # else the bell has rung already, and the queues are looked at after it
            self._woken = True
            with suppress(OSError):  # the network thread has ended
                self._bell.send(WAKE)

    def _listen(self) -> None:
        self.client.on_connect = self._on_connect
        self.client.on_disconnect = self._on_disconnect
        self.client.on_message = self._on_message
        self.client.on_publish = self._on_publish
        self.client.on_subscribe = self._on_subscribe

    def _shake_hands(self, deadline: float) -> None:
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
            self._selector.register(self._ear, EVENT_READ)
        while self._answer is None and self.client.socket() is not None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise LinkError(connect_errors.question(self._endpoint, "is open but does not answer"))
            self._turn(left_s)
        if self._answer is None:
            raise LinkError(connect_errors.question(self._endpoint, "hung up without an answer"))
        if self._answer.value == UNSUPPORTED_PROTOCOL:
            # nats-server answers MQTT 5 with 3.1.1's return code 1, which paho translates to MQTT 5's 132
            raise UnsupportedProtocolError(f"the broker at {self._endpoint} speaks neither MQTT 5 nor 3.1.1")
        if self._answer.is_failure:
            raise LinkError(f"the broker at {self._endpoint} refuses {self._client_id!r}: {self._answer.getName()}")
        if self.packet_bytes_max < PACKET_BYTES_MIN:
            raise LinkError(
                f"the broker at {self._endpoint} takes packets of at most {self.packet_bytes_max} bytes, and Ternbus "
                f"needs {PACKET_BYTES_MIN}: raise its maximum packet size"
            )

    def _run(self) -> None:
        try:
            while self.client.socket() is not None and not self._aborting:
                self._ask_again(time.monotonic())
                self._feed()
                self._turn(self._keepalive_s / 4)
        finally:  # also after an exception, which is a bug: else the service would wait for ever
            self.alive = False
            self._release()
            with self._idle:
                self._idle.notify_all()
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
        """Wait for the socket or the bell; read a packet, write what can be written, look at the keepalive."""
        sock = self.client.socket()
        if sock is None:
            return
        self._watch(sock)
        # what TLS has decrypted already, the selector does not see
        decrypted = isinstance(sock, ssl.SSLSocket) and sock.pending() > 0 and not self.client.is_paused
        for key, ready in self._selector.select(0 if decrypted else timeout_s):
            if key.fileobj is self._ear:
                self._ear.recv(len(WAKE))
                self._woken = False
                continue
            if ready & EVENT_READ:
                self._read()
            if ready & EVENT_WRITE:
                self.client.loop_write()
        if decrypted:
            self._read()
        self.client.loop_misc()

    def _read(self) -> None:
        """Read while packets come, a few: other work must not wait for long, nor any message precede the welcome."""
        for _ in range(PACKETS_AT_ONCE if self.alive else 1):
            before = self.client.packets
            self.client.loop_read()
            if self.client.packets == before:
                return

    def _watch(self, sock: Any) -> None:
        """Have the selector watch for what is wanted: nothing is read while what came waits to be dealt with."""
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

    def _acknowledge(self, token: Token) -> None:
        self._backlog.released(token.size_bytes)
        if token.mid:  # QoS 0 has none, and wants no answer
            self.client.ack(token.mid, 1)

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
        self._ear.close()
        self._bell.close()

    # What paho calls, in the network thread. An exception here would end that thread, so: queue, count, no more.

    def _on_connect(
        self, _c: Client, _u: object, flags: ConnectFlags, code: ReasonCode, extra: Properties | None
    ) -> None:
        limits: dict[str, int] = extra.json() if extra is not None else {}  # type: ignore[no-untyped-call]
        self.session_present = flags.session_present
        self.packet_bytes_max = limits.get("MaximumPacketSize", self.packet_bytes_max)
        self._window.messages_max = min(self._window.messages_max, limits.get("ReceiveMaximum", MESSAGES_MAX))
        self._answer = code

    def _on_disconnect(self, _c: Client, _u: object, flags: DisconnectFlags, code: ReasonCode, _p: object) -> None:
        if self.client.fault:
            self._reason = self.client.fault
        elif flags.is_disconnect_packet_from_server:
            self._reason = f"the broker ended the connection: {code.getName()}"
            if code.value == SESSION_TAKEN_OVER:
                self._reason += f"; there is another client that calls itself {self._client_id!r}"
        elif code.value == KEEPALIVE_TIMEOUT:
            self._reason = f"the broker did not answer for {self._keepalive_s} s"

    def _on_message(self, client: Client, _u: object, message: MQTTMessage) -> None:
        try:
            topic = message.topic
        except UnicodeDecodeError:  # no broker should have let it pass, and nothing of ours has such a topic
            client.ack(message.mid, message.qos)
            return
        if message.qos == 0 and self._qos_1_below is not None and topic.startswith(self._qos_1_below):
            self.dropped += 1
            return
        if self._leaving:
            return  # nobody is there to deal with it: the broker keeps it for the next connection
        payload = bytes(message.payload)
        self._backlog.arrived(len(payload))
        token = Token(connection=self.number, mid=message.mid, size_bytes=len(payload))
        self._deliver(Arrived(topic=topic, payload=payload, retained=message.retain, token=token, qos=message.qos))

    def _on_publish(self, _c: Client, _u: object, mid: int, code: ReasonCode, _p: object) -> None:
        ticket = self._window.answered(mid, now=time.monotonic())
        self._settled += 1
        if not self.outstanding:
            with self._idle:
                self._idle.notify_all()
        if code.is_failure:
            self._deliver(Refused(ticket=ticket, reason=code.getName()))
        else:
            self._deliver(Published(ticket=ticket))

    def _on_subscribe(self, _c: Client, _u: object, mid: int, codes: list[ReasonCode], _p: object) -> None:
        filters = self._filters.pop(mid, [])
        refused = [topic for topic, code in zip(filters, codes, strict=False) if code.is_failure]
        if refused:  # nats-server does so too when it is overloaded; without what we asked for we would wait for ever
            _log.warning("the broker at %s refuses to subscribe us to %s", self._endpoint, ", ".join(refused))
            self._refused.append((time.monotonic() + ASK_AGAIN_S, refused))


def _prepare(sock: socket.socket, keepalive_s: int) -> None:
    """Let small packets go at once, and let the kernel notice within a keepalive that the other end is gone."""
    options = [
        (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", max(1, keepalive_s // 2)),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", max(1, keepalive_s // 6)),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", keepalive_s * 1000),
    ]
    for level, name, value in options:
        if hasattr(socket, name):  # not every system has all of them
            sock.setsockopt(level, getattr(socket, name), value)
