"""The compiled loop of aggregator/native: bit for bit what the numpy path computes, and no read out of bounds."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ternbus.aggregator.merge import accumulator
from ternbus.aggregator.merge.accumulator import COMPILED, Accumulator, count_other
from ternbus.aggregator.merge.exact import ExactSum
from ternbus.broker.protocol.schema import Schema, Tensor
from ternbus.broker.protocol.ternary import Block

pytestmark = pytest.mark.skipif(not COMPILED, reason="pip install ./aggregator/native")


@pytest.mark.parametrize("kind", [Accumulator, ExactSum])
@given(data=st.data())
def test_the_sums_have_the_same_bits(kind: type[Accumulator | ExactSum], data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    schema = Schema.write([Tensor(f"t{index}", (size,), "ternary") for index, size in enumerate(sizes)])
    plain, compiled = kind(schema, compiled=False), kind(schema, compiled=True)
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    for _ in range(data.draw(st.integers(1, 4))):
        trits = generator.integers(-1, 2, schema.ternary_elements).astype(np.int8)
        scales = generator.random(len(sizes)).astype(np.float32).tolist()
        block = Block.of_trits(schema, scales, trits, np.zeros(0, np.float32))
        weight = float(generator.random())
        for each in (plain, compiled):
            each.add(block, weight)
            if isinstance(each, ExactSum):
                each.add_all([(block, weight / place) for place in range(1, 8)])  # four in one pass, and three
    assert plain.total().tobytes() == compiled.total().tobytes()
    assert np.any(plain.total()) or not np.any(trits)


@given(st.binary(max_size=2000), st.integers(0, 255))
def test_other_bytes_are_counted_as_numpy_does(content: bytes, value: int) -> None:
    values = np.frombuffer(content + bytes([value]) * 300, np.uint8)
    assert count_other(values, value) == np.count_nonzero(values != value)


def test_without_the_loop_numpy_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulator, "_count_other", None)
    assert count_other(np.array([1, 2, 1, 3], np.uint8), 1) == 2


ROWS, TABLE, PACKED = np.zeros((6, 8), np.float32), np.ones((256, 8), np.float32), np.zeros(6, np.uint8)
READ_ONLY = np.zeros((6, 8), np.float32)
FOUR = np.ones((4, 256, 8), np.float32)
READ_ONLY.flags.writeable = False


@pytest.mark.parametrize(
    "wrong",
    [(ROWS[:5], TABLE, PACKED), (ROWS, TABLE[:243], PACKED), (ROWS, TABLE, PACKED[1:]), (READ_ONLY, TABLE, PACKED)],
    ids=["few rows", "few values", "few bytes", "read-only"],
)
def test_what_does_not_fit_is_refused(wrong: Any) -> None:
    import ternbus_rows  # noqa: PLC0415 - not everywhere

    with pytest.raises((ValueError, TypeError, BufferError)):
        ternbus_rows.add(*wrong)
    ternbus_rows.add(ROWS, TABLE, PACKED)  # and what fits is not
    assert ROWS.sum() == ROWS.size
    ROWS[:] = 0


@pytest.mark.parametrize(
    "wrong",
    [
        (ROWS[:5], FOUR, *[PACKED] * 4),
        (ROWS, FOUR[:3], *[PACKED] * 4),
        *((ROWS, FOUR, *[PACKED] * place, PACKED[1:], *[PACKED] * (3 - place)) for place in range(4)),
        (READ_ONLY, FOUR, *[PACKED] * 4),
        (ROWS, FOUR, *[PACKED] * 3),
    ],
)
def test_four_that_do_not_fit_are_refused(wrong: Any) -> None:
    import ternbus_rows  # noqa: PLC0415 - not everywhere

    with pytest.raises((ValueError, TypeError, BufferError)):
        ternbus_rows.add_four(*wrong)
    tables = FOUR * np.array([1, 10, 100, 1000], np.float32)[:, None, None]
    ternbus_rows.add_four(ROWS, tables, *[PACKED] * 4)
    assert (ROWS == 1111).all()
    ROWS[:] = 0


def test_the_largest_byte_has_a_row() -> None:
    import ternbus_rows  # noqa: PLC0415 - not everywhere

    rows = np.zeros((1, 8), np.float32)
    table = np.repeat(np.arange(256, dtype=np.float32)[:, None], 8, axis=1)
    ternbus_rows.add(rows, table, np.array([255], np.uint8))
    assert rows.tolist() == [[255.0] * 8]
    ternbus_rows.add_four(rows, np.stack([table] * 4), *[np.array([255], np.uint8)] * 4)
    assert rows.tolist() == [[5 * 255.0] * 8]
