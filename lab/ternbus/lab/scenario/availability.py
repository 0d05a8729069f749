"""The table `[availability]` of a scenario: when a simulated device is online, by its local time and by chance.

A device trains for a federation only while it is idle, charging and on an unmetered network (Bonawitz et al. 2019,
section 2), which is mostly at night: of a population in one country four times as many are online at the best hour as
at the worst (section 9), and 6 to 10 % drop out of a round. In the traces of 136,000 phones this costs up to 9.2 % of
accuracy and 2.3 times the time (Yang et al. 2021).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ternbus.lab.scenario.toml_table import Table, within

DAY_H: Final = 24.0
HOUR_S: Final = 3600.0
MINUTE_S: Final = 60.0
SHORTEST_S: Final = 1.0  # a time online or offline; shorter ones are as long as this


@dataclass(frozen=True, slots=True, kw_only=True)
class Availability:
    """A device is online for ``hours`` of each day, in sessions, and is lost during a share of its trainings.

    Its day begins at a time that is drawn uniformly within ``zones`` hours. Times online and offline within the hours
    are exponential with the means ``session_min`` and ``pause_min``, in minutes; a session of 0 lasts until the hours
    end. ``drop_out`` is the share of trainings during which the device goes offline; the training is lost.
    """

    hours: float = DAY_H
    zones: float = DAY_H
    session_min: float = 0.0
    pause_min: float = 10.0
    drop_out: float = 0.0

    def __post_init__(self) -> None:
        within("availability.hours", self.hours, 0.1, DAY_H)
        within("availability.zones", self.zones, 0, DAY_H)
        within("availability.session_min", self.session_min, 0, 1e6)
        within("availability.pause_min", self.pause_min, 0.02, 1e6)
        within("availability.drop_out", self.drop_out, 0, 0.99)

    @property
    def is_always(self) -> bool:
        """Whether every device is online all the time."""
        return self.hours == DAY_H and not self.session_min and not self.drop_out

    def sessions(self, seed: int, device: str) -> Iterator[tuple[float, float]]:
        """(begin, end) of each time online, in seconds of the run, in order and without end. Random by the arguments.

        With 24 hours the end of a day ends no session, but only that of the drawn time does.
        """
        draw = random.Random(f"{seed}/availability of {device}")  # noqa: S311 - reproducible on purpose, no secret
        phase, day, length = draw.uniform(0, self.zones * HOUR_S), DAY_H * HOUR_S, self.hours * HOUR_S
        if self.hours == DAY_H:
            yield from self._within(draw, 0.0, float("inf"))
            return
        begin = phase - day  # of the window that may be open at the start
        while True:
            if begin + length > 0:
                yield from self._within(draw, max(begin, 0.0), begin + length)
            begin += day

    def _within(self, draw: random.Random, begin: float, end: float) -> Iterator[tuple[float, float]]:
        """The sessions in one window."""
        while begin < end:
            last = begin + self._drawn(draw, self.session_min) if self.session_min else end
            yield begin, min(last, end)
            begin = last + self.pause(draw)

    def pause(self, draw: random.Random) -> float:
        """Draws how long a device stays offline, in seconds."""
        return self._drawn(draw, self.pause_min)

    @staticmethod
    def _drawn(draw: random.Random, mean_min: float) -> float:
        return max(draw.expovariate(1 / (mean_min * MINUTE_S)), SHORTEST_S)


def parse(table: Table) -> Availability:
    """The table `[availability]` of a scenario."""
    keys = ("hours", "zones", "session_min", "pause_min", "drop_out")
    given = {key: value for key in keys if (value := table.number(key)) is not None}
    table.refuse_unknown()
    return Availability(**given)
