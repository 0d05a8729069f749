"""Virtual time: what is to happen, in the order in which it will. The time of day plays no part in it."""

import heapq
from collections.abc import Callable
from functools import partial
from itertools import count


class Clock:
    """A heap of what is to happen; of two things at the same moment, the one that was asked for first comes first."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = count()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []

    @property
    def next_at(self) -> float | None:
        """When the next thing happens; None if nothing ever will."""
        return self._heap[0][0] if self._heap else None

    def at(self, when: float, do: Callable[[], None]) -> None:
        """Do something at that moment, or now if it has passed."""
        heapq.heappush(self._heap, (max(when, self.now), next(self._order), do))

    def step(self) -> None:
        """Let time jump to the next thing, and do it. IndexError if there is none."""
        self.now, _, do = heapq.heappop(self._heap)
        do()


class Alarm:
    """Wakes a state machine when it is due, however often that moment moves."""

    def __init__(self, clock: Clock, due: Callable[[], float | None], wake: Callable[[], None]) -> None:
        self._clock = clock
        self._due = due
        self._wake = wake
        self._set_for: float | None = None
        self._is_off = False

    def off(self) -> None:
        """The state machine is dead: it is not woken any more."""
        self._is_off = True

    def look(self) -> None:
        """The state machine has changed: see when it is due now."""
        due = None if self._is_off else self._due()
        if due is not None and (self._set_for is None or due < self._set_for):
            self._set_for = max(due, self._clock.now)
            self._clock.at(self._set_for, partial(self._ring, self._set_for))

    def _ring(self, when: float) -> None:
        if self._is_off or when != self._set_for:  # or an earlier one took its place
            return
        self._set_for = None
        due = self._due()
        if due is not None and due <= self._clock.now:
            self._wake()
        self.look()
