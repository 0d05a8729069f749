"""A device's core as a test drives it: its disk, its clock, and what it has done; no network."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from support.scripted_aggregator import FEDERATION, SHAPES, Message, ScriptedAggregator
from ternbus.broker.protocol.frame import Frame, parse
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.messages import Metrics
from ternbus.broker.protocol.schema import Vector
from ternbus.broker.protocol.ternary import Block
from ternbus.edge.core import events
from ternbus.edge.core.actions import Action, Log, Publish, Save, StartTraining
from ternbus.edge.core.core import Core
from ternbus.edge.core.profile import Profile, Role
from ternbus.edge.core.state import State

T = TypeVar("T")
DEVICE = "pi"
AGGREGATOR_KEY = Identity(b"a" * 32)
DEVICE_KEY = Identity(b"d" * 32)
TENSORS = {name: tuple(shape) for name, shape in SHAPES.items()}
FRAME_BYTES = 120 * 1024
VALUES = {"accuracy": 0.5, "loss": 2.0}  # of an evaluation


def profile(role: Role = "train", **changes: Any) -> Profile:
    return Profile(
        **{
            "federation": FEDERATION,
            "device": DEVICE,
            "identity": DEVICE_KEY,
            "aggregator_public": AGGREGATOR_KEY.public,
            "seal": lambda plain: b"sealed:" + plain,
            "role": role,
            "tensors": TENSORS,
            **changes,
        }
    )


@dataclass
class Device:
    """A core, its disk, its clock, and all actions so far."""

    core: Core
    now: float = 0.0
    disk: State | None = None
    actions: list[Action] = field(default_factory=list)

    def handle(self, event: events.Event) -> list[Action]:
        done = self.core.handle(event, self.now)
        for action in done:
            if isinstance(action, Save):
                self.disk = action.state
        self.actions += done
        return done

    def arrive(self, *messages: Message, retained: bool = True) -> list[Action]:
        return [
            action
            for topic, payload in messages
            for action in self.handle(events.FrameArrived(topic=topic, frame=parse(payload), retained=retained))
        ]

    def wait(self, seconds: float) -> list[Action]:
        """Time passes; `TimeReached` comes whenever the core asked for it."""
        end, done = self.now + seconds, list[Action]()
        while (due := self.core.due_s()) is not None and due <= end:
            self.now = max(self.now, due)
            done += self.handle(events.TimeReached())
        self.now = end
        return done

    def connect(self) -> list[Action]:
        return self.handle(events.Connected(frame_bytes=FRAME_BYTES))

    def restarted(self, **changes: Any) -> "Device":
        """Another process with the state on disk."""
        assert self.disk is not None
        device = Device(Core(replace(self.core.profile, **changes), self.disk), now=self.now, disk=self.disk)
        device.handle(events.Started())
        return device


def connected(role: Role = "train", state: Mapping[str, Any] | None = None, **changes: Any) -> Device:
    """A device that has started and is connected."""
    own = profile(role, **changes)
    device = Device(Core(own, State(key=own.key, **{"enrolled": True, **(state or {})})))
    device.handle(events.Started())
    device.connect()
    return device


def aggregator(**settings: Any) -> ScriptedAggregator:
    return ScriptedAggregator(identity=AGGREGATOR_KEY, **settings)


def following(
    role: Role = "train", scripted: ScriptedAggregator | None = None, **changes: Any
) -> tuple[ScriptedAggregator, Device]:
    """A device that holds the newest version; if it trains, it has begun to."""
    scripted = scripted or aggregator()
    device = connected(role, **changes)
    device.arrive(scripted.status(), scripted.head(), *scripted.snapshot())
    return scripted, device


def trained(
    job: StartTraining, change: float = 1.0, residual: Vector | None = None, **changes: Any
) -> events.TrainingFinished:
    total = np.full(job.schema.elements, change, dtype=np.float32)
    if job.residual is not None:
        total += job.residual
    fields = {"samples": 10, "metrics": {"loss": 0.5}, **changes}
    return events.TrainingFinished(
        base=job.base, content=Block.of_float32(job.schema, total), residual=residual, **fields
    )


def sending(**settings: Any) -> tuple[ScriptedAggregator, Device, Frame]:
    """A device whose first update, on version 0, is outstanding, and its frame."""
    scripted, device = following(scripted=aggregator(**settings))
    done = device.handle(trained(only(device.actions, StartTraining)))
    return scripted, device, update_in(done)


def only(actions: list[Action], kind: type[T]) -> T:
    (found,) = [action for action in actions if isinstance(action, kind)]
    return found


def of(actions: list[Action], kind: type) -> list[Any]:
    return [action for action in actions if isinstance(action, kind)]


def published(actions: list[Action], kind: str) -> list[Frame]:
    frames = [parse(action.payload) for action in actions if isinstance(action, Publish)]
    return [frame for frame in frames if frame.kind == kind]


def update_in(actions: list[Action]) -> Frame:
    (frame,) = published(actions, "update")
    return frame


def logged(actions: list[Action]) -> list[str]:
    return [action.event for action in actions if isinstance(action, Log)]


def evaluated(version: int = 0) -> events.Evaluated:
    return events.Evaluated(version=version, samples=9, values=VALUES)


def metrics_in(actions: list[Action]) -> Metrics:
    (frame,) = published(actions, "metrics")
    return Metrics.from_meta(frame.meta)
