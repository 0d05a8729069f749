"""A process that imports the task, so that the lab itself does not import PyTorch.

`python -m ternbus.lab.processes.prepare SCENARIO MODEL.safetensors TASK.json` takes the keys of a scenario that its
data can decide, in JSON. It writes the initial model; and the plan and number of parameters of the task, the partition,
the number of devices, and lines that say how these were found; and the names of plan keys that only the task knows.
"""

import json
import sys
from pathlib import Path

from ternbus.broker.complaint import end_in_words
from ternbus.broker.files import write_text
from ternbus.broker.model_files import save_safetensors
from ternbus.edge.learn.failure import explained
from ternbus.edge.learn.kinds import local_notice, tensor_kinds
from ternbus.edge.learn.task import initial_of, task_plan
from ternbus.edge.learn.task_loader import load_task
from ternbus.lab.report.partition_table import classes_of
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
        model = initial_of(task, scenario.seed)
        kinds = tensor_kinds(task, model)
        found = resolved(scenario, task)
        classes = classes_of(found)
    save_safetensors(Path(model_path), model, kinds.metadata())
    facts = {
        "plan": dict(task.default_plan),
        "plan_keys": plan_keys,
        "parameters": sum(tensor.size for tensor in model.values()),
        "partition": found.scenario.partition,
        "devices": found.scenario.devices,
        "classes": classes,
        "lines": [*found.lines, *filter(None, [local_notice(task)])],
    }
    write_text(Path(task_path), json.dumps(facts))


if __name__ == "__main__":
    end_in_words(main)
