"""Simulated devices that train in worker processes: the same model, and no process is left behind."""

import io
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stranger.servers import until
from ternbus.broker.errors import FederationError
from ternbus.broker.protocol.schema import Schema, to_vector
from ternbus.edge.core.actions import StartTraining
from ternbus.edge.core.events import TrainingFinished
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.plan import Plan
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario.scenario import End, Hostile, Scenario, Speeds
from ternbus.lab.virtual.memory_ledger import MemoryLedger
from ternbus.lab.virtual.simulate import Simulation
from ternbus.lab.virtual.workers import Workers

pytestmark = pytest.mark.slow

SMALL = Scenario(
    task="digits-numpy",
    devices=5,
    speeds=Speeds(sigma=0.8, median_s=10.0),
    hostile=(Hostile(kind="label-flip", share=0.2),),
    aggregator={"merge.buffer_size": 2},
    end=End(versions=4),
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
    """Of all versions, with what they were evaluated to."""
    simulation = Simulation(wanted, load_task(wanted.task), Lines(io.StringIO()), place=workers, later=later)
    simulation.run()
    assert isinstance(simulation.ledger, MemoryLedger)
    return simulation.ledger.digests, simulation.report(0.0)["versions"]


def job_of(seed: int) -> StartTraining:
    task = load_task(SMALL.task)
    model = task.initial(0)
    schema = Schema.of({name: tensor.shape for name, tensor in model.items()})
    plan = Plan.from_meta(task.default_plan)
    return StartTraining(base=0, schema=schema, vector=to_vector(schema, model), residual=None, plan=plan, seed=seed)


def test_processes_make_the_same_model_and_end() -> None:
    others = set(multiprocessing.active_children())
    with Workers(SMALL, 2) as workers:
        found = digests(workers)
        processes = set(multiprocessing.active_children()) - others
        assert len(processes) == 2
    until(lambda: not any(exists(process.pid or 0) for process in processes), 60.0, "they do not end")
    assert found == digests(None)
    with Workers(SMALL, 2) as workers:
        assert digests(workers, later=True) == found
    assert found != digests(None, replace(SMALL, seed=1))


@pytest.mark.parametrize(("sync", "order"), [(False, [0, 1, 4, 3, 2]), (True, [0, 1, 2, 3, 4])])
def test_what_is_due_first_is_computed_first(sync: bool, order: list[int]) -> None:
    """The first two go to the process at once. Behind a barrier all are due together, and none's length is known."""
    ended: list[int] = []
    with Workers(replace(SMALL, sync=sync), 1) as workers:
        awaited = [workers.begin(device, job_of(device), 9.0 - device) for device in range(SMALL.devices)]
        for device, each in enumerate(awaited):
            each.args[0].add_done_callback(lambda _, device=device: ended.append(device))  # type: ignore[attr-defined]
        results = [each() for each in awaited]
    assert all(isinstance(result, TrainingFinished) for result in results)
    assert ended == order


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
