"""A search of real processes on a real broker, and in virtual time: what is found, over kills of the aggregator."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.commands import printed
from support.noise_task import memory
from ternbus.aggregator.store import status
from ternbus.edge.tasks import digits_numpy
from ternbus.lab.report import report
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario.scenario import End, Fault, Local, Scenario, Speeds
from ternbus.lab.virtual.simulate import Simulation

pytestmark = pytest.mark.slow

WITHIN_S = 900
RATES = ({"learning_rate": 1e-6}, {"learning_rate": 0.1})
WIDTHS = ({"width": 0.25}, {"width": 0.5}, {"width": 1.0})
SCENARIO = Scenario(
    devices=4,
    speeds=Speeds(sigma=0.0, median_s=10.0),
    plan={"local_epochs": 1},
    local=Local(hold_out=0.3),
    aggregator={"merge.buffer_size": 4, "search.arms": list(RATES), "search.budget": 2},
    end=End(versions=10),
)


def simulated(scenario: Scenario, folder: Path | None = None) -> Simulation:
    simulation = Simulation(scenario, digits_numpy.TASK, Lines(io.StringIO()), folder)
    simulation.run()
    return simulation


def test_a_search_in_virtual_time_is_the_same_in_memory_on_disk_and_over_kills(tmp_path: Path) -> None:
    in_memory, on_disk = simulated(SCENARIO), simulated(SCENARIO, tmp_path / "run")
    found = memory(in_memory).status()["search"]
    assert found == status.read(tmp_path / "run")["search"]
    assert in_memory.aggregator.core.model.digest == on_disk.aggregator.core.model.digest
    assert (found["best"], found["done"]) == ([1], [True])
    assert in_memory.report(1.0)["search"] == found
    killed = replace(SCENARIO, faults=tuple(Fault(kill="aggregator", after_version=each) for each in (1, 3, 6)))
    again = simulated(killed, tmp_path / "killed")
    shown = status.read(tmp_path / "killed")["search"]
    assert (shown["best"], shown["done"]) == ([1], [True])
    assert again.aggregator.core.search.state is not None
    assert again.aggregator.core.search.state.status() == shown


def test_the_lab_says_that_nobody_judges() -> None:
    nobody = replace(SCENARIO, local=Local(), end=End(versions=3))
    told = dict(report.table(simulated(nobody).report(1.0)))["search"]
    assert told.startswith("nothing yet (0 rungs); no two devices with held-out data")
    assert told.endswith("set `hold_out` in [local]")
    assert "hold_out" not in dict(report.table(simulated(SCENARIO).report(1.0)))["search"]


def test_widths_are_searched_by_class_under_a_latency_in_virtual_time() -> None:
    scenario = replace(
        SCENARIO,
        devices=12,  # device-1, device-10 and device-11 are slow
        local=Local(),
        speeds=Speeds(sigma=0.0, median_s=10.0, factors={"device-1": 4.0}),
        aggregator={
            "merge.buffer_size": 6,
            "search.arms": list(WIDTHS),
            "search.budget": 2,
            "search.classes": ["device-1"],
            "search.latency_s": 11.0,
        },
        end=End(versions=500),  # so that the slow class has sent enough, whatever a seed draws
    )
    about = simulated(scenario).report(1.0)
    found = about["search"]
    slow, others = ([row for row in found["latency_s"][place] if row is not None] for place in (0, 1))
    assert found["best"][0] == 0  # 40 s for the whole model, 20 s for half of it
    assert slow[0] == pytest.approx(4 * others[0])
    assert {"accuracy@0.25", "accuracy@0.5", "accuracy@1"} <= about["metrics"].keys()


def lab_run(folder: Path, scenario: str) -> dict[str, Any]:
    (folder / "scenario.toml").write_text(scenario)
    words = [sys.executable, "-m", "ternbus", "lab", "run", str(folder / "scenario.toml"), "--out", str(folder / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=WITHIN_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads((folder / "out" / "report.json").read_text())
    # a version that is made while the federation closes may come after the report
    shown, steps = status.read(folder / "out" / "aggregator")["search"], report["search"]["steps"]
    assert shown["steps"][: len(steps)] == steps
    assert "search" in done.stdout
    return report


@pytest.mark.extended
def test_real_processes_find_the_better_rate_though_the_aggregator_is_killed(tmp_path: Path) -> None:
    report = lab_run(
        tmp_path,
        """
        task = "digits-numpy"
        devices = 4
        speeds = { median_s = 0.05 }
        local = { hold_out = 0.3 }
        [aggregator.merge]
        buffer_size = 4
        [aggregator.search]
        arms = [{ learning_rate = 1e-6 }, { learning_rate = 0.1 }]
        budget = 2
        [[fault]]
        kill = "aggregator"
        after_version = 2
        [[fault]]
        kill = "aggregator"
        after_version = 5
        [end]
        versions = 24
        """,
    )
    found = report["search"]
    assert (found["best"], found["done"]) == ([1], [True])
    shown = printed(tmp_path, "aggregator", "status", "out/aggregator")
    assert "search (successive-halving): 1 rung judged" in shown
    assert "learning_rate 0.1 (best)" in shown
    assert printed(tmp_path, "aggregator", "check", "out/aggregator")


@pytest.mark.extended
def test_real_processes_measure_sub_networks_and_how_long_they_train(tmp_path: Path) -> None:
    report = lab_run(
        tmp_path,
        """
        task = "digits-numpy"
        devices = 3
        speeds = { median_s = 0.05 }
        [aggregator.merge]
        buffer_size = 3
        [aggregator.downlink]
        min_interval_s = 0.5  # so that an evaluator on a busy machine judges two versions of a rung
        [aggregator.search]
        arms = [{ width = 0.25 }, { width = 1.0 }]
        budget = 2
        [end]
        versions = 16
        """,
    )
    found = report["search"]
    assert len(found["steps"]) == 2
    assert all(each is not None for each in found["steps"][1]["effects"][0])
    assert all(each > 0 for each in found["latency_s"][0])
    assert {"accuracy", "accuracy@0.25", "accuracy@1"} <= report["metrics"].keys()
