"""A process that imports the task, so that the lab itself does not import PyTorch.

`python -m ternbus.lab.processes.prepare TASK SEED MODEL.safetensors TASK.json` writes the initial model, and the plan
with the
keys that only the task knows, and the number of parameters.
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


def main() -> None:
    """Write the model and the description of the task."""
    name, seed, model_path, task_path = sys.argv[1:]
    task = load_task(name)
    plan_keys = task_plan(task).keys  # checks the default plan, too
    with explained(name):
        model = task.initial(int(seed))
    save_safetensors(Path(model_path), model, {})
    facts = {
        "plan": dict(task.default_plan),
        "plan_keys": plan_keys,
        "parameters": sum(tensor.size for tensor in model.values()),
    }
    write_text(Path(task_path), json.dumps(facts))


if __name__ == "__main__":
    try:
        main()
    except FederationError as error:
        text, code = complaint(error) or (str(error), EXIT_FAILED)
        sys.stderr.write(f"ternbus: {text}\n")
        sys.exit(code)
