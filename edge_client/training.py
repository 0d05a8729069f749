"""Training and evaluating apart from the service: one thread, one job at a time, its result an event."""

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from broker.schema import to_tensors, to_vector
from edge_client.actions import StartEvaluation, StartTraining
from edge_client.compress import compress
from edge_client.events import Evaluated, TrainingFailed, TrainingFinished
from edge_client.trainer import Trainer, TrainingError

Result = TrainingFinished | TrainingFailed | Evaluated
Job = StartTraining | StartEvaluation


def train(trainer: Trainer, job: StartTraining) -> TrainingFinished | TrainingFailed:
    """Train, and compress what it changed. Raises whatever the task's own code raises."""
    try:
        trained = trainer.train(to_tensors(job.schema, job.vector), job.plan, version=job.base, seed=job.seed)
    except TrainingError as error:
        return TrainingFailed(base=job.base, reason=str(error))
    change = to_vector(job.schema, trained.tensors)
    change -= job.vector
    compressed = compress(job.schema, job.plan, change, job.residual, job.seed)
    return TrainingFinished(
        base=job.base,
        samples=trained.samples,
        metrics=trained.metrics,
        block=compressed.block,
        residual=compressed.residual,
    )


def evaluate(trainer: Trainer, job: StartEvaluation) -> Evaluated:
    found = trainer.evaluate(to_tensors(job.schema, job.vector))
    return Evaluated(version=job.version, samples=found.samples, values=found.values)


class TrainingThread:
    """Runs jobs; `deliver` gets each result, or the exception that the task's code raised."""

    def __init__(
        self, trainer: Trainer, deliver: Callable[[Result | Exception], None], min_seconds: float = 0.0
    ) -> None:
        self._trainer = trainer
        self._deliver = deliver
        self._min_seconds = min_seconds
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._leaving = threading.Event()
        # A daemon: nobody waits for an epoch to end when the device is to stop.
        self._thread = threading.Thread(target=self._run, name="training", daemon=True)

    def start(self, job: Job) -> None:
        if not self._thread.is_alive():
            self._thread.start()
        self._jobs.put(job)

    def leave(self) -> bool:
        """End as soon as possible; whether it has ended."""
        self._leaving.set()
        self._jobs.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout=0.5)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                result = self._perform(job)
            except Exception as error:  # noqa: BLE001 - the task's bug, not ours: the service ends with its traceback
                self._deliver(error)
                return
            if self._leaving.is_set():
                return
            self._deliver(result)

    def _perform(self, job: Job) -> Result:
        if isinstance(job, StartEvaluation):
            return evaluate(self._trainer, job)
        began = time.monotonic()
        result = train(self._trainer, job)
        self._leaving.wait(max(0.0, self._min_seconds - (time.monotonic() - began)))
        return result
