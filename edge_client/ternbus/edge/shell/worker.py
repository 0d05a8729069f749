"""The training thread: it runs one training, evaluation or fine-tuning at a time and returns the result as an event."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from queue import SimpleQueue

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.schema import to_tensors, to_vector
from ternbus.edge.core.actions import Job, StartEvaluation, StartFineTuning, StartTraining
from ternbus.edge.core.events import (
    BudgetSpent,
    Evaluated,
    FineTuned,
    FineTuningFailed,
    TrainingFailed,
    TrainingFinished,
)
from ternbus.edge.learn.accountant import epsilon
from ternbus.edge.learn.compress import compress
from ternbus.edge.learn.noise import RandomSource, clip_and_noise
from ternbus.edge.learn.task import PrivateTrainer, Trained, Trainer, TrainingError
from ternbus.edge.plan.plan import NO_DP, Plan
from ternbus.edge.plan.privacy import DEVICE, PRIVACY_METRICS, SAMPLE, Account, cost
from ternbus.edge.plan.tensors import Tensors

TrainingResult = TrainingFinished | TrainingFailed | BudgetSpent
Result = TrainingResult | Evaluated | FineTuned | FineTuningFailed


def train(trainer: Trainer, job: StartTraining, random_source: RandomSource | None = None) -> TrainingResult:
    """Train and compress the change, under the plan's differential privacy, if the budget allows it.

    `random_source` is for tests and simulations; on a device it is the operating system's. Raises whatever the task's
    code raises, and `ConfigError` if the task cannot train with the plan's `dp`.
    """
    plan, account, random_source = job.plan, None, random_source or RandomSource()
    if plan.dp != NO_DP:
        account = _charged(job.account, plan, trainer.samples)
        if account.epsilon > plan.dp_epsilon:
            return BudgetSpent(base=job.base, epsilon=account.epsilon, budget=plan.dp_epsilon, delta=plan.dp_delta)
    start = to_tensors(job.schema, job.vector)
    try:
        trained = _learned(trainer, start, job, random_source)
    except TrainingError as error:
        if plan.dp != DEVICE:
            return TrainingFailed(base=job.base, reason=str(error), account=account)
        trained = Trained(tensors=start, samples=1, metrics={})  # a missing update would reveal something of the data
    change = to_vector(job.schema, trained.tensors)
    change -= job.vector
    if plan.dp == DEVICE:
        clip_and_noise(change, clip=plan.dp_clip, noise=plan.dp_noise, random_source=random_source)
    # Post-processing of the mechanism's output: quantization and residual cost no privacy.
    compressed = compress(job.schema, plan, change, job.residual, job.seed)
    return TrainingFinished(
        base=job.base,
        samples=1 if plan.dp == DEVICE else trained.samples,
        metrics=trained.metrics if account is None else {**trained.metrics, **_privacy_metrics(account)},
        block=compressed.block,
        residual=compressed.residual,
        account=account,
    )


def _learned(trainer: Trainer, start: Tensors, job: StartTraining, random_source: RandomSource) -> Trained:
    if job.plan.dp != SAMPLE:
        return trainer.train(start, job.plan, version=job.base, seed=job.seed)
    if not isinstance(trainer, PrivateTrainer):
        raise ConfigError(
            'the plan has dp = "sample", and this task has no train_privately(): add it, or use dp = "device"'
        )
    return trainer.train_privately(start, job.plan, version=job.base, seed=job.seed, random_source=random_source)


def _charged(account: Account, plan: Plan, samples: int) -> Account:
    """The account with one more training by this plan."""
    after = account.plus(cost(plan, samples))
    return replace(after, epsilon=epsilon(after.of(plan.dp), plan.dp_delta), delta=plan.dp_delta)


def _privacy_metrics(account: Account) -> dict[str, float]:
    return dict(zip(PRIVACY_METRICS, (account.epsilon, account.delta), strict=True))


def evaluate(trainer: Trainer, job: StartEvaluation) -> Evaluated:
    found = trainer.evaluate(to_tensors(job.schema, job.vector))
    return Evaluated(version=job.version, samples=found.samples, values=found.finite)


def fine_tune(trainer: Trainer, held: Trainer, job: StartFineTuning) -> FineTuned | FineTuningFailed:
    """Train on the data of `trainer`; evaluate the model before and after on the data of `held`."""
    start = to_tensors(job.schema, job.vector)
    before = held.evaluate(start)
    try:
        trained = trainer.train(start, job.plan, version=job.version, seed=job.seed)
    except TrainingError as error:
        return FineTuningFailed(version=job.version, reason=str(error))
    return FineTuned(
        version=job.version,
        samples=before.samples,
        before=before.finite,
        after=held.evaluate(trained.tensors).finite,
        tensors=trained.tensors,
    )


class Worker:
    """Runs jobs in a thread, which calls `deliver` with each result, or with the exception of the task's code.

    Versions are evaluated with `held`; if it is None, with `trainer`, as an evaluator does.
    """

    def __init__(
        self,
        trainer: Trainer,
        deliver: Callable[[Result | Exception], None],
        min_seconds: float = 0.0,
        held: Trainer | None = None,
    ) -> None:
        self._trainer = trainer
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
            try:
                result = self._perform(job)
            except ConfigError as error:  # the aggregator asks for a plan that this device cannot carry out
                if not isinstance(job, StartTraining):
                    self._deliver(error)
                    return
                result = TrainingFailed(base=job.base, reason=str(error), account=None)
            except Exception as error:  # noqa: BLE001 - a bug in the task: the service ends with its traceback
                self._deliver(error)
                return
            if self._stopping.is_set():
                return
            self._deliver(result)

    def _perform(self, job: Job) -> Result:
        if isinstance(job, StartEvaluation):
            return evaluate(self._held, job)
        if isinstance(job, StartFineTuning):
            return fine_tune(self._trainer, self._held, job)
        began = time.monotonic()
        result = train(self._trainer, job)
        self._stopping.wait(max(0.0, self._min_seconds - (time.monotonic() - began)))
        return result
