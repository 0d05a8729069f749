"""The events of a device's state machine, its only inputs, named in the past tense."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ternbus.broker.protocol.direction import PERSONAL, Direction
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.schema import Vector
from ternbus.broker.protocol.statistics import StatisticsRequest
from ternbus.broker.protocol.ternary import Block
from ternbus.edge.learn.sum_content import SumContent
from ternbus.edge.plan.privacy import Account


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """The process began, and its state was read from the disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """The broker accepted the connection.

    ``frame_bytes`` is the largest frame to send unless the head asks for larger ones. Those have at most
    ``most_bytes``, which the broker takes; 0 stands for ``frame_bytes``, where the owner has set it.
    """

    frame_bytes: int
    most_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectFailed:
    """The broker did not answer, or refused the connection."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnected:
    """The connection was lost."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameArrived:
    """A payload with the form of a frame arrived; its sender is not verified yet.

    ``retained``: the broker says that it holds this now. What is not may be of long ago, from a session that goes on.
    """

    topic: str
    frame: Frame
    retained: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameMalformed:
    """A payload that is not a frame arrived; ``reason`` is that of the `ProtocolError`."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """The broker acknowledged one frame of the message ``seq``; the aggregator may not have received it."""

    seq: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The broker refused one frame of the message ``seq``."""

    seq: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainingFinished:
    """Training on ``base`` finished; ``content`` is to be sent, ``residual`` is the part of the change not in it."""

    base: int
    samples: int
    metrics: Mapping[str, float]
    content: Block | SumContent  # the second for a job with ``sums``
    residual: Vector | None
    account: Account | None = None  # this training included; None without differential privacy
    local: bytes | None = None  # the device's own tensors, packed; None: as before
    failure: str = ""  # why it failed and noise is sent instead, under differential privacy; for the device's log

    @property
    def block(self) -> Block:
        """The content of a job without ``sums``."""
        assert isinstance(self.content, Block)  # noqa: S101 - the worker encodes by the job
        return self.content


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFailed:
    """Training on ``base`` gave no usable model.

    Under differential privacy, where others would see it, only if the device cannot train by the plan, for any data.
    """

    base: int
    reason: str
    trace: str = ""  # of a bug in the task's code, for the device's own log


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetSpent:
    """Training on ``base`` was not started: ``epsilon`` would exceed the ``budget``, at this ``delta``.

    ``final`` if the owner's budget does not pay for another training like an earlier one; else only this plan asks for
    too much.
    """

    base: int
    epsilon: float
    budget: float
    delta: float
    final: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """The model of ``version`` was evaluated, on the test data or on the held-out data."""

    version: int
    samples: int
    values: Mapping[str, float]
    better: Mapping[str, Direction] = field(default_factory=dict)  # the directions that the task states
    failure: str = ""  # why there are no values, for private data; for the device's own log


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationFailed:
    """The model of ``version`` could not be evaluated; never on private data, where others would see it."""

    version: int
    reason: str
    trace: str = ""  # as above


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FineTuned:
    """A personal model was trained from ``version``; ``before`` and ``after`` are metrics on the held-out data."""

    version: int
    samples: int  # held out
    before: Mapping[str, float]
    after: Mapping[str, float]
    tensors: Mapping[str, npt.NDArray[np.float32]]
    better: Mapping[str, Direction] = field(default_factory=dict)  # the directions that the task states

    @property
    def values(self) -> dict[str, float]:
        """Both in one mapping, as in the message `Metrics`."""
        return {**self.before, **{PERSONAL + name: value for name, value in self.after.items()}}


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuningFailed:
    """Fine-tuning from ``version`` gave no usable model."""

    version: int
    reason: str
    trace: str = ""  # as above


@dataclass(frozen=True, slots=True, kw_only=True)
class StatisticsMeasured:
    """A request for statistics has its answer, ``content``; ``refusal`` says in words why it has no numbers."""

    request: StatisticsRequest
    content: bytes
    clock_s: float  # the time of day, in Unix seconds
    refusal: str = ""
    account: Account | None = None  # this answer included; None without differential privacy
    failure: str = ""  # why only noise is sent; for the device's own log


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeReached:
    """The time of `Core.due_s` was reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopRequested:
    """The process was asked to end, for example by a signal."""

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
    | EvaluationFailed
    | FineTuned
    | FineTuningFailed
    | StatisticsMeasured
    | TimeReached
    | StopRequested
)
