"""Server optimizers (FedAvg, FedAvgM, FedAdam, FedYogi), with the mean update as pseudo-gradient."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from ternbus.aggregator.settings import OptimizerSettings
from ternbus.broker.protocol.schema import Vector

PIECE: Final = 2**16  # elements at a time: what a formula needs in between stays in the processor's cache


@dataclass(frozen=True, slots=True)
class ServerState:
    """What a server optimizer carries from merge to merge; each a vector of shape (elements,), float32."""

    target: Vector  # w: the model as it would be without a lossy downlink
    momentum: Vector | None = None  # m, of all but fedavg
    squares: Vector | None = None  # v, of the adaptive ones

    @property
    def vectors(self) -> list[Vector]:
        """Those that there are, in the order of the fields."""
        return [vector for vector in (self.target, self.momentum, self.squares) if vector is not None]


def init(about: OptimizerSettings, vector: Vector) -> ServerState:
    """The state before the first merge, m = 0 and v = tau^2 (Reddi et al. 2021, algorithm 2: v_-1 >= tau^2)."""
    momentum = None if about.name == "fedavg" else np.zeros_like(vector)
    squares = np.full_like(vector, about.tau**2) if about.name in ADAPTIVE else None
    return ServerState(vector.copy(), momentum, squares)


def apply(about: OptimizerSettings, state: ServerState, mean: Vector) -> ServerState:
    """One step with the mean update Delta: a new state, from one that this optimizer's ``init`` or ``apply`` made.

    fedavg:  w <- w + eta Delta                       (McMahan et al. 2017; eta of Reddi et al. 2021, algorithm 1)
    fedavgm: m <- beta m + Delta;  w <- w + eta m     (Hsu et al. 2019, section 4.2)
    the adaptive ones (Reddi et al. 2021, algorithm 2; as there, without Adam's correction of the first steps):
             m <- beta1 m + (1 - beta1) Delta
             v <- as ``ADAPTIVE`` says, from v and Delta^2
             w <- w + eta m / (sqrt(v) + tau)
    """
    if state.momentum is None:
        return ServerState(_stepped(state.target, about.learning_rate, mean))
    if state.squares is None:
        momentum = _stepped(mean, about.momentum, state.momentum)
        return ServerState(_stepped(state.target, about.learning_rate, momentum), momentum)
    w, m, v = (np.empty_like(vector) for vector in (state.target, state.momentum, state.squares))
    for first in range(0, len(mean), PIECE):
        here = slice(first, first + PIECE)
        m[here] = about.beta1 * state.momentum[here] + (1 - about.beta1) * mean[here]
        v[here] = ADAPTIVE[about.name](about, state.squares[here], np.square(mean[here]))
        w[here] = state.target[here] + about.learning_rate * m[here] / (np.sqrt(v[here]) + about.tau)
    return ServerState(w, m, v)


def _stepped(vector: Vector, factor: float, direction: Vector) -> Vector:
    """``vector + factor * direction``, with no vector in between."""
    result = np.empty_like(vector)
    for first in range(0, len(vector), PIECE):
        here = slice(first, first + PIECE)
        np.add(vector[here], factor * direction[here], out=result[here])
    return result


def _adagrad(_: OptimizerSettings, v: Vector, squares: Vector) -> Vector:
    """FedAdagrad: v + Delta^2."""
    return v + squares


def _adam(about: OptimizerSettings, v: Vector, squares: Vector) -> Vector:
    """FedAdam: beta2 v + (1 - beta2) Delta^2."""
    return about.beta2 * v + (1 - about.beta2) * squares


def _yogi(about: OptimizerSettings, v: Vector, squares: Vector) -> Vector:
    """FedYogi: v - (1 - beta2) Delta^2 sign(v - Delta^2)."""
    step: Vector = (1 - about.beta2) * squares * np.sign(v - squares)
    return v - step


ADAPTIVE: Final[Mapping[str, Callable[[OptimizerSettings, Vector, Vector], Vector]]] = {
    "fedadagrad": _adagrad,
    "fedadam": _adam,
    "fedyogi": _yogi,
}
