"""The devices and the evaluator of a testbed: what their processes are told."""

from lab.output import Output
from lab.scenario import Scenario

MODULE = "lab.device"


def device(scenario: Scenario, output: Output, index: int, name: str, seconds: float) -> tuple[str, list[str]]:
    """Module and arguments of the process of one device, whose trainings last at least so many seconds."""
    role = ["run", str(output.device(name)), "--min-seconds", f"{seconds:.3f}"]
    return MODULE, [*_member(scenario, output, name, scenario.partition_of(index)), *role]


def evaluator(scenario: Scenario, output: Output, name: str) -> tuple[str, list[str]]:
    """The same of the evaluator."""
    return MODULE, [*_member(scenario, output, name, "all"), "evaluate", str(output.device(name))]


def _member(scenario: Scenario, output: Output, name: str, partition: str) -> list[str]:
    data = [] if scenario.data is None else ["--data", str(scenario.data)]
    identity = [str(output.invitation(name)), str(output.device(name))]
    return ["--task", scenario.task, "--partition", partition, *data, *identity]
