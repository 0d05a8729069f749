"""Devices, an aggregator and helpers of private sums as a test drives them: no network, and a disk in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame, build, parse
from ternbus.broker.protocol.identity import AGGREGATOR, Identity
from ternbus.broker.protocol.messages import PRIVATE, Receipt, Status, Update
from ternbus.broker.protocol.parts import cut
from ternbus.broker.sums import masks, sets
from ternbus.broker.sums.bfv import SecretKey
from ternbus.broker.sums.sets import Answer, Ask, AskStep, SetMember, set_digest
from ternbus.broker.sums.terms import AGGREGATOR as BY_AGGREGATOR
from ternbus.broker.sums.terms import MASK, Terms, context, digest_of
from ternbus.broker.sums.words import BUCKETS, Layout, Words
from ternbus.helper.core import events
from ternbus.helper.core.actions import Action, Log, Publish, Save, Stop
from ternbus.helper.core.core import LOOKS, Core
from ternbus.helper.core.profile import Profile
from ternbus.helper.core.records import MemoryRecords
from ternbus.helper.core.state import State

FEDERATION = "lab"
SERVER = Identity(b"a" * 32)
MODEL = bytes([1]) * 32
PLAN = bytes([2]) * 32
NOW_S = 1_800_000_000.0
FRAME_BYTES = 120 * 1024


def identity(name: str) -> Identity:
    return Identity(digest_of(name.encode()))


@dataclass
class RandomBytes:
    """Other bytes each time, and the same in each run."""

    salt: str
    count: int = 0

    def __call__(self, size: int) -> bytes:
        self.count += 1
        return digest_of(f"{self.salt} {self.count}".encode())[:size]


@dataclass
class Helper:
    """A helper's core, its disk, its clock, and all actions so far."""

    name: str = "h-1"
    roster: str = BY_AGGREGATOR
    min: int = 2
    enrolled: bool = True
    federation: str = FEDERATION
    now: float = 0.0
    bfv: SecretKey | None = None
    records: MemoryRecords = field(init=False)
    disk: State = field(init=False)
    core: Core = field(init=False)
    actions: list[Action] = field(default_factory=list)
    random: RandomBytes = field(init=False)

    def __post_init__(self) -> None:
        self.records = MemoryRecords(roster=self.roster)
        self.random = RandomBytes(self.name)
        self.disk = replace(State.new(self.random, NOW_S), enrolled=self.enrolled)
        self.start()

    @property
    def identity(self) -> Identity:
        return identity(f"helper {self.name}")

    @property
    def profile(self) -> Profile:
        return Profile(
            federation=self.federation, helper=self.name, identity=self.identity, aggregator_public=SERVER.public,
            random=self.random, roster=self.roster, min=self.min, code="code", bfv=self.bfv, directory="'my bureau'",
        )  # fmt: skip

    def start(self) -> list[Action]:
        """Another process with the state on disk."""
        self.core = Core(self.profile, self.disk, self.records)
        return self.handle(events.Started(unix_s=NOW_S + self.now))

    def handle(self, event: events.Event) -> list[Action]:
        done = self.core.handle(event, self.now)
        for action in done:
            if isinstance(action, Save):
                self.disk = action.state
                if action.step is not None:
                    self.records.write(action.step)
        self.actions += done
        return done

    def arrive(self, *messages: tuple[str, bytes]) -> list[Action]:
        done = [
            action
            for topic, payload in messages
            for action in self.handle(events.FrameArrived(topic=topic, frame=parse(payload)))
        ]
        while (due := self.core.due_s()) is not None and due <= self.now:
            done += self.handle(events.TimeReached(unix_s=NOW_S + self.now))
        return done

    def wait(self, seconds: float) -> list[Action]:
        """Time passes; `TimeReached` comes whenever the core asked for it."""
        end, done = self.now + seconds, list[Action]()
        while (due := self.core.due_s()) is not None and due <= end:
            self.now = max(self.now, due)
            done += self.handle(events.TimeReached(unix_s=NOW_S + self.now))
        self.now = end
        return done

    def connect(self, *retained: tuple[str, bytes], echo: bool = True) -> list[Action]:
        """Connect to a broker that retains these messages and sends the helper's card back."""
        done = self.handle(events.Connected(frame_bytes=FRAME_BYTES))
        done += self.arrive(*retained)
        return done + (self.echo(done) if echo else [])

    def echo(self, actions: Sequence[Action]) -> list[Action]:
        """The broker sends the card back that was published last, and the one that follows."""
        done: list[Action] = []
        for _ in range(LOOKS):
            cards = [(each.topic, each.payload) for each in published([*actions, *done], "card")]
            done += self.arrive(*cards[-1:])
        return done

    def ask(self, made: "Asked", step: str, **changes: Any) -> Answer:
        """The answer to a step of a set; the sum, if it is opened, is in `last_sum`."""
        done = self.arrive(*made.messages(self.name, step, **{"federation": self.federation, **changes}))
        answers = published(done, Answer.KIND)
        self.last_sum = b"".join(parse(each.payload).body for each in answers)
        return Answer.from_meta(parse(answers[-1].payload).meta)

    last_sum: bytes = b""


