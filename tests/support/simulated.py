"""A short simulation of a task, in this process."""

import io
from dataclasses import dataclass

from ternbus.broker.protocol.schema import to_tensors
from ternbus.edge.learn.task import Evaluation, Task
from ternbus.edge.plan.tensors import Tensors
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario.scenario import End, Local, Scenario
from ternbus.lab.scenario.simulated import Simulated
from ternbus.lab.virtual.simulate import Simulation


@dataclass(frozen=True, slots=True)
class Result:
    """The last version of the model and what the task's evaluator says of it."""

    tensors: Tensors
    evaluation: Evaluation
    updates: int


def simulated(
    task: Task,
    *,
    devices: int,
    versions: int,
    partition: str = "iid",
    exact: bool = False,
    local: Local | None = None,
    **plan: object,
) -> Result:
    """Simulate the task with these keys of the plan. `exact`: float32 both ways in place of ternary."""
    scenario = Scenario(
        devices=devices,
        partition=partition,
        plan={**plan, **({"codec": "float32"} if exact else {})},
        aggregator={"merge.buffer_size": max(1, devices // 2), **({"downlink.codec": "float32"} if exact else {})},
        end=End(versions=versions),
        local=local or Local(),
        simulate=Simulated(evaluate_every=versions),
    )
    simulation = Simulation(scenario, task, Lines(io.StringIO()))
    simulation.run()
    tensors = to_tensors(simulation.schema, simulation.aggregator.core.model.published)
    return Result(tensors, task.evaluator(data=None).evaluate(tensors), simulation.report(1.0)["updates"])
