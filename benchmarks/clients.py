"""Many emulated devices in one process: one selector, a socket for each device, and the needed part of MQTT 3.1.1.

The process emulates the messages of devices: persistent session, last will, subscriptions, enrolment, status, and
updates that are sent again if no receipt arrives. It does not train, and does not verify received messages.
"""

import random
import selectors
import socket
import struct
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Final

from benchmarks import mqtt
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import build, parse
from ternbus.broker.protocol.identity import Identity, enroll_proof
from ternbus.broker.protocol.messages import Enroll, Receipt, Status, Update
from ternbus.broker.protocol.model_messages import Head
from ternbus.edge.core.profile import ENROLL_SEQ, OFFLINE, subscriptions

CONNECTING_MAX: Final = 32  # at the same time, since brokers listen with a backlog of about 100
KEEPALIVE_S: Final = 120
PING_S: Final = 50.0
RESEND_S: Final = 10.0
CONNACK, PUBLISH, SUBACK = 2, 3, 9
WILL_SEQ: Final = ENROLL_SEQ + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """The parameters of one process: the broker, the devices' keys and codes, and the update that each device sends."""

    host: str
    port: int
    federation: str
    codes: Mapping[str, str]  # invitation codes by device
    seeds: Mapping[str, bytes]
    codec: str
    encoding: str
    body: bytes


@dataclass(slots=True)
class Answers:
    """The results of one phase: (sent at, answered at) on the monotonic clock, and outcomes."""

    times: list[tuple[float, float]] = field(default_factory=list)
    outcomes: Counter[str] = field(default_factory=Counter)
    resent: int = 0
    lost: int = 0  # connections


@dataclass(slots=True, eq=False)
class Device:
    """The state of one emulated device: its connection, and the message that waits for a receipt."""

    name: str
    identity: Identity
    line: socket.socket | None = None
    received: bytes = b""
    packet: int = 0
    seq: int = ENROLL_SEQ
    asked_at: float = 0.0
    sent_at: float = 0.0
    last_sent_at: float = 0.0
    version: int = -1  # of the newest received head
    question: bytes = b""  # the packet that waits for a receipt

    def next_packet(self) -> int:
        self.packet = self.packet % 65_535 + 1
        return self.packet

    def send(self, content: bytes) -> None:
        if self.line is not None:
            self.line.sendall(content)
            self.last_sent_at = time.monotonic()


