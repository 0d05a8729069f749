"""A scikit-learn classifier as a task, for devices without torch.

    python examples/sklearn_task.py
    ternbus lab run --task examples/sklearn_task.py:TASK
    ternbus aggregator export home model.safetensors
    python examples/sklearn_task.py model.safetensors

The last command tests the model that the federation made.
"""

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file
from sklearn.linear_model import SGDClassifier

from ternbus.edge import FloatArray
from ternbus.edge.adapters import SklearnTask
from ternbus.edge.tasks.digits_data import load


def data(folder: Path | None, split: str) -> tuple[FloatArray, npt.NDArray[np.int64]]:  # noqa: ARG001 - in the package
    return load("test" if split == "test" else "train")


TASK = SklearnTask(
    name="digits-sgd",
    estimator=SGDClassifier(loss="log_loss", learning_rate="constant", eta0=0.05),
    data=data,
    features=64,
    classes=range(10),
    default_plan={"local_epochs": 2},
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Test a model that a federation made, or train one here.")
    parser.add_argument("model", metavar="model.safetensors", nargs="?", type=Path)
    if (model := parser.parse_args().model) is not None:
        classifier = TASK.fitted(load_file(model))
    else:
        classifier = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=0.05).fit(*data(None, "train"))
    print(f"accuracy {classifier.score(*data(None, 'test')):.3f}")
