"""Training of simulated devices in several worker processes of this machine."""

import heapq
import itertools
import math
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from types import TracebackType
from typing import Final, Self, TypeVar

from ternbus.broker.errors import FederationError
from ternbus.broker.kept_memory import keep_freed
from ternbus.broker.server import parent_death
from ternbus.edge.core.actions import StartTraining
from ternbus.edge.core.events import TrainingFinished
from ternbus.edge.learn import task_folder
from ternbus.edge.learn.task import Task
from ternbus.edge.learn.task_loader import absolute, code_errors, load_task
from ternbus.edge.shell.worker import TrainingResult
from ternbus.lab.interrupts import without_interrupts
from ternbus.lab.scenario.scenario import Scenario
from ternbus.lab.virtual.training import Awaited, Pair, Widths, computed, loaded
from ternbus.lab.virtual.vectorised import Training, each_at_once

Result = TypeVar("Result")
SAFE_PATH: Final = "PYTHONSAFEPATH"
KEPT_BYTES: Final = 2**30


class Processes:
    """``count`` processes, each of which loads the scenario's task and the data of all devices, at once."""

    def __init__(self, scenario: Scenario, count: int, load: Callable[[], Task] | None = None) -> None:
        self._others = set(multiprocessing.active_children())
        if load is None:
            scenario = replace(scenario, task=absolute(scenario.task))
        with _safe_path():
            # Made first: it starts a process of multiprocessing's own, and that start lifts the block of interrupts.
            self._pool = ProcessPoolExecutor(
                count,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin_worker,
                initargs=(os.getpid(), scenario, load or partial(load_task, scenario.task)),
            )
            with without_interrupts():
                for _ in range(count):  # start them all: they load while this process does
                    self._pool.submit(_prepare)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the processes without waiting for unfinished trainings."""
        for process in set(multiprocessing.active_children()) - self._others:
            process.terminate()
        # Waits for the pool's own thread. At the end of Python it could close a pipe that Python is just writing to.
        self._pool.shutdown(cancel_futures=True)


class Workers(Processes):
    """Training in ``count`` processes, of one device at a time in each; they load task and data at once.

    ``load``, which must travel to a process, takes the place of loading the task by its name.
    """

    def __init__(self, scenario: Scenario, count: int, load: Callable[[], Task] | None = None) -> None:
        super().__init__(scenario, count, load)
        self._queue = _Queue(self._pool, count)
        self._sync = scenario.sync

    def begin(self, device: int, job: StartTraining, due_s: float) -> Awaited:
        """Queue a training. The returned function raises `FederationError` if a process has died."""
        # All that wait for one barrier are due together.
        return partial(_result, self._queue.add(device, job, job.base if self._sync else due_s))


class GroupWorkers(Processes):
    """Processes that train parts of a group of devices, each part at once; see `Vectorised`."""

    def __init__(self, scenario: Scenario, count: int, load: Callable[[], Task] | None = None) -> None:
        super().__init__(scenario, count, load)
        self.count = count

    def begin(self, groups: Sequence[Sequence[Training]]) -> Callable[[], list[TrainingResult]]:
        """Begin to train them; the returned function waits. Both raise `FederationError` if a process has died."""
        with _readable_errors():
            return partial(_result, self._pool.submit(_train_groups_in_worker, groups))


class _Queue:
    """Trainings that wait for a process. What is due first goes first; of what is due at one time, the longest.

    So no process computes what may be lost before it is due, while another training is awaited. And where a barrier
    has all of them due together, no long one is left for the end, with the other processes idle. One more than there
    are processes has gone already, so that none waits for this one.
    """

    def __init__(self, pool: Executor, processes: int) -> None:
        self._pool = pool
        self._free = processes + 1
        self._lock = threading.Lock()  # a thread of the pool says that a training is done
        self._waiting: list[tuple[float, float, int, int, StartTraining, Future[TrainingResult]]] = []
        self._order = itertools.count()
        self._seconds: dict[int, float] = {}  # of the last training of each device

    def add(self, device: int, job: StartTraining, due_s: float) -> Future[TrainingResult]:
        result: Future[TrainingResult] = Future()
        with self._lock:
            longest = -self._seconds.get(device, math.inf)
            heapq.heappush(self._waiting, (due_s, longest, next(self._order), device, job, result))
        self._send()
        return result

    def _send(self) -> None:
        while True:
            with self._lock:
                if not self._free or not self._waiting:
                    return
                self._free -= 1
                *_, device, job, result = heapq.heappop(self._waiting)
            try:
                sent = self._pool.submit(_train_in_worker, device, job)
            except RuntimeError as error:  # a process has died, or all of them are ended
                with self._lock:
                    self._free += 1
                result.set_exception(error)
            else:
                sent.add_done_callback(partial(self._done, device, result))

    def _done(self, device: int, result: Future[TrainingResult], sent: Future[TrainingResult]) -> None:
        error = CancelledError() if sent.cancelled() else sent.exception()
        if isinstance(error, BrokenProcessPool | CancelledError):  # the pool takes no more, and may hold its lock
            with self._lock:
                self._free += 1  # what comes later is sent, and fails as soon
                lost, self._waiting = [*self._waiting], []
            for future in (result, *(each[-1] for each in lost)):
                future.set_exception(error)
            return
        if error is not None:
            result.set_exception(error)
        else:
            found = sent.result()
            if isinstance(found, TrainingFinished):
                self._seconds[device] = found.metrics.get("seconds", math.inf)
            result.set_result(found)
        with self._lock:
            self._free += 1
        self._send()


def _result(future: Future[Result]) -> Result:
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


_given: list[tuple[Scenario, Callable[[], Task]]] = []  # in a worker process: what it was started with


def _begin_worker(parent: int, scenario: Scenario, load: Callable[[], Task]) -> None:
    """Tie a worker process to its parent."""
    os.environ.pop(SAFE_PATH, None)  # must not affect processes that the task may start
    parent_death.tie(parent)
    keep_freed(KEPT_BYTES, KEPT_BYTES)
    _given.append((scenario, load))


@cache
def _loaded() -> tuple[list[Pair], Widths]:
    """The trainers of all devices, and those of sub-networks, in a worker process."""
    scenario, load = _given[0]
    return loaded(scenario, load())


def _prepare() -> None:
    """Load ahead. What fails is not said twice: the simulation loads the same, and so does the first training."""
    with suppress(*code_errors()):
        _loaded()


def _train_in_worker(device: int, job: StartTraining) -> TrainingResult:
    own, widths = _loaded()
    return computed(own[device], job, widths.of(device))


def _train_groups_in_worker(groups: Sequence[Sequence[Training]]) -> list[TrainingResult]:
    own, _ = _loaded()
    return each_at_once(own, groups)
