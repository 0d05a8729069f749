"""The link on both brokers, and on a scripted one for what no real broker can be made to do."""

import os
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.brokers import CONNECT, DISCONNECT, PUBLISH, SUBSCRIBE, WITHIN_S, Inbox, Line, linked, scripted
from ternbus.broker.errors import ConfigError, LinkError
from ternbus.broker.link import connect_errors, connection
from ternbus.broker.link.connection import MQTT_5, MQTT_311
from ternbus.broker.link.events import Arrived, Connected, Disconnected, Published, Refused
from ternbus.broker.link.link import Link, PacketTooLargeError, packet_bytes
from ternbus.broker.protocol.endpoint import Endpoint
from ternbus.broker.server import nats
from ternbus.broker.server.running import Engine, RunningBroker, choose, start

UP = "ternbus/1/demo/up"
DOWN = "ternbus/1/demo/down"
WILL = (f"{UP}/dev/status", b"offline")
CONNACK_5 = bytes([0x20, 3, 0, 0, 0])
CONNACK_311 = bytes([0x20, 2, 0, 0])


@pytest.fixture(scope="module", params=[Engine.MOSQUITTO, Engine.NATS])
def broker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    directory = tmp_path_factory.mktemp("broker")
    with start(choose(request.param), host="127.0.0.1", port=0, directory=directory) as running:
        yield running


@pytest.fixture
def client_id(request: pytest.FixtureRequest) -> str:
    """One per test, so that no test finds the session of another; nats-server allows no brackets in it."""
    return "".join(char if char.isalnum() else "-" for char in request.node.name)


def test_connecting_is_answered_and_reported(broker: RunningBroker, client_id: str) -> None:
    inbox = Inbox()
    link = Link(broker.url, client_id=client_id, deliver=inbox.put)
    states = [link.connected]
    connected = link.connect(*WILL)
    assert inbox.next(Connected) == connected
    states.append(link.connected)
    protocol = MQTT_5 if broker.software.engine is Engine.MOSQUITTO else MQTT_311
    most_bytes = (1_100_000 if protocol == MQTT_5 else 2**28) - 1024  # our mosquitto tells it
    assert connected == Connected(
        session_present=False, protocol=protocol, frame_bytes=120 * 1024, most_bytes=most_bytes
    )
    link.disconnect()
    states.append(link.connected)
    assert states == [False, True, False]
    assert inbox.rest() == []  # our own leaving is no news


def test_frames_fit_the_brokers_packets(broker: RunningBroker, client_id: str) -> None:
    inbox = Inbox()
    link = Link(broker.url, client_id=client_id, deliver=inbox.put, frame_bytes=2_000_000)
    told = broker.software.engine is Engine.MOSQUITTO  # MQTT 3.1.1 has no way to say it
    assert link.connect(*WILL).frame_bytes == (1_100_000 - 1024 if told else 2_000_000)
    if told:
        with pytest.raises(PacketTooLargeError, match=r"1100037 bytes.*1100000: raise its maximum packet size"):
            link.publish(f"{UP}/dev/update", bytes(1_100_000))
    link.publish(f"{UP}/dev/update", bytes(1_000_000))
    inbox.next(Connected)
    inbox.next(Published)
    link.disconnect()


def test_what_is_published_arrives_once(broker: RunningBroker, client_id: str) -> None:
    with linked(broker.url, client_id) as (link, inbox):
        link.subscribe([f"{UP}/{client_id}/#"])
        payload = os.urandom(100_000)
        ticket = link.publish(f"{UP}/{client_id}/update", payload)
        events = inbox.set_of(2)  # in either order
        (arrived,) = (event for event in events if isinstance(event, Arrived))
        (published,) = (event for event in events if isinstance(event, Published))
        assert published.ticket == ticket
        assert (arrived.topic, arrived.payload) == (f"{UP}/{client_id}/update", payload)
        assert not arrived.retained
        link.acknowledge([arrived.token])
        assert link.outstanding == 0


def test_retained_messages_are_marked(broker: RunningBroker, client_id: str) -> None:
    topic = f"ternbus/1/{client_id}/all/head"
    with linked(broker.url, f"{client_id}-w") as (writer, written), linked(broker.url, client_id) as (link, inbox):
        writer.publish(topic, b"old", retain=True)
        written.next(Published)
        (stored,) = inbox.stored(link, [topic]).values()
        assert (stored.payload, stored.retained) == (b"old", True)
        writer.publish(topic, b"new", retain=True)
        live = inbox.next(Arrived)
        assert (live.payload, live.retained) == (b"new", False)
        writer.publish(topic, b"", retain=True)
        assert inbox.next(Arrived).payload == b""


