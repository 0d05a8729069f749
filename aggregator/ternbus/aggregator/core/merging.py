"""Merges of the buffer: when one is due, its records and messages, and its log lines."""

from dataclasses import dataclass, field

from ternbus.aggregator.core.events import Action, Log
from ternbus.aggregator.core.log_lines import VERSIONS_PER_MINUTE, made_in, version_line
from ternbus.aggregator.core.merge_trigger import MergeTrigger
from ternbus.aggregator.core.rate_limit import LogLimit
from ternbus.aggregator.core.registry import Registry
from ternbus.aggregator.core.situation import Waiting
from ternbus.aggregator.core.versions import Versions
from ternbus.aggregator.core.watch import waiting
from ternbus.aggregator.merge.influence import Influence
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.settings import Settings
from ternbus.broker.log_levels import WARNING
from ternbus.broker.protocol.messages import CLOSED


@dataclass(slots=True, kw_only=True)
class Merging:
    """Turns the buffer into a version when the trigger says so."""

    settings: Settings
    model: Model
    registry: Registry
    versions: Versions
    influence: Influence
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

    def disconnected(self) -> None:
        self._trigger = self._trigger.disconnected()

    def waiting(self, now: float) -> Waiting:
        """Whom the next version waits for."""
        contributors = {update.device for update in self.model.buffer}
        return waiting(self._trigger, contributors, self.registry.online, now, since=self._since)

    def due_s(self, now: float) -> float | None:
        """When ``on_time`` has something to do."""
        return self._trigger.due_s(self.model.buffer, self.registry.online, now)

    def on_time(self, now: float) -> list[Action]:
        """Merge if that is due; tell the operator if too few devices have contributed for long."""
        actions: list[Action] = []
        if self._trigger.is_due(self.model.buffer, self.registry.online, now):
            actions += self._merge(now)
        if not self._told_held and self._trigger.held(self.model.buffer, now):
            actions += self.tell_held()
        return actions

    def merge_all(self, now: float) -> list[Action]:
        """Merge what is there, since nothing may come any more; what lacks devices is held over."""
        return self._merge(now) if self._trigger.may_merge(self.model.buffer) else []

    def change_state(self, state: str, now: float) -> list[Action]:
        """Tell devices that the federation is open, paused or closed; of the end once all is merged."""
        actions = self.merge_all(now) if state == CLOSED else []
        if state != self.versions.published.state:
            actions += [*self.versions.change_state(state), Log(text=f"the federation is {state}", event=state)]
            if state == CLOSED and self.model.buffer:
                actions += self.tell_held()
        return actions

    def tell_held(self) -> list[Action]:
        """Tell the operator, once for each buffer, that it lacks devices."""
        self._told_held = True
        devices = len({update.device for update in self.model.buffer})
        text = (
            f"{len(self.model.buffer)} accepted updates of {devices} device{'s' if devices > 1 else ''} stay unmerged: "
            f"a version is made of at least {self.settings.min_devices} devices (merge.min_devices); "
            "the ledger keeps them"
        )
        return [Log(text=text, level=WARNING, event="held")]

    def _merge(self, now: float) -> list[Action]:
        self._trigger = self._trigger.merged(now)
        self._since = now
        for update in self.model.buffer:
            self.registry.members[update.device].waiting_bytes = 0
        self.influence.merged(self.model.buffer)
        merged = [(update.device, update.seq) for update in self.model.buffer]
        actions = self.versions.merge()
        return [*actions, *version_line(self._log_limit, made_in(actions), merged, now)]
