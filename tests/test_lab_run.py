"""`ternbus lab run` as a user starts it: a federation of real processes, its report, and Ctrl-C at any moment."""

import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ternbus.aggregator.shell import administration
from ternbus.aggregator.store import control, merge_log, status
from ternbus.aggregator.store.ledger import reading
from ternbus.broker.model_files import load_safetensors
from ternbus.broker.protocol.merge_log import Entry, unpack
from ternbus.broker.server import running
from ternbus.broker.server.running import Engine
from ternbus.helper.shell.directory import HelperDirectory
from ternbus.helper.store.store import summary

pytestmark = pytest.mark.slow

SMALL = """
task = "digits-numpy"
devices = 3
[speeds]
median_s = 0.05
[aggregator.merge]
buffer_size = {buffer}
[end]
versions = {versions}
"""
TIMEOUT_S = 120


class Lab:
    """A `ternbus lab run` whose processes are known by a variable in their environment."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "out"
        self._scenario = folder / "scenario.toml"
        self._mark = uuid.uuid4().hex
        self.process: subprocess.Popen[str] | None = None

    def start(self, *options: str, versions: int = 6, buffer: int = 2, more: str = "") -> subprocess.Popen[str]:
        self._scenario.write_text(SMALL.format(versions=versions, buffer=buffer) + more)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ternbus", "lab", "run", str(self._scenario), "--out", str(self.out), *options],
            env={**os.environ, "TERNBUS_TEST_RUN": self._mark},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return self.process

    def run(self, *options: str, versions: int = 6, buffer: int = 2, more: str = "") -> tuple[str, dict[str, Any]]:
        """What it printed and its report."""
        process = self.start(*options, versions=versions, buffer=buffer, more=more)
        printed, errors = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, printed + errors
        return printed, json.loads((self.out / "report.json").read_text())

    def left_over(self) -> list[str]:
        """The command lines of its processes that are still there."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and self._mark.encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    lab = Lab(tmp_path)
    yield lab
    if lab.process is not None and lab.process.poll() is None:
        lab.process.kill()
        lab.process.communicate()


def test_a_run_leaves_report_plot_model_and_logs_and_no_process(lab: Lab) -> None:
    printed, report = lab.run()
    assert {
        "accuracy", "updates", "bytes_up", "bytes_down", "bits_per_parameter_up", "bits_per_parameter_down",
        "rejected", "seconds", "versions",
    } <= report.keys()  # fmt: skip
    assert len(report["versions"]) >= 7
    assert report["versions"][-1]["accuracy"] == report["accuracy"] > 0.5
    assert all({"seconds", "accuracy", "loss", "updates", "staleness"} <= row.keys() for row in report["versions"])
    assert 1.0 < report["bits_per_parameter_up"] < 4
    assert 1.0 < report["bits_per_parameter_down"] < 4
    model = load_safetensors(lab.out / "model.safetensors")
    assert sum(tensor.size for tensor in model.values()) == report["parameters"]
    logs = {path.stem for path in (lab.out / "logs").iterdir()}
    assert {"broker", "aggregator", "device-0", "device-1", "device-2", "evaluator"} <= logs
    assert str(lab.out / "report.json") in printed
    classes = [row["classes"] for row in report["devices"].values()]
    assert sum(sum(counts.values()) for counts in classes) == 1438  # all digits that are not for the test
    assert set().union(*classes) == set("0123456789")
    devices = status.read(lab.out / "aggregator")["devices"]
    assert report["bytes_up"] == sum(row["bytes"] for row in devices.values())  # what was sent is what arrived
    assert lab.left_over() == []


def test_a_second_run_replaces_the_first_and_a_barrier_takes_nothing_stale(lab: Lab) -> None:
    """With --json, its report is all that is on standard output."""
    lab.run(versions=2)
    (lab.out / "notes.txt").write_text("mine")
    printed, report = lab.run("--sync", "--json", versions=3)
    assert json.loads(printed) == report
    assert (lab.out / "notes.txt").read_text() == "mine"
    assert report["scenario"]["sync"] is True
    assert [row["staleness"] for row in report["versions"][1:4]] == [0, 0, 0]
    assert max(row["updates"] for row in report["versions"][1:4]) == 3  # a barrier ends at last without who is slow


