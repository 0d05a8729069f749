"""The training thread: it runs one training, evaluation or fine-tuning at a time and returns the result as an event."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np

from ternbus.broker.crash_points import reached
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.direction import GAIN, LOSS, direction_of, primary_of, sign_of, width_metric
from ternbus.edge.core.actions import (
    Job,
    StartEvaluation,
    StartFineTuning,
    StartStatistics,
    StartTraining,
    tensors_of,
)
from ternbus.edge.core.events import (
    BudgetSpent,
    Evaluated,
    EvaluationFailed,
    FineTuned,
    FineTuningFailed,
    StatisticsMeasured,
    TrainingFailed,
    TrainingFinished,
)
from ternbus.edge.learn import failure
from ternbus.edge.learn.local_change import LocalChange
from ternbus.edge.learn.local_state import packed
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.subnetwork import Narrowed
from ternbus.edge.learn.task import Trainer, evaluated_by
from ternbus.edge.learn.task_loader import code_errors
from ternbus.edge.plan.plan import NO_DP, Plan
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.shell import measuring, private_training
from ternbus.edge.shell.encoding import encoded

TrainingResult = TrainingFinished | TrainingFailed | BudgetSpent
Result = TrainingResult | Evaluated | EvaluationFailed | FineTuned | FineTuningFailed | StatisticsMeasured


def train(
    trainer: Trainer,
    job: StartTraining,
    random_source: RandomSource | None = None,
    held: Trainer | None = None,
    narrowed: Narrowed | None = None,
) -> TrainingResult:
    """Train and encode the change, under the plan's differential privacy, if the budget allows it.

    A training by an arm is judged with the data of `held`, if any are held out, and is one of `narrowed` where its
    width is below 1. `random_source` is for tests and simulations; on a device it is the operating system's. Raises
    `ConfigError` if the task cannot train by the plan.
    """
    random_source = random_source or RandomSource()
    if job.plan.dp != NO_DP:
        return private_training.train(trainer, job, random_source)
    try:
        chosen = trainer if narrowed is None or job.plan.width == 1 else narrowed(job.plan.width)
        return _finished(chosen, job, random_source, None if job.arm is None else held)
    except ConfigError:
        raise
    except code_errors() as error:
        reason = failure.describe(error)
        if job.sums is None or failure.is_memory(error):
            return TrainingFailed(base=job.base, reason=reason, trace=failure.trace_of(error))
        return _unchanged(job, reason, random_source)


def _finished(
    trainer: Trainer, job: StartTraining, random_source: RandomSource, held: Trainer | None
) -> TrainingFinished:
    start = tensors_of(job)
    trained = trainer.train(start, job.plan, version=job.base, seed=job.seed)
    gains = {} if held is None else _gains(held, start, {**start, **trained.tensors, **trained.local}, job.plan)
    changed = LocalChange.of(job.schema, job.vector, trained.tensors)
    content, residual = encoded(job, changed, job.residual, trained.samples, random_source)
    return TrainingFinished(
        base=job.base,
        samples=trained.samples,
        metrics={**trained.metrics, **gains},
        content=content,
        residual=residual,
        local=packed(trained.local),
    )


def _gains(held: Trainer, before: Tensors, after: Tensors, plan: Plan) -> dict[str, float]:
    """By how much a training has made each metric of the held-out data better, by its direction."""
    first, last = (evaluated_by(held, tensors, plan) for tensors in (before, after))
    return {
        GAIN + name: sign_of(direction_of(name, last.better)) * (value - first.values[name])
        for name, value in last.finite.items()
        if name in first.finite
    }


def _unchanged(job: StartTraining, reason: str, random_source: RandomSource) -> TrainingFinished:
    """What a training for a private sum sends that has failed: a change of 0, which nobody sees alone.

    A model can be made on which it fails for some data only: who sent nothing would tell of its own. It is another
    matter with the memory, and with a `ConfigError`: they follow from the plan and the machine. If such devices sent 0,
    a plan that only one machine can carry out would have a sum show that device's change.
    """
    content, _ = encoded(job, np.zeros_like(job.vector), None, 1, random_source)
    return TrainingFinished(base=job.base, samples=1, metrics={}, content=content, residual=None, failure=reason)


def evaluate(trainer: Trainer, job: StartEvaluation, narrowed: Narrowed | None = None) -> Evaluated | EvaluationFailed:
    """Evaluate the version; a failure on private data counts as evaluated, since others would see another attempt.

    Where the job names widths, the metrics of their sub-networks follow.
    """
    try:
        tensors = tensors_of(job)
        found = evaluated_by(trainer, tensors, job.plan, private=job.private)
        values = found.finite
        if narrowed is not None:
            values |= of_widths(narrowed, tensors, job.plan, job.widths, values)
        return Evaluated(version=job.version, samples=found.samples, values=values, better=found.better)
    except code_errors() as error:
        reason = failure.describe(error)
        if job.private:
            return Evaluated(version=job.version, samples=0, values={}, failure=reason)
        return EvaluationFailed(version=job.version, reason=reason, trace=failure.trace_of(error))


def of_widths(
    narrowed: Narrowed, tensors: Tensors, plan: Plan | None, widths: Sequence[float], whole: Mapping[str, float]
) -> dict[str, float]:
    """The metrics of the sub-networks of these widths, by name and width; `whole` are those of the whole model.

    A message of metrics has room for some: all widths of the primary metric come first, then of the loss.
    """
    found = {width: whole if width == 1 else evaluated_by(narrowed(width), tensors, plan).finite for width in widths}
    names = dict.fromkeys(name for values in found.values() for name in (primary_of(values), LOSS, *values))
    return {
        width_metric(name, width): values[name]
        for name in names
        for width, values in found.items()
        if name is not None and name in values
    }


def fine_tune(trainer: Trainer, held: Trainer, job: StartFineTuning) -> FineTuned | FineTuningFailed:
    """Train on the data of `trainer`; evaluate before and after on the data of `held`.

    If the data are private, what fails does not end it early: others see when the device goes.
    """
    private, faults = job.plan.hides_failures, list[BaseException]()

    def tried(work: Callable[[], object]) -> Any:
        try:
            return work()
        except code_errors() as error:
            if not private:
                raise
            faults.append(error)
            return None

    try:
        start = tensors_of(job)
        before = tried(lambda: evaluated_by(held, start, job.plan, private=private))
        trained = tried(lambda: trainer.train(start, job.plan, version=job.version, seed=job.seed))
        own = start if trained is None else {**trained.tensors, **trained.local}
        after = tried(lambda: evaluated_by(held, own, job.plan, private=private))
        if faults:
            raise faults[0]
        return FineTuned(
            version=job.version,
            samples=before.samples,
            before=before.finite,
            after=after.finite,
            tensors=own,
            better=before.better,
        )
    except code_errors() as error:
        return FineTuningFailed(version=job.version, reason=failure.describe(error), trace=failure.trace_of(error))


class Worker:
    """Runs jobs in a thread, which calls `deliver` with each result.

    Versions are evaluated with `held`; if it is None, with `trainer`, as an evaluator does.
    """

    def __init__(
        self,
        trainer: Trainer,
        deliver: Callable[[Result], None],
        min_seconds: float = 0.0,
        held: Trainer | None = None,
        narrowed: Narrowed | None = None,
    ) -> None:
        self._trainer = trainer
        self._narrowed = narrowed
        self._held = held or trainer
        self._deliver = deliver
        self._min_seconds = min_seconds
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._stopping = threading.Event()
        # A daemon, so that a device that stops need not wait for the end of an epoch.
        self._thread = threading.Thread(target=self._run, name="training", daemon=True)

    def start(self, job: Job) -> None:
        if not self._thread.is_alive():
            self._thread.start()
        self._jobs.put(job)

    def stop(self) -> bool:
        """End as soon as possible. Returns whether the thread has ended."""
        self._stopping.set()
        self._jobs.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout=0.5)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            result = self._perform(job)
            if self._stopping.is_set():
                return
            reached("job-done")
            self._deliver(result)

    def _perform(self, job: Job) -> Result:
        if isinstance(job, StartEvaluation):
            return evaluate(self._held, job, self._narrowed)
        if isinstance(job, StartFineTuning):
            return fine_tune(self._trainer, self._held, job)
        if isinstance(job, StartStatistics):
            return measuring.answer(self._trainer, job, RandomSource(), time.time())
        began = time.monotonic()
        try:
            held = self._held if self._held is not self._trainer else None
            result = train(self._trainer, job, held=held, narrowed=self._narrowed)
        except code_errors() as error:  # the plan is none that this device can carry out, or the fault is ours
            result = TrainingFailed(base=job.base, reason=failure.describe(error), trace=failure.trace_of(error))
        self._stopping.wait(max(0.0, began + self._min_seconds - time.monotonic()))
        return result
