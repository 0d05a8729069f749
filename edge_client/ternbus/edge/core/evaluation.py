"""Evaluation: each version at most once, the newest whenever none is running, the result published as metrics.

An evaluator uses the task's test data. A device that trains evaluates only where its owner allows it, on data that it
holds out, before it trains on the version. Its metrics have the split "local", which tells it from an evaluator.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from ternbus.broker.protocol.messages import Metrics
from ternbus.edge.core.actions import Action, Log, Publish, StartEvaluation
from ternbus.edge.core.events import Evaluated
from ternbus.edge.core.follower import Follower
from ternbus.edge.core.pending_state import PendingState
from ternbus.edge.core.profile import Profile

UNACKNOWLEDGED_MAX: Final = 64


@dataclass(slots=True, kw_only=True)
class EvaluationPolicy:
    """Holds metrics until the broker acknowledges them: they have no receipt, and a cut connection loses them."""

    profile: Profile
    pending: PendingState
    unacknowledged: dict[int, Publish] = field(default_factory=dict)
    evaluated: int = 0  # versions, by an evaluator
    _running: bool = False

    def begin(self, follower: Follower, *, training: bool, private: bool) -> list[StartEvaluation]:
        """Evaluate the follower's version, if it is new and nothing is being evaluated or trained.

        `private` is whether nothing may be seen of the data of a device that trains.
        """
        version, vector, schema = follower.version, follower.vector, follower.schema
        if not self.profile.evaluates or training or self._running:
            return []
        if not follower.synced or self.evaluated == self.profile.versions:
            return []
        if version is None or vector is None or schema is None or version <= self.pending.state.evaluated:
            return []
        self._running = True
        private = private and self.profile.role == "train"
        return [StartEvaluation(version=version, schema=schema, vector=vector, private=private)]

    def finished(self, event: Evaluated, *, sealed: bool) -> tuple[list[Action], list[Publish]]:
        """Note that the version is evaluated; the log, and the metrics to publish."""
        self._running = False
        self.evaluated += self.profile.role == "evaluate"
        self.pending.put(replace(self.pending.state, evaluated=event.version))
        shown = event.failure or ", ".join(f"{name} {value:.4f}" for name, value in event.values.items())
        where = "" if self.profile.role == "evaluate" else " on the data held out"
        fields = {"version": event.version, "samples": event.samples, **event.values}
        log = Log(event="evaluated", text=f"version {event.version}{where}: {shown}", fields=fields)
        return [log], self.report(event.version, event.samples, event.values, sealed=sealed)

    def report(self, version: int, samples: int, values: Mapping[str, float], *, sealed: bool) -> list[Publish]:
        """The metrics of a version; none of a device's own data if ``sealed``, or not allowed by its owner."""
        own = self.profile.role == "train"
        if own and (sealed or not self.profile.reports):
            return []
        split = "local" if own else "test"
        meta = Metrics(version=version, samples=samples, split=split, values=values).meta()
        message = self.profile.message(Metrics.KIND, self.pending.next_seq(), meta)
        self.unacknowledged[message.seq] = message
        while len(self.unacknowledged) > UNACKNOWLEDGED_MAX:
            self.unacknowledged.pop(next(iter(self.unacknowledged)))
        return [message]

    def acknowledged(self, seq: int) -> None:
        self.unacknowledged.pop(seq, None)
