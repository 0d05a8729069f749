"""Statistics over both brokers, with TLS and access lists: real processes, one of which is killed before it answers."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ternbus.broker.crash_points import VARIABLE
from ternbus.broker.server.running import Engine
from ternbus.edge.tasks.digits_numpy import TASK

pytestmark = [pytest.mark.slow, pytest.mark.extended]

WITHIN_S = 300.0
DEVICES = ("one", "two")


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ternbus", *map(str, arguments)]


def run(folder: Path, *arguments: object) -> str:
    done = subprocess.run(
        command(*arguments), cwd=folder, capture_output=True, text=True, timeout=WITHIN_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def started(folder: Path, *arguments: object, crash_at: str = "") -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, **({VARIABLE: crash_at} if crash_at else {})}
    with subprocess.Popen(
        command(*arguments), cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str], words: str) -> str:
    """The output up to a line with these words."""
    assert process.stdout is not None
    lines = ""
    while words not in lines:
        line = process.stdout.readline()
        assert line, lines
        lines += line
    return lines


@pytest.mark.parametrize("engine", [Engine.MOSQUITTO, Engine.NATS])
def test_devices_answer_once_on_both_brokers_also_when_one_is_killed(engine: Engine, tmp_path: Path) -> None:
    run(tmp_path, "edge", "init-model", "digits-numpy", "model.safetensors")
    up = ["aggregator", "up", "home", "--tls", "--port", "0", "--engine", engine, "--model", "model.safetensors"]
    with ExitStack() as stack:
        aggregator = stack.enter_context(started(tmp_path, *up, *(f"--invite={name}" for name in DEVICES)))
        said(aggregator, "federation 'home' at version 0")
        run(tmp_path, "aggregator", "pause", "home")
        running = {}
        for number, name in enumerate(DEVICES):
            join = ["edge", "join", f"home/invitations/{name}.toml", name, "--task", "digits-numpy", "--statistics"]
            run(tmp_path, *join, "--partition", f"iid:{number}/2")
            crash_at = "publish-statistics" if number == 0 else ""
            running[name] = stack.enter_context(started(tmp_path, "edge", "run", name, crash_at=crash_at))
            said(running[name], "the federation is paused")
        ask = ["aggregator", "statistics", "home", "--json", "--wait", int(WITHIN_S), "--kind", "moments"]
        ask += ["--kind", "histogram", "--kind", "labels", "--feature", 20, "--feature", 21, "--bounds", "0:1"]
        asking = stack.enter_context(started(tmp_path, *ask))
        assert running["one"].wait(WITHIN_S) == -signal.SIGKILL
        stack.enter_context(started(tmp_path, "edge", "run", "one"))
        said(asking, "asked 2 devices")
        assert asking.stdout is not None
        found = json.loads(asking.stdout.read())  # it ends when both have answered
        assert json.loads(run(tmp_path, "aggregator", "statistics", "home", "--last", "--json")) == found
        logs = [json.loads(run(tmp_path, "edge", "status", name, "--json")) for name in DEVICES]
        aggregator.send_signal(signal.SIGTERM)
        assert "refused" not in said(aggregator, "stopped")
    check(found)
    assert [[each["outcome"] for each in log["statistics"]] for log in logs] == [["answered"], ["answered"]]
    assert [log["statistics_per_day"] for log in logs] == [4, 4]


def check(found: dict[str, Any]) -> None:
    """What all devices' data together come to."""
    trainers = [TASK.trainer(data=None, partition=f"iid:{number}/2") for number in range(2)]
    data = np.concatenate([rows for each in trainers for rows in each.measured_inputs()]).astype(np.float64)
    assert (found["devices"], found["answered"], found["samples"]) == (2, ["one", "two"], len(data))
    assert (found["open"], found["shown"], found["hidden"]) == (False, True, 0)
    for row, column in zip(found["features"], (data[:, 20], data[:, 21]), strict=True):
        assert (row["count"], row["dropped"]) == (len(data), 0)
        assert row["mean"] == pytest.approx(column.mean(), rel=1e-12)
        assert row["variance"] == pytest.approx(column.var(), rel=1e-9)
        assert row["bins"] == np.histogram(column, 32, (0, 1))[0].tolist()
        assert abs(row["quantiles"]["0.5"] - np.quantile(column, 0.5, method="inverted_cdf")) <= row["quantile_error"]
    counts: dict[str, int] = {}
    for each in trainers:
        counts = {name: counts.get(name, 0) + count for name, count in each.class_counts.items()}
    assert found["labels"] == counts
