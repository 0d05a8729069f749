"""Load generator: senders of prepared updates, which use little CPU during a measurement.

Before the measurement a sender signs its updates, splits them into frames and encodes them as MQTT 3.1.1 packets. Then
it keeps a window of unanswered updates, acknowledges each receipt, and records its time.
"""

import multiprocessing
import selectors
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from benchmarks import mqtt
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.messages import Receipt, Update
from ternbus.broker.protocol.parts import cut
from ternbus.broker.protocol.ternary import ZSTD

SENDERS: Final = 2
WITHIN_S: Final = 60.0
CONNACK, PUBLISH, SUBACK = 2, 3, 9
SOCKET_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The load: ``updates`` devices send one update each, with at most ``window`` unanswered ones in each process."""

    parameters: int
    updates: int
    window: int
    frame_bytes: int
    per_s: float = 0.0  # updates per second of all senders; 0 means as fast as receipts arrive
    patience_s: float = WITHIN_S  # seconds without a receipt after which a sender gives up


@dataclass(frozen=True, slots=True)
class Target:
    """The broker and federation that senders use, and the body of every update."""

    host: str
    port: int
    federation: str
    codec: str
    body: bytes

    def frames(self, number: int, frame_bytes: int) -> list[bytes]:
        """The parts of one device's signed update to version 0."""
        update = Update(base=0, samples=100, codec=self.codec, encoding=ZSTD, sealed=False, metrics={"loss": 0.5})
        return cut(
            identity(number),
            federation=self.federation,
            sender=device(number),
            kind=update.KIND,
            seq=1,
            meta=update.meta(),
            body=self.body,
            frame_bytes=frame_bytes,
        )


@dataclass(frozen=True, slots=True)
class Answered:
    """The results of one sender: (sent at, receipt at) of each update on the monotonic clock, and outcomes."""

    times: list[tuple[float, float]] = field(default_factory=list)
    outcomes: dict[str, int] = field(default_factory=dict)


def identity(number: int) -> Identity:
    """The key of device ``number``, derived from the number: for benchmarks only."""
    return Identity(number.to_bytes(32, "big"))


def device(number: int) -> str:
    return f"d{number}"


def packets_of(number: int, about: Target, frame_bytes: int) -> list[bytes]:
    """The PUBLISH packets (QoS 1) with the parts of one device's signed update."""
    head = mqtt.text(topics.up(about.federation, device(number), Update.KIND)) + b"\x00\x01"
    return [mqtt.packet(0x32, head + frame) for frame in about.frames(number, frame_bytes)]


class Line:
    """A raw MQTT connection to the broker."""

    def __init__(self, about: Target, client: str) -> None:
        self.socket = socket.create_connection((about.host, about.port), timeout=WITHIN_S)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BYTES)
        self._received = b""
        self.socket.sendall(mqtt.packet(0x10, mqtt.text("MQTT") + b"\x04\x02\x00\x00" + mqtt.text(client)))
        while not any(kind >> 4 == CONNACK for kind, _ in self.packets()):
            pass

    def subscribe(self, wanted: str) -> None:
        self.socket.sendall(mqtt.packet(0x82, b"\x00\x01" + mqtt.text(wanted) + b"\x01"))

    def packets(self) -> list[tuple[int, bytes]]:
        """Wait for data, and return the complete packets."""
        content, start, found = self._received + self.socket.recv(SOCKET_BYTES), 0, []
        assert len(content) > len(self._received), "the broker has closed the connection"
        while (size := mqtt.length(content, start + 1)) is not None:
            length, first = size
            if len(content) < first + length:
                break
            found.append((content[start], content[first : first + length]))
            start = first + length
        self._received = content[start:]
        return found


def await_retained(about: Target, topic: str) -> None:
    """Wait until the topic has a retained message."""
    line = Line(about, "waits")
    line.subscribe(topic)
    while not any(kind >> 4 == PUBLISH for kind, _ in line.packets()):
        pass
    line.socket.close()


class Sender:
    """One sender with its prepared updates and their receipts."""

    def __init__(self, about: Target, load: Load, first: int) -> None:
        self._load = load
        self._ready = [(n, packets_of(n, about, load.frame_bytes)) for n in range(first, load.updates, SENDERS)]
        self._sent: dict[str, float] = {}
        self._answered = Answered()
        self._line = Line(about, f"sender-{first}")
        self._line.subscribe(topics.down(about.federation, "+", Receipt.KIND))
        while not any(kind >> 4 == SUBACK for kind, _ in self._line.packets()):
            pass

    def send_all(self) -> Answered:
        """Send all updates; return when the last receipt has arrived, or none for `WITHIN_S`."""
        total, position, begun = len(self._ready), 0, time.monotonic()
        readable = selectors.DefaultSelector()
        readable.register(self._line.socket, selectors.EVENT_READ)
        while len(self._answered.times) < total:
            patience = self._load.patience_s
            while position < total and position - len(self._answered.times) < self._load.window:
                due = begun + position * SENDERS / self._load.per_s if self._load.per_s else 0.0
                if (patience := due - time.monotonic()) > 0:
                    break
                patience = self._load.patience_s
                number, packets = self._ready[position]
                self._sent[device(number)] = due or time.monotonic()
                for packet in packets:
                    self._line.socket.sendall(packet)
                self._ready[position] = (number, [])  # to free the memory of a large update
                position += 1
            if readable.select(patience):
                self._receive()
            elif patience == self._load.patience_s:
                break
        self._line.socket.close()
        return self._answered

    def _receive(self) -> None:
        acknowledgements = []
        for kind, body in self._line.packets():
            if kind >> 4 != PUBLISH:
                continue
            end = 2 + int.from_bytes(body[:2], "big")
            acknowledgements.append(b"\x40\x02" + body[end : end + 2])
            name = body[2:end].decode().split("/")[4]
            if (sent := self._sent.pop(name, None)) is not None:
                self._answered.times.append((sent, time.monotonic()))
                outcome = Receipt.from_meta(parse(body[end + 2 :]).meta).outcome
                self._answered.outcomes[outcome] = self._answered.outcomes.get(outcome, 0) + 1
        self._line.socket.sendall(b"".join(acknowledgements))


def send(about: Target, load: Load, first: int, go: Any, results: Any) -> None:
    """The main function of a sender process, for devices first, first + SENDERS, …"""
    sender = Sender(about, load, first)
    results.put(None)
    go.wait()
    results.put(sender.send_all())


def run_load(about: Target, load: Load) -> Sequence[Answered]:
    """Start the senders, let them begin together, and collect their results."""
    context = multiprocessing.get_context("spawn")
    go, results = context.Event(), context.Queue()
    processes = [context.Process(target=send, args=(about, load, first, go, results)) for first in range(SENDERS)]
    for process in processes:
        process.start()
    for _ in processes:
        assert results.get(timeout=120) is None
    go.set()
    answered = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return answered
