"""The draws of `dp = "sum"`: exact thresholds, bounded changes, unbiased sums, the distribution that is charged."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ternbus.broker.protocol.plan_keys import SUM
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.sums.terms import MASK, Terms
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.poisson_binomial import Levels, deviation, draw, release

SCHEMA = Schema.of({"w": (40, 25), "b": (9,), "v": (300,), "running_mean": (5,)})
ELEMENTS = SCHEMA.elements
# the ternary elements, then the dense ones
ORDER = np.concatenate([np.arange(1000), np.arange(1009, 1309), np.arange(1000, 1009), np.arange(1309, 1314)])


def terms(**changes: Any) -> Terms:
    made: dict[str, Any] = {
        "kind": MASK, "bits": 8, "levels": 1, "helpers": (), "min": 3,
        "ternary": SCHEMA.ternary_elements, "dense": SCHEMA.dense_elements, "scales": (0.5, 2.0, 0.25, 1.0),
        "samples": 0.0, "dp": SUM, "theta": 0.1, "norm": 5.0,
    }  # fmt: skip
    return Terms(**{**made, **changes})


def seeded(seed: int) -> RandomSource:
    return RandomSource(np.random.Generator(np.random.SFC64(seed)).bytes)


def constant(bits: int) -> RandomSource:
    return RandomSource(lambda count: bits.to_bytes(4, "little") * (count // 4))


def released(made: Terms, change: Any, random_source: RandomSource, silent: Any = ()) -> tuple[Levels, Levels]:
    start = np.zeros(ELEMENTS, np.float32)
    return release(SCHEMA, made, start, change.astype(np.float32), random_source=random_source, silent=silent)


def threshold(share: float, theta: float) -> int:
    """The number of the 2^32 values of random bits with which one draw is a success, found by bisection."""
    low, high = 0, 2**32
    while high - low > 1:
        middle = (low + high) // 2
        success = draw(np.array([share]), 1, theta, constant(middle - 1))[0] == 1
        low, high = (middle, high) if success else (low, middle)
    return low


@pytest.mark.parametrize(
    ("share", "theta", "expected"),
    [
        (0.0, 0.25, 2**31),
        (1.0, 0.25, 3 * 2**30),
        (-1.0, 0.25, 2**30),
        (1.0, 0.1, 2**31 + 429496729),  # 429496729.6, towards 1/2
        (-1.0, 0.1, 2**31 - 429496729),
        (0.5, 2.0**-32, 2**31),
    ],
)
def test_a_probability_is_a_threshold_of_32_bits_rounded_towards_a_half(
    share: float, theta: float, expected: int
) -> None:
    assert threshold(share, theta) == expected


@pytest.mark.parametrize("levels", [1, 3, 63])
def test_all_failures_are_minus_k_and_all_successes_k(levels: int) -> None:
    shares = np.linspace(-1, 1, 70_000)  # more than a block
    assert (draw(shares, levels, 0.2, constant(0)) == levels).all()
    assert (draw(shares, levels, 0.2, constant(2**32 - 1)) == -levels).all()


@pytest.mark.parametrize(("levels", "theta", "share"), [(1, 0.25, 0.7), (2, 0.1, -1.0), (5, 0.2, 0.0)])
def test_draws_are_binomial(levels: int, theta: float, share: float) -> None:
    count, trials, success = 200_000, 2 * levels, 0.5 + theta * share
    drawn = draw(np.full(count, share), levels, theta, seeded(7))
    expected = np.array(
        [math.comb(trials, each) * success**each * (1 - success) ** (trials - each) for each in range(trials + 1)]
    )
    observed = np.bincount(drawn.astype(np.int64) + levels, minlength=trials + 1)
    chi = float((np.square(observed - count * expected) / (count * expected)).sum())
    assert chi < trials + 5 * math.sqrt(2 * trials) + 5


def test_draws_of_one_run_are_not_those_of_the_next() -> None:
    shares = np.zeros(1000)
    assert not np.array_equal(draw(shares, 1, 0.1, RandomSource()), draw(shares, 1, 0.1, RandomSource()))


def test_the_mean_of_many_releases_is_the_change_with_the_noise_that_was_said() -> None:
    made, count = terms(levels=2), 400
    change = np.random.default_rng(1).normal(0, 0.02, ELEMENTS)
    random_source = seeded(2)
    total = np.zeros(ELEMENTS)
    for _ in range(count):
        total[ORDER] += np.concatenate(released(made, change, random_source))
    scales = np.concatenate([np.full(1000, 0.5), np.full(9, 2.0), np.full(300, 0.25), np.full(5, 1.0)])
    errors = total / made.ternary_steps / count - change / scales
    said = deviation(2, 0.1, count)
    assert abs(errors.mean()) < 5 * said / math.sqrt(ELEMENTS)
    assert errors.std() == pytest.approx(said, rel=0.1)


def shares_of(made: Terms, change: Any) -> Any:
    """The y of each element, read back from the thresholds: the share of bits that count as a success."""
    low, high = np.zeros(ELEMENTS, np.int64), np.full(ELEMENTS, 2**32, np.int64)
    while (high - low).max() > 1:
        middle = (low + high) // 2
        bits = (middle - 1).astype("<u4")
        drawn = np.concatenate(released(made, change, RandomSource(_replayed(bits))))
        success = np.empty(ELEMENTS, bool)
        success[ORDER] = drawn > 0
        low, high = np.where(success, middle, low), np.where(success, high, middle)
    return (low - 2**31) / 2**32 / made.theta


def _replayed(bits: Any) -> Callable[[int], bytes]:
    """For each tensor in turn, its own bits, twice: one for each of the two draws."""
    pieces = [bits[:1000], bits[1000:1009], bits[1009:1309], bits[1309:]]
    queue: list[bytes] = [piece.tobytes() for piece in pieces for _ in range(2)]

    def source(count: int) -> bytes:
        taken = queue.pop(0)
        assert len(taken) == count
        return taken

    return source


@given(st.integers(0, 2**32), st.sampled_from([1e-6, 0.01, 1.0, 1e20, 1e37]), st.sampled_from([0.5, 5.0, 1e6]))
def test_no_change_is_longer_than_the_norm_or_beyond_one(seed: int, size: float, norm: float) -> None:
    made = terms(norm=norm)
    shares = shares_of(made, np.random.default_rng(seed).standard_normal(ELEMENTS) * size)
    assert np.sqrt(np.square(shares).sum()) <= norm
    assert np.abs(shares).max() <= 1


def test_a_change_is_scaled_as_a_whole_and_then_cut() -> None:
    change = np.zeros(ELEMENTS)
    change[:3], change[1000] = (0.3, -0.4, 20.0), 1.0  # in scales: 0.6, -0.8, 40, 0.5
    length = math.sqrt(0.36 + 0.64 + 1600 + 0.25)
    shares = shares_of(terms(norm=20.0), change)
    assert shares[2] == pytest.approx(1)
    assert shares[[0, 1, 1000]] == pytest.approx(np.array([0.6, -0.8, 0.5]) * 20 / length, abs=1e-4)
    assert shares_of(terms(norm=50.0), change)[[0, 1, 1000]] == pytest.approx([0.6, -0.8, 0.5], abs=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_counts_as_no_change(bad: float) -> None:
    change = np.zeros(ELEMENTS)
    change[:2] = bad, 0.25
    shares = shares_of(terms(), change)
    assert shares[0] == 0
    assert shares[1] == pytest.approx(0.5, abs=1e-4)


def test_a_tensor_without_a_scale_draws_without_its_change_and_lengthens_no_other() -> None:
    change = np.full(ELEMENTS, 1e-3)
    change[:1000] = 1e30
    shares = shares_of(terms(scales=(0.0, 2.0, 0.25, 1.0)), change)
    assert (shares[:1000] == 0).all()
    assert shares[1000] == pytest.approx(5e-4, rel=1e-3)
    assert np.isfinite(shares_of(terms(scales=(1e-45, 2.0, 0.25, 1.0)), change)).all()


def test_statistics_are_sent_as_zeros_without_noise() -> None:
    drawn = released(terms(), np.ones(ELEMENTS), seeded(3), {"running_mean", "w"})
    assert (drawn[0][:1000] == 0).all()
    assert drawn[0][1000:].any()
    assert (drawn[1][9:] == 0).all()
    assert drawn[1][:9].any()
