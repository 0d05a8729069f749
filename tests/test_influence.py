"""The bound on one update's influence: a formula of what is usual, recorded so that a merge done again is the same."""

import math
from collections.abc import Callable
from statistics import median_low

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.small_world import Bench, Device, accepted_update, float32_block, reconfigure, saved, ternary_block
from ternbus.aggregator import settings as configuration
from ternbus.aggregator.core import events, records
from ternbus.aggregator.merge import accumulator
from ternbus.aggregator.merge.influence import (
    DEVICES_MIN,
    NORM_FACTOR,
    SAMPLES_FACTOR,
    UPDATES_MIN,
    Bound,
    Influence,
    Usual,
    norm_at_most,
)
from ternbus.aggregator.shell import administration
from ternbus.aggregator.store import influence_rows
from ternbus.aggregator.store import status as statuses
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import Block

Make = Callable[..., Bench]
NAMES = "abcdefgh"
SCHEMA = Schema.of({"a": (7, 9), "scalar": (), "b": (4, 4), "bias": (5,)})


# --- the formula


def merge(influence: Influence, *updates: tuple[str, float, int]) -> None:
    """Each on a higher version than those before."""
    first = max((usual.base for usual in influence._newest.values()), default=-1) + 1
    influence.merged(
        [
            accepted_update(device, base=base, norm=norm, samples=samples)
            for base, (device, norm, samples) in enumerate(updates, first)
        ]
    )


@given(
    st.lists(
        st.lists(
            st.tuples(
                st.sampled_from(NAMES),
                st.integers(0, 99),
                st.just(0.0) | st.floats(1e-6, 1e6),
                st.integers(1, 2**32 - 1),
            ),
            min_size=1,
            max_size=8,
        ),
        max_size=20,
    ),
)
def test_the_bound_is_its_formula(merges: list[list[tuple[str, int, float, int]]]) -> None:
    """A multiple of the lower median over devices, each with the update on its highest version.

    Whether they are taken in merge by merge, as they were merged, or at once and in another order.
    """
    influence = Influence()
    found = [(device, Usual(base, norm, samples)) for updates in merges for device, base, norm, samples in updates]
    for updates in merges:
        influence.merged(
            [accepted_update(device, base=base, norm=norm, samples=samples) for device, base, norm, samples in updates]
        )
    measured = sorted((device, usual) for device, usual in found if usual.norm > 0)
    newest, count = dict(measured), len(measured)
    assert influence._newest == newest
    if count >= UPDATES_MIN and len(newest) >= DEVICES_MIN:
        norm = NORM_FACTOR * median_low(usual.norm for usual in newest.values())
        assert influence.bound == Bound(
            norm=norm, samples=SAMPLES_FACTOR * median_low(u.samples for u in newest.values())
        )
    else:
        assert influence.bound is None
    recalled = Influence()
    recalled.recall(measured, count)
    assert recalled == influence


def test_it_acts_after_twenty_updates_of_four_devices_and_no_sooner() -> None:
    def bound(devices: int, updates: int) -> Bound | None:
        influence = Influence()
        merge(influence, *((NAMES[n % devices], 1.0, 10) for n in range(updates)))
        return influence.bound

    assert bound(4, 19) is bound(3, 100) is None
    assert bound(4, 20) == Bound(norm=3.0, samples=40)


@pytest.mark.parametrize("norm", [None, 0.0])
def test_what_was_accepted_without_a_norm_or_weighs_nothing_counts_for_nothing(norm: float | None) -> None:
    influence = Influence()
    for _ in range(25):
        influence.merged([accepted_update(name, norm=norm) for name in NAMES[:4]])
    assert influence == Influence()


@pytest.mark.parametrize("lie", [0.0, 1e-9, 1e9])
def test_a_minority_moves_the_bound_no_further_than_the_others_norms(lie: float) -> None:
    """However often it sends; three of seven devices here."""
    influence = Influence()
    honest = [(name, 1.0 + place, 10 + place) for place, name in enumerate("abcd")]
    hostile = [(name, lie, 2**32 - 1) for name in "efg"] * 5
    for _ in range(5):
        merge(influence, *hostile, *honest, *hostile)
    assert influence.bound is not None
    assert NORM_FACTOR * 1.0 <= influence.bound.norm <= NORM_FACTOR * 4.0
    assert SAMPLES_FACTOR * 10 <= influence.bound.samples <= SAMPLES_FACTOR * 13


def twenty(influence: Influence) -> Bound:
    """Twenty honest devices, each merged three times; the last version is 15."""
    for version in range(1, 16):
        merge(influence, *((f"honest-{(4 * version + place) % 20}", 1.0, 100) for place in range(4)))
    assert influence.bound == Bound(norm=3.0, samples=400)
    return influence.bound


@pytest.mark.parametrize("devices", [1, 5])
def test_who_answers_at_once_neither_ends_the_bound_nor_leads_it(devices: int) -> None:
    """The honest ones, who are slow, are not forgotten for it, however long none of theirs is merged."""
    influence = Influence()
    before = twenty(influence)
    for lie in (1.0, 1e-12):
        for _ in range(2000):
            bound = influence.bound
            assert bound == before
            merge(influence, *((f"evil-{number}", lie * bound.norm, bound.samples) for number in range(devices)))


