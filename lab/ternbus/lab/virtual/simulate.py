"""The simulation of a federation: the cores of real services, real training, virtual time.

A scenario gives the same versions, bit for bit, on machines of any speed. The simulation itself evaluates each
published vector on the test data: every device has the same bits.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Final
from weakref import WeakValueDictionary

import numpy as np

from ternbus.aggregator.core import records
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.store import ledger as durable
from ternbus.aggregator.store import private_status, status
from ternbus.broker.errors import ConfigError
from ternbus.broker.exit_codes import EXIT_FAILED
from ternbus.broker.model_files import save_safetensors
from ternbus.broker.protocol.arms import WIDTH
from ternbus.broker.protocol.messages import Metrics
from ternbus.broker.protocol.schema import Schema, Vector, to_tensors
from ternbus.broker.protocol.tensor_kinds import version_metadata
from ternbus.edge.core.actions import Stop
from ternbus.edge.learn.failure import explained
from ternbus.edge.learn.kinds import local_notice, tensor_kinds
from ternbus.edge.learn.partition import watched
from ternbus.edge.learn.subnetwork import evaluators_by_width
from ternbus.edge.learn.task import Evaluation, Task, evaluated_by, initial_of
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.shell.worker import of_widths
from ternbus.helper.core.actions import Stop as HelperStop
from ternbus.lab.report import report
from ternbus.lab.report.failing import FailingDevices, named, nothing_made
from ternbus.lab.report.observation import Observation
from ternbus.lab.report.progress import Progress
from ternbus.lab.scenario import plan_check
from ternbus.lab.scenario.partitions import in_scenario_words
from ternbus.lab.scenario.resolve import remarks, settled
from ternbus.lab.scenario.scenario import Fault, Scenario
from ternbus.lab.virtual import setup
from ternbus.lab.virtual.attendance import Attendance
from ternbus.lab.virtual.clock import Clock
from ternbus.lab.virtual.memory_broker import Carried, MemoryBroker
from ternbus.lab.virtual.memory_ledger import MemoryLedger
from ternbus.lab.virtual.training import Place, Placing
from ternbus.lab.virtual.virtual_aggregator import VirtualAggregator
from ternbus.lab.virtual.virtual_device import Body, VirtualDevice
from ternbus.lab.virtual.virtual_helper import VirtualHelper

QUIET_S: Final = 2 * 86_400.0  # virtual time, longer than any buffer waits; after that no further version is expected


class Simulation:
    """One simulation: call `run`, then `report`.

    ``folder`` is the directory for a real aggregator's ledger; None keeps the ledger in memory. ``place`` is where
    devices train, by default in this process; a function makes it of the devices' trainers and those of sub-networks.
    ``names`` are the devices', by default device-0 and so on. ``model`` makes the aggregator's `Model`, which decides
    what a merge comes to; a ledger in memory takes any. ``later``: a version is evaluated only when a training is
    awaited, while other processes train, unless the end or a search of widths depends on metrics; so ``progress`` sees
    it later, and must not end the run.
    """

    evaluated: tuple[int, Vector] | None = None
    """The newest version that was evaluated, and its vector."""

    def __init__(
        self,
        scenario: Scenario,
        task: Task,
        progress: Progress,
        folder: Path | None = None,
        place: Place | Placing | None = None,
        *,
        names: Sequence[str] = (),
        model: Callable[..., Model] = Model,
        later: bool = False,
    ) -> None:
        self.clock = Clock()
        self.broker = MemoryBroker(self.clock)
        self.carried: list[Carried] = []  # by version
        self._scenario, self._progress, self._folder = scenario, progress, folder
        self._faults = sorted(scenario.faults, key=lambda fault: fault.after_version)
        if folder is None and any(fault.kill == "aggregator" for fault in self._faults):
            raise ConfigError('[[fault]] kill = "aggregator" needs a ledger to restart from: add --ledger')
        self._evaluated, self._made_at = -1, 0.0
        self._unseen: tuple[int, Vector, float] | None = None  # a version to evaluate, and when it was made
        self._names, self._model, self._unmeasured = names, model, set[str]()
        self._ended = self._stopped = False
        with self._explained():
            self._evaluator = task.evaluator(data=scenario.data)
            self._sub_evaluators = evaluators_by_width(task, data=scenario.data)
            initial = initial_of(task, scenario.seed)
            self.kinds = tensor_kinds(task, initial)
            found = settled(scenario, task)
        self._scenario = scenario = found.scenario
        chosen = plan_check.settings(scenario, task)  # the data may have said how many devices a barrier waits for
        chosen |= setup.private_settings(scenario)
        self._plan = Plan.from_meta(
            {name.removeprefix("plan."): value for name, value in chosen.items() if name.startswith("plan.")}
        )
        for line in found.lines:
            progress.say(line)
        dense = [*scenario.dense, *self.kinds.dense]
        self.schema = Schema.of({name: array.shape for name, array in initial.items()}, dense)
        founded = self._founded(initial, chosen)
        self.ledger = founded.ledger
        self.aggregator = VirtualAggregator(self.clock, self.broker, founded.ledger, founded.core, self._made)
        self._later = later and not scenario.end.limits and not self._widths
        public = self.aggregator.core.identity.public
        self.helpers = [
            VirtualHelper(self.clock, self.broker, profile, partial(self._helper_left, profile.helper))
            for profile in setup.helper_profiles(scenario, public, founded.helper_codes)
        ]
        with self._explained(), in_scenario_words(scenario.partition):
            with watched() as divided:
                bodies = setup.bodies(scenario, task, initial, public, founded.codes, place=place)
            for line in remarks(scenario, divided[0]) if divided and found.rows is None else []:
                progress.say(line)
        self.devices = self._devices(bodies)
        if notice := local_notice(task):
            progress.say(notice)
        self._attendances = self._attended()
        self._staying = {device.name for device in self.devices}
        self._failing = FailingDevices()

    def _devices(self, bodies: Sequence[Body]) -> list[VirtualDevice]:
        vectors: WeakValueDictionary[bytes, Vector] = WeakValueDictionary()
        made = partial(VirtualDevice, self.clock, self.broker, awaiting=self._catch_up, trained=self._trained)
        return [made(body, vectors, partial(self._left, body.profile.device)) for body in bodies]

    def _explained(self) -> AbstractContextManager[None]:
        return explained(self._scenario.task, lacks_data=self._scenario.data is None)

    def _attended(self) -> dict[str, Attendance]:
        """Of each device when it is online, by name; empty if all are online all the time."""
        about = self._scenario.availability
        if about.is_always:
            return {}
        found = {device.name: Attendance(self.clock, device, about, self._scenario.seed) for device in self.devices}
        for device in self.devices:
            device.begun = found[device.name].training_begins
        return found

    def _founded(self, model: Tensors, chosen: Mapping[str, object]) -> setup.Setup:
        scenario = self._scenario
        names = self._names or [f"device-{index}" for index in range(scenario.devices)]
        helpers = () if scenario.private is None else scenario.private.names
        if self._folder is None:
            return setup.without_disk(
                scenario.seed,
                names,
                model,
                chosen,
                helpers=helpers,
                schema=self.schema,
                kinds=self.kinds,
                made_by=self._model,
            )
        return setup.on_disk(
            self._folder, names, model, chosen, helpers=helpers, dense=scenario.dense, kinds=self.kinds
        )

    @property
    def _widths(self) -> list[float]:
        """Those of a search, whose sub-networks the evaluator measures, too."""
        about = self.aggregator.core.settings.search
        return [arm[WIDTH] for arm in about.arms] if about is not None and about.is_of_widths else []

    @property
    def parameters(self) -> int:
        return self.schema.elements

    def run(self, check: Callable[[], None] = lambda: None) -> None:
        """Simulate until the scenario's end. ``check`` is called after each event and may raise.

        Raises `FederationError` if no device can train, or if nothing was accepted by the end. If some can train, the
        others are named at the end.
        """
        self.aggregator.start()
        self._made(0, self.aggregator.core.model.published)
        for helper in self.helpers:
            helper.start()
        for device in self.devices:
            begin = self._attendances[device.name].begin if self._attendances else device.start
            begin()
        last = self._scenario.end.seconds or math.inf
        while not self._ended and (when := self.clock.next_at) is not None and when <= last:
            if self.clock.now - self._made_at > QUIET_S:
                self._check_versions("in two virtual days")
                self._progress.say("no new version for two virtual days: the simulation ends")
                break
            self.clock.step()
            check()
        self._catch_up()
        if not (self._stopped or self.moment().accepted):
            self._check_versions(f"in {self.clock.now:,.0f} virtual seconds")
        model = self.aggregator.core.model
        if self._evaluated < model.version:
            self._evaluate(model.version, model.published)
        self._hear_devices(model.version, model.published)
        while len(self.carried) <= model.version:  # a version made at the time of the end
            self.carried.append(self._count())
        hidden = {device.name: device.hidden_failure for device in self.devices if device.hidden_failure}
        for line in (*named(self._failing.reasons), *named(hidden, " cannot train, and sent noise")):
            self._progress.say(line)

    def stop(self) -> None:
        """End `run` after the current event; for calls from ``check``."""
        self._ended = self._stopped = True

    def _check_versions(self, when: str) -> None:
        """Raises `FederationError`, with what each device last said, if no version was made."""
        if self.aggregator.core.model.version == 0:
            raise nothing_made(when, self.moment().counts, {device.name: device.trouble for device in self.devices})

    def moment(self) -> Observation:
        """The current state of the federation, as from `Testbed.moment`."""
        counters = {
            device.name: {
                "sent_bytes.update": device.session.sent["update"],
                "received_bytes.delta": device.session.carried["delta"],
            }
            for device in self.devices
        }
        return Observation.read(self._status(), counters)

    def report(self, wall_seconds: float) -> dict[str, Any]:
        """The content of `report.json`; each version also has the bytes `carried` until it was made.

        Of each device it has the true number of samples, also by class, its spent epsilon by its own account, the
        trainings that have ended, also those that were lost, and the seconds that it was online. `staleness` has the
        mean, the 95th percentile and the maximum over the accepted updates.
        """
        result = report.summary(
            self.moment(),
            scenario=self._scenario,
            parameters=self.parameters,
            wall_seconds=wall_seconds,
            virtual=True,
            sets=None if self._scenario.private is None else self._merged_sets(),
        )
        for row, carried in zip(result["versions"], self.carried, strict=True):
            row |= {"update_bytes": carried.update, "delta_bytes": carried.delta, "snapshot_bytes": carried.snapshot}
        for device in self.devices:
            result["devices"][device.name] |= {
                "samples": device.samples,
                "classes": device.classes or None,
                "epsilon": device.state.account.epsilon,
                "trainings": device.trainings,
                "online_s": round(self._online_s(device.name), 3),
            }
        return result | {"staleness": self._staleness()}

    def _online_s(self, device: str) -> float:
        attendance = self._attendances.get(device)
        return self.clock.now if attendance is None else attendance.seconds_online(self.clock.now)

    def _staleness(self) -> dict[str, float] | None:
        """Of the accepted updates; None if there are none, or a ledger on disk has them."""
        known = [row.staleness for row in self.ledger.contributions] if isinstance(self.ledger, MemoryLedger) else []
        if not known:
            return None
        return {"mean": float(np.mean(known)), "p95": float(np.percentile(known, 95)), "max": float(max(known))}

    def export(self, path: Path) -> None:
        """Write the last version of the model as a safetensors file."""
        model = self.aggregator.core.model
        about = self.kinds.metadata() | version_metadata(model.version, model.digest)
        save_safetensors(path, to_tensors(self.schema, model.published), about)

    def close(self) -> None:
        if isinstance(self.ledger, durable.Ledger):
            self.ledger.close()

    def _status(self) -> Mapping[str, Any]:
        if isinstance(self.ledger, MemoryLedger):
            return self.ledger.status()
        assert self._folder is not None  # noqa: S101 - a real ledger is in a folder
        return status.read(self._folder) | private_status.read(self._folder, self.aggregator.core.settings)

    def _merged_sets(self) -> int:
        if isinstance(self.ledger, MemoryLedger):
            return self.ledger.merged_sets
        assert self._folder is not None  # noqa: S101 - a real ledger is in a folder
        return private_status.merged_sets(self._folder)

    def _made(self, version: int, vector: Vector) -> None:
        """Handle a new version: evaluate it, show progress, check for the end, inject faults."""
        self._catch_up()
        self._made_at = self.clock.now
        self.carried.append(self._count())
        evaluations = []
        if version % self._scenario.simulate.evaluate_every == 0:
            self._unseen = (version, vector, self.clock.now)
            if not self._later:
                evaluations = self._catch_up()
        reached = self._scenario.end.reached(version=version, seconds=self.clock.now, evaluations=evaluations)
        self._ended = self._ended or reached  # what is shown may have ended it
        self._disturb(version)

    def _catch_up(self) -> list[Mapping[str, float]]:
        """Evaluate the version that is not evaluated yet, if there is one, and show progress. Returns its metrics."""
        if self._unseen is None:
            return []
        (version, vector, made_at), self._unseen = self._unseen, None
        found = self._evaluate(version, vector)
        self._progress.show(self.moment(), made_at)
        return [found.values]

    def _count(self) -> Carried:
        sessions = [device.session for device in self.devices]
        return Carried(
            update=sum(session.sent["update"] for session in sessions),
            delta=sum(session.carried["delta"] for session in sessions),
            snapshot=sum(session.carried["snapshot"] for session in sessions),
        )

    def _evaluate(self, version: int, vector: Vector) -> Evaluation:
        with explained(self._scenario.task, during=f"the evaluation of version {version} on the test data"):
            tensors = to_tensors(self.schema, vector)
            found = evaluated_by(self._evaluator, tensors, self._plan)
            finite = found.finite
            values = finite | self._of_widths(tensors, finite)
            metrics = Metrics(version=version, samples=found.samples, split="test", values=values, better=found.better)
        if new := sorted(found.values.keys() - finite.keys() - self._unmeasured):
            self._unmeasured.update(new)
            self._progress.say(f"left out from version {version} on where it is no finite number: {', '.join(new)}")
        end = self._scenario.end
        if self._evaluated < 0 and (fault := end.missing(found.values)):
            raise ConfigError(fault)
        end.check(found.values, found.better)
        if version == 0:
            end.refuse_start(found.values)
        self._evaluated, self.evaluated = version, (version, vector)
        self.ledger.write(
            [records.MetricsReceived(device=setup.EVALUATOR, seq=version, metrics=metrics)], self.clock.now
        )
        self.aggregator.core.search.observe(setup.EVALUATOR, metrics)
        return found

    def _of_widths(self, tensors: Tensors, whole: Mapping[str, float]) -> dict[str, float]:
        return of_widths(self._sub_evaluators, tensors, self._plan, self._widths, whole)

    def _hear_devices(self, version: int, vector: Vector) -> None:
        """Collect the devices' last reports, which in a real federation arrive after it is closed."""
        members = self.aggregator.core.registry.members
        for device in self.devices:
            metrics = device.last_report(version, self.schema, vector)
            if metrics is not None and device.name in members:
                seq = members[device.name].metrics_seq + 1
                record = records.MetricsReceived(device=device.name, seq=seq, metrics=metrics)
                self.ledger.write([record], self.clock.now)

    def _disturb(self, version: int) -> None:
        """Inject the faults that are due at this version."""
        while self._faults and self._faults[0].after_version <= version:
            self._kill(self._faults.pop(0))

    def _kill(self, fault: Fault) -> None:
        back_at = self.clock.now + fault.restart_after_s
        if fault.device is not None:
            victim: VirtualDevice | VirtualHelper | VirtualAggregator = self.devices[fault.device]
        elif fault.helper is not None:
            victim = self.helpers[fault.helper]
        elif fault.kill == "broker":
            self.broker.stop()
            self.clock.at(back_at, self.broker.start)
            return
        else:
            victim = self.aggregator
        victim.kill()
        self.clock.at(back_at, victim.restart)

    def _helper_left(self, helper: str, stop: HelperStop) -> None:
        raise ConfigError(f"{helper}: {stop.reason}")

    def _left(self, device: str, stop: Stop) -> None:
        """Handle the end of a device; ConfigError if the device failed."""
        if stop.code == EXIT_FAILED:
            raise ConfigError(stop.reason)
        self._progress.say(stop.reason)
        self._staying.discard(device)
        self._ended = self._ended or not self._staying

    def _trained(self, device: VirtualDevice) -> None:
        """Handle the end of a training; FederationError if it shows that no device can train."""
        reason = device.core.training.failures.reason
        if not reason:  # it can train; its update may not be accepted yet
            self._failing.reasons.pop(device.name, None)
            return
        self._failing.look(device.name, accepted=device.state.accepted, failures=device.failures, reason=reason)
        self._failing.check(self._staying)
