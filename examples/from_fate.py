"""Ten parties, a CNN with batch norm, crops and flips, as FATE's homo NN: python examples/from_fate.py [--data DIR].

DIR has CIFAR-10, as the task cifar10-cnn takes it; without it the digits of the package are divided.
docs/coming-from.md has the same in FATE's words.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ternbus.edge import per_sample
from ternbus.edge.tasks import cifar10_cnn, digits
from ternbus.lab import Federation, iid

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", metavar="DIR", type=Path)
folder = parser.parse_args().data

task = digits.TASK if folder is None else cifar10_cnn.TASK
channels, size, edge = (1, 8, 1) if folder is None else (3, 32, 4)


def block(inputs: int, outputs: int) -> nn.Module:
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))


def model() -> nn.Module:
    return nn.Sequential(block(channels, 16), block(16, 32), nn.Flatten(), nn.Linear(32 * (size // 4) ** 2, 10))


def crop_and_flip(image: Tensor) -> Tensor:
    top, left = torch.randint(2 * edge + 1, (2,)).tolist()
    moved = functional.pad(image, [edge] * 4)[:, top : top + size, left : left + size]
    return moved.flip(2) if torch.rand(()) < 0.5 else moved


fed = Federation(
    model=model,
    data=task.data(folder, "train"),
    partition=iid(10),
    test=task.data(folder, "test"),
    augment=per_sample(crop_and_flip),
    plan={"local_epochs": 2, "learning_rate": 0.05},
)

run = fed.simulate(versions=12, sync=True)
print(f"accuracy {run.metrics['accuracy']:.3f}")
