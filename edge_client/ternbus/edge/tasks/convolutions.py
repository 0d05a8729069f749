"""The small convolutional network that three tasks on images of 28 by 28 share."""

from torch import nn

from ternbus.edge.learn.subnetwork import channels


def two_convolutions(first: int, second: int, units: int, classes: int, width: float) -> nn.Module:
    """Two convolutions and two fully connected layers; takes [samples, 1, 28, 28] in 0…1.

    ``first`` and ``second`` are the channels, ``units`` the hidden layer; of each the share ``width`` is there.
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
