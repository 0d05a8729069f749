"""What the tests of the bus put around a broker: an inbox for events, a line that can be cut, a scripted broker."""

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from ternbus.broker.link.events import Arrived, Connected, Published, Refused
from ternbus.broker.link.link import Link, LinkEvent

WITHIN_S = 60.0  # ends a wait for what never comes; what comes takes a moment
CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, DISCONNECT = 0x10, 0x20, 0x30, 0x40, 0x80, 0xE0

Event = TypeVar("Event", bound=LinkEvent)


class Inbox:
    """The events of one link, in order. Every wait ends, and an event that was not expected ends it at once."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[LinkEvent] = queue.SimpleQueue()
        self.put = self._events.put

    def next(self, kind: type[Event]) -> Event:
        event = self._events.get(timeout=WITHIN_S)
        assert isinstance(event, kind), event
        return event

    @property
    def is_empty(self) -> bool:
        return self._events.empty()

    def settled(self) -> Published | Refused:
        """How the broker answered a publication."""
        event = self._events.get(timeout=WITHIN_S)
        assert isinstance(event, Published | Refused), event
        return event

    def until_settled(self) -> list[LinkEvent]:
        """What comes before the broker's answer to a publication."""
        before: list[LinkEvent] = []
        while not isinstance(event := self._events.get(timeout=WITHIN_S), Published | Refused):
            before.append(event)
        return before

    def until(self, kind: type[Event]) -> Event:
        """The next of this kind, whatever comes before it."""
        while not isinstance(event := self._events.get(timeout=WITHIN_S), kind):
            pass
        return event

    def arrivals(self, count: int) -> list[Arrived]:
        return [self.next(Arrived) for _ in range(count)]

    def stored(self, link: Link, topics: Sequence[str]) -> dict[str, Arrived]:
        """What the broker holds under these topics, all of them; nothing else may come meanwhile.

        Asked within milliseconds nats-server gives only some of what it holds in about 3 of 100 cases: so, ask again.
        """
        deadline = time.monotonic() + WITHIN_S
        found: dict[str, Arrived] = {}
        while missing := [topic for topic in topics if topic not in found]:
            assert time.monotonic() < deadline, missing
            link.subscribe(missing)
            for arrived in self.arrivals_within(len(missing), 1.0):
                found[arrived.topic] = arrived
                link.acknowledge([arrived.token])
        return found

    def set_of(self, count: int) -> list[LinkEvent]:
        """So many events, whose order is open."""
        return [self._events.get(timeout=WITHIN_S) for _ in range(count)]

    def arrivals_within(self, count: int, timeout_s: float) -> list[Arrived]:
        """At most so many messages; fewer when none has come for a while."""
        found: list[Arrived] = []
        with suppress(queue.Empty):
            while len(found) < count:
                event = self._events.get(timeout=timeout_s)
                assert isinstance(event, Arrived), event
                found.append(event)
        return found

    def rest(self) -> list[LinkEvent]:
        """What is there already."""
        events = []
        with suppress(queue.Empty):
            while True:
                events.append(self._events.get_nowait())
        return events


@contextmanager
def linked(url: str, client_id: str, **options: Any) -> Iterator[tuple[Link, Inbox]]:
    """A connected link, whose Connected has been taken out of the inbox."""
    inbox = Inbox()
    link = Link(url, client_id=client_id, deliver=inbox.put, **options)
    link.connect(f"ternbus/1/demo/up/{client_id}/status", b"dead")
    inbox.next(Connected)
    try:
        yield link, inbox
    finally:
        link.disconnect(flush_s=0.0)


class Line:
    """A TCP forwarder to a broker, which can be cut like a cable whose ends notice it."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"mqtt://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._ends += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=_forward, args=(source, sink), daemon=True).start()

    def cut(self) -> None:
        while self._ends:
            end = self._ends.pop()
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listener.close()
        self.cut()


def _forward(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_RDWR)


class ScriptedBroker:
    """Takes one connection after the other, notes each packet, and answers it as the script says (None: hangs up)."""

    def __init__(self, script: Callable[[int, bytes], bytes | None]) -> None:
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"mqtt://127.0.0.1:{self._listener.getsockname()[1]}"
        self.packets: queue.SimpleQueue[tuple[int, bytes, int]] = queue.SimpleQueue()  # type, content, size on the wire
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def next(self, kind: int) -> bytes:
        """The content of the next packet, which must be of this kind."""
        return self.next_sized(kind)[0]

    def next_sized(self, kind: int) -> tuple[bytes, int]:
        found, content, size = self.packets.get(timeout=WITHIN_S)
        assert found == kind, hex(found)
        return content, size

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                with connection, connection.makefile("rwb") as stream, suppress(OSError):
                    while (packet := _read(stream)) is not None:
                        self.packets.put(packet)
                        answer = self._script(packet[0], packet[1])
                        if answer is None:
                            break
                        stream.write(answer)
                        stream.flush()

    def close(self) -> None:
        self._listener.close()


def _read(stream: Any) -> tuple[int, bytes, int] | None:
    first = stream.read(1)
    if not first:
        return None
    length = shift = 0
    while True:
        byte = stream.read(1)[0]
        length |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return first[0] & 0xF0, stream.read(length), 1 + shift // 7 + length


@contextmanager
def scripted(script: Callable[[int, bytes], bytes | None]) -> Iterator[ScriptedBroker]:
    broker = ScriptedBroker(script)
    try:
        yield broker
    finally:
        broker.close()
