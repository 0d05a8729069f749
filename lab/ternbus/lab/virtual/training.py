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
from ternbus.edge.learn.subnetwork import narrow
from ternbus.edge.learn.task import Task, Trainer, halves_of, trainers_of
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.shell.worker import TrainingResult, train
from ternbus.lab.hostile import HostileTrainer
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


Placing = Callable[[Sequence[Trainer]], Place]
"""Makes a place of the trainers of all devices."""


class InProcess:
    """Training in this process, when the result is requested; the training of a killed device is never computed."""

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self._trainers = trainers

    def begin(self, device: int, job: StartTraining, due_s: float) -> Awaited:  # noqa: ARG002 - as of `Place`
        return partial(computed, self._trainers[device], job)


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


def computed(trainer: Trainer, job: StartTraining) -> TrainingResult:
    """Train with seeded noise: a simulation protects no data, and must be reproducible."""
    return train(trainer, job, RandomSource(np.random.default_rng(job.seed).bytes))
