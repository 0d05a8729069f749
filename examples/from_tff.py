"""Five clients and ten rounds, as in TensorFlow Federated's first tutorial: python examples/from_tff.py [--data DIR].

DIR has MNIST with its writers, as the task mnist-by-writer takes it; without it the digits of the package are divided.
docs/coming-from.md has the same in TensorFlow Federated's words.
"""

import argparse
from pathlib import Path

import numpy as np
from torch import nn

from ternbus.edge.tasks import digits, mnist_by_writer
from ternbus.lab import Federation

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--data", metavar="DIR", type=Path)
folder = parser.parse_args().data

source = digits if folder is None else mnist_by_writer
images, labels = source.data(folder, "train")
writers = np.arange(len(labels)) % 5 if folder is None else mnist_by_writer.owners(folder)

fed = Federation(
    model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 10)),
    clients={f"client-{number}": (images[writers == number], labels[writers == number]) for number in range(5)},
    test=source.data(folder, "test"),
    plan={"local_epochs": 5, "batch_size": 20, "learning_rate": 0.02},
)

run = fed.simulate(versions=10, sync=True)
print(f"accuracy {run.metrics['accuracy']:.3f}")
