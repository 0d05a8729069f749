"""The digits with a small multilayer perceptron in PyTorch: the model and the plan of `digits-numpy`."""

from torch import nn

from ternbus.edge import TorchTask
from ternbus.edge.tasks import digits, digits_data, digits_numpy


def model() -> nn.Module:
    """64 pixels → 128 hidden units with ReLU → 10 classes, 9,610 parameters."""
    hidden = digits_numpy.HIDDEN
    return nn.Sequential(
        nn.Flatten(), nn.Linear(digits_data.PIXELS, hidden), nn.ReLU(), nn.Linear(hidden, digits_data.CLASSES)
    )


TASK = TorchTask(name="digits-mlp", model=model, data=digits.data, default_plan=digits_numpy.TASK.default_plan)
