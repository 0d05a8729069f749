"""A Byzantine broker: it drops, repeats, delays, corrupts, reroutes and forges messages as a test tells it.

It has a key of its own and, since devices get stolen, the keys that a test hands to it.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from hypothesis import strategies as st

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.frame import Frame, build, parse
from ternbus.broker.protocol.identity import Identity
from ternbus.lab.virtual.clock import Clock
from ternbus.lab.virtual.memory_broker import Client, Line, MemoryBroker, Session

Send = Callable[[str, bytes], None]
FAULT_KINDS: Final = (
    "true", "lost", "twice", "late", "bit", "short", "empty", "elsewhere", "instead", "replay", "spliced", "forged",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fault:
    """What becomes of one message; ``number`` chooses the bit, the topic or the other message."""

    kind: str
    number: int


NUMBERS = st.integers(0, 2**20)
FAULTS = st.lists(st.builds(Fault, st.sampled_from(FAULT_KINDS), NUMBERS), min_size=1, max_size=12)


@dataclass(slots=True)
class Adversary:
    """Passes messages on, each with the next fault; without faults it changes nothing."""

    keys: tuple[Identity, ...] = (Identity(b"l" * 32),)
    faults: deque[Fault] = field(default_factory=deque)
    observed: list[tuple[str, bytes]] = field(default_factory=list)
    delayed: list[tuple[Send, str, bytes]] = field(default_factory=list)
    applied: dict[str, int] = field(default_factory=dict)  # how often each kind of fault was applied

    def observe(self, topic: str, payload: bytes) -> None:
        """Remember what may be of use."""
        self.observed.append((topic, payload))

    def pass_on(self, topic: str, payload: bytes, send: Send) -> None:
        fault = self.faults.popleft() if self.faults else Fault("true", 0)
        self.applied[fault.kind] = self.applied.get(fault.kind, 0) + 1
        for delivered in self._attacked(fault, topic, payload, send):
            send(*delivered)

    def release_delayed(self) -> None:
        """Send the delayed messages, the newest first."""
        while self.delayed:
            send, topic, payload = self.delayed.pop()
            send(topic, payload)

    def stop(self) -> None:
        self.faults.clear()
        self.delayed.clear()

    def _attacked(  # noqa: PLR0911 - a table, one line a fault
        self, fault: Fault, topic: str, payload: bytes, send: Send
    ) -> list[tuple[str, bytes]]:
        other_topic, other = self.observed[fault.number % len(self.observed)] if self.observed else (topic, payload)
        match fault.kind:
            case "lost":
                return []
            case "twice":
                return [(topic, payload)] * 2
            case "late":
                self.delayed.append((send, topic, payload))
                return []
            case "bit":
                return [(topic, flipped(payload, fault.number))]
            case "short":
                return [(topic, payload[: fault.number % (len(payload) + 1)])]
            case "empty":
                return [(topic, b"")]
            case "elsewhere":
                return [(other_topic, payload)]
            case "instead":
                return [(topic, other)]
            case "replay":
                return [(topic, payload), (other_topic, other)]
            case "spliced":
                return [(topic, spliced(payload, other))]
            case "forged":
                return [(topic, self.forged(payload, fault.number)), (topic, payload)]
            case _:
                return [(topic, payload)]

    def forged(self, payload: bytes, number: int) -> bytes:
        """The same message, or one with slightly higher numbers, signed with a key that the adversary has."""
        try:
            frame = parse(payload)
        except ProtocolError:
            return payload
        meta = dict(frame.meta)
        for name in ("version", "base", "session"):
            if isinstance(meta.get(name), int):
                meta[name] = max(0, meta[name] + number % 3)
        key = self.keys[number % len(self.keys)]
        if key.key_id == frame.key:  # a message signed with the device's own key is genuine, and nobody could tell
            key = self.keys[0]
        return resigned(frame, key, meta)


def resigned(frame: Frame, key: Identity, meta: dict[str, object]) -> bytes:
    return build(
        key,
        federation=frame.federation,
        sender=frame.sender,
        kind=frame.kind,
        seq=min(2**62, frame.seq + 1),
        meta=meta,
        body=frame.body,
        part=frame.part,
        parts=frame.parts,
    )


def flipped(payload: bytes, number: int) -> bytes:
    """One bit turned."""
    if not payload:
        return payload
    at = number % (8 * len(payload))
    return payload[: at // 8] + bytes([payload[at // 8] ^ (1 << at % 8)]) + payload[at // 8 + 1 :]


def spliced(payload: bytes, other: bytes) -> bytes:
    """One frame's header and signature, another's body."""
    try:
        mine, theirs = parse(payload), parse(other)
    except ProtocolError:
        return payload
    return payload[: len(payload) - len(mine.body)] + theirs.body


class AttackedClient:
    """A client as its session knows it, with the adversary in between."""

    def __init__(self, client: Client, adversary: Adversary) -> None:
        self.client = client
        self.adversary = adversary
        self.connected, self.disconnected = client.connected, client.disconnected
        self.acknowledged = client.acknowledged

    def arrived(self, topic: str, payload: bytes, *, retained: bool) -> None:
        self.adversary.pass_on(topic, payload, partial(self.client.arrived, retained=retained))


class ObservedSession(Session):
    """A session whose last will the adversary observes too."""

    def __init__(self, broker: "ByzantineBroker", client: AttackedClient, line: Line) -> None:
        super().__init__(broker, client, line)
        self.attacked = client
        self._adversary = broker.down

    def connect(self, will_topic: str, will_payload: bytes) -> None:
        self._adversary.observe(will_topic, will_payload)
        super().connect(will_topic, will_payload)

    @property
    def online(self) -> bool:
        return self._online

    def forget(self) -> None:
        """Drop the messages that are queued for the client."""
        self._waiting.clear()


class ByzantineBroker(MemoryBroker):
    """``up`` attacks what the broker is given, before it is retained and routed; ``down`` what each client gets."""

    def __init__(self, clock: Clock, up: Adversary, down: Adversary) -> None:
        super().__init__(clock)
        self.up = up
        self.down = down
        self.sessions: list[ObservedSession] = []

    def session(self, client: Client, line: Line) -> Session:
        session = ObservedSession(self, AttackedClient(client, self.down), line)
        self._sessions.append(session)
        self.sessions.append(session)
        return session

    def route(self, topic: str, payload: bytes, *, retain: bool) -> None:
        for adversary in (self.up, self.down):
            adversary.observe(topic, payload)

        def forward(topic: str, payload: bytes) -> None:
            super(ByzantineBroker, self).route(topic, payload, retain=retain)

        self.up.pass_on(topic, payload, forward)

    def send(self, client: int, topic: str, payload: bytes) -> None:
        """Send a made-up message to a client that is online."""
        session = self.sessions[client % len(self.sessions)]
        if session.online:
            session.attacked.client.arrived(topic, payload, retained=True)

    def become_honest(self, *, lose_everything: bool) -> None:
        """An honest broker takes its place: all clients connect anew, to all of the stored messages or to none."""
        self.stop()
        for adversary in (self.up, self.down):
            adversary.stop()
        if lose_everything:
            self.retained.clear()
            for session in self.sessions:
                session.forget()
        self.start()
