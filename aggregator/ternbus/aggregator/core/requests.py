"""Requests of the operator that can be refused: revocations, cancelled invitations, rollbacks."""

from dataclasses import dataclass
from typing import assert_never

from ternbus.aggregator.core.enrollment import Enrollment
from ternbus.aggregator.core.events import (
    Action,
    CancelRequested,
    Log,
    RevokeRequested,
    RollbackRequested,
    StatisticsRequested,
)
from ternbus.aggregator.core.merging import Merging
from ternbus.aggregator.core.private import Private
from ternbus.aggregator.core.revocations import Revocations
from ternbus.aggregator.core.statistics import FederatedStatistics
from ternbus.broker.errors import ConfigError
from ternbus.broker.log_levels import WARNING
from ternbus.broker.plural import counted
from ternbus.broker.protocol.merge_log import OTHER_MODEL

Asked = CancelRequested | RevokeRequested | RollbackRequested | StatisticsRequested


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """Does what is asked for; ConfigError says why not."""

    enrollment: Enrollment
    revocations: Revocations
    merging: Merging
    private: Private | None
    statistics: FederatedStatistics

    def take(self, event: Asked, now: float) -> list[Action]:
        """The actions that it takes, in order."""
        match event:
            case RevokeRequested():
                return self._revoke(event, now)
            case CancelRequested():
                return self._cancel(event.device)
            case RollbackRequested():
                return self._roll_back(event)
            case StatisticsRequested():
                return self.statistics.ask(event, now)
            case _:
                assert_never(event)

    def _revoke(self, event: RevokeRequested, now: float) -> list[Action]:
        if self.private is not None and event.device not in self.merging.registry.members:
            self.private.check_revocation(event.device)
        actions = [] if event.keep else self.merging.dissolve(event.device, now)
        actions += [*self.enrollment.revoke(event), *self.revocations.publish()]
        if self.private is not None and not event.keep:
            actions += self.private.merging.sets.revoke(event.device, now)
        return actions

    def _cancel(self, name: str) -> list[Action]:
        """The invitation of a device, or else of a helper of that name."""
        if self.private is not None and name in self.private.codes and name not in self.merging.registry.codes:
            return self.private.cancel(name)
        return self.enrollment.cancel(name)

    def _roll_back(self, event: RollbackRequested) -> list[Action]:
        """Updates that wait were made on what is withdrawn: they are dropped."""
        if event.error or event.vector is None:
            raise ConfigError(event.error)
        if self.private is not None:
            raise ConfigError("a federation with private sums cannot be rolled back: make a new one with the model")
        versions, dissolved = self.merging.versions, self.merging.canary.dissolve()
        newest, dropped = versions.model.version, len(versions.model.buffer)
        for update in versions.model.buffer:
            self.merging.registry.members[update.device].waiting_bytes = 0
        actions = versions.roll_back(event.vector, event.to)
        what = "the model of a file" if event.to == OTHER_MODEL else f"version {event.to} again"
        text = f"version {versions.model.version} is {what}: versions up to {newest} are withdrawn"
        text += f", {counted(dropped, 'waiting update')} dropped" if dropped else ""
        fields = {
            "version": versions.model.version,
            "to": event.to,
            "withdrawn": newest,
            "dropped": dropped,
        }
        return [*dissolved, *actions, Log(text=text, level=WARNING, event="rollback", fields=fields)]
