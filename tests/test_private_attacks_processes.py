"""(e) Substitution and lies against real processes: a hostile device, helper, and aggregator.

What a broker retains is tried on both brokers.
"""

import queue
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Final, cast

import pytest

from crash.federation import AGGREGATOR, as_json
from crash.private import HELPERS, MIN, PrivateFederation
from crash.private_differences import read
from support.lying_helper import LIES
from support.private_sets import identity
from support.set_world import PrivateDevice, World, content_of
from ternbus.aggregator.shell.administration import KEY
from ternbus.aggregator.store import set_rows
from ternbus.aggregator.store.ledger import LEDGER
from ternbus.broker.files import read_key
from ternbus.broker.link.events import Arrived
from ternbus.broker.link.link import Link
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame, build, parse
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.messages import Status, Update
from ternbus.broker.protocol.model_messages import Head
from ternbus.broker.server.running import Engine
from ternbus.broker.sums.plan_bytes import plan_bytes
from ternbus.broker.sums.terms import Terms, context, digest_of
from ternbus.edge.shell.directory import DeviceDirectory

pytestmark = pytest.mark.slow

LAB: Final = "lab"
WITHIN_S: Final = 60.0
HOSTILE, LYING, CURIOUS = "d3", "h-2", "d0"


@dataclass
class Client:
    """Somebody at the broker who keeps the newest message of each topic."""

    name: str
    url: str
    newest: dict[str, Frame] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=list)
    _queue: "queue.SimpleQueue[Any]" = field(default_factory=queue.SimpleQueue)

    def __post_init__(self) -> None:
        self.link = Link(self.url, client_id=self.name, username=self.name, deliver=self._queue.put)

    def connect(self, *filters: str, will: tuple[str, bytes] = ("gone", b"")) -> None:
        self.link.connect(*will)
        self.link.subscribe(filters)

    def until(self, done: Callable[[], object], more: Callable[[], object] = lambda: None) -> None:
        deadline = time.monotonic() + WITHIN_S
        while not done():
            assert time.monotonic() < deadline, "it took too long"
            more()
            try:
                event = self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
            if isinstance(event, Arrived):
                if event.payload:
                    self.newest[event.topic] = parse(event.payload)
                    self.kinds.append(self.newest[event.topic].kind)
                self.link.acknowledge([event.token])


@dataclass(frozen=True)
class Seen:
    """What `PrivateDevice` needs to know of an aggregator."""

    identity: Identity
    terms_of: dict[int, Terms]
    contexts: dict[int, bytes]

    @classmethod
    def by(cls, client: Client, aggregator: Identity) -> "Seen | None":
        """From what the broker retains; None while terms are missing."""
        head = client.newest.get(topics.head(LAB))
        terms = client.newest.get(topics.terms(LAB, 0))
        if head is None or terms is None or head.meta["plan"].get("terms") != digest_of(terms.body):
            return None
        about = Head.from_meta(head.meta)
        made = context(
            version=about.version,
            model=about.digest,
            plan=digest_of(plan_bytes(head.meta_bytes)),
            terms=digest_of(terms.body),
        )
        return cls(aggregator, {about.version: Terms.parse(terms.body)}, {about.version: made})


class FourDevices(PrivateFederation):
    """The last of them is the test itself, and one of its helpers may lie."""

    devices: ClassVar[Sequence[str]] = ("d0", "d1", "d2", HOSTILE)
    honest: ClassVar[Sequence[str]] = ("d0", "d1", "d2")

    def process(self, name: str) -> tuple[str, list[str]]:
        if name != LYING:
            return super().process(name)
        return "support.lying_helper", [str(self.device(name))]

    @property
    def spoiled(self) -> dict[str, int]:
        with closing(sqlite3.connect(self.home / LEDGER, timeout=30.0)) as db:
            counts: dict[str, int] = set_rows.status(db)["spoiled"]
        return counts


def aggregator_of(federation: PrivateFederation) -> Identity:
    return Identity(read_key(federation.home / KEY))