def test_more_filters_than_a_packet_holds(broker: RunningBroker, client_id: str) -> None:
    topics = [f"ternbus/1/{client_id}/all/delta/0/{part}" for part in range(20)]
    with linked(broker.url, client_id) as (link, inbox):
        for topic in topics:
            link.publish(topic, b"part", retain=True)
        for _ in topics:
            inbox.next(Published)
        assert all(each.retained for each in inbox.stored(link, topics).values())
        link.unsubscribe(topics[:19])
        link.publish(topics[0], b"to nobody")
        link.publish(topics[19], b"again")
        assert [event.payload for event in inbox.set_of(3) if isinstance(event, Arrived)] == [b"again"]


def test_the_will_is_published_when_the_line_is_cut_and_not_at_leave(broker: RunningBroker, client_id: str) -> None:
    line = Line(broker.endpoint.port)
    with linked(broker.url, f"{client_id}-w") as (watcher, seen):
        watcher.subscribe([f"{UP}/{client_id}/#"])
        watcher.publish(f"{UP}/watcher/metrics", b"once this is through, so is the subscription")
        seen.next(Published)
        with linked(line.url, client_id) as (link, inbox):
            link.publish(f"{UP}/{client_id}/status", b"first")
            inbox.next(Published)
            first = seen.next(Arrived)
            assert first.payload == b"first"
            line.cut()
            assert "lost" in inbox.next(Disconnected).reason
            assert not link.connected
            assert seen.next(Arrived).payload == b"dead"
            link.connect(f"{UP}/{client_id}/status", b"dead again")
            inbox.next(Connected)
            link.disconnect()
        watcher.publish(f"{UP}/{client_id}/metrics", b"after")
        after = [event.payload for event in seen.set_of(2) if isinstance(event, Arrived)]
        assert after == [b"after"]
        with linked(broker.url, f"{client_id}-late") as (late, found):
            (will,) = found.stored(late, [f"{UP}/{client_id}/status"]).values()
            assert (will.payload, will.retained) == (b"dead", True)
    line.close()


def test_the_will_is_published_when_the_link_is_abandoned(broker: RunningBroker, client_id: str) -> None:
    topic = f"{UP}/{client_id}/status"
    with linked(broker.url, f"{client_id}-w") as (watcher, seen), linked(broker.url, client_id) as (link, inbox):
        watcher.subscribe([topic])
        watcher.publish(f"{UP}/watcher/metrics", b"once this is through, so is the subscription")
        seen.next(Published)
        link.connect(topic, b"dead")
        inbox.next(Connected)
        link.abandon()
        states = [link.connected]
        assert seen.next(Arrived).payload == b"dead"
        assert inbox.rest() == []  # our own leaving is no news
        link.connect(topic, b"dead again")
        states.append(link.connected)
        link.disconnect()
        link.abandon()  # without a connection it does nothing
        assert states == [False, True]


def test_a_session_keeps_messages_while_its_client_is_away(broker: RunningBroker, client_id: str) -> None:
    topic = f"{DOWN}/{client_id}/receipt"
    inbox = Inbox()
    link = Link(broker.url, client_id=client_id, deliver=inbox.put)
    link.connect(*WILL)
    link.subscribe([topic])
    link.publish(f"{UP}/{client_id}/metrics", b"so that the subscription has been dealt with")
    inbox.next(Connected)
    inbox.next(Published)
    link.disconnect()
    with linked(broker.url, f"{client_id}-w") as (writer, written):
        for number in range(20):
            writer.publish(topic, bytes([number]))
        for _ in range(20):
            written.next(Published)
    assert link.connect(*WILL).session_present
    inbox.next(Connected)
    arrived = inbox.arrivals(20)
    assert [each.payload for each in arrived] == [bytes([number]) for number in range(20)]
    for each in arrived:
        link.acknowledge([each.token])
    link.disconnect()


