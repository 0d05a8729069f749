"""Each rule of a merge against its formula, written a second time, plainly, in float64."""

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.small_world import accepted_update, float32_block, ternary_block
from ternbus.aggregator.merge import optimizer
from ternbus.aggregator.merge.accumulator import Accumulator
from ternbus.aggregator.merge.mean import Mean, clip_factor, norm
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.merge.staleness import discount
from ternbus.aggregator.settings import (
    DISCOUNTS,
    OPTIMIZERS,
    DownlinkSettings,
    OptimizerSettings,
    Settings,
    StalenessSettings,
)
from ternbus.broker.protocol.schema import Schema, Tensor
from ternbus.broker.protocol.tensor_kinds import TensorKinds
from ternbus.broker.protocol.ternary import Block

SCHEMA = Schema.write([Tensor("w", (13,), "ternary"), Tensor("b", (4,), "dense"), Tensor("v", (9,), "ternary")])
F64 = npt.NDArray[np.float64]

updates = st.lists(
    st.tuples(st.integers(0, 10_000), st.integers(1, 2**32 - 1), st.floats(0.001, 1), st.booleans()),
    min_size=1,
    max_size=8,
)


def block(seed: int, *, ternary: bool) -> Block:
    return ternary_block(SCHEMA, seed) if ternary else float32_block(SCHEMA, seed)


def plain_mean(chosen: list[tuple[int, int, float, bool]]) -> F64:
    """Δ = Σ nᵢ·s(τᵢ)·Δᵢ / Σ nᵢ."""
    above = sum(n * s * block(seed, ternary=ternary).value().astype(np.float64) for seed, n, s, ternary in chosen)
    return np.asarray(above / sum(n for _, n, _, _ in chosen))


@given(updates)
@settings(max_examples=60, deadline=None)
def test_the_mean_is_the_formula_s(chosen: list[tuple[int, int, float, bool]]) -> None:
    mean = Mean(Accumulator(SCHEMA))
    for seed, samples, discounted, ternary in chosen:
        mean.add(accepted_update(samples=samples, discount=discounted), block(seed, ternary=ternary))
    assert mean.samples == sum(samples for _, samples, _, _ in chosen)
    change = mean.result()
    np.testing.assert_allclose(change.delta, plain_mean(chosen), rtol=1e-4, atol=1e-5)
    assert change.delta.dtype == np.float32
    total = sum(samples for _, samples, _, _ in chosen)
    assert change.weights == pytest.approx([samples * discounted / total for _, samples, discounted, _ in chosen])


def test_a_buffer_of_stale_updates_moves_the_model_less() -> None:
    mean = Mean(Accumulator(SCHEMA))
    one = block(1, ternary=True)
    mean.add(accepted_update(samples=10, discount=0.5), one)
    mean.add(accepted_update(samples=30, discount=0.5), one)
    np.testing.assert_allclose(mean.result().delta, 0.5 * one.value(), rtol=1e-6)


def plain_discount(about: StalenessSettings, staleness: int) -> float:
    """FedAsync, section 5.2, with logarithms and cases instead of powers and maxima."""
    match about.discount:
        case "constant":
            return 1.0
        case "polynomial":
            return math.exp(-about.exponent * math.log(1 + staleness))
        case "exponential":
            return float(np.power(np.exp(-about.decay), staleness))
        case _:
            over = staleness - about.hinge_from
            return 1.0 if staleness <= about.hinge_from else 1.0 / (about.hinge_slope * over + 1.0)


@pytest.mark.parametrize("name", DISCOUNTS)
@given(st.integers(0, 1000), st.floats(0, 5), st.integers(0, 20))
@settings(max_examples=60, deadline=None)
def test_the_discounts_are_their_formulas(name: str, staleness: int, a: float, b: int) -> None:
    about = StalenessSettings(discount=name, exponent=a, decay=a, hinge_slope=a, hinge_from=b)
    found = discount(about, staleness)
    assert found == pytest.approx(plain_discount(about, staleness), rel=1e-9, abs=1e-300)
    assert 0 <= discount(about, staleness + 1) <= found <= 1


@pytest.mark.parametrize("name", DISCOUNTS)
def test_a_fresh_update_is_worth_all_and_the_oldest_is_still_a_number(name: str) -> None:
    about = StalenessSettings(discount=name, exponent=100, decay=100, hinge_slope=1e6)
    assert discount(about, 0) == 1.0
    assert 0 <= discount(about, 2**40) <= 1


def test_discounts_by_hand() -> None:
    assert discount(StalenessSettings(), 3) == 0.5
    assert discount(StalenessSettings(discount="exponential", decay=1.0), 2) == pytest.approx(0.1353353)
    hinge = StalenessSettings(discount="hinge", hinge_slope=10.0, hinge_from=4)
    assert [discount(hinge, staleness) for staleness in (4, 5, 6)] == [1.0, 1 / 11, 1 / 21]


@pytest.mark.parametrize("ternary", [False, True])
def test_clipping_scales_a_longer_update_down_to_the_norm(ternary: bool) -> None:
    update = block(3, ternary=ternary)
    value = update.value().astype(np.float64)
    length = math.sqrt(sum(float(element) ** 2 for element in value))
    assert norm(update) == pytest.approx(length, rel=1e-6)
    assert clip_factor(update, 0.0) == 1.0
    assert clip_factor(update, 2 * length) == 1.0
    factor = clip_factor(update, length / 3)
    assert np.linalg.norm(factor * value) == pytest.approx(length / 3, rel=1e-6)


def test_an_update_of_nothing_is_not_clipped() -> None:
    nothing = Block.of_float32(SCHEMA, np.zeros(SCHEMA.elements, dtype=np.float32))
    assert clip_factor(nothing, 1.0) == 1.0


