"""The policy for training: by which plan, and on which version; a version with an answered update is skipped."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final

from ternbus.broker.backoff import Retry
from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import arms, topics
from ternbus.broker.protocol.arms import WIDTH, Arms
from ternbus.broker.protocol.messages import OPEN, PRIVATE
from ternbus.broker.protocol.model_messages import Head
from ternbus.broker.sums.terms import SCHEMA
from ternbus.edge.core.actions import Log, StartTraining
from ternbus.edge.core.events import BudgetSpent, TrainingFailed, TrainingFinished
from ternbus.edge.core.failures import Failures
from ternbus.edge.core.follower import Follower
from ternbus.edge.core.private_terms import PrivateTerms
from ternbus.edge.core.profile import Profile
from ternbus.edge.core.state import State
from ternbus.edge.plan.arm import with_arm
from ternbus.edge.plan.plan import NO_DP, Plan
from ternbus.edge.plan.privacy import SAMPLE, SUM, Account
from ternbus.edge.plan.schedule import TURNS, turn
from ternbus.edge.plan.sum_policy import fault

NOT_TRAINED_BY: Final = {topics.TERMS, SCHEMA, arms.ARMS, arms.WEIGHTS}  # keys of a head's plan
MIXED: Final = (
    'it has dp = "{}", but this device has trained under dp = "{}", which has no epsilon for what that protects; use '
    'dp = "{}", or leave and join again as another device'
)


def describe(event: TrainingFinished, seq: int) -> Log:
    """The log of a finished training, whose update has the number ``seq``; with it the update's way can be followed.

    Of a failed one the release says no more than that of a change of 0.
    """
    if event.failure:
        text = f"training on version {event.base} failed, the device sends a change of 0 instead: {event.failure}"
        return Log(event="training-failed", text=text, fields={"base": event.base, "seq": seq, "reason": event.failure})
    fields = {"base": event.base, "seq": seq, "samples": event.samples, **event.metrics}
    shown = ", ".join(f"{name} {value:.4g}" for name, value in event.metrics.items())
    return Log(event="trained", text=f"trained on version {event.base}, update {seq}: {shown}", fields=fields)


@dataclass(slots=True, kw_only=True)
class TrainingPolicy:
    """When to train: at most one training at a time, and none while an update is outstanding."""

    profile: Profile
    running: StartTraining | None = None
    plan: Plan | None = None  # the federation's; None if it is invalid, or forbidden by the owner
    arms: Arms | None = None  # of the federation's search, if it has one
    due_s: float | None = None  # the time of its turn, if no new version arrives before; or of the next attempt
    failures: Failures = field(init=False)
    _newest: tuple[int, float] = (-1, 0.0)  # the newest version, and since when it could be trained on
    _turn: int = -1  # the last turn taken
    _read: tuple[str, Plan] | None = None  # the last valid plan, as a head had it
    _refusal: str = ""  # why there is no plan
    _unaffordable: tuple[Plan, str] | None = None  # the plan that asks for more than the budget has left, and the words

    def __post_init__(self) -> None:
        self.failures = Failures(work="a training", retry=Retry(salt=f"{self.profile.key.hex()}/training"))

    @property
    def refusal(self) -> str:
        """Why the device makes no update by the newest plan, which no data decide; empty if it does."""
        plan, words = self._unaffordable or (None, "")
        return self._refusal or (words if plan == self.plan else "")

    @property
    def sealed(self) -> bool:
        """Whether metrics of the device's data stay on it: it is private, or the plan seals, adds noise or is none."""
        return self.profile.sums is not None or self.plan is None or self.plan.seal or self.plan.dp != NO_DP

    @property
    def private(self) -> bool:
        """Whether others may see nothing of the device's data, nor that a training failed; true without a plan."""
        return self.profile.sums is not None or self.plan is None or self.plan.dp != NO_DP

    @property
    def widths(self) -> tuple[float, ...]:
        """Those that the federation searches."""
        return () if self.arms is None else tuple(arm[WIDTH] for arm in self.arms.arms if WIDTH in arm)

    def read_plan(self, head: Head, account: Account) -> list[Log]:
        """Read the head's plan; the task's default plan completes it, the owner's policy and limits bound it."""
        self.plan, self.arms, policy = None, None, self.profile.policy
        # The digests of terms and schema are in a head's plan, but no part of how to train: `PrivateTerms` reads them.
        keys = {name: value for name, value in head.plan.items() if name not in NOT_TRAINED_BY}
        try:
            plan = self._checked(keys)
            self.arms = Arms.from_plan(head.plan)
        except ProtocolError as error:
            return self._refuse(str(error))
        if reason := fault(self.profile.sums, plan):
            return self._refuse(reason)
        bound = plan if policy is None else policy.bound(plan)
        if isinstance(bound, str):
            return self._refuse(bound)
        if self.profile.role == "train" and (reason := _mixed(bound, account)):
            return self._refuse(reason)
        self.plan, self._refusal = self.profile.limits.bound(bound), ""
        if self._unaffordable is not None and self._unaffordable[0] != self.plan:
            self._unaffordable = None
            self.failures.succeeded()  # so that it is tried at once
        return []

    def _checked(self, keys: Mapping[str, object]) -> Plan:
        """The plan with these keys; most heads have that of the one before. ProtocolError for an invalid value."""
        written = repr(keys)  # unlike ==, it tells 1 from 1.0 and True
        if self._read is None or self._read[0] != written:
            self._read = written, Plan.from_meta({**self.profile.default_plan, **keys})
        return self._read[1]

    def _refuse(self, reason: str) -> list[Log]:
        self._refusal = reason
        return [] if self.profile.trains_next else [_refused(reason)]  # joining ends by it, or the training says it

    def is_occupied(self, state: State) -> bool:
        """Whether no version is used until a training has ended and its update is answered.

        A private device never says so: it holds no vector without the digest that the context of its updates has.
        """
        about = self.profile
        uses_others = about.role != "train" or about.evaluates or about.fine_tune > 0 or about.is_private
        return not uses_others and (self.running is not None or state.outstanding is not None)

    def begin(self, follower: Follower, terms: PrivateTerms, state: State, now: float) -> list[StartTraining | Log]:
        """Start a training on the head's version, unless a condition is missing."""
        self.due_s = None
        head, vector, schema, plan = follower.head, follower.vector, follower.schema, self.plan
        if self.profile.role != "train" or self.running is not None or state.outstanding is not None:
            return []
        if head is None or head.state != OPEN or not state.enrolled or not follower.synced:
            return []
        if plan is None or vector is None or schema is None or head.version <= state.answered_base:
            return []
        if now < self.failures.retry.due_s:
            self.due_s = self.failures.retry.due_s
            return []
        if reason := _mixed(plan, state.account):  # by a training that an earlier plan asked for
            self.plan = None
            return [*self._refuse(reason)]
        sums = terms.job(head, schema) if plan.codec == PRIVATE else None
        if sums is None and plan.codec == PRIVATE:
            return []
        if (waiting := self._wait_for_turn(plan, head.version, now)) is not None:
            return [*waiting]
        again = f" once more, as the cost may have changed; last time {self.refusal}" if self.refusal else ""
        arm, plan = self._by_arm(plan, head.version)
        self.running = StartTraining(
            base=head.version,
            schema=schema,
            vector=vector,
            # A residual from a training without this noise would leak data; a private sum takes none (`private_sum`).
            residual=None if sums is not None or plan.dp not in {NO_DP, state.protected} else state.residual,
            plan=plan,
            seed=self.seed(plan, head.version),
            account=state.account,
            policy=self.profile.policy,
            local=state.local_under(plan.dp),
            sums=sums,
            arm=arm,
        )
        text = f"training on version {head.version}{'' if arm is None else f' by arm {arm}'}{again}"
        fields = {"base": head.version} | ({} if arm is None else {"arm": arm})
        return [self.running, Log(event="training", text=text, fields=fields)]

    def _by_arm(self, plan: Plan, version: int) -> tuple[int | None, Plan]:
        """The device's arm for a version, and the plan with it; the plan alone where it takes no part in the search.

        Noise and private sums hide which device did what, and an arm would change what they were accounted for.
        """
        if self.arms is None or self.profile.is_private or plan.dp != NO_DP:
            return None, plan
        arm = self.arms.drawn(self.profile.device, self.profile.identity.public, version)
        found = None if arm is None else with_arm(plan, self.arms.arms[arm], is_elastic=self.profile.is_elastic)
        return (None, plan) if found is None else (arm, found)

    def _wait_for_turn(self, plan: Plan, version: int, now: float) -> list[Log] | None:
        """Take the turn, and return None, if it is the device's turn to train on this version; else set `due_s`.

        Each `turn_s` seconds without a new version count as one more version, so that a device trains even if few take
        part. A turn that was taken early is not taken again at its version.
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
        text = f"version {version} is not this device's turn; it trains on version {own}"
        return [] if known == version else [Log(event="resting", text=text, fields={"version": version, "turn": own})]

    def finished(self, event: TrainingFinished) -> StartTraining | None:
        """The job of this result; None if the result is not of the running job."""
        running, self.running, self._unaffordable = self.running, None, None
        self.failures.succeeded()
        return running if running is not None and running.base == event.base else None

    def failed(self, event: TrainingFailed, now: float) -> Log:
        """Try again later, also on the same version: the data, the memory or the plan may be others by then."""
        self.running = None
        self.failures.failed(event.base, event.reason, now)
        return self.failures.log(
            "training-failed", f"training on version {event.base} failed", event, {"base": event.base}
        )

    def unaffordable(self, event: BudgetSpent, now: float) -> list[Log]:
        """Wait for another plan: it may ask for less. The same reason is logged once.

        This plan is tried again all the same: what an update costs depends also on the number of samples, and on the
        terms of private sums, which change without the plan.
        """
        running, self.running = self.running, None
        policy = self.profile.policy
        owners = policy is not None and policy.epsilon == event.budget
        limit = "max_epsilon in the device's edge.toml" if owners else "dp_epsilon"
        reason = (
            f"its privacy budget does not pay for one more update: epsilon would be {event.epsilon:.4g}, above "
            f"{event.budget:g} (delta {event.delta:g}); more noise, fewer steps or a larger {limit} may do"
        )
        known = self.failures.reason == reason
        self._unaffordable = None if running is None else (running.plan, reason)
        self.failures.failed(event.base, reason, now)
        return [] if known else [_refused(reason)]

    def seed(self, plan: Plan, base: int) -> int:
        """A seed that differs for each device and version, and is the same if the run is repeated."""
        text = f"{self.profile.federation}/{self.profile.device}/{plan.seed}/{base}"
        return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) >> 1


def _mixed(plan: Plan, account: Account) -> str:
    """Why the account has no epsilon for what the plan protects; empty if it has, or the plan needs none."""
    if plan.dp == NO_DP or account.covers(plan.dp):
        return ""
    before = SUM if plan.dp == SAMPLE else SAMPLE
    return MIXED.format(plan.dp, before, before)


def _refused(reason: str) -> Log:
    return Log(event="bad-plan", text=f"the device does not train by this plan: {reason}", fields={"reason": reason})


def budget_spent(event: BudgetSpent) -> str:
    """The reason to stop when the privacy budget allows no more training."""
    return (
        f"the privacy budget is spent: with one more update epsilon would be {event.epsilon:.4g}, above "
        f"{event.budget:g} (delta {event.delta:g}); to continue, raise max_epsilon in the edge.toml of its "
        "directory and run it again"
    )
