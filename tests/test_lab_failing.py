"""Devices of a lab run that fail: they are named with the reason, and end a run only together."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ternbus.broker.errors import ConfigError, FederationError
from ternbus.edge.learn.task import Evaluation, Trained, TrainingError
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.tasks.digits_numpy import DigitsNumpy, NumpyTrainer
from ternbus.lab import cli
from ternbus.lab.report.failing import NAMES_MAX, FailingDevices, answers, named
from ternbus.lab.report.observation import Observation
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario.scenario import End, Scenario, Speeds
from ternbus.lab.virtual.simulate import Simulation

SMALL = Scenario(
    devices=3,
    speeds=Speeds(sigma=0.0, median_s=10.0),
    aggregator={"merge.buffer_size": 2, "merge.max_wait_s": 100.0},
    end=End(versions=4),
)
OWN = """
from ternbus.edge.learn.task import TrainingError
from ternbus.edge.tasks.digits_numpy import DigitsNumpy, NumpyTrainer


class Trainer(NumpyTrainer):
    fails = False

    def train(self, *start, **about):
        if self.fails:
            raise ValueError("odd")
        return super().train(*start, **about)


class Mine(DigitsNumpy):
    def trainer(self, *, data, partition):
        inner = super().trainer(data=data, partition=partition)
        made = Trainer(inner._images, inner._labels)
        made.fails = partition.startswith({fails!r})
        return made


