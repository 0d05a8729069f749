"""Recognise handwritten digits with PyTorch, on one machine: python examples/plain_torch.py [FOLDER] [EPOCHS].

FOLDER has digits.csv.gz: a row for each image, with 8 x 8 pixels from 0 to 16 and the digit.
"""

import argparse
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

FOLDER = Path(str(files("ternbus.edge"))) / "tasks"  # the digits that come with Ternbus


def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def data(folder: Path | None, split: str) -> tuple[Tensor, Tensor]:
    table = np.loadtxt((folder or FOLDER) / "digits.csv.gz", delimiter=",", dtype=np.float32)
    held_out = np.arange(len(table)) % 5 == 0
    rows = torch.from_numpy(table[held_out if split == "test" else ~held_out])
    return rows[:, :64].reshape(-1, 1, 8, 8) / 16, rows[:, 64].long()


def main(folder: Path = FOLDER, epochs: int = 10) -> None:
    net = model()
    inputs, targets = data(folder, "train")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(len(inputs)).split(32):
            optimizer.zero_grad()
            functional.cross_entropy(net(inputs[batch]), targets[batch]).backward()
            optimizer.step()
    inputs, targets = data(folder, "test")
    print(f"accuracy {(net.eval()(inputs).argmax(1) == targets).float().mean():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", metavar="FOLDER", nargs="?", type=Path, default=FOLDER)
    parser.add_argument("epochs", metavar="EPOCHS", nargs="?", type=int, default=10)
    main(**vars(parser.parse_args()))
