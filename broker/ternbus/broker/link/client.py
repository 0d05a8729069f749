"""paho's client with bounds on the memory that a broker can make it use; paho itself has none.

The bounds do not affect a broker that follows MQTT: it sends no packet above the announced maximum packet size, no
more unacknowledged messages than the receive maximum, and no message at a QoS above the subscription's. Properties are
another matter: a broker forwards those of any client that may publish, in the length of a whole packet, and paho's
decoder copies the rest of the packet for each. The protocol uses none of a message, so none is decoded.
"""

import errno
import struct
import time
from collections.abc import Sequence
from typing import Final, Literal

from paho.mqtt.client import PUBACK, PUBLISH, Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from ternbus.broker.link.window import Backlog

READ_BYTES: Final = 1 << 18  # per read: paho allocates this much for each read, even if less arrives
AHEAD_BYTES: Final = 1 << 16  # per read of small packets, or of a large one's beginning
ANSWERS_MAX: Final = 1024  # unwritten packets, such as acknowledgements to a broker that reads none
ANSWER_BYTES_MAX: Final = 1 << 13  # of all other packets, such as CONNACK with its properties
LENGTH_BYTES_MAX: Final = 4  # of the length of properties
QOS_BITS: Final = 0x06  # in the first byte of a PUBLISH packet
QOS_1: Final = 0x02
RETAIN: Final = 0x01
TOO_LARGE: Final = 149  # a reason code
PUBACK_OF: Final = struct.Struct("!BBH")  # a packet: its type, the length of what follows, and the message's identifier


