"""MNIST with a natural device for each of the 539 writers of its training part; the test part has other writers.

In --data DIR: torchvision's layout, MNIST/raw/*-ubyte, and beside them qmnist-train-labels-idx2-int, of which column 2
is the writer (Yadav & Bottou 2019).
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.labels import Indices
from ternbus.edge.tasks import idx
from ternbus.edge.tasks.convolutions import two_convolutions
from ternbus.edge.torch.torch_task import Split, TorchTask

WRITER = 2  # its column
FOLDER = Path("MNIST", "raw")


def model(width: float = 1.0) -> nn.Module:
    """Two convolutions and two fully connected layers, 106,122 parameters; takes [samples, 1, 28, 28] in 0…1."""
    return two_convolutions(16, 32, 64, 10, width)


def random_affine(images: Tensor) -> Tensor:
    """Rotate, scale, shear and shift each image at random, by up to 15 degrees, 15 %, 0.2 and 2 pixels.

    A device has few digits of one writer, so it gains from variation (Simard et al. 2003, section 2).
    """
    turn, scale, shear = (torch.empty(len(images)).uniform_(-most, most) for most in (0.26, 0.15, 0.2))
    move = torch.empty(len(images), 2, 1).uniform_(-0.15, 0.15)  # in halves of the image's width
    cosine, sine = torch.cos(turn) * (1 + scale), torch.sin(turn) * (1 + scale)
    linear = torch.stack([torch.stack([cosine, shear - sine], 1), torch.stack([sine, cosine], 1)], 1)
    grid = functional.affine_grid(torch.cat([linear, move], 2), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def data(folder: Path | None, split: Split) -> tuple[Tensor, Tensor]:
    """(images, uint8 [samples, 1, 28, 28]; labels). Raises `ConfigError`, with the place of the missing files."""
    images, labels = idx.images_and_labels(_raw(folder), split)
    return torch.from_numpy(images), torch.from_numpy(labels)


def owners(folder: Path | None) -> Indices:
    """The writer of each training image, numbered from 0 in the order of QMNIST's own numbers."""
    labels = idx.read(_raw(folder), "qmnist-train-labels-idx2-int")
    if labels.ndim != 2 or labels.shape[1] <= WRITER:
        raise ConfigError(
            f"{_raw(folder) / 'qmnist-train-labels-idx2-int'} has no column of writers: use QMNIST's file"
        )
    return np.unique(labels[:, WRITER], return_inverse=True)[1].astype(np.int64)


def _raw(folder: Path | None) -> Path:
    if folder is None:
        raise ConfigError(f"mnist-by-writer needs --data DIR, with MNIST and QMNIST's labels in DIR/{FOLDER}")
    return folder / FOLDER


TASK = TorchTask(
    name="mnist-by-writer",
    model=model,
    narrow=model,
    data=data,
    owners=owners,
    augment=random_affine,
    default_plan={"local_epochs": 5, "batch_size": 16, "learning_rate": 0.03, "momentum": 0.9},
)
