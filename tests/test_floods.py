"""Floods through a real broker: the aggregator's memory is bounded, its counts tell, and others are served."""

import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgpack
import pytest

from benchmarks import mqtt
from benchmarks.sender import Line, Target, await_retained
from stranger.models import SMALL, make_model
from stranger.servers import COMMAND, ENGINES, ENVIRONMENT, Aggregator, Broker, until
from support.brokers import CONNECT, linked, scripted
from support.small_world import Device
from ternbus.broker.link.events import Arrived
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import MAGIC, parse
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.protocol.schema import Schema

pytestmark = pytest.mark.slow

FEDERATION = "lab"
BODY_BYTES = 44_000
GROWTH_KIB = 80 * 1024  # twice what may wait, unacknowledged, for a core that does not come to it


@dataclass(frozen=True, slots=True)
class Siege:
    """An aggregator under attack, and who looks on."""

    url: str
    aggregator: Aggregator

    def line(self, name: str) -> Line:
        address = urlsplit(self.url)
        return Line(Target(address.hostname or "", address.port or 0, FEDERATION, "", b""), name)

    def enrolls(self, name: str) -> bool:
        """Whether a newcomer is admitted: which is that the aggregator has come to what it sent."""
        invitation = Invitation.loads(self.aggregator.invite(name)[name].read_text())
        device = Device(name, SCHEMA)
        frame = device.enroll(invitation.code)
        with linked(self.url, name, username=name) as (link, inbox):
            link.subscribe([topics.down(FEDERATION, name, "receipt")])
            link.publish(topics.up(FEDERATION, name, "enroll"), frame)
            return bool(parse(inbox.until(Arrived).payload).meta["outcome"] == "enrolled")

    def invalid(self) -> dict[str, Any]:
        found: dict[str, Any] = self.aggregator.status()["counts"]["invalid"]
        return found


SCHEMA = Schema.of({name: tuple(shape) for name, shape in SMALL.items()})


def costly() -> bytes:
    """A frame of nobody, with a header of 15,900 empty maps, which once took 12 ms to read."""
    about = {"kind": "update", "federation": FEDERATION, "sender": "eve", "key": bytes(8), "seq": 1, "part": [0, 1]}
    header = msgpack.packb({**about, "digest": bytes(32), "meta": {"later": [{}] * 15_900}})
    return b"".join((MAGIC, len(header).to_bytes(4, "little"), header, bytes(64 + BODY_BYTES)))


@pytest.fixture(params=ENGINES)
def siege(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Siege]:
    make_model(tmp_path / "model.safetensors", SMALL)
    with Broker(request.param, tmp_path / "broker") as broker:
        aggregator = Aggregator(
            tmp_path / "aggregator",
            federation=FEDERATION,
            broker=broker.url,
            model=tmp_path / "model.safetensors",
            settings={},
        )
        with aggregator:
            found = Siege(broker.url, aggregator)
            address = urlsplit(broker.url)
            await_retained(
                Target(address.hostname or "", address.port or 0, FEDERATION, "", b""), topics.status(FEDERATION)
            )
            yield found


@pytest.mark.parametrize("group", ["up/eve/update", "all/status"])
def test_what_comes_at_qos_0_is_dropped_unread_and_counted(group: str, siege: Siege) -> None:
    """180 MB at full speed: they were all held, with a newcomer behind them."""
    assert siege.enrolls("first")
    line = siege.line("eve")
    packet = mqtt.packet(0x30, mqtt.text(f"{topics.root(FEDERATION)}/{group}") + costly())
    before = siege.aggregator.resident_kib()
    peak = 0
    for number in range(3000):
        line.socket.sendall(packet)
        if number % 100 == 0:
            peak = max(peak, siege.aggregator.resident_kib())
    assert siege.enrolls("second")
    until(lambda: siege.invalid().get("qos-0", 0) > 0, 30, "a count")
    assert max(peak, siege.aggregator.resident_kib()) - before < GROWTH_KIB
    line.socket.close()


def test_of_a_stranger_little_is_read_and_little_is_held(siege: Siege) -> None:
    """180 MB at QoS 1, on a topic of nobody, as fast as the broker takes them."""
    assert siege.enrolls("first")
    line, frame = siege.line("eve"), costly()
    before = siege.aggregator.resident_kib()
    peak = 0
    for number in range(3000):
        head = mqtt.text(topics.up(FEDERATION, "eve", "update")) + (number + 1).to_bytes(2, "big")
        line.socket.sendall(mqtt.packet(0x32, head + frame))
        if number % 100 == 99:
            answered = 0
            while answered < 100:
                answered += sum(kind >> 4 == 4 for kind, _ in line.packets())
            peak = max(peak, siege.aggregator.resident_kib())
    assert siege.enrolls("second")
    assert max(peak, siege.aggregator.resident_kib()) - before < GROWTH_KIB
    until(lambda: siege.invalid().get("too-fast", 0) > 1000, 30, "a count")
    line.socket.close()


@pytest.mark.parametrize("siege", ["mosquitto"], indirect=True)  # nats-server speaks MQTT 3.1.1, without properties
def test_a_megabyte_of_properties_is_dropped_unread(siege: Siege) -> None:
    """One message of a stranger: the aggregator read it for minutes, was taken for dead, and got it again."""
    assert siege.enrolls("first")
    address, properties = urlsplit(siege.url), b"\x26\0\0\0\0" * 200_000
    content = mqtt.text(topics.up(FEDERATION, "eve", "status")) + b"\x00\x01" + mqtt.packet(0, properties)[1:]
    with socket.create_connection((address.hostname, address.port), timeout=60) as line:
        line.sendall(mqtt.packet(0x10, mqtt.text("MQTT") + b"\x05\x02\x00\x00\x00" + mqtt.text("eve")))
        assert line.recv(100)[0] >> 4 == 2
        line.sendall(mqtt.packet(0x32, content + b"not a frame"))
        assert line.recv(100)[0] >> 4 == 4
        assert siege.enrolls("second")
    until(lambda: siege.invalid().get("not-a-frame", 0) == 1, 30, "a count")


def too_small(kind: int, _content: bytes) -> bytes:
    """A broker that takes packets of 100 bytes."""
    return bytes([0x20, 8, 0, 0, 5, 0x27, 0, 0, 0, 100]) if kind == CONNECT else b""


def test_a_broker_of_tiny_packets_is_waited_for_and_ends_nobody_for_good(tmp_path: Path) -> None:
    make_model(tmp_path / "model.safetensors", SMALL)
    with scripted(too_small) as broker:
        aggregator = Aggregator(
            tmp_path / "aggregator",
            federation=FEDERATION,
            broker=broker.url,
            model=tmp_path / "model.safetensors",
            settings={},
        )
        invitation = aggregator.invite("pi")["pi"]
        with aggregator:
            for _ in range(2):
                broker.next(CONNECT)
            assert aggregator.alive
            assert "at most 100 bytes, Ternbus needs 5120: raise its maximum packet size" in aggregator.log.read_text()
            assert aggregator.terminate() == 0
        command = [*COMMAND, "edge", "join", str(invitation), str(tmp_path / "pi")]
        command += ["--task", "digits-numpy", "--timeout", "1"]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1, done
        assert "Ternbus needs 5120" in done.stdout + done.stderr
