"""The command-line arguments for the processes of a testbed: of devices, of the evaluator, and to prepare the task."""

import json
from collections.abc import Sequence
from typing import Final

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.task_loader import absolute
from ternbus.lab.report.output import Output
from ternbus.lab.scenario.scenario import Scenario

MODULE = "ternbus.lab.processes.device"
DEVICES_MAX: Final = 1000  # each is a process


def check(scenario: Scenario) -> None:
    """Raise `ConfigError` for a scenario that only a simulation can run."""
    if scenario.devices > DEVICES_MAX:
        raise ConfigError(
            f"devices = {scenario.devices}: `lab run` starts a process for each, at most {DEVICES_MAX}; use "
            "`ternbus lab simulate`, or fewer devices"
        )
    if not scenario.availability.is_always:
        raise ConfigError("[availability] is for `ternbus lab simulate`, whose time is virtual: remove it")


def device(
    scenario: Scenario, output: Output, index: int, name: str, seconds: float, *, helpers: Sequence[str] = ()
) -> tuple[str, list[str]]:
    """Module and arguments for the process of one device; each training lasts at least ``seconds``.

    ``helpers`` are the keys of those of private sums that it pins, as hex digits.
    """
    role = ["run", str(output.device(name)), "--min-seconds", f"{seconds:.3f}"]
    pins = [argument for key in helpers for argument in ("--helper", key)]
    about = scenario.private
    pins += [] if about is None else ["--private-min", str(about.min), "--private-kind", about.kind]
    behaviour, local = scenario.behaviours.get(index), scenario.local
    if behaviour is not None:
        return MODULE, [
            *pins,
            *_member(scenario, output, name, behaviour.spec(absolute(scenario.task)), scenario.partition_of(index)),
            *role,
        ]
    width = scenario.widths[index]
    held = ["--hold-out", repr(local.hold_out)] if local.hold_out else []
    held += ["--width", repr(width)] if width < 1 else []
    role += ["--report-metrics"] if local.hold_out else []
    role += ["--fine-tune", repr(local.fine_tune)] if local.fine_tune else []
    return MODULE, [
        *held,
        *pins,
        *_member(scenario, output, name, absolute(scenario.task), scenario.partition_of(index)),
        *role,
    ]


def evaluator(scenario: Scenario, output: Output, name: str) -> tuple[str, list[str]]:
    """Module and arguments for the process of the evaluator."""
    return MODULE, [
        *_member(scenario, output, name, absolute(scenario.task), "all"),
        "evaluate",
        str(output.device(name)),
    ]


def prepare(scenario: Scenario, output: Output) -> list[str]:
    """Arguments for the process that imports the task before all others."""
    given = {
        "task": absolute(scenario.task),
        "seed": scenario.seed,
        "devices": scenario.devices,
        "partition": scenario.partition,
        "data": None if scenario.data is None else str(scenario.data),
    }
    return [json.dumps(given), str(output.initial), str(output.task)]


def helper_init(scenario: Scenario, output: Output, name: str, federation: str, broker: str) -> list[str]:
    """Arguments of `ternbus` that make a helper."""
    about = scenario.private
    least = [] if about is None else ["--min", str(about.min), "--private-kind", about.kind]
    folder = str(output.helper(name))
    return ["helper", "init", folder, "--federation", federation, "--broker", broker, "--name", name, *least]


def _member(scenario: Scenario, output: Output, name: str, task: str, partition: str) -> list[str]:
    data = [] if scenario.data is None else ["--data", str(scenario.data)]
    identity = [str(output.invitation(name)), str(output.device(name))]
    plan = ["--plan", json.dumps(scenario.chosen_plan)] if scenario.chosen_plan else []
    return ["--task", task, "--partition", partition, "--seed", str(scenario.seed), *plan, *data, *identity]
