"""Alice and Bob train one model and keep their data, as with SecretFlow: python examples/from_secretflow.py.

docs/coming-from.md has the same in SecretFlow's words.
"""

import argparse

from torch import nn

from ternbus.edge.tasks.digits_data import load
from ternbus.lab import Federation

argparse.ArgumentParser(description=__doc__).parse_args()

images, labels = load("train")
fed = Federation(
    model=lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
    clients={"alice": (images[::2], labels[::2]), "bob": (images[1::2], labels[1::2])},
    test=load("test"),
)

run = fed.simulate(versions=20)
print(f"accuracy {run.metrics['accuracy']:.3f}")
