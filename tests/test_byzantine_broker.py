"""The whole federation, both cores, on a Byzantine broker.

Whatever the broker does: nothing forged is merged, nothing is merged twice, a device only ever holds a vector whose
digest the aggregator signed, nobody stops, and when the attack ends all come to the same digest.
"""

import shutil
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from support.at_length import at_length, in_every_run
from support.byzantine_broker import FAULTS, NUMBERS, Adversary, ByzantineBroker, Fault
from support.noise_trainer import MODEL, NoiseTrainer
from support.small_world import scratch
from ternbus.aggregator.core import events as aggregator_events
from ternbus.aggregator.core import records
from ternbus.aggregator.store import ledger as durable
from ternbus.broker.protocol.identity import Identity, seal
from ternbus.broker.protocol.messages import PAUSED
from ternbus.broker.protocol.schema import Vector, vector_digest
from ternbus.edge.core import events
from ternbus.edge.core.actions import Action, Save, Stop
from ternbus.edge.core.follower import InitialModel
from ternbus.edge.core.profile import Profile
from ternbus.lab.virtual import setup
from ternbus.lab.virtual.clock import Clock
from ternbus.lab.virtual.memory_broker import Line
from ternbus.lab.virtual.training import InProcess
from ternbus.lab.virtual.virtual_aggregator import VirtualAggregator
from ternbus.lab.virtual.virtual_device import Body, VirtualDevice

NAMES = ("a", "b", "c")
FRAME_BYTES = (
    3_000  # a device's update takes three, a snapshot of the aggregator's two, to be lost, swapped and spliced
)
STEPS_MAX = 20_000
CLIENTS = st.integers(0, len(NAMES))  # the aggregator first


class Device(VirtualDevice):
    """Records the updates that it made, on a broker that takes small frames only."""

    made: dict[tuple[str, bytes, int], tuple[int, int, bytes]]

    def connected(self) -> None:
        self._handle(events.Connected(frame_bytes=FRAME_BYTES))

    def _perform(self, action: Action) -> None:
        if isinstance(action, Save) and (update := action.state.outstanding) is not None:
            about = (self.name, bytes(action.state.key), update.seq)
            content = (update.base, update.samples, update.encoded)
            assert self.made.setdefault(about, content) == content, "a number stands for two updates"
        super()._perform(action)


class Watched:
    """The aggregator's ledger, and what is written to it held against what devices made."""

    def __init__(self, ledger: durable.Ledger, made: dict[tuple[str, bytes, int], tuple[int, int, bytes]]) -> None:
        self._ledger = ledger
        self._made = made
        self.digests: dict[int, bytes] = {}
        self.pending: list[tuple[str, int]] = []
        self.merged: set[tuple[str, int]] = set()
        self.frame = ledger.frame

    def write(self, batch: Iterable[records.Record], now: float | None = None) -> None:
        given = list(batch)
        self._ledger.write(given, now)
        for record in given:
            match record:
                case records.UpdateAccepted():
                    update = record.update
                    about = (update.device, bytes(update.key), update.seq)
                    assert self._made.get(about) == (update.base, update.samples, record.body), "nobody made this"
                    self.pending.append((update.device, update.base))
                case records.VersionMade():
                    assert record.version not in self.digests
                    self.digests[record.version] = record.digest
                    assert record.updates == len(self.pending)
                    assert self.merged.isdisjoint(self.pending), "merged twice"
                    self.merged.update(self.pending)
                    self.pending.clear()
                case _:
                    pass


def left(stop: Stop) -> None:
    raise AssertionError(f"a device ended: {stop.reason}")


