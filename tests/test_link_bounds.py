"""What a broker can make a link hold: a scripted one sends what no honest one would."""

import socket
import threading
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from paho.mqtt import _packet
from paho.mqtt.client import MQTTMessage
from paho.mqtt.enums import MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.exception import MalformedPacket

from support.brokers import (
    CONNECT,
    DISCONNECT,
    PUBACK,
    PUBLISH,
    SUBSCRIBE,
    WITHIN_S,
    Inbox,
    ScriptedBroker,
    linked,
    scripted,
)
from ternbus.broker.errors import LinkError
from ternbus.broker.link import connection
from ternbus.broker.link.client import BoundedClient
from ternbus.broker.link.connection import MQTT_5, MQTT_311
from ternbus.broker.link.events import Arrived, Disconnected, Published
from ternbus.broker.link.link import Link
from ternbus.broker.link.window import Backlog

WILL = ("ternbus/1/demo/up/dev/status", b"offline")
PINGREQ, PINGRESP = 0xC0, bytes([0xD0, 0])
TOPIC = b"ternbus/1/demo/down/dev/receipt"


def connack(protocol: int, packet_bytes: int | None = None) -> bytes:
    if protocol == MQTT_311:
        return bytes([0x20, 2, 0, 0])
    properties = b"" if packet_bytes is None else b"\x27" + packet_bytes.to_bytes(4, "big")
    return bytes([0x20, 3 + len(properties), 0, 0, len(properties)]) + properties


def length(number: int) -> bytes:
    """As MQTT writes how much follows."""
    found = bytearray()
    while True:
        number, low = divmod(number, 128)
        found.append(low | (128 if number else 0))
        if not number:
            return bytes(found)


def publication(protocol: int, payload: bytes, *, qos: int = 1, mid: int = 1, properties: bytes = b"\0") -> bytes:
    content = len(TOPIC).to_bytes(2, "big") + TOPIC
    content += (mid.to_bytes(2, "big") if qos else b"") + (properties if protocol == MQTT_5 else b"") + payload
    return bytes([PUBLISH | qos << 1]) + length(len(content)) + content


@contextmanager
def sending(protocol: int, *first: bytes, ping: bytes = PINGRESP) -> Iterator[ScriptedBroker]:
    """A broker of this protocol that sends these bytes when we publish something, and answers our pings."""

    def script(kind: int, content: bytes) -> bytes | None:
        if kind == CONNECT:
            return connack(protocol) if content[6] == protocol else bytes([0x20, 2, 0, 1])
        if kind == PUBLISH:
            return b"".join(first)
        return ping if kind == PINGREQ else b""

    with scripted(script) as broker:
        yield broker


@pytest.mark.parametrize("packet_bytes", [100, 5119])
def test_a_broker_whose_packets_are_too_small_is_waited_for(packet_bytes: int) -> None:
    """It is no fault of our own configuration: a LinkError, after which the next attempt comes."""
    with scripted(lambda kind, _: connack(MQTT_5, packet_bytes) if kind == CONNECT else b"") as broker:
        link = Link(broker.url, client_id="dev", deliver=Inbox().put)
        with pytest.raises(LinkError, match=f"at most {packet_bytes} bytes, Ternbus needs 5120"):
            link.connect(*WILL)
        assert not link.connected


def test_the_smallest_packets_that_do_leave_a_frame_of_4096_bytes() -> None:
    with scripted(lambda kind, _: connack(MQTT_5, 5120) if kind == CONNECT else b"") as broker:
        link = Link(broker.url, client_id="dev", deliver=Inbox().put)
        assert link.connect(*WILL).frame_bytes == 4096
        link.disconnect(flush_s=0.0)


@pytest.mark.parametrize("protocol", [MQTT_5, MQTT_311])
def test_a_packet_larger_than_announced_ends_the_connection_before_it_is_read(protocol: int) -> None:
    """256 MB are stated, and 32 MB of them sent."""
    stated = bytes([PUBLISH | 2]) + length(2**28 - 1)
    with sending(protocol, stated, bytes(2**25)) as broker, linked(broker.url, "dev") as (link, inbox):
        tracemalloc.start()
        try:
            link.publish("t", b"now")
            reason = inbox.next(Disconnected).reason
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert reason == "the broker sent a packet of 268435455 bytes, more than the 8388608 announced"
        assert peak < 2**25 + 2**21  # the script's own copy, and next to nothing of ours