def ready(name: str = "h-1", **settings: Any) -> Helper:
    """A helper that has started and answers asks."""
    helper = Helper(name, **settings)
    helper.connect()
    assert helper.core.is_ready
    return helper


def published(actions: Sequence[Action], kind: str) -> list[Publish]:
    return [each for each in actions if isinstance(each, Publish) and parse(each.payload).kind == kind]


def stopped(actions: Sequence[Action]) -> Stop:
    (found,) = [each for each in actions if isinstance(each, Stop)]
    return found


def logged(actions: Sequence[Action]) -> list[str]:
    return [each.event for each in actions if isinstance(each, Log)]


def terms_of(*helpers: Helper, **changes: Any) -> Terms:
    made = Terms(
        kind=MASK, bits=6, levels=1, helpers=tuple(each.profile.card(each.disk.box_key) for each in helpers), min=2,
        ternary=40, dense=3, scales=(0.5, 0.25), samples=0.0,
    )  # fmt: skip
    return replace(made, **changes)


@dataclass(frozen=True)
class World:
    """A version as the aggregator published it: what gives the context of its updates."""

    terms: Terms
    version: int = 4
    model: bytes = MODEL
    plan: bytes = PLAN

    @property
    def context(self) -> bytes:
        return context(version=self.version, model=self.model, plan=self.plan, terms=digest_of(self.terms.content()))

    @property
    def layout(self) -> Layout:
        return self.terms.layout

    def update(self, device: str, *, seq: int = 5, content: Words | None = None, **changes: Any) -> "Sent":
        """The update of a device, as part 0 of two; ``changes`` are of the header or of the message."""
        signer = changes.pop("identity", None) or identity(device)
        seeds = changes.pop("seeds", None)
        words = content if content is not None else words_of(self.layout, device)
        cards = [each.card for each in self.terms.helpers]
        seeds = seeds or [digest_of(f"{device} {each.helper} {self.context.hex()}".encode()) for each in cards]
        about = {"context": self.context, "device": signer.public}
        boxes = tuple(
            masks.box(card.box_key, seed, helper=card.public, seq=seq, **about)
            for card, seed in zip(cards, seeds, strict=True)
        )
        update = Update(
            base=changes.pop("base", self.version), samples=1, codec=PRIVATE, encoding="raw", sealed=True,
            context=changes.pop("context", self.context), min=changes.pop("min", 2), boxes=changes.pop("boxes", boxes),
        )  # fmt: skip
        header = {"federation": FEDERATION, "kind": Update.KIND, "seq": seq, "part": 0, "parts": 2, **changes}
        frame = parse(build(signer, sender=device, meta=update.meta(), body=b"body", **header))
        sent = masks.masked(
            self.layout, words, [(card.public, seed) for card, seed in zip(cards, seeds, strict=True)], **about
        )
        return Sent(device=device, member=SetMember.of(signer.public, frame), words=words, masked=sent)

    def asked(self, *updates: "Sent", **changes: Any) -> "Asked":
        values = {"version": self.version, "model": self.model, "plan": self.plan, "terms": self.terms.content()}
        return Asked(Ask(**{**values, **changes}, members=tuple(each.member for each in updates)), updates)


