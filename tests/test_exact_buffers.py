"""Buffers that are exact sums: what a revocation takes out, and what a start adds again, to the same bits."""

import json
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from support.small_world import Bench, accepted_update, ternary_block
from ternbus.aggregator.merge import optimizer
from ternbus.aggregator.merge.accepted import BufferedUpdate, Journal
from ternbus.aggregator.merge.accumulator import Accumulator
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.settings import MergeSettings, Settings
from ternbus.aggregator.store.recovery import Waiting
from ternbus.aggregator.store.rows import set_fact
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.tensor_kinds import TensorKinds

SCHEMA = Schema.of({"w": (20, 30), "v": (300,), "b": (3,)})


class Written(Journal):
    """A buffer as it was accepted; it notes who was read."""

    def __init__(self, updates: Sequence[BufferedUpdate]) -> None:
        self.updates, self.read = list(updates), list[str]()

    def __iter__(self) -> Iterator[BufferedUpdate]:
        for each in self.updates:
            self.read.append(each[0].device)
            yield each

    def of(self, device: str) -> Iterator[BufferedUpdate]:
        self.read.append(device)
        return (each for each in self.updates if each[0].device == device)


def model_of(rule: str = "mean") -> Model:
    about = Settings(federation="lab", broker="mqtt://127.0.0.1:1", merge=MergeSettings(rule=rule))
    start = np.zeros(SCHEMA.elements, np.float32)
    server = optimizer.init(about.optimizer, start)
    return Model(settings=about, schema=SCHEMA, version=0, published=start, server=server, kinds=TensorKinds())


def buffered(**sizes: float) -> list[BufferedUpdate]:
    """Two updates of each device, in turn."""
    return [
        (accepted_update(device, seq=seq, samples=3 + seq), ternary_block(SCHEMA, seq, 2.0**octave))
        for seq in (1, 2)
        for device, octave in sizes.items()
    ]


@pytest.mark.parametrize(
    ("rule", "sizes", "is_read"),
    [
        ("mean", {"a": -7, "pi": -5, "c": -8}, {"pi"}),
        ("mean", {"a": -40, "pi": 9, "c": -8}, {"a", "pi", "c"}),  # a's may count once pi's are gone
        ("median", {"a": -7, "pi": -5, "c": -8}, {"a", "pi", "c"}),
    ],
)
def test_a_revocation_leaves_the_bits_of_a_buffer_without_the_device(
    rule: str, sizes: dict[str, float], is_read: set[str]
) -> None:
    model, fresh, journal = model_of(rule), model_of(rule), Written(buffered(**sizes))
    for each in journal.updates:
        model.accept(*each)
        if each[0].device != "pi":
            fresh.accept(*each)
    model.drop("pi", journal)
    assert set(journal.read) == is_read
    assert model.buffer == fresh.buffer
    found, expected = model.merge(), fresh.merge()
    assert (found.digest, found.contributions) == (expected.digest, expected.contributions)
    assert model.server.target.tobytes() == fresh.server.target.tobytes()


def test_what_was_in_a_candidate_is_added_again() -> None:
    """The buffer has the updates of a candidate that was dissolved, its sum has not."""
    model, fresh, journal = model_of(), model_of(), Written(buffered(a=-7, pi=-5, c=-8))
    for each in journal.updates[:3]:
        model.accept(*each)
    dissolved = model.prepare().updates
    for each in journal.updates[3:]:
        model.accept(*each)
    model.buffer[:0] = dissolved
    model.drop("pi", journal)
    fresh.refill(each for each in journal.updates if each[0].device != "pi")
    assert model.merge().digest == fresh.merge().digest


def change(bench: Bench) -> bytes:
    """What the buffer would come to."""
    return bench.core.model._gathered.result().delta.tobytes()


def target(bench: Bench) -> bytes:
    return bench.core.model.server.target.tobytes()


def test_the_ledger_s_journal_has_a_device_s_updates_alone(make: Callable[..., Bench]) -> None:
    bench = make(merge__buffer_size=9)
    pi, other = bench.join("pi"), bench.join("other")
    for device in (pi, other):
        bench.send(device, ternary_block(bench.schema, device.seq), 0, samples=7)
    waiting = Waiting(bench.ledger, bench.schema)
    assert [update for update, _ in waiting] == bench.core.model.buffer
    assert [update.device for update, _ in waiting.of("pi")] == ["pi"]
    assert not list(Journal())
    assert not list(Journal().of("pi"))
    bench.revoke("pi")
    left = change(bench)
    bench.restart()
    assert [update.device for update in bench.core.model.buffer] == ["other"]
    assert change(bench) == left


def test_a_ledger_of_before_is_replayed_in_order_and_goes_on_exactly(make: Callable[..., Bench]) -> None:
    """tests/test_formats.py opens ledgers that old code wrote; here the code of now writes as it did."""
    bench = make(merge__buffer_size=3)
    bench.core.model.sum_by(Accumulator)
    found = json.loads(bench.ledger.fact("recipe"))
    del found["exact_sums"]  # nobody wrote it
    set_fact(bench.ledger.db, "recipe", json.dumps(found))
    devices = [bench.join(name) for name in "abc"]
    for version in range(3):
        for place, device in enumerate(devices):
            bench.send(device, ternary_block(bench.schema, 3 * version + place, 0.1 + 0.01 * place), version, samples=7)
    before = target(bench)
    bench.restart()
    assert target(bench) == before
    was = bench.core.published.recipe.exact_sums
    assert not was
    set_fact(bench.ledger.db, "recipe", json.dumps({**found, "exact_sums": True}))
    bench.restart()  # had the recipe not said so, it would not be the same
    assert target(bench) != before
    set_fact(bench.ledger.db, "recipe", json.dumps(found))
    bench.restart()
    bench.start()
    assert bench.core.published.recipe.exact_sums
    for place, device in enumerate(devices):
        bench.send(device, ternary_block(bench.schema, place, 0.3), 3, samples=7 + place)
    assert bench.version == 4
    after = target(bench)
    bench.restart()
    assert target(bench) == after
