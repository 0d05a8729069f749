"""Small arrays for federations on arrays: a linear regression, and three classes."""

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

Array = npt.NDArray[Any]
WEIGHTS = np.random.default_rng(0).normal(size=10)


def numbers(count: int, seed: int = 0) -> tuple[Array, Array]:
    """(inputs [count, 10], targets [count]), float32."""
    generator = np.random.default_rng(seed)
    inputs = generator.normal(size=(count, 10))
    targets = inputs @ WEIGHTS + 0.1 * generator.normal(size=count)
    return inputs.astype(np.float32), targets.astype(np.float32)


def classes(count: int, seed: int = 0) -> tuple[Array, Array]:
    """(inputs [count, 4] float32, labels [count] of 3 classes)."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    return (generator.normal(size=(count, 4)) + 2 * np.eye(3, 4)[labels]).astype(np.float32), labels


def linear() -> nn.Linear:
    return nn.Linear(10, 1)


CLIENTS = {"alice": numbers(30, seed=1), "bob": numbers(50, seed=2)}
TEST = numbers(40, seed=9)
