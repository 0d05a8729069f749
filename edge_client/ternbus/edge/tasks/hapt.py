"""Human activity recognition from the accelerometer and gyroscope of a phone: 30 people, each a natural device.

In --data DIR: hapt/hapt_windows_128x6_f16.npz with `x` [windows, 128, 6] (2.56 s at 50 Hz: total acceleration in g,
rotation in rad/s), `y` (0 to 5: walking, upstairs, downstairs, sitting, standing, lying) and `subject` (1 to 30), in
order of time; cut from UCI HAPT (Reyes-Ortiz et al. 2016).

`hapt` trains on all 30 people and tests on the last fifth of each activity of each person. `hapt-unseen` trains on 21
people and tests on the other 9, those of UCI's own test part: its natural devices are 0 to 20.
"""

import math
import zipfile
import zlib
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.labels import Indices
from ternbus.edge.learn.subnetwork import channels
from ternbus.edge.torch.torch_task import Split, TorchTask

PEOPLE = 30
UNSEEN = (2, 4, 9, 10, 12, 13, 18, 20, 24)
CLASSES = 6
CHANNELS = 6
WINDOW = 128
BANDS = (1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 23, 32, 45, 65)  # bins of 50/128 Hz, each band up to where the next begins
FAINT = 1e-6  # g² or (rad/s)²: a band with less counts as empty
TURN_DEGREES = 20.0
SCALE = 0.1
FILE = Path("hapt", "hapt_windows_128x6_f16.npz")

Table = Mapping[str, npt.NDArray[Any]]


class Posture(nn.Module):
    """Adds the length of the acceleration minus 1 g, and its mean over the window, the direction of gravity."""

    def forward(self, windows: Tensor) -> Tensor:
        acceleration = windows[:, :3]
        length = torch.linalg.vector_norm(acceleration, dim=1, keepdim=True) - 1.0
        return torch.cat([windows, length, acceleration.mean(2, keepdim=True).expand_as(acceleration)], 1)


class Summary(nn.Module):
    """The mean, maximum and standard deviation of each channel over time, concatenated."""

    def forward(self, channels: Tensor) -> Tensor:
        return torch.stack([channels.mean(2), channels.amax(2), channels.std(2)], 2).flatten(1)


class Spectrum(nn.Module):
    """The logarithm of the mean power in each of `BANDS`, of each channel and of the two vectors' lengths.

    Takes [windows, 6, 128], returns [windows, 104]. Sitting and standing differ in small movements only: some
    thousandths of a g and hundredths of a rad/s, while walking has 0.2 g. The logarithm makes the difference visible.
    """

    def forward(self, windows: Tensor) -> Tensor:
        lengths = [torch.linalg.vector_norm(part, dim=1, keepdim=True) for part in (windows[:, :3], windows[:, 3:])]
        channels = torch.cat([windows, *lengths], 1)
        tapered = (channels - channels.mean(2, keepdim=True)) * torch.hann_window(WINDOW, periodic=False)
        power = torch.fft.rfft(tapered).abs().square() / WINDOW
        bands = torch.stack([power[:, :, first:end].mean(2) for first, end in pairwise(BANDS)], 2)
        return torch.log(bands + FAINT).flatten(1)


class Both(nn.ModuleList):
    """The outputs of its modules for the same windows, concatenated."""

    def forward(self, windows: Tensor) -> Tensor:
        return torch.cat([part(windows) for part in self], 1)


