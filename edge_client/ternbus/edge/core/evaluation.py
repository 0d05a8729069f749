"""Evaluation of versions and candidates: each at most once, the newest one next. The result is published as metrics.

An evaluator uses the task's test data. A device that trains evaluates a version before it trains on it, on its held-out
data, and only if its owner allows it. Its metrics have the split "local", an evaluator's have "test".
"""

from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Final

from ternbus.broker.backoff import Retry
from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.messages import CLOSED, Metrics
from ternbus.broker.protocol.meta_fields import ENTRIES_MAX
from ternbus.broker.protocol.model_messages import Candidate
from ternbus.broker.protocol.schema import Schema, Vector
from ternbus.edge.core.actions import Action, Log, Publish, StartEvaluation
from ternbus.edge.core.candidates import Candidates
from ternbus.edge.core.events import Evaluated, EvaluationFailed, FineTuned
from ternbus.edge.core.failures import Failures
from ternbus.edge.core.follower import Follower
from ternbus.edge.core.pending_state import PendingState
from ternbus.edge.core.profile import Profile
from ternbus.edge.core.training_policy import TrainingPolicy

UNACKNOWLEDGED_MAX: Final = 64


@dataclass(slots=True, kw_only=True)
class EvaluationPolicy:
    """When to evaluate. Keeps metrics until the broker acknowledges them: they have no receipt to wait for."""

    profile: Profile
    pending: PendingState
    unacknowledged: dict[int, Publish] = field(default_factory=dict)
    evaluated: int = 0  # versions, by an evaluator
    due_s: float | None = None  # the time of the next attempt after a failure
    failures: Failures = field(init=False)
    candidates: Candidates = field(default_factory=Candidates)
    _running: bool = False
    _candidate: Candidate | None = None  # that is being evaluated

    def __post_init__(self) -> None:
        self.failures = Failures(work="an evaluation", retry=Retry(salt=f"{self.profile.key.hex()}/evaluation"))

    def begin(self, follower: Follower, training: TrainingPolicy, now: float) -> list[StartEvaluation | Log]:
        """Evaluate the follower's version, if it is new and nothing is being evaluated or trained; else a candidate."""
        self.due_s = None
        version, vector, schema = follower.version, follower.vector, follower.schema
        if not self.profile.evaluates or training.running is not None or self._running:
            return []
        if not follower.synced or version is None or vector is None or schema is None:
            return []
        if self.evaluated == self.profile.versions:
            return []
        if version <= self.pending.state.evaluated:
            return self._begin_candidate(follower, training)
        if now < self.failures.retry.due_s and not self._is_last_chance(follower):
            self.due_s = self.failures.retry.due_s
            return []
        return [self._start(version, schema, vector, training)]

    def _start(self, version: int, schema: Schema, vector: Vector, training: TrainingPolicy) -> StartEvaluation:
        self._running = True
        # a search reads metrics of published versions
        searches = self.profile.role == "evaluate" and self.profile.is_elastic and self._candidate is None
        return StartEvaluation(
            version=version,
            schema=schema,
            vector=vector,
            plan=training.plan,
            private=training.private and self.profile.role == "train",
            local=self.pending.state.local,
            widths=training.widths if searches else (),
        )

    # -- candidates

    def candidate_arrived(self, frame: Frame, follower: Follower) -> list[Publish]:
        """Take in a part of a candidate; one that was evaluated is answered as before. Others do not evaluate any."""
        if not self.profile.evaluates or self.profile.sums is not None:
            return []
        candidate, judged = self.candidates.part_arrived(frame, follower), self.candidates.judged
        if candidate is None or judged is None or judged[0] != candidate.digest:
            return []
        return [self._publish(judged[1])]

    def _begin_candidate(self, follower: Follower, training: TrainingPolicy) -> list[StartEvaluation | Log]:
        """Evaluate the candidate, if there is one, and if the plan lets its metrics leave the device."""
        try:
            found = self.candidates.take(follower)
        except ProtocolError as error:
            return [Log(event="bad-candidate", text=f"a candidate is not evaluated: {error}")]
        if found is None or follower.schema is None or (self.profile.role == "train" and training.sealed):
            return []
        self._candidate, vector = found
        return [self._start(self._candidate.version, follower.schema, vector, training)]

    def _judged(self, candidate: Candidate, found: Evaluated, reason: str) -> tuple[list[Action], list[Publish]]:
        """The log and the metrics of a candidate; no metrics in the message tell that it could not be evaluated."""
        self._running, self._candidate = False, None
        metrics = replace(self.metrics(found), classes={}, candidate=candidate.digest)
        self.candidates.judged = candidate.digest, metrics
        shown = reason or ", ".join(f"{name} {value:.4f}" for name, value in found.values.items())
        fields = {"version": candidate.version, "samples": found.samples, **found.values}
        log = Log(event="candidate", text=f"candidate {candidate.version}: {shown}", fields=fields)
        return [log], [self._publish(metrics)]

    # -- results

    def _is_last_chance(self, follower: Follower) -> bool:
        """Whether the federation closed with a version that was not tried: the device does not wait, but tries once."""
        head = follower.head
        return head is not None and head.state == CLOSED and self.failures.version != head.version

    def failed(self, event: EvaluationFailed, now: float) -> tuple[list[Action], list[Publish]]:
        """Try again later, with the newest version then; a candidate that fails is worth nothing."""
        if self._candidate is not None:
            nothing = Evaluated(version=event.version, samples=0, values={})
            return self._judged(self._candidate, nothing, event.reason)
        self._running = False
        self.failures.failed(event.version, event.reason, now)
        what, fields = f"the evaluation of version {event.version} failed", {"version": event.version}
        return [self.failures.log("evaluation-failed", what, event, fields)], []

    def finished(self, event: Evaluated, *, sealed: bool) -> tuple[list[Action], list[Publish]]:
        """Record that the version is evaluated. Returns the log, and the metrics to publish."""
        if self._candidate is not None:
            return self._judged(self._candidate, event, event.failure)
        self._running = False
        self.failures.succeeded()
        self.evaluated += self.profile.role == "evaluate"
        self.pending.put(replace(self.pending.state, evaluated=event.version))
        shown = event.failure or ", ".join(f"{name} {value:.4f}" for name, value in event.values.items())
        where = "" if self.profile.role == "evaluate" else " on the held-out data"
        fields = {"version": event.version, "samples": event.samples, **event.values}
        log = Log(event="evaluated", text=f"version {event.version}{where}: {shown}", fields=fields)
        return [log], self.report(event, sealed=sealed)

    def report(self, found: Evaluated | FineTuned, *, sealed: bool) -> list[Publish]:
        """The metrics of a version; none on a device's own data if ``sealed``, or if its owner does not allow it.

        A private device publishes none at all.
        """
        is_own = self.profile.role == "train" and (sealed or not self.profile.reports)
        if is_own or self.profile.sums is not None:
            return []
        return [self._publish(self.metrics(found))]

    def _publish(self, metrics: Metrics) -> Publish:
        message = self.profile.message(Metrics.KIND, self.pending.next_seq(), metrics.meta())
        self.unacknowledged[message.seq] = message
        while len(self.unacknowledged) > UNACKNOWLEDGED_MAX:
            self.unacknowledged.pop(next(iter(self.unacknowledged)))
        return message

    def metrics(self, found: Evaluated | FineTuned) -> Metrics:
        """The message; of more metrics than it may have, it has the first."""
        own, values = self.profile.role == "train", dict(islice(found.values.items(), ENTRIES_MAX))
        return Metrics(
            version=found.version,
            samples=found.samples,
            split="local" if own else "test",
            values=values,
            better={name: direction for name, direction in found.better.items() if name in values},
            classes=self.profile.classes if own else {},
        )

    def acknowledged(self, seq: int) -> None:
        self.unacknowledged.pop(seq, None)
