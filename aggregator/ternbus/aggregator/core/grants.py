"""How many parts of large updates may be on their way at once: they share the broker's queue with everybody else's."""

from dataclasses import dataclass, field
from itertools import takewhile
from typing import Final, NamedTuple

from ternbus.broker.protocol.messages import GRANT_RANGES_MAX

GRANT_S: Final = 60.0
WAITING_S: Final = 15.0  # a refused device that has not asked again by then waits no longer


class _Asked(NamedTuple):
    """What a refused device waits for."""

    at: float  # when it asked last
    parts: int
    goes_on: bool


@dataclass(slots=True)
class Grants:
    """Parts that were asked for, by device, until they come or their deadline passes.

    Who was refused first is served first, with all that it wants or half of the room: a smaller piece would count as
    served, and take as long. So a device that offers again and again, and sends nothing, keeps the others out for one
    deadline at a time, not for ever, whether it asks for all the room or for all but one part.

    What those before it want is kept for them, and a device is served out of what is left. If it had to wait until
    they have come for it, one device would be served in each pause between two offers, however large the room is.

    Who has sent all that it was granted goes on before those who have not begun, with at most half of the room while
    others wait. Else all would have begun, and those begun would push each other out of the assembly for ever.
    """

    parts_max: int
    _open: dict[str, tuple[float, int]] = field(default_factory=dict)  # device -> (deadline, parts)
    _waiting: dict[str, _Asked] = field(default_factory=dict)  # refused devices, in order

    def grant(
        self, device: str, wanted: list[int], now: float, *, goes_on: bool = False
    ) -> tuple[tuple[int, int], ...]:
        """The ranges [first, last] of ``wanted`` that there is room for; none where the queue is spoken for.

        ``goes_on``: the device has sent all that it was granted before.

        Where what others wait for leaves too little, a device has what it was granted before, until the deadline of
        then, and nothing more.
        """
        self._open = {name: open_ for name, open_ in self._open.items() if open_[0] > now}
        self._waiting = {name: asked for name, asked in self._waiting.items() if asked.at + WAITING_S > now}
        half = max(1, self.parts_max // 2)
        self._waiting[device] = _Asked(now, min(len(wanted), half) if goes_on else len(wanted), goes_on)
        deadline, held = self._open.get(device, (now, 0))
        room = self.parts_max - sum(parts for _, parts in self._open.values()) + held - self._kept_from(device)
        if goes_on and len(self._waiting) > 1:
            room = min(room, half)
        granted = wanted[:held]
        if room >= min(len(wanted), max(held, half)):
            deadline, granted = now + GRANT_S, wanted[:room]
        if granted:
            self._open[device] = (deadline, len(granted))
            del self._waiting[device]
        return ranges(granted)

    def _kept_from(self, device: str) -> int:
        """The parts that those wait for who are served before this device."""
        line = sorted(self._waiting, key=lambda name: not self._waiting[name].goes_on)
        before = takewhile(lambda name: name != device, line)
        return sum(self._waiting[name].parts for name in before)

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
