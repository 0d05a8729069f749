"""A task whose model has batch norm: server momentum would take its variance below zero."""

from torch import nn

from ternbus.edge import TorchTask
from ternbus.edge.tasks.digits import data


def model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))


TASK = TorchTask(name="batch-norm", model=model, data=data, default_plan={"learning_rate": 0.05})