def send_beyond_the_range(federation: FourDevices) -> None:
    """The hostile device's update on the newest version, with a weight that no device has."""
    own = DeviceDirectory(federation.device(HOSTILE)).identity()
    client = Client(HOSTILE, federation.broker)
    device = PrivateDevice(HOSTILE, cast(Any, None), identity=own, seq=time.time_ns() // 1000)
    will = device.frame("status", Status(state="offline", session=1).meta())
    client.connect(
        topics.head(LAB),
        topics.terms(LAB, 0),
        topics.down(LAB, HOSTILE, "receipt"),
        will=(device.topic("status"), will),
    )
    found: list[Seen] = []

    def is_seen() -> bool:
        found[:] = [each for each in [Seen.by(client, aggregator_of(federation))] if each is not None]
        return bool(found)

    client.until(is_seen, federation.look)
    (seen,) = found
    ((version, terms),) = seen.terms_of.items()
    ternary, plain = content_of(terms, HOSTILE)
    plain[terms.dense] = 2**30
    for frame in device.private_update(cast(World, seen), version, (ternary, plain), frame_bytes=2_000_000):
        client.link.publish(device.topic("update"), frame)
    receipt = topics.down(LAB, HOSTILE, "receipt")
    client.until(lambda: receipt in client.newest, federation.look)
    assert client.newest[receipt].meta["outcome"] == "accepted"
    client.link.disconnect(5.0)


def test_e_bodies_out_of_range_and_wrong_sums_are_found_the_set_is_dropped_and_its_members_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    with FourDevices(tmp_path, Engine.MOSQUITTO) as federation:
        federation.assemble()
        send_beyond_the_range(federation)
        federation.start(*federation.honest)
        federation.until(lambda: federation.spoiled, "set that is dropped because of a device")
        first = federation.spoiled
        assert len(first) >= MIN
        assert set(first.values()) == {1}
        lies = federation.device(LYING) / LIES
        lies.touch()
        federation.until(lambda: sum(federation.spoiled.values()) > sum(first.values()), "set of a helper that lies")
        lies.unlink()
        federation.until_later(2)
        federation.end(*federation.honest, *HELPERS, AGGREGATOR)
        story = read(federation)
        spoilt = [each for each in story.dropped if each.reason.startswith("sum-out-of-range")]
        counts = Counter(each.update.device for each in spoilt)
        assert counts == federation.spoiled
        assert counts[HOSTILE] == 1  # in all the other sets was a helper
        assert all(each.reason.endswith("helpers h-1, h-2") for each in spoilt)
        assert story.entries[-1].sets
        assert as_json("aggregator", "log", "verify", federation.home)["ok"]


class Unpinned(PrivateFederation):
    """Its one device trusts a helper that this aggregator has not: the aggregator's helpers are its own."""

    devices: ClassVar[Sequence[str]] = (CURIOUS,)

    def options(self, name: str) -> Sequence[str]:
        return "--private", "--helper", identity("a helper of another party").public.hex(), "--partition", "iid:0/8"


@pytest.mark.parametrize("engine", [Engine.MOSQUITTO, Engine.NATS], ids=str)
def test_e_an_aggregator_that_is_its_own_helper_gets_nothing_nor_does_a_head_without_private(
    engine: Engine, tmp_path: Path
) -> None:
    with Unpinned(tmp_path, engine) as federation:
        federation.assemble()
        watcher = Client("watcher", federation.broker)
        watcher.connect(f"{topics.root(LAB)}/up/{CURIOUS}/+", f"{topics.root(LAB)}/all/#")
        federation.start(CURIOUS)

        def says(text: str) -> bool:
            return text in federation.said(CURIOUS)

        watcher.until(partial(says, "which its owner has pinned, is not in the terms"), federation.look)
        federation.end(AGGREGATOR)
        own, head = aggregator_of(federation), watcher.newest[topics.head(LAB)]
        plain = {name: value for name, value in head.meta["plan"].items() if name != "terms"}
        for number, plan in enumerate(({**plain, "codec": "ternary"}, {**head.meta["plan"], "codec": "float32"}), 1):
            meta = {**head.meta, "plan": plan}
            about: dict[str, Any] = {"federation": LAB, "sender": "aggregator", "kind": "head"}
            online = Status(state="online", session=1000).meta()
            seq = head.seq + 10**6 * number
            for topic, kind, said in ((topics.status(LAB), "status", online), (topics.head(LAB), "head", meta)):
                payload = build(own, **{**about, "kind": kind}, seq=seq, meta=said)
                watcher.link.publish(topic, payload, retain=True)
            watcher.until(partial(says, f'the plan has the codec "{plan["codec"]}"'), federation.look)
        shown = as_json("edge", "status", federation.device(CURIOUS))
        assert "requires private sums" in str(shown["refusal"])
        federation.end(CURIOUS)
        watcher.until(lambda: watcher.newest[topics.up(LAB, CURIOUS, "status")].meta["state"] == "offline")
        assert {Update.KIND, "offer", "metrics"}.isdisjoint(watcher.kinds)
        watcher.link.disconnect(5.0)
