"""Private updates between acceptance and version: groups, sets, requests to helpers and their answers.

The life of a set:

    made ─ all helpers prepared ─> opening ─ all sums of masks here ─> opened ─> merged in a version
      │                               │                                  the sum is out of range ─> dropped
      ├─ refused, revoked ─> abandoned: its other updates wait in their group again
      └─ closed in vain ───> dropped, as opening is

Each arrow is a record that is saved before anybody is told of it. A set is asked to be opened only when every helper is
prepared, and from then on it is never abandoned; what was abandoned is never opened. So each update is in one sum at
most, in exactly one version or, with a reason, among those that were dropped.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from ternbus.aggregator.core import records
from ternbus.aggregator.core.asks import Asks
from ternbus.aggregator.core.counters import Counters
from ternbus.aggregator.core.events import Action, Log, Save
from ternbus.aggregator.core.registry import Registry
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.merge.staleness import discount
from ternbus.aggregator.settings import Settings
from ternbus.aggregator.sums.decode import decode
from ternbus.aggregator.sums.groups import BELOW_MIN, Fleet, Group, Rule, lost
from ternbus.aggregator.sums.private_sets import (
    MADE,
    OPENING,
    OpenedSet,
    PrivateSet,
    PrivateUpdate,
    in_order,
    short,
)
from ternbus.aggregator.sums.state import ContextOf, PrivateSums
from ternbus.broker.errors import ProtocolError
from ternbus.broker.log_levels import WARNING
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.merge_log import DroppedUpdate
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.sums import sets as wire
from ternbus.broker.sums.sets import Answer

REVOKED: Final = "revoked"  # why updates are dropped
REFUSED: Final = "refused"
HELPER_LOST: Final = "helper-lost"


@dataclass(slots=True, kw_only=True)
class Held:
    """What the ledger has of private updates that no version contains."""

    waiting: list[PrivateUpdate] = field(default_factory=list)  # in order of acceptance
    sets: list[PrivateSet] = field(default_factory=list)  # made, or opening
    opened: list[OpenedSet] = field(default_factory=list)
    abandoned: dict[bytes, tuple[str, ...]] = field(default_factory=dict)  # by digest, the helpers that know the set
    dropped: list[DroppedUpdate] = field(default_factory=list)  # which the log of merges has not named yet


@dataclass(slots=True, kw_only=True)
class Sets:
    """Takes in private updates and helpers' answers, and returns the actions that follow, in order."""

    settings: Settings
    schema: Schema
    sums: PrivateSums
    registry: Registry
    counters: Counters
    asks: Asks
    model: Model  # its version
    dropped: list[DroppedUpdate]  # for the next entry in the log of merges
    opened: list[OpenedSet] = field(default_factory=list)
    opened_at: float | None = None
    _waiting: dict[int, list[PrivateUpdate]] = field(default_factory=dict)  # by base
    _since: dict[int, float] = field(default_factory=dict)  # when a group's first update came
    _sets: dict[bytes, PrivateSet] = field(default_factory=dict)  # made or opening
    _groups: Sequence[Group] | None = None  # of what waits now
    _devices: frozenset[str] | None = None  # asked for at each event; None once an update came or went

    # --- what is here

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing that a version could still contain."""
        return not (self._waiting or self._sets or self.opened)

    @property
    def in_flight(self) -> Sequence[PrivateSet]:
        """Sets that helpers have not opened yet."""
        return tuple(self._sets.values())

    @property
    def devices(self) -> frozenset[str]:
        """Those with an update here that no version contains."""
        if self._devices is None:
            parts: list[Sequence[PrivateUpdate]] = list(self._waiting.values())
            parts += [each.members for each in self._sets.values()]
            parts += [each.members for each in self.opened]
            self._devices = frozenset(update.device for part in parts for update in part)
        return self._devices

    @property
    def bases(self) -> frozenset[int]:
        """Of which the contexts are needed here."""
        sets = [*(each.about for each in self._sets.values()), *(each.about for each in self.opened)]
        return frozenset((*self._waiting, *(about.base for about in sets)))

    def groups(self) -> Sequence[Group]:
        """The updates that are in no set, by context."""
        if self._groups is None:
            self._groups = [self._group(base) for base in self._waiting]
        return self._groups

    @property
    def is_stuck(self) -> bool:
        """Whether nothing that is here will become a version, if nothing else comes."""
        return not (self._sets or self.opened or any(group.suffices for group in self.groups()))

    @property
    def _secret(self) -> bytes:
        """From which nobody else can tell what encrypted sums are blinded by; the same after a restart."""
        return self.asks.frames.identity.seed

    def body_of(self, digest: bytes) -> bytes:
        """What helpers are asked for a set."""
        return self._sets[digest].ask.content()

    def _group(self, base: int) -> Group:
        terms = self.sums.contexts[base].terms
        return Group(
            base=base,
            need=max(terms.min, *(each.card.min for each in terms.helpers)),
            devices_max=terms.devices_max,
            members=[each.waiting for each in self._waiting.get(base, ())],
            since=self._since.get(base, 0.0),
        )

    # --- from the ledger, and to it

    def recover(self, held: Held, now: float) -> list[Action]:
        """Go on from what the ledger has: every set in flight is asked for again, from the step where it was."""
        self._put_back(held.waiting, now)
        self.dropped += held.dropped
        self.opened = list(held.opened)
        self.opened_at = now if self.opened else None
        actions: list[Action] = []
        for digest, helpers in held.abandoned.items():
            self._ask(helpers, digest, wire.ABANDON, now)
            actions += [] if self.asks.is_wanted(digest) else [self._forgotten(digest)]
        for found in held.sets:
            self._sets[found.digest] = found
            if gone := [name for name in found.helpers if name not in self.asks.helpers]:
                actions += self._give_up(
                    found, f"{HELPER_LOST}: {gone[0]} is no helper of this federation any more", now
                )
                continue
            if found.state == OPENING:
                found.begin_opening(self._secret)  # which went well before
            self._ask(found.helpers, found.digest, wire.PREPARE if found.state == MADE else wire.OPEN, now)
        return actions

    def accept(self, update: PrivateUpdate, now: float) -> None:
        """Put an update into its group; its record is saved already."""
        self._put_back([update], now)

    def _put_back(self, updates: Iterable[PrivateUpdate], since: float) -> None:
        self._groups = self._devices = None
        for update in updates:
            base = update.update.base
            self._waiting.setdefault(base, []).append(update)
            self._since[base] = min(since, self._since.get(base, since))

    def _take_out(self, base: int, devices: Iterable[str]) -> list[PrivateUpdate]:
        self._groups, self._devices, chosen = None, None, frozenset(devices)
        found = [each for each in self._waiting[base] if each.device in chosen]
        self._waiting[base] = [each for each in self._waiting[base] if each.device not in chosen]
        if not self._waiting[base]:
            del self._waiting[base], self._since[base]
        return found

    # --- time

    def on_time(self, rule: Rule, fleet: Callable[[Sequence[Group]], Fleet], now: float) -> list[Action]:
        """Make the sets that are due, drop what is left too small, ask again what was not answered."""
        groups = self.groups()
        oldest = self.model.version - self.settings.staleness.max
        actions: list[Action] = []
        for group in lost(groups, oldest):
            actions += self._drop_group(group)
        if any(group.suffices for group in groups):
            for group in rule.ready(groups, fleet(groups), oldest, now):
                actions += self._make_all(group, now)
        return [*actions, *self.asks.on_time(now)]

    def due_s(self, rule: Rule, now: float) -> float | None:
        """When ``on_time`` has something to do, if nothing happens before."""
        merge_by = None if self.opened_at is None else self.opened_at + rule.max_wait_s
        moments = (rule.due_s(self.groups(), now), self.asks.due, merge_by)
        return min((moment for moment in moments if moment is not None), default=None)

    def may_merge(self, now: float) -> bool:
        """Whether the sets that are opened make a version: they wait for others in flight, but not for ever."""
        waited = self.opened_at is not None and self.opened_at + self.settings.merge.max_wait_s <= now
        return bool(self.opened) and (not self._sets or waited)

    def needs_version(self, rule: Rule, resting: frozenset[str], now: float) -> bool:
        """Whether only a version of no update lets devices go on; ``resting`` are those that wait for one."""
        if self.model.version not in self.sums.contexts:
            return False
        return rule.needs_version(self.groups(), resting, self._group(self.model.version), now)

    def take_opened(self) -> list[OpenedSet]:
        """The sets of the next version, in the order of its sum."""
        taken, self.opened, self.opened_at, self._devices = in_order(self.opened), [], None, None
        for each in taken:
            self._let_go(each.members)
        return taken

    def settle(self, now: float) -> list[Action]:
        """Make sets of whatever suffices, and drop the rest: no update will come on these bases any more."""
        actions: list[Action] = []
        for group in self.groups():
            actions += self._make_all(group, now)
        for group in self.groups():
            actions += self._drop_group(group)
        return actions

    def give_up(self, now: float) -> list[Action]:
        """Wait for no helper any more."""
        actions: list[Action] = []
        for found in list(self._sets.values()):
            who = ", ".join(found.awaited)
            actions += self._give_up(found, f"{HELPER_LOST}: no answer of {who} before the federation was closed", now)
        return actions

    # --- sets

    def _make_all(self, group: Group, now: float) -> list[Action]:
        """Cut the sets of a group; what is left waits from now on."""
        actions: list[Action] = []
        for devices in group.sets:
            actions += self._make(self.sums.contexts[group.base], self._take_out(group.base, devices), now)
        if group.base in self._since:
            self._since[group.base], self._groups = now, None
        return actions

    def _make(self, about: ContextOf, members: list[PrivateUpdate], now: float) -> list[Action]:
        found = PrivateSet(about=about, staleness=self.model.version - about.base, members=tuple(members))
        self._sets[found.digest] = found
        made = records.SetMade(
            digest=found.digest,
            context=about.context,
            base=about.base,
            staleness=found.staleness,
            devices=found.devices,
        )
        return [Save(record=made), *self._ask(found.helpers, found.digest, wire.PREPARE, now)]

    def _ask(self, helpers: Iterable[str], digest: bytes, step: str, now: float) -> list[Action]:
        known = [name for name in helpers if name in self.asks.helpers]
        return [action for name in known for action in self.asks.want(name, digest, step, now)]

    def _abandon(self, found: PrivateSet, now: float) -> list[Action]:
        """Never open a set: its updates, but for those that are dropped, are due to become another one.

        Whoever refused it is told, too: an ask to prepare it may still be on its way there.
        """
        del self._sets[found.digest]
        self.asks.forget(found.digest)
        self._put_back(found.members, now - self.settings.merge.max_wait_s)
        saved = Save(record=records.SetAbandoned(digest=found.digest))
        asked = self._ask(found.helpers, found.digest, wire.ABANDON, now)
        return [saved, *asked] if self.asks.is_wanted(found.digest) else [saved, self._forgotten(found.digest)]

    def _forgotten(self, digest: bytes) -> Action:
        """No helper needs to be told of this set any more."""
        return Save(record=records.SetForgotten(digest=digest))

    def _give_up(self, found: PrivateSet, reason: str, now: float) -> list[Action]:
        """Drop all updates of a set, for good; one that is not opening is abandoned, too."""
        if found.state == MADE:
            abandoned = self._abandon(found, now)
            return [*abandoned, *self._drop(found.about.base, found.devices, reason)]
        del self._sets[found.digest]
        self.asks.forget(found.digest)
        self._put_back(found.members, now)
        return [self._forgotten(found.digest), *self._drop(found.about.base, found.devices, reason)]

    # --- updates that no version will contain

    def revoke(self, device: str, now: float) -> list[Action]:
        """Take a device's updates out of groups, and of sets that no helper was asked to open."""
        actions: list[Action] = []
        for found in list(self._sets.values()):
            if device in found.devices and found.state == MADE:
                actions += self._abandon(found, now)
        for base in [base for base, group in self._waiting.items() if any(each.device == device for each in group)]:
            actions += self._drop(base, [device], REVOKED)
        return actions

    def _drop_group(self, group: Group) -> list[Action]:
        count, devices = len(group.members), [each.device for each in group.members]
        reason = f"{BELOW_MIN}: {count} on version {group.base}, and a set has {group.need} devices or more"
        return self._drop(group.base, devices, reason)

    def _drop(self, base: int, devices: Iterable[str], reason: str) -> list[Action]:
        """Drop updates that wait in a group."""
        updates = self._take_out(base, devices)
        self.dropped += [each.dropped(reason) for each in updates]
        self._let_go(updates)
        names = tuple(each.device for each in updates)
        record = records.UpdatesDropped(base=base, devices=names, reason=short(reason))
        what = f"{len(names)} private update{'s' if len(names) > 1 else ''} on version {base}"
        return [Save(record=record), Log(text=f"dropped {what}: {short(reason)}", level=WARNING, event="dropped")]

    def _let_go(self, updates: Iterable[PrivateUpdate]) -> None:
        for each in updates:
            self.registry.members[each.device].waiting_bytes -= each.size_bytes

    # --- answers

    def answer(self, helper: str, frame: Frame, now: float) -> list[Action]:
        """Take in a part of an answer of an authenticated helper; ProtocolError where it is malformed."""
        whole = self.asks.collect(helper, frame)
        if whole is None:
            return []
        answer = Answer.from_meta(whole.meta)
        found = self._sets.get(answer.set)
        if found is None:
            return self._abandoned(helper, answer, now)
        if helper not in found.awaited:
            return []  # it was asked twice, or is not one of this set's
        if answer.outcome == wire.REFUSED:
            return self._refused(found, helper, answer, now)
        if found.state == MADE:
            return self._prepared(found, helper, answer, now)
        return self._masks(found, helper, whole.body, now) if answer.outcome == wire.OPENED else []

    def _abandoned(self, helper: str, answer: Answer, now: float) -> list[Action]:
        """An answer for a set that is not in flight; one that is to be abandoned may also be refused."""
        if not self.asks.is_wanted(answer.set):
            self.counters.refuse("not-asked", now)  # or it comes late
            return []
        if answer.outcome not in {wire.ABANDONED, wire.REFUSED}:
            return []
        actions = self.asks.done(helper, answer.set, now)
        return actions if self.asks.is_wanted(answer.set) else [self._forgotten(answer.set), *actions]

    def _prepared(self, found: PrivateSet, helper: str, answer: Answer, now: float) -> list[Action]:
        """It is prepared, or has opened this very set in a time that this ledger knows nothing of."""
        if answer.outcome == wire.ABANDONED:
            return []
        actions = self.asks.done(helper, found.digest, now)
        found.done.add(helper)
        if found.awaited:
            return actions
        try:
            found.begin_opening(self._secret)
        except ProtocolError as error:
            self.counters.refuse(error.reason, now)
            return [*actions, *self._give_up(found, str(error), now)]
        saved = Save(record=records.SetOpening(digest=found.digest))
        return [*actions, saved, *self._ask(found.helpers, found.digest, wire.OPEN, now)]

    def _masks(self, found: PrivateSet, helper: str, body: bytes, now: float) -> list[Action]:
        terms = found.about.terms
        try:
            found.take_answer(helper, body)
            actions = self.asks.done(helper, found.digest, now)
            if found.awaited:
                return actions
            total = decode(terms, self.schema, found.total, len(found.members))
        except ProtocolError as error:
            self.counters.refuse(error.reason, now)
            helpers = ", ".join(found.helpers)
            return self._give_up(found, f"{error}; {len(found.members)} devices, helpers {helpers}", now)
        del self._sets[found.digest]
        worth = discount(self.settings.staleness, found.staleness)
        self.opened.append(OpenedSet.of(found, worth, total))
        self.opened_at = now if self.opened_at is None else self.opened_at
        return [*actions, Save(record=records.SetOpened(digest=found.digest, total=found.total.tobytes()))]

    def _refused(self, found: PrivateSet, helper: str, answer: Answer, now: float) -> list[Action]:
        """Drop the updates that the helper names, or all where it names none or may have told others' masks."""
        named = [name for name in answer.updates if name in found.devices]
        reason = f"{REFUSED}: helper {helper}: {answer.reason or 'without a reason'}"
        if found.state == OPENING or not named:
            return self._give_up(found, reason, now)
        abandoned = self._abandon(found, now)
        return [*abandoned, *self._drop(found.about.base, named, reason)]