def test_what_was_not_acknowledged_comes_again_and_an_old_token_is_worthless(
    broker: RunningBroker, client_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nats, "ACK_WAIT_S", 2)  # nats-server sends again after this time, not at a reconnect
    topic = f"{DOWN}/{client_id}/receipt"
    with start(broker.software, host="127.0.0.1", port=0, directory=tmp_path) as patient:
        line = Line(patient.endpoint.port)
        with linked(line.url, client_id) as (link, inbox), linked(patient.url, f"{client_id}-w") as (writer, written):
            link.subscribe([topic])
            link.publish(f"{UP}/{client_id}/metrics", b"so that the subscription has been dealt with")
            inbox.next(Published)
            for payload in (b"a", b"b"):
                writer.publish(topic, payload)
                written.next(Published)
            first = inbox.arrivals(2)
            line.cut()
            inbox.until(Disconnected)
            link.acknowledge([first[0].token])  # without a connection: no effect
            assert link.connect(*WILL).session_present
            inbox.next(Connected)
            again = sorted(inbox.arrivals(2), key=lambda each: each.payload)
            assert [each.payload for each in again] == [b"a", b"b"]
            link.acknowledge([first[1].token])  # of the old connection: no effect
            link.acknowledge([again[0].token])
            link.publish(f"{UP}/{client_id}/metrics", b"so that the acknowledgement has been dealt with")
            inbox.until(Published)
            line.cut()
            inbox.until(Disconnected)
            link.connect(*WILL)
            inbox.next(Connected)
            assert inbox.next(Arrived).payload == b"b"
        line.close()


def test_a_broker_that_restarts_is_reported_and_found_again(
    client_id: str, broker: RunningBroker, tmp_path: Path
) -> None:
    software = broker.software
    inbox = Inbox()
    with start(software, host="127.0.0.1", port=0, directory=tmp_path) as running:
        link = Link(running.url, client_id=client_id, deliver=inbox.put)
        link.connect(*WILL)
        link.subscribe([f"{DOWN}/{client_id}/#"])
        link.publish(f"{UP}/{client_id}/metrics", b"1")
        inbox.next(Connected)
        inbox.next(Published)
    inbox.next(Disconnected)
    assert inbox.rest() == []
    assert not link.connected
    with pytest.raises(LinkError, match="not connected"):
        link.publish(f"{UP}/{client_id}/metrics", b"2")
    with pytest.raises(LinkError, match=r"cannot connect to mqtt://127.0.0.1:\d+: no broker listens there; start one"):
        link.connect(*WILL)
    with start(software, host="127.0.0.1", port=running.endpoint.port, directory=tmp_path):
        assert link.connect(*WILL).session_present
        inbox.next(Connected)
        link.publish(f"{DOWN}/{client_id}/receipt", b"3")
        events = inbox.set_of(2)
        assert [event.payload for event in events if isinstance(event, Arrived)] == [b"3"]
        link.disconnect()


def test_leaving_waits_for_the_answers(broker: RunningBroker, client_id: str) -> None:
    inbox = Inbox()
    link = Link(broker.url, client_id=client_id, deliver=inbox.put)
    link.connect(*WILL)
    tickets = [link.publish(f"{UP}/{client_id}/update", bytes(120_000)) for _ in range(100)]
    link.disconnect(flush_s=WITHIN_S)
    inbox.next(Connected)
    answered = inbox.rest()
    assert [event.ticket for event in answered if isinstance(event, Published)] == tickets
    assert len(answered) == len(tickets)


def test_a_broker_that_hangs_is_noticed(broker: RunningBroker, client_id: str) -> None:
    with linked(broker.url, client_id, keepalive_s=1) as (_link, inbox):
        os.kill(broker.pid, signal.SIGSTOP)
        try:
            assert "did not answer for 1 s" in inbox.next(Disconnected).reason
        finally:
            os.kill(broker.pid, signal.SIGCONT)


def test_a_second_client_of_the_same_name_takes_over(broker: RunningBroker, client_id: str) -> None:
    with linked(broker.url, client_id) as (first, inbox), linked(broker.url, client_id) as (second, _):
        inbox.next(Disconnected)
        assert not first.connected
        assert second.connected


