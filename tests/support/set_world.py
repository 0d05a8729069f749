"""A federation with private sums without a network: the aggregator's core, helpers' cores, devices that mask.

A broker in memory carries what they publish. Each party can be cut off, killed and begun again from its disk.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from support.private_sets import Helper as HelperCore
from support.private_sets import RandomBytes, identity
from support.small_world import BROKER_URL, LAB, Bench, Device, initial_model, receipts, scratch
from ternbus.aggregator.core import events
from ternbus.aggregator.shell import administration
from ternbus.aggregator.store import private_rows
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import build, parse
from ternbus.broker.protocol.identity import seal
from ternbus.broker.protocol.merge_log import Entry, unpack
from ternbus.broker.protocol.messages import PRIVATE, Receipt, Status, Update
from ternbus.broker.protocol.model_messages import Head
from ternbus.broker.protocol.parts import cut
from ternbus.broker.sums import masks
from ternbus.broker.sums.bfv import SecretKey, encrypt
from ternbus.broker.sums.plan_bytes import plan_bytes
from ternbus.broker.sums.sets import OPENED, REFUSED, Answer
from ternbus.broker.sums.terms import AGGREGATOR as BY_AGGREGATOR
from ternbus.broker.sums.terms import BFV, Terms, context, digest_of
from ternbus.broker.sums.words import BUCKETS, DENSE_STEPS, Words
from ternbus.helper.core import actions as helper_actions
from ternbus.helper.core import events as helper_events
from ternbus.helper.core.profile import Profile

FRAME_BYTES = 120 * 1024
Message = tuple[str, bytes]


@dataclass
class Helper(HelperCore):
    """A helper that belongs to an aggregator; what it publishes goes to the world's broker."""

    server: bytes = b""
    random: RandomBytes = field(init=False)

    @property
    def profile(self) -> Profile:
        return Profile(
            federation=LAB, helper=self.name, identity=self.identity, aggregator_public=self.server,
            random=self.random, roster=self.roster, min=self.min, code="a-code-of-an-invitation",
            bfv=self.bfv,
        )  # fmt: skip


@dataclass(slots=True)
class PrivateDevice(Device):
    """A device's key and counter, and what it puts into its updates."""

    random: RandomBytes = field(default_factory=lambda: RandomBytes("device"))

    def private_update(
        self,
        world: "World",
        base: int,
        content: tuple[Any, Any] | None = None,
        *,
        weight: int = 255,
        frame_bytes: int = FRAME_BYTES,
        seal_to: bytes | None = None,
        **changes: Any,
    ) -> list[bytes]:
        """The frames of an update on a version; ``changes`` are of the header's map."""
        terms, its_context = world.terms_of[base], world.contexts[base]
        ternary, plain = content or content_of(terms, f"{self.name} {base}", weight)
        words = terms.layout.pack(ternary, plain)
        cards = [each.card for each in terms.helpers]
        seeds = [masks.seed_of(words, self.random(32)) for _ in cards]
        number = changes.pop("seq", None) or self.next_seq()
        about = {"context": its_context, "device": self.identity.public}
        boxes = tuple(
            masks.box(card.box_key, seed, helper=card.public, seq=number, **about)
            for card, seed in zip(cards, seeds, strict=True)
        )
        pairs = [(card.public, seed) for card, seed in zip(cards, seeds, strict=True)]
        sent = (
            encrypt(terms.key, terms.layout, words)
            if terms.kind == BFV
            else masks.masked(terms.layout, words, pairs, **about).tobytes()
        )
        body = changes.pop("body", sent)
        body = seal(seal_to or world.identity.public, bytes(self.identity.key_id) + number.to_bytes(8, "little") + body)
        values: dict[str, Any] = {
            "base": base, "samples": 1, "codec": PRIVATE, "encoding": "raw", "sealed": True, "context": its_context,
            "min": 3, "boxes": boxes,
        }  # fmt: skip
        update = Update(**{**values, **changes})
        return cut(
            self.identity, federation=LAB, sender=self.name, kind=Update.KIND, seq=number, meta=update.meta(),
            body=body, frame_bytes=frame_bytes,
        )  # fmt: skip


def content_of(terms: Terms, salt: str, weight: int = 255) -> tuple[Any, Any]:
    """Integers as an honest device sends them, the same for each salt."""
    random = np.random.default_rng(list(salt.encode()))
    one_hot = np.zeros((len(terms.scales), BUCKETS), np.int64)
    one_hot[:, 3] = 1
    dense = random.integers(-DENSE_STEPS, DENSE_STEPS + 1, terms.dense)
    plain = np.concatenate([dense, [weight], one_hot.reshape(-1)])
    return random.integers(-terms.levels, terms.levels + 1, terms.ternary), plain