class BoundedClient(Client):
    """A client that reads nothing while paused, and ends the connection at a packet above ``packet_bytes_max``."""

    def __init__(self, client_id: str, protocol: int, backlog: Backlog, packet_bytes_max: int) -> None:
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id,
            clean_session=None if protocol == MQTTProtocolVersion.MQTTv5 else False,
            protocol=MQTTProtocolVersion(protocol),
            reconnect_on_failure=False,
            manual_ack=True,
        )
        # `Window` replaces paho's limit, which visits all queued messages at each PUBACK
        self.max_inflight_messages = 0
        self.backlog = backlog
        self.packet_bytes_max = packet_bytes_max
        self.fault = ""  # why the client ended the connection, if it did
        self.packets = 0  # number of packets received
        self._ahead = b""  # what was read last
        self._used = 0  # of that
        self._was_full = True  # whether the socket had as much as the last read asked for

    @property
    def is_paused(self) -> bool:
        """Whether reading waits, for acknowledgements of received messages or for the broker to read packets."""
        return self.backlog.is_full or len(self._out_packet) > ANSWERS_MAX

    @property
    def has_more(self) -> bool:
        """Whether there is something of the next packet that was read already."""
        return self._used < len(self._ahead)

    @property
    def may_have_more(self) -> bool:
        """Whether there is, or the socket had as much as was asked for."""
        return self.has_more or self._was_full

    def _sock_recv(self, bufsize: int) -> bytes:
        """Read for paho, which asks for single bytes until it knows the length of a packet, then for the rest of it."""
        if self.is_paused:
            raise BlockingIOError
        if bufsize > self.packet_bytes_max:
            self.fault = f"the broker sent a packet of {bufsize} bytes, more than the {self.packet_bytes_max} announced"
            raise OSError(errno.EMSGSIZE, self.fault)
        if not self.has_more:
            wanted = AHEAD_BYTES if bufsize < AHEAD_BYTES else min(bufsize, READ_BYTES)
            found = super()._sock_recv(wanted)
            self._was_full = len(found) == wanted
            if bufsize >= AHEAD_BYTES:
                return found
            self._ahead, self._used = found, 0
        found = self._ahead[self._used : self._used + bufsize]
        self._used += len(found)
        return found

    def acknowledge(self, mids: Sequence[int]) -> None:
        """Acknowledge messages: one write of all PUBACK packets (MQTT 5.0 §3.4), where paho writes each by itself."""
        if mids:
            self._packet_queue(PUBACK, b"".join(PUBACK_OF.pack(PUBACK, 2, mid) for mid in mids), 0, 1)

    def _packet_handle(self) -> MQTTErrorCode:
        self.packets += 1
        size_bytes = self._in_packet["remaining_length"]
        if self._in_packet["command"] & 0xF0 != PUBLISH and size_bytes > ANSWER_BYTES_MAX:
            return self._refuse(f"the broker sent an answer of {size_bytes} bytes, more than {ANSWER_BYTES_MAX}")
        return super()._packet_handle()

    def _handle_publish(self) -> MQTTErrorCode:
        """Take a message out of its packet, with one copy of the payload where paho's decoder makes five.

        A message of QoS 2, which paho would keep until the broker releases it, is refused.
        """
        command, packet = self._in_packet["command"], self._in_packet["packet"]
        if command & QOS_BITS > QOS_1:
            return self._refuse("the broker sent a message at a QoS that no subscription asked for")
        start = self._payload_start()
        if start is None:
            return self._refuse("the broker sent a message that does not fit into its packet")
        topic_end = 2 + int.from_bytes(packet[:2], "big")
        message = MQTTMessage(topic=bytes(packet[2:topic_end]))
        message.qos, message.retain = (command & QOS_BITS) >> 1, bool(command & RETAIN)
        message.mid = int.from_bytes(packet[topic_end : topic_end + 2], "big") if message.qos else 0
        message.payload = bytes(memoryview(packet)[start:])
        self._handle_on_message(message)
        return MQTTErrorCode.MQTT_ERR_SUCCESS

    def _handle_pubackcomp(self, cmd: Literal["PUBACK", "PUBCOMP"]) -> MQTTErrorCode:
        """Take "packet too large" in a PUBACK, with which mosquitto refuses what is above its message_size_limit.

        MQTT 5.0 has this code for other packets only, so paho would end the connection, and nobody would know why.
        """
        packet = self._in_packet["packet"]
        if self._protocol != MQTTProtocolVersion.MQTTv5 or cmd != "PUBACK" or packet[2:3] != bytes([TOO_LARGE]):
            return super()._handle_pubackcomp(cmd)
        mid = int.from_bytes(packet[:2], "big")
        with self._out_message_mutex:
            if mid not in self._out_messages:
                return MQTTErrorCode.MQTT_ERR_SUCCESS
            code = ReasonCode(PacketTypes.DISCONNECT, identifier=TOO_LARGE)
            none = Properties(PacketTypes.PUBACK)  # type: ignore[no-untyped-call]  # paho gives it no types
            return self._do_on_publish(mid, code, none)

    def _refuse(self, fault: str) -> MQTTErrorCode:
        """End the connection for this reason."""
        self.fault = fault
        return MQTTErrorCode.MQTT_ERR_PROTOCOL

    def _payload_start(self) -> int | None:
        """Where the payload begins, behind topic, mid and properties (MQTT 5.0 §3.3.2); None if not in the packet."""
        packet: bytearray = self._in_packet["packet"]
        start = 2 + int.from_bytes(packet[:2], "big") + (2 if self._in_packet["command"] & QOS_BITS else 0)
        if self._protocol != MQTTProtocolVersion.MQTTv5:
            return start if start <= len(packet) else None
        size_bytes = shift = 0
        for end, byte in enumerate(packet[start : start + LENGTH_BYTES_MAX], start + 1):
            size_bytes |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return end + size_bytes if end + size_bytes <= len(packet) else None
        return None

    def _check_keepalive(self) -> None:
        """Send pings also while paused, but expect no answers, because they follow unread data."""
        if self.is_paused:
            self._ping_t = 0.0
            with self._msgtime_mutex:
                self._last_bytes_received = time.monotonic()
        super()._check_keepalive()