class ByzantineFederation(RuleBasedStateMachine):
    """Rules are faults, crashes and time."""

    @initialize(attacks_uplink=st.booleans(), codec=st.sampled_from(["ternary", "float32"]), stolen=st.booleans())
    def begin(self, attacks_uplink: bool, codec: str, stolen: bool) -> None:
        self.folder = scratch()
        self.attacks_uplink = attacks_uplink
        self.clock = Clock()
        chosen = {
            "merge.buffer_size": 2,
            "merge.max_wait_s": 5.0,
            "downlink.codec": codec,
            "downlink.slots": 4,
            "limits.frame_bytes": 4096,
            "plan.codec": "float32",
        }
        founded = setup.on_disk(self.folder / "aggregator", NAMES, dict(MODEL), chosen)
        assert isinstance(founded.ledger, durable.Ledger)
        self.ledger = founded.ledger
        identities = {name: Identity(setup.drawn(0, name)) for name in NAMES}
        keys = (Identity(b"l" * 32), *(identities.values() if stolen else ()))
        self.broker = ByzantineBroker(self.clock, Adversary(keys), Adversary(keys))
        made: dict[tuple[str, bytes, int], tuple[int, int, bytes]] = {}
        self.watched = Watched(self.ledger, made)
        self.aggregator = VirtualAggregator(
            self.clock, self.broker, self.watched, founded.core, lambda version, vector: None
        )
        core = self.aggregator.core
        self.watched.digests[0] = core.model.digest
        public = core.identity.public
        vectors: WeakValueDictionary[bytes, Vector] = WeakValueDictionary()
        self.devices: list[Device] = []
        for index, (name, identity) in enumerate(identities.items()):
            profile = Profile(
                federation=setup.FEDERATION,
                device=name,
                identity=identity,
                aggregator_public=public,
                seal=lambda plain: seal(public, plain),
                role="train",
                code=founded.codes[name],
                tensors={each: tuple(array.shape) for each, array in MODEL.items()},
            )
            body = Body(
                profile=profile,
                begin=partial(InProcess([(NoiseTrainer(), None)]).begin, 0),
                trainer=NoiseTrainer(),
                held=None,
                initial_model=InitialModel(
                    tensors={**MODEL, "b": np.full(3, index, np.float32)}
                ),  # the first one's is right
                seconds=partial(float, 1.5 + index),
                line=Line(latency_s=0.02),
            )
            device = Device(self.clock, self.broker, body, vectors, left)
            device.made = made
            self.devices.append(device)
        self.dead: set[int] = set()
        self.aggregator.start()
        for device in self.devices:
            device.start()

    def run_for(self, seconds: float) -> None:
        end = self.clock.now + seconds
        for _ in range(STEPS_MAX):
            if (when := self.clock.next_at) is None or when > end:
                break
            self.clock.step()
        else:
            raise AssertionError("it never comes to rest")
        self.clock.at(end, lambda: None)
        while self.clock.now < end:
            self.clock.step()

    def run_until(self, done: Callable[[], bool]) -> None:
        """Every timer of the protocol that waits for somebody has run out long before this gives up."""
        end = self.clock.now + 600.0
        while not done():
            assert self.clock.now < end
            self.run_for(2.0)

    # -- what may happen

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0, 10.0]))
    def time_passes(self, seconds: float) -> None:
        self.run_for(seconds)

    @rule(faults=FAULTS)
    def attack_what_clients_get(self, faults: list[Fault]) -> None:
        self.broker.down.faults.extend(faults)
        self.run_for(0.5)

    @precondition(lambda self: self.attacks_uplink)
    @rule(faults=FAULTS)
    def attack_what_the_broker_gets(self, faults: list[Fault]) -> None:
        self.broker.up.faults.extend(faults)
        self.run_for(0.5)

    @rule()
    def deliver_late(self) -> None:
        self.broker.down.release_delayed()
        self.broker.up.release_delayed()

    @precondition(lambda self: self.broker.down.observed)
    @rule(client=CLIENTS, chosen=st.lists(NUMBERS, min_size=1, max_size=8))
    def replay(self, client: int, chosen: list[int]) -> None:
        observed = self.broker.down.observed
        for number in chosen:
            self.broker.send(client, *observed[number % len(observed)])

    @precondition(lambda self: self.broker.down.observed)
    @rule(client=CLIENTS, number=NUMBERS, chosen=NUMBERS)
    def forge(self, client: int, number: int, chosen: int) -> None:
        topic, payload = self.broker.down.observed[chosen % len(self.broker.down.observed)]
        self.broker.send(client, topic, self.broker.down.forged(payload, number))

    @rule(client=CLIENTS, after=st.sampled_from([0.0, 0.3, 5.0]))
    def crash(self, client: int, after: float) -> None:
        victim = self.aggregator if client == 0 else self.devices[client - 1]
        victim.kill()
        self.run_for(after)
        victim.restart()

    @rule(after=st.sampled_from([0.0, 3.0]))
    def everybody_is_cut_off(self, after: float) -> None:
        self.broker.stop()
        self.run_for(after)
        self.broker.start()

    # -- what must hold

    @invariant()
    def devices_hold_what_the_aggregator_signed(self) -> None:
        for device in getattr(self, "devices", ()):
            follower = device.core.follower
            assert not (follower.unconfirmed and follower.synced)  # nobody trains on an unconfirmed model
            if follower.vector is not None and follower.version is not None and not follower.unconfirmed:
                assert vector_digest(follower.vector) == self.watched.digests[follower.version]

    @invariant()
    def the_ledger_has_everything_once(self) -> None:
        if hasattr(self, "ledger"):
            rows = self.ledger.db.execute("SELECT device, base, merged FROM updates").fetchall()
            assert {(device, base) for device, base, merged in rows if merged is not None} == self.watched.merged
            assert len(rows) == len(self.watched.merged) + len(self.watched.pending)

    def teardown(self) -> None:
        """The attack ends: the federation goes on, and all come to the same digest."""
        if len(getattr(self, "devices", ())) < len(NAMES):
            return  # it never began
        self.broker.stop()
        self.run_for(
            1.0
        )  # who is connecting fails, and begins another session: the attacker has the last will of this one
        self.broker.become_honest(lose_everything=self.attacks_uplink)
        before = self.aggregator.core.model.version
        accepted = [device.state.accepted for device in self.devices]
        self.run_until(
            lambda: (
                self.aggregator.core.model.version >= before + 3
                and all(device.state.accepted > count for device, count in zip(self.devices, accepted, strict=True))
            )
        )
        self.aggregator._handle(aggregator_events.StateRequested(state=PAUSED))
        self.run_until(lambda: all(device.core.follower.synced for device in self.devices))
        self.run_for(10.0)
        self.devices_hold_what_the_aggregator_signed()
        self.the_ledger_has_everything_once()
        model = self.aggregator.core.model
        assert {device.core.follower.digest for device in self.devices} == {model.digest}
        assert {device.core.follower.version for device in self.devices} == {model.version}
        self.ledger.close()
        shutil.rmtree(self.folder, ignore_errors=True)


ABOUT: dict[str, Any] = {"stateful_step_count": 20, "suppress_health_check": list(HealthCheck)}
TestByzantineBroker = in_every_run(ByzantineFederation, max_examples=35, **ABOUT)
TestByzantineBrokerAtLength = at_length(ByzantineFederation, max_examples=250, **ABOUT)
