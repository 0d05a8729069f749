"""Sums in another thread: numpy releases the interpreter lock, so the core goes on with the next frame."""

from collections import deque
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Final

from ternbus.aggregator.merge.accumulator import Accumulator
from ternbus.aggregator.merge.mean import Sum
from ternbus.broker.protocol.schema import Schema, Vector
from ternbus.broker.protocol.ternary import Block

WORTHWHILE: Final = 500_000  # elements: below it handing a block over costs more than adding it
WAITING_MAX: Final = 64  # blocks that were accepted and are not added yet: this bounds what they hold


def summing(thread: Executor, schema: Schema) -> Sum:
    """The quicker way to add up blocks of this schema."""
    return Background(schema, thread) if schema.elements >= WORTHWHILE else Accumulator(schema)


@dataclass(slots=True)
class Background:
    """An `Accumulator` whose blocks a thread adds, in the order in which they came."""

    schema: Schema
    thread: Executor  # of one worker: the order of additions decides the last bits of a sum
    _sum: Accumulator = field(init=False)
    _adding: "deque[Future[None]]" = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._sum = Accumulator(self.schema)

    def add(self, block: Block, weight: float) -> None:
        """Have ``weight`` times a block added."""
        self._adding.append(self.thread.submit(self._sum.add, block, weight))
        if len(self._adding) > WAITING_MAX:
            self._adding.popleft().result()

    def total(self) -> Vector:
        """The sum, once everything is in it."""
        while self._adding:
            self._adding.popleft().result()
        return self._sum.total()