def test_updates_that_all_grow_are_bounded_for_a_few_rounds_only() -> None:
    """By a plan of twenty times as many steps: three rounds, since 20 is less than 3 ** 3."""
    influence, bounded = Influence(), []
    twenty(influence)
    for _ in range(6):
        bounded.append(0)
        for number in range(20):
            assert influence.bound is not None
            bounded[-1] += influence.bound.norm < 20.0
            merge(influence, (f"honest-{number}", min(20.0, influence.bound.norm), 100))
    assert bounded[0] > 10
    assert sum(bounded[3:]) == 0


@given(st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(1e-3, 6e4))
def test_the_norm_is_an_upper_bound_and_no_loose_one(seed: int, density: float, scale: float) -> None:
    generator = np.random.default_rng(seed)
    trits = (generator.integers(0, 2, size=SCHEMA.ternary_elements) * 2 - 1).astype(np.int8)
    trits *= generator.random(len(trits)) < density
    dense = generator.normal(scale=scale / 10, size=SCHEMA.dense_elements).astype(np.float32)
    dense = np.clip(dense, -65504, 65504).astype(np.float32)
    block = Block.of_trits(SCHEMA, [scale] * len(SCHEMA.ternary), trits, dense)
    exact = float(np.linalg.norm(block.value().astype(np.float64)))
    assert exact <= norm_at_most(block) * (1 + 1e-5)
    most = scale * math.sqrt(SCHEMA.ternary_elements)
    assert norm_at_most(block) <= math.hypot(most, float(np.linalg.norm(dense.astype(np.float64)))) * (1 + 1e-5)
    if density == 1:
        assert norm_at_most(block) == pytest.approx(exact, rel=1e-5)  # the longest that an attacker can send
    whole = Block.of_float32(SCHEMA, np.clip(block.value(), -65504, 65504))
    assert norm_at_most(whole) == pytest.approx(exact, rel=1e-5)


def test_a_factor_scales_down_to_the_bound_and_never_up() -> None:
    bound = Bound(norm=2.0, samples=1)
    assert [bound.factor(norm) for norm in (0.0, 2.0, 4.0)] == [1.0, 1.0, 0.5]


# --- an aggregator


def usual(bench: Bench, versions: int = 6) -> list[Device]:
    """Four devices that have been merged often enough."""
    devices = [bench.join(name) for name in NAMES[:4]]
    for version in range(versions):
        for place, device in enumerate(devices):
            bench.send(device, float32_block(bench.schema, 10 * version + place), version, samples=10 + place)
        assert bench.version == version + 1
    return devices


def logged(actions: list[events.Action]) -> list[str]:
    return [action.text for action in actions if isinstance(action, events.Log)]


def evil(bench: Bench) -> Block:
    return Block.of_float32(bench.schema, np.full(bench.schema.elements, 60_000, dtype=np.float32))


def test_the_attack_of_one_update_moves_no_weight_far(make: Make) -> None:
    """All of 60,000 in a buffer of four, with 2**32 - 1 samples: it weighed 0.99999999 and moved weights by as much."""
    bench = make(merge__buffer_size=4, downlink__codec="float32", staleness__discount="constant")
    devices = usual(bench)
    before = bench.core.model.published.copy()
    assert bench.send(devices[0], evil(bench), 6, samples=2**32 - 1)[0].outcome == "accepted"
    (line,) = logged(bench.last)
    assert line.startswith("an update of a counts less: norm 1.521e+06 (at most ")
    assert "4294967295 samples (at most 44), by what was merged of late" in line
    for place, device in enumerate(devices[1:]):
        bench.send(device, float32_block(bench.schema, place), 6, samples=11 + place)
    assert bench.version == 7
    assert np.abs(bench.core.model.published - before).max() < 1.0
    (made,) = saved(bench.last, records.VersionMade)
    assert made.updates == 4
    weights = bench.ledger.db.execute("SELECT samples, stated FROM updates WHERE merged = 7 ORDER BY id").fetchall()
    assert weights[0] == (44, 2**32 - 1)
    assert [counted for counted, stated in weights[1:]] == [stated for _, stated in weights[1:]]
    bench.tick(1.0)
    assert statuses.read(bench.directory)["counts"]["bounded"] == 1


def test_without_the_key_the_same_update_counts_for_all_that_it_says(make: Make) -> None:
    bench = make(
        merge__buffer_size=4, merge__influence_bound="none", downlink__codec="float32", staleness__discount="constant"
    )
    devices = usual(bench)
    before = bench.core.model.published.copy()
    bench.send(devices[0], evil(bench), 6, samples=2**32 - 1)
    assert logged(bench.last) == []
    for place, device in enumerate(devices[1:]):
        bench.send(device, float32_block(bench.schema, place), 6, samples=11 + place)
    assert np.abs(bench.core.model.published - before).min() > 50_000
    assert bench.ledger.db.execute("SELECT count(norm), count(stated) FROM updates").fetchone() == (0, 0)


