"""CIFAR-10 with a network of two convolutions: conv 64 → conv 128 → fully connected 512, batch norm, dropout."""

from torch import nn

from ternbus.edge.learn.subnetwork import channels
from ternbus.edge.tasks import cifar10_data
from ternbus.edge.torch.torch_task import TorchTask


def model(width: float = 1.0) -> nn.Module:
    """4.3 million parameters, most of them in the first fully connected layer; takes [samples, 3, 32, 32] in 0…1."""
    first, second, units = channels(64, width), channels(128, width), channels(512, width)
    return nn.Sequential(
        cifar10_data.normalize(),
        nn.Conv2d(3, first, 3, padding=1),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 3, padding=1),
        nn.BatchNorm2d(second),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(second * 8 * 8, units),
        nn.BatchNorm1d(units),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(units, cifar10_data.CLASSES),
    )


TASK = TorchTask(
    name="cifar10-cnn",
    model=model,
    narrow=model,
    data=cifar10_data.data,
    augment=cifar10_data.crop_and_flip,
    default_plan={"local_epochs": 1, "batch_size": 64, "learning_rate": 0.03, "momentum": 0.9, "weight_decay": 5e-4},
)
