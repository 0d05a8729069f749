"""Where simulated devices train: in this process, or at a `Place` of another module.

A training starts when its device starts it, and its result is awaited at its end in virtual time. Other devices can
train in between. The results are the same, bit for bit, wherever they are computed by `computed`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from ternbus.edge.core.actions import StartTraining
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.subnetwork import Narrowed, narrow
from ternbus.edge.learn.task import Task, Trainer, halves_of, trainers_of, training_part
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.shell.worker import TrainingResult, train
from ternbus.lab.hostile import HostileTrainer
from ternbus.lab.scenario.resolve import settled
from ternbus.lab.scenario.scenario import Scenario

Awaited = Callable[[], TrainingResult]
"""A function that waits for a training and returns its result."""

Pair = tuple[Trainer, Trainer | None]
"""(trainer with a device's training data, trainer with its held-out data or None)."""


class Place(Protocol):
    """Where devices train; devices are numbered from 0."""

    def begin(self, device: int, job: StartTraining, due_s: float) -> Awaited:
        """Begin a training that ends at ``due_s`` in virtual time, when its result is awaited unless it is lost."""
        ...


class Widths:
    """Trainers of sub-networks of any width: those of all devices, when the first of them is asked for."""

    def __init__(self, scenario: Scenario, task: Task) -> None:
        self._scenario, self._task = scenario, task
        self._made: dict[float, list[Trainer]] = {}

    def of(self, device: int) -> Narrowed:
        return partial(self._trainer, device)

    def _trainer(self, device: int, width: float) -> Trainer:
        if width not in self._made:
            about, share = self._scenario, self._scenario.local.hold_out
            parts = [training_part(about.partition_of(index), share) for index in range(about.devices)]
            self._made[width] = trainers_of(narrow(self._task, width), about.data, parts)
        return self._made[width][device]


Placing = Callable[[Sequence[Pair], Widths], Place]
"""Makes a place of the trainers of all devices, and those of sub-networks."""


class InProcess:
    """Training in this process, when the result is requested; the training of a killed device is never computed."""

    def __init__(self, pairs: Sequence[Pair], widths: Widths | None = None) -> None:
        self._pairs, self._widths = pairs, widths

    def begin(self, device: int, job: StartTraining, due_s: float) -> Awaited:  # noqa: ARG002 - as of `Place`
        narrowed = None if self._widths is None else self._widths.of(device)
        return partial(computed, self._pairs[device], job, narrowed)


def pairs(scenario: Scenario, task: Task, model: Tensors) -> list[Pair]:
    """The trainers of every device; hostile devices hold no data out."""
    partitions = [scenario.partition_of(index) for index in range(scenario.devices)]
    behaviours, widths, share = scenario.behaviours, scenario.widths, scenario.local.hold_out
    made: dict[int, Pair] = {}
    for width in sorted(set(widths)):  # devices of equal width share a model
        trained = narrow(task, width)
        chosen = [index for index in range(scenario.devices) if widths[index] == width]
        parts = [partitions[index] for index in chosen]
        if share:
            tried_by = None if trained is task else task
            made |= zip(chosen, halves_of(trained, scenario.data, parts, share, tried_by), strict=True)
        else:
            made |= zip(
                chosen, ((trainer, None) for trainer in trainers_of(trained, scenario.data, parts)), strict=True
            )
    return [
        (HostileTrainer(trainer, behaviours[index], tuple(model)), None) if index in behaviours else (trainer, held)
        for index, (trainer, held) in sorted(made.items())
    ]


def loaded(scenario: Scenario, task: Task) -> tuple[list[Pair], Widths]:
    """The trainers of all devices, and those of sub-networks, of a scenario that its data may still have to settle."""
    found = settled(scenario, task).scenario
    return pairs(found, task, task.initial(found.seed)), Widths(found, task)


def computed(pair: Pair, job: StartTraining, narrowed: Narrowed | None = None) -> TrainingResult:
    """Train with seeded noise: a simulation protects no data, and must be reproducible."""
    trainer, held = pair
    return train(trainer, job, RandomSource(np.random.default_rng(job.seed).bytes), held, narrowed)
