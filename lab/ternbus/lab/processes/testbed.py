"""A federation of processes on this machine: start, supervision, faults, end."""

import json
import re
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final, Self
from urllib.parse import SplitResult, urlsplit

from ternbus.aggregator.settings import Settings
from ternbus.aggregator.shell import administration, dashboard_process, helper_cards
from ternbus.aggregator.store import control, private_status, status
from ternbus.broker.errors import FederationError
from ternbus.broker.files import write_secret
from ternbus.broker.protocol.messages import CLOSED
from ternbus.edge.store import outbox
from ternbus.lab.interrupts import Interrupts
from ternbus.lab.processes import fleet
from ternbus.lab.processes.child import Child, ReadApart
from ternbus.lab.processes.supervisor import Supervisor
from ternbus.lab.report.failing import FailingDevices, answers, named, nothing_made
from ternbus.lab.report.observation import Observation
from ternbus.lab.report.output import Output
from ternbus.lab.report.progress import Progress
from ternbus.lab.scenario import partitions, plan_check
from ternbus.lab.scenario.scenario import Fault, Scenario

LOOK_S: Final = 0.1  # between two checks of the processes
STATUS_S: Final = 0.5  # between two checks for a new version
QUIET_S: Final = 60.0  # without a new version until a message is shown
START_TIMEOUT_S: Final = 120.0
DATA_TIMEOUT_S: Final = 7200.0  # of a task that computes features of its data first
FINISH_TIMEOUT_S: Final = 120.0  # allows for a long evaluation on a slow machine
EVALUATED_TIMEOUT_S: Final = 30.0  # for the metrics of an evaluator that has ended to reach the ledger
FAILING_TIMEOUT_S: Final = 3.0  # likewise, of one whose last evaluation failed
GRACE_S: Final = 10.0
INTERRUPTED_GRACE_S: Final = 2.0
BROKER_GRACE_S: Final = 15.0  # `broker up` waits up to 10 s for its own child

BROKER: Final = "broker"
AGGREGATOR: Final = "aggregator"
PREPARE: Final = "prepare"
SOFTWARE: Final = "ternbus lab"
ANY_PORT: Final = "127.0.0.1:0"


class OverdueError(FederationError):
    """A required event did not happen within its time limit."""


