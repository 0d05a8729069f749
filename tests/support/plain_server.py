"""The arithmetic of merges a second time: plain, in float64, without packing and without a buffer."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ternbus.aggregator.merge.accepted import AcceptedUpdate
from ternbus.aggregator.settings import OptimizerSettings

F64 = npt.NDArray[np.float64]
Contributions = Sequence[tuple[AcceptedUpdate, F64]]


def discounted(update: AcceptedUpdate) -> float:
    """The default discount for staleness, (1 + tau)^-1/2."""
    return float((1 + update.staleness) ** -0.5)


def mean(buffer: Contributions) -> F64:
    """FedBuff's: sum n s Delta / sum n."""
    total = sum(update.samples * discounted(update) * value for update, value in buffer)
    return np.asarray(total / sum(update.samples for update, _ in buffer))


def median(buffer: Contributions) -> F64:
    """Of the devices' mean updates, coordinate by coordinate."""
    by_device: dict[str, list[F64]] = {}
    for update, value in buffer:
        by_device.setdefault(update.device, []).append(value * discounted(update))
    return np.asarray(np.median([sum(each) / len(each) for each in by_device.values()], axis=0))


class PlainServer:
    """A server optimizer's vectors."""

    def __init__(self, about: OptimizerSettings, target: npt.NDArray[np.float32]) -> None:
        self.target = target.astype(np.float64)
        self.begin(about)

    def begin(self, about: OptimizerSettings) -> None:
        """Go on from where the last optimizer came to."""
        self.name = about.name
        self._momentum, self._squares = np.zeros_like(self.target), np.full_like(self.target, about.tau**2)

    def step(self, about: OptimizerSettings, delta: F64) -> None:
        if about.name in ("fedadam", "fedyogi"):
            self._momentum = about.beta1 * self._momentum + (1 - about.beta1) * delta
            apart = self._squares - delta**2  # Adam goes towards it, Yogi by its sign
            towards = apart if about.name == "fedadam" else np.sign(apart) * delta**2
            self._squares = self._squares - (1 - about.beta2) * towards
            step = self._momentum / (np.sqrt(self._squares) + about.tau)
        else:
            self._momentum = about.momentum * self._momentum + delta
            step = self._momentum if about.name == "fedavgm" else delta
        self.target = self.target + about.learning_rate * step
