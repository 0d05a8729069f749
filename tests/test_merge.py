"""Each rule of a merge against its formula, written a second time, plainly, in float64."""

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_world import float32_block, ternary_block

from aggregator import optimizer
from aggregator.merge import Mean, clip_factor, norm
from aggregator.model import Accepted, Model
from aggregator.settings import DownlinkSettings, OptimizerSettings, Settings
from aggregator.staleness import discount
from broker.schema import Schema, Tensor
from broker.ternary import Block

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
    mean = Mean(SCHEMA)
    for seed, samples, worth, ternary in chosen:
        mean.add(block(seed, ternary=ternary), samples, worth)
    assert mean.samples == sum(samples for _, samples, _, _ in chosen)
    np.testing.assert_allclose(mean.result(), plain_mean(chosen), rtol=1e-4, atol=1e-5)
    assert mean.result().dtype == np.float32


def test_a_buffer_of_stale_updates_moves_the_model_less() -> None:
    mean = Mean(SCHEMA)
    one = block(1, ternary=True)
    mean.add(one, 10, 0.5)
    mean.add(one, 30, 0.5)
    np.testing.assert_allclose(mean.result(), 0.5 * one.value(), rtol=1e-6)


@given(st.integers(0, 1000), st.floats(0, 5))
@settings(max_examples=60, deadline=None)
def test_the_polynomial_discount(staleness: int, exponent: float) -> None:
    expected = math.exp(-exponent * math.log(1 + staleness))
    assert discount("polynomial", exponent, staleness) == pytest.approx(expected)
    assert discount("constant", exponent, staleness) == 1.0


def test_a_fresh_update_is_worth_all() -> None:
    assert discount("polynomial", 0.5, 0) == 1.0
    assert discount("polynomial", 0.5, 3) == 0.5


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


@pytest.mark.parametrize("name", ["fedavg", "fedavgm"])
@pytest.mark.parametrize(("rate", "beta"), [(1.0, 0.9), (0.3, 0.5), (0.0, 0.0)])
def test_the_optimizers_step_by_their_formulas(name: str, rate: float, beta: float) -> None:
    generator = np.random.default_rng(1)
    start = generator.normal(size=20).astype(np.float32)
    state = optimizer.init(name, start)
    weights, momentum = start.astype(np.float64), np.zeros(20)
    for _ in range(6):
        mean = generator.normal(size=20).astype(np.float32)
        before = state.target.copy()
        state, old = optimizer.apply(name, state, mean, learning_rate=rate, momentum=beta), state
        assert np.array_equal(old.target, before)  # a state is never changed
        if name == "fedavg":
            weights = weights + rate * mean
        else:
            momentum = beta * momentum + mean
            weights = weights + rate * momentum
            assert state.momentum is not None
            np.testing.assert_allclose(state.momentum, momentum, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.target, weights, rtol=1e-5, atol=1e-6)
        assert state.target.dtype == np.float32


def test_the_first_state_is_a_copy() -> None:
    vector = np.zeros(3, dtype=np.float32)
    state = optimizer.init("fedavgm", vector)
    vector[:] = 1
    assert state.target.tolist() == [0, 0, 0]


def test_momentum_that_is_not_there_yet_is_zero() -> None:
    """An operator may change fedavg to fedavgm in the middle."""
    mean = np.ones(3, dtype=np.float32)
    state = optimizer.apply(
        "fedavgm", optimizer.init("fedavg", np.zeros(3, dtype=np.float32)), mean, learning_rate=1.0, momentum=0.9
    )
    assert state.target.tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["fedavg", "fedavgm"])
def test_a_model_with_a_float32_downlink_publishes_what_the_server_holds(name: str) -> None:
    about = Settings(
        federation="lab",
        broker="mqtt://127.0.0.1:1",
        optimizer=OptimizerSettings(name=name, learning_rate=0.5),
        downlink=DownlinkSettings(codec="float32"),
    )
    start = np.random.default_rng(2).normal(size=SCHEMA.elements).astype(np.float32)
    model = Model(settings=about, schema=SCHEMA, version=0, published=start, server=optimizer.init(name, start))
    weights, momentum = start.astype(np.float64), np.zeros(SCHEMA.elements)
    for version in range(1, 6):
        chosen = [(version * 10 + index, 5 + index, 1 / (1 + index), index % 2 == 0) for index in range(3)]
        for index, (seed, samples, worth, ternary) in enumerate(chosen):
            model.accept(Accepted(device="pi", staleness=index, samples=samples), block(seed, ternary=ternary), worth)
        merged = model.merge()
        assert (merged.version, merged.updates, merged.staleness_mean, merged.staleness_max) == (version, 3, 1.0, 2)
        assert (merged.digest, merged.version) == (model.digest, model.version)
        momentum = 0.9 * momentum + plain_mean(chosen)
        weights = weights + 0.5 * (momentum if name == "fedavgm" else plain_mean(chosen))
        np.testing.assert_allclose(model.server.target, weights, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(model.published, weights, rtol=1e-4, atol=1e-5)
        assert model.buffer == []