class Clients:
    """Executes commands from the pipe: ``join``, ``send`` (over some seconds), ``one``, ``heads``, ``end``."""

    def __init__(self, task: Task, pipe: Connection) -> None:
        self._task = task
        self._pipe = pipe
        self._selector = selectors.DefaultSelector()
        self._selector.register(pipe, selectors.EVENT_READ)
        self._devices = [Device(name, Identity(seed)) for name, seed in task.seeds.items()]
        self._to_connect: deque[Device] = deque()
        self._to_send: deque[tuple[float, Device]] = deque()
        self._waiting: dict[Device, None] = {}  # devices without a receipt
        self._connecting = 0
        self._answers: Answers | None = None
        self._versions: dict[bytes, int] = {}  # version by content of each received head
        self._version = 0
        self._heads: defaultdict[int, list[float]] = defaultdict(list)  # version -> arrivals, Unix time
        self._looked_at = 0.0
        self._ended = False

    def run(self) -> None:
        """Run until the command ``end``."""
        self._pipe.send("ready")
        while not self._ended:
            for key, _ in self._selector.select(self._timeout_s()):
                if isinstance(key.data, Device):
                    self._receive(key.data)
                else:
                    self._execute(*self._pipe.recv())
            self._work(time.monotonic())

    def _timeout_s(self) -> float:
        if self._to_connect and self._connecting < CONNECTING_MAX:
            return 0.0
        return max(0.0, min(0.5, self._to_send[0][0] - time.monotonic())) if self._to_send else 0.5

    def _execute(self, command: str, argument: float) -> None:
        match command:
            case "join":
                self._answers = Answers()
                self._to_connect.extend(self._devices)
            case "send":
                self._answers = Answers()
                now, chance = time.monotonic(), random.Random(0)  # noqa: S311 - no secret
                dues = sorted(now + argument * chance.random() for _ in self._devices)
                self._to_send.extend(zip(dues, chance.sample(self._devices, len(self._devices)), strict=True))
            case "one":
                self._answers = Answers()
                self._to_send.append((time.monotonic(), self._devices[int(argument)]))
            case "heads":
                self._pipe.send(dict(self._heads))
            case "end":
                self._ended = True
            case _:
                raise AssertionError(f"unknown command: {command}")

    def _work(self, now: float) -> None:
        while self._to_connect and self._connecting < CONNECTING_MAX:
            self._connect(self._to_connect.popleft())
        while self._to_send and self._to_send[0][0] <= now:
            self._update(self._to_send.popleft()[1])
        if now - self._looked_at >= 1.0:
            self._looked_at = now
            self._resend_and_ping(now)
        if self._answers is not None and not (
            self._waiting or self._to_send or self._to_connect or self._connecting or not self._answers.times
        ):
            answers, self._answers = self._answers, None
            self._pipe.send(answers)

    def _resend_and_ping(self, now: float) -> None:
        for device in [each for each in self._waiting if each.sent_at < now - RESEND_S]:
            device.sent_at = now
            device.send(device.question)
            if self._answers is not None:
                self._answers.resent += 1
        for device in self._devices:
            if device.line is not None and device.last_sent_at < now - PING_S:
                device.send(b"\xc0\0")

    # --- sending

    def _connect(self, device: Device) -> None:
        will = self._status(device, OFFLINE, WILL_SEQ)
        topic = topics.up(self._task.federation, device.name, Status.KIND)
        flags = 0x20 | 0x08 | 0x04  # retained will with QoS 1, persistent session
        about = mqtt.text("MQTT") + bytes((4, flags)) + struct.pack(">H", KEEPALIVE_S)
        device.line = socket.create_connection((self._task.host, self._task.port), timeout=30.0)
        device.line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector.register(device.line, selectors.EVENT_READ, device)
        self._connecting += 1
        device.send(mqtt.packet(0x10, about + mqtt.text(device.name) + mqtt.text(topic) + mqtt.binary(will)))

    def _subscribe(self, device: Device) -> None:
        filters = subscriptions(self._task.federation, device.name)
        asked = b"".join(mqtt.text(each) + b"\x01" for each in filters)
        device.send(mqtt.packet(0x82, struct.pack(">H", device.next_packet()) + asked))

    def _enroll(self, device: Device) -> None:
        federation, public = self._task.federation, device.identity.public
        proof = enroll_proof(self._task.codes[device.name], federation, device.name, public)
        self._ask(device, Enroll.KIND, Enroll(public_key=public).meta(), proof)

    def _update(self, device: Device) -> None:
        task = self._task
        update = Update(
            base=self._version,
            samples=100,
            codec=task.codec,
            encoding=task.encoding,
            sealed=False,
            metrics={"loss": 0.5},
        )
        self._ask(device, Update.KIND, update.meta(), task.body)

    def _ask(self, device: Device, kind: str, meta: Mapping[str, Any], body: bytes) -> None:
        device.question = self._publication(device, kind, self._frame(device, kind, device.seq, meta, body))
        device.asked_at = device.sent_at = time.monotonic()
        self._waiting[device] = None
        device.send(device.question)

    def _status(self, device: Device, state: str, seq: int) -> bytes:
        meta = Status(state=state, session=1, software="ternbus bench").meta()
        return self._frame(device, Status.KIND, seq, meta, b"")

    def _frame(self, device: Device, kind: str, seq: int, meta: Mapping[str, Any], body: bytes) -> bytes:
        name, federation = device.name, self._task.federation
        return build(device.identity, federation=federation, sender=name, kind=kind, seq=seq, meta=meta, body=body)

    def _publication(self, device: Device, kind: str, payload: bytes, *, retain: bool = False) -> bytes:
        topic = mqtt.text(topics.up(self._task.federation, device.name, kind))
        return mqtt.packet(0x32 | retain, topic + struct.pack(">H", device.next_packet()) + payload)

    # --- receiving

    def _receive(self, device: Device) -> None:
        assert device.line is not None
        content = device.line.recv(1 << 16)
        if not content:
            self._lose(device)
            return
        device.received += content
        acknowledgements = []
        for kind, body in self._packets(device):
            if kind >> 4 == PUBLISH:
                acknowledgements.append(b"\x40\x02" + self._take_in(device, body))
            elif kind >> 4 == CONNACK:
                assert body[1] == 0, f"the broker refuses {device.name} with code {body[1]}"
                self._connecting -= 1
                self._subscribe(device)
            elif kind >> 4 == SUBACK:
                self._enroll(device)
        if acknowledgements:
            device.send(b"".join(acknowledgements))

    def _packets(self, device: Device) -> Iterator[tuple[int, bytes]]:
        content, start = device.received, 0
        while (found := mqtt.length(content, start + 1)) is not None:
            length, first = found
            if len(content) < first + length:
                break
            yield content[start], content[first : first + length]
            start = first + length
        device.received = content[start:]

    def _take_in(self, device: Device, body: bytes) -> bytes:
        """Handle a message with QoS 1; return its packet identifier."""
        end = 2 + int.from_bytes(body[:2], "big")
        topic, payload = body[2:end].decode(), body[end + 2 :]
        if topic.endswith("/receipt"):
            self._answered(device, Receipt.from_meta(parse(payload).meta))
        elif topic.endswith("/head"):
            self._head_arrived(device, payload, time.time())
        return body[end : end + 2]

    def _head_arrived(self, device: Device, head: bytes, arrived: float) -> None:
        if head not in self._versions:
            self._versions[head] = Head.from_meta(parse(head).meta).version
            self._version = max(self._version, self._versions[head])
        version = self._versions[head]
        if version > device.version:  # a new snapshot causes a second head of the same version
            device.version = version
            self._heads[version].append(arrived)

    def _answered(self, device: Device, receipt: Receipt) -> None:
        if self._answers is None or device not in self._waiting or receipt.seq != device.seq:
            return  # the second receipt for a repeated message
        del self._waiting[device]
        self._answers.times.append((device.asked_at, time.monotonic()))
        self._answers.outcomes[receipt.outcome] += 1
        device.seq += 1
        if receipt.outcome == "enrolled":
            device.seq = WILL_SEQ + 1
            status = self._status(device, "idle", device.seq)
            device.send(self._publication(device, Status.KIND, status, retain=True))
            device.seq += 1

    def _lose(self, device: Device) -> None:
        assert device.line is not None
        self._selector.unregister(device.line)
        device.line.close()
        device.line = None
        self._waiting.pop(device, None)
        if self._answers is not None:
            self._answers.lost += 1


def serve(task: Task, pipe: Connection) -> None:
    """The main function of the process."""
    Clients(task, pipe).run()


def shares(names: Sequence[str], number: int) -> list[list[str]]:
    """The names, divided among ``number`` processes."""
    return [list(names[first::number]) for first in range(number)]
