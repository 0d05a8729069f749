"""The end of a device's work: with fine-tuning, a few epochs on its own data turn the last version into its own model.

The model stays on the device, in a file for its owner. Its gain is measured on data held out from both trainings.
"""

from dataclasses import dataclass, replace

from ternbus.broker.protocol.messages import CLOSED
from ternbus.broker.protocol.schema import Schema, Vector, to_tensors, vector_digest
from ternbus.broker.protocol.tensor_kinds import version_metadata
from ternbus.edge.core.actions import Action, Log, Publish, SaveModel, StartFineTuning
from ternbus.edge.core.evaluation import EvaluationPolicy
from ternbus.edge.core.events import FineTuned, FineTuningFailed
from ternbus.edge.core.follower import Follower
from ternbus.edge.core.profile import Profile
from ternbus.edge.core.training_policy import TrainingPolicy
from ternbus.edge.learn.local_state import unpacked
from ternbus.edge.plan.plan import Plan


def plan_of(plan: Plan, epochs: float) -> Plan:
    """The federation's plan, changed for fine-tuning over this many epochs.

    The federation's schedule may have ended at a rate of 0, and its plan damps the change of batch norm's statistics.
    For fine-tuning the rate is `learning_rate`, and the statistics are the device's own.
    """
    return replace(
        plan,
        local_epochs=epochs,
        local_steps=None,
        local_seconds=None,
        steps_max=None,
        schedule="constant",
        warmup_versions=0,
        statistics_rate=1.0,
    )


@dataclass(slots=True, kw_only=True)
class FineTuning:
    """The end of a device's work: why it stops, and the one fine-tuning before."""

    profile: Profile
    training: TrainingPolicy
    evaluation: EvaluationPolicy
    done: bool = False
    _running: bool = False

    def stop_reason(self, follower: Follower, contributed: int, *, is_current: bool) -> str:
        """The reason for the device to stop, after this many accepted updates; empty if it continues.

        A head that says `closed` counts if it ``is_current``: where a session goes on, the broker first delivers what
        the device has missed, and the federation may have been opened again since.
        """
        if self.profile.role == "export":
            own = len(unpacked(self.evaluation.pending.state.local))
            beside = f", with {own} tensors of this device's own" if own else ""
            return f"version {follower.version} is written{beside}" if follower.synced else ""
        if max(contributed, self.evaluation.evaluated) == self.profile.versions:
            return f"{self.profile.versions} versions are done"
        head, evaluated = follower.head, self.evaluation.pending.state.evaluated
        if head is None or head.state != CLOSED or self.profile.stays or not is_current:
            return ""
        if not self.profile.evaluates or evaluated >= head.version:
            return "the federation is closed"
        failures = self.evaluation.failures
        if failures.version != head.version:
            return ""  # it is being evaluated
        return f"the federation is closed; its last version is not evaluated: {failures.reason}"

    def begin(self, follower: Follower) -> list[StartFineTuning | SaveModel]:
        """Start fine-tuning, or write the version, if the device has that option. It stops when `done` is true."""
        version, vector, schema, plan = follower.version, follower.vector, follower.schema, self.training.plan
        if self.profile.role == "export" and version is not None and vector is not None and schema is not None:
            self.done = True
            tensors = {**unpacked(self.evaluation.pending.state.local), **to_tensors(schema, vector)}
            digest = vector_digest(vector)  # the head's was not checked where the delta has another one
            about = {**self.profile.metadata, **version_metadata(version, digest)}
            return [SaveModel(tensors=tensors, metadata=about)]
        if self.profile.role != "train" or not self.profile.fine_tune or plan is None:
            self.done = True
        if self.done or self._running or not follower.synced or version is None or vector is None or schema is None:
            return []
        assert plan is not None  # noqa: S101 - else it is done
        self._running = True
        return [self.job(plan, version, schema, vector)]

    def job(self, plan: Plan, version: int, schema: Schema, vector: Vector) -> StartFineTuning:
        """The job of fine-tuning from a version."""
        return StartFineTuning(
            version=version,
            schema=schema,
            vector=vector,
            plan=plan_of(plan, self.profile.fine_tune),
            seed=self.training.seed(plan, version),
            local=self.evaluation.pending.state.local,
        )

    def finished(self, event: FineTuned | FineTuningFailed) -> tuple[list[Action], list[Publish]]:
        """The file and the log for the owner, and the metrics to publish, if the owner allows it."""
        self.done = True
        if isinstance(event, FineTuningFailed):
            failures, fields = self.training.failures, {"version": event.version}
            return [failures.log("fine-tuning-failed", "fine-tuning failed", event, fields)], []
        gains = ", ".join(
            f"{name} {event.before[name]:.4f} -> {after:.4f}"
            for name, after in event.after.items()
            if name in event.before
        )
        about = f"personal model from version {event.version}, on {event.samples} held-out samples: {gains}"
        report = self.evaluation.report(event, sealed=self.training.sealed)
        save = SaveModel(tensors=event.tensors, metadata={"ternbus": f"{self.profile.device}: {about}"})
        log = Log(
            event="fine-tuned", text=about, fields={"version": event.version, "samples": event.samples, **event.values}
        )
        return [save, log], report
