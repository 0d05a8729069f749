"""Where simulated devices train: in the simulation's own process, or in several, to use more than one processor.

A training begins when its device begins it and is waited for when, in virtual time, it ends; in between other devices
train. What comes of it is the same, bit for bit, however many processes there are.
"""

import multiprocessing
import os
import signal
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
from ternbus.edge.learn.loader import absolute, load_task
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.learn.subnetwork import narrow
from ternbus.edge.learn.task import Task, Trainer, halves_of, trainers_of
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.shell.worker import TrainingResult, train
from ternbus.lab.hostile import HostileTrainer
from ternbus.lab.scenario.scenario import Scenario

Awaited = Callable[[], TrainingResult]
"""Gives what came of a training; it may take as long as the training."""

Pair = tuple[Trainer, Trainer | None]
"""A device's own data, and apart from them what it holds out."""

SAFE_PATH: Final = "PYTHONSAFEPATH"

_trainers: list[Trainer] = []  # of this process, if it is a worker


class Place(Protocol):
    """Where devices, numbered from 0, train."""

    def begin(self, device: int, job: StartTraining) -> Awaited: ...


class InProcess:
    """In this process, and only when the result is asked for: what a kill would lose is not computed at all."""

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self._trainers = trainers

    def begin(self, device: int, job: StartTraining) -> Awaited:
        return partial(_train, self._trainers[device], job)


class Workers:
    """In so many processes, each with every device's data. The task is made anew there, by its name in the scenario."""

    def __init__(self, scenario: Scenario, count: int) -> None:
        self._others = set(multiprocessing.active_children())
        scenario = replace(scenario, task=absolute(scenario.task))
        with _safe_path():
            self._pool = ProcessPoolExecutor(
                count,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin_worker,
                initargs=(os.getpid(), scenario),
            )

    def begin(self, device: int, job: StartTraining) -> Awaited:
        """Start it as soon as a process is free. Raises `FederationError`, as what it gives does, if one has died."""
        with _in_words(), _safe_path():
            return partial(_result, self._pool.submit(_train_in_worker, device, job))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nobody waits for trainings whose results are not wanted any more."""
        mine = set(multiprocessing.active_children()) - self._others
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in mine:
            process.terminate()


def _result(future: Future[TrainingResult]) -> TrainingResult:
    with _in_words():
        return future.result()


@contextmanager
def _safe_path() -> Iterator[None]:
    """A Python that starts meanwhile looks for modules neither in the current folder, as with -P, nor in the task's.

    It adds the latter itself, with the rule of `task_folder`, when it loads the task.
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
def _in_words() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise FederationError(
            "a process that trains for the devices has ended, perhaps for want of memory: fewer --jobs take less"
        ) from None


def pairs(scenario: Scenario, task: Task, model: Tensors) -> list[Pair]:
    """Every device's; hostile devices hold nothing out."""
    partitions = [scenario.partition_of(index) for index in range(scenario.devices)]
    behaviours, share = scenario.behaviours, scenario.local.hold_out
    made: dict[int, Pair] = {}
    for width in sorted(set(scenario.widths)):  # those of a width share a model
        trained = narrow(task, width)
        chosen = [index for index in range(scenario.devices) if scenario.widths[index] == width]
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


def _train(trainer: Trainer, job: StartTraining) -> TrainingResult:
    """Nobody's data are at stake, and the same scenario is to give the same report: the noise has a seed here."""
    return train(trainer, job, RandomSource(np.random.default_rng(job.seed).bytes))


def _begin_worker(parent: int, scenario: Scenario) -> None:
    """In a new process."""
    os.environ.pop(SAFE_PATH, None)  # what the task may start is its own business
    parent_death.tie(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C is the simulation's, which ends this one
    task = load_task(scenario.task)
    _trainers.extend(trainer for trainer, _ in pairs(scenario, task, task.initial(scenario.seed)))


def _train_in_worker(device: int, job: StartTraining) -> TrainingResult:
    return _train(_trainers[device], job)
