"""What can happen to a device, in the past tense: everything that its state machine is ever told."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.schema import Vector
from ternbus.broker.protocol.ternary import Block
from ternbus.edge.plan.privacy import Account


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The process began; what it kept on disk has been read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """The broker accepted us; ``frame_bytes`` is the largest frame that it takes."""

    frame_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectFailed:
    """The broker did not answer, or did not let us in."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnected:
    """The connection ended without our asking."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameArrived:
    """A payload that has the form of a frame; who wrote it is not known yet."""

    topic: str
    frame: Frame


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameMalformed:
    """A payload that is no frame; ``reason`` is the ProtocolError's."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The broker acknowledged one publication of the message ``seq``. It promises nothing."""

    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The broker said that it will not carry a publication of the message ``seq``."""

    seq: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingFinished:
    """Local training on ``base`` is done; ``block`` is what to send, ``residual`` what it does not carry."""

    base: int
    samples: int
    metrics: Mapping[str, float]
    block: Block
    residual: Vector | None
    account: Account | None = None  # with this training in it, where the plan asks for differential privacy


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFailed:
    """Local training on ``base`` gave no usable model."""

    base: int
    reason: str
    account: Account | None = None  # likewise: that it failed is seen, so it costs as much


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetSpent:
    """There was no training on ``base``: with it ``epsilon`` would be above the ``budget``, at this ``delta``."""

    base: int
    epsilon: float
    budget: float
    delta: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """The model of ``version`` has been tried on the test data, or on what the device holds out."""

    version: int
    samples: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FineTuned:
    """A model of the device's own was trained from ``version``: what both are worth on the data held out."""

    version: int
    samples: int  # held out
    before: Mapping[str, float]
    after: Mapping[str, float]
    tensors: Mapping[str, npt.NDArray[np.float32]]

    @property
    def values(self) -> dict[str, float]:
        """Both, as metrics have them."""
        return {**self.before, **{f"personal_{name}": value for name, value in self.after.items()}}


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuningFailed:
    """It gave no usable model."""

    version: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeReached:
    """A moment that the state machine asked to be woken at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequested:
    """Somebody wants the process to end."""

    reason: str


Event = (
    Started
    | Connected
    | ConnectFailed
    | Disconnected
    | FrameArrived
    | FrameMalformed
    | Published
    | Refused
    | TrainingFinished
    | TrainingFailed
    | BudgetSpent
    | Evaluated
    | FineTuned
    | FineTuningFailed
    | TimeReached
    | StopRequested
)
