"""A Byzantine TCP proxy between real clients and a real broker: it parses MQTT and attacks what is published."""

import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import IO

from support.byzantine_broker import Adversary, Fault

CONNECT, PUBLISH, PUBACK = 0x10, 0x30, 0x40
V5 = 5
Packet = tuple[int, bytes]


class ByzantineProxy:
    """``up`` attacks what devices publish, ``down`` what any client gets. What it changes it sends at QoS 0."""

    def __init__(self, port: int, up: Adversary, down: Adversary) -> None:
        self.up, self.down = up, down
        self._target = port
        self._lock = threading.RLock()
        self._ends: list[socket.socket] = []
        self._sends: list[Callable[[str, bytes], None]] = []  # one for each connection, to its client
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"mqtt://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def inject(self, adversary: Adversary, faults: Iterable[Fault]) -> None:
        with self._lock:
            adversary.faults.extend(faults)

    def replay(self, client: int, chosen: list[int]) -> None:
        """Send one client messages that some client got before."""
        with self._lock:
            observed = self.down.observed
            if observed and self._sends:
                for number in chosen:
                    with suppress(OSError):
                        self._sends[client % len(self._sends)](*observed[number % len(observed)])

    def deliver_late(self) -> None:
        with self._lock, suppress(OSError):
            self.up.release_delayed()
            self.down.release_delayed()

    def become_honest(self) -> None:
        with self._lock:
            self.up.stop()
            self.down.stop()
        self.cut()

    def cut(self) -> None:
        with self._lock:
            self._sends.clear()
            while self._ends:
                with suppress(OSError):
                    self._ends.pop().shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    near.close()
                    continue
                threading.Thread(target=_Connection(self, near, far).run, daemon=True).start()

    def opened(self, near: socket.socket, far: socket.socket, send: Callable[[str, bytes], None]) -> None:
        with self._lock:
            self._ends += [near, far]
            self._sends.append(send)

    def pass_on(self, adversary: Adversary, topic: str, payload: bytes, send: Callable[[str, bytes], None]) -> None:
        with self._lock:
            self.down.observe(topic, payload)
            adversary.pass_on(topic, payload, send)


class _Connection:
    """One client's connection, both directions."""

    def __init__(self, line: ByzantineProxy, near: socket.socket, far: socket.socket) -> None:
        self.line, self.near, self.far = line, near, far
        self.protocol = V5
        self.is_device = False
        self._writing = {near: threading.Lock(), far: threading.Lock()}

    def run(self) -> None:
        stream = self.near.makefile("rb")
        with suppress(OSError, EOFError, IndexError):
            packet = read(stream)
            self.protocol = packet[1][6]
            self.is_device = b"aggregator-" not in packet[1]
            self._write(self.far, written(packet))
            self.line.opened(self.near, self.far, lambda topic, payload: self._send(self.near, topic, payload))
            threading.Thread(target=self._down, daemon=True).start()
            self._pump(stream, self.far, self.near, self.line.up if self.is_device else Adversary())
        self._end(stream)

    def _down(self) -> None:
        stream = self.far.makefile("rb")
        with suppress(OSError, EOFError, IndexError):
            self._pump(stream, self.near, self.far, self.line.down)
        self._end(stream)

    def _end(self, stream: IO[bytes]) -> None:
        stream.close()
        for end in (self.near, self.far):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _pump(self, source: IO[bytes], sink: socket.socket, back: socket.socket, adversary: Adversary) -> None:
        while True:
            packet = read(source)
            if packet[0] & 0xF0 == PUBLISH:
                self._published(packet, sink, back, adversary)
            else:
                self._write(sink, written(packet))

    def _published(self, packet: Packet, sink: socket.socket, back: socket.socket, adversary: Adversary) -> None:
        first, content = packet
        at = 2 + int.from_bytes(content[:2], "big")
        topic = content[2:at].decode()
        number = b""
        if first & 6:
            number, at = content[at : at + 2], at + 2
        if self.protocol == V5:
            length, used = variable(content[at:])
            at += used + length
        payload = content[at:]
        passed = False
        here = True

        def send(to: str, content: bytes) -> None:
            nonlocal passed
            if here and not passed and (to, content) == (topic, payload):
                passed = True
                self._write(sink, written(packet))
            else:
                self._send(sink, to, content, retain=first & 1)

        self.line.pass_on(adversary, topic, payload, send)
        here = False
        if number and not passed:
            self._write(back, bytes([PUBACK, 2]) + number)  # "it has arrived"

    def _send(self, sink: socket.socket, topic: str, payload: bytes, *, retain: int = 0) -> None:
        name = topic.encode()
        properties = b"\0" if self.protocol == V5 else b""
        self._write(sink, written((PUBLISH | retain, len(name).to_bytes(2, "big") + name + properties + payload)))

    def _write(self, sink: socket.socket, data: bytes) -> None:
        with self._writing[sink]:
            sink.sendall(data)


def read(stream: IO[bytes]) -> Packet:
    """One control packet: its first byte, and what follows its length (MQTT 5.0 §2.1)."""
    first = stream.read(1)
    if not first:
        raise EOFError
    length = shift = 0
    while True:
        byte = stream.read(1)[0]
        length |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            content = stream.read(length)
            if len(content) < length:
                raise EOFError
            return first[0], content


def written(packet: Packet) -> bytes:
    length, encoded = len(packet[1]), b""
    while True:
        length, digit = divmod(length, 128)
        encoded += bytes([digit | (128 if length else 0)])
        if not length:
            return bytes([packet[0]]) + encoded + packet[1]


def variable(data: bytes) -> tuple[int, int]:
    """A variable byte integer and how many bytes it takes."""
    value = 0
    for used, byte in enumerate(data[:4]):
        value |= (byte & 127) << 7 * used
        if byte < 128:
            return value, used + 1
    raise EOFError
