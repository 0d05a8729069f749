"""TernGrad: the scale is the formula's, the trits are right on average, and a seed decides them."""

import math
import tracemalloc
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ternbus.broker.protocol import compiled
from ternbus.broker.protocol.lane_sum import BLOCK
from ternbus.edge.learn import terngrad

FloatArray = npt.NDArray[np.float32]

vectors = hnp.arrays(
    np.float32,
    hnp.array_shapes(max_dims=3, max_side=40),
    elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
)
clips = st.sampled_from([0.0, 0.5, 1.0, 2.5])


def gaussian(size: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).normal(0, 0.01, size).astype(np.float32)


@given(vectors, clips)
def test_scale_is_the_smaller_of_the_largest_magnitude_and_c_sigma(values: FloatArray, clip: float) -> None:
    elements = values.astype(np.float64).reshape(-1)
    expected, sigma = float(np.abs(elements).max()), float(elements.std())
    rounding = expected * 2.0**-20  # float32's; a smaller sigma is none
    assume(abs(sigma - rounding) >= 1e-3 * rounding)
    if clip > 0 and sigma > rounding:
        expected = min(expected, clip * sigma)
    scale = float(terngrad.scale(values, clip_sigma=clip))
    assert scale == pytest.approx(min(expected, 65_504.0), rel=1e-5, abs=2.0**-100)


@pytest.mark.parametrize("takes_loops", [True, False])
@pytest.mark.parametrize(
    ("magnitude", "expected"),
    [(2.0**-126, 0.0), (2.0**-101, 0.0), (2.0**-100, 2.0**-100), (0.5, 0.5), (65_504.0, 65_504.0), (1e6, 65_504.0)],
)
def test_a_scale_below_2_to_the_minus_100_is_0_and_none_is_above_65504(
    magnitude: float, expected: float, takes_loops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not takes_loops:
        monkeypatch.setattr(compiled, "takes", lambda *_: False)
    assert float(terngrad.scale(np.full(3, -magnitude, np.float32), clip_sigma=2.5)) == expected
    assert float(terngrad.scale(np.array([magnitude, 0], np.float32), clip_sigma=0)) == expected


@given(vectors, clips, st.integers(0, 100))
def test_trits_have_the_sign_of_their_element_and_the_shape_of_the_tensor(
    values: FloatArray, clip: float, seed: int
) -> None:
    before = values.copy()
    scale, trits = terngrad.ternarize(values, clip_sigma=clip, states=terngrad.random_states(seed))
    assert trits.dtype == np.int8
    assert scale.dtype == np.float32
    assert trits.shape == values.shape
    assert 0 <= scale <= 65_504
    assert set(np.unique(trits)) <= {-1, 0, 1}
    assert np.all((trits == 0) | (trits == np.sign(values)))
    assert np.all(trits[np.abs(values) >= scale] == np.sign(values[np.abs(values) >= scale])) or scale == 0
    assert np.array_equal(values, before)


@pytest.mark.parametrize("clip", [0.0, 2.5])
def test_what_is_sent_is_on_average_the_clipped_tensor(clip: float) -> None:
    """The mean of n draws of s·t lies within five standard errors of each clipped element."""
    values, draws = gaussian(3_000), 2_000
    states = terngrad.random_states(1)
    total = np.zeros(values.shape)
    for _ in range(draws):
        scale, trits = terngrad.ternarize(values, clip_sigma=clip, states=states)
        total += float(scale) * trits
    clipped = np.clip(values.astype(np.float64), -float(scale), float(scale))
    deviation = np.sqrt(np.abs(clipped) * (float(scale) - np.abs(clipped)) / draws)
    off = np.abs(total / draws - clipped)
    assert np.all(off <= 5 * deviation + 2e-6 * float(scale))


def test_an_outlier_is_clipped_to_c_sigma_and_raises_no_other_element() -> None:
    values = gaussian(10_000)
    values[17] = 1.0
    scale, trits = terngrad.ternarize(values, clip_sigma=2.5, states=terngrad.random_states(0))
    assert float(scale) == pytest.approx(2.5 * float(values.std(dtype=np.float64)), rel=1e-6)
    assert trits[17] == 1
    unclipped, _ = terngrad.ternarize(values, clip_sigma=0, states=terngrad.random_states(0))
    assert unclipped == np.float32(1.0)


def test_the_seed_decides_every_trit() -> None:
    values = gaussian(200_000)
    first = terngrad.ternarize(values, clip_sigma=2.5, states=terngrad.random_states(7))
    again = terngrad.ternarize(values, clip_sigma=2.5, states=terngrad.random_states(7))
    other = terngrad.ternarize(values, clip_sigma=2.5, states=terngrad.random_states(8))
    assert first[0] == again[0] == other[0]
    assert np.array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])


