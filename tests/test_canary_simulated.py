"""A canary in virtual time: the same versions on disk and in memory, and no update is lost or counted twice."""

import io
from dataclasses import replace
from pathlib import Path

import pytest

from support.noise_task import memory
from ternbus.aggregator.shell import log
from ternbus.broker.errors import ConfigError
from ternbus.edge.tasks import digits_numpy
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario.scenario import End, Local, Scenario, Speeds
from ternbus.lab.virtual.simulate import Simulation

SETTINGS = {"merge.buffer_size": 2, "canary.group": ["device-0", "device-1"], "canary.tolerance": 0.0}
SCENARIO = Scenario(
    devices=5,
    speeds=Speeds(sigma=0.3, median_s=10.0),
    local=Local(hold_out=0.2),
    aggregator=SETTINGS,
    end=End(versions=8),
)


def simulated(scenario: Scenario, folder: Path | None = None) -> Simulation:
    simulation = Simulation(scenario, digits_numpy.TASK, Lines(io.StringIO()), folder)
    simulation.run()
    return simulation


@pytest.mark.slow
def test_versions_are_published_or_withdrawn_and_every_update_is_accounted_for(tmp_path: Path) -> None:
    in_memory, on_disk = simulated(SCENARIO), simulated(SCENARIO, tmp_path / "run")
    ledger = memory(in_memory)
    withdrawn = [row for row in ledger.contributions if row.dropped == "canary"]
    merged = [row for row in ledger.contributions if row.merged is not None]
    assert withdrawn
    assert merged
    model = in_memory.aggregator.core.model
    assert (model.version, model.digest) == (
        on_disk.aggregator.core.model.version,
        on_disk.aggregator.core.model.digest,
    )
    (home,) = [path.parent for path in tmp_path.rglob("ledger.sqlite")]
    entries = [entry for entry, _ in log.entries(home)]
    assert sum(len(entry.updates) for entry in entries) == len(merged)
    assert sum(len(entry.dropped) for entry in entries) == len(withdrawn)
    assert log.verify(home, None, None).faults == []


def test_the_evaluator_of_a_simulation_is_in_no_group() -> None:
    wrong = replace(SCENARIO, aggregator={**SETTINGS, "canary.group": ["evaluator"]})
    with pytest.raises(ConfigError, match="evaluates no candidate in a simulation"):
        simulated(wrong)
