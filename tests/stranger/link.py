"""A connection after section 2 of docs/protocol.md, on paho-mqtt, with one thread: the caller's."""

import time
from collections import deque
from collections.abc import Sequence
from urllib.parse import urlsplit

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

WEEK = 604_800
IN_FLIGHT = 16
PATIENCE_S = 60.0  # how long a test waits for what should take a moment
FILTERS_IN_PACKET = 8


class Link:
    """One connection to a broker: MQTT 5 with a fall back to 3.1.1, a persistent session, everything QoS 1."""

    def __init__(self, url: str, name: str, *, client_id: str | None = None) -> None:
        """Name the broker and the user; the client id is the same unless a test wants another."""
        self.address = urlsplit(url)
        self.name = name
        self.client_id = client_id or name
        self.level = 5
        self.inbox: deque[tuple[str, bytes]] = deque()
        self.unacked: set[int] = set()
        self.packet_limit: int | None = None
        self.session_present = False
        self.connected = False
        self._refused: str | None = None
        self._client: mqtt.Client | None = None

    def connect(self, will: tuple[str, bytes] | None = None, timeout: float = PATIENCE_S) -> None:
        """Connect and wait for the CONNACK; try 3.1.1 where the broker does not speak MQTT 5."""
        deadline = time.monotonic() + timeout
        while not self._attempt(will, deadline):
            self.drop()
            if self.level == 5 and self._refused is not None:
                self.level = 4
            elif time.monotonic() > deadline:
                raise TimeoutError(f"no CONNACK: {self._refused}")
            else:
                time.sleep(0.05)  # a pause between attempts, not a wait for luck

    def _attempt(self, will: tuple[str, bytes] | None, deadline: float) -> bool:
        protocol = mqtt.MQTTv5 if self.level == 5 else mqtt.MQTTv311
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self.client_id,
            protocol=protocol,
            clean_session=None if self.level == 5 else False,
            reconnect_on_failure=False,
        )
        self._client = client
        self._refused = None
        self.unacked.clear()
        client.username_pw_set(self.name)
        client.max_inflight_messages_set(IN_FLIGHT)
        if will is not None:
            client.will_set(will[0], will[1], qos=1, retain=True)
        client.on_connect = self._on_connect
        client.on_message = lambda _client, _data, message: self.inbox.append((message.topic, bytes(message.payload)))
        client.on_publish = lambda _client, _data, mid, _reason, _properties: self.unacked.discard(mid)
        host, port = self.address.hostname or "", self.address.port or 1883
        try:
            if self.level == 5:
                properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]  # paho's lacks types
                properties.SessionExpiryInterval = WEEK
                client.connect(host, port, keepalive=60, clean_start=False, properties=properties)
            else:
                client.connect(host, port, keepalive=60)
        except OSError:
            return False
        while not self._answered() and time.monotonic() < deadline:
            if client.loop(0.05) != mqtt.MQTT_ERR_SUCCESS and not self._answered():
                self._refused = "closed"
        return self.connected

    def _answered(self) -> bool:
        return self.connected or self._refused is not None

    def _on_connect(
        self,
        _client: mqtt.Client,
        _data: object,
        flags: mqtt.ConnectFlags,
        reason: ReasonCode,
        properties: Properties | None,
    ) -> None:
        if reason.is_failure:
            self._refused = str(reason)
            return
        self.session_present = flags.session_present
        self.packet_limit = getattr(properties, "MaximumPacketSize", None)
        if getattr(properties, "ReceiveMaximum", IN_FLIGHT) < IN_FLIGHT:
            raise RuntimeError("paho cannot lower its window once it is connected")
        self.connected = True

    def step(self, timeout: float = 0.02) -> None:
        """Let the client read and write once."""
        if self._client is None or not self.connected:
            return
        if self._client.loop(timeout) != mqtt.MQTT_ERR_SUCCESS:
            self.connected = False

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish with QoS 1; `unacked` shrinks when the broker has it."""
        assert self._client is not None
        info = self._client.publish(topic, payload, qos=1, retain=retain)
        if info.rc == mqtt.MQTT_ERR_SUCCESS and not info.is_published():
            self.unacked.add(info.mid)

    def subscribe(self, topics: Sequence[str], *, retained: bool = True) -> None:
        """Send one SUBSCRIBE."""
        assert self._client is not None
        assert len(topics) <= FILTERS_IN_PACKET
        if self.level == 5:
            options = SubscribeOptions(qos=1, retainHandling=0 if retained else 2)
            self._client.subscribe([(topic, options) for topic in topics])
        else:
            self._client.subscribe([(topic, 1) for topic in topics])

    def unsubscribe(self, topic: str) -> None:
        """Send one UNSUBSCRIBE."""
        assert self._client is not None
        self._client.unsubscribe(topic)

    def flush(self, timeout: float = 60.0) -> None:
        """Wait until the broker has acknowledged everything."""
        deadline = time.monotonic() + timeout
        while self.unacked:
            self.step()
            if not self.connected or time.monotonic() > deadline:
                raise TimeoutError(f"{len(self.unacked)} messages not acknowledged")

    def disconnect(self) -> None:
        """Say goodbye, which suppresses the will."""
        if self._client is not None and self.connected:
            self._client.disconnect()
            deadline = time.monotonic() + 5.0
            while self._client.loop(0.05) == mqtt.MQTT_ERR_SUCCESS and time.monotonic() < deadline:
                pass
        self.drop()

    def drop(self) -> None:
        """Close the socket without a word, so that the broker publishes the will."""
        if self._client is not None:
            sock = self._client.socket()
            if sock is not None:
                sock.close()
        self._client = None
        self.connected = False
        self.inbox.clear()