@dataclass(frozen=True)
class Sent:
    """What a device sent, and what is in it."""

    device: str
    member: SetMember
    words: Words
    masked: Words


def words_of(layout: Layout, device: str) -> Words:
    """Trits, dense elements, a weight and buckets of a device, the same for each name."""
    random = np.random.default_rng(list(device.encode()))
    plain = random.integers(-(2**20), 2**20, layout.plain)
    plain[layout.dense] = 255
    plain[layout.dense + 1 :] = np.tile(np.eye(BUCKETS, dtype=int)[3], layout.tensors)
    return layout.pack(random.integers(-1, 2, layout.ternary), plain)


@dataclass(frozen=True)
class Asked:
    """A set as the aggregator asks for it."""

    ask: Ask
    updates: tuple[Sent, ...] = ()

    @property
    def digest(self) -> bytes:
        names = {each.member.frame().sender: each.member.digest for each in self.updates}
        return set_digest(self.ask.context, names)

    def messages(
        self, helper: str, step: str, *, count: int = 0, digest: bytes | None = None, seq: int = 9,
        frame_bytes: int = 1 << 20, content: bytes | None = None, identity: Identity = SERVER,
        federation: str = FEDERATION,
    ) -> list[tuple[str, bytes]]:  # fmt: skip
        """The parts of the message `ask`."""
        meta = AskStep(step=step, set=self.digest if digest is None else digest, count=count).meta()
        body = b"" if step == sets.ABANDON else self.ask.content()
        frames = cut(
            identity, federation=federation, sender=AGGREGATOR, kind=AskStep.KIND, seq=seq, meta=meta,
            body=body if content is None else content, frame_bytes=frame_bytes,
        )  # fmt: skip
        return [(topics.help_of(federation, helper, AskStep.KIND), frame) for frame in frames]

    def sum_of(self, *sums: bytes) -> Words:
        """The sum of the contents: of the masked words, less the sums of masks of all helpers."""
        layout = self.ask.parsed_terms.layout
        total = np.zeros(layout.words, "<u8")
        for each in self.updates:
            layout.add(total, each.masked)
        for body in sums:
            layout.subtract(total, layout.read(body))
        return total

    @property
    def truth(self) -> Words:
        layout = self.ask.parsed_terms.layout
        total = np.zeros(layout.words, "<u8")
        for each in self.updates:
            layout.add(total, each.words)
        return total


def from_server(kind: str, meta: Mapping[str, Any], topic: str, *, seq: int = 3, **changes: Any) -> tuple[str, bytes]:
    """A message of the aggregator."""
    signer = changes.pop("identity", SERVER)
    about = {"federation": FEDERATION, "sender": AGGREGATOR, **changes}
    return topic, build(signer, kind=kind, seq=seq, meta=meta, **about)


def server_status(state: str = "online", *, session: int = 1, seq: int = 3) -> tuple[str, bytes]:
    return from_server(Status.KIND, Status(state=state, session=session).meta(), topics.status(FEDERATION), seq=seq)


def receipt(helper: Helper, outcome: str, *, of: int = 1, seq: int = 3, **changes: Any) -> tuple[str, bytes]:
    message = Receipt(
        device=changes.pop("device", helper.name), device_key=helper.identity.key_id, seq=of, outcome=outcome,
        version=0, **changes,
    )  # fmt: skip
    return from_server(Receipt.KIND, message.meta(), topics.help_of(FEDERATION, helper.name, Receipt.KIND), seq=seq)


def frames(actions: Sequence[Action], kind: str) -> list[Frame]:
    return [parse(each.payload) for each in published(actions, kind)]