class World(Bench):
    """The aggregator as `Bench` has it, with helpers and a broker between them."""

    def __init__(
        self, *helpers: str, model: Mapping[str, Any] | None = None, roster: str = BY_AGGREGATOR, **changes: Any
    ) -> None:
        self.names = helpers or ("h-1",)
        self.queue: deque[Message] = deque()
        self.down: set[str] = set()  # helpers that are cut off
        self.helpers: dict[str, Helper] = {}
        self.shown: dict[str, bytes] = {}  # what helpers have the broker retain
        self.terms_of: dict[int, Terms] = {}
        self.contexts: dict[int, bytes] = {}
        self.sums: dict[str, list[tuple[bytes, bytes]]] = {}  # by helper: each set that it opened, and its masks' sum
        self.lie: tuple[str, bytes | None] | None = None  # a helper, and what it answers in place of its sum
        self.lose: Callable[[str], bool] = lambda topic: False
        self.asked: list[tuple[str, str]] = []  # (helper, step)
        settings: dict[str, object] = {
            "private.helpers": {name: identity(f"helper {name}").public.hex() for name in self.names},
            "private.min": 3, "merge.buffer_size": 6, "merge.influence_bound": "none",
        }  # fmt: skip
        settings |= {name.replace("__", "."): value for name, value in changes.items()}
        directory = scratch() / "agg"
        administration.create(
            directory, federation=LAB, broker=BROKER_URL, model=model or initial_model(), settings=settings
        )
        super().__init__(directory)
        for name in self.names:
            key = SecretKey.generate() if changes.get("private__kind") == BFV else None
            about: dict[str, Any] = {"server": self.identity.public, "roster": roster, "bfv": key}
            self.helpers[name] = Helper(name, min=2, enrolled=False, **about)

    disconnected = events.Disconnected()

    # --- the broker

    def publish(self, action: events.Publish) -> None:
        super().publish(action)
        self.note(action)
        is_for_helpers = "/help/" in action.topic and not self.lose(action.topic)
        if action.payload and (is_for_helpers or action.topic == topics.status(LAB)):
            self.queue.append((action.topic, action.payload))

    def note(self, action: events.Publish) -> None:
        """Keep terms and context of each version, as a device does."""
        frame = parse(action.payload) if action.payload else None
        if frame is not None and frame.kind == "ask":
            self.asked.append((action.topic.split("/")[4], frame.meta["step"]))
        if frame is None or frame.kind != "head" or "terms" not in frame.meta["plan"]:
            return
        head = Head.from_meta(frame.meta)
        parts, number = [], 0
        while (payload := self.retained.get(topics.terms(LAB, number))) is not None:
            parts.append(parse(payload).body)
            number += 1
        content = b"".join(parts)
        assert digest_of(content) == head.plan["terms"]
        self.terms_of[head.version] = Terms.parse(content)
        made = context(
            version=head.version,
            model=head.digest,
            plan=digest_of(plan_bytes(frame.meta_bytes)),
            terms=digest_of(content),
        )
        assert self.contexts.setdefault(head.version, made) == made

    def settle(self) -> None:
        """Deliver all that is on its way, and what follows from it; whoever is killed gets it again."""
        while self.queue:
            topic, payload = self.queue[0]
            for name, helper in self.helpers.items():
                if name not in self.down and topic in helper.profile.subscriptions:
                    self.spread(helper, helper.arrive((topic, payload)))
            if "/help/" in topic and topic.rsplit("/", 1)[1] in topics.HELPER_KINDS:
                self.receive(topic, payload)
            self.queue.popleft()

    def spread(self, helper: Helper, actions: Sequence[helper_actions.Action]) -> None:
        for action in actions:
            if isinstance(action, helper_actions.Publish) and not self.lose(action.topic):
                payload = self.falsified(helper, action.payload)
                frame = parse(payload)
                if frame.meta.get("outcome") == OPENED:
                    self.sums.setdefault(helper.name, []).append((frame.meta["set"], frame.body))
                if action.retain:
                    self.shown[action.topic] = payload
                self.queue.append((action.topic, payload))

    def falsified(self, helper: Helper, payload: bytes) -> bytes:
        """What a helper that lies publishes in place of a sum."""
        frame = parse(payload)
        if self.lie is None or helper.name != self.lie[0] or frame.meta.get("outcome") != "opened":
            return payload
        body = bytes(len(frame.body)) if self.lie[1] is None else self.lie[1]
        about: dict[str, Any] = {
            "federation": LAB,
            "sender": helper.name,
            "kind": frame.kind,
            "seq": frame.seq,
            "meta": frame.meta,
        }
        return build(helper.identity, **about, body=body)

    def refuse(self, name: str, reason: str, *updates: str) -> None:
        """A helper refuses the one set that is in flight, whatever it is asked."""
        (digest,) = self.ledger.db.execute("SELECT digest FROM sets WHERE merged IS NULL").fetchone()
        helper = self.helpers[name]
        answer = Answer(outcome=REFUSED, set=digest, count=helper.disk.count, reason=reason, updates=updates)
        self.say_as(name, answer)

    def say_as(self, name: str, answer: Answer, body: bytes = b"") -> None:
        """An answer that a helper signs."""
        frames = self.helpers[name].profile.answer(answer, body, seq=2**41, frame_bytes=FRAME_BYTES)
        self.receive(frames[0].topic, *(frame.payload for frame in frames))

    def states(self) -> list[str]:
        """Of the sets in the ledger that no version has."""
        return [state for (state,) in self.ledger.db.execute("SELECT state FROM sets WHERE merged IS NULL")]

    def restart_helper(self, name: str) -> None:
        """A helper is killed, begins again from its disk and connects."""
        helper = self.helpers[name]
        helper.now += 1000.0
        helper.start()
        self.connect_helper(name)

    def connect_helper(self, name: str) -> None:
        """A helper connects, and gets what the broker retains for it."""
        helper = self.helpers[name]
        self.down.discard(name)
        self.spread(helper, helper.handle(helper_events.Connected(frame_bytes=FRAME_BYTES)))
        for topic in helper.profile.subscriptions:
            payload = self.retained.get(topic) or self.shown.get(topic)
            if payload:
                self.spread(helper, helper.arrive((topic, payload)))
        self.settle()

    def cut_helper(self, name: str) -> None:
        helper = self.helpers[name]
        self.down.add(name)
        helper.handle(helper_events.Disconnected(reason="cut"))
        will = helper.profile.status("offline", seq=2**40, session=helper.disk.session, count=helper.disk.count)
        self.receive(will.topic, will.payload)

    def begin(self, devices: int = 6) -> list[PrivateDevice]:
        """Start, enrol all helpers, have devices join."""
        self.start()
        private_rows.invite(self.ledger.db, dict.fromkeys(self.names, "a-code-of-an-invitation"), 0.0, 1e12)
        self.handle(events.InvitationsRead(codes={}, helpers=private_rows.codes(self.ledger.db)))
        for name in self.names:
            self.connect_helper(name)
        self.tick(10.0)
        self.settle()
        assert self.version in self.contexts
        return [self.member(f"pi-{number}") for number in range(devices)]

    def member(self, name: str) -> PrivateDevice:
        device = PrivateDevice(name, self.schema, random=RandomBytes(name))
        self.receive(device.topic("enroll"), device.enroll(self.invite(name)))
        return device

    # --- devices

    def give(self, device: PrivateDevice, base: int | None = None, *args: Any, **about: Any) -> Receipt:
        """Deliver an update; the receipt. What helpers are asked because of it waits in the queue."""
        frames = device.private_update(self, self.version if base is None else base, *args, **about)
        return receipts(self.receive(device.topic("update"), *frames))[-1]

    def say(self, device: PrivateDevice, state: str, base: int = -1) -> None:
        self.receive(device.topic("status"), device.frame("status", Status(state=state, session=1, base=base).meta()))

    def give_all(self, devices: Sequence[PrivateDevice], base: int | None = None) -> None:
        for device in devices:
            assert self.give(device, base).outcome == "accepted"

    # --- what came of it

    def entries(self) -> list[Entry]:
        rows = self.ledger.db.execute("SELECT entry FROM log ORDER BY version").fetchall()
        return [Entry.parse(unpack(row[0]).content) for row in rows]

    def merged(self) -> dict[tuple[str, int], int]:
        """(device, seq) -> the version whose entry has it in a set; each is in one."""
        found: dict[tuple[str, int], int] = {}
        for entry in self.entries():
            for member in entry.members:
                assert found.setdefault((member.device, member.seq), entry.version) == entry.version
        return found

    def dropped(self) -> dict[tuple[str, int], str]:
        """(device, seq) -> why, as the log of merges says."""
        return {
            (each.update.device, each.update.seq): each.reason for entry in self.entries() for each in entry.dropped
        }

    def restart(self) -> None:
        """The aggregator is killed and begins again; what was on its way to helpers stays on its way."""
        super().restart()
        self.start()


def truth(terms: Terms, contents: Sequence[tuple[Any, Any]]) -> Words:
    total = terms.layout.zeros()
    for content in contents:
        terms.layout.add(total, terms.layout.pack(*content))
    return total
