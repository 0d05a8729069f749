"""Training of simulated devices, in this process or in several worker processes.

A training starts when its device starts it, and its result is awaited at its end in virtual time. Other devices can
train in between. The results are the same, bit for bit, for any number of processes.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Final, Protocol, Self

import numpy as np

from ternbus.broker.errors import FederationError
from ternbus.broker.server import parent_death
from ternbus.edge.core.actions import StartTraining
from ternbus.edge.learn import task_folder
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.subnetwork import Narrowed, narrow
from ternbus.edge.learn.task import Task, Trainer, halves_of, trainers_of
from ternbus.edge.learn.task_loader import absolute, load_task
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.shell.worker import TrainingResult, train
from ternbus.lab.hostile import HostileTrainer
from ternbus.lab.interrupts import without_interrupts
from ternbus.lab.scenario.resolve import settled
from ternbus.lab.scenario.scenario import Scenario

Awaited = Callable[[], TrainingResult]
"""A function that waits for a training and returns its result."""

Pair = tuple[Trainer, Trainer | None]
"""(trainer with a device's training data, trainer with its held-out data or None)."""

SAFE_PATH: Final = "PYTHONSAFEPATH"

_pairs: list[Pair] = []  # in a worker process: of all devices
_widths: "list[Widths]" = []  # likewise, one


class Place(Protocol):
    """Where devices train; devices are numbered from 0."""

    def begin(self, device: int, job: StartTraining) -> Awaited: ...


Placing = Callable[[Sequence[Pair]], Place]
"""Makes a place of the trainers of all devices."""


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
            parts = [about.partition_of(index) for index in range(about.devices)]
            parts = [f"{part};train:{share!r}" for part in parts] if share else parts
            self._made[width] = trainers_of(narrow(self._task, width), about.data, parts)
        return self._made[width][device]


class InProcess:
    """Training in this process, when the result is requested; the training of a killed device is never computed."""

    def __init__(self, pairs: Sequence[Pair], widths: Widths | None = None) -> None:
        self._pairs, self._widths = pairs, widths

    def begin(self, device: int, job: StartTraining) -> Awaited:
        narrowed = None if self._widths is None else self._widths.of(device)
        return partial(_train, self._pairs[device], job, narrowed)


class Workers:
    """Training in ``count`` processes. Each process loads the scenario's task and the data of all devices.

    ``load``, which must travel to a process, takes the place of loading the task by its name.
    """

    def __init__(self, scenario: Scenario, count: int, load: Callable[[], Task] | None = None) -> None:
        self._others = set(multiprocessing.active_children())
        if load is None:
            scenario = replace(scenario, task=absolute(scenario.task))
        with _safe_path():
            self._pool = ProcessPoolExecutor(
                count,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin_worker,
                initargs=(os.getpid(), scenario, load or partial(load_task, scenario.task)),
            )

    def begin(self, device: int, job: StartTraining) -> Awaited:
        """Queue a training for the next free process.

        This call and the returned function raise `FederationError` if a process has died.
        """
        with _readable_errors(), _safe_path(), without_interrupts():
            return partial(_result, self._pool.submit(_train_in_worker, device, job))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes without waiting for unfinished trainings."""
        mine = set(multiprocessing.active_children()) - self._others
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in mine:
            process.terminate()


def _result(future: Future[TrainingResult]) -> TrainingResult:
    with _readable_errors():
        return future.result()


@contextmanager
def _safe_path() -> Iterator[None]:
    """Exclude the current folder and the task's folder from the module path of processes that start in this block.

    As with -P, a worker must not import from the current folder. It adds the task's folder itself by the rule of
    `task_folder` when it loads the task.
    """
    flag, path = os.environ.get(SAFE_PATH), [*sys.path]
    os.environ[SAFE_PATH] = "1"
    sys.path[:] = [entry for entry in path if not task_folder.is_on_path(entry)]
    try:
        yield
    finally:
        sys.path[:] = path
        if flag is None:
            del os.environ[SAFE_PATH]
        else:
            os.environ[SAFE_PATH] = flag


@contextmanager
def _readable_errors() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise FederationError(
            "a worker process has ended unexpectedly, perhaps out of memory: try fewer --jobs"
        ) from None


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


def _train(pair: Pair, job: StartTraining, narrowed: Narrowed | None) -> TrainingResult:
    """Train with seeded noise: a simulation protects no data, and must be reproducible."""
    trainer, held = pair
    return train(trainer, job, RandomSource(np.random.default_rng(job.seed).bytes), held, narrowed)


def _begin_worker(parent: int, scenario: Scenario, load: Callable[[], Task]) -> None:
    """Prepare a worker process: tie it to its parent and load the data of all devices."""
    os.environ.pop(SAFE_PATH, None)  # must not affect processes that the task may start
    parent_death.tie(parent)
    task = load()
    found = settled(scenario, task).scenario
    _pairs.extend(pairs(found, task, task.initial(scenario.seed)))
    _widths.append(Widths(found, task))


def _train_in_worker(device: int, job: StartTraining) -> TrainingResult:
    return _train(_pairs[device], job, _widths[0].of(device))