def model(width: float = 1.0) -> nn.Module:
    """A 1-D CNN and a spectrum beside it, 19,590 parameters, for a Pi; takes [windows, 6, 128]."""
    first, more = channels(32, width), channels(48, width)
    spectrum = (CHANNELS + 2) * (len(BANDS) - 1)
    # Layer norm, for each window alone: batch norm's statistics depend on the device's owner.
    # Not among the convolutions: it would remove a window's mean, and with it the direction of gravity.
    convolutions = nn.Sequential(
        Posture(),
        nn.Conv1d(10, first, 9, stride=2, padding=4),
        nn.ReLU(),
        nn.Conv1d(first, more, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv1d(more, more, 3, stride=2, padding=1),
        nn.ReLU(),
        Summary(),
        nn.LayerNorm(3 * more),
    )
    # The spectrum comes first: a narrower network is then a corner of the last layer.
    return nn.Sequential(
        Both([nn.Sequential(Spectrum(), nn.LayerNorm(spectrum)), convolutions]),
        nn.Dropout(0.3),
        nn.Linear(spectrum + 3 * more, CLASSES),
    )


def rotate_and_scale(windows: Tensor) -> Tensor:
    """Rotate each window by an angle of N(0, 20°) about a random axis, and scale it by a factor of N(1, 0.1).

    This covers phones that are worn differently, and people who move with another strength (Um et al. 2017).
    """
    axis = functional.normalize(torch.randn(len(windows), 3), dim=1)
    turn = axis * (torch.randn(len(windows), 1) * math.radians(TURN_DEGREES))
    across = torch.zeros(len(windows), 3, 3)  # v -> turn x v, so that its exponential is the rotation
    for row, column, of, sign in ((0, 1, 2, -1), (0, 2, 1, 1), (1, 2, 0, -1)):
        across[:, row, column] = sign * turn[:, of]
        across[:, column, row] = -sign * turn[:, of]
    rotation = torch.linalg.matrix_exp(across)
    strength = 1 + SCALE * torch.randn(len(windows), 1, 1)
    return strength * torch.cat([rotation @ windows[:, :3], rotation @ windows[:, 3:]], 1)


def data(folder: Path | None, split: Split) -> tuple[Tensor, Tensor]:
    """(windows, float32 [samples, 6, 128]; labels). Raises `ConfigError`, with the place of the missing file."""
    table = _read(folder)
    return _tensors(table, _held_out(table) if split == "test" else _learned_from(table))


def owners(folder: Path | None) -> Indices:
    """The person of each training window, numbered from 0."""
    table = _read(folder)
    numbers: Indices = table["subject"][_learned_from(table)].astype(np.int64) - 1
    return numbers


def unseen_data(folder: Path | None, split: Split) -> tuple[Tensor, Tensor]:
    """Like `data`, but with the windows of 9 people as the test set, and of the others for training."""
    table = _read(folder)
    unseen = np.isin(table["subject"], UNSEEN)
    return _tensors(table, unseen if split == "test" else ~unseen)


def unseen_owners(folder: Path | None) -> Indices:
    """The person of each training window of `unseen_data`, numbered from 0."""
    people = _read(folder)["subject"]
    return np.unique(people[~np.isin(people, UNSEEN)], return_inverse=True)[1].astype(np.int64)


def _read(folder: Path | None) -> Table:
    if folder is None:
        raise ConfigError(f"hapt needs --data DIR, with DIR/{FILE}")
    try:
        with (folder / FILE).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in ("x", "y", "subject")}
    except (OSError, KeyError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ConfigError(f"cannot read x, y and subject from {folder / FILE}: {error}; put the file there") from error


def _held_out(table: Table) -> npt.NDArray[np.bool_]:
    """The last fifth of each activity of each person."""
    return _rank(table) >= 0.8


def _learned_from(table: Table) -> npt.NDArray[np.bool_]:
    """The windows before the held-out ones, without the one that overlaps with them."""
    held_out = _held_out(table)
    before = np.append(held_out[1:], False)  # all later windows of a person and activity are held out too
    return np.asarray(~held_out & ~before)


def _rank(table: Table) -> npt.NDArray[np.float64]:
    """The relative position of each window among those of its person and activity: from 0 to below 1."""
    ranks = np.empty(len(table["y"]))
    group = table["subject"].astype(np.int64) * CLASSES + table["y"].astype(np.int64)
    for number in np.unique(group):
        members = np.flatnonzero(group == number)
        ranks[members] = np.arange(len(members)) / len(members)
    return ranks


def _tensors(table: Table, chosen: npt.NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
    windows = np.ascontiguousarray(table["x"][chosen].astype(np.float32).transpose(0, 2, 1))
    return torch.from_numpy(windows), torch.from_numpy(table["y"][chosen].astype(np.int64))


PLAN = {"local_epochs": 3, "batch_size": 32, "optimizer": "adam", "learning_rate": 0.003}

TASK = TorchTask(
    name="hapt", model=model, narrow=model, data=data, owners=owners, augment=rotate_and_scale, default_plan=PLAN
)
UNSEEN_TASK = TorchTask(
    name="hapt-unseen",
    model=model,
    narrow=model,
    data=unseen_data,
    owners=unseen_owners,
    augment=rotate_and_scale,
    default_plan=PLAN,
)
