"""A model of the device's own: before it leaves, a few epochs more from the last version, on its own data alone.

It stays here, in a file for its owner. What it gains is measured on data that neither model has been trained on.
"""

from dataclasses import dataclass, replace

from ternbus.broker.protocol.messages import CLOSED
from ternbus.broker.protocol.schema import Schema, Vector
from ternbus.edge.core.actions import Action, Log, Publish, SavePersonal, StartFineTuning
from ternbus.edge.core.evaluation import EvaluationPolicy
from ternbus.edge.core.events import Evaluated, FineTuned, FineTuningFailed
from ternbus.edge.core.follower import Follower
from ternbus.edge.core.profile import Profile
from ternbus.edge.core.training_policy import TrainingPolicy
from ternbus.edge.plan.plan import Plan


def plan_of(plan: Plan, epochs: float) -> Plan:
    """The federation's plan for so many epochs by itself.

    Its schedule may have ended at a rate of 0, and batch norm's statistics are damped for the sake of others: here the
    rate is `learning_rate`, and the statistics are the device's own.
    """
    return replace(
        plan,
        local_epochs=epochs,
        local_steps=None,
        local_seconds=None,
        schedule="constant",
        warmup_versions=0,
        statistics_rate=1.0,
    )


@dataclass(slots=True, kw_only=True)
class FineTuning:
    """Once in a life, when there is no more to be learned from others."""

    member: Profile
    learning: TrainingPolicy
    evaluating: EvaluationPolicy
    done: bool = False
    _busy: bool = False

    def why_leave(self, follower: Follower, contributed: int) -> str:
        """Why there is no more to be learned from others, after so many accepted updates; empty where there is."""
        if max(contributed, self.evaluating.done) == self.member.versions:
            return f"{self.member.versions} versions are done"
        head, evaluated = follower.head, self.evaluating.memory.kept.evaluated
        if head is None or head.state != CLOSED or (self.member.evaluates and evaluated < head.version):
            return ""
        return "the federation is closed"

    def begin(self, follower: Follower) -> list[StartFineTuning]:
        """What is to be done before leaving, which must wait until it is `done`."""
        version, vector, schema, plan = follower.version, follower.vector, follower.schema, self.learning.plan
        if self.member.role != "train" or not self.member.fine_tune or plan is None:
            self.done = True
        if self.done or self._busy or not follower.synced or version is None or vector is None or schema is None:
            return []
        assert plan is not None  # noqa: S101 - else it is done
        self._busy = True
        return [self.job(plan, version, schema, vector)]

    def job(self, plan: Plan, version: int, schema: Schema, vector: Vector) -> StartFineTuning:
        """Fine-tuning from a version."""
        return StartFineTuning(
            version=version,
            schema=schema,
            vector=vector,
            plan=plan_of(plan, self.member.fine_tune),
            seed=self.learning.seed(plan, version),
        )

    def tried(self, event: Evaluated | FineTuned | FineTuningFailed) -> tuple[list[Action], list[Publish]]:
        """What to do and what to send, now that a version, or a model of the device's own, has been tried."""
        if isinstance(event, Evaluated):
            return self.evaluating.finished(event, sealed=self.learning.sealed)
        return self.finished(event)

    def finished(self, event: FineTuned | FineTuningFailed) -> tuple[list[Action], list[Publish]]:
        """The file, and what it is worth: for the owner, and for the aggregator where the owner lets it know."""
        self.done = True
        if isinstance(event, FineTuningFailed):
            fields = {"version": event.version, "reason": event.reason}
            return [Log(event="fine-tuning-failed", text=f"no model of its own: {event.reason}", fields=fields)], []
        gains = ", ".join(
            f"{name} {event.before[name]:.4f} -> {after:.4f}"
            for name, after in event.after.items()
            if name in event.before
        )
        about = f"own model from version {event.version}, on {event.samples} samples held out: {gains}"
        report = self.evaluating.report(event.version, event.samples, event.values, sealed=self.learning.sealed)
        save = SavePersonal(tensors=event.tensors, about=f"{self.member.device}: {about}")
        log = Log(
            event="fine-tuned", text=about, fields={"version": event.version, "samples": event.samples, **event.values}
        )
        return [save, log], report
