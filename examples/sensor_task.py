"""Condition monitoring of a machine by its vibration: each device has the recordings of its own machine.

    ternbus edge check examples/sensor_task.py:TASK                  # on generated recordings
    ternbus edge join pi-1.toml pi-1 --task examples/sensor_task.py:TASK --data /home/pi/recordings

`/home/pi/recordings/train.csv` (and test.csv for an evaluator) has a row for each hundredth of a second: acceleration
along x, y and z in g, and the machine's state: 0 healthy, 1 unbalanced, 2 a failing bearing. A header line is ignored.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ternbus.edge import ConfigError, FloatArray, TorchTask

WINDOW, HOP = 100, 50  # samples: windows of a second that overlap by half
CLASSES = 3


def model() -> nn.Module:
    """A 1-D CNN of about 2,000 parameters; takes [windows, 3, 100]."""
    return nn.Sequential(
        nn.Conv1d(3, 16, 7, stride=2, padding=3),
        nn.BatchNorm1d(16),
        nn.ReLU(),
        nn.Conv1d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


def windows(table: FloatArray) -> tuple[Tensor, Tensor]:
    """Inputs [windows, 3, 100] and labels from rows of x, y, z, label; without windows in which the label changes."""
    places = [
        first for first in range(0, len(table) - WINDOW + 1, HOP) if np.ptp(table[first : first + WINDOW, 3]) == 0
    ]
    inputs = np.stack([table[first : first + WINDOW, :3].T for first in places]).astype(np.float32)
    inputs -= inputs.mean(2, keepdims=True)  # removes gravity, which depends on the mounting of the sensor
    return torch.from_numpy(inputs), torch.from_numpy(table[places, 3].astype(np.int64))


def data(folder: Path | None, split: str) -> tuple[Tensor, Tensor]:
    if folder is None:
        return windows(recording(seed={"train": 0, "test": 1}[split]))
    path = folder / f"{split}.csv"
    try:
        table = np.genfromtxt(path, delimiter=",", dtype=np.float32)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: put the recordings there, or correct --data") from error
    return windows(table[~np.isnan(table).any(1)])  # without the header


def recording(seed: int, minutes: int = 6) -> FloatArray:
    """Two minutes of each state: rotation at 12 Hz, its imbalance, and the ringing of a bearing."""
    random = np.random.default_rng(seed)
    time = np.arange(minutes * 60 * 100) / 100
    state = np.arange(len(time)) * CLASSES // len(time)
    phase = 2 * np.pi * 12 * time
    turning = np.where(state == 1, 0.5, 0.2) * np.sin(phase + random.uniform(0, 6))
    ringing = np.where(state == 2, 0.5, 0.0) * np.sin(2 * np.pi * 37 * time) * (np.sin(phase) > 0.7)
    noise = random.normal(0, 0.15, (3, len(time)))
    rows = np.column_stack([turning + noise[0], turning + noise[1] + ringing, 1 + ringing + noise[2], state])
    return rows.astype(np.float32)


TASK = TorchTask(
    name="vibration",
    model=model,
    data=data,
    default_plan={"local_epochs": 5, "batch_size": 16, "learning_rate": 0.05, "momentum": 0.9},
)
