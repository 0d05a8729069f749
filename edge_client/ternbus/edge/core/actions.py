"""The actions of a device's state machine, its only outputs; the shell performs them in order."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ternbus.broker.protocol.schema import Schema, Vector, to_tensors
from ternbus.broker.protocol.statistics import StatisticsRequest
from ternbus.edge.core.state import AnsweredUpdate, Asked, State
from ternbus.edge.learn.local_state import unpacked
from ternbus.edge.learn.sum_content import SumJob
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.privacy import Account, PrivacyPolicy
from ternbus.edge.plan.tensors import FloatArray, Tensors


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Save:
    """Write the state to stable storage in one transaction, with the receipt that caused the write, if any.

    Where it is not ``durable``, it need not outlive a cut of the power: the next durable write includes it. Without a
    receipt it may be put off for a second.
    """

    state: State
    answered: AnsweredUpdate | None = None
    durable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Connect:
    """Open a connection with this retained last will."""

    will_topic: str
    will_payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscribe:
    """Subscribe to topic filters; the broker then delivers the retained messages."""

    filters: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsubscribe:
    """Unsubscribe from topic filters."""

    filters: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """Publish one frame of the message ``seq``, with QoS 1."""

    topic: str
    payload: bytes
    seq: int
    retain: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StartTraining:
    """Train on version ``base``. The arrays must not be modified."""

    base: int
    schema: Schema
    vector: Vector
    residual: Vector | None
    plan: Plan
    seed: int
    account: Account = field(default_factory=Account)
    policy: PrivacyPolicy | None = None  # the owner's
    local: bytes = field(default=b"", repr=False)  # the device's own tensors, packed
    sums: SumJob | None = None  # of a private sum; None: the change is sent as a block
    arm: int | None = None  # of a search, which the plan has in it


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StartEvaluation:
    """Evaluate ``version`` on the test data, or on the held-out data. The vector must not be modified."""

    version: int
    schema: Schema
    vector: Vector
    plan: Plan | None = None  # the federation's; None if the device cannot follow it
    private: bool = False  # others may see nothing of the data, not even a failure
    widths: tuple[float, ...] = ()  # of sub-networks to be evaluated, too
    local: bytes = field(default=b"", repr=False)  # the device's own tensors, packed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StartFineTuning:
    """Train a personal model from ``version``, and evaluate both on the held-out data."""

    version: int
    schema: Schema
    vector: Vector
    plan: Plan
    seed: int
    local: bytes = field(default=b"", repr=False)  # the device's own tensors, packed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StartStatistics:
    """Answer a request for statistics, or refuse it in words: by the plan, the owner's limits and the account."""

    request: StatisticsRequest
    plan: Plan | None  # the federation's, bound by the owner; None: ``refusal`` says why
    refusal: str
    account: Account
    asked: tuple[Asked, ...]  # before
    per_day: int  # that the owner allows
    is_private: bool  # the device takes part in private sums
    content_bytes: int  # that the answer may have


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SaveModel:
    """Write a model to the file for the device's owner."""

    tensors: Tensors
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Flush, disconnect, and end the process with this exit code."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """Log: ``event`` and ``fields`` for programs, ``text`` for people."""

    event: str
    text: str
    fields: Mapping[str, object] = field(default_factory=dict)


def tensors_of(job: StartTraining | StartEvaluation | StartFineTuning) -> dict[str, FloatArray]:
    """The tensors that a job starts from: the version's, and the device's own beside them."""
    return {**unpacked(job.local), **to_tensors(job.schema, job.vector)}


LinkAction = Subscribe | Unsubscribe | Publish
Job = StartTraining | StartEvaluation | StartFineTuning | StartStatistics
Action = Save | SaveModel | Connect | LinkAction | Job | Stop | Log
