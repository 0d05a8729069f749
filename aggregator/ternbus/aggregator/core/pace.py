"""The pace of a device: its usual time between updates, and the silence after which none is expected.

A device whose process hangs, or died without its last will, stays `training` for ever. Its silence is compared with
its own usual time between updates, so a slow device is given more time.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

RECENT: Final = 5  # times between updates that are remembered
KNOWN: Final = 2  # as many make a usual time
FACTOR: Final = 5.0  # silent for this many usual times: nothing is to be expected
SHORTEST_S: Final = 5.0  # no shorter silence says anything: a busy machine or network is as slow


@dataclass(slots=True)
class Pace:
    """The times between a device's accepted updates of late, in seconds, and when it was last heard."""

    heard_at: float = -math.inf
    _updated_at: float | None = None
    _between: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def heard(self, now: float) -> None:
        """The device has said or sent something."""
        self.heard_at = now

    def updated(self, now: float) -> None:
        """An update of it was accepted."""
        if self._updated_at is not None:
            self._between.append(now - self._updated_at)
        self._updated_at = now

    def recall(self, moments: Sequence[float]) -> None:
        """Its accepted updates before a restart, oldest first, in seconds of a clock that may have been set."""
        self._between.extend(max(0.0, later - earlier) for earlier, later in pairwise(moments))

    @property
    def patience_s(self) -> float:
        """The longest silence in which an update may be expected; infinite while the usual time is not known.

        The usual time is the median: one pause of the federation says nothing of the device.
        """
        if len(self._between) < KNOWN:
            return math.inf
        usual_s = sorted(self._between)[len(self._between) // 2]
        return max(SHORTEST_S, FACTOR * usual_s)
