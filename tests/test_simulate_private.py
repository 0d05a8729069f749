"""Simulations with private sums: helpers in virtual time, the same bits for the same seed, nothing merged twice."""

import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from support.noise_task import Noise
from support.noise_task import memory as ledger_of
from ternbus.aggregator.merge.accumulator import Accumulator
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.store import private_status
from ternbus.aggregator.store.ledger import reading
from ternbus.aggregator.store.merge_log import entries
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.merge_log import Entry, unpack
from ternbus.broker.protocol.messages import PRIVATE
from ternbus.lab.report.progress import Lines, closing_table
from ternbus.lab.scenario import scenario
from ternbus.lab.scenario.private import Private
from ternbus.lab.scenario.scenario import End, Fault, Hostile, Scenario, Speeds
from ternbus.lab.scenario.simulated import Simulated
from ternbus.lab.virtual.simulate import Simulation

SMALL = Scenario(
    devices=8,
    speeds=Speeds(sigma=0.8, median_s=10.0),
    private=Private(helpers=2, min=3),
    aggregator={"merge.buffer_size": 4},
    end=End(versions=12),
)
PLAIN = replace(
    SMALL, devices=5, private=None, aggregator={"merge.buffer_size": 2, "merge.max_wait_s": 1000.0}
)  # of test_simulate


def simulated(wanted: Scenario = SMALL, folder: Path | None = None, **about: Any) -> Simulation:
    simulation = Simulation(wanted, Noise(), Lines(io.StringIO()), folder, **about)
    simulation.run()
    return simulation


def refused(**table: Any) -> str:
    with pytest.raises(ConfigError) as error:
        scenario.parse(table)
    return str(error.value)


# --- the same bits


def test_the_same_seed_gives_the_same_sums_bit_for_bit() -> None:
    one, other = simulated(), simulated()
    assert ledger_of(one).digests == ledger_of(other).digests
    assert ledger_of(simulated(replace(SMALL, seed=1))).digests != ledger_of(one).digests


def test_a_ledger_changes_nothing_though_its_keys_are_random(tmp_path: Path) -> None:
    kept, other = simulated(folder=tmp_path / "agg"), simulated()
    assert kept.aggregator.core.model.digest == other.aggregator.core.model.digest
    assert kept.report(1.0)["private"] == other.report(1.0)["private"]
    kept.close()


def test_a_plain_simulation_keeps_its_bits() -> None:
    """Since TernGrad draws from four generators; by sums of updates as before they were exact."""
    found = simulated(PLAIN, model=partial(Model, summing=Accumulator))
    assert ledger_of(found).digests[12].hex() == "dfb7eb44a1983900f4f44c7a2770d91f86a60e05c6ce8d64aab43d9576c2d16a"


# --- what became of each update


def check_nothing_is_lost(simulation: Simulation) -> None:
    """Each update is in one version's sets, or dropped, or waits; no device sends two on one version."""
    rows = ledger_of(simulation).contributions
    assert max(Counter((row.device, row.base) for row in rows).values()) == 1
    assert all(row.merged is None or not row.dropped for row in rows)
    by_version = Counter(row.merged for row in rows)
    versions = simulation.moment().versions[1:]
    assert all(version.updates == by_version[version.version] for version in versions)
    counts = simulation.moment().counts
    waiting = sum(row.merged is None and not row.dropped for row in rows)
    assert counts["accepted"] == counts["merged"] + counts["dropped"] + waiting == len(rows)


def test_devices_send_private_updates_only_and_each_is_in_one_version_or_dropped() -> None:
    simulation = simulated(replace(SMALL, simulate=Simulated(jitter=0.5), end=End(versions=40)))
    check_nothing_is_lost(simulation)
    assert simulation.aggregator.core.settings.plan["codec"] == PRIVATE
    assert simulation.moment().counts["invalid"] == {}
    merged = [version.updates for version in simulation.moment().versions[1:]]
    assert min(size for size in merged if size) >= 3
    used = [helper.records._used.keys() for helper in simulation.helpers]
    assert used[0] == used[1] == {
        (row.device, row.base) for row in ledger_of(simulation).contributions if row.merged is not None
    }  # fmt: skip


def test_devices_of_a_scenario_take_a_plan_whose_noise_are_the_draws_of_a_sum() -> None:
    plan = {"dp": "sum", "dp_theta": 0.2, "dp_norm": 2.0, "dp_epsilon": 1000.0}
    simulation = simulated(replace(SMALL, plan=plan, end=End(versions=3)))
    check_nothing_is_lost(simulation)
    sums = simulation.aggregator.core.sums
    assert sums is not None
    assert {begun.terms.dp for begun in sums.contexts.values()} == {"sum"}
    assert all(each["epsilon"] > 0 for each in simulation.report(1.0)["devices"].values() if each["updates"])


