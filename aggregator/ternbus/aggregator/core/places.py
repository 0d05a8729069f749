"""The queue of updates in several parts: each gets a place with room for all of it, in the order of the requests.

All that ask stand in a line, each device with one update. An update has its place as soon as it and all that stand
before it fit into the room together. Who asks stands at the end, nobody passes another, and what an update takes never
grows: so the sum of those before it only decreases. Let n be how many updates always fit: 2 of the largest, 16 small
ones.

1. Memory: all that have a place fit into the room together, and the bodies that they hold are at most what they
   take. Of offered updates no more parts are asked for, and have not come, than the room has.
2. A place ends by an answer to its update, by its own device, or by its own deadline; not by what others ask for.
3. Liveness: the first n of the line have places, and while anybody waits a place lasts at most ``life_s``. So an
   update with k before it has its place within (k // n) * life_s and the pauses between two offers, if its device asks
   again within ``SILENCE_S``. It is whole if its parts come within ``SILENCE_S`` of each other, and within ``life_s``.
4. On an idle aggregator whatever is not too long for the schema has its place at once.

Deadlines count only while somebody waits: a device on a slow line that nobody waits for takes as long as it takes. A
device whose deadline passed asks again, at the end of the line.

There are two rooms with a line each, so that large updates that never end keep out no small ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.messages import GRANT_RANGES_MAX
from ternbus.broker.protocol.parts import Collector

SILENCE_S: Final = 90.0  # longer than a device waits after `busy`
LIFE_S: Final = 300.0  # for an update of no bytes; and one more second for
LIFE_BYTES: Final = 2**16  # so many
LARGEST_AT_ONCE: Final = 2
SMALL_AT_ONCE: Final = 16  # an update is small if so many are no more than one of the largest


def life_s(size_bytes: int) -> float:
    """How long an update of this size has its place at most, in seconds, while others wait."""
    return LIFE_S + size_bytes / LIFE_BYTES


@dataclass(slots=True, kw_only=True)
class Place:
    """An update in the line, and those of its parts that have come."""

    device: str
    key: KeyId
    seq: int
    parts: int
    size_bytes: int  # the most that it can have
    heard: float  # when it asked, was given room, or a part came
    window: int = 0  # parts to ask for at a time; 0: they come unasked
    since: float | None = None  # when it was given room
    asked: int = 0  # so many parts are here once all that were asked for are; 0: none were
    collector: Collector = field(init=False)

    def __post_init__(self) -> None:
        self.collector = Collector(1, self.size_bytes)

    @property
    def has_room(self) -> bool:
        return self.since is not None

    @property
    def until(self) -> float:
        """The deadline."""
        until = self.heard + SILENCE_S
        return until if self.since is None else min(until, self.since + life_s(self.size_bytes))

    def is_for(self, seq: int, parts: int, size_bytes: int) -> bool:
        """Whether an update of this size may have it."""
        return (self.seq, self.parts) == (seq, parts) and size_bytes <= self.size_bytes

    @property
    def has_sent(self) -> bool:
        """Whether all parts that were asked for are here."""
        return 0 < self.asked <= self.came

    @property
    def came(self) -> int:
        """How many parts are here."""
        return self.collector.came("update", self.seq)

    def ask(self) -> tuple[tuple[int, int], ...]:
        """The ranges [first, last] of the parts to ask for now."""
        missing = self.collector.missing_ranges("update", self.seq) if self.came else [(0, self.parts - 1)]
        found, left = [], self.window or self.parts
        for first, last in islice(missing, GRANT_RANGES_MAX):
            end = min(last, first + left - 1)
            found.append((first, end))
            left -= end - first + 1
            if not left:
                break
        self.asked = self.came + (self.window or self.parts) - left
        return tuple(found)

    def shrink(self, size_bytes: int) -> None:
        """It turns out to be smaller: parts that came as of a larger one are not its, and would take what it gives."""
        self.size_bytes = self.collector.bytes_max = size_bytes
        self.collector.clear()


@dataclass(slots=True)
class Room:
    """``bytes_max`` bytes, and ``parts_max`` parts asked for, for the first of a line."""

    bytes_max: int
    parts_max: int
    line: dict[str, Place] = field(default_factory=dict)
    waits: bool = False  # there are some without room
    _bytes: int = 0  # of all in the line
    _parts: int = 0
    _due: float = 0.0  # no deadline is before: none is later than SILENCE_S from the last that was heard
    _has_changed: bool = False

    def join(self, place: Place, now: float) -> None:
        """Put an update at the end of the line."""
        self.line[place.device] = place
        self._bytes += place.size_bytes
        self._parts += place.window
        if self._bytes <= self.bytes_max and self._parts <= self.parts_max:
            place.since = now
        else:
            self.waits = self._has_changed = True

    def leave(self, place: Place) -> None:
        """Take an update out of the line."""
        del self.line[place.device]
        self._bytes -= place.size_bytes
        self._parts -= place.window
        self._has_changed = True

    def shrink(self, place: Place, size_bytes: int) -> None:
        """Give back what an update turns out not to need."""
        self._bytes -= place.size_bytes - size_bytes
        place.shrink(size_bytes)
        self._due = min(self._due, place.until)
        self._has_changed = True

    def advance(self, now: float) -> tuple[list[Place], list[Place]]:
        """Those that are given room now, and those whose deadline has passed while others waited."""
        given: list[Place] = []
        gone: list[Place] = []
        if self.waits and self._has_changed:
            given += self._give(now)
        if self.waits and now >= self._due:
            gone = [place for place in self.line.values() if place.until <= now]
            for place in gone:
                self.leave(place)
            given += self._give(now)
            self._due = min((place.until for place in self.line.values()), default=now)
        return given, gone

    def _give(self, now: float) -> Iterator[Place]:
        """Give room from the front of the line, as far as it goes."""
        self.waits = self._has_changed = False
        size_bytes = parts = 0
        for place in self.line.values():
            size_bytes += place.size_bytes
            parts += place.window
            if place.has_room:
                continue
            if size_bytes <= self.bytes_max and (parts <= self.parts_max or not place.window):
                place.since = place.heard = now
                yield place
                continue
            self.waits = True
            if size_bytes > self.bytes_max:
                return


@dataclass(slots=True)
class Places:
    """All updates of several parts that devices send, or wait to send; of each device the newest."""

    largest_bytes: int
    bytes_max: int
    parts_max: int
    small: Room = field(init=False)
    large: Room = field(init=False)
    _given: list[Place] = field(default_factory=list)
    _unfinished: int = 0

    def __post_init__(self) -> None:
        room = max(self.bytes_max, (LARGEST_AT_ONCE + 1) * self.largest_bytes)
        self.small = Room(room // (LARGEST_AT_ONCE + 1), self.parts_max)
        self.large = Room(room - self.small.bytes_max, self.parts_max)

    def of(self, device: str) -> Place | None:
        """The update of a device, which may have to wait."""
        return self.small.line.get(device) or self.large.line.get(device)

    def ask(
        self, device: str, key: KeyId, now: float, *, seq: int, parts: int, size_bytes: int | None = None
    ) -> Place | None:
        """The place of an update, perhaps without room yet; None for an older update than its device has in the line.

        ``size_bytes``: the most that it can have; None for one that is offered, and sent when it is asked for.
        """
        place = self.of(device)
        if place is not None and seq < place.seq and now < place.until:
            return None
        if place is None or not place.is_for(seq, parts, size_bytes or 0):
            self.leave(device)
            most = self.largest_bytes if size_bytes is None else size_bytes
            place = Place(device=device, key=key, seq=seq, parts=parts, size_bytes=most, heard=now)
            if size_bytes is None:
                place.window = min(parts, max(1, self.parts_max // LARGEST_AT_ONCE))
            is_small = size_bytes is not None and size_bytes * SMALL_AT_ONCE <= self.largest_bytes
            (self.small if is_small else self.large).join(place, now)
        elif size_bytes is not None and size_bytes < place.size_bytes:
            self._room_of(place).shrink(place, size_bytes)
        if not place.has_room:
            place.heard = now
            self._advance(now)
        return place

    def _room_of(self, place: Place) -> Room:
        return self.small if place.device in self.small.line else self.large

    def leave(self, device: str) -> None:
        """The update of a device is answered, or given up."""
        place = self.of(device)
        if place is not None:
            self._room_of(place).leave(place)
            self._ended(place)

    def turns(self, now: float) -> list[Place]:
        """Those that have been given room since the last call, and of which no part was asked for or has come."""
        self._advance(now)
        given, self._given = self._given, []
        return [place for place in given if self.of(place.device) is place and not place.asked and not place.came]

    def take_unfinished(self) -> int:
        """How many updates have ended since the last call with some of their parts here."""
        unfinished, self._unfinished = self._unfinished, 0
        return unfinished

    def _advance(self, now: float) -> None:
        for room in (self.small, self.large):
            given, gone = room.advance(now)
            self._given += given
            for place in gone:
                self._ended(place)

    def _ended(self, place: Place) -> None:
        self._unfinished += place.collector.dropped + len(place.collector)
