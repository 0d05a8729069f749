"""How many parts of large updates may be on their way at once: they share the broker's queue with everybody else's."""

from dataclasses import dataclass, field
from typing import Final

from ternbus.broker.protocol.messages import GRANT_RANGES_MAX

GRANT_S: Final = 60.0
WAITING_S: Final = 15.0  # a refused device that has not asked again by then waits no longer


@dataclass(slots=True)
class Grants:
    """Parts that were asked for, by device, until they come or their deadline passes.

    Who was refused first is served first, with all that it wants or half of the room: a smaller piece would count as
    served, and take as long. So a device that offers again and again, and sends nothing, keeps the others out for one
    deadline at a time, not for ever, whether it asks for all the room or for all but one part.
    """

    parts_max: int
    _open: dict[str, tuple[float, int]] = field(default_factory=dict)  # device -> (deadline, parts)
    _waiting: dict[str, float] = field(default_factory=dict)  # refused devices in order -> when each asked last

    def grant(self, device: str, wanted: list[int], now: float) -> tuple[tuple[int, int], ...]:
        """The ranges [first, last] of ``wanted`` that there is room for; none where the queue is spoken for.

        While others wait, a device has what it was granted before, until the deadline of then, and nothing more.
        """
        self._open = {name: open_ for name, open_ in self._open.items() if open_[0] > now}
        self._waiting = {name: at for name, at in self._waiting.items() if at + WAITING_S > now}
        held_until, held = self._open.get(device, (now, 0))
        if next(iter(self._waiting), device) != device:
            deadline, granted = held_until, wanted[:held]
        else:
            room = self.parts_max - sum(parts for _, parts in self._open.values()) + held
            enough = min(len(wanted), max(1, self.parts_max // 2))
            deadline, granted = now + GRANT_S, wanted[:room] if room >= enough else []
        if granted:
            self._open[device] = (deadline, len(granted))
            self._waiting.pop(device, None)
        else:
            self._waiting[device] = now
        return ranges(granted)

    def close(self, device: str) -> None:
        """The device's update is answered."""
        self._open.pop(device, None)
        self._waiting.pop(device, None)


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
