"""Merges of the buffer: when one is due, its records and messages, and its log lines."""

from dataclasses import dataclass, field

from ternbus.aggregator.core.canary import Canary, Judged, dropped, withdrawn_line
from ternbus.aggregator.core.events import Action, Log
from ternbus.aggregator.core.findings import unmerged
from ternbus.aggregator.core.log_lines import VERSIONS_PER_MINUTE, made_in, version_line
from ternbus.aggregator.core.merge_trigger import MergeTrigger
from ternbus.aggregator.core.rate_limit import LogLimit
from ternbus.aggregator.core.registry import Registry
from ternbus.aggregator.core.situation import NAMED_MAX, Waiting
from ternbus.aggregator.core.versions import Versions
from ternbus.aggregator.core.watch import waiting
from ternbus.aggregator.merge.downlink import encoded_block
from ternbus.aggregator.merge.influence import Influence
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.settings import Settings
from ternbus.broker.log_levels import WARNING
from ternbus.broker.plural import counted
from ternbus.broker.protocol.messages import CLOSED


@dataclass(slots=True, kw_only=True)
class Merging:
    """Turns the buffer into a version when the trigger says so."""

    settings: Settings
    model: Model
    registry: Registry
    versions: Versions
    influence: Influence
    canary: Canary
    _trigger: MergeTrigger = field(init=False)
    _log_limit: LogLimit = field(init=False)
    _told_held: bool = False  # the operator knows that the buffer lacks devices
    _since: float | None = None  # when the wait for the next version began

    def __post_init__(self) -> None:
        settings = self.settings
        self._log_limit = LogLimit(VERSIONS_PER_MINUTE)
        self._trigger = MergeTrigger(
            settings=settings.merge, min_interval_s=settings.downlink.min_interval_s, min_devices=settings.min_devices
        )

    def first_accepted(self, now: float) -> None:
        """An update was put into the empty buffer."""
        self._told_held = False
        self._since = now
        self._trigger = self._trigger.first_accepted(now)

    def connected(self, now: float) -> None:
        self._since = now if self._since is None else self._since
        self._trigger = self._trigger.connected(now)
        self.canary.connected(now)

    def disconnected(self) -> None:
        self.canary.is_connected = False
        self._trigger = self._trigger.disconnected()

    def waiting(self, now: float) -> Waiting:
        """Whom the next version waits for: devices that train, or who evaluates the candidate."""
        if self.canary.candidate is not None:
            awaited, since = self.canary.awaited, now if self._since is None else self._since
            return Waiting(devices=tuple(awaited[:NAMED_MAX]), count=len(awaited), for_s=now - since)
        contributors = {update.device for update in self.model.buffer}
        return waiting(self._trigger, contributors, self.registry.online, now, since=self._since)

    def due_s(self, now: float) -> float | None:
        """When ``on_time`` has something to do."""
        if self.canary.candidate is not None:
            return self.canary.due
        return self._trigger.due_s(self.model.buffer, self.registry.online, now)

    def on_time(self, now: float) -> list[Action]:
        """Merge if that is due; tell the operator if too few devices have contributed for long."""
        if (judged := self.canary.candidate) is not None:
            return self._judge(judged, now)
        actions: list[Action] = []
        if self._trigger.is_due(self.model.buffer, self.registry.online, now):
            actions += self._merge(now)
        if not self._told_held and self._trigger.held(self.model.buffer, now):
            actions += self.tell_held()
        return actions

    def merge_all(self, now: float) -> list[Action]:
        """Merge what is there, since nothing may come any more; what lacks devices is held over."""
        if self.canary.is_on:  # nobody would evaluate it
            return []
        return self._merge(now) if self._trigger.may_merge(self.model.buffer) else []

    def change_state(self, state: str, now: float) -> list[Action]:
        """Tell devices that the federation is open, paused or closed; of the end once all is merged."""
        actions = self.merge_all(now) if state == CLOSED else []
        if state != self.versions.published.state:
            actions += [*self.versions.change_state(state), Log(text=f"the federation is {state}", event=state)]
            if state == CLOSED and self.canary.is_on:
                actions += self._tell_unjudged()
            elif state == CLOSED and self.model.buffer:
                actions += self.tell_held()
        return actions

    def _tell_unjudged(self) -> list[Action]:
        """Tell the operator what a closed federation leaves unmerged, since nobody evaluates it."""
        candidate = self.canary.candidate
        count = len(self.model.buffer) + (0 if candidate is None else len(candidate.prepared.updates))
        text = f"{unmerged(count)}: the group of the canary is gone; they count after a resume"
        return [Log(text=text, level=WARNING, event="held")] if count else []

    def dissolve(self, device: str, now: float) -> list[Action]:
        """Have no candidate with updates of a device that is about to lose them; the buffer's sum is then made anew."""
        candidate = self.canary.candidate
        waiting = [*(() if candidate is None else candidate.prepared.updates), *self.model.buffer]
        if candidate is None or not any(update.device == device for update in waiting):
            return []
        self.first_accepted(now)
        return self.canary.dissolve()

    def tell_held(self) -> list[Action]:
        """Tell the operator, once for each buffer, that it lacks devices."""
        self._told_held = True
        devices = counted(len({update.device for update in self.model.buffer}), "device")
        text = (
            f"{unmerged(len(self.model.buffer), f' of {devices}')}: "
            f"a version is made of at least {self.settings.min_devices} devices (merge.min_devices); "
            "the ledger keeps them"
        )
        return [Log(text=text, level=WARNING, event="held")]

    def _merge(self, now: float) -> list[Action]:
        self._trigger = self._trigger.merged(now)
        self._since = now
        for update in self.model.buffer:
            self.registry.members[update.device].waiting_bytes = 0
        if self.canary.is_on:
            prepared = self.model.prepare()
            return self.canary.make(prepared, *encoded_block(prepared.merged.block), now)
        self.influence.merged(self.model.buffer)
        merged = [(update.device, update.seq) for update in self.model.buffer]
        actions = self.versions.merge()
        return [*actions, *version_line(self._log_limit, made_in(actions), merged, now)]

    def _judge(self, judged: Judged, now: float) -> list[Action]:
        """Publish the candidate or withdraw it, if the group has decided; the next one may be due at once."""
        verdict = self.canary.verdict(judged, now)
        if verdict is None:
            return self.canary.on_time(judged, now)
        self.canary.candidate, self._since = None, now
        if verdict.holds:
            updates = judged.prepared.updates
            self.influence.merged(updates)
            actions = self.versions.publish_candidate(judged.prepared)
            merged = [(update.device, update.seq) for update in updates]
            actions += version_line(self._log_limit, made_in(actions), merged, now)
        else:
            actions = self.versions.withdraw_candidate(dropped(judged, verdict.why))
            actions.append(withdrawn_line(judged, verdict.why))
        return [*actions, *self.on_time(now)]
