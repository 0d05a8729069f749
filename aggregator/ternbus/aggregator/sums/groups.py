"""The rule by which accepted private updates are grouped into sets.

Updates with one context are a group. A set is cut from one group: it has at least as many devices as the terms, the
helpers and each of its members' owners ask for, and at most as many as cannot wrap (``devices_max``).

Groups become sets where those that can be cut are as many updates as a merge is to have, where one has waited for
``max_wait_s``, or where every device online has contributed. A group stays open while one device or more, but too few
for another set, still train on its base: they would be left alone. It does not stay open beyond ``max_wait_s``, nor
when its base becomes stale: then none of them can join any more. Updates that cannot be cut yet do not fill the
buffer: if they did, a few that wait for company would bring about small merges one after the other, which leave still
more alone.

A group that is too small waits for company. What is too small when its base becomes stale is dropped (``lost``): no
update on that base is accepted any more. Where every device has sent on the newest version, and no set can be cut, as
after one whose sum was out of range, only a version of no update lets them go on (``needs_version``). For a device that
does not send, though it says that it trains, they wait ``max_wait_s``.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Final

BELOW_MIN: Final = "below-min"  # why an update is dropped: too few devices sent one with its context


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """An accepted update that is in no set, as far as it matters here."""

    device: str
    min: int  # devices in its set, by its owner


@dataclass(frozen=True, kw_only=True)
class Group:
    """The updates of one context, in order of acceptance; a device is in it once."""

    base: int
    need: int  # devices in a set, by the terms and the helpers' cards in them
    devices_max: int  # in a set
    members: Sequence[Waiting]
    since: float = math.inf  # when the first of them was accepted

    @cached_property
    def sets(self) -> Sequence[tuple[str, ...]]:
        """The devices of the sets that can be cut from it now, as few and as even as can be; what is left waits."""
        able: Sequence[Waiting] = ()
        left = self.members
        while len(left) != len(able):
            able = left
            left = [each for each in able if each.min <= min(len(able), self.devices_max)]
        need = max([self.need, *(each.min for each in able)])
        if need > self.devices_max or len(able) < need:
            return []
        count = min(-(-len(able) // self.devices_max), len(able) // need)
        size, more = divmod(min(len(able), count * self.devices_max), count)
        ends = [size * number + min(number, more) for number in range(count + 1)]
        return [tuple(each.device for each in able[first:last]) for first, last in pairwise(ends)]

    @property
    def says(self) -> str:
        """For people: how many there are, and how many a set is to have."""
        count, least = len(self.members), max(self.need, min(each.min for each in self.members))
        return f"{count} device{'s' if count > 1 else ''} on version {self.base}, and a sum has {least} or more"

    @property
    def suffices(self) -> bool:
        """Whether a set can be cut from it."""
        return bool(self.sets)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What devices online say, which a broker can make up: it delays sets, and makes none smaller."""

    training: Mapping[int, frozenset[str]] = field(default_factory=dict)  # base -> devices that train on it
    all_contributed: bool = False  # every device that may still send an update has one in a group or a set


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """The settings and moments that groups are held against."""

    buffer_size: int
    max_wait_s: float
    not_before: float = -math.inf  # only a wait that is over brings about a set earlier

    def ready(self, groups: Sequence[Group], fleet: Fleet, oldest: int, now: float) -> list[Group]:
        """The groups that become sets now; ``oldest`` is the oldest base that is not stale."""
        able = [group for group in groups if group.suffices]
        whole = [group for group in able if not leaves_some(group, fleet)]
        early = self.not_before <= now and (self.is_full(whole) or fleet.all_contributed)
        return [
            group
            for group in able
            if group.since + self.max_wait_s <= now or group.base < oldest or (early and group in whole)
        ]

    def is_full(self, groups: Iterable[Group]) -> bool:
        """Whether groups that suffice are as many updates as a merge is to have."""
        return sum(len(group.members) for group in groups if group.suffices) >= self.buffer_size

    def due_s(self, groups: Iterable[Group], now: float) -> float | None:
        """When ``ready`` has to be asked again, if nothing happens before; None where time alone changes nothing."""
        moments = [group.since + self.max_wait_s for group in groups if group.suffices]
        moments += [self.not_before] if moments else []
        return min((moment for moment in moments if now < moment < math.inf), default=None)

    def needs_version(self, groups: Sequence[Group], resting: frozenset[str], newest: Group, now: float) -> bool:
        """Whether only a version of no update lets devices go on: none of them can send, and nothing can be merged.

        ``resting`` are devices online, each of which has sent an update on the newest version; ``newest`` is its
        group, perhaps empty. Where no set could be cut from updates of all of them either, a version changes nothing.
        """
        if self.not_before > now or any(group.suffices for group in groups):
            return False
        mins = {each.device: each.min for group in (*groups, newest) for each in group.members}
        members = [Waiting(device=device, min=mins.get(device, 0)) for device in sorted(resting)]
        all_of_them = Group(base=newest.base, need=newest.need, devices_max=newest.devices_max, members=members)
        return all_of_them.suffices


def leaves_some(group: Group, fleet: Fleet) -> bool:
    """Whether devices still train on the base of a group that is cut now, but too few for a set of their own."""
    late = fleet.training.get(group.base, frozenset()) - {each.device for each in group.members}
    return 0 < len(late) < group.need


def lost(groups: Iterable[Group], oldest: int) -> list[Group]:
    """The groups that no update can join any more, and that are too small."""
    return [group for group in groups if group.base < oldest and not group.suffices]
