"""The digits with a small convolutional network in PyTorch (about 40,000 parameters): the task of the demo."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ternbus.edge.learn.subnetwork import channels
from ternbus.edge.tasks import digits_data
from ternbus.edge.torch.torch_task import Split, TorchTask


def model(width: float = 1.0) -> nn.Module:
    """Two convolutions and two fully connected layers, 38,538 parameters; takes [samples, 1, 8, 8] in 0…1."""
    first, second, units = channels(16, width), channels(32, width), channels(64, width)
    return nn.Sequential(
        nn.Conv2d(1, first, 5, padding=2),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),  # half a point of test accuracy with devices' small, uneven parts
        nn.Linear(second * 4 * 4, units),
        nn.ReLU(),
        nn.Linear(units, digits_data.CLASSES),
    )


def data(folder: Path | None, split: Split) -> tuple[Tensor, Tensor]:  # noqa: ARG001 - of every task
    """The data in the package; the folder is ignored."""
    images, labels = digits_data.load(split)
    return torch.from_numpy(images).reshape(-1, 1, 8, 8), torch.from_numpy(labels)


TASK = TorchTask(
    name="digits",
    model=model,
    narrow=model,
    data=data,
    default_plan={"local_epochs": 6, "batch_size": 16, "learning_rate": 0.03, "momentum": 0.9},
)