@pytest.fixture(scope="module")
def confining(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    """Mosquitto with the access list of the protocol; it believes every user name."""
    directory = tmp_path_factory.mktemp("confining")
    with start(
        choose(Engine.MOSQUITTO), host="127.0.0.1", port=0, directory=directory, federations=["demo", "other"]
    ) as running:
        yield running


def test_the_access_list_lets_a_device_write_only_what_is_its_own(confining: RunningBroker) -> None:
    with linked(confining.url, "pi-1", username="pi-1") as (device, answers):
        for topic, allowed in [
            (f"{UP}/pi-1/update", True),
            (f"{UP}/pi-1/update/0", False),
            (f"{UP}/pi-1/garbage", False),
            (f"{UP}/pi-2/update", False),
            (f"{DOWN}/pi-1/receipt", False),
            ("ternbus/1/demo/all/head", False),
            ("elsewhere", False),
        ]:
            ticket = device.publish(topic, b"x")
            expected = Published(ticket=ticket) if allowed else Refused(ticket=ticket, reason="Not authorized")
            assert answers.set_of(1) == [expected], topic


def test_the_access_list_lets_everybody_read_what_is_for_them(confining: RunningBroker) -> None:
    with (
        linked(confining.url, "aggregator-demo", username="aggregator-demo") as (aggregator, at_aggregator),
        linked(confining.url, "pi-1", username="pi-1") as (device, at_device),
    ):
        aggregator.subscribe([f"{UP}/#"])
        aggregator.publish("ternbus/1/demo/all/status", b"once this is through, so is the subscription")
        at_aggregator.next(Published)
        device.subscribe(["ternbus/1/demo/#"])  # granted, and then filtered
        device.publish(f"{UP}/pi-1/update", b"mine")
        at_device.next(Published)
        assert at_aggregator.next(Arrived).payload == b"mine"
        for topic in (f"{DOWN}/pi-2/receipt", f"{DOWN}/pi-1/receipt", "ternbus/1/demo/all/head"):
            aggregator.publish(topic, topic.encode())
            at_aggregator.next(Published)
        assert [each.topic for each in at_device.arrivals(2)] == [f"{DOWN}/pi-1/receipt", "ternbus/1/demo/all/head"]
        ticket = aggregator.publish("ternbus/1/other/all/head", b"not its federation")
        assert at_aggregator.next(Refused).ticket == ticket


def test_the_broker_is_told_our_receive_maximum(confining: RunningBroker) -> None:
    topic = "ternbus/1/other/down/pi-3/receipt"
    with (
        linked(confining.url, "pi-3", username="pi-3", receive_maximum=3) as (link, inbox),
        linked(confining.url, "aggregator-other", username="aggregator-other") as (writer, written),
    ):
        link.subscribe([topic])
        link.publish("ternbus/1/other/up/pi-3/metrics", b"so that the subscription has been dealt with")
        inbox.next(Published)
        for number in range(10):
            writer.publish(topic, bytes([number]))
            written.next(Published)
        waiting = inbox.arrivals(3)
        assert inbox.rest() == []
        for number in range(10):  # from now on mosquitto 2.0.11 sends up to two for each acknowledgement
            if number == len(waiting):
                waiting += inbox.arrivals(1)
            link.acknowledge([waiting[number].token])
        assert [each.payload for each in waiting] == [bytes([number]) for number in range(10)]


# What a scripted broker answers


def test_we_obey_the_brokers_receive_maximum() -> None:
    limits = bytes([0x20, 6, 0, 0, 3, 0x21, 0, 2])  # CONNACK: receive maximum 2

    def script(kind: int, content: bytes) -> bytes:
        return limits if kind == CONNECT else b""

    with scripted(script) as broker, linked(broker.url, "dev") as (link, inbox):
        for _ in range(5):
            link.publish("t", b"x")
        broker.next(CONNECT)
        broker.next(PUBLISH)
        broker.next(PUBLISH)
        link.disconnect(flush_s=0.1)  # no PUBACK comes; what follows the two is our leaving, not the third
        broker.next(DISCONNECT)
        assert inbox.rest() == []


@pytest.mark.parametrize("protocol", [MQTT_5, MQTT_311])
@pytest.mark.parametrize("payload_bytes", [0, 1, 119, 120, 121, 122, 123, 16_377, 16_378, 16_379, 16_380, 100_000])
def test_packet_sizes_are_those_on_the_wire(protocol: int, payload_bytes: int) -> None:
    def script(kind: int, content: bytes) -> bytes | None:
        if kind == CONNECT and content[6] > protocol:
            return bytes([0x20, 2, 0, 1])
        return CONNACK_5 if protocol == MQTT_5 else CONNACK_311

    with scripted(script) as broker, linked(broker.url, "dev") as (link, _):
        link.publish("t", bytes(payload_bytes))
        while (packet := broker.packets.get(timeout=WITHIN_S))[0] != PUBLISH:
            pass
        assert packet[2] == packet_bytes("t", payload_bytes, protocol)


def test_subscriptions_are_cut_into_packets_of_eight() -> None:
    with (
        scripted(lambda kind, _: CONNACK_5 if kind == CONNECT else b"") as broker,
        linked(broker.url, "dev") as (link, _),
    ):
        link.subscribe([f"t/{number}" for number in range(20)])
        broker.next(CONNECT)
        assert [broker.next(SUBSCRIBE).count(b"t/") for _ in range(3)] == [8, 8, 4]


def test_a_refused_subscription_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """nats-server refuses when it is overloaded."""
    monkeypatch.setattr(connection, "ASK_AGAIN_S", 0.0)
    refusals = iter([True, False])

    def script(kind: int, content: bytes) -> bytes:
        if kind != SUBSCRIBE:
            return CONNACK_5 if kind == CONNECT else b""
        codes = bytes([0x80 if next(refusals) else 1, 1])
        return bytes([0x90, 3 + content.count(b"t/")]) + content[:2] + b"\0" + codes[: content.count(b"t/")]

    with scripted(script) as broker, linked(broker.url, "dev") as (link, _):
        link.subscribe(["t/1", "t/2"])
        broker.next(CONNECT)
        assert broker.next(SUBSCRIBE).count(b"t/") == 2
        assert broker.next(SUBSCRIBE).endswith(b"t/1\x01")
    assert "refuses the subscription to t/1" in caplog.text


def test_what_nats_server_answers_leads_to_mqtt_311_and_is_remembered() -> None:
    def script(kind: int, content: bytes) -> bytes | None:
        if kind == CONNECT and content[6] == MQTT_5:
            return bytes([0x20, 2, 0, 1])
        return CONNACK_311 if kind == CONNECT else None

    with scripted(script) as broker, linked(broker.url, "dev") as (link, _):
        link.disconnect()
        link.connect(*WILL)
        packets = [broker.packets.get(timeout=WITHIN_S) for _ in range(4)]
        assert [content[6] if kind == CONNECT else None for kind, content, _ in packets] == [5, 4, None, 4]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (bytes([0x20, 3, 0, 0x86, 0]), "Bad user name or password"),
        (bytes([0x20, 3, 0, 0x87, 0]), "Not authorized"),
        (bytes([0x20, 3, 0, 0x88, 0]), "Server unavailable; the broker cannot serve now, as when its disk is full"),
        (bytes([0x20, 3, 0, 0x97, 0]), "Quota exceeded; the broker cannot serve now, as when its disk is full"),
        (bytes([0x20, 3, 0, 0x9A, 0]), "Retain not supported; Ternbus needs retained messages: allow them"),
    ],
)
def test_other_refusals_are_not_answered_with_an_older_protocol(answer: bytes, reason: str) -> None:
    with scripted(lambda *_: answer) as broker:
        link = Link(broker.url, client_id="dev", deliver=Inbox().put, username="dev", password="wrong")
        with pytest.raises(LinkError, match=f"refuses 'dev': {reason}"):
            link.connect(*WILL)
        assert not link.connected
        broker.next(CONNECT)
        assert broker.packets.empty()


