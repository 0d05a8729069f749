"""Server optimizers: a mean update is a pseudo-gradient, and these say how far the model follows it."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from broker.schema import Vector

OPTIMIZERS: Final = ("fedavg", "fedavgm")


@dataclass(frozen=True, slots=True)
class ServerState:
    """What a server optimizer carries from merge to merge: the model as it would be without a lossy downlink."""

    target: Vector
    momentum: Vector | None = None


def init(name: str, vector: Vector) -> ServerState:
    """The state before the first merge."""
    return ServerState(vector.copy(), np.zeros_like(vector) if name == "fedavgm" else None)


def apply(name: str, state: ServerState, mean: Vector, *, learning_rate: float, momentum: float) -> ServerState:
    """One step.

    fedavg:  w <- w + eta Delta                       (McMahan et al. 2017; eta of Reddi et al. 2021, algorithm 1)
    fedavgm: m <- beta m + Delta;  w <- w + eta m     (Hsu et al. 2019, section 4.2)
    """
    if name == "fedavg":
        return ServerState(state.target + np.float32(learning_rate) * mean)
    before = state.momentum if state.momentum is not None else np.zeros_like(mean)
    after = np.float32(momentum) * before + mean
    return ServerState(state.target + np.float32(learning_rate) * after, after)