def test_the_lab_runs_on_a_broker_that_exists_and_leaves_it_alone(lab: Lab, tmp_path: Path) -> None:
    with running.start(running.choose(Engine.AUTO), host="127.0.0.1", port=0, directory=tmp_path / "broker") as broker:
        _, report = lab.run(versions=2, more=f'[broker]\nurl = "{broker.url}"\n')
        assert not (lab.out / "broker").exists()
    assert report["scenario"]["broker_url"] == broker.url
    assert report["versions"][-1]["accuracy"] is not None


def test_with_helpers_each_accepted_update_is_in_one_sum_or_dropped(lab: Lab) -> None:
    private = '[private]\nhelpers = 2\nmin = 3\n[[fault]]\nkill = "helper:1"\nafter_version = 1\n'
    options = ("--devices", "5", "--engine", "mosquitto")
    printed, report = lab.run(*options, versions=6, buffer=4, more=private)
    assert "2 helpers of private sums" in printed
    assert "killing helper-1" in printed
    with reading(lab.out / "aggregator") as ledger:
        log = [Entry.parse(unpack(entry).content) for _, entry in merge_log.entries(ledger)]
    merged = [(each.device, each.seq) for entry in log for each in entry.members]
    dropped = [(each.update.device, each.update.seq) for entry in log for each in entry.dropped]
    assert len({*merged, *dropped}) == len(merged) + len(dropped) == report["updates"] > 0
    assert report["counts"]["merged"] == len(merged)
    assert all(len(each.members) >= 3 for entry in log for each in entry.sets)
    assert report["private"]["sets"] == sum(len(entry.sets) for entry in log)
    assert sum(report["private"]["dropped"].values()) == len(dropped)
    assert report["accuracy"] > 0.5
    helpers = [HelperDirectory(lab.out / "helpers" / name) for name in ("helper-0", "helper-1")]
    counts = [summary(helper.folder).state.count for helper in helpers]
    assert counts[0] == counts[1] >= 2 * report["private"]["sets"]
    assert lab.left_over() == []


def test_closing_the_federation_from_elsewhere_ends_the_run(lab: Lab) -> None:
    process = lab.start(versions=100_000)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("version") and not line.startswith("version 0"):
            break
    administration.change_state(lab.out / "aggregator", control.CLOSE, "test")
    printed, errors = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, errors) == (0, "")
    assert "all devices have ended; the federation is closed" in printed


def test_a_child_that_needs_another_configuration_ends_the_run_with_its_words(lab: Lab) -> None:
    process = lab.start("--task", "nowhere:TASK")
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2
    assert errors.startswith("ternbus: prepare: task nowhere:TASK: no module 'nowhere' is in ")
    assert len(errors.splitlines()) == 1
    assert lab.left_over() == []


@pytest.mark.parametrize("moment", ["digits-numpy:", "broker:", "all processes started", "version", "closing"])
def test_ctrl_c_at_any_moment_leaves_no_process(lab: Lab, moment: str) -> None:
    """The moments are lines that the run prints."""
    interrupt(lab, moment, signal.SIGINT, 130, "Ctrl-C")


@pytest.mark.parametrize(
    ("moment", "number", "code"), [("version", signal.SIGTERM, 143), ("broker:", signal.SIGHUP, 129)]
)
def test_sigterm_and_a_hangup_too(lab: Lab, moment: str, number: signal.Signals, code: int) -> None:
    interrupt(lab, moment, number, code, number.name)


def interrupt(lab: Lab, moment: str, number: signal.Signals, code: int, word: str) -> None:
    process = lab.start()
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(moment):
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, lab.left_over()) == (code, [])
    assert errors == f"ternbus: stopped by {word}; all processes have ended\n"


def test_a_lab_that_is_killed_leaves_no_process(lab: Lab) -> None:
    process = lab.start()
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("version"):
            break
    process.kill()
    process.communicate()
    deadline = time.monotonic() + TIMEOUT_S
    # the kernel signals them when their parent ends, and they stop in order
    while lab.left_over() and time.monotonic() < deadline:
        select.select([], [], [], 0.1)
    assert lab.left_over() == []