def test_a_broker_without_retained_messages_is_named_at_the_connect() -> None:
    no_retain = bytes([0x20, 5, 0, 0, 2, 0x25, 0])  # CONNACK: retain available 0
    with scripted(lambda *_: no_retain) as broker:
        link = Link(broker.url, client_id="dev", deliver=Inbox().put)
        with pytest.raises(LinkError, match="retains no messages; Ternbus needs retained messages: allow them"):
            link.connect(*WILL)
        assert not link.connected


def test_a_refusal_of_mqtt_311_is_told_too() -> None:
    def script(_kind: int, content: bytes) -> bytes:
        return bytes([0x20, 2, 0, 1 if content[6] == MQTT_5 else 5])

    with scripted(script) as broker, pytest.raises(LinkError, match="refuses 'dev': Not authorized"):
        Link(broker.url, client_id="dev", deliver=Inbox().put).connect(*WILL)


def test_a_broker_of_neither_protocol_is_told() -> None:
    with (
        scripted(lambda *_: bytes([0x20, 2, 0, 1])) as broker,
        pytest.raises(LinkError, match=r"closed the connection|neither"),
    ):
        Link(broker.url, client_id="dev", deliver=Inbox().put).connect(*WILL)


@pytest.mark.parametrize(
    ("script", "message", "timeout_s"),
    [
        (
            lambda *_: None,
            "and without TLS: the port is not for MQTT, or the broker cannot serve now, as when its disk is full",
            WITHIN_S,
        ),
        (lambda *_: b"", "is open but does not answer; check that the port is for MQTT without TLS", 0.3),
        (lambda *_: b"HTTP/1.1 400 Bad Request\r\n\r\n", "check that the port is for MQTT without TLS", 0.3),
    ],
)
def test_a_port_that_does_not_speak_mqtt(
    script: Callable[[int, bytes], bytes | None], message: str, timeout_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT_S", timeout_s)
    with scripted(script) as broker, pytest.raises(LinkError) as caught:
        Link(broker.url, client_id="dev", deliver=Inbox().put).connect(*WILL)
    assert message in str(caught.value)
    assert broker.url in str(caught.value)


def test_why_the_broker_ends_the_connection_is_told() -> None:
    def script(kind: int, _content: bytes) -> bytes:
        return CONNACK_5 if kind == CONNECT else bytes([DISCONNECT, 2, 0x8E, 0])

    with scripted(script) as broker, linked(broker.url, "dev") as (link, inbox):
        link.publish("t", b"x")
        assert inbox.next(Disconnected).reason == (
            "the broker ended the connection: Session taken over; another client uses the client id 'dev': "
            "stop one of them"
        )


def test_leaving_a_broker_that_does_not_answer_comes_to_an_end() -> None:
    with (
        scripted(lambda kind, _: CONNACK_5 if kind == CONNECT else b"") as broker,
        linked(broker.url, "dev") as (link, _),
    ):
        link.publish("t", b"x")
        leaving = threading.Thread(target=link.disconnect, kwargs={"flush_s": 0.2})
        leaving.start()
        assert [broker.packets.get(timeout=WITHIN_S)[0] for _ in range(3)] == [CONNECT, PUBLISH, DISCONNECT]
        leaving.join(WITHIN_S)
        assert not leaving.is_alive()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionRefusedError(), "no broker listens there; start one with `ternbus broker up` or check the URL"),
        (socket.gaierror(), "unknown host name pi.local; check the broker's URL"),
        (TimeoutError(), "no answer in time; check the broker's URL, the network and the firewall"),
        (OSError(113, "No route to host"), "No route to host"),
    ],
)
def test_silence_is_explained(error: OSError, message: str) -> None:
    said = connect_errors.explain(Endpoint(host="pi.local", port=1883), error)
    assert said.startswith("cannot connect to mqtt://pi.local:1883")
    assert said.endswith(message)


