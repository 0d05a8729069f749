"""A small federation without a network, for tests of the aggregator: its directory, its core, devices that sign."""

import atexit
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ternbus.aggregator import settings as configuration
from ternbus.aggregator.core import events, records
from ternbus.aggregator.core.core import Core
from ternbus.aggregator.merge.accepted import AcceptedUpdate
from ternbus.aggregator.shell import administration
from ternbus.aggregator.shell.preverify import ROOM_BYTES, Preverifier
from ternbus.aggregator.store import membership
from ternbus.aggregator.store.ledger import LEDGER, Ledger
from ternbus.aggregator.store.recovery import Waiting, recover
from ternbus.broker.files import read_key
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame, build, parse
from ternbus.broker.protocol.identity import Identity, KeyId, enroll_proof, seal
from ternbus.broker.protocol.messages import Enroll, Metrics, Offer, Receipt, Status, Update
from ternbus.broker.protocol.model_messages import Head, Snapshot
from ternbus.broker.protocol.parts import cut
from ternbus.broker.protocol.schema import Schema, vector_digest, vector_of, vector_xxh3
from ternbus.broker.protocol.ternary import Block, decode, encode

LAB = "lab"
BROKER_URL = "mqtt://127.0.0.1:1"
FRAME_BYTES = 120 * 1024
SHAPES: Mapping[str, tuple[int, ...]] = {"w": (16, 40), "b": (3,)}  # 640 ternary elements, 3 dense

Record = TypeVar("Record")

