"""The simulated device: the real core and real training, in virtual time."""

from collections import Counter
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, assert_never

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import frame
from ternbus.broker.protocol.messages import Metrics
from ternbus.broker.protocol.schema import Schema, Vector
from ternbus.edge.core import events
from ternbus.edge.core.actions import (
    Action,
    Connect,
    Log,
    Publish,
    Save,
    SaveModel,
    StartEvaluation,
    StartFineTuning,
    StartStatistics,
    StartTraining,
    Stop,
    Subscribe,
    Unsubscribe,
)
from ternbus.edge.core.core import Core
from ternbus.edge.core.follower import InitialModel
from ternbus.edge.core.profile import Profile
from ternbus.edge.core.state import State
from ternbus.edge.learn.task import Trainer, whole_number
from ternbus.edge.shell.worker import evaluate, fine_tune
from ternbus.lab.hostile import HostileTrainer
from ternbus.lab.virtual.clock import Alarm, Clock
from ternbus.lab.virtual.memory_broker import Line, MemoryBroker, Session
from ternbus.lab.virtual.training import Awaited

COMPLAINTS: Final = {"bad-plan", "training-failed", "stale", "duplicate", "invalid"}  # events of a device's log


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """The properties of one device: identity, data, speed and network line."""

    profile: Profile
    initial_model: InitialModel
    begin: Callable[[StartTraining, float], Awaited]  # starts a training that is due at a time
    trainer: Trainer
    held: Trainer | None  # with the held-out data
    seconds: Callable[[], float]  # draws the duration of the next training
    line: Line
    cost: Callable[[float], float] = lambda _: 1.0  # share of that time which a sub-network of a width takes


