"""The evaluator's part of the state machine: each version once, the newest whenever free, the result published."""

from dataclasses import dataclass, field, replace
from typing import Final

from broker.messages import Metrics
from edge_client.actions import Log, Publish, StartEvaluation
from edge_client.events import Evaluated
from edge_client.follower import Follower
from edge_client.member import Member
from edge_client.memory import Memory

PENDING_MAX: Final = 64


@dataclass(slots=True, kw_only=True)
class Evaluating:
    """Metrics wait here for the broker's acknowledgement: nobody answers them, and a cut connection loses them."""

    member: Member
    memory: Memory
    pending: dict[int, Publish] = field(default_factory=dict)
    done: int = 0
    _busy: bool = False

    def begin(self, follower: Follower) -> list[StartEvaluation]:
        """Evaluate what the follower has, if it is new and nothing else is being evaluated."""
        version, vector, schema = follower.version, follower.vector, follower.schema
        if self.member.role != "evaluate" or self._busy or not follower.synced or self.done == self.member.versions:
            return []
        if version is None or vector is None or schema is None or version <= self.memory.kept.evaluated:
            return []
        self._busy = True
        return [StartEvaluation(version=version, schema=schema, vector=vector)]

    def finished(self, event: Evaluated) -> tuple[Log, Publish]:
        """Keep that it is done, and say so to people and to the aggregator."""
        self._busy = False
        self.done += 1
        self.memory.replaced(replace(self.memory.kept, evaluated=event.version))
        meta = Metrics(version=event.version, samples=event.samples, split="test", values=event.values).meta()
        message = self.member.message(Metrics.KIND, self.memory.number(), meta)
        self.pending[message.seq] = message
        while len(self.pending) > PENDING_MAX:
            self.pending.pop(next(iter(self.pending)))
        shown = ", ".join(f"{name} {value:.4f}" for name, value in event.values.items())
        fields = {"version": event.version, "samples": event.samples, **event.values}
        return Log(event="evaluated", text=f"version {event.version}: {shown}", fields=fields), message

    def acknowledged(self, seq: int) -> None:
        self.pending.pop(seq, None)