_SCRATCH = Path(tempfile.mkdtemp(prefix="ternbus-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
atexit.register(shutil.rmtree, _SCRATCH, ignore_errors=True)


def initial_model(seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    generator = np.random.default_rng(seed)
    return {name: generator.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@cache
def _template(settings: tuple[tuple[str, object], ...]) -> Path:
    directory = Path(tempfile.mkdtemp(dir=_SCRATCH)) / "template"
    administration.create(directory, federation=LAB, broker=BROKER_URL, model=initial_model(), settings=dict(settings))
    return directory


def make_directory(directory: Path, **settings: object) -> Path:
    """An aggregator's directory; settings as ``merge__buffer_size=1``. Made once for each choice, then copied."""
    chosen = tuple(sorted((name.replace("__", "."), value) for name, value in settings.items()))
    return Path(shutil.copytree(_template(chosen), directory))


def scratch() -> Path:
    """A fresh folder in memory, where there is one: what is tested there does not wait for a disk."""
    return Path(tempfile.mkdtemp(dir=_SCRATCH))


@dataclass(slots=True)
class Device:
    """A device's name, key and counter; it makes the frames that a true or a false one would send."""

    name: str
    schema: Schema
    identity: Identity = field(default_factory=Identity.generate)
    seq: int = 0

    def next_seq(self) -> int:
        self.seq += 1
        return self.seq

    def topic(self, kind: str) -> str:
        return topics.up(LAB, self.name, kind)

    def frame(
        self, kind: str, meta: Mapping[str, Any], *, seq: int | None = None, body: bytes = b"", **about: Any
    ) -> bytes:
        number = self.next_seq() if seq is None else seq
        whole = {"federation": LAB, "sender": self.name, **about}
        return build(self.identity, kind=kind, seq=number, meta=meta, body=body, **whole)

    def update(
        self,
        block: Block | bytes,
        base: int,
        *,
        samples: int = 10,
        seq: int | None = None,
        codec: str | None = None,
        encoding: str = "raw",
        seal_to: bytes | None = None,
        frame_bytes: int = FRAME_BYTES,
        metrics: Mapping[str, float] | None = None,
    ) -> list[bytes]:
        """The frames of an update; a block as bytes is sent as it is."""
        number = self.next_seq() if seq is None else seq
        body = block if isinstance(block, bytes) else encode(block.content, encoding)
        if seal_to is not None:
            body = seal(seal_to, bytes(self.identity.key_id) + struct.pack("<Q", number) + body)
        value = Update(
            base=base,
            samples=samples,
            codec=codec or ("ternary" if isinstance(block, bytes) else block.codec),
            encoding=encoding,
            sealed=seal_to is not None,
            metrics={"loss": 0.5} if metrics is None else metrics,
        )
        return cut(
            self.identity,
            federation=LAB,
            sender=self.name,
            kind=value.KIND,
            seq=number,
            meta=value.meta(),
            body=body,
            frame_bytes=frame_bytes,
        )

    def offer(self, base: int, parts: int, *, seq: int | None = None) -> bytes:
        return self.frame("offer", Offer(base=base, parts=parts).meta(), seq=seq)

    def status(self, state: str, session: int = 1, *, base: int = -1, seq: int | None = None) -> bytes:
        return self.frame("status", Status(state=state, session=session, base=base).meta(), seq=seq)

    def metrics(self, version: int, split: str = "test", *, seq: int | None = None, **values: float) -> bytes:
        return self.frame("metrics", Metrics(version=version, samples=100, split=split, values=values).meta(), seq=seq)

    def enroll(self, code: str, *, seq: int | None = None) -> bytes:
        public = self.identity.public
        return self.frame(
            "enroll", Enroll(public_key=public).meta(), seq=seq, body=enroll_proof(code, LAB, self.name, public)
        )


def ternary_block(schema: Schema, seed: int, scale: float = 0.125) -> Block:
    generator = np.random.default_rng(seed)
    trits = generator.integers(-1, 2, size=schema.ternary_elements).astype(np.int8)
    dense = generator.normal(scale=0.1, size=schema.dense_elements).astype(np.float32)
    return Block.of_trits(schema, [scale] * len(schema.ternary), trits, dense)


def float32_block(schema: Schema, seed: int) -> Block:
    change = np.random.default_rng(seed).normal(scale=0.1, size=schema.elements).astype(np.float32)
    return Block.of_float32(schema, change)


def accepted_update(device: str = "pi", **fields: Any) -> AcceptedUpdate:
    """An update as it is held once it was accepted, of which only ``fields`` matter."""
    blank: dict[str, Any] = {"key": KeyId(bytes(8)), "seq": 1, "base": 0, "digest": bytes(32), "staleness": 0}
    blank |= {"samples": 1, "discount": 1.0, "codec": "ternary", "encoding": "raw"}
    return AcceptedUpdate(device=device, **{**blank, **fields})


class Late(Future[Any]):
    """Work that a thread has not come to: it is done when somebody wants to see it."""

    def __init__(self, work: Callable[[], object]) -> None:
        super().__init__()
        self.work = work

    def result(self, timeout: float | None = None) -> Any:
        if not self.done():
            self.set_result(self.work())
        return super().result(timeout)


class Lazy(Executor):
    """A thread at the test's command: what it was given is done by ``work``, or when it is waited for."""

    def __init__(self) -> None:
        self.given: list[Late] = []

    def submit(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Late:
        self.given.append(Late(partial(function, *args, **named)))
        return self.given[-1]

    def work(self) -> None:
        for late in self.given:
            late.result()
        self.given.clear()


OPENED: list[Ledger] = []  # by benches, since the test began; Python 3.13 warns of a database that nobody closes


def close_ledgers() -> None:
    """Close what a test has left open, without a word, as a crash does."""
    while OPENED:
        ledger = OPENED.pop()
        ledger.bodies.close()
        ledger.db.close()


class Bench:
    """An aggregator's core over its real ledger; what it publishes is kept here, what it saves is on disk first."""

    def __init__(self, directory: Path, *, now: float = 1000.0) -> None:
        self.directory = directory
        self.now = now
        self.published: list[events.Publish] = []
        self.retained: dict[str, bytes] = {}
        self.last: list[events.Action] = []
        self.acknowledges = True  # the broker acknowledges heads; of other messages a test says it
        self.identity = Identity(read_key(directory / administration.KEY))
        self.recover()

    def recover(self) -> None:
        self.connected = False
        self.beside = Lazy()
        self.ledger = Ledger(self.directory / LEDGER, beside=self.beside)
        OPENED.append(self.ledger)
        self.core: Core = recover(self.ledger, administration.load_settings(self.directory), self.identity, "test")
        self.schema = self.core.schema

    def restart(self) -> None:
        """End without a word, begin again from disk; nothing is connected yet."""
        self.crash()
        self.recover()

    def crash(self) -> None:
        """Nothing more is written, not even what was to be written beside."""
        self.ledger.bodies.close()
        self.ledger.db.close()

    def close(self) -> None:
        self.ledger.close()

    def perform(self, actions: Sequence[events.Action]) -> list[events.Action]:
        self.last = list(actions)
        batch = [action.record for action in actions if isinstance(action, events.Save)]
        if batch:
            self.ledger.write(batch, now=self.now)
        for action in actions:
            if isinstance(action, events.Publish):
                self.publish(action)
            elif isinstance(action, events.RepublishRetained):
                for topic in action.topics:
                    self.publish(events.Publish(topic=topic, payload=self.ledger.frame(topic), retain=True))
        return self.last

    def publish(self, action: events.Publish) -> None:
        self.published.append(action)
        if action.retain:
            if action.payload:
                self.retained[action.topic] = action.payload
            else:
                self.retained.pop(action.topic, None)

    def handle(self, event: events.Event) -> list[events.Action]:
        if isinstance(event, events.Connected | events.Disconnected):
            self.connected = isinstance(event, events.Connected)
        actions = self.perform(self.core.handle(event, self.now))
        head = topics.head(LAB)
        if self.acknowledges and head in self.core.awaited and any(_is_of(each, head) for each in actions):
            self.last = [*actions, *self.perform(self.core.handle(events.Published(topic=head), self.now))]
        return self.last

    def start(self, frame_bytes: int = FRAME_BYTES, most_bytes: int = 0) -> list[events.Action]:
        """Start and connect to a broker that has kept what was published here before."""
        began = self.perform(self.core.start(self.now))
        return [*began, *self.connect(frame_bytes, most_bytes)]

    def connect(self, frame_bytes: int = FRAME_BYTES, most_bytes: int = 0) -> list[events.Action]:
        head = self.retained.get(topics.head(LAB))
        actions = self.dial()
        actions = actions + self.handle(events.Connected(frame_bytes=frame_bytes, most_bytes=most_bytes))
        if head is not None:
            actions = actions + self.receive(topics.head(LAB), head)
        return actions

    def dial(self) -> list[events.Action]:
        """Lose the connection, if there is one; then let time pass until the core asks for another."""
        actions = self.handle(events.Disconnected()) if self.connected else []
        while not any(isinstance(action, events.Connect) for action in actions):
            assert self.core.deadline is not None
            self.now = max(self.now, self.core.deadline)
            actions = self.tick()
        return actions

    def receive(self, topic: str, *payloads: bytes) -> list[events.Action]:
        actions: list[events.Action] = []
        for payload in payloads:
            event = events.MessageArrived(topic=topic, payload=payload, packet_bytes=len(payload) + 50)
            actions += self.handle(event)
        self.last = actions
        return actions

    def tick(self, seconds: float = 0.0) -> list[events.Action]:
        self.now += seconds
        return self.handle(events.TimeReached())

    def invite(
        self, name: str, code: str = "a-code-of-an-invitation", expires_at: float = 1e12, *, evaluator: bool = False
    ) -> str:
        membership.invite(self.ledger.db, {name: code}, 0.0, expires_at, [name] if evaluator else ())
        self.handle(events.InvitationsRead(codes=membership.codes(self.ledger.db)))
        return code

    def revoke(self, name: str, why: str = "", *, keep: bool = False) -> list[events.Action]:
        buffer = Waiting(self.ledger, self.schema)
        return self.handle(events.RevokeRequested(device=name, why=why, keep=keep, buffer=buffer))

    def join(self, name: str, *, evaluator: bool = False) -> Device:
        """A device that enrolled under a new key."""
        device = Device(name, self.schema)
        self.receive(device.topic("enroll"), device.enroll(self.invite(name, evaluator=evaluator)))
        assert receipts(self.last)[-1].outcome == "enrolled"
        return device

    def send(self, device: Device, block: Block | bytes, base: int, **about: Any) -> list[Receipt]:
        """Deliver an update; return the receipts that follow."""
        return receipts(self.receive(device.topic("update"), *device.update(block, base, **about)))

    @property
    def version(self) -> int:
        return self.core.model.version

    @property
    def head(self) -> Head:
        return Head.from_meta(parse(self.retained[topics.head(LAB)]).meta)


def frames_of(actions: Iterable[events.Action], kind: str) -> list[Frame]:
    """The frames of a kind that are published, in order."""
    frames = [parse(action.payload) for action in actions if isinstance(action, events.Publish) and action.payload]
    return [frame for frame in frames if frame.kind == kind]


def receipts(actions: Iterable[events.Action]) -> list[Receipt]:
    return [Receipt.from_meta(frame.meta) for frame in frames_of(actions, "receipt")]


def heads(actions: Iterable[events.Action]) -> list[Head]:
    return [Head.from_meta(frame.meta) for frame in frames_of(actions, "head")]


def saved(actions: Iterable[events.Action], kind: type[Record]) -> list[Record]:
    found = [action.record for action in actions if isinstance(action, events.Save)]
    return [record for record in found if isinstance(record, kind)]


def published(actions: Iterable[events.Action]) -> list[events.Publish]:
    return [action for action in actions if isinstance(action, events.Publish)]


def place(actions: list[events.Action], kind: type, what: str = "") -> int:
    """Where in the order the first such action stands."""
    for number, action in enumerate(actions):
        if isinstance(action, events.Save) and isinstance(action.record, kind):
            return number
        if isinstance(action, kind) and what in getattr(action, "topic", ""):
            return number
    raise AssertionError(f"no {kind.__name__}")


def refusals(actions: Iterable[events.Action]) -> dict[str, int]:
    """What the counters say that was refused, by reason."""
    total: dict[str, int] = {}
    for record in saved(actions, records.Observed):
        for reason, number in record.refused.items():
            total[reason] = total.get(reason, 0) + number
    return total


def reconfigure(bench: Bench, **changes: Mapping[str, object]) -> None:
    """Edit aggregator.toml: ``downlink={"slots": 2}``."""
    settings = administration.load_settings(bench.directory)
    sections: dict[str, Any] = {
        name: keys if name == "plan" else replace(getattr(settings, name), **keys) for name, keys in changes.items()
    }
    (bench.directory / administration.TOML).write_text(configuration.dumps(replace(settings, **sections)))


def preverifier_of(bench: Bench, room_bytes: int = ROOM_BYTES) -> Preverifier:
    core = bench.core
    return Preverifier(
        registry=core.registry, validation=core.validation, model=core.model, work=core.work, room_bytes=room_bytes
    )


class LostError(Exception):
    """The broker does not hold what a device needs to follow."""


def follow(retained: Mapping[str, bytes], public: bytes) -> tuple[int, bytes]:
    """Follow the model as a device does that knows nothing yet: head, snapshot, deltas. (version, digest)"""

    def message(topic_of: Any, parts: int | None = None) -> tuple[Frame, bytes]:
        frames: list[Frame] = []
        while parts is None or len(frames) < parts:
            payload = retained.get(topic_of(len(frames)))
            if payload is None:
                raise LostError(topic_of(len(frames)))
            frame = parse(payload)
            frame.check_authentic(public)
            if frame.part != len(frames) or (frames and (frame.seq, frame.parts) != (frames[0].seq, frames[0].parts)):
                raise LostError(f"{topic_of(len(frames))} holds a part of another message")
            frames.append(frame)
            parts = frame.parts if parts is None else parts
        return frames[0], b"".join(frame.body for frame in frames)

    if topics.head(LAB) not in retained:
        raise LostError("no head")
    head = Head.from_meta(parse(retained[topics.head(LAB)]).meta)
    named = head.snapshot
    frame, body = message(lambda part: topics.snapshot(LAB, named.place, part), named.parts)
    snapshot = Snapshot.from_meta(frame.meta)
    if snapshot.version != named.version:
        raise LostError(f"the snapshot is of version {snapshot.version}, not {named.version}")
    body = decode(body, snapshot.encoding, snapshot.content_bytes)
    schema = Schema.parse(body[: snapshot.schema_bytes])
    vector = vector_of(body[snapshot.schema_bytes :], schema)
    assert vector_digest(vector) == snapshot.digest
    assert head.version - named.version <= head.slots
    for version in range(named.version + 1, head.version + 1):
        frame, body = message(lambda part, slot=version % head.slots: topics.delta(LAB, slot, part))
        if frame.meta["version"] != version:
            raise LostError(f"slot {version % head.slots} holds {frame.meta['version']}, not {version}")
        vector = Block.read(schema, frame.meta["codec"], frame.meta["encoding"], body).apply(vector)
        assert vector_digest(vector) == frame.meta["digest"]
        assert vector_xxh3(vector) == frame.meta["xxh3"]
    assert vector_digest(vector) == head.digest
    return head.version, head.digest


def _is_of(action: events.Action, topic: str) -> bool:
    """Whether it publishes on this topic."""
    return isinstance(action, events.Publish) and action.topic == topic