def test_the_report_says_how_many_sums_there_were_and_what_was_dropped_for_want_of_company() -> None:
    lonely = replace(SMALL, speeds=Speeds(sigma=1.5, median_s=10.0), aggregator={"staleness.max": 1})
    simulation = simulated(replace(lonely, end=End(versions=30)))
    check_nothing_is_lost(simulation)
    report = simulation.report(1.0)
    dropped = Counter(row.dropped.partition(":")[0] for row in ledger_of(simulation).contributions if row.dropped)
    assert dropped["below-min"] > 0
    assert report["private"]["dropped"] == dropped
    assert report["private"]["dropped_share"] == round(dropped["below-min"] / report["updates"], 6)
    assert report["private"]["sets"] >= sum(row["updates"] > 0 for row in report["versions"])
    line = f"{dropped['below-min'] / report['updates']:.1%} of updates without company (dropped: {dropped['below-min']}"
    assert line in closing_table(report, ["report.json"])
    assert "private" not in simulated(PLAIN).report(1.0)


def test_hostile_devices_are_bounded_by_the_terms_like_all_others() -> None:
    simulation = simulated(replace(SMALL, hostile=(Hostile(kind="sign-flip", share=0.25, strength=1e6),)))
    check_nothing_is_lost(simulation)
    assert set(simulation.moment().dropped) <= {"below-min"}


# --- faults


def test_helpers_devices_and_the_broker_may_be_killed() -> None:
    faults = (
        Fault(kill="helper:0", after_version=2, restart_after_s=100.0),
        Fault(kill="device:1", after_version=3),
        Fault(kill="broker", after_version=4),
        Fault(kill="helper:1", after_version=4, restart_after_s=0.0),
    )
    simulation = simulated(replace(SMALL, faults=faults, end=End(versions=20)))
    check_nothing_is_lost(simulation)
    assert simulation.moment().version == 20
    assert simulation.moment().counts["invalid"] == {}
    assert simulation.clock.now > simulated(replace(SMALL, end=End(versions=20))).clock.now + 50


def test_after_a_kill_of_the_aggregator_the_log_names_each_update_once(tmp_path: Path) -> None:
    faults = (Fault(kill="aggregator", after_version=3), Fault(kill="helper:0", after_version=5))
    simulation = simulated(replace(SMALL, faults=faults, end=End(versions=15)), tmp_path / "agg")
    with reading(tmp_path / "agg") as ledger:
        log = [Entry.parse(unpack(entry).content) for _, entry in entries(ledger)]
    names = [(each.device, each.seq) for entry in log for each in entry.members]
    names += [(each.update.device, each.update.seq) for entry in log for each in entry.dropped]
    assert len(names) == len(set(names)) > 40
    counts: Mapping[str, Any] = simulation.moment().counts
    assert sum(len(each.members) for entry in log for each in entry.sets) == counts["merged"]
    assert private_status.merged_sets(tmp_path / "agg") == sum(len(entry.sets) for entry in log)
    assert counts["invalid"] == {}
    simulation.close()


# --- a scenario's table


def test_a_scenario_has_the_defaults_of_an_aggregator() -> None:
    assert scenario.parse({"private": {}}).private == Private()
    assert scenario.parse({}).private is None
    wanted = scenario.parse({"private": {"helpers": 3, "min": 3, "bits": 8, "levels": 2, "samples": 100}})
    assert wanted.private == Private(helpers=3, min=3, bits=8, levels=2, samples=100.0)


@pytest.mark.parametrize(("bits", "levels", "size"), [(6, 1, 10), (4, 1, 7), (6, 4, 7), (8, 1, 10)])
def test_a_merge_is_as_large_as_two_sums_or_as_the_bits_hold(bits: int, levels: int, size: int) -> None:
    wanted = replace(SMALL, aggregator={}, devices=20, private=Private(min=5, bits=bits, levels=levels))
    simulation = Simulation(wanted, Noise(), Lines(io.StringIO()))
    assert simulation.aggregator.core.settings.merge.buffer_size == size


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ({"private": {"helpers": 0}}, "private.helpers"),
        ({"private": {"helpers": 9}}, "private.helpers"),
        ({"private": {"key": 1}}, "private.key"),
        ({"private": {"min": 9}}, "devices = 8"),
        ({"private": {"bits": 7}}, "bits"),
        ({"private": {"bits": 4, "min": 8}}, "hold sums of at most 7 devices"),
        ({"private": {"bits": 4}, "aggregator": {"merge": {"buffer_size": 8}}}, "merge.buffer_size = 8"),
        ({"private": {}, "aggregator": {"merge": {"rule": "median"}}}, "no single update is seen"),
        ({"private": {}, "plan": {"codec": "ternary"}}, 'codec = "ternary"'),
        ({"private": {}, "local": {"hold_out": 0.1}}, "local.hold_out"),
        ({"private": {}, "narrow": {"share": 0.5}}, "narrow.share"),
        ({"fault": [{"kill": "helper:0", "after_version": 1}]}, "only with [private]"),
        ({"private": {}, "fault": [{"kill": "helper:1", "after_version": 1}]}, "a helper from 0 to 0"),
        ({"private": {}, "fault": [{"kill": "helper", "after_version": 1}]}, '"helper:I"'),
        ({"devices": 40, "sync": True, "private": {}}, "merge.buffer_size = 40"),
    ],
)
def test_what_does_not_go_with_private_sums_is_refused_in_words(table: dict[str, Any], reason: str) -> None:
    assert reason in refused(**table)
