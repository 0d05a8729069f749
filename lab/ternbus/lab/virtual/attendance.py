"""Takes a simulated device offline and online again by the scenario's availability.

Going offline is the end of the process, as where the owner picks the phone up: the broker publishes the device's last
will, and a training in progress is lost; what is in the outbox is kept. Going online is a start from the outbox.
"""

import random
from functools import partial
from typing import Final

from ternbus.lab.scenario.availability import Availability
from ternbus.lab.virtual.clock import Clock
from ternbus.lab.virtual.virtual_device import VirtualDevice

FOREVER: Final = float("inf")


class Attendance:
    """One device's times online. ``begin`` starts the device now, or later if it is offline now."""

    def __init__(self, clock: Clock, device: VirtualDevice, about: Availability, seed: int) -> None:
        self.online_s = 0.0  # until the last time that it went offline
        self.sessions = 0
        self._clock = clock
        self._device = device
        self._about = about
        self._sessions = about.sessions(seed, device.name)
        self._draw = random.Random(f"{seed}/drop-outs of {device.name}")  # noqa: S311 - reproducible on purpose, no secret
        self._since: float | None = None  # since when it is online
        self._until = 0.0

    @property
    def is_online(self) -> bool:
        return self._since is not None

    def begin(self) -> None:
        self._next(0.0)

    def training_begins(self, seconds: float) -> None:
        """A training of this length has begun, of which a share is interrupted, at any moment of it."""
        if self._about.drop_out and self._draw.random() < self._about.drop_out:
            when = self._clock.now + self._draw.random() * seconds
            self._clock.at(when, partial(self._drop_out, self.sessions))

    def seconds_online(self, now: float) -> float:
        """The time that it has been online until now."""
        return self.online_s + (0.0 if self._since is None else now - self._since)

    def _next(self, earliest: float) -> None:
        """Schedule the next time online that is not over at ``earliest``."""
        for begin, end in self._sessions:
            if end > earliest:
                self._clock.at(max(begin, earliest), partial(self._online, end))
                return

    def _online(self, until: float) -> None:
        if self._device.has_stopped:
            return
        self.sessions += 1
        self._since, self._until = self._clock.now, until
        if self.sessions == 1:
            self._device.start()
        else:
            self._device.restart()
        if until < FOREVER:
            self._clock.at(until, partial(self._end, self.sessions))

    def _end(self, session: int) -> None:
        if session == self.sessions and self._since is not None:
            self._offline()
            self._next(self._clock.now)

    def _drop_out(self, session: int) -> None:
        if session != self.sessions or not self.is_online:
            return
        self._offline()
        back = self._clock.now + self._about.pause(self._draw)
        if back < self._until:
            self._clock.at(back, partial(self._online, self._until))
        else:
            self._next(back)

    def _offline(self) -> None:
        if self._since is not None:
            self.online_s += self._clock.now - self._since
            self._since = None
            if not self._device.has_stopped:
                self._device.kill()
