"""EMNIST ByClass: digits, capital and small letters, 62 classes, with a small convolutional network.

In --data DIR: emnist/emnist-byclass-{train,test}-{images-idx3,labels-idx1}-ubyte, gzip or not, as NIST gives them.
If there is only the test part (116,323 images), a stratified fifth of it is the test set and the rest is for training:
such accuracies are comparable within this split only. The files do not name the writers.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ternbus.broker.errors import ConfigError
from ternbus.edge.tasks import idx
from ternbus.edge.tasks.convolutions import two_convolutions
from ternbus.edge.torch.torch_task import Split, TorchTask

CLASSES = 62
TRAIN = "emnist-byclass-train-images-idx3-ubyte"


def model(width: float = 1.0) -> nn.Module:
    """Two convolutions and two fully connected layers; takes [samples, 1, 28, 28] in 0…1."""
    return two_convolutions(32, 64, 128, CLASSES, width)


def data(folder: Path | None, split: Split) -> tuple[Tensor, Tensor]:
    """(images, uint8 [samples, 1, 28, 28]; labels). Raises `ConfigError`, with the place of the missing files."""
    if folder is None:
        raise ConfigError("emnist-62 needs --data DIR, with emnist-byclass-*-ubyte, gzip or not, in DIR/emnist")
    place = folder / "emnist"
    whole = any((place / f"{TRAIN}{end}").exists() for end in ("", ".gz"))
    part = split if whole else "test"
    images = idx.read(place, f"emnist-byclass-{part}-images-idx3-ubyte")
    labels = idx.read(place, f"emnist-byclass-{part}-labels-idx1-ubyte").astype(np.int64)
    if not whole:
        test = _is_test(labels)
        chosen = test if split == "test" else ~test
        images, labels = images[chosen], labels[chosen]
    upright = np.ascontiguousarray(images.transpose(0, 2, 1))  # NIST's files have rows and columns swapped
    return torch.from_numpy(upright).unsqueeze(1), torch.from_numpy(labels)


def _is_test(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    # Every machine must choose the same samples, with any version of numpy: this generator's stream is frozen (NEP 19).
    generator = np.random.RandomState(0)
    test = np.zeros(labels.shape, np.bool_)
    for label in range(CLASSES):
        members = np.flatnonzero(labels == label)
        test[generator.permutation(members)[: round(len(members) / 5)]] = True
    return test


TASK = TorchTask(
    name="emnist-62",
    model=model,
    narrow=model,
    data=data,
    default_plan={"local_epochs": 1, "batch_size": 32, "learning_rate": 0.03, "momentum": 0.9},
)
