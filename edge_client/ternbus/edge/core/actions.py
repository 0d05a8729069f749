"""What a device's state machine wants done, as imperatives; the service performs them strictly in order."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ternbus.broker.protocol.schema import Schema, Vector
from ternbus.edge.core.state import AnsweredUpdate, State
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.privacy import Account
from ternbus.edge.plan.tensors import Tensors


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Save:
    """One durable write: all that is kept, and the receipt, if one was the reason."""

    kept: State
    answered: AnsweredUpdate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Connect:
    """Open a connection with this retained last will."""

    will_topic: str
    will_payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscribe:
    """Ask the broker for topics."""

    filters: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsubscribe:
    """Ask the broker for topics no more."""

    filters: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Publish:
    """Send one frame of the message ``seq``."""

    topic: str
    payload: bytes
    seq: int
    retain: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StartTraining:
    """Train on version ``base``; the arrays are not to be modified."""

    base: int
    schema: Schema
    vector: Vector
    residual: Vector | None
    plan: Plan
    seed: int
    account: Account = field(default_factory=Account)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StartEvaluation:
    """Try version ``version`` on the test data, or on what is held out; the vector is not to be modified."""

    version: int
    schema: Schema
    vector: Vector


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StartFineTuning:
    """Train a model of the device's own from ``version``, and try both on what is held out."""

    version: int
    schema: Schema
    vector: Vector
    plan: Plan
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SavePersonal:
    """Write the device's own model to a file for its owner; ``about`` says in words what it is."""

    tensors: Tensors
    about: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Take leave of the broker and end with this exit code."""

    code: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """Tell people: ``event`` and ``fields`` for programs, ``text`` for eyes."""

    event: str
    text: str
    fields: Mapping[str, object] = field(default_factory=dict)


LinkAction = Subscribe | Unsubscribe | Publish
Job = StartTraining | StartEvaluation | StartFineTuning
Action = Save | SavePersonal | Connect | LinkAction | Job | Stop | Log
