"""Evaluating's part of the state machine: each version once, the newest whenever free, the result published.

An evaluator tries versions on the task's test data. A device that trains does so if its owner allows it to, on data
that it holds out, before it trains on the version; it says "local" then, so that nobody takes it for an evaluator.
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

PENDING_MAX: Final = 64


@dataclass(slots=True, kw_only=True)
class EvaluationPolicy:
    """Metrics wait here for the broker's acknowledgement: nobody answers them, and a cut connection loses them."""

    member: Profile
    memory: PendingState
    pending: dict[int, Publish] = field(default_factory=dict)
    done: int = 0  # by an evaluator
    _busy: bool = False

    def begin(self, follower: Follower, *, busy: bool = False) -> list[StartEvaluation]:
        """Evaluate what the follower has, if it is new, and nothing is being evaluated or, with ``busy``, trained."""
        version, vector, schema = follower.version, follower.vector, follower.schema
        if not self.member.evaluates or busy or self._busy or not follower.synced or self.done == self.member.versions:
            return []
        if version is None or vector is None or schema is None or version <= self.memory.kept.evaluated:
            return []
        self._busy = True
        return [StartEvaluation(version=version, schema=schema, vector=vector)]

    def finished(self, event: Evaluated, *, sealed: bool) -> tuple[list[Action], list[Publish]]:
        """Keep that it is done, and say so to people and to the aggregator."""
        self._busy = False
        self.done += self.member.role == "evaluate"
        self.memory.replaced(replace(self.memory.kept, evaluated=event.version))
        shown = ", ".join(f"{name} {value:.4f}" for name, value in event.values.items())
        where = "" if self.member.role == "evaluate" else " on the data held out"
        fields = {"version": event.version, "samples": event.samples, **event.values}
        log = Log(event="evaluated", text=f"version {event.version}{where}: {shown}", fields=fields)
        return [log], self.report(event.version, event.samples, event.values, sealed=sealed)

    def report(self, version: int, samples: int, values: Mapping[str, float], *, sealed: bool) -> list[Publish]:
        """Say what a version is worth; nothing of a device's own data, where the plan seals what tells of them."""
        own = self.member.role == "train"
        if own and (sealed or not self.member.reports):
            return []
        split = "local" if own else "test"
        meta = Metrics(version=version, samples=samples, split=split, values=values).meta()
        message = self.member.message(Metrics.KIND, self.memory.number(), meta)
        self.pending[message.seq] = message
        while len(self.pending) > PENDING_MAX:
            self.pending.pop(next(iter(self.pending)))
        return [message]

    def acknowledged(self, seq: int) -> None:
        self.pending.pop(seq, None)
