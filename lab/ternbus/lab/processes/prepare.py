"""A process that imports the task, so that the lab itself does not import PyTorch.

`python -m ternbus.lab.processes.prepare TASK SEED MODEL.safetensors TASK.json` writes the initial model, and the plan
and number of parameters of the task.
"""

import json
import sys
from pathlib import Path

from ternbus.broker.complaint import end_in_words
from ternbus.broker.files import write_text
from ternbus.broker.model_files import save_safetensors
from ternbus.edge.learn.failure import explained
from ternbus.edge.learn.task import initial_of
from ternbus.edge.learn.task_loader import load_task


def main() -> None:
    """Write the model and the description of the task."""
    name, seed, model_path, task_path = sys.argv[1:]
    task = load_task(name)
    with explained(name):
        model = initial_of(task, int(seed))
    save_safetensors(Path(model_path), model, {})
    facts = {"plan": dict(task.default_plan), "parameters": sum(tensor.size for tensor in model.values())}
    write_text(Path(task_path), json.dumps(facts))


if __name__ == "__main__":
    end_in_words(main)
