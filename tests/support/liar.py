"""A broker that lies: what it was given it drops, repeats, keeps back, bends, swaps and makes up, as a test tells it.

It has no key but its own and, since devices get stolen, whatever keys a test hands to it.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.frame import Frame, build, parse
from ternbus.broker.protocol.identity import Identity
from ternbus.lab.virtual.clock import Clock
from ternbus.lab.virtual.memory_broker import Client, Line, MemoryBroker, Session

Say = Callable[[str, bytes], None]
FATES: Final = (
    "true", "lost", "twice", "late", "bit", "short", "empty", "elsewhere", "instead", "replay", "spliced", "forged",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one message; ``number`` chooses the bit, the topic or the other message."""

    kind: str
    number: int


@dataclass(slots=True)
class Liar:
    """Tells messages on, each by the next fate; without fates it tells the truth."""

    keys: tuple[Identity, ...] = (Identity(b"l" * 32),)
    fates: deque[Fate] = field(default_factory=deque)
    heard: list[tuple[str, bytes]] = field(default_factory=list)
    kept_back: list[tuple[Say, str, bytes]] = field(default_factory=list)
    told: dict[str, int] = field(default_factory=dict)  # how often each lie was told

    def hear(self, topic: str, payload: bytes) -> None:
        """Remember what may be of use."""
        self.heard.append((topic, payload))

    def tell(self, topic: str, payload: bytes, say: Say) -> None:
        fate = self.fates.popleft() if self.fates else Fate("true", 0)
        self.told[fate.kind] = self.told.get(fate.kind, 0) + 1
        for bent in self._bent(fate, topic, payload, say):
            say(*bent)

    def let_go(self) -> None:
        """Tell what was kept back, the newest first."""
        while self.kept_back:
            say, topic, payload = self.kept_back.pop()
            say(topic, payload)

    def stop(self) -> None:
        self.fates.clear()
        self.kept_back.clear()

    def _bent(  # noqa: PLR0911 - a table, one line a lie
        self, fate: Fate, topic: str, payload: bytes, say: Say
    ) -> list[tuple[str, bytes]]:
        other_topic, other = self.heard[fate.number % len(self.heard)] if self.heard else (topic, payload)
        match fate.kind:
            case "lost":
                return []
            case "twice":
                return [(topic, payload)] * 2
            case "late":
                self.kept_back.append((say, topic, payload))
                return []
            case "bit":
                return [(topic, flipped(payload, fate.number))]
            case "short":
                return [(topic, payload[: fate.number % (len(payload) + 1)])]
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
                return [(topic, self.forged(payload, fate.number)), (topic, payload)]
            case _:
                return [(topic, payload)]

    def forged(self, payload: bytes, number: int) -> bytes:
        """The same claim, or one a little further on, signed by a key that the liar has."""
        try:
            frame = parse(payload)
        except ProtocolError:
            return payload
        meta = dict(frame.meta)
        for name in ("version", "base", "session"):
            if isinstance(meta.get(name), int):
                meta[name] = max(0, meta[name] + number % 3)
        key = self.keys[number % len(self.keys)]
        if key.key_id == frame.key:  # who has a device's key can speak for it, and there is nothing to be seen
            key = self.keys[0]
        return resigned(frame, key, meta)


def resigned(frame: Frame, key: Identity, meta: dict[str, object]) -> bytes:
    return build(
        key,
        federation=frame.federation,
        sender=frame.sender,
        kind=frame.kind,
        seq=min(2**64 - 1, frame.seq + 1),
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


class LiedTo:
    """A client as its session knows it; between them stands the liar."""

    def __init__(self, client: Client, liar: Liar) -> None:
        self.client = client
        self.liar = liar
        self.connected, self.disconnected = client.connected, client.disconnected
        self.acknowledged = client.acknowledged

    def arrived(self, topic: str, payload: bytes) -> None:
        self.liar.tell(topic, payload, self.client.arrived)


class OverheardSession(Session):
    """The liar has its last will, too."""

    def __init__(self, broker: "LyingBroker", client: LiedTo, line: Line) -> None:
        super().__init__(broker, client, line)
        self.lied_to = client
        self._liar = broker.down

    def connect(self, will_topic: str, will_payload: bytes) -> None:
        self._liar.hear(will_topic, will_payload)
        super().connect(will_topic, will_payload)

    @property
    def online(self) -> bool:
        return self._online

    def forget(self) -> None:
        """What waits for the client is gone."""
        self._waiting.clear()


class LyingBroker(MemoryBroker):
    """``up`` bends what it is given before it is kept and passed on, ``down`` what each client gets of it."""

    def __init__(self, clock: Clock, up: Liar, down: Liar) -> None:
        super().__init__(clock)
        self.up = up
        self.down = down
        self.sessions: list[OverheardSession] = []

    def session(self, client: Client, line: Line) -> Session:
        session = OverheardSession(self, LiedTo(client, self.down), line)
        self._sessions.append(session)
        self.sessions.append(session)
        return session

    def route(self, topic: str, payload: bytes, *, retain: bool) -> None:
        for liar in (self.up, self.down):
            liar.hear(topic, payload)

        def pass_on(topic: str, payload: bytes) -> None:
            super(LyingBroker, self).route(topic, payload, retain=retain)

        self.up.tell(topic, payload, pass_on)

    def say(self, client: int, topic: str, payload: bytes) -> None:
        """Make something up, if that client is there to hear it."""
        session = self.sessions[client % len(self.sessions)]
        if session.online:
            session.lied_to.client.arrived(topic, payload)

    def become_honest(self, *, lose_everything: bool) -> None:
        """Another broker takes its place: everybody connects anew; of what this one kept, all or nothing is there."""
        self.stop()
        for liar in (self.up, self.down):
            liar.stop()
        if lose_everything:
            self.retained.clear()
            for session in self.sessions:
                session.forget()
        self.start()
