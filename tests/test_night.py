"""A new operator at night: real processes go wrong in every way, and status and log alone tell which and how."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import pytest

from ternbus.aggregator.core.health import Health
from ternbus.aggregator.shell import examination
from ternbus.broker.errors import ConfigError
from ternbus.broker.server import running

WITHIN_S = 240.0
TASK = """
import numpy as np
from ternbus.edge.tasks.digits_numpy import DigitsNumpy, NumpyTrainer


class Buggy(NumpyTrainer):
    def train(self, *start, **about):
        raise ValueError("odd")


class Mine(DigitsNumpy):
    def trainer(self, *, data, partition):
        made = super().trainer(data=data, partition=partition)
        if partition == "iid:1/8":
            return NumpyTrainer(made._images * np.float32(1e30), made._labels)
        return Buggy(made._images, made._labels) if partition == "iid:2/8" else made


TASK = Mine()
"""
DEVICES = {  # partition of the data, and options of `edge join`
    "fast": "iid:0/8",
    "diverges": "iid:1/8",
    "buggy": "iid:2/8",
    "silent": "iid:3/8",
    "slow": "iid:4/8",
    "misplaced": "iid:5/8",
    "judge": "all",
}
EVALUATORS = ("misplaced", "judge")

pytestmark = [pytest.mark.slow, pytest.mark.extended]


@dataclass(slots=True)
class Night:
    """A federation of real processes."""

    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def agg(self) -> Path:
        return self.folder / "agg"

    def command(self, *arguments: object, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "ternbus", *map(str, arguments)],
            cwd=self.folder, capture_output=True, text=True, timeout=WITHIN_S, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def start(self, name: str, *arguments: object) -> subprocess.Popen[bytes]:
        log: IO[bytes]
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "ternbus", *map(str, arguments)],
                cwd=self.folder, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.processes[name] = process
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def until(self, done: Callable[[Health], bool]) -> Health:
        deadline = time.monotonic() + WITHIN_S
        while not done(health := examination.look(self.agg).health):
            assert time.monotonic() < deadline, health
        return health

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()


@contextmanager
def night(folder: Path) -> Iterator[Night]:
    found = Night(folder)
    try:
        yield found
    finally:
        for process in found.processes.values():
            process.kill()
            process.wait()


def found(health: Health) -> dict[str, str]:
    """Kinds of findings by device."""
    return {each.subject: each.kind for each in health.findings}


def test_status_and_log_tell_what_went_wrong(tmp_path: Path) -> None:
    try:
        software = running.choose(running.Engine.MOSQUITTO)
    except ConfigError as error:
        pytest.skip(str(error))
    (tmp_path / "my_task.py").write_text(TASK)
    with night(tmp_path) as federation:
        with running.start(software, host="127.0.0.1", port=0, directory=tmp_path / "bus") as broker:
            _begin(federation, broker.url)
            _devices_go_wrong(federation)
            line = federation.command("aggregator", "status", "agg", "--check", code=1)
            assert line.startswith("TERNBUS WARNING - home: ")
            assert line.count("\n") == 1
        health = federation.until(lambda health: not health.connected)
        assert health.findings[0].kind == "disconnected"
        text = federation.command("aggregator", "status", "agg")
        assert f"not connected to {broker.url}" in text
        assert json.loads(federation.command("aggregator", "status", "agg", "--json"))["health"]["connected"] is False
        log = federation.log("agg")
        assert "warning connection lost: " in log
        assert " info    version 1: 1 update of 1 device" in log
        assert "warning update " in log
        federation.processes["agg"].send_signal(signal.SIGTERM)
        assert federation.processes["agg"].wait(WITHIN_S) == 0
        line = federation.command("aggregator", "status", "agg", "--check", code=2)
        assert "start it: ternbus aggregator run agg" in line


def _begin(federation: Night, url: str) -> None:
    """All devices join and work; the slow one trains for longer than a version takes."""
    federation.command("edge", "init-model", "my_task:TASK", "model.safetensors")
    settings = ["--set", "merge.buffer_size=1", "--set", "staleness.max=0", "--set", "downlink.min_interval_s=0.2"]
    federation.command(
        "aggregator", "init", "agg", "--federation", "home", "--broker", url, "--model", "model.safetensors", *settings
    )
    federation.start("agg", "aggregator", "run", "agg")
    evaluators = [word for name in EVALUATORS for word in ("--evaluator", name)]
    devices = [name for name in DEVICES if name not in EVALUATORS]
    federation.command("aggregator", "invite", "agg", *devices, *evaluators, "--out", "invitations")
    joining = [
        federation.start(
            name, "edge", "join", f"invitations/{name}.toml", name, "--task", "my_task:TASK", "--partition", partition
        )
        for name, partition in DEVICES.items()
    ]
    assert [process.wait(WITHIN_S) for process in joining] == [0] * len(DEVICES)
    federation.start("judge", "edge", "evaluate", "judge")
    for name in DEVICES:
        if name != "judge":
            options = ["--min-seconds", "1"] if name == "slow" else []
            federation.start(name, "edge", "run", name, *options)


def _devices_go_wrong(federation: Night) -> None:
    """Two processes are killed; each of the others is named with what is wrong with it."""
    federation.until(lambda health: health.online >= 5)
    federation.until(lambda _: "judge" in examination.look(federation.agg).found["versions"][-1]["evaluations"])
    federation.kill("silent")
    federation.kill("judge")
    wanted = {
        "diverges": "failing",
        "buggy": "failing",
        "silent": "offline",
        "slow": "stale",
        "judge": "evaluator",
        "misplaced": "refused",
    }
    health = federation.until(lambda health: wanted.items() <= found(health).items())
    assert "fast" not in found(health)
    text = federation.command("aggregator", "status", "agg")
    lines = {line.split()[1]: line for line in text.splitlines() if line.startswith(("  degraded ", "  note "))}
    assert "training diverged" in lines["diverges"]
    assert "a bug in the task: my_task.py" in lines["buggy"]
    assert "is offline: revoke it if it does not return, since 20" in lines["silent"]
    assert "is too slow" in lines["slow"]
    assert "is an evaluator and offline: the last version that it has measured is" in lines["judge"]
    assert "run `ternbus edge evaluate` there" in lines["misplaced"]
    assert "warning training on version" in federation.log("diverges")