class Testbed:
    """One run: call `start`, `watch`, `finish`. The end of the `with` block ends every process, also after an error."""

    def __init__(self, scenario: Scenario, output: Output, interrupts: Interrupts, progress: Progress) -> None:
        self._scenario = scenario
        self._output = output
        self._interrupts = interrupts
        self._progress = progress
        self._processes = Supervisor(progress.say)
        # On a broker of other users these names must be unique; on our own broker they are short.
        run = "" if scenario.broker_url is None else f"lab-{secrets.token_hex(4)}-"
        self._federation = run.rstrip("-") or "lab"
        self._run = run
        self._devices: list[str] = []
        self._helpers: list[str] = []
        self._settings: Settings | None = None
        self._classes: dict[str, dict[str, int]] = {}  # the samples of each class on each device
        self._evaluator = f"{run}evaluator"
        self._faults = sorted(scenario.faults, key=lambda fault: fault.after_version)
        self.parameters = 0
        self._failing = FailingDevices()
        self._evaluated = False
        self._told: set[str] = set()  # evaluators that were named as failing

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the clients of the broker first, then the broker, so that it need not wait for clients."""
        clients = [*self._devices, self._evaluator, AGGREGATOR, *self._helpers, PREPARE]
        self._processes.stop(clients, grace_s=INTERRUPTED_GRACE_S)
        self._processes.stop_all(grace_s=BROKER_GRACE_S)

    @property
    def scenario(self) -> Scenario:
        """The scenario; after `start` with the partition and the number of devices that its data decide."""
        return self._scenario

    def start(self) -> None:
        """Start all processes; devices wait for the broker and the aggregator by themselves."""
        scenario, output = self._scenario, self._output
        fleet.check(scenario)
        devices = partitions.devices_in_words(scenario.devices)
        others = "an evaluator, an aggregator and a broker"
        if scenario.private is not None:
            count = scenario.private.helpers
            others = f"{count} helper{'s' if count > 1 else ''} of private sums, {others}"
        self._progress.say(f"{scenario.task}: {devices}, {others}")
        # devices too: a user may close the federation or stop a device from another terminal
        self._processes.may_end([PREPARE, self._evaluator])
        self._start(PREPARE, "ternbus.lab.processes.prepare", fleet.prepare(scenario, output))
        self._prepared()
        task = json.loads(output.task.read_text(encoding="utf-8"))
        self._scenario = scenario = replace(scenario, partition=task["partition"], devices=task["devices"])
        fleet.check(scenario)
        settings = plan_check.settings_of(scenario, task["plan"], task["plan_keys"])
        self.parameters = task["parameters"]
        for line in task["lines"]:
            self._progress.say(line)
        broker = self._broker()
        self._devices = [f"{self._run}device-{index}" for index in range(scenario.devices)]
        self._classes = dict(zip(self._devices, task["classes"], strict=False))  # of data without classes there is none
        self._processes.may_end(self._devices)
        self._processes.may_fail(self._devices)
        keys = self._make_helpers(broker)
        if scenario.private is not None:
            settings |= scenario.private.settings(keys)
        first = administration.FirstModel.load(output.initial)
        self._settings = administration.create(
            output.aggregator,
            federation=self._federation,
            broker=broker,
            model=first.tensors,
            kinds=first.kinds,
            settings=settings,
            dense=scenario.dense,
        )
        self._invite()
        self._start_aggregator()
        for name in self._helpers:
            self._start(name, "ternbus", ["helper", "run", str(output.helper(name))])
        speeds = scenario.speeds.draw(scenario.devices, scenario.seed)
        for index, name in enumerate(self._devices):
            self._start(name, *fleet.device(scenario, output, index, name, speeds[index], helpers=[*keys.values()]))
        self._start(self._evaluator, *fleet.evaluator(scenario, output, self._evaluator))
        self._progress.say(f"all processes started; logs in {output.logs}")

    def _start_aggregator(self) -> None:
        """With the dashboard, where it is installed, at a free port; that stays the same if it is started again."""
        run = ["aggregator", "run", str(self._output.aggregator)]
        if not dashboard_process.is_installed():
            self._start(AGGREGATOR, "ternbus", run)
            return
        started = self._start(AGGREGATOR, "ternbus", [*run, "--dashboard", ANY_PORT])
        self._until(lambda: _dashboard(started.output()) is not None, START_TIMEOUT_S, "the aggregator")
        found = _dashboard(started.output())
        assert found is not None  # noqa: S101 - it was waited for
        started.arguments = (*run, "--dashboard", f"{found.hostname}:{found.port}")
        self._progress.say(f"dashboard while it runs: {found.geturl()}")

    def watch(self) -> None:
        """Supervise the run until the scenario's end: restart processes, inject faults, show progress.

        Raises `FederationError` if no device can train, or if nothing was accepted by the end.
        """
        quiet_since, version = time.monotonic(), 0
        while True:
            moment = self.moment()
            seconds = time.time() - moment.began
            self._progress.show(moment, seconds)
            self._disturb(moment.version)
            if self._is_end(moment, seconds):
                break
            self._look_at_devices(moment)
            if not self._processes.running(self._devices):
                self._progress.say(f"all devices have ended; the federation is {moment.state}")
                break
            if moment.version != version:
                quiet_since, version = time.monotonic(), moment.version
            elif time.monotonic() - quiet_since > QUIET_S:
                said = f"no new version for {QUIET_S:.0f} s ({answers(moment.counts)})"
                self._progress.say(f"{said}; see the logs in {self._output.logs}")
                quiet_since = time.monotonic()
            self._wait(STATUS_S)
        if not moment.accepted and moment.state != CLOSED:
            raise nothing_made(f"in {seconds:.0f} s", moment.counts, self._said(moment))
        for fault in self._faults:
            self._progress.say(f"the run ended before the fault of {fault.kill}")

    def _is_end(self, moment: Observation, seconds: float) -> bool:
        """Whether the scenario's end is reached; raises `ConfigError` if a limit on a metric is a mistake."""
        end, evaluations = self._scenario.end, [version.metrics for version in moment.versions if version.metrics]
        for values in evaluations[-1:]:
            end.check(values, moment.better)
            if not self._evaluated and (fault := end.missing(values)):
                self._progress.say(fault)  # which may be no mistake: a metric that is not finite is not reported
            self._evaluated = True
        end.refuse_start(moment.versions[0].metrics)
        return end.reached(version=moment.version, seconds=seconds, evaluations=evaluations)

    def _look_at_devices(self, moment: Observation) -> None:
        """Name the devices that have begun to fail; raises `FederationError` if no other is left."""
        failing = self._failing
        new = {
            device.name: failing.reasons[device.name]
            for device in moment.devices
            if failing.look(
                device.name,
                accepted=device.updates,
                failures=device.failures,
                reason=device.failing or f"see {self._output.log(device.name)}",
            )
        }
        evaluators = {name: why for name, why in moment.evaluators_failing.items() if name not in self._told}
        self._told |= evaluators.keys()
        for line in (*named(new), *named(evaluators, " cannot evaluate")):
            self._progress.say(line)
        failing.reasons |= self._processes.lost
        if moment.state != CLOSED:
            alive = [name for name in self._devices if self._processes.running([name])]
            failing.check([*alive, *failing.reasons])

    def _said(self, moment: Observation) -> dict[str, str]:
        """Of each device why it fails, or where its log is."""
        known = {device.name: device.failing for device in moment.devices if device.failing} | self._processes.lost
        return {name: known.get(name, f"see {self._output.log(name)}") for name in self._devices}

    def finish(self) -> Observation:
        """Close the federation, wait for the last evaluation, end all processes, and return the final state."""
        self._progress.say("closing the federation")
        last = {device.name: device.failing for device in self.moment().devices if device.failing}
        devices, log = [*self._devices, self._evaluator], f"see {self._output.log(self._evaluator)}"
        administration.change_state(self._output.aggregator, control.CLOSE, SOFTWARE)
        try:
            self._until(
                lambda: self._is_evaluated() or not self._processes.running([self._evaluator]),
                FINISH_TIMEOUT_S,
                "the last evaluation",
            )
            fails = self._evaluator in self.moment().evaluators_failing  # then there will hardly be any metrics
            timeout_s = FAILING_TIMEOUT_S if fails else EVALUATED_TIMEOUT_S
            self._until(self._is_evaluated, timeout_s, f"the last evaluation; {log}")
            self._until(lambda: not self._processes.running(self._devices), FINISH_TIMEOUT_S, "the devices to end")
        except OverdueError as error:
            self._progress.say(f"{error}; the run ends without it")
        self._processes.stop(devices, grace_s=GRACE_S)
        administration.flush_counts(self._output.aggregator)
        self._processes.stop([AGGREGATOR], grace_s=GRACE_S)
        self._processes.stop(self._helpers, grace_s=GRACE_S)
        self._processes.stop([BROKER], grace_s=BROKER_GRACE_S)
        moment = self.moment()
        self._progress.show(moment, moment.last.seconds)
        for device in moment.devices:  # by its own count: its last status may have come too late
            if device.failures and not device.updates:
                last.setdefault(device.name, f"see {self._output.log(device.name)}")
        once = {name: why for name, why in last.items() if name not in self._failing.reasons}
        for line in (*named(self._failing.reasons), *named(once, " failed in its last training")):
            self._progress.say(line)
        return moment

    def _is_evaluated(self) -> bool:
        return bool(self.moment().last.evaluations)

    def export(self) -> None:
        """Write the last version of the model as a safetensors file."""
        administration.export(self._output.aggregator, self._output.model)

    def moment(self) -> Observation:
        """The current state of the federation, from its files on disk."""
        counters = {name: outbox.counters(self._output.device(name)) for name in self._devices}
        found = status.read(self._output.aggregator)
        if self._settings is not None:
            found |= private_status.read(self._output.aggregator, self._settings)
        return Observation.read(found, counters, self._classes)

    @property
    def merged_sets(self) -> int | None:
        """The number of private sums in all versions; None without private sums."""
        return private_status.merged_sets(self._output.aggregator) if self._helpers else None

    def _broker(self) -> str:
        """The URL of the scenario's broker, or of a broker that this call starts."""
        if self._scenario.broker_url is not None:
            return self._scenario.broker_url
        arguments = ["broker", "up", "--json", "--dir", str(self._output.broker), "--engine", self._scenario.engine]
        broker = self._start(BROKER, "ternbus", [*arguments, "--port", "0"], apart=_software)
        self._until(lambda: bool(_ready(broker.output())), START_TIMEOUT_S, "the broker")
        ready = _ready(broker.output())
        broker.arguments = (*arguments, "--port", str(ready["port"]))  # a restarted broker must have the same port
        self._progress.say(f"broker: {ready['engine']} {ready['version']} at {ready['url']}")
        return str(ready["url"])

    def _prepared(self) -> None:
        """Wait for the task's model and data; reading these may take long."""
        try:
            self._until(lambda: not self._processes.running([PREPARE]), QUIET_S, "the task's model")
        except OverdueError:
            self._progress.say(f"the task is still reading its data; see {self._output.log(PREPARE)}")
            self._until(lambda: not self._processes.running([PREPARE]), DATA_TIMEOUT_S, "the task's data")

    def _make_helpers(self, broker: str) -> dict[str, str]:
        """Make the helpers of private sums, as their operators do; returns their public keys by name, as hex digits."""
        scenario, output = self._scenario, self._output
        self._helpers = [] if scenario.private is None else [f"{self._run}{name}" for name in scenario.private.names]
        self._processes.may_end(self._helpers)  # `helper init` does, and a user may stop one from another terminal
        for name in self._helpers:
            arguments = fleet.helper_init(scenario, output, name, self._federation, broker)
            self._start(name, "ternbus", arguments)
        self._wait_for_helpers("the helpers' keys")
        return dict(helper_cards.read(output.helper(name) / "card.toml", self._federation) for name in self._helpers)

    def _wait_for_helpers(self, what: str) -> None:
        self._until(lambda: not self._processes.running(self._helpers), START_TIMEOUT_S, what)

    def _invite(self) -> None:
        output = self._output
        output.invitations.mkdir()
        for invitation in administration.invite(
            output.aggregator, *self._devices, evaluators=[self._evaluator], helpers=self._helpers
        ):
            write_secret(output.invitation(invitation.device), invitation.dumps().encode())
        for name in self._helpers:
            arguments = ["helper", "init", str(output.helper(name)), "--invitation", str(output.invitation(name))]
            self._start(name, "ternbus", arguments)
        self._wait_for_helpers("the helpers to take their invitations")

    def _disturb(self, version: int) -> None:
        """Inject the faults that are due, those after the same version together; the next only after all restarts."""
        if self._processes.recovering or not self._faults or version < self._faults[0].after_version:
            return
        after = self._faults[0].after_version
        while self._faults and self._faults[0].after_version == after:
            fault = self._faults.pop(0)
            self._processes.kill(self._name(fault), restart_after_s=fault.restart_after_s)

    def _name(self, fault: Fault) -> str:
        """The name of the process that a fault kills."""
        if fault.device is not None:
            return self._devices[fault.device]
        return fault.kill if fault.helper is None else self._helpers[fault.helper]

    def _start(self, name: str, module: str, arguments: Sequence[str], *, apart: ReadApart = lambda _: ()) -> Child:
        self._interrupts.check()
        child = Child(name, self._output.log(name), module, arguments, apart=apart)
        self._processes.start(child)
        return child

    def _until(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait for a condition; raises `OverdueError`, which names ``what``, after ``timeout_s``."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise OverdueError(f"no result after {timeout_s:.0f} s of waiting for {what}")
            self._wait(LOOK_S)

    def _wait(self, seconds: float) -> None:
        """Supervise the processes for ``seconds``. Raises `Interrupted` and `ChildError`."""
        deadline = time.monotonic() + seconds
        while True:
            self._interrupts.check()
            self._processes.check()
            if time.monotonic() >= deadline:
                return
            time.sleep(min(LOOK_S, max(0.0, deadline - time.monotonic())))


def _ready(output: str) -> dict[str, Any]:
    """The JSON that `broker up --json` prints when it accepts connections; empty before."""
    for line in output.splitlines():
        if line.startswith("{") and line.endswith("}"):
            found: dict[str, Any] = json.loads(line)
            return found
    return {}


def _dashboard(output: str) -> SplitResult | None:
    """Where the aggregator says in its log that the dashboard is; None before it says so."""
    found = re.search(r"dashboard at (http://\S+/);", output)
    return None if found is None else urlsplit(found[1])


def _software(output: str) -> list[int]:
    """The process id of the mosquitto or nats-server that `broker up` started."""
    ready = _ready(output)
    return [ready["pid"]] if ready else []
