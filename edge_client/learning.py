"""The trainer's part of the state machine: by which plan, on which version, and never twice on an answered one."""

from dataclasses import dataclass
from hashlib import blake2b

from broker.errors import ProtocolError
from broker.messages import OPEN, Head
from edge_client.actions import Log, StartTraining
from edge_client.events import TrainingFailed, TrainingFinished
from edge_client.follower import Follower
from edge_client.kept import Kept
from edge_client.member import Member
from edge_client.trainer import Plan


@dataclass(slots=True, kw_only=True)
class Learning:
    """At most one training at a time, and none while an update waits for its answer."""

    member: Member
    running: StartTraining | None = None
    _plan: Plan | None = None
    _failed_base: int = -1  # training on it came to nothing, and would again

    def read_plan(self, head: Head) -> list[Log]:
        """The task's own plan, and over it what the federation asks for."""
        try:
            self._plan = Plan.from_meta({**self.member.default_plan, **head.plan})
        except ProtocolError as error:
            self._plan = None
            return [Log(event="bad-plan", text=f"no training by this plan: {error}", fields={"reason": str(error)})]
        return []

    def begin(self, follower: Follower, kept: Kept) -> list[StartTraining]:
        """Train on the head's version, if it is time to."""
        head, vector, schema, plan = follower.head, follower.vector, follower.schema, self._plan
        if self.member.role != "train" or self.running is not None or kept.outstanding is not None:
            return []
        if head is None or head.state != OPEN or not kept.enrolled or not follower.synced:
            return []
        if plan is None or vector is None or schema is None or head.version <= self.answered(kept):
            return []
        self.running = StartTraining(
            base=head.version,
            schema=schema,
            vector=vector,
            residual=kept.residual,
            plan=plan,
            seed=self._seed(plan, head.version),
        )
        return [self.running]

    def answered(self, kept: Kept) -> int:
        """The newest version on which no more training is wanted."""
        return max(kept.answered_base, self._failed_base)

    def finished(self, event: TrainingFinished) -> StartTraining | None:
        """What was being trained, if this is its result."""
        running, self.running = self.running, None
        return running if running is not None and running.base == event.base else None

    def failed(self, event: TrainingFailed) -> Log:
        self.running = None
        self._failed_base = event.base
        return Log(event="training-failed", text=event.reason, fields={"base": event.base, "reason": event.reason})

    def _seed(self, plan: Plan, base: int) -> int:
        """Its own for each device and version, and the same when a run is repeated."""
        text = f"{self.member.federation}/{self.member.device}/{plan.seed}/{base}"
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 1