@pytest.mark.parametrize(("size", "told"), [(122_880, False), (122_881, True)])
@pytest.mark.parametrize("protocol", [MQTT_5, MQTT_311])
def test_a_connection_that_is_lost_while_a_large_message_is_sent_tells_its_size(
    protocol: int, size: int, told: bool
) -> None:
    """Brokers of MQTT 3.1.1 do not tell what they take: they hang up, at each attempt."""

    def script(kind: int, content: bytes) -> bytes | None:
        if kind == CONNECT:
            return connack(protocol) if content[6] == protocol else bytes([0x20, 2, 0, 1])
        return None

    with scripted(script) as broker, linked(broker.url, "dev") as (link, inbox):
        link.publish("t", bytes(size))
        reason = inbox.next(Disconnected).reason
    assert reason.startswith("the connection to the broker was lost")
    assert (f"while a message of {size} bytes was sent" in reason) == told


def test_who_takes_larger_frames_announces_larger_packets() -> None:
    large = publication(MQTT_5, bytes(9 << 20))
    with sending(MQTT_5, large) as broker, linked(broker.url, "dev", frame_bytes=10 << 20) as (link, inbox):
        link.publish("t", b"now")
        assert len(inbox.next(Arrived).payload) == 9 << 20


@pytest.mark.parametrize("protocol", [MQTT_5, MQTT_311])
@pytest.mark.parametrize("qos", [0, 1])
def test_no_more_is_read_than_may_be_unacknowledged(protocol: int, qos: int) -> None:
    """Of 200 messages sent at once, to one that said that it takes 3: a fourth shows that the broker does not care."""
    flood = [publication(protocol, bytes([number]) * 1000, qos=qos, mid=number + 1) for number in range(200)]
    with sending(protocol, *flood) as broker, linked(broker.url, "dev", receive_maximum=3) as (link, inbox):
        link.publish("t", b"now")
        waiting = inbox.arrivals(4)
        assert inbox.arrivals_within(1, 0.3) == []
        for number in range(200):
            if number == len(waiting):
                waiting += inbox.arrivals(1)
            link.acknowledge([waiting[number].token])
        assert [each.payload[0] for each in waiting] == list(range(200))
        assert inbox.rest() == []


def test_large_messages_are_bounded_by_their_bytes() -> None:
    """Of 20 messages of 2 MB, to one that takes 64 messages of a frame's 120 KiB: it reads the fourth, no fifth."""
    flood = [publication(MQTT_5, bytes(1 << 21), mid=number + 1) for number in range(20)]
    with sending(MQTT_5, *flood) as broker, linked(broker.url, "dev") as (link, inbox):
        link.publish("t", b"now")
        waiting = inbox.arrivals(4)
        assert inbox.arrivals_within(1, 0.3) == []
        while waiting:
            link.acknowledge([waiting.pop(0).token])
            waiting += inbox.arrivals_within(1, 0.3)


def test_while_nothing_is_read_pings_go_on_and_the_broker_is_not_taken_for_dead() -> None:
    flood = [publication(MQTT_5, b"x", mid=number + 1) for number in range(50)]
    with (
        sending(MQTT_5, *flood, ping=b"") as broker,
        linked(broker.url, "dev", receive_maximum=3, keepalive_s=1) as (link, inbox),
    ):
        link.publish("t", b"now")
        waiting = inbox.arrivals(4)
        kinds = [broker.packets.get(timeout=WITHIN_S)[0] for _ in range(5)]
        assert kinds == [CONNECT, PUBLISH, PINGREQ, PINGREQ, PINGREQ]  # three seconds, and no answer
        assert inbox.rest() == []
        assert link.connected
        for each in waiting:
            link.acknowledge([each.token])
        assert len(inbox.arrivals(4)) == 4


