"""Training of simulated devices in this process, several at a time, vectorised over devices.

In virtual time a training may be computed at any moment between its start and its end. So when one is awaited, those
are computed with it that are due next, also on other versions.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from ternbus.broker.errors import ConfigError
from ternbus.edge.core.actions import StartTraining, tensors_of
from ternbus.edge.learn.task import Evaluation, Start, Trained, Trainer, TrainingError, VectorisedTrainer
from ternbus.edge.learn.task_loader import code_errors, described
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.shell.worker import TrainingResult
from ternbus.lab.virtual.training import Awaited, Pair, Widths, computed

FOREIGN: Final = "a hostile or a narrow device, a client algorithm of your own, or a task without PyTorch"
SUBNETWORK: Final = "the arm is a sub-network"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Begun:
    """A training that has begun, with its place in the order of ends."""

    end: tuple[float, int]  # when it is due; of those that are due at one time, which began first
    device: int
    job: StartTraining


class Vectorised:
    """Training of at most `most` devices at once. What cannot be is trained alone, and `say` is told why, once.

    The results agree with those of training alone to rounding, and are the same bits for the same `most`.
    """

    def __init__(self, pairs: Sequence[Pair], widths: Widths, most: int, say: Callable[[str], None]) -> None:
        self._trainers, self._held = [trainer for trainer, _ in pairs], [held for _, held in pairs]
        self._widths, self._most, self._say = widths, most, say
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
            results = self._at_once(group) if len(group) > 1 else []
        except code_errors() as error:
            is_known = isinstance(error, ConfigError)  # a limit that we know of, in words of its own
            self._failure = str(error) if is_known else f"torch.func cannot vectorise it ({described(error)})"
            self._note(self._failure)
        if not results:
            group, results = [first], [self._alone(first)]
        for each, result in zip(group, results, strict=True):
            self._results[each.end[1]] = (self._waiting.pop(each.end[1]), result)

    def _group(self, first: _Begun) -> list[_Begun]:
        """Those that are computed at once with the first, which is one of them."""
        trainer, plan = self._trainers[first.device], first.job.plan
        if not (like := self._likeness(trainer, plan)):
            return [first]
        alike = (
            each
            for each in sorted(self._waiting.values(), key=lambda each: each.end)
            if each.job.plan == plan and self._likeness(self._trainers[each.device], plan) == like
        )
        return list(itertools.islice(alike, self._most))

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

    def _at_once(self, group: Sequence[_Begun]) -> list[TrainingResult]:
        starts = [
            Start(
                trainer=self._trainers[each.device],
                tensors=tensors_of(each.job),
                version=each.job.base,
                seed=each.job.seed,
            )
            for each in group
        ]
        trainer = starts[0].trainer
        assert isinstance(trainer, VectorisedTrainer)  # noqa: S101 - or it would be alone
        found = trainer.train_at_once(group[0].job.plan, starts)
        return [
            computed((_Computed(each, start.trainer.samples), self._held[begun.device]), begun.job)
            for each, start, begun in zip(found, starts, group, strict=True)
        ]

    def _alone(self, begun: _Begun) -> TrainingResult:
        pair = self._trainers[begun.device], self._held[begun.device]
        return computed(pair, begun.job, self._widths.of(begun.device))


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
