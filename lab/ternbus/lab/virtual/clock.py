"""A virtual clock: scheduled events in order of time, independent of real time."""

import heapq
from collections.abc import Callable
from functools import partial
from itertools import count


class Clock:
    """A heap of scheduled events. Events at the same time run in the order in which they were scheduled."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = count()
        self._heap: list[tuple[float, int, Callable[[], None]]] = []

    @property
    def next_at(self) -> float | None:
        """The time of the next event; None if no event is scheduled."""
        return self._heap[0][0] if self._heap else None

    def at(self, when: float, do: Callable[[], None]) -> None:
        """Schedule ``do`` for the time ``when``, or for now if that is past."""
        heapq.heappush(self._heap, (max(when, self.now), next(self._order), do))

    def step(self) -> None:
        """Advance to the next event and run it. IndexError if there is none."""
        self.now, _, do = heapq.heappop(self._heap)
        do()


class Alarm:
    """Wakes a state machine at its due time, which may change at any time."""

    def __init__(self, clock: Clock, due: Callable[[], float | None], wake: Callable[[], None]) -> None:
        self._clock = clock
        self._due = due
        self._wake = wake
        self._set_for: float | None = None
        self._is_off = False

    def off(self) -> None:
        """Stop waking the state machine, which has ended."""
        self._is_off = True

    def look(self) -> None:
        """Read the due time again after a change of the state machine."""
        due = None if self._is_off else self._due()
        if due is not None and (self._set_for is None or due < self._set_for):
            self._set_for = max(due, self._clock.now)
            self._clock.at(self._set_for, partial(self._ring, self._set_for))

    def _ring(self, when: float) -> None:
        if self._is_off or when != self._set_for:  # replaced by an earlier time
            return
        self._set_for = None
        due = self._due()
        if due is not None and due <= self._clock.now:
            self._wake()
        self.look()
