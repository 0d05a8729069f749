"""Sums that a thread adds up: the same bits as those that are added at once, and few blocks waiting."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from support.small_world import Lazy, accepted_update, float32_block, ternary_block
from ternbus.aggregator.merge import optimizer
from ternbus.aggregator.merge.background import (
    ADDERS_MAX,
    AT_A_TIME,
    WAITING_MAX,
    WORTHWHILE,
    Background,
    adders_for,
    summing,
)
from ternbus.aggregator.merge.exact import ExactSum
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.settings import Settings
from ternbus.broker.protocol.schema import Schema, Tensor
from ternbus.broker.protocol.tensor_kinds import TensorKinds
from ternbus.broker.protocol.ternary import Block

SCHEMA = Schema.write([Tensor("w", (64,), "ternary"), Tensor("b", (3,), "dense")])


def blocks(count: int) -> list[Block]:
    return [(ternary_block if seed % 2 else float32_block)(SCHEMA, seed) for seed in range(count)]


def summed(chosen: list[Block]) -> bytes:
    total = ExactSum(SCHEMA)
    for place, block in enumerate(chosen):
        total.add(block, 1 / (1 + place))
    return total.total().tobytes()


def test_a_thread_s_sum_has_the_bits_of_one_that_is_added_at_once() -> None:
    with ThreadPoolExecutor(1) as thread:
        background = Background(SCHEMA, thread)
        for place, block in enumerate(blocks(20)):
            background.add(block, 1 / (1 + place))
        assert background.total().tobytes() == summed(blocks(20))


def test_few_blocks_wait_for_a_slow_thread() -> None:
    thread = Lazy()
    background, more = Background(SCHEMA, thread), 5 * AT_A_TIME + 1
    for place, block in enumerate(blocks(WAITING_MAX + more)):
        background.add(block, 1 / (1 + place))
    assert [late.done() for late in thread.given] == [True] * 5 + [False] * (WAITING_MAX // AT_A_TIME)
    assert background.total().tobytes() == summed(blocks(WAITING_MAX + more))


def test_only_a_large_model_is_worth_a_thread() -> None:
    with ThreadPoolExecutor(1) as thread:
        assert isinstance(summing(thread, 1, SCHEMA), ExactSum)
        large = Schema.write([Tensor("w", (WORTHWHILE,), "ternary")])
        assert isinstance(summing(thread, 1, large), Background)


def test_adders_leave_processors_to_the_core_and_the_preverifier() -> None:
    assert [adders_for(count) for count in (None, 1, 2, 3, 4, 6, 64)] == [1, 1, 1, 1, 2, 4, ADDERS_MAX]
    assert 1 <= adders_for() <= ADDERS_MAX


def take_in(model: Model, seqs: list[int]) -> None:
    for seq in seqs:
        model.accept(accepted_update(seq=seq), blocks(1)[0])


def test_another_way_to_add_up_begins_with_an_empty_buffer() -> None:
    settings = Settings(federation="lab", broker="mqtt://127.0.0.1:1")
    start = np.zeros(SCHEMA.elements, dtype=np.float32)
    server = optimizer.init(settings.optimizer, start)
    model = Model(settings=settings, schema=SCHEMA, version=0, published=start, server=server, kinds=TensorKinds())
    first, second = Lazy(), Lazy()
    model.sum_by(partial(lambda thread, schema: Background(schema, thread), first))
    take_in(model, seqs=[1, 2, 3, 4])
    assert len(first.given) == 1
    model.sum_by(partial(lambda thread, schema: Background(schema, thread), second))
    take_in(model, seqs=[5, 6, 7, 8])
    assert (len(first.given), len(second.given)) == (2, 0)
    model.merge()
    before = len(first.given)
    take_in(model, seqs=[9, 10, 11, 12])
    assert (len(first.given), len(second.given)) == (before, 1)
