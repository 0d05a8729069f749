"""A canary of real processes on a real broker: a poisoned update at version 57 reaches no device but the group."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from support.canary import KILLED
from ternbus.aggregator.shell import checking, log
from ternbus.aggregator.store.ledger import LEDGER
from ternbus.broker.crash_points import VARIABLE
from ternbus.broker.server import running

POISONED = 57
LAST = 60
WITHIN_S = 900.0
TASK = f"""
from ternbus.edge.learn.task import Trained
from ternbus.edge.tasks.digits_numpy import DigitsNumpy, NumpyTrainer


class Poisoner(NumpyTrainer):
    def train(self, start, plan, *, version, seed):
        found = super().train(start, plan, version=version, seed=seed)
        if version != {POISONED - 1}:
            return found
        return Trained(tensors={{name: -9 * start[name] for name in start}}, samples=found.samples, metrics={{}})


class Mine(DigitsNumpy):
    def trainer(self, *, data, partition):
        made = super().trainer(data=data, partition=partition)
        return Poisoner(made._images, made._labels) if partition == "iid:1/4" else made


TASK = Mine()
"""
SETTINGS = {
    "merge.buffer_size": 3,
    "merge.min_devices": 3,  # each version has an update of all
    "merge.max_wait_s": 0.05,
    "merge.influence_bound": "none",
    "downlink.slots": 8,
    "plan.local_steps": 4,
    "plan.codec": "float32",
    "canary.group": ["judge", "own"],
    "canary.tolerance": 0.3,
}
DEVICES = {"good": "iid:0/4", "bad": "iid:1/4", "own": "iid:2/4"}

pytestmark = [pytest.mark.slow, pytest.mark.extended]


@dataclass(slots=True)
class Canary:
    """The federation; the aggregator is started again whenever it was killed at a point."""

    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    points: list[str] = field(default_factory=lambda: [*KILLED])

    def command(self, *arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "ternbus", *map(str, arguments)],
            cwd=self.folder, capture_output=True, text=True, timeout=WITHIN_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self, name: str, *arguments: object, point: str = "") -> None:
        with (self.folder / f"{name}.log").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "ternbus", *map(str, arguments)], cwd=self.folder, stdout=out,
                stderr=subprocess.STDOUT, env={**os.environ, **({VARIABLE: point} if point else {})},
            )  # fmt: skip

    def serve(self) -> None:
        point = self.points.pop(0) if self.points else ""
        self.start("agg", "aggregator", "run", "agg", "--log", "json", point=point)

    def lines(self, name: str, event: str) -> list[dict[str, Any]]:
        lines = (self.folder / f"{name}.log").read_text().splitlines()
        rows = [json.loads(line) for line in lines if line.startswith("{")]
        return [row for row in rows if row["event"] == event]

    def until(self, done: Callable[[], object]) -> None:
        deadline = time.monotonic() + WITHIN_S
        while not done():
            code = self.processes["agg"].poll()
            if code is not None:
                assert code == -signal.SIGKILL, (self.folder / "agg.log").read_text()[-3000:]
                self.serve()
            assert time.monotonic() < deadline, (self.folder / "agg.log").read_text()[-3000:]
            time.sleep(0.05)

    def version(self) -> int:
        with closing(sqlite3.connect(self.folder / "agg" / LEDGER, timeout=30.0)) as db:
            ((version,),) = db.execute("SELECT max(version) FROM versions").fetchall()
        return int(version)


@contextmanager
def federation(folder: Path, url: str) -> Iterator[Canary]:
    made = Canary(folder)
    try:
        chosen = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={json.dumps(value)}")]
        made.command("edge", "init-model", "my_task:TASK", "model.safetensors")
        made.command(
            "aggregator", "init", "agg", "--federation", "home", "--broker", url, "--model", "model.safetensors",
            *chosen,
        )  # fmt: skip
        made.command("aggregator", "invite", "agg", *DEVICES, "--evaluator", "judge", "--out", "invitations")
        made.start("agg", "aggregator", "run", "agg", "--log", "json")
        for name, partition in DEVICES.items():
            held = ("--hold-out", "0.3") if name == "own" else ()
            made.command(
                "edge", "join", f"invitations/{name}.toml", name, "--task", "my_task:TASK", "--partition", partition,
                *held,
            )  # fmt: skip
        made.command("edge", "join", "invitations/judge.toml", "judge", "--task", "my_task:TASK")
        made.processes["agg"].kill()
        made.processes["agg"].wait()
        made.serve()
        made.start("judge", "edge", "evaluate", "judge", "--json")
        for name in DEVICES:
            reports = ("--report-metrics",) if name == "own" else ()
            made.start(name, "edge", "run", name, "--json", *reports)
        yield made
    finally:
        for process in made.processes.values():
            process.kill()
            process.wait()


def test_a_poisoned_update_is_caught_by_the_group_while_the_aggregator_is_killed(tmp_path: Path) -> None:
    (tmp_path / "my_task.py").write_text(TASK)
    engine = running.choose(running.Engine.MOSQUITTO)
    with (
        running.start(engine, host="127.0.0.1", port=0, directory=tmp_path / "bus") as broker,
        federation(tmp_path, broker.url) as found,
    ):
        found.until(lambda: found.version() >= LAST)
        found.processes["agg"].terminate()
        assert found.processes["agg"].wait(60) == 0
    home = tmp_path / "agg"
    assert found.points == []  # it was killed at each of them
    withdrawn = found.lines("agg", "withdrawn")
    assert {row["version"] for row in withdrawn} == {POISONED}, withdrawn
    entries = {entry.version: entry for entry, _ in log.entries(home)}
    poisoned = entries[POISONED]
    assert (poisoned.updates, poisoned.digest) == ((), entries[POISONED - 1].digest)
    assert {each.update.device for each in poisoned.dropped} == set(DEVICES)
    assert all(each.reason.startswith("canary: accuracy ") for each in poisoned.dropped)
    for version in range(1, LAST + 1):
        assert version == POISONED or {each.device for each in entries[version].updates} == set(DEVICES)
    # the bits that were evaluated are those that were published, however often the process died in between
    judged = {row["version"]: row["digest"] for row in found.lines("agg", "candidate")}
    for version, digest in judged.items():
        if version in entries and version != POISONED:
            assert entries[version].digest.hex() == digest, version
    assert judged[POISONED] not in {entry.digest.hex() for entry in entries.values()}
    # nobody trained on a candidate: each base is a published version, whose digest each device compared
    for name in DEVICES:
        bases = [row["base"] for row in found.lines(name, "trained")]
        assert POISONED in bases
        assert found.lines(name, "resync") == []
    evaluated = {row["version"]: row["accuracy"] for row in found.lines("judge", "evaluated")}
    seen = {row["version"]: row.get("accuracy", 0.0) for row in found.lines("judge", "candidate")}
    assert seen[POISONED] < 0.4
    assert min(value for version, value in evaluated.items() if version >= 50) > 0.7
    assert log.verify(home, None, None).faults == []
    assert checking.check(home).faults == ()
    found.command("aggregator", "log", "export", "agg", "home.log")
    told = json.loads(found.command("edge", "verify", "bad", "home.log", "--json"))
    assert [each["version"] for each in told["dropped"]] == [POISONED]
