"""Which private updates become sets, and what the sum of a set says: pure, for any input."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ternbus.aggregator.sums.decode import decode
from ternbus.aggregator.sums.groups import Fleet, Group, Rule, Waiting, leaves_some, lost
from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.plan_keys import NO_DP, SUM
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.sums.terms import MASK, OWN, Card, SignedCard, Terms
from ternbus.broker.sums.words import BITS, BUCKETS, DENSE_STEPS, Layout

HELPER = Identity(bytes(32))
SCHEMA = Schema.of({"w": (20, 30), "b": (3,), "v": (300,)})


def members(*mins: int) -> list[Waiting]:
    return [Waiting(device=f"pi-{number}", min=least) for number, least in enumerate(mins)]


def group(*mins: int, base: int = 3, need: int = 3, devices_max: int = 7, since: float = 100.0) -> Group:
    return Group(base=base, need=need, devices_max=devices_max, members=members(*mins), since=since)


# --- sets


@given(st.lists(st.one_of(st.integers(2, 9), st.integers(2, 40)), max_size=60), st.integers(2, 12), st.integers(2, 31))
def test_every_set_has_as_many_devices_as_anybody_asks_for_and_no_more_than_fit(
    mins: list[int], need: int, devices_max: int
) -> None:
    made = group(*mins, need=need, devices_max=devices_max)
    asked = {each.device: each.min for each in made.members}
    sets = made.sets
    devices = [device for each in sets for device in each]
    assert len(set(devices)) == len(devices)
    for each in sets:
        assert max([need, *(asked[device] for device in each)]) <= len(each) <= devices_max
    if sets:
        assert max(map(len, sets)) - min(map(len, sets)) <= 1
    assert made.suffices == bool(sets)


@given(st.integers(0, 80), st.integers(2, 10), st.integers(2, 31))
def test_no_more_is_left_over_than_sets_can_hold(count: int, need: int, devices_max: int) -> None:
    made = group(*[2] * count, need=need, devices_max=devices_max)
    taken = sum(map(len, made.sets))
    if need <= devices_max and count >= need:
        assert taken == count or taken == devices_max * (count // need)
    else:
        assert taken == 0


def test_an_owner_who_wants_a_large_set_keeps_nobody_else_waiting() -> None:
    assert group(3, 3, 9, 3).sets == [("pi-0", "pi-1", "pi-3")]
    assert group(3, 9, 9).sets == []
    assert group(4, 4, 4).sets == []
    assert group(2, 2, 2, need=9).sets == []


def test_a_large_group_is_cut_evenly_and_what_does_not_fit_waits() -> None:
    assert [len(each) for each in group(*[2] * 10).sets] == [5, 5]
    assert [len(each) for each in group(*[2] * 8, need=5).sets] == [7]
    assert group(*[2] * 8, need=5).sets[0] == tuple(f"pi-{number}" for number in range(7))


# --- when

RULE = Rule(buffer_size=5, max_wait_s=30.0)
ALL = Fleet(all_contributed=True)


def test_a_group_becomes_a_set_when_the_buffer_is_full() -> None:
    assert RULE.ready([group(2, 2, 2, 2)], Fleet(), 0, 100.0) == []
    full = [group(2, 2, 2), group(2, 2, 2, base=4), group(2, base=5)]
    assert RULE.ready(full, Fleet(), 0, 100.0) == full[:2]


def test_updates_that_cannot_be_cut_yet_do_not_fill_the_buffer() -> None:
    alone = group(2, 2, base=4)
    assert RULE.ready([group(2, 2, 2), alone], Fleet(), 0, 100.0) == []
    late = Fleet(training={5: frozenset({"late"})})
    assert RULE.ready([group(2, 2, 2), group(2, 2, 2, base=5)], late, 0, 100.0) == []
    large = group(2, 2, 2, 2, 2)
    assert RULE.ready([large, group(2, 2, 2, base=5)], late, 0, 100.0) == [large]


def test_a_group_becomes_a_set_when_all_have_contributed_or_its_wait_is_over() -> None:
    made = group(2, 2, 2)
    assert RULE.ready([made], ALL, 0, 100.0) == [made]
    assert RULE.ready([made], Fleet(), 0, 129.9) == []
    assert RULE.ready([made], Fleet(), 0, 130.0) == [made]
    assert RULE.due_s([made], 100.0) == 130.0
    assert RULE.due_s([made], 130.0) is None
    assert RULE.due_s([group(2)], 100.0) is None  # it waits for company, not for time


def test_nothing_but_a_wait_that_is_over_brings_about_a_set_too_early() -> None:
    rule = Rule(buffer_size=1, max_wait_s=30.0, not_before=110.0)
    assert rule.ready([group(2, 2, 2)], ALL, 0, 109.0) == []
    assert rule.ready([group(2, 2, 2)], ALL, 0, 110.0) != []
    assert rule.ready([group(2, 2, 2, since=70.0)], ALL, 0, 100.0) != []
    assert rule.due_s([group(2, 2, 2)], 100.0) == 110.0


@pytest.mark.parametrize(("late", "waits"), [(0, False), (1, True), (2, True), (3, False), (4, False)])
def test_a_group_stays_open_for_devices_that_would_be_left_alone(late: int, *, waits: bool) -> None:
    training = {3: frozenset({"pi-0", *(f"late-{number}" for number in range(late))}), 4: frozenset({"x"})}
    fleet = Fleet(training=training, all_contributed=True)
    made = group(2, 2, 2)
    assert leaves_some(made, fleet) == waits
    assert (RULE.ready([made], fleet, 0, 100.0) == []) == waits
    assert RULE.ready([made], fleet, 0, 130.0) == [made]  # but not for ever
    assert RULE.ready([made], fleet, 4, 100.0) == [made]  # nor when nobody can join any more


def test_what_is_too_small_and_cannot_grow_is_lost() -> None:
    small, large, young = group(2, 2), group(2, 2, 2), group(2, base=4)
    assert lost([small, large, young], 4) == [small]


@pytest.mark.parametrize(
    ("groups", "resting", "needed"),
    [
        ([], 3, True),  # what all of them sent was dropped
        ([(2, 2)], 3, True),  # or what one of them sent
        ([(2, 2)], 2, False),  # too few, with another version, too
        ([(9, 9, 9)], 3, False),  # nobody's owner would have it
        ([(2, 2, 2)], 3, False),  # a set can be cut
        ([(2, 2)], 0, False),  # somebody still trains
    ],
)
def test_a_version_of_no_update_is_made_only_where_it_lets_devices_go_on(
    groups: list[tuple[int, ...]], resting: int, *, needed: bool
) -> None:
    devices = frozenset(f"pi-{number}" for number in range(resting))
    made = [group(*mins) for mins in groups]
    assert RULE.needs_version(made, devices, group(), 100.0) == needed
    later = Rule(buffer_size=5, max_wait_s=30.0, not_before=200.0)
    assert not later.needs_version(made, devices, group(), 100.0)


# --- sums


def card() -> SignedCard:
    made = Card(
        federation="lab", helper="h-1", public=HELPER.public, box_key=bytes([7]) * 32, number=1, roster=OWN, min=3
    )
    return made.signed(HELPER)


def terms(**changes: Any) -> Terms:
    about: dict[str, Any] = {
        "kind": MASK, "bits": 6, "levels": 1, "helpers": (card(),), "min": 3,
        "ternary": SCHEMA.ternary_elements, "dense": SCHEMA.dense_elements, "scales": (0.5, 2.0, 0.25), "samples": 0.0,
    }  # fmt: skip
    return Terms(**{**about, **changes})


def update(made: Terms, seed: int, weight: int = 255) -> tuple[Any, Any]:
    """The integers of one honest device."""
    random = np.random.default_rng(seed)
    private = made.dp == SUM
    steps = made.levels if private else DENSE_STEPS
    one_hot = np.zeros((len(made.scales), BUCKETS), np.int64)
    if not private:
        one_hot[np.arange(len(made.scales)), random.integers(0, BUCKETS, len(made.scales))] = 1
    ternary = random.integers(-made.levels, made.levels + 1, made.ternary)
    dense = random.integers(-steps, steps + 1, made.dense)
    return ternary, np.concatenate([dense, [weight], one_hot.reshape(-1)])


def words_of(made: Terms, contents: Sequence[tuple[Any, Any]]) -> Any:
    layout, total = made.layout, made.layout.zeros()
    for content in contents:
        layout.add(total, layout.pack(*content))
    return total


@given(st.sampled_from(BITS), st.integers(1, 3), st.integers(2, 7), st.integers(0, 2**32), st.booleans())
def test_the_sum_of_honest_devices_is_their_mean_change(
    bits: int,
    levels: int,
    devices: int,
    seed: int,
    private: bool,
) -> None:
    most = Layout(bits=bits, ternary=1, dense=1, tensors=1).sum_max(levels)
    devices = min(devices, most)
    about = {"dp": SUM, "theta": 0.2, "norm": 1.0} if private else {"dp": NO_DP, "samples": 50.0}
    made = terms(bits=bits, levels=levels, **about)
    weights = [255 if private else 64 + (seed + 13 * each) % 192 for each in range(devices)]
    contents = [update(made, seed + each, weight) for each, weight in enumerate(weights)]
    found = decode(made, SCHEMA, words_of(made, contents), devices)
    assert found.weight == sum(weights)
    integers = [sum(content[part] for content in contents) for part in (0, 1)]
    assert np.array_equal(found.buckets.reshape(-1), integers[1][made.dense + 1 :])
    omega = sum(weights) / 255
    expected = np.zeros(SCHEMA.elements)
    for segment, scale in zip(SCHEMA.segments, made.scales, strict=True):
        is_dense = segment.tensor.role == "dense"
        own = integers[is_dense][segment.offset :][: segment.tensor.elements]
        divisor = 2 * levels * 0.2 if private else (DENSE_STEPS if is_dense else levels)
        expected[segment.start : segment.stop] = scale * own / divisor / omega
    assert np.allclose(found.block.value(), expected, rtol=1e-6, atol=1e-30)


def spoiled(place: int, value: int) -> Any:
    made = terms()
    contents = [update(made, each) for each in range(3)]
    contents[0][1][place] += value
    return words_of(made, contents)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, 4 * DENSE_STEPS),
        (1, -4 * DENSE_STEPS),
        (3, 1),  # the weight, where all weigh the same
        (3, -1),
        (4, 1),  # buckets of a tensor
        (4 + BUCKETS, -1),
    ],
)
def test_a_sum_that_no_honest_devices_have_is_refused(place: int, value: int) -> None:
    with pytest.raises(ProtocolError, match="sum-out-of-range"):
        decode(terms(), SCHEMA, spoiled(place, value), 3)


def test_buckets_below_zero_are_refused_though_they_add_up() -> None:
    made = terms()
    contents = [update(made, each) for each in range(3)]
    one_hot = contents[0][1][4 : 4 + BUCKETS]
    one_hot[:2] += (-4, 4)
    with pytest.raises(ProtocolError, match="buckets"):
        decode(made, SCHEMA, words_of(made, contents), 3)


def test_ternary_elements_beyond_what_so_many_devices_have_are_refused() -> None:
    made = terms(levels=2)
    contents = [update(made, each) for each in range(3)]
    contents[0][0][17] = 15
    with pytest.raises(ProtocolError, match="a ternary element is beyond 6"):
        decode(made, SCHEMA, words_of(made, contents), 3)


@pytest.mark.parametrize(("weight", "good"), [(64, True), (63, False), (255, True), (256, False)])
def test_weights_are_from_a_quarter_to_one(weight: int, *, good: bool) -> None:
    made = terms(samples=10.0)
    total = words_of(made, [update(made, each, weight) for each in range(3)])
    if good:
        assert decode(made, SCHEMA, total, 3).weight == 3 * weight
    else:
        with pytest.raises(ProtocolError, match="the weight of 3 devices"):
            decode(made, SCHEMA, total, 3)


def test_random_words_are_refused_as_where_a_mask_was_not_taken_out() -> None:
    made = terms()
    total = made.layout.of_stream(np.random.default_rng(1).bytes(8 * made.layout.words))
    with pytest.raises(ProtocolError, match="sum-out-of-range"):
        decode(made, SCHEMA, total, 3)
