"""A small convolutional network for images of 28 by 28, shared by three tasks."""

from torch import nn

from ternbus.edge.learn.subnetwork import channels


def two_convolutions(first: int, second: int, units: int, classes: int, width: float) -> nn.Module:
    """Two convolutions and two fully connected layers; takes [samples, 1, 28, 28] in 0…1.

    ``first`` and ``second`` are the numbers of channels, ``units`` is that of the hidden layer, all times ``width``.
    """
    first, second, units = channels(first, width), channels(second, width), channels(units, width)
    return nn.Sequential(
        nn.Conv2d(1, first, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(second * 7 * 7, units),
        nn.ReLU(),
        nn.Linear(units, classes),
    )
