"""How many parts of large updates may be on their way at once: they share the broker's queue with everybody else's."""

from dataclasses import dataclass, field
from typing import Final

from ternbus.broker.protocol.messages import GRANT_RANGES_MAX

GRANT_S: Final = 60.0


@dataclass(slots=True)
class Grants:
    """Parts that were asked for, by device, until they come or their deadline passes."""

    parts_max: int
    _open: dict[str, tuple[float, int]] = field(default_factory=dict)  # device -> (deadline, parts)

    def grant(self, device: str, wanted: list[int], now: float) -> tuple[tuple[int, int], ...]:
        """The ranges [first, last] of ``wanted`` that there is room for; none where the queue is spoken for."""
        self._open = {name: open_ for name, open_ in self._open.items() if open_[0] > now and name != device}
        room = self.parts_max - sum(parts for _, parts in self._open.values())
        granted = wanted[: max(0, room)]
        if granted:
            self._open[device] = (now + GRANT_S, len(granted))
        return ranges(granted)

    def close(self, device: str) -> None:
        """The device's update is answered."""
        self._open.pop(device, None)


def ranges(parts: list[int]) -> tuple[tuple[int, int], ...]:
    """Ascending part numbers as ranges, as many as one grant may hold."""
    found: list[tuple[int, int]] = []
    for part in parts:
        if found and found[-1][1] == part - 1:
            found[-1] = (found[-1][0], part)
        elif len(found) < GRANT_RANGES_MAX:
            found.append((part, part))
        else:
            break
    return tuple(found)
