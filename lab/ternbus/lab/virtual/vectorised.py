"""Training of simulated devices several at a time, vectorised over devices, in this process and in others.

In virtual time a training may be computed at any moment between its start and its end. So when one is awaited, those
are computed with it that are due next, also on other versions.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from ternbus.broker.errors import ConfigError, FederationError
from ternbus.edge.core.actions import StartTraining, tensors_of
from ternbus.edge.learn.task import Evaluation, Start, Trained, Trainer, TrainingError, VectorisedTrainer
from ternbus.edge.learn.task_loader import code_errors, described
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.shell.worker import TrainingResult
from ternbus.lab.virtual.shares import shares
from ternbus.lab.virtual.training import Awaited, Pair, Widths, computed

FOREIGN: Final = "a hostile or a narrow device, a client algorithm of your own, or a task without PyTorch"
SUBNETWORK: Final = "the arm is a sub-network"


Training = tuple[int, StartTraining]
"""A device's number and its job."""


class Others(Protocol):
    """Other processes that train parts of a group; a `GroupWorkers`."""

    count: int

    def begin(self, groups: Sequence[Sequence[Training]]) -> Callable[[], list[TrainingResult]]:
        """Begin to train each group at once; the returned function waits for the results, in order."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Begun:
    """A training that has begun, with its place in the order of ends."""

    end: tuple[float, int]  # when it is due; of those that are due at one time, which began first
    device: int
    job: StartTraining


class Vectorised:
    """Training of at most `most` devices at once here, and of as many in each of `others`.

    What cannot be at once is trained alone, here, and `say` is told why, once. The results agree with those of training
    alone to rounding, and are the same bits for the same `most` and as many processes.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        widths: Widths,
        most: int,
        say: Callable[[str], None],
        others: Others | None = None,
    ) -> None:
        self._pairs, self._widths, self._say, self._others = pairs, widths, say, others
        self._most, self._processes = most, 1 if others is None else 1 + others.count
        self._numbers = itertools.count()
        self._waiting: dict[int, _Begun] = {}  # by number, in the order in which they began
        self._results: dict[int, tuple[_Begun, TrainingResult]] = {}
        self._said: set[str] = set()
        self._failure = ""  # why no group is computed at once any more

    def begin(self, device: int, job: StartTraining, due_s: float) -> Awaited:
        number = next(self._numbers)
        self._waiting[number] = _Begun(end=(due_s, number), device=device, job=job)
        return partial(self._result, number)

    def _result(self, number: int) -> TrainingResult:
        if number not in self._results:
            self._compute(self._waiting[number])
        return self._results.pop(number)[1]

    def _compute(self, first: _Begun) -> None:
        """Compute a training that is awaited, and others with it."""
        # What was due before is lost with its device: results are awaited in the order of their ends.
        self._waiting = {number: each for number, each in self._waiting.items() if each.end >= first.end}
        self._results = {number: each for number, each in self._results.items() if each[0].end >= first.end}
        group, results = self._group(first), list[TrainingResult]()
        try:
            results = self._at_once([(each.device, each.job) for each in group]) if len(group) > 1 else []
        except code_errors() as error:
            if isinstance(error, FederationError) and not isinstance(error, ConfigError):
                raise  # a process has died
            is_known = isinstance(error, ConfigError)  # a limit that we know of, in words of its own
            self._failure = str(error) if is_known else f"torch.func cannot vectorise it ({described(error)})"
            self._note(self._failure)
        if not results:
            group, results = [first], [self._alone(first)]
        for each, result in zip(group, results, strict=True):
            self._results[each.end[1]] = (self._waiting.pop(each.end[1]), result)

    def _group(self, first: _Begun) -> list[_Begun]:
        """Those that are computed at once with the first, which is one of them."""
        trainer, plan = self._pairs[first.device][0], first.job.plan
        if not (like := self._likeness(trainer, plan)):
            return [first]
        alike = (
            each
            for each in sorted(self._waiting.values(), key=lambda each: each.end)
            if each.job.plan == plan and self._likeness(self._pairs[each.device][0], plan) == like
        )
        return list(itertools.islice(alike, self._most * self._processes))

    def _likeness(self, trainer: Trainer, plan: Plan) -> object:
        """What is equal of those that are computed at once; None if this one is computed alone."""
        if plan.width != 1:
            reason = SUBNETWORK
        elif not isinstance(trainer, VectorisedTrainer):
            reason = FOREIGN
        elif not (reason := trainer.alone(plan) or self._failure):
            return trainer.likeness(plan)
        self._note(reason)
        return None

    def _note(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            self._say(f"trained one by one, not vectorised: {reason}")

    def _at_once(self, group: Sequence[Training]) -> list[TrainingResult]:
        """The results of all, in order; each process has a part of them."""
        steps = [job.plan.steps(self._pairs[device][0].samples) for device, job in group]
        parts = shares(steps, self._most, self._processes)
        jobs = [[[group[number] for number in each] for each in part] for part in parts]
        awaited = [] if self._others is None else [self._others.begin(each) for each in jobs[1:] if each]
        found = each_at_once(self._pairs, jobs[0]) + [result for results in awaited for result in results()]
        numbers = [number for part in parts for each in part for number in each]
        return [result for _, result in sorted(zip(numbers, found, strict=True), key=lambda pair: pair[0])]

    def _alone(self, begun: _Begun) -> TrainingResult:
        return computed(self._pairs[begun.device], begun.job, self._widths.of(begun.device))


def each_at_once(pairs: Sequence[Pair], groups: Sequence[Sequence[Training]]) -> list[TrainingResult]:
    """The results of groups of trainings, in order; one that has no others is trained alone."""
    return [result for group in groups for result in at_once(pairs, group)]


def at_once(pairs: Sequence[Pair], group: Sequence[Training]) -> list[TrainingResult]:
    """The results of trainings by one plan that are alike, in order; ``pairs`` are those of all devices."""
    if len(group) == 1:
        return [computed(pairs[device], job) for device, job in group]
    starts = [
        Start(trainer=pairs[device][0], tensors=tensors_of(job), version=job.base, seed=job.seed)
        for device, job in group
    ]
    trainer = starts[0].trainer
    assert isinstance(trainer, VectorisedTrainer)  # noqa: S101 - or it would be alone
    found = trainer.train_at_once(group[0][1].plan, starts)
    return [
        computed((_Computed(each, start.trainer.samples), pairs[device][1]), job)
        for each, start, (device, job) in zip(found, starts, group, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Computed:
    """A trainer of one training that is computed already: what follows is that of any training."""

    outcome: Trained | TrainingError
    samples: int

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:  # noqa: ARG002 - of a trainer
        if isinstance(self.outcome, TrainingError):
            raise self.outcome
        return self.outcome

    def evaluate(self, tensors: Tensors) -> Evaluation:
        raise NotImplementedError