class VirtualDevice:
    """Performs the actions of a core. Its outbox is in memory and is kept over `kill`.

    ``vectors`` has the vector of each version that a device uses, by digest. Equal digests mean equal bits, so all
    devices on a version share one array. ``left`` is called when the device stops, ``awaiting`` before it waits for a
    training, ``trained`` after each.
    """

    def __init__(
        self,
        clock: Clock,
        broker: MemoryBroker,
        body: Body,
        vectors: MutableMapping[bytes, Vector],
        left: Callable[[Stop], None],
        *,
        awaiting: Callable[[], object] = lambda: None,
        trained: Callable[["VirtualDevice"], None] = lambda _: None,
    ) -> None:
        self.session: Session = broker.session(self, body.line)
        self.state = State(key=body.profile.key)
        self.happened: Counter[str] = Counter()  # counts of log events
        self.failures = 0  # trainings that failed
        self.trainings = 0  # that have ended, or were lost by a `kill`
        self.has_stopped = False
        self.begun: Callable[[float], None] = lambda _: None  # called when a training begins, with its seconds
        self.hidden_failure = ""  # why its last training failed, if it sent noise in its place
        self.trouble = "it has said nothing"  # its last complaint; if it has none, the last line of its log
        self._complained = False
        self._clock = clock
        self._body = body
        self._vectors = vectors
        self._left, self._awaiting, self._after_training = left, awaiting, trained
        self.core, self._alarm = self._begin()
        self._runs = False

    @property
    def name(self) -> str:
        return self._body.profile.device

    @property
    def samples(self) -> int:
        """Those that it trains on; a hostile device may report another number."""
        trainer = self._body.trainer
        return whole_number(trainer.honest.samples if isinstance(trainer, HostileTrainer) else trainer.samples)

    @property
    def classes(self) -> Mapping[str, int]:
        return self._body.profile.classes

    def start(self) -> None:
        self._runs = True
        self._handle(events.Started())

    def kill(self) -> None:
        """Simulate SIGKILL: state that is not in the outbox is lost, such as a training in progress."""
        self._runs = False
        self.trainings += self.core.training.running is not None
        self._alarm.off()
        self.session.cut()

    def restart(self) -> None:
        self.core, self._alarm = self._begin()
        self.start()

    # callbacks of the session

    def connected(self) -> None:
        self._handle(events.Connected(frame_bytes=frame.FRAME_BYTES, most_bytes=frame.FRAME_BYTES_RANGE[1]))

    def disconnected(self, reason: str) -> None:
        self._handle(events.Disconnected(reason=reason))

    def arrived(self, topic: str, payload: bytes, *, retained: bool) -> None:
        if not payload:  # the removal of a retained message
            return
        try:
            parsed = frame.parse(payload)
        except ProtocolError as error:
            self._handle(events.FrameMalformed(reason=error.reason))
        else:
            self._handle(events.FrameArrived(topic=topic, frame=parsed, retained=retained))

    def acknowledged(self, seq: int) -> None:
        self._handle(events.Published(seq=seq))

    def _begin(self) -> tuple[Core, Alarm]:
        core = Core(self._body.profile, self.state, self._body.initial_model)
        return core, Alarm(self._clock, core.due_s, lambda: self._handle(events.TimeReached()))

    def _handle(self, event: events.Event) -> None:
        for action in [*self.core.handle(event, self._clock.now), *self._share()]:
            self._perform(action)
        self._alarm.look()

    def _perform(self, action: Action) -> None:
        match action:
            case Save():
                self.state = action.state
            case Connect():
                self.session.connect(action.will_topic, action.will_payload)
            case Subscribe():
                self.session.subscribe(action.filters)
            case Unsubscribe():
                self.session.unsubscribe(action.filters)
            case Publish():
                self.session.publish(action.topic, action.payload, retain=action.retain, seq=action.seq)
            case StartTraining():
                self._train()
            case StartEvaluation():
                self._clock.at(self._clock.now, partial(self._evaluate, self.core, action))
            case StartFineTuning() | SaveModel() | StartStatistics():
                raise AssertionError("the simulation fine-tunes in last_report, and nobody asks for statistics")
            case Stop():
                self.has_stopped = True
                self._remember(action.reason, is_complaint=True)
                self.session.disconnect()
                self._left(action)
            case Log():
                self.happened[action.event] += 1
                self._remember(action.text, is_complaint=action.event in COMPLAINTS)
            case _:
                assert_never(action)

    def _remember(self, text: str, *, is_complaint: bool) -> None:
        if is_complaint or not self._complained:
            self.trouble, self._complained = text, is_complaint

    def _train(self) -> None:
        job = self.core.training.running  # with the shared vector
        assert job is not None  # noqa: S101 - the core has just started it
        seconds = self._body.seconds() * self._body.cost(job.plan.width)
        due_s = self._clock.now + seconds
        awaited = self._body.begin(job, due_s)
        self._clock.at(due_s, partial(self._trained, self.core, seconds, awaited))
        self.begun(seconds)

    def _trained(self, life: Core, seconds: float, awaited: Awaited) -> None:
        """Deliver the result of a training, unless the device was killed since."""
        if life is not self.core or not self._runs or life.training.running is None:
            return
        self._awaiting()
        result = awaited()
        self.trainings += 1
        if isinstance(result, events.TrainingFinished):
            result = replace(result, metrics={**result.metrics, "seconds": seconds})
        self.hidden_failure = result.failure if isinstance(result, events.TrainingFinished) else ""
        self.failures += isinstance(result, events.TrainingFailed | events.BudgetSpent)
        self._handle(result)
        self._after_training(self)

    def _evaluate(self, life: Core, job: StartEvaluation) -> None:
        """Evaluate in no virtual time: the speeds of a scenario describe training only."""
        if life is self.core and self._runs and self._body.held is not None:
            self._handle(evaluate(self._body.held, job))

    def last_report(self, version: int, schema: Schema, vector: Vector) -> Metrics | None:
        """The device's report of the last version, with a fine-tuned model if configured; None if it has no report."""
        training, held = self.core.training, self._body.held
        if held is None or training.plan is None or training.sealed:
            return None
        found: events.Evaluated | events.EvaluationFailed | events.FineTuned = evaluate(
            held, StartEvaluation(version=version, schema=schema, vector=vector, local=self.state.local)
        )
        if isinstance(found, events.EvaluationFailed):
            return None
        if self._body.profile.fine_tune:
            job = self.core.fine_tuning.job(training.plan, version, schema, vector)
            tuned = fine_tune(self._body.trainer, held, job)
            found = found if isinstance(tuned, events.FineTuningFailed) else tuned
        return self.core.evaluation.metrics(found)

    def _share(self) -> list[Action]:
        """Have one array for all devices on a version; what follows where the vector is not that of its digest."""
        follower, training = self.core.follower, self.core.training
        known = self._vectors.get(follower.digest)  # which was checked, and takes the place of its own
        actions = follower.check(self._clock.now) if known is None else []
        if follower.vector is None:
            return actions
        if follower.unchecked is not None:  # its digest is that of the known one
            follower.unchecked, follower.unconfirmed = None, False
        shared = self._vectors.setdefault(follower.digest, follower.vector)
        if shared is follower.vector:
            shared.flags.writeable = False  # shared by all devices now
            return actions
        if training.running is not None and training.running.vector is follower.vector:
            training.running = replace(training.running, vector=shared)
        follower.vector = shared
        return actions