TASK = Mine()
"""


@dataclass(frozen=True, slots=True)
class FailingTrainer:
    """Fails as often as ``left`` says; its list is one number."""

    inner: NumpyTrainer
    left: list[float]

    @property
    def samples(self) -> int:
        return self.inner.samples

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:
        if self.left[0] > 0:
            self.left[0] -= 1
            raise TrainingError("out of sorts")
        return self.inner.train(start, plan, version=version, seed=seed)

    def evaluate(self, tensors: Tensors) -> Evaluation:
        return self.inner.evaluate(tensors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failing:
    """The digits on devices of which each fails a number of times, by the number of its partition."""

    times: Mapping[str, float] = field(default_factory=dict)
    name: str = "failing"
    default_plan: Mapping[str, object] = field(default_factory=dict)

    def initial(self, seed: int) -> Tensors:
        return DigitsNumpy().initial(seed)

    def trainer(self, *, data: Path | None, partition: str) -> FailingTrainer:
        number = partition.partition(":")[2].partition("/")[0]
        inner = DigitsNumpy().trainer(data=data, partition=partition)
        return FailingTrainer(inner, [self.times.get(number, 0)])

    def evaluator(self, *, data: Path | None) -> NumpyTrainer:
        return DigitsNumpy().evaluator(data=data)


def simulated(**times: float) -> tuple[int, str]:
    """The last version of a simulation whose device-N fails as often as ``dN`` says, and what was on the screen."""
    screen = io.StringIO()
    task = Failing(times={name[1:]: count for name, count in times.items()})
    simulation = Simulation(replace(SMALL, partition="iid"), task, Lines(screen))  # type: ignore[arg-type]
    simulation.run()
    return simulation.moment().version, screen.getvalue()


def test_a_simulation_in_which_no_device_can_train_ends_with_names_and_reasons() -> None:
    forever = float("inf")
    with pytest.raises(FederationError) as raised:
        simulated(d0=forever, d1=forever, d2=forever)
    assert not isinstance(raised.value, ConfigError)
    first, second = str(raised.value).splitlines()
    assert first == "no device can train"
    assert sorted(second.partition(" cannot train")[0].split(", ")) == ["device-0", "device-1", "device-2"]
    assert second.endswith(" cannot train: out of sorts")


def test_a_simulation_goes_on_without_the_devices_that_fail_and_names_them() -> None:
    version, screen = simulated(d1=float("inf"))
    assert version == 4
    assert "device-1 cannot train: out of sorts" in screen
    assert "device-0" not in screen


def test_a_simulation_names_the_devices_that_send_noise_in_place_of_an_update() -> None:
    """Under differential privacy no other device or aggregator may know; who simulates may."""
    screen = io.StringIO()
    plan = {"dp": "device", "dp_clip": 1.0, "dp_noise": 1.0, "dp_epsilon": 100.0}
    task = Failing(times={"1": float("inf")})
    Simulation(replace(SMALL, partition="iid", plan=plan), task, Lines(screen)).run()  # type: ignore[arg-type]
    assert "device-1 cannot train, and sent noise: out of sorts" in screen.getvalue()
    assert "device-0" not in screen.getvalue()


def test_devices_that_recover_are_not_named() -> None:
    version, screen = simulated(d0=1, d1=2, d2=1)
    assert version == 4
    assert "cannot train" not in screen


def test_the_command_says_so_and_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("all_fail.py").write_text(OWN.replace("{fails!r}", "''"))
    ran = CliRunner().invoke(
        cli.app, ["simulate", "--task", "all_fail:TASK", "--devices", "2", "--versions", "2", "--out", "out"]
    )
    assert ran.exit_code == 1
    assert "no device can train" in ran.output
    assert "a bug in the task: all_fail.py, line 11: ValueError: odd" in ran.output
    assert "Traceback" not in ran.output


def test_a_simulation_in_which_nothing_is_merged_is_no_success() -> None:
    """A version needs updates of all devices, and one cannot train: after two virtual days it is no use to wait."""
    waiting = replace(SMALL, partition="iid", aggregator={"merge.min_devices": 3, "merge.max_wait_s": 100.0})
    task = Failing(times={"1": float("inf")})
    with pytest.raises(FederationError) as raised:
        Simulation(waiting, task, Lines(io.StringIO())).run()  # type: ignore[arg-type]
    first, *others = str(raised.value).splitlines()
    assert first == "no version was made in two virtual days: 2 updates accepted"
    assert sorted(others) == [
        "device-0, device-2: the update on version 0 was accepted",
        "device-1: training on version 0 failed: out of sorts",
    ]


def test_a_simulation_that_ends_before_anything_is_accepted_says_what_its_devices_did(tmp_path: Path) -> None:
    (tmp_path / "slow.toml").write_text(
        'task = "digits-numpy"\ndevices = 2\n[speeds]\nmedian_s = 600\nsigma = 0\n[end]\nseconds = 5\n'
    )
    ran = CliRunner().invoke(cli.app, ["simulate", str(tmp_path / "slow.toml"), "--out", str(tmp_path / "out")])
    assert ran.exit_code == 1
    assert "no version was made in" in ran.output
    assert "virtual seconds: no updates accepted\ndevice-0, device-1: training on version 0\n" in ran.output


def test_a_line_says_how_updates_were_answered() -> None:
    counts = {"accepted": 0, "stale": 0, "busy": 0, "invalid": {}}
    assert answers(counts) == "no updates accepted"
    counts |= {"accepted": 1, "stale": 2, "busy": 3, "invalid": {"norm": 4, "numbers": 1}}
    assert answers(counts) == "1 update accepted, 2 stale, 3 busy, 5 refused (norm, numbers)"


def test_accepted_updates_forgive_failures() -> None:
    failing = FailingDevices()
    looks = [
        failing.look("pi", accepted=accepted, failures=failures, reason="odd")
        for accepted, failures in [(0, 0), (0, 1), (1, 1), (1, 2), (1, 3), (1, 4), (2, 4), (2, 5), (2, 6)]
    ]
    assert looks == [False, False, False, False, True, False, False, False, True]
    failing.check(["pi", "other"])
    with pytest.raises(FederationError, match="pi cannot train: odd"):
        failing.check(["pi"])
    failing.look("pi", accepted=3, failures=6, reason="odd")
    failing.check(["pi"])


def test_many_devices_with_one_reason_share_a_line() -> None:
    reasons = {f"device-{number}": "no data" for number in range(NAMES_MAX + 3)}
    some, other = named({**reasons, "pi": "odd"})
    assert some.endswith("device-7 and 3 more cannot train: no data")
    assert other == "pi cannot train: odd"


@pytest.mark.slow
@pytest.mark.parametrize(("fails", "code"), [("iid:0/", 0), ("iid:", 1)], ids=["one", "all"])
def test_a_run_of_processes_ends_with_1_only_if_no_device_can_train(tmp_path: Path, fails: str, code: int) -> None:
    (tmp_path / "own.py").write_text(OWN.replace("{fails!r}", repr(fails)))
    (tmp_path / "scenario.toml").write_text(
        'task = "own.py"\npartition = "iid"\ndevices = 3\n[speeds]\nmedian_s = 0.2\n[aggregator.merge]\n'
        "buffer_size = 2\nmax_wait_s = 1\n[end]\nversions = 40\n"
    )
    command = [sys.executable, "-m", "ternbus", "lab", "run", "scenario.toml", "--out", "out"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == code, ran.stdout + ran.stderr
    (named_once, *_) = [line for line in ran.stdout.splitlines() if "cannot train" in line]
    assert named_once.startswith("device-")
    why = named_once.partition(" cannot train: ")[2]  # the log's name, where its last status has not come yet
    assert why == "a bug in the task: own.py, line 11: ValueError: odd" or why.endswith(".log")
    assert "Traceback" not in ran.stdout + ran.stderr
    if code:
        assert ran.stderr.startswith("ternbus: no device can train\n")
    else:
        assert json.loads((tmp_path / "out" / "report.json").read_text())["versions"][-1]["version"] >= 40
        assert "device-1 cannot" not in ran.stdout
        assert named_once.startswith("device-0 ")


@pytest.mark.slow
def test_a_run_of_processes_that_ends_before_anything_is_accepted_names_the_logs(tmp_path: Path) -> None:
    (tmp_path / "scenario.toml").write_text(
        'task = "digits-numpy"\ndevices = 2\n[speeds]\nmedian_s = 600\nsigma = 0\n[end]\nseconds = 2\n'
    )
    command = [sys.executable, "-m", "ternbus", "lab", "run", "scenario.toml", "--out", "out"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 1, ran.stdout + ran.stderr
    assert "no version was made in" in ran.stderr
    assert f"device-1: see {tmp_path / 'out' / 'logs' / 'device-1.log'}" in ran.stderr


BLIND = (
    OWN
    + """

