"""A check that the broker keeps retained messages: refusals are noted, and each snapshot is read back by its parts.

A PUBACK does not say that a message is retained: on MQTT 3.1.1 it has no code, and brokers drop messages silently
above a limit. So the parts of a snapshot are asked for by name once the broker has acknowledged all of them. Head,
status and deltas are asked for when no newer head has come for a while: where they are lost, devices have nothing to
train on, so that no update would ever bring a newer head.
"""

from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Final

from ternbus.aggregator.core.events import Action, Log, Publish, RepublishRetained, Subscribe, Unsubscribe
from ternbus.aggregator.core.home_assistant import HomeAssistant
from ternbus.aggregator.core.refusals import Refusals
from ternbus.aggregator.core.versions import Versions
from ternbus.broker.backoff import contested
from ternbus.broker.errors import ProtocolError
from ternbus.broker.log_levels import WARNING
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import parse
from ternbus.broker.protocol.identity import AGGREGATOR
from ternbus.broker.protocol.model_messages import Delta, Head, Snapshot

ASKED_AT_ONCE: Final = 40  # parts; the largest take 5 MB together
ACKNOWLEDGE_S: Final = 120.0  # without any PUBACK for a snapshot; nats-server sends none while its disk is full
READ_MAX: Final = 4  # messages on a part's topic for each time that it is asked for; an honest broker sends one
ASK_S: Final = 30.0  # for the next part that was asked for; then it is asked for once more
RETRY_S: Final = 10.0  # until something lost is published again; it doubles each time
RETRY_MAX_S: Final = 600.0
LOOK_S: Final = 300.0  # with the same head, until it is asked for, and from then on; devices ask for it as often
REPLACED: Final = {Head.KIND, Snapshot.KIND, Delta.KIND}  # by a newer snapshot
DROPPED, UNACKNOWLEDGED, TOO_LARGE = "dropped", "unacknowledged", "Packet too large"