def test_elements_much_smaller_than_the_scale_are_not_sent_too_often() -> None:
    """A random number has steps of 2^-23: an element far below a step is never sent, and none is sent for its sign."""
    values = np.full(2_000_001, 2.0**-26, np.float32)
    values[0] = 1.0
    states = terngrad.random_states(3)
    assert not any(terngrad.ternarize(values, clip_sigma=0, states=states)[1][1:].any() for _ in range(10))


def test_an_element_at_the_scale_is_always_sent_and_a_zero_never() -> None:
    values = np.tile(np.array([1, -1, 0], np.float32), 5_000)
    scale, trits = terngrad.ternarize(values, clip_sigma=2.5, states=terngrad.random_states(0))
    assert scale == np.float32(1)
    assert np.array_equal(trits, values.astype(np.int8))


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(300, np.float32),
        np.full(300, -0.0, np.float32),
        np.full(300, 2.0**-101, np.float32),
        np.zeros(0, np.float32),
    ],
    ids=["zeros", "negative zeros", "too small to count", "empty"],
)
def test_what_is_as_good_as_zero_has_scale_zero_and_no_trits(values: FloatArray) -> None:
    scale, trits = terngrad.ternarize(values, clip_sigma=2.5, states=terngrad.random_states(0))
    assert scale.tobytes() == bytes(4)
    assert not trits.any()


def test_a_constant_tensor_has_nothing_to_clip() -> None:
    values = np.full(100_001, 0.1, np.float32)
    scale, trits = terngrad.ternarize(values, clip_sigma=2.5, states=terngrad.random_states(0))
    assert scale == np.float32(0.1)
    assert np.all(trits == 1)


def test_the_scale_never_exceeds_what_the_protocol_takes() -> None:
    values = np.array([3e38, -3e38, 1.0], np.float32)
    scale, trits = terngrad.ternarize(values, clip_sigma=2.5, states=terngrad.random_states(0))
    assert scale == np.float32(65_504)
    assert trits.tolist()[:2] == [1, -1]


LONG = 3 * BLOCK + 17
SHAPED = {
    "gaussian": gaussian(LONG),
    "a mean far from zero": 1e3 + gaussian(LONG),
    "another mean in each block": np.repeat([1.0, -500.0, 3.0, 900.0], BLOCK)[:LONG] + gaussian(LONG),
    "an outlier in the first block": np.concatenate([np.array([100], np.float32), gaussian(LONG - 1)]),
    "an outlier in the last block": np.concatenate([gaussian(LONG - 1), np.array([-100], np.float32)]),
    "a first block of zeros": np.concatenate([np.zeros(BLOCK, np.float32), gaussian(LONG - BLOCK)]),
    "zeros but for the first block": np.concatenate([gaussian(BLOCK), np.zeros(50 * BLOCK)]),
    "one block": gaussian(BLOCK),
    "one more than a block": gaussian(BLOCK + 1),
    "squares that float32 takes for zero": np.float32(1e-15) * gaussian(LONG),
}


@pytest.mark.parametrize("values", SHAPED.values(), ids=SHAPED)
def test_the_scale_in_one_pass_is_that_of_a_plain_computation_in_float64(values: npt.NDArray[Any]) -> None:
    """But for the rounding of sums of blocks."""
    values = values.astype(np.float32)
    exact = values.astype(np.float64)
    for clip in (0.01, 0.5, 2.5):
        want = min(float(np.abs(exact).max()), clip * float(exact.std()))
        assert float(terngrad.scale(values, clip_sigma=clip)) == pytest.approx(want, rel=2e-5)


@pytest.mark.parametrize("value", [0.1, -1e6, 1e20, -3e38])
def test_a_constant_tensor_of_many_blocks_is_not_clipped(value: float) -> None:
    values = np.full(LONG, value, np.float32)
    assert float(terngrad.scale(values, clip_sigma=0.5)) == min(abs(float(np.float32(value))), 65_504.0)


@pytest.mark.parametrize("place", [0, BLOCK - 1, BLOCK, LONG - 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_wherever_it_is(bad: float, place: int) -> None:
    values = gaussian(LONG)
    values[place] = bad
    for clip in (0.0, 2.5):
        with pytest.raises(ValueError, match="NaN or an infinity"):
            terngrad.scale(values, clip_sigma=clip)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    values = gaussian(1_000)
    values[500] = bad
    with pytest.raises(ValueError, match="NaN or an infinity"):
        terngrad.ternarize(values, clip_sigma=2.5, states=terngrad.random_states(0))


def test_no_temporary_grows_with_the_tensor() -> None:
    """Beside the trits themselves, four million elements take less than 2 MB."""
    values = gaussian(4_000_000)
    states = terngrad.random_states(0)
    tracemalloc.start()
    try:
        terngrad.ternarize(values, clip_sigma=2.5, states=states)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - values.size < 2_000_000
