"""A task whose last layer stays on the device (FedPer), over digits whose classes each owner numbers in an own way."""

from pathlib import Path

import torch
from torch import Tensor, nn

from ternbus.edge import TorchTask
from ternbus.edge.learn.labels import Indices
from ternbus.edge.tasks.digits import data as digits

OWNERS = 4
CLASSES = 10


def data(folder: Path | None, split: str) -> tuple[Tensor, Tensor]:
    """In training, owner i calls class c by (c + 3 i) mod 10: no one model can be right for all."""
    inputs, targets = digits(folder, "train" if split == "train" else "test")
    if split == "train":
        targets = (targets + 3 * torch.from_numpy(owners(folder))) % CLASSES
    return inputs, targets


def owners(folder: Path | None) -> Indices:
    return torch.arange(len(digits(folder, "train")[1])).numpy() % OWNERS


def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))


PLAN = {"learning_rate": 0.2, "local_epochs": 2}
TASK = TorchTask(name="own-head", model=model, data=data, owners=owners, default_plan=PLAN, stays_local=["3.*"])
SHARED = TorchTask(name="shared-head", model=model, data=data, owners=owners, default_plan=PLAN)
