"""paho's client with bounds on what a broker can make it hold; paho itself has none.

A broker that keeps to MQTT never meets them: it sends no packet larger than we announced, no more unacknowledged
messages than we take, and nothing at another quality of service than we subscribed with.
"""

import errno
import time
from typing import Final

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion

from ternbus.broker.link.window import Backlog

READ_BYTES: Final = 1 << 18  # at a time: as much is allocated for each read, however little comes
ANSWERS_MAX: Final = 1024  # packets that wait to be written: acknowledgements, to a broker that takes none
QOS_BITS: Final = 0x06  # of a PUBLISH packet's first byte
QOS_1: Final = 0x02


class BoundedClient(Client):
    """Reads nothing while it is paused, and ends the connection at a packet larger than ``packet_bytes_max``."""

    def __init__(self, client_id: str, protocol: int, backlog: Backlog, packet_bytes_max: int) -> None:
        super().__init__(
            CallbackAPIVersion.VERSION2,
            client_id,
            clean_session=None if protocol == MQTTProtocolVersion.MQTTv5 else False,
            protocol=MQTTProtocolVersion(protocol),
            reconnect_on_failure=False,
            manual_ack=True,
        )
        self.max_inflight_messages = 0  # the window is ours: paho's walks over all that waits at every PUBACK
        self.backlog = backlog
        self.packet_bytes_max = packet_bytes_max
        self.fault = ""  # what the broker did that ended the connection
        self.packets = 0  # that have come

    @property
    def is_paused(self) -> bool:
        """Whether the broker has to wait until what it sent is dealt with, or our answers are taken."""
        return self.backlog.is_full or len(self._out_packet) > ANSWERS_MAX

    def _sock_recv(self, bufsize: int) -> bytes:
        """Read for paho: a byte at a time until it knows a packet's length, then all that the packet still lacks."""
        if self.is_paused:
            raise BlockingIOError
        if bufsize > self.packet_bytes_max:
            self.fault = f"the broker sent a packet of {bufsize} bytes, more than the {self.packet_bytes_max} announced"
            raise OSError(errno.EMSGSIZE, self.fault)
        return super()._sock_recv(min(bufsize, READ_BYTES))

    def _packet_handle(self) -> MQTTErrorCode:
        self.packets += 1
        return super()._packet_handle()

    def _handle_publish(self) -> MQTTErrorCode:
        """Refuse a message of QoS 2, which paho would keep until the broker releases it."""
        if self._in_packet["command"] & QOS_BITS > QOS_1:
            self.fault = "the broker sent a message at a quality of service that was not asked for"
            return MQTTErrorCode.MQTT_ERR_PROTOCOL
        return super()._handle_publish()

    def _check_keepalive(self) -> None:
        """While it is paused it goes on to send pings, and awaits no answer: that lies behind what it does not read."""
        if self.is_paused:
            self._ping_t = 0.0
            with self._msgtime_mutex:
                self._last_bytes_received = time.monotonic()
        super()._check_keepalive()
