"""Sums in other threads: numpy releases the interpreter lock, so the core goes on with the next frame."""

import os
from collections import deque
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Final

from ternbus.aggregator.merge.exact import ExactSum, Weighted
from ternbus.aggregator.merge.mean import Sum
from ternbus.broker.protocol.schema import Schema, Vector
from ternbus.broker.protocol.ternary import Block

WORTHWHILE: Final = 500_000  # elements: below it handing a block over costs more than adding it
AT_A_TIME: Final = 4  # blocks in one pass over a sum, which takes 0.4 of the time
WAITING_MAX: Final = 64  # blocks that were accepted and are not added yet: this bounds what they hold
ADDERS_MAX: Final = 4  # each may have a sum of its own, of at least 6.4 bytes a parameter


def adders_for(processors: int | None = os.cpu_count()) -> int:
    """How many threads are to add: as many as the core and the preverifier leave processors, at least one."""
    return max(1, min(ADDERS_MAX, (processors or 1) - 2))


def summing(threads: Executor, adders: int, schema: Schema) -> Sum:
    """The quicker way to add up blocks of this schema."""
    return Background(schema, threads, adders) if schema.elements >= WORTHWHILE else ExactSum(schema)


@dataclass(slots=True)
class Background:
    """An exact sum whose blocks several threads add, each to a sum of its own; these are joined in the end."""

    schema: Schema
    threads: Executor
    adders: int = 1  # as many threads as there are
    _sums: list[ExactSum] = field(init=False)
    _free: list[ExactSum] = field(init=False)  # those to which nobody adds at the moment
    _next: list[Weighted] = field(default_factory=list)  # fewer than are added at a time
    _adding: "deque[Future[None]]" = field(default_factory=deque)

    def __post_init__(self) -> None:
        self._sums = [ExactSum(self.schema) for _ in range(self.adders)]
        self._free = list(self._sums)

    def add(self, block: Block, weight: float) -> None:
        """Have ``weight`` times a block added."""
        self._next.append((block, weight))
        if len(self._next) == AT_A_TIME:
            self._submit()
        if len(self._adding) * AT_A_TIME > WAITING_MAX:
            self._adding.popleft().result()

    def subtract(self, block: Block, weight: float) -> None:
        """Take out ``weight`` times a block that was added; only if ``subtracts``."""
        self._joined().subtract(block, weight)

    @property
    def subtracts(self) -> bool:
        """Whether everything that was added can be taken out."""
        return self._joined().subtracts

    def total(self) -> Vector:
        """The sum, once everything is in it."""
        return self._joined().total()

    def _submit(self) -> None:
        self._adding.append(self.threads.submit(self._add, self._next))
        self._next = []

    def _add(self, weighted: list[Weighted]) -> None:
        """In a thread: add to the sum that was used last, so that few hold anything while there is little to do."""
        found = self._free.pop()
        found.add_all(weighted)
        self._free.append(found)

    def _joined(self) -> ExactSum:
        if self._next:
            self._submit()
        while self._adding:
            self._adding.popleft().result()
        first, *others = self._sums
        for each in others:
            first.join(each)
        self._sums = [first, *(ExactSum(self.schema) for _ in others)]
        self._free = [*self._sums[1:], first]
        return first