def plain_step(
    about: OptimizerSettings, weights: list[float], kept: dict[str, list[float]], mean: list[float]
) -> list[float]:
    """Reddi et al. 2021, algorithms 1 and 2, one number at a time; ``kept`` holds m and v between steps."""
    made = []
    for place, (w, delta) in enumerate(zip(weights, mean, strict=True)):
        m, v = kept["m"][place], kept["v"][place]
        if about.name == "fedavg":
            step = delta
        elif about.name == "fedavgm":
            step = m = about.momentum * m + delta
        else:
            m = about.beta1 * m + (1 - about.beta1) * delta
            if about.name == "fedadagrad":
                v = v + delta**2
            elif about.name == "fedadam":
                v = about.beta2 * v + (1 - about.beta2) * delta**2
            else:
                sign = (v > delta**2) - (v < delta**2)
                v = v - (1 - about.beta2) * delta**2 * sign
            step = m / (math.sqrt(v) + about.tau)
        kept["m"][place], kept["v"][place] = m, v
        made.append(w + about.learning_rate * step)
    return made


recipes = st.builds(
    OptimizerSettings,
    name=st.sampled_from(OPTIMIZERS),
    learning_rate=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    beta1=st.sampled_from([0.0, 0.5, 0.9]),
    beta2=st.sampled_from([0.5, 0.9, 0.99]),  # at 0 Yogi subtracts numbers that are nearly equal
    tau=st.sampled_from([1e-3, 1e-2, 1.0]),
)


@given(recipes, st.integers(0, 10_000), st.sampled_from([0.0, 1e-4, 0.01, 1.0]))
@settings(max_examples=150, deadline=None)
def test_the_optimizers_step_by_their_formulas(about: OptimizerSettings, seed: int, size: float) -> None:
    generator = np.random.default_rng(seed)
    start = generator.normal(size=20).astype(np.float32)
    state = optimizer.init(about, start)
    weights = [float(w) for w in start]
    kept = {"m": [0.0] * 20, "v": [about.tau**2] * 20}
    for _ in range(6):
        mean = (size * generator.normal(size=20)).astype(np.float32)
        before = state.target.copy()
        state, old = optimizer.apply(about, state, mean), state
        assert np.array_equal(old.target, before)  # a state is never changed
        weights = plain_step(about, weights, kept, [float(delta) for delta in mean])
        np.testing.assert_allclose(state.target, weights, rtol=1e-4, atol=1e-5)
        if state.momentum is not None:
            np.testing.assert_allclose(state.momentum, kept["m"], rtol=1e-4, atol=1e-6)
        if state.squares is not None:
            np.testing.assert_allclose(state.squares, kept["v"], rtol=1e-4, atol=1e-9)
        assert state.target.dtype == np.float32
    assert (state.momentum is not None) == (about.name != "fedavg")
    assert (state.squares is not None) == (about.name in ("fedadagrad", "fedadam", "fedyogi"))


@pytest.mark.parametrize("name", ["fedadagrad", "fedadam", "fedyogi"])
def test_a_model_longer_than_a_piece_is_stepped_whole(name: str) -> None:
    about = OptimizerSettings(name=name, learning_rate=0.1, beta1=0.0)
    long = np.linspace(-1, 1, 2 * optimizer.PIECE + 3).astype(np.float32)
    state = optimizer.apply(about, optimizer.init(about, np.zeros_like(long)), long)
    for place in (0, optimizer.PIECE - 1, optimizer.PIECE, 2 * optimizer.PIECE + 2):
        alone = optimizer.init(about, np.zeros(1, dtype=np.float32))
        assert state.target[place] == optimizer.apply(about, alone, long[place : place + 1]).target[0]


def test_the_first_state_is_a_copy() -> None:
    vector = np.zeros(3, dtype=np.float32)
    state = optimizer.init(OptimizerSettings(name="fedavgm"), vector)
    vector[:] = 1
    assert state.target.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ["fedavg", "fedavgm"])
def test_a_model_with_a_float32_downlink_publishes_what_the_server_holds(name: str) -> None:
    about = Settings(
        federation="lab",
        broker="mqtt://127.0.0.1:1",
        optimizer=OptimizerSettings(name=name, learning_rate=0.5),
        downlink=DownlinkSettings(codec="float32"),
    )
    start = np.random.default_rng(2).normal(size=SCHEMA.elements).astype(np.float32)
    server = optimizer.init(about.optimizer, start)
    model = Model(settings=about, schema=SCHEMA, version=0, published=start, server=server, kinds=TensorKinds())
    weights, momentum = start.astype(np.float64), np.zeros(SCHEMA.elements)
    for version in range(1, 6):
        chosen = [(version * 10 + index, 5 + index, 1 / (1 + index), index % 2 == 0) for index in range(3)]
        for index, (seed, samples, discounted, ternary) in enumerate(chosen):
            update = accepted_update(seq=seed, staleness=index, samples=samples, discount=discounted)
            model.accept(update, block(seed, ternary=ternary))
        merged = model.merge()
        given = {each.seq: each.weight for each in merged.contributions}
        assert given == pytest.approx({seed: n * s / sum(n for _, n, _, _ in chosen) for seed, n, s, _ in chosen})
        assert (merged.version, merged.updates, merged.staleness_mean, merged.staleness_max) == (version, 3, 1.0, 2)
        assert (merged.digest, merged.version) == (model.digest, model.version)
        momentum = 0.9 * momentum + plain_mean(chosen)
        weights = weights + 0.5 * (momentum if name == "fedavgm" else plain_mean(chosen))
        np.testing.assert_allclose(model.server.target, weights, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model.published, weights, rtol=1e-4, atol=1e-5)
        assert model.buffer == []