def test_usual_updates_are_merged_as_if_there_were_no_bound(make: Make) -> None:
    """To the bit."""
    digests = []
    for bound in ("adaptive", "none"):
        bench = make(merge__buffer_size=4, merge__influence_bound=bound)
        usual(bench, 12)
        digests.append(bench.core.model.digest)
    assert digests[0] == digests[1]


def test_the_tighter_of_both_bounds_on_norms_is_in_force(make: Make) -> None:
    for fixed in (0.25, 1e6):
        bench = make(merge__buffer_size=4, merge__max_update_norm=fixed, staleness__discount="constant")
        devices = usual(bench)
        bound = bench.core.influence.bound
        assert bound is not None
        bench.send(devices[0], evil(bench), 6)
        (update,) = bench.core.model.buffer
        norm = float(np.linalg.norm(evil(bench).value().astype(np.float64)))
        assert update.discount * norm == pytest.approx(min(fixed, bound.norm), rel=1e-4)


def test_a_restart_knows_the_same_and_merges_to_the_same_bits(make: Make) -> None:
    benches = [make(merge__buffer_size=4, downlink__slots=4, staleness__max=20) for _ in range(2)]
    found = []
    for restarts, bench in zip((False, True), benches, strict=True):
        devices = usual(bench, 9)
        for version in range(9, 14):
            for place, device in enumerate(devices):
                block = evil(bench) if place == version % 4 else ternary_block(bench.schema, version + place)
                bench.send(device, block, version, samples=1000 if place == 1 else 10)
                if restarts:
                    before = (bench.core.influence, bench.core.model.buffer, bench.core.model.server.target.tobytes())
                    bench.restart()
                    core = bench.core
                    assert (core.influence, core.model.buffer, core.model.server.target.tobytes()) == before
                    bench.start()
        assert bench.version == 14
        rows = "SELECT device, base, samples, stated, discount, norm, merged FROM updates ORDER BY id"
        found.append((bench.core.influence.bound, bench.ledger.db.execute(rows).fetchall()))
    assert found[0] == found[1]


def test_a_fast_minority_neither_ends_the_bound_nor_leads_it_across_restarts(make: Make) -> None:
    """Two of seven devices, who alone are merged again and again, each time with as much as they may."""
    bench = make(merge__buffer_size=2, merge__influence_bound="adaptive", downlink__slots=4)
    honest, evils = [bench.join(name) for name in "abcde"], [bench.join(name) for name in "xy"]
    for version in range(12):
        for device in (honest[version % 5], honest[(version + 1) % 5]):
            bench.send(device, float32_block(bench.schema, version), version)
    before = bench.core.influence.bound
    assert before is not None
    for version in range(12, 75):
        for device in evils:
            bench.send(device, evil(bench), version, samples=2**32 - 1)
        assert bench.version == version + 1
        if version % 20 == 0:
            known = bench.core.influence
            bench.restart()
            assert bench.core.influence == known
            bench.start()
    after = bench.core.influence.bound
    assert after is not None
    assert after.samples == before.samples
    assert after.norm <= 1.5 * before.norm


def test_what_is_dropped_is_not_among_the_usual(make: Make) -> None:
    bench = make(merge__buffer_size=5)
    devices = [bench.join(name) for name in NAMES[:5]]
    for device in devices[:4]:
        bench.send(device, float32_block(bench.schema, 1), 0)
    bench.revoke("a")
    before = bench.core.influence
    assert before == Influence()
    bench.tick(31.0)
    bench.restart()
    assert len(bench.core.influence._newest) == 3


def test_a_new_home_is_bounded_and_one_without_the_key_is_not(make: Make) -> None:
    bench = make(started=False)
    assert administration.load_settings(bench.directory).merge.influence_bound == "adaptive"
    assert configuration.parse('federation = "lab"\nbroker = "mqtt://x"').merge.influence_bound == "none"


def test_bounding_that_is_switched_on_later_begins_with_what_is_merged_then(make: Make) -> None:
    bench = make(merge__buffer_size=4, merge__influence_bound="none")
    devices = usual(bench)
    reconfigure(bench, merge={"influence_bound": "adaptive"})
    bench.restart()
    bench.start()
    assert bench.core.influence == Influence()
    bench.send(devices[0], evil(bench), 6)
    (update,) = bench.core.model.buffer
    assert (update.discount, update.stated) == (1.0, 10)


def test_without_the_compiled_loop_the_norm_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = Schema.of({"a": (70, 110), "b": (51, 33), "c": (4,)})
    block = ternary_block(schema, 5)
    found = norm_at_most(block)
    monkeypatch.setattr(accumulator, "_count_other", None)
    assert norm_at_most(block) == found > 0


def test_a_start_finds_each_devices_newest_update_by_an_index(make: Make) -> None:
    """A ledger has a row for every update that there ever was."""
    plan = make().ledger.db.execute(f"EXPLAIN QUERY PLAN {influence_rows.NEWEST}").fetchall()
    steps = [step for *_, step in plan]
    assert any("updates USING INDEX sqlite_autoindex_updates_1 (device=?)" in step for step in steps), steps
    assert not any("SCAN updates" in step for step in steps), steps
