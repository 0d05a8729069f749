"""The trainer's part of the state machine: by which plan, on which version, and never twice on an answered one."""

from dataclasses import dataclass
from hashlib import blake2b

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.messages import OPEN, Head
from ternbus.edge.core.actions import Log, StartTraining
from ternbus.edge.core.events import BudgetSpent, TrainingFailed, TrainingFinished
from ternbus.edge.core.follower import Follower
from ternbus.edge.core.profile import Profile
from ternbus.edge.core.state import State
from ternbus.edge.plan.plan import NO_DP, Plan
from ternbus.edge.plan.schedule import TURNS, turn


def sentence(event: TrainingFinished) -> Log:
    """What came of a training, in words."""
    fields = {"base": event.base, "samples": event.samples, **event.metrics}
    shown = ", ".join(f"{name} {value:.4g}" for name, value in event.metrics.items())
    return Log(event="trained", text=f"trained on version {event.base}: {shown}", fields=fields)


@dataclass(slots=True, kw_only=True)
class TrainingPolicy:
    """At most one training at a time, and none while an update waits for its answer."""

    member: Profile
    running: StartTraining | None = None
    plan: Plan | None = None  # the federation's, where it can be followed
    due_s: float | None = None  # when its turn comes, if no version comes before
    _failed_base: int = -1  # training on it came to nothing, and would again
    _newest: tuple[int, float] = (-1, 0.0)  # a version, and when it was first there to be trained on
    _turn: int = -1  # the last that it took

    @property
    def sealed(self) -> bool:
        """Whether what tells of a device's data may not be sent in the open, or without noise; true without a plan."""
        return self.plan is None or self.plan.seal or self.plan.dp != NO_DP

    def read_plan(self, head: Head) -> list[Log]:
        """The task's own plan, and over it what the federation asks for."""
        self.plan, promise = None, self.member.promise
        try:
            plan = Plan.from_meta({**self.member.default_plan, **head.plan})
        except ProtocolError as error:
            return [_refused(str(error))]
        bound = plan if promise is None else promise.bound(plan)
        if isinstance(bound, str):
            return [_refused(bound)]
        self.plan = bound
        return []

    def begin(self, follower: Follower, kept: State, now: float) -> list[StartTraining | Log]:
        """Train on the head's version, if it is time to."""
        self.due_s = None
        head, vector, schema, plan = follower.head, follower.vector, follower.schema, self.plan
        if self.member.role != "train" or self.running is not None or kept.outstanding is not None:
            return []
        if head is None or head.state != OPEN or not kept.enrolled or not follower.synced:
            return []
        if plan is None or vector is None or schema is None or head.version <= self.answered(kept):
            return []
        if (rest := self._rest(plan, head.version, now)) is not None:
            return [*rest]
        self.running = StartTraining(
            base=head.version,
            schema=schema,
            vector=vector,
            residual=None if plan.dp not in {NO_DP, kept.protected} else kept.residual,  # it would go round the noise
            plan=plan,
            seed=self.seed(plan, head.version),
            account=kept.account,
        )
        text = f"training on version {head.version}"
        return [self.running, Log(event="training", text=text, fields={"base": head.version})]

    def _rest(self, plan: Plan, version: int, now: float) -> list[Log] | None:
        """None if it is this device's turn to train on the newest version: it is taken. If not, `due_s` is when it is.

        Each `turn_s` that a version lasts counts as one more, so that somebody always trains, however few take part. A
        turn that was taken so is over: the version that it was for comes later.
        """
        if plan.participation == 1:
            return None
        own = turn(max(version, self._turn + 1), participation=plan.participation, phase=self.seed(plan, 0) % TURNS)
        known, since = self._newest
        self._newest = version, (since if known == version else now)
        due_s = self._newest[1] + (own - max(version, self._turn)) * plan.turn_s
        if now >= due_s:
            self._turn = own
            return None
        self.due_s = due_s
        text = f"version {version} is for other devices to train on; this one's turn is version {own}"
        return [] if known == version else [Log(event="resting", text=text, fields={"version": version, "turn": own})]

    def answered(self, kept: State) -> int:
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

    def seed(self, plan: Plan, base: int) -> int:
        """Its own for each device and version, and the same when a run is repeated."""
        text = f"{self.member.federation}/{self.member.device}/{plan.seed}/{base}"
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 1


def _refused(reason: str) -> Log:
    return Log(event="bad-plan", text=f"no training by this plan: {reason}", fields={"reason": reason})


def spent(event: BudgetSpent) -> str:
    """Why a device stops that may not train once more."""
    return (
        f"the privacy budget is spent: with one more update epsilon would be {event.epsilon:.4g}, above "
        f"{event.budget:g} (delta {event.delta:g}); this device sends no more unless dp_epsilon, or its own "
        "max_epsilon, is raised"
    )
