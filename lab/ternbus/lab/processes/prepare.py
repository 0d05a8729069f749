"""A process that imports the task, so that the lab itself does not import PyTorch.

`python -m ternbus.lab.processes.prepare SCENARIO MODEL.safetensors TASK.json` takes the keys of a scenario that its
data can decide, in JSON. It writes the initial model; and the plan and number of parameters of the task, the partition,
the number of devices, and lines that say how these were found; and the names of plan keys that only the task knows.
"""

import json
import sys
from pathlib import Path

from ternbus.broker.complaint import complaint
from ternbus.broker.errors import FederationError
from ternbus.broker.exit_codes import EXIT_FAILED
from ternbus.broker.files import write_text
from ternbus.broker.model_files import save_safetensors
from ternbus.edge.learn.failure import explained
from ternbus.edge.learn.task import task_plan
from ternbus.edge.learn.task_loader import load_task
from ternbus.lab.scenario.resolve import resolved
from ternbus.lab.scenario.scenario import Scenario


def main() -> None:
    """Write the model and the description of the task."""
    wanted, model_path, task_path = sys.argv[1:]
    given = json.loads(wanted)
    data = given.pop("data")
    scenario = Scenario(**given, data=None if data is None else Path(data))
    task = load_task(scenario.task)
    plan_keys = task_plan(task).keys  # checks the default plan, too
    with explained(scenario.task, lacks_data=scenario.data is None):
        model = task.initial(scenario.seed)
        found = resolved(scenario, task)
    save_safetensors(Path(model_path), model, {})
    facts = {
        "plan": dict(task.default_plan),
        "plan_keys": plan_keys,
        "parameters": sum(tensor.size for tensor in model.values()),
        "partition": found.scenario.partition,
        "devices": found.scenario.devices,
        "lines": [*found.lines],
    }
    write_text(Path(task_path), json.dumps(facts))


if __name__ == "__main__":
    try:
        main()
    except FederationError as error:
        text, code = complaint(error) or (str(error), EXIT_FAILED)
        sys.stderr.write(f"ternbus: {text}\n")
        sys.exit(code)