@pytest.mark.parametrize(
    ("code", "what", "mend"),
    [
        (9, "certificate is not yet valid", "set this machine's clock"),
        (10, "certificate has expired", "broker renew"),
        (19, "self-signed", "ca.pem in the folder"),
    ],
)
def test_a_certificate_that_is_not_believed_is_explained(code: int, what: str, mend: str) -> None:
    error = ssl.SSLCertVerificationError()
    error.verify_code, error.verify_message = code, what
    said = connect_errors.explain(Endpoint(host="pi.local", port=8883, tls=True), error)
    assert f"not trusted ({what})" in said
    assert mend in said


def test_a_refused_login_names_the_options_and_the_keys_of_a_password() -> None:
    for code in (0x86, 0x87):
        said = connect_errors.refused(Endpoint(host="pi.local", port=8883, tls=True), "pi", code, "Not authorized")
        assert said.startswith("the broker at mqtts://pi.local:8883 refuses 'pi': Not authorized; ")
        assert all(word in said for word in ("--username", "--password-file", "password_file", "edge.toml"))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("mqtt://pi.local", Endpoint(host="pi.local", port=1883)),
        ("mqtt://127.0.0.1:1884/", Endpoint(host="127.0.0.1", port=1884)),
        ("mqtts://broker.example.org", Endpoint(host="broker.example.org", port=8883, tls=True)),
        ("mqtt://[::1]:1883", Endpoint(host="::1", port=1883)),
    ],
)
def test_urls(url: str, expected: Endpoint) -> None:
    assert Endpoint.parse(url) == expected
    assert Endpoint.parse(str(expected)) == expected


@pytest.mark.parametrize(
    "url",
    ["", "localhost", "localhost:1883", "http://localhost", "mqtt://", "mqtt://h:0", "mqtt://h:99999", "mqtt://h:x",
     "mqtt://h/topic", "mqtt://h?x=1", "mqtt://[::1"],
)  # fmt: skip
def test_a_malformed_url_is_the_operators_to_mend(url: str) -> None:
    with pytest.raises(ConfigError, match=r"invalid broker URL .* use mqtt://HOST:PORT or mqtts://HOST:PORT"):
        Link(url, client_id="dev", deliver=Inbox().put)


def test_a_password_in_a_url_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        Endpoint.parse("mqtt://me:secret@host")
    assert "secret" not in str(caught.value)