def test_leaving_does_not_wait_for_what_is_not_dealt_with() -> None:
    """Our own publication is answered behind the flood, of which nothing more is delivered."""
    flood = [publication(MQTT_5, b"x", mid=number + 1) for number in range(50)]
    answer = bytes([PUBACK, 2, 0, 1])
    with sending(MQTT_5, *flood, answer) as broker, linked(broker.url, "dev", receive_maximum=3) as (link, inbox):
        link.publish("t", b"now")
        inbox.arrivals(4)
        link.disconnect(flush_s=WITHIN_S)
        assert [broker.packets.get(timeout=WITHIN_S)[0] for _ in range(3)] == [CONNECT, PUBLISH, DISCONNECT]
        assert not any(isinstance(event, Arrived) for event in inbox.rest())


def test_what_comes_at_qos_0_where_none_should_is_dropped_and_counted() -> None:
    """It does not wait for anybody, and takes no room from what comes at QoS 1."""
    flood = [publication(MQTT_5, b"x" * 1000, qos=0) for _ in range(500)] + [publication(MQTT_5, b"y")]
    with (
        sending(MQTT_5, *flood) as broker,
        linked(broker.url, "dev", receive_maximum=3, qos_1_below="ternbus/1/demo/down/") as (link, inbox),
    ):
        link.publish("t", b"now")
        assert inbox.next(Arrived).payload == b"y"
        assert link.dropped == 500
        link.disconnect(flush_s=0.0)
        assert link.dropped == 500
    with (
        sending(MQTT_5, flood[0]) as broker,
        linked(broker.url, "dev", qos_1_below="ternbus/1/demo/up/") as (link, inbox),
    ):
        link.publish("t", b"now")
        assert inbox.next(Arrived).qos == 0


@pytest.mark.parametrize("qos", [2, 3])
def test_a_quality_of_service_that_was_not_asked_for_ends_the_connection(qos: int) -> None:
    """A message of QoS 2 would be kept until the broker releases it."""
    with sending(MQTT_5, publication(MQTT_5, b"x", qos=qos)) as broker, linked(broker.url, "dev") as (link, inbox):
        link.publish("t", b"now")
        assert "at a QoS that no subscription asked for" in inbox.next(Disconnected).reason


@pytest.mark.parametrize("qos", [0, 1])
@pytest.mark.parametrize("count", [1, 200_000])
def test_properties_of_a_message_are_cut_off_unread(qos: int, count: int) -> None:
    """A broker forwards those of any client. For 200,000, of 5 bytes each, the decoder took minutes, and no pings."""
    properties = length(5 * count) + b"\x26\0\0\0\0" * count
    flood = [publication(MQTT_5, b"x", qos=qos, properties=properties), publication(MQTT_5, b"y", qos=qos, mid=2)]
    with sending(MQTT_5, *flood) as broker, linked(broker.url, "dev") as (link, inbox):
        link.publish("t", b"now")
        assert [each.payload for each in inbox.arrivals(2)] == [b"x", b"y"]


@given(content=st.binary(max_size=40), qos=st.sampled_from([0, 1]), protocol=st.sampled_from([MQTT_5, MQTT_311]))
@example(content=b"\x00\x01t\x00\x01\x00", qos=1, protocol=MQTT_5)
@example(content=b"\x00\x01t\x03\x01\x02\x01\x01xy", qos=1, protocol=MQTT_5)
@example(content=b"\x00\x09t\x00\x01", qos=1, protocol=MQTT_311)
def test_a_message_is_read_as_by_pahos_own_decoder(content: bytes, qos: int, protocol: int) -> None:
    """But for properties, which nobody reads; a message that exceeds its packet is read by neither."""
    assume(content[:2] != b"\0\0")  # no topic
    client, got = BoundedClient("dev", protocol, Backlog(messages_max=1, bytes_max=1), 1000), list[MQTTMessage]()
    client.on_message = lambda _client, _data, message: got.append(message)
    command = PUBLISH | qos << 1 | 1
    client._in_packet["command"], client._in_packet["packet"] = command, bytearray(content)
    if client._handle_publish() == MQTTErrorCode.MQTT_ERR_SUCCESS:
        (message,) = got
        assert content.endswith(message.payload)
        before = content[: 2 + int.from_bytes(content[:2], "big") + 2 * qos]
        same = content if protocol == MQTT_311 else before + b"\0" + message.payload
        decoded = _packet.decode_publish(command, same, MQTTProtocolVersion(protocol))
        assert (message._topic, message.mid, message.payload) == (decoded.topic, decoded.mid, decoded.payload)
        assert (message.qos, message.retain) == (decoded.qos, decoded.retain)
    elif protocol == MQTT_311:
        with pytest.raises(MalformedPacket):
            _packet.decode_publish(command, content, MQTTProtocolVersion(protocol))


