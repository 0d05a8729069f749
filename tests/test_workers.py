"""Simulated devices that train in worker processes: the same model, and no process is left behind."""

import io
import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stranger.servers import until
from support.core_device import trained
from ternbus.broker.errors import FederationError
from ternbus.broker.protocol.schema import Schema, to_vector
from ternbus.edge.core.actions import StartTraining
from ternbus.edge.core.events import TrainingFinished
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.plan import Plan
from ternbus.edge.shell.worker import TrainingResult
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario.scenario import End, Hostile, Scenario, Speeds
from ternbus.lab.virtual.memory_ledger import MemoryLedger
from ternbus.lab.virtual.simulate import Simulation
from ternbus.lab.virtual.workers import GroupWorkers, Workers, _Queue

SMALL = Scenario(
    task="digits-numpy",
    devices=5,
    speeds=Speeds(sigma=0.8, median_s=10.0),
    hostile=(Hostile(kind="label-flip", share=0.2),),
    aggregator={"merge.buffer_size": 2},
    end=End(versions=4),
)
OF_WIDTHS = replace(
    SMALL,
    devices=7,
    hostile=(),
    speeds=Speeds(sigma=0.0, median_s=10.0),  # so several versions are made while no training is awaited
    aggregator={"merge.buffer_size": 1, "search.arms": [{"width": 0.25}, {"width": 1.0}], "search.budget": 2},
    end=End(versions=20),
)


def exists(pid: int) -> bool:
    """Not `Process.is_alive`: the pool's own thread waits for it too, and only one of two hears of its end."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def has_numpy(pid: str) -> bool:
    """Whether a process has loaded numpy; False for one that has ended."""
    try:
        return "_multiarray_umath" in Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return False


def digests(workers: Workers | None, wanted: Scenario = SMALL, *, later: bool = False) -> object:
    """Of all versions, with what they were evaluated to, and what a search has found."""
    simulation = Simulation(wanted, load_task(wanted.task), Lines(io.StringIO()), place=workers, later=later)
    simulation.run()
    assert isinstance(simulation.ledger, MemoryLedger)
    report = simulation.report(0.0)
    return simulation.ledger.digests, report["versions"], report.get("search")


def job_of(seed: int) -> StartTraining:
    task = load_task(SMALL.task)
    model = task.initial(0)
    schema = Schema.of({name: tensor.shape for name, tensor in model.items()})
    plan = Plan.from_meta(task.default_plan)
    return StartTraining(base=0, schema=schema, vector=to_vector(schema, model), residual=None, plan=plan, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [SMALL, OF_WIDTHS], ids=["one plan", "a search of widths"])
def test_processes_make_the_same_model_and_end(wanted: Scenario) -> None:
    others = set(multiprocessing.active_children())
    with Workers(wanted, 2) as workers:
        found = digests(workers, wanted)
        processes = set(multiprocessing.active_children()) - others
        assert len(processes) == 2
    until(lambda: not any(exists(process.pid or 0) for process in processes), 60.0, "they do not end")
    assert found == digests(None, wanted)
    with Workers(wanted, 2) as workers:
        assert digests(workers, wanted, later=True) == found
    assert found != digests(None, replace(wanted, seed=1))


class Pool(Executor):
    """A pool whose trainings end when the test says so; a broken one takes no more."""

    def __init__(self) -> None:
        self.begun: dict[int, Future[Any]] = {}  # by device
        self.is_broken = False

    def submit(self, _: Any, /, *arguments: Any, **__: Any) -> Future[Any]:
        if self.is_broken:
            raise BrokenProcessPool("a process died")
        return self.begun.setdefault(arguments[0], Future())

    def end(self, device: int, seconds: float = 1.0) -> None:
        self.begun.pop(device).set_result(replace(trained(job_of(device)), metrics={"seconds": seconds}))


def begin(queue: _Queue, *due_s: float) -> list[Future[TrainingResult]]:
    """Of each device a training, that is due then."""
    return [queue.add(device, job_of(device), due) for device, due in enumerate(due_s)]


def test_what_is_due_first_is_computed_first() -> None:
    """Two go to the one process at once: one is computed, one waits there."""
    pool = Pool()
    results = begin(_Queue(pool, 1), 9.0, 8.0, 7.0, 6.0, 5.0)
    order = []
    for device in (0, 1, 4, 3, 2):
        order.append([*pool.begun])
        pool.end(device)
    assert order == [[0, 1], [1, 4], [4, 3], [3, 2], [2]]
    assert all(isinstance(each.result(0), TrainingFinished) for each in results)


def test_of_what_is_due_together_the_longest_is_computed_first() -> None:
    """One whose length nobody knows counts as the longest."""
    pool = Pool()
    queue = _Queue(pool, 1)
    begin(queue, 0.0, 0.0, 0.0, 0.0)
    for device in range(4):
        pool.end(device, seconds=[1.0, 1.0, 2.0, 3.0][device])
    begin(queue, 1.0, 1.0, 1.0, 1.0, 1.0)
    order = [*pool.begun]
    for _ in range(4):
        pool.end(next(iter(pool.begun)))
        order += [device for device in pool.begun if device not in order]
    assert order == [0, 1, 4, 3, 2]


def test_after_a_process_has_died_no_training_waits_for_ever() -> None:
    pool = Pool()
    queue = _Queue(pool, 1)
    before = begin(queue, 0.0, 0.0, 0.0)
    pool.is_broken = True
    for future in pool.begun.values():
        future.set_exception(BrokenProcessPool("a process died"))
    after = begin(queue, 1.0, 1.0, 1.0)
    for result in (*before, *after):
        assert isinstance(result.exception(0), BrokenProcessPool)


@pytest.mark.slow
def test_a_process_that_is_killed_is_said_in_words() -> None:
    others = set(multiprocessing.active_children())
    with Workers(SMALL, 1) as workers:
        simulation = Simulation(SMALL, load_task(SMALL.task), Lines(io.StringIO()), place=workers)

        def kill() -> None:
            if simulation.aggregator.core.model.version == 1:
                for process in set(multiprocessing.active_children()) - others:
                    os.kill(process.pid or 0, signal.SIGKILL)

        with pytest.raises(FederationError, match="fewer --jobs"):
            simulation.run(kill)


@pytest.mark.slow
def test_a_group_whose_process_is_killed_is_said_in_words() -> None:
    others = set(multiprocessing.active_children())
    with GroupWorkers(SMALL, 1) as workers:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
            process.join()
        for _ in range(2):  # where its end is seen, and after that
            with pytest.raises(FederationError, match="a worker process has ended unexpectedly"):
                workers.begin([[(0, job_of(0))]])()


@pytest.mark.slow
def test_ctrl_c_while_they_start_leaves_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ternbus", "lab", "simulate", "--task", "digits-numpy", "--jobs", "2"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, process_group=0) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        try:
            until(lambda: any(map(has_numpy, children.read_text().split())), 60.0, "a worker imports its modules")
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of its processes
            printed = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 130
    assert printed == "ternbus: stopped by Ctrl-C; no report was written\n"
