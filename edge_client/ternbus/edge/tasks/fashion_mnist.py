"""Fashion-MNIST in torchvision's layout (FashionMNIST/raw/*-ubyte in --data DIR) with a small convolutional network."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ternbus.broker.errors import ConfigError
from ternbus.edge.tasks import idx  # not torchvision, whose import takes as long as torch's
from ternbus.edge.tasks.convolutions import two_convolutions
from ternbus.edge.torch.torch_task import Split, TorchTask


def model(width: float = 1.0) -> nn.Module:
    """Two convolutions and two fully connected layers; takes [samples, 1, 28, 28] in 0…1."""
    return two_convolutions(16, 32, 64, 10, width)


def data(folder: Path | None, split: Split) -> tuple[Tensor, Tensor]:
    """(images, uint8 [samples, 1, 28, 28]; labels). Raises `ConfigError`, with the place of the missing files."""
    if folder is None:
        raise ConfigError("fashion-mnist needs --data DIR, with the four *-ubyte files in DIR/FashionMNIST/raw")
    raw = folder / "FashionMNIST" / "raw"
    if not raw.is_dir():
        raise ConfigError(f"no Fashion-MNIST in {raw}: put its four *-ubyte files there")
    images, labels = idx.images_and_labels(raw, split)
    return torch.from_numpy(images), torch.from_numpy(labels)


TASK = TorchTask(
    name="fashion-mnist",
    model=model,
    narrow=model,
    data=data,
    default_plan={"local_epochs": 1, "batch_size": 32, "learning_rate": 0.03, "momentum": 0.9},
)