@dataclass(slots=True, kw_only=True)
class Retained:
    """What the broker refused or dropped of our retained messages, and when it is published again."""

    versions: Versions
    refusals: Refusals
    shown: HomeAssistant  # what is retained for others than devices
    say_online: Callable[[], list[Action]]  # publishes our status anew
    awaited: set[str] = field(default_factory=set)  # topics whose PUBACK matters
    _silent_at: float | None = None  # when the operator is told that no PUBACK comes
    _tells: bool = False  # the shell tells of PUBACKs
    _given: int = 0  # the publication of a snapshot that ``awaited`` began with, of ``Versions.given``
    _unsure: bool = True  # the newest snapshot was not seen on the broker by this process
    _to_ask: list[str] = field(default_factory=list)  # parts that are asked for once ``awaited`` is empty
    _chunk: tuple[str, ...] = ()  # parts subscribed to
    _asked: set[str] = field(default_factory=set)  # those of the chunk that have not come
    _read: Counter[str] = field(default_factory=Counter)  # messages by topic, since it was asked for
    _asked_twice: bool = False
    _ask_by: float | None = None
    _lost: dict[str, str] = field(default_factory=dict)  # topic -> why the broker does not hold the message
    _again: dict[str, str] = field(default_factory=dict)  # those that were published again, and have no answer yet
    _retry_at: float | None = None
    _attempts: int = 0
    _told: set[tuple[str, str]] = field(default_factory=set)  # kinds and reasons that the operator knows of
    _told_others: set[tuple[str, str]] = field(default_factory=set)  # of messages that nobody asks for here
    status_frame: bytes = b""  # the newest that says online
    _look_at: float | None = None  # when head, status and new deltas are asked for; None: there is no connection
    _looked_head: bytes = b""  # the head that the time counts from
    _looked_version: int = 0  # up to which deltas were asked for

    @property
    def acknowledgements(self) -> Set[str]:
        """Topics whose PUBACK matters."""
        others = self.shown.clearing | self._lost.keys() | ({self._head} if self.versions.needs_snapshot else set())
        return self.awaited | others if others else self.awaited  # which may be many, and is asked for at each PUBACK

    @property
    def _head(self) -> str:
        return topics.head(self.versions.settings.federation)

    @property
    def _status(self) -> str:
        return topics.status(self.versions.settings.federation)

    @property
    def withheld(self) -> str:
        """A message that the broker refused or dropped, with what to do; empty: none that devices begin with."""
        lost = self._again | self._lost
        if not lost:
            return ""
        topic, why = next(iter(lost.items()))
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        return f"{topic}{more} ({why}): {self._advice(why)}"

    @property
    def due(self) -> float | None:
        """When ``on_time`` has something to do."""
        return min((due for due in (self._due, self.shown.due) if due is not None), default=None)

    @property
    def _due(self) -> float | None:
        """Of our own frames."""
        if self.awaited:
            return self._silent_at
        if self._chunk:
            return self._ask_by
        look_at = None if DROPPED in self._lost.values() else self._look_at  # that is looked for at each retry
        return min((due for due in (self._retry_at, look_at) if due is not None), default=None)

    # --- what the broker answers

    def acknowledged(self, topic: str, now: float) -> list[Action]:
        """The broker took a message; with the last one, ask what it keeps of the snapshot."""
        if topic == self._head and self.versions.needs_snapshot:
            # devices train meanwhile: of a large model it takes longer than the version did
            return self.versions.snapshot(at_leisure=True)
        if topic in self.awaited:
            return self._answered(topic, now)
        if self._lost.get(topic, DROPPED) != DROPPED:  # the broker has taken a newer message there
            del self._lost[topic]
            return [] if self._lost or self.awaited or self._chunk else self._conclude(now)
        return self.shown.acknowledged(topic)

    def _answered(self, topic: str, now: float) -> list[Action]:
        self.awaited.discard(topic)
        self._tells, self._silent_at = True, now + ACKNOWLEDGE_S
        return [] if self.awaited else self._ask(now)

    def refused(self, topic: str, reason: str, now: float) -> list[Action]:
        """The broker refused a message. What it should retain is published again later."""
        if self.shown.owns(topic):
            self.shown.refused(topic)
            return self._tell("view", reason, f"the broker refused {topic}: {reason}", now, told=self._told_others)
        is_kept, kind = topic in self._current(), topics.parse(topic).kind
        told = self._told if is_kept else self._told_others
        actions = self._tell(kind, reason, f"the broker refused {topic}: {reason}", now, told=told)
        if is_kept:
            self._lose(topic, reason, now)
        if topic in self.awaited:
            self._to_ask = [part for part in self._to_ask if part != topic]
            actions += self._answered(topic, now)
        return actions

    def part_arrived(self, topic: str, payload: bytes, now: float) -> list[Action]:
        """A part of a snapshot as the broker holds it, or another message that may have been asked for."""
        if topic not in self._chunk and topic not in {self._head, self._status}:
            return [Unsubscribe(filters=(topic,))] if payload else []  # an earlier process asked for it
        if topic not in self._asked:
            return []
        self._read[topic] += 1  # anybody may write there, where the broker has no access list
        if self._read[topic] > READ_MAX or not self._is_newest(topic, payload):
            return []
        self._asked.discard(topic)
        self._ask_by = now + ASK_S
        return [] if self._asked else [*self._end_chunk(), *self._ask(now)]

    def confirmed(self, now: float) -> list[Action]:
        """The broker holds our head: look whether it holds the snapshot too, and give it soon what it lost.

        A snapshot that was to follow the head follows now: the head's PUBACK may have been lost with the connection.
        """
        if self._lost:
            self._attempts, self._retry_at = 0, now + RETRY_S
        if self.versions.needs_snapshot:
            return self.versions.snapshot(at_leisure=True)
        if not self._unsure:
            return []
        self._unsure = False
        # deltas too: an earlier process may have ended before it gave the broker again what that had refused
        self._to_ask = [*self._asked_for(), *self.versions.delta_topics()]
        return self._ask(now)

    # --- connection and time

    def connected(self, now: float) -> None:
        """From here on the broker is asked now and then what it holds."""
        self._look_at = now + LOOK_S
        self._told_others.clear()
        self.shown.connected(now)

    def disconnected(self, now: float, *, is_contested: bool) -> list[Action]:
        """What was not acknowledged, or has not come, may be lost. ``is_contested``: see `Reconnect.failed`."""
        text = contested(f"{AGGREGATOR}-{self.versions.settings.federation}") if is_contested else ""
        if is_contested and self.awaited:  # as nats-server does
            text += f". Or does the broker end a connection at too large a message? Then {self._advice(TOO_LARGE)}"
        self._unsure = self._unsure or bool(self.awaited or self._chunk)
        self._forget()
        self._look_at = None
        self._lost, self._again = self._again | self._lost, {}
        self._lost.pop(self._status, None)  # each connection begins with a new one
        self.shown.disconnected()
        line = self.refusals.log_limit.write("contested", text, now) if text else ""
        return [Log(text=line, level=WARNING, event="contested")] if line else []

    def on_time(self, now: float) -> list[Action]:
        """Whatever is due now, of our own frames and of what is shown."""
        return [*self._frames_on_time(now), *self.shown.on_time(now)]

    def _frames_on_time(self, now: float) -> list[Action]:
        """First of all, follow a snapshot that was just published."""
        if self._look_at is not None and self._looked_head is not self.versions.published.head_frame:
            self._looked_head, self._look_at = self.versions.published.head_frame, now + LOOK_S
        if self._given != self.versions.given:
            return self._follow(now)
        if self._due is None or self._due > now:
            return []
        if self.awaited:
            return self._nothing_comes(now)
        if self._chunk:
            return self._part_is_missing(now)
        return self._look(now) if self._retry_at is None or self._retry_at > now else self._retry(now)

    def _nothing_comes(self, now: float) -> list[Action]:
        """Only tell: the messages are under way on this connection, and are published again on the next one."""
        self._silent_at = None
        topic = min(self.awaited)
        text = f"the broker has acknowledged nothing for {ACKNOWLEDGE_S:.0f} s; it owes {len(self.awaited)}, as {topic}"
        return self._tell("all", UNACKNOWLEDGED, text, now, len(self.awaited))

    def _follow(self, now: float) -> list[Action]:
        """A snapshot was published, and a head: they replace what was lost of earlier ones."""
        left, retry_at = self._end_chunk(), self._retry_at
        self._forget()
        self._given, self._unsure = self.versions.given, False
        self._to_ask = self._asked_for()
        # not the terms of private sums, which are published only when they change
        self.awaited = set(self.versions.snapshot_topics())
        self._silent_at = now + ACKNOWLEDGE_S if self._tells else None
        lost, self._again = self._again | self._lost, {}
        self._lost = {topic: why for topic, why in lost.items() if topics.parse(topic).kind not in REPLACED}
        if self._lost:
            self._retry_at = now + RETRY_S if retry_at is None else retry_at
        return left

    def _forget(self) -> None:
        self.awaited, self._to_ask, self._chunk, self._asked = set(), [], (), set()
        self._ask_by = self._retry_at = None

    # --- asking by name

    def _asked_for(self) -> list[str]:
        """The parts of the terms of private sums, where there are any, and of the newest snapshot."""
        return [*self.versions.terms_topics(), *self.versions.snapshot_topics()]

    def _look(self, now: float) -> list[Action]:
        """Ask for head and status, and once for each delta: devices may be waiting for what the broker has lost."""
        self._look_at = now + LOOK_S
        new = self.versions.delta_topics(self._looked_version)
        self._looked_version = self.versions.model.version
        # not for what it refused: that comes again anyway, and would be told as a message that it lost
        self._to_ask = [topic for topic in (*new, self._head, self._status) if topic not in self._lost]
        return self._ask(now)

    def _ask(self, now: float) -> list[Action]:
        """Ask for the next parts; with none left, say what is lost."""
        self._chunk, self._to_ask = tuple(self._to_ask[:ASKED_AT_ONCE]), self._to_ask[ASKED_AT_ONCE:]
        self._asked, self._asked_twice = set(self._chunk), False
        self._read.clear()
        if not self._chunk:
            return self._conclude(now)
        self._ask_by = now + ASK_S
        return [Subscribe(filters=self._chunk)]

    def _part_is_missing(self, now: float) -> list[Action]:
        """Ask once more, since brokers deliver fewer retained messages under load; then these parts are lost."""
        if not self._asked_twice:
            self._asked_twice, self._ask_by = True, now + ASK_S
            self._read.clear()
            return [Subscribe(filters=tuple(sorted(self._asked)))]
        for topic in sorted(self._asked):
            self._lose(topic, DROPPED, now)
        if self._head in self._asked:  # then the broker may have lost everything
            self._to_ask = [*self._asked_for(), *self.versions.delta_topics()]
        return [*self._end_chunk(), *self._ask(now)]

    def _end_chunk(self) -> list[Action]:
        chunk, self._chunk, self._ask_by = self._chunk, (), None
        parts = tuple(topic for topic in chunk if topic not in {self._head, self._status})
        return [Unsubscribe(filters=parts)] if parts else []

    def _is_newest(self, topic: str, payload: bytes) -> bool:
        if topic in {self._head, self._status}:
            return payload == (self.versions.published.head_frame if topic == self._head else self.status_frame)
        try:
            frame = parse(payload)
            topics.check(frame, topics.parse(topic))
            frame.check_authentic(self.versions.frames.identity.public)
        except ProtocolError:
            return False
        published = self.versions.published
        if frame.kind == Delta.KIND:  # else that of an earlier version in the same slot
            return bool(frame.meta.get("version", 0) > published.snapshot.version)
        return frame.seq == (published.terms_seq if frame.kind == topics.TERMS else published.snapshot_seq)

    # --- publishing again

    def _lose(self, topic: str, why: str, now: float) -> None:
        self._lost[topic] = why
        if self._retry_at is None:
            self._retry_at = now + min(RETRY_S * 2.0 ** min(self._attempts, 20), RETRY_MAX_S)

    def _retry(self, now: float) -> list[Action]:
        """Publish again what the broker lost, unless something newer has taken its place."""
        self._attempts += 1
        lost = {topic: self._lost[topic] for topic in self._current() if topic in self._lost}
        self._again, self._lost, self._retry_at = lost, {}, None
        if not lost:
            return self._conclude(now)
        self.awaited, self._silent_at = set(lost), now + ACKNOWLEDGE_S
        self._to_ask = [topic for topic in self._asked_for() if topic in lost]
        # an acknowledgement says little of a delta that was acknowledged before
        others = (*self.versions.delta_topics(), self._head, self._status)
        self._to_ask += [topic for topic in others if lost.get(topic) == DROPPED]
        frames = [topic for topic in self.versions.wanted() if topic in lost]
        actions: list[Action] = [RepublishRetained(topics=tuple(frames))] if frames else []
        if self._head in lost:
            actions.append(Publish(topic=self._head, payload=self.versions.published.head_frame, retain=True))
        return [*actions, *(self.say_online() if self._status in lost else [])]

    def _current(self) -> list[str]:
        """The topics whose messages the broker should hold, in the order of their publication."""
        return [*self.versions.wanted(), self._head, self._status]

    def _conclude(self, now: float) -> list[Action]:
        """All has been answered: tell the operator what is lost, or that nothing is any more."""
        self._again = {}
        dropped = [topic for topic, why in self._lost.items() if why == DROPPED]
        if dropped:
            text = (
                f"the broker does not hold {len(dropped)} of the messages with which devices begin ({dropped[0]}), "
                "though it acknowledged them, or does not let this user read them"
            )
            return self._tell("snapshot", DROPPED, text, now, len(dropped))
        if self._lost:
            return []
        self._attempts = 0
        if not self._told:
            return []
        self._told.clear()
        return [Log(text="the broker holds all retained messages again")]

    def _tell(
        self, kind: str, reason: str, text: str, now: float, count: int = 1, *, told: set[tuple[str, str]] | None = None
    ) -> list[Action]:
        """Count a lost message, and name it to the operator once for its kind and the reason."""
        name = "broker-dropped" if reason in {DROPPED, UNACKNOWLEDGED} else "broker-refused"
        told = self._told if told is None else told
        if (kind, reason) in told:
            self.refusals.counters.refuse(name, now, count)
            return []
        told.add((kind, reason))
        return self.refusals.refuse(name, f"{text}; {self._advice(reason)}; it is published again", now, count)

    def _advice(self, reason: str) -> str:
        """What the operator can change."""
        size = (
            f"lower limits.frame_bytes in aggregator.toml (now {self.versions.settings.limits.frame_bytes}) and "
            "restart, or raise the broker's limit (mosquitto: max_packet_size, message_size_limit; nats-server: "
            "max_payload)"
        )
        match reason:
            case "Packet too large":
                return size
            case "Quota exceeded" | "unacknowledged":
                return "free disk space on the broker's machine, or raise the broker's quota of retained messages"
            case "Not authorized":
                return "allow this user the topics of docs/protocol.md, section 4, in the broker's access list"
            case "Retain not supported":
                return "let the broker retain messages (mosquitto: retain_available true)"
            case "dropped":
                return f"{size}, or its limits of retained messages and disk space"
            case _:
                return "see the broker's log"