@pytest.mark.parametrize("properties", [b"", b"\x80", b"\x05\x26", b"\x80\x80\x80\x80\x01"])
def test_properties_longer_than_their_message_end_the_connection(properties: bytes) -> None:
    with (
        sending(MQTT_5, publication(MQTT_5, b"", properties=properties)) as broker,
        linked(broker.url, "dev") as (link, inbox),
    ):
        link.publish("t", b"now")
        assert inbox.next(Disconnected).reason == "the broker sent a message that does not fit into its packet"


@pytest.mark.parametrize("protocol", [MQTT_5, MQTT_311])
def test_an_answer_as_large_as_no_honest_one_ends_the_connection(protocol: int) -> None:
    """In the properties of a SUBACK, a CONNACK or a DISCONNECT, too, the decoder would be lost."""
    answer = bytes([PUBACK]) + length(9000) + bytes(9000)
    with sending(protocol, answer) as broker, linked(broker.url, "dev") as (link, inbox):
        link.publish("t", b"now")
        assert inbox.next(Disconnected).reason == "the broker sent an answer of 9000 bytes, more than 8192"


def test_a_broker_that_takes_no_acknowledgements_gives_no_more_to_acknowledge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While it reads nothing our answers wait, and from the bound on nothing more is read either."""
    monkeypatch.setattr("ternbus.broker.link.client.ANSWERS_MAX", 10)
    monkeypatch.setattr(
        connection, "_prepare", lambda sock, _: sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    )
    flood = [publication(MQTT_5, b"x", mid=number + 1) for number in range(10_000)]
    reads_on = threading.Event()
    accepted: list[socket.socket] = []

    def serve() -> None:
        accepted.append(listener.accept()[0])
        accepted[0].recv(1000)
        accepted[0].sendall(connack(MQTT_5))
        accepted[0].recv(1000)
        accepted[0].sendall(b"".join(flood))
        reads_on.wait(WITHIN_S)
        with suppress(ConnectionResetError):
            while accepted[0].recv(1 << 16):
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        serving = threading.Thread(target=serve)
        serving.start()
        taken = 0
        with linked(f"mqtt://127.0.0.1:{listener.getsockname()[1]}", "dev") as (link, inbox):
            link.publish("t", b"now")
            while arrived := inbox.arrivals_within(1, 0.5):
                taken += 1
                link.acknowledge([arrived[0].token])
            assert 0 < taken < 10_000
            reads_on.set()
            while taken < 10_000:
                link.acknowledge([inbox.next(Arrived).token])
                taken += 1
        serving.join(WITHIN_S)
        accepted[0].close()


def test_a_subscription_that_is_refused_again_and_again_waits_once(caplog: pytest.LogCaptureFixture) -> None:
    """Each call that a broker refused was repeated for ever: after a day, hundreds a second, with as many lines."""

    def script(kind: int, content: bytes) -> bytes:
        if kind == PUBLISH:  # a topic of one character
            return bytes([PUBACK, 2]) + content[3:5]
        if kind == SUBSCRIBE:
            return bytes([0x90, 4]) + content[:2] + b"\0\x80"
        return connack(MQTT_5) if kind == CONNECT else b""

    with scripted(script) as broker, linked(broker.url, "dev") as (link, inbox):
        for _ in range(100):
            link.subscribe(["all/head"])
        link.publish("t", b"answered after all of them")
        inbox.until(Published)
        assert link._connection is not None
        assert [filters for _, filters in link._connection._refused] == [["all/head"]]
    assert caplog.text.count("refuses the subscription to all/head (1 so far)") == 1
