"""The values that a device adds to a private sum: unbiased, within range, and nothing of the change is lost."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.private_sums import card, terms_for
from ternbus.broker.protocol.schema import TERNARY, Schema, Vector
from ternbus.broker.sums import masks
from ternbus.broker.sums.terms import Terms
from ternbus.broker.sums.words import BUCKETS, DENSE_STEPS
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.private_sum import encode, weight
from ternbus.edge.learn.sum_content import SumContent, value
from ternbus.edge.plan.plan import Plan

SCHEMA = Schema.of({"w": (20, 20), "b": (9,), "v": (300,)})  # "b" is dense
PLAN = Plan.from_meta({"codec": "private"})


def terms(schema: Schema = SCHEMA, **changes: Any) -> Terms:
    return terms_for(schema, **{"scales": (0.5, 4.0, 0.25), **changes})


def source(seed: int) -> RandomSource:
    random = np.random.default_rng(seed)
    return RandomSource(random.bytes)


def drawn(change: Vector, of: Terms, plan: Plan = PLAN, **about: Any) -> SumContent:
    seed = about.pop("seed", None)
    random_source = RandomSource() if seed is None else source(seed)
    return encode(SCHEMA, of, plan, change, **{"samples": 1, "random_source": random_source, **about})


def plain(of: Terms, content: SumContent) -> tuple[Any, int, Any]:
    """Dense values, 255·ω, and the buckets by tensor."""
    _, values = of.layout.unpack(of.layout.read(content.words))
    return values[: of.dense], int(values[of.dense]), values[of.dense + 1 :].reshape(-1, BUCKETS)


def change_of(seed: int, size: float = 0.3) -> Vector:
    return (size * np.random.default_rng(seed).normal(size=SCHEMA.elements)).astype(np.float32)


@pytest.mark.parametrize(("bits", "levels"), [(4, 1), (5, 2), (6, 1), (6, 5), (8, 42)])
def test_the_mean_of_many_draws_is_the_change_cut_to_the_terms_scales(bits: int, levels: int) -> None:
    of, change, count = terms(bits=bits, levels=levels), change_of(1), 4000
    total = np.zeros(SCHEMA.elements)
    random_source = source(3)
    for _ in range(count):
        content = encode(SCHEMA, of, PLAN, change, samples=1, random_source=random_source)
        total += value(SCHEMA, of, content.words)
    for segment, scale in zip(SCHEMA.segments, of.scales, strict=True):
        part = slice(segment.start, segment.stop)
        cut = np.clip(change[part], -scale, scale)
        steps = levels if segment.tensor.role == TERNARY else DENSE_STEPS
        spread = scale / steps / 2 / np.sqrt(count)  # the largest deviation of the mean of one element
        assert np.abs(total[part] / count - cut).max() < 5 * spread
        assert (np.abs(change[part]) > scale).any() == (segment.tensor.role == TERNARY)


@settings(max_examples=50)
@given(
    st.integers(0, 2**32),
    st.sampled_from([(4, 2), (6, 1), (8, 3)]),
    st.lists(st.sampled_from([0.0, 1e-45, 1e-30, 1e-3, 0.5, 2.0**40]), min_size=3, max_size=3),
    st.sampled_from([0.0, 1e-40, 1e-6, 1.0, 1e12]),
)
def test_every_value_is_within_its_range(seed: int, form: tuple[int, int], scales: list[float], size: float) -> None:
    of = terms(bits=form[0], levels=form[1], scales=tuple(map(float, np.array(scales, np.float32))))
    content = drawn(change_of(seed, size), of, seed=seed)
    ternary, _ = of.layout.unpack(of.layout.read(content.words))
    dense, omega, buckets = plain(of, content)
    assert np.abs(ternary).max() <= of.levels
    assert np.abs(dense).max() <= DENSE_STEPS
    assert omega == 255
    assert (buckets.sum(axis=1) == 1).all()
    assert set(np.unique(buckets)) <= {0, 1}
    sent = value(SCHEMA, of, content.words)
    for segment, scale in zip(SCHEMA.segments, of.scales, strict=True):
        assert np.abs(sent[segment.start : segment.stop]).max() <= scale


def test_the_values_lie_in_the_words_in_the_order_of_the_schema() -> None:
    of, change = terms(scales=(1.0, 8.0, 1.0)), np.zeros(SCHEMA.elements, np.float32)
    change[0], change[400], change[408], change[409], change[-1] = 1, 8, -4, -1, 1  # exactly what the scales stand for
    content = drawn(change, of, samples=1)
    ternary, _ = of.layout.unpack(of.layout.read(content.words))
    dense, _, _ = plain(of, content)
    assert [ternary[0], ternary[400], ternary[-1]] == [1, -1, 1]
    assert np.count_nonzero(ternary) == 3
    assert [dense[0], dense[8]] == [DENSE_STEPS, -DENSE_STEPS // 2]
    assert np.array_equal(value(SCHEMA, of, content.words), change)


@pytest.mark.parametrize(
    ("own", "scale", "bucket"),
    [
        (1.0, 1.0, 0), (1.4, 1.0, 0), (1.5, 1.0, 1), (4.0, 1.0, 2), (8.0, 1.0, 3), (1e6, 1.0, 3), (0.5, 1.0, -1),
        (1e-6, 1.0, -3), (0.0, 1.0, -3), (1.0, 0.0, 3), (0.0, 0.0, -3),
    ],
)  # fmt: skip
def test_buckets_say_how_far_a_tensors_own_scale_is_from_the_terms(own: float, scale: float, bucket: int) -> None:
    change = np.zeros(SCHEMA.elements, np.float32)
    change[::2] = own  # without clipping, the scale of each tensor is its largest magnitude
    of = terms(scales=(scale, 8 * scale, scale))
    content = drawn(change, of, replace(PLAN, clip_sigma=0.0))
    _, _, buckets = plain(of, content)
    assert buckets.argmax(axis=1).tolist() == [bucket + 3] * 3


def test_a_scale_of_0_sends_zeros() -> None:
    of = terms(scales=(0.0, 0.0, 0.0))
    assert not value(SCHEMA, of, drawn(change_of(4), of).words).any()


@pytest.mark.parametrize(
    ("n_ref", "samples", "expected"),
    [(0.0, 7, 255), (100.0, 100, 255), (100.0, 1000, 255), (100.0, 50, 128), (100.0, 25, 64), (100.0, 1, 64),
     (1e12, 5, 64), (0.5, 1, 255)],
)  # fmt: skip
def test_the_weight_is_the_share_of_the_reference_within_a_quarter_and_one(
    n_ref: float, samples: int, expected: int
) -> None:
    assert weight(terms(samples=n_ref), PLAN, samples) == expected
    of = terms(samples=n_ref, scales=(1.0, 1.0, 1.0))
    content = drawn(np.full(SCHEMA.elements, 0.5, np.float32), of, samples=samples)
    dense, omega, _ = plain(of, content)
    assert omega == expected
    assert np.abs(dense - DENSE_STEPS * expected / 510).max() <= 1  # the rounded weight is that of the change too


def test_under_privacy_every_device_weighs_the_same() -> None:
    private = Plan.from_meta({"codec": "private", "dp": "device", "dp_clip": 1.0, "dp_noise": 1.0, "dp_epsilon": 8.0})
    assert weight(terms(samples=100.0), private, 1) == 255


def test_two_devices_with_one_seed_of_the_plan_draw_different_values() -> None:
    of, change = terms(), change_of(5)
    one, other = drawn(change, of), drawn(change, of)
    differ = value(SCHEMA, of, one.words) != value(SCHEMA, of, other.words)
    assert differ.sum() > 100
    assert one.seeds != other.seeds
    assert drawn(change, of, seed=6).words == drawn(change, of, seed=6).words  # in a simulation only


def test_each_helper_has_a_seed_of_its_own_that_depends_on_the_words() -> None:
    of = terms(helpers=(card(1), card(2)))
    zero = RandomSource(bytes)  # a broken source of random numbers
    change = np.full(SCHEMA.elements, 0.25, np.float32)
    one = encode(SCHEMA, of, PLAN, change, samples=1, random_source=zero)
    other = encode(SCHEMA, of, PLAN, 2 * change, samples=1, random_source=zero)
    assert one.words != other.words
    assert set(one.seeds).isdisjoint(other.seeds)
    assert len(drawn(change, of).seeds) == len(set(drawn(change, of).seeds)) == 2
    assert one.seeds[0] == masks.seed_of(of.layout.read(one.words), bytes(32))


@pytest.mark.parametrize("count", [1, 65_535, 65_536, 65_537])
def test_a_tensor_longer_than_a_block_is_drawn_whole(count: int) -> None:
    schema = Schema.of({"w": (count, 1), "x": (256,)})
    of = terms(schema, scales=(1.0, 1.0))
    change = np.ones(schema.elements, np.float32)
    content = encode(schema, of, PLAN, change, samples=1, random_source=RandomSource())
    assert np.array_equal(value(schema, of, content.words), change)


def test_a_change_that_is_not_finite_is_refused() -> None:
    change = change_of(7)
    change[3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        drawn(change, terms())
