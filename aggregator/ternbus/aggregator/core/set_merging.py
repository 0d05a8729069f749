"""Merges of private updates: when groups become sets, when opened sets are merged, and the end of a federation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import numpy as np

from ternbus.aggregator.core import records
from ternbus.aggregator.core.asks import Asks
from ternbus.aggregator.core.counters import Counters
from ternbus.aggregator.core.events import Action, Log, Save
from ternbus.aggregator.core.log_lines import VERSIONS_PER_MINUTE, made_in, version_line
from ternbus.aggregator.core.merge_trigger import MergeTrigger
from ternbus.aggregator.core.rate_limit import LogLimit
from ternbus.aggregator.core.registry import Member, Registry
from ternbus.aggregator.core.sets import Held, Sets
from ternbus.aggregator.core.situation import Waiting
from ternbus.aggregator.core.versions import Versions
from ternbus.aggregator.core.watch import waiting
from ternbus.aggregator.settings import Settings
from ternbus.aggregator.sums.groups import Fleet, Group, Rule
from ternbus.aggregator.sums.private_header import body_bytes_max
from ternbus.aggregator.sums.scales import aligned
from ternbus.aggregator.sums.state import PrivateSums
from ternbus.broker.protocol.messages import CLOSED, OPEN, PAUSED

TRAINING: Final = "training"  # a state of devices
# Between two versions of no update. A helper may change its card at any rate, and refuse all that devices send until
# its operator has admitted them.
EMPTY_EVERY_S: Final = 10.0


@dataclass(slots=True, kw_only=True)
class SetMerging:
    """What `Merging` is in a plain federation."""

    settings: Settings
    sums: PrivateSums
    registry: Registry
    versions: Versions
    counters: Counters
    held: Held  # by the ledger, until the start
    is_closing: bool = False  # the operator wants the federation closed, and helpers are waited for
    sets: Sets = field(init=False)
    _trigger: MergeTrigger = field(init=False)
    _log_limit: LogLimit = field(init=False)
    _close_by: float = 0.0
    _no_empty_before: float = 0.0
    _told: str = ""  # what the operator knows of updates that wait for company
    _newest: tuple[int, float] = (-1, 0.0)  # the newest version, and since when it is
    _is_stopped: bool = False
    _since: float | None = None  # when the wait for the next version began

    def __post_init__(self) -> None:
        about = self.settings
        self._log_limit = LogLimit(VERSIONS_PER_MINUTE)
        self._trigger = MergeTrigger(settings=about.merge, min_interval_s=about.downlink.min_interval_s)
        schema = self.versions.model.schema
        self.sets = Sets(
            settings=about,
            schema=schema,
            sums=self.sums,
            registry=self.registry,
            counters=self.counters,
            asks=Asks(
                helpers=self.sums.helpers,
                frames=self.versions.frames,
                answer_bytes_max=body_bytes_max(schema, self.sums.settings.kind),
                body_of=self._body_of,
            ),
            model=self.versions.model,
            dropped=self.versions.dropped,
        )

    def _body_of(self, digest: bytes) -> bytes:
        return self.sets.body_of(digest)

    def bases(self) -> frozenset[int]:
        """Of which the contexts are needed here."""
        return self.sets.bases

    def start(self, now: float) -> list[Action]:
        """Go on from what the ledger has, before anything else."""
        actions = self.sets.recover(self.held, now)
        self._close_by = now + self.sums.settings.close_wait_s
        return actions

    def connected(self, now: float) -> None:
        self._since = now if self._since is None else self._since
        self._trigger = self._trigger.connected(now)

    def waiting(self, now: float) -> Waiting:
        """Whom the next version waits for, of the devices; the status of private sums names the helpers."""
        newest, online = self.versions.model.version, self.registry.online
        dropped = {name for name, each in online.items() if each.highest_base >= newest}  # with those that are here
        return waiting(self._trigger, self.sets.devices | dropped, online, now, since=self._since)

    def ask_all(self, now: float) -> list[Action]:
        """Ask all helpers again what they have not answered."""
        return self.sets.asks.connected(now)

    def disconnected(self) -> None:
        self._trigger = self._trigger.disconnected()
        self.sets.asks.disconnected()

    # --- time

    def due_s(self, now: float) -> float | None:
        """When ``on_time`` has something to do."""
        if self.is_closing:
            return min(self._close_by, self.sets.asks.due or math.inf)
        moments = [self.sets.due_s(self._rule, now), *self._late(now)]
        silent = self._unsent(now) if self.sets.is_stuck else self._awaited(now)  # its silence may change what is due
        moments.append(None if silent is None else self._trigger.silent_at(silent))
        empty_at = max(
            self._rule.not_before, self._no_empty_before, -math.inf if silent is None else self._patient_until
        )
        if self.registry.online and self.sets.is_stuck and now < empty_at:
            moments.append(empty_at)  # perhaps for a version of no update
        return min((moment for moment in moments if moment is not None and moment < math.inf), default=None)

    def _late(self, now: float) -> list[float]:
        """When groups that do not suffice have waited so long that the operator is told."""
        moments = [each.since + self.settings.merge.max_wait_s for each in self.sets.groups()]
        return [moment for moment in moments if now < moment]

    def on_time(self, now: float) -> list[Action]:
        """Make sets, merge those that are opened, ask again, let devices go on; finish closing."""
        if self._is_stopped:
            return []
        if self.is_closing:
            return self._close_on_time(now)
        if self._newest[0] != self.versions.model.version:
            self._newest = self.versions.model.version, now
        actions = self.sets.on_time(self._rule, partial(self._fleet, now), now)
        if self.sets.may_merge(now):
            actions += self._merge(now)
        elif (
            now >= self._no_empty_before
            and self._is_stuck(now)
            and self.sets.needs_version(self._rule, self._resting(), now)
        ):
            self._trigger = self._trigger.merged(now)
            self._no_empty_before = now + EMPTY_EVERY_S
            actions += [
                *self.versions.empty(),
                Log(text="a version of no update: devices can go on only from a new one"),
            ]
        return [*actions, *self._tell_waiting(now)]

    def _tell_waiting(self, now: float) -> list[Action]:
        """Tell the operator, at each change, which updates wait for company though nobody is known to send more."""
        groups = self.sets.groups() if self.sets.is_stuck and self.versions.published.state == OPEN else ()
        is_known = self._awaited(now) is None and self._rule.not_before <= now
        waits = [each for each in groups if is_known or each.since + self.settings.merge.max_wait_s <= now]
        before, told = self._told, "; ".join(each.says for each in waits)
        self._told = told or (before if groups else "")
        return [Log(text=f"private updates wait for more: {told}")] if told not in {"", before} else []

    def _is_stuck(self, now: float) -> bool:
        """Whether nobody is waited for that can send before another version, and nothing is on its way to one."""
        is_open = self.versions.published.state == OPEN
        return is_open and self.sets.is_stuck and (self._unsent(now) is None or self._patient_until <= now)

    @property
    def _patient_until(self) -> float:
        """When those that have sent on the newest version wait for no others any more: one may say that it trains."""
        return self._newest[1] + self.settings.merge.max_wait_s

    @property
    def _rule(self) -> Rule:
        about, trigger = self.settings.merge, self._trigger
        return Rule(
            buffer_size=about.buffer_size,
            max_wait_s=about.max_wait_s,
            not_before=max(trigger.not_before, trigger.statuses_by),
        )

    def _awaited(self, now: float) -> Member | None:
        """A device online that may still send an update, and has none here."""
        return self._trigger.awaited(self.sets.devices, self.registry.online, now)

    def _unsent(self, now: float) -> Member | None:
        """A device online that may still send an update on the newest version."""
        newest = self.versions.model.version
        expected = (each for each in self.registry.online.values() if self._trigger.is_expected(each, now))
        return next((each for each in expected if each.highest_base < newest), None)

    def _resting(self) -> frozenset[str]:
        """Devices online that have sent an update on the newest version, and wait for another one.

        However long they have been silent: they have nothing to say before there is one.
        """
        newest, online = self.versions.model.version, self.registry.online
        return frozenset(name for name, each in online.items() if each.contributes and each.highest_base >= newest)

    def _expected(self, now: float) -> frozenset[str]:
        online = self.registry.online.values()
        return frozenset(each.name for each in online if self._trigger.is_expected(each, now))

    def _fleet(self, now: float, groups: Sequence[Group]) -> Fleet:
        """What the devices online say; who trains is looked at only where it matters."""
        online = self.registry.online
        all_contributed = self._awaited(now) is None and bool(self.sets.devices & online.keys())
        if not (all_contributed or self._rule.is_full(groups)):
            return Fleet()
        training: dict[int, set[str]] = {group.base: set() for group in groups}
        for name in self._expected(now):
            status, sent = online[name].status, online[name].highest_base
            if status is not None and status.state == TRAINING and sent < status.base and status.base in training:
                training[status.base].add(name)  # nobody sends a second update on a version
        return Fleet(
            training={base: frozenset(names) for base, names in training.items()}, all_contributed=all_contributed
        )

    def _merge(self, now: float) -> list[Action]:
        self._trigger = self._trigger.merged(now)
        self._since = now
        opened = self.sets.take_opened()
        current = self.sums.scales
        self.sums.moved(
            np.sum([aligned(each.sum.buckets, each.about.terms.scales, current) for each in opened], axis=0)
        )
        merged = [(member.device, member.update.seq) for each in opened for member in each.members]
        actions = self.versions.merge_sets(opened)
        return [*actions, *version_line(self._log_limit, made_in(actions), merged, now)]

    def count(self) -> list[Action]:
        """For those who look at the status: which helpers have not answered."""
        return [Save(record=records.AsksCounted(unanswered=self.sets.asks.unanswered()))]

    # --- the end

    def merge_all(self, now: float) -> list[Action]:  # noqa: ARG002 - as of plain updates
        """A stop merges nothing: what is on its way goes on at the next start."""
        self._is_stopped = True
        return []

    def settle(self, now: float) -> list[Action]:
        """Before a leap: no update will come on any base of now."""
        return self.sets.settle(now)

    def change_state(self, state: str, now: float) -> list[Action]:
        """Devices and evaluators are told of the end when all is merged: until then the federation is paused."""
        if state == CLOSED and not (self.sets.is_idle and not self.versions.dropped):
            return [] if self.is_closing else self._begin_closing(now)
        if state == self.versions.published.state and not self.is_closing:
            return []
        self.is_closing = False
        return [*self.versions.change_state(state), Log(text=f"the federation is {state}")]

    def _begin_closing(self, now: float) -> list[Action]:
        wait_s = self.sums.settings.close_wait_s
        self.is_closing, self._close_by = True, now + wait_s
        actions = [*self.versions.change_state(PAUSED), Save(record=records.ClosingBegun()), *self.sets.settle(now)]
        helpers = sorted({name for each in self.sets.in_flight for name in each.awaited})
        whom = f"; it waits at most {wait_s:g} s for the helpers {', '.join(helpers)}" if helpers else ""
        return [*actions, Log(text=f"the federation closes{whom}")]

    def _close_on_time(self, now: float) -> list[Action]:
        actions = self.sets.settle(now)  # what a helper refused may still make a set
        actions += self.sets.give_up(now) if self._close_by <= now else self.sets.asks.on_time(now)
        if self.sets.in_flight:
            return actions
        self.is_closing = False
        # the entry in the log of merges names what was dropped
        actions += self._merge(now) if self.sets.opened else self.versions.empty()
        return [*actions, *self.versions.change_state(CLOSED), Log(text="the federation is closed")]
