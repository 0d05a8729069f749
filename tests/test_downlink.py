"""The ternary downlink loses nothing for good: its residual stays bounded, and it arrives where the server is."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ternbus.aggregator.merge.downlink import encoded_block, next_block, snapshot_body
from ternbus.broker.protocol.schema import WEIGHT_MAX, Schema, Tensor, is_bounded, vector_of
from ternbus.broker.protocol.ternary import CHUNK, Block, decode

SCHEMA = Schema.write([Tensor("w", (50, 40), "ternary"), Tensor("b", (8,), "dense"), Tensor("v", (301,), "ternary")])


@pytest.mark.parametrize("codec", ["ternary", "float32"])
def test_the_published_vector_arrives_at_a_target_that_stands_still(codec: str) -> None:
    generator = np.random.default_rng(1)
    published = generator.normal(size=SCHEMA.elements).astype(np.float32)
    target = generator.normal(size=SCHEMA.elements).astype(np.float32)
    distances = [float(np.linalg.norm(target - published))]
    for _ in range(100):
        published = next_block(SCHEMA, codec, published, target).apply(published)
        distances.append(float(np.linalg.norm(target - published)))
    assert distances[1] < 0.5 * distances[0] if codec == "ternary" else distances[1] < 1e-5
    assert distances[50] < 0.02 * distances[0]
    assert distances[-1] < 0.01 * distances[0]


@pytest.mark.parametrize(
    "change",
    [
        np.full(SCHEMA.elements, 0.25),
        np.where(np.arange(SCHEMA.elements) % 3 == 0, -0.5, 0.5),
        np.where(np.arange(SCHEMA.elements) == 17, 5.0, 0.0),
        np.random.default_rng(1).integers(-1, 2, size=SCHEMA.elements) * 0.01,
    ],
    ids=["constant", "signs", "one element", "trits"],
)
def test_every_form_of_change_arrives(change: np.ndarray) -> None:
    """Also the ones in which no element is above the mean."""
    target = change.astype(np.float32)
    published = np.zeros_like(target)
    for _ in range(30):
        published = next_block(SCHEMA, "ternary", published, target).apply(published)
    assert np.abs(target - published).max() < 1e-3 * np.abs(target).max()


def test_the_residual_stays_bounded_while_the_server_moves_on() -> None:
    """Over many merges, and it is gone soon after the last."""
    generator = np.random.default_rng(2)
    published = np.zeros(SCHEMA.elements, dtype=np.float32)
    target = published.copy()
    step = 0.01
    residuals = []
    for _ in range(400):
        target = target + generator.normal(scale=step, size=SCHEMA.elements).astype(np.float32)
        published = next_block(SCHEMA, "ternary", published, target).apply(published)
        residuals.append(float(np.linalg.norm(target - published)))
    one_step = step * np.sqrt(SCHEMA.elements)
    assert max(residuals) < 2 * one_step
    assert np.mean(residuals[-50:]) < 1.2 * np.mean(residuals[50:100])
    for _ in range(40):
        published = next_block(SCHEMA, "ternary", published, target).apply(published)
    assert np.linalg.norm(target - published) < 0.02 * one_step


def test_dense_tensors_have_no_residual() -> None:
    generator = np.random.default_rng(3)
    published = generator.normal(size=SCHEMA.elements).astype(np.float32)
    target = generator.normal(size=SCHEMA.elements).astype(np.float32)
    published = next_block(SCHEMA, "ternary", published, target).apply(published)
    (dense,) = SCHEMA.dense
    np.testing.assert_allclose(published[dense.start : dense.stop], target[dense.start : dense.stop], atol=1e-6)


def test_what_exceeds_the_largest_value_is_carried_later() -> None:
    target = np.zeros(SCHEMA.elements, dtype=np.float32)
    target[0] = 150_000.0
    published = np.zeros_like(target)
    for _ in range(3):
        block = next_block(SCHEMA, "float32", published, target)
        Block.read(SCHEMA, "float32", "raw", block.content)
        published = block.apply(published)
    assert published[0] == 150_000.0


@pytest.mark.parametrize("codec", ["ternary", "float32"])
@given(seed=st.integers(0, 2**32 - 1), below=st.sampled_from([0.0, 1e5, 1e6, 1e9]))
def test_no_version_has_an_element_beyond_the_bound(codec: str, seed: int, below: float) -> None:
    """Whatever the server is led to: from elements at the bound and some below it, in both directions."""
    generator = np.random.default_rng(seed)
    published = (WEIGHT_MAX - below * generator.random(SCHEMA.elements)).astype(np.float32)
    published[generator.random(SCHEMA.elements) < 0.5] *= -1
    targets = np.array([0.0, -WEIGHT_MAX, WEIGHT_MAX, 3e38, -3e38, *published[:20]], np.float32)
    for _ in range(8):
        block = next_block(SCHEMA, codec, published, generator.choice(targets, SCHEMA.elements))
        published = Block.read(SCHEMA, codec, "raw", block.content).apply(published)
        assert is_bounded(published)


def test_the_largest_block_leads_to_the_bound_and_not_beyond() -> None:
    bound = np.full(SCHEMA.elements, WEIGHT_MAX, np.float32)
    for start in (bound, np.nextafter(bound, np.float32(0))):
        for sign in (-1, 1):
            block = Block.of_float32(SCHEMA, np.full(SCHEMA.elements, sign * 1e9, np.float32))
            assert np.array_equal(block.apply(sign * start), sign * bound)


def test_a_block_and_a_snapshot_travel() -> None:
    vector = np.random.default_rng(4).normal(size=SCHEMA.elements).astype(np.float32)
    block = next_block(SCHEMA, "ternary", np.zeros_like(vector), vector)
    encoding, body = encoded_block(block)
    assert Block.read(SCHEMA, "ternary", encoding, body) == block
    encoding, body, length = snapshot_body(SCHEMA, vector)
    content = decode(body, encoding, length)
    assert length == len(SCHEMA.encoded) + 4 * SCHEMA.elements
    assert Schema.parse(content[: len(SCHEMA.encoded)]) == SCHEMA
    assert np.array_equal(vector_of(content[len(SCHEMA.encoded) :], SCHEMA), vector)


def test_a_gaussian_delta_takes_less_than_1_6_bits_an_element() -> None:
    schema = Schema.write([Tensor("w", (CHUNK,), "ternary")])
    change = np.random.default_rng(5).normal(size=CHUNK).astype(np.float32)
    _, body = encoded_block(next_block(schema, "ternary", np.zeros_like(change), change))
    assert 8 * len(body) / CHUNK < 1.6