class Judge:
    samples = 1

    def evaluate(self, tensors):
        raise ValueError("blind")


Mine.evaluator = lambda self, *, data: Judge()
"""
)


@pytest.mark.slow
def test_a_run_whose_evaluator_fails_says_why_and_does_not_wait_for_it(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(BLIND.replace("{fails!r}", '"iid:0/"'))
    (tmp_path / "scenario.toml").write_text(
        'task = "own.py:TASK"\npartition = "iid"\ndevices = 2\n[speeds]\nmedian_s = 0.2\n[aggregator.merge]\n'
        "buffer_size = 1\n[end]\nversions = 20\n"
    )
    command = [sys.executable, "-m", "ternbus", "lab", "run", "scenario.toml", "--out", "out"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    log = tmp_path / "out" / "logs" / "evaluator.log"
    said = (
        rf"no result after \d+ s of waiting for the last evaluation; see {re.escape(str(log))}; the run ends without it"
    )
    assert re.search(said, ran.stdout)
    assert "device-0 " in ran.stdout  # that it fails, or that its last training did


def test_an_observation_has_why_evaluators_fail() -> None:
    counts = {"accepted": 0, "stale": 0, "invalid": {}}
    members = {"device-0": {"failing": "odd"}, "judge": {"failing": "blind"}, "other": {"failing": None}}
    first: dict[str, Any] = {
        "version": 0,
        "time": 0.0,
        "updates": 0,
        "staleness": None,
        "staleness_max": None,
        "evaluations": {},
    }
    seen = Observation.read(
        {"state": "open", "counts": counts, "devices": members, "versions": [first | {"accuracy": None, "loss": None}]},
        {"device-0": {}},
    )
    assert seen.evaluators_failing == {"judge": "blind"}
    assert [device.failing for device in seen.devices] == ["odd"]
