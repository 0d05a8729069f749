"""Simulation in virtual time: the same cores, reports that do not depend on the machine, and the command."""

import io
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from support.commands import typed
from support.noise_task import Noise, NoiseTrainer, memory
from ternbus.aggregator.core import records
from ternbus.aggregator.shell import administration
from ternbus.aggregator.store.ledger import LEDGER, Ledger
from ternbus.broker.errors import ConfigError
from ternbus.broker.model_files import load_metadata
from ternbus.broker.protocol.schema import to_tensors, vector_digest
from ternbus.edge.learn.task import Task, Trained, halves_of
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.tasks import digits_numpy
from ternbus.lab import cli
from ternbus.lab.report.output import MARKER
from ternbus.lab.report.progress import Lines
from ternbus.lab.scenario import scenario
from ternbus.lab.scenario.scenario import End, Fault, Hostile, Local, Scenario, Speeds
from ternbus.lab.scenario.simulated import Simulated
from ternbus.lab.virtual.memory_ledger import MemoryLedger
from ternbus.lab.virtual.simulate import Simulation

SMALL = Scenario(
    devices=5,
    speeds=Speeds(sigma=0.8, median_s=10.0),
    aggregator={"merge.buffer_size": 2, "merge.max_wait_s": 1000.0},
    end=End(versions=12),
)


class Slow(NoiseTrainer):
    """The same result for more arithmetic."""

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:
        np.linalg.inv(np.random.default_rng(0).normal(size=(150, 150)))
        return super().train(start, plan, version=version, seed=seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowNoise(Noise):
    def trainer(self, *, data: Path | None, partition: str) -> Slow:
        return Slow()


def simulated(wanted: Scenario = SMALL, task: Task | None = None, folder: Path | None = None) -> Simulation:
    simulation = Simulation(wanted, task or Noise(), Lines(io.StringIO()), folder)
    simulation.run()
    return simulation


def report(simulation: Simulation) -> dict[str, Any]:
    """What of it the machine does not decide."""
    found = simulation.report(1.0)
    found.pop("machine")
    return found


def test_a_run_that_ends_before_statuses_are_kept_counts_each_device_s_updates() -> None:
    quick = replace(SMALL, speeds=Speeds(sigma=0.8, median_s=0.01), end=End(versions=3))
    found = report(simulated(quick))
    assert sum(device["updates"] for device in found["devices"].values()) == found["updates"] == 6


def check_invariants(simulation: Simulation) -> None:
    """Nothing is merged twice, nothing accepted is lost, the bound holds, and every device has bits of some version."""
    ledger = memory(simulation)
    merges = Counter((row.device, row.base) for row in ledger.contributions)
    assert max(merges.values()) == 1
    core = simulation.aggregator.core
    assert sum(row.merged is None for row in ledger.contributions) == len(core.model.buffer)
    by_version = Counter(row.merged for row in ledger.contributions)
    for version in simulation.moment().versions[1:]:
        assert version.updates == by_version[version.version] > 0
    assert all(0 <= row.staleness <= core.settings.staleness.max for row in ledger.contributions)
    assert vector_digest(core.model.published) == ledger.digests[core.model.version]
    followers = [device.core.follower for device in simulation.devices if device.core.follower.version]
    assert followers
    for follower in followers:
        assert follower.vector is not None
        assert follower.version is not None
        assert vector_digest(follower.vector) == ledger.digests[follower.version]


# --- the federation


def test_the_same_seed_gives_the_same_versions_bit_for_bit() -> None:
    one, other = simulated(), simulated()
    assert memory(one).digests == memory(other).digests
    assert report(one) == report(other)
    assert memory(simulated(replace(SMALL, seed=1))).digests != memory(one).digests


def test_a_federation_keeps_its_promises() -> None:
    line = Simulated(jitter=0.5, up_mbit_s=0.1, down_mbit_s=0.1, latency_s=0.3)
    simulation = simulated(replace(SMALL, simulate=line, end=End(versions=30)))
    check_invariants(simulation)
    assert simulation.moment().version == 30
    assert simulation.moment().accepted >= 60
    assert {row.device for row in memory(simulation).contributions} == {device.name for device in simulation.devices}


def test_digits_are_learned_in_virtual_time() -> None:
    wanted = Scenario(
        task="digits-numpy", devices=4, aggregator={"merge.buffer_size": 2}, end=End(versions=40, accuracy=0.9)
    )
    simulation = simulated(wanted, digits_numpy.TASK)
    check_invariants(simulation)
    evaluated = simulation.moment().evaluated
    assert evaluated is not None
    assert evaluated.accuracy is not None
    assert evaluated.accuracy >= 0.9
    assert simulation.moment().version < 40


def test_what_training_costs_this_machine_is_no_part_of_the_report() -> None:
    quick, slow = report(simulated()), report(simulated(task=SlowNoise()))
    assert quick["versions"] == slow["versions"]
    assert quick["seconds"] == slow["seconds"] > 10


def test_training_lasts_what_was_drawn() -> None:
    """One device, no line to speak of: a version each time that its training takes, and a little for the protocol."""
    wanted = replace(SMALL, devices=1, end=End(versions=5), simulate=Simulated(latency_s=0.0))
    wanted = replace(wanted, aggregator={"merge.buffer_size": 1})
    (pace,) = wanted.speeds.draw(1, wanted.seed)
    seconds = [version.seconds for version in simulated(wanted).moment().versions]
    assert np.diff(seconds) == pytest.approx([pace] * 5)
    jittered = replace(wanted, simulate=Simulated(latency_s=0.0, jitter=0.5))
    assert len({*np.diff([version.seconds for version in simulated(jittered).moment().versions]).round(6)}) == 5


def test_a_device_reports_virtual_seconds() -> None:
    simulation = Simulation(SMALL, Noise(), Lines(io.StringIO()))
    sent: list[Mapping[str, float]] = []

    def look() -> None:
        waiting = [device.state.outstanding for device in simulation.devices]
        sent.extend(update.metrics for update in waiting if update is not None)

    simulation.run(look)
    assert {metrics["seconds"] for metrics in sent} <= {*SMALL.speeds.draw(5, 0)}


def test_devices_take_turns_and_nobody_is_asked_more_often_than_the_others() -> None:
    turns = {"participation": 0.25, "turn_s": 60.0}
    wanted = replace(SMALL, devices=12, plan=turns, end=End(versions=40))
    simulation = simulated(wanted)
    check_invariants(simulation)
    updates = [device["updates"] for device in report(simulation)["devices"].values()]
    assert sum(updates) == 80  # 40 buffers of 2
    assert max(updates) <= 11  # a turn in four versions, and the one that may have been under way
    everybody = [device["updates"] for device in report(simulated(replace(wanted, plan={})))["devices"].values()]
    assert max(everybody) > 11


def test_too_few_turns_for_a_buffer_keep_nobody_waiting_for_good() -> None:
    """Two devices that train on every tenth version, and a buffer of two: a version that waits passes turns on."""
    turns = {"participation": 0.1, "turn_s": 30.0}
    settings = {"merge.buffer_size": 2, "merge.max_wait_s": 1e6}
    wanted = replace(SMALL, devices=2, plan=turns, aggregator=settings, end=End(versions=6))
    simulation = simulated(wanted)
    check_invariants(simulation)
    assert simulation.moment().version == 6
    assert simulation.clock.now < 6 * (10 * 30.0 + max(wanted.speeds.draw(2, 0)) + 1)


def test_a_barrier_waits_for_the_slowest() -> None:
    wanted = replace(SMALL, sync=True, end=End(versions=4), simulate=Simulated(latency_s=0.0))
    simulation = simulated(wanted)
    check_invariants(simulation)
    slowest = max(wanted.speeds.draw(5, wanted.seed))
    versions = simulation.moment().versions
    assert [version.updates for version in versions[1:]] == [5] * 4
    assert [version.staleness_max for version in versions[1:]] == [0] * 4
    assert np.diff([version.seconds for version in versions]) == pytest.approx([slowest] * 4)


def test_a_thin_line_takes_its_time() -> None:
    """Float32 over 0.1 Mbit/s: each round takes as much longer as the bytes of an update and a delta take."""
    wide = replace(
        SMALL,
        sync=True,
        plan={"codec": "float32"},
        aggregator={"downlink.codec": "float32"},
        end=End(versions=3),
        simulate=Simulated(latency_s=0.0),
    )
    thin = replace(wide, simulate=Simulated(latency_s=0.0, up_mbit_s=0.1, down_mbit_s=0.1))
    quick, slow = (simulated(each).moment().versions for each in (wide, thin))
    extra = np.diff([version.seconds for version in slow]) - np.diff([version.seconds for version in quick])
    float32_s = 8 * 643 * 4 / 0.1e6
    assert (extra[1:] > 1.8 * float32_s).all()
    assert (extra[1:] < 3 * float32_s).all()


def test_bytes_are_counted_by_version() -> None:
    found = report(simulated())
    rows = found["versions"]
    assert [row["update_bytes"] for row in rows] == sorted(row["update_bytes"] for row in rows)
    assert rows[-1]["update_bytes"] == found["bytes_up"] > 0
    assert rows[-1]["delta_bytes"] == found["bytes_down"] > 0
    assert rows[0]["update_bytes"] == rows[0]["delta_bytes"] == rows[0]["snapshot_bytes"] == 0
    assert rows[-1]["snapshot_bytes"] == 0  # every device makes the first model itself
    assert found["virtual"] is True


def test_a_device_that_lost_the_model_fetches_a_snapshot() -> None:
    fault = Fault(kill="device:0", after_version=5, restart_after_s=1.0)
    lost = replace(SMALL, aggregator={"downlink.slots": 4}, end=End(versions=8), faults=(fault,))
    found = report(simulated(lost))
    vector_bytes = 4 * found["parameters"]
    assert 0.7 * vector_bytes < found["versions"][-1]["snapshot_bytes"] < 3 * vector_bytes


def test_devices_of_a_version_share_its_vector() -> None:
    simulation = simulated(replace(SMALL, devices=40, aggregator={"merge.buffer_size": 20}))
    followers = [device.core.follower for device in simulation.devices]
    assert len({id(follower.vector) for follower in followers}) == len({follower.version for follower in followers})


def test_every_kth_version_is_evaluated_and_the_last() -> None:
    wanted = replace(SMALL, end=End(versions=7), simulate=Simulated(evaluate_every=3))
    known = [version.version for version in simulated(wanted).moment().versions if version.accuracy is not None]
    assert known == [0, 3, 6, 7]


def test_versions_of_the_same_moment_all_have_a_row() -> None:
    """Devices of one speed finish together, and each of their updates makes a version."""
    wanted = replace(SMALL, speeds=Speeds(sigma=0.0, median_s=10.0), end=End(versions=3))
    wanted = replace(wanted, aggregator={"merge.buffer_size": 1}, simulate=Simulated(latency_s=0.0))
    rows = report(simulated(wanted))["versions"]
    assert len({row["seconds"] for row in rows[1:4]}) == 1
    assert [row["version"] for row in rows] == list(range(len(rows)))


def test_virtual_seconds_end_a_run() -> None:
    simulation = simulated(replace(SMALL, end=End(seconds=100.0)))
    assert 0 < simulation.moment().last.seconds <= 100.0
    assert simulation.clock.now <= 100.0


# --- faults


def test_a_device_that_was_away_comes_back() -> None:
    fault = Fault(kill="device:1", after_version=2, restart_after_s=60.0)
    simulation = Simulation(replace(SMALL, faults=(fault,), end=End(versions=40)), Noise(), Lines(io.StringIO()))
    simulation.run()
    check_invariants(simulation)
    ledger = memory(simulation)
    bases = sorted(row.base for row in ledger.contributions if row.device == "device-1")
    versions = simulation.moment().versions
    away = [version.version for version in versions[3:] if version.seconds < versions[2].seconds + 60.0]
    assert len(away) > 2
    assert not {*away[:-1]} & {*bases}  # on the last of them it trains when it is back
    assert bases[-1] > away[-1]
    assert simulation.devices[1].happened["connected"] == 2


def test_a_broker_that_died_costs_no_update() -> None:
    fault = Fault(kill="broker", after_version=3, restart_after_s=45.0)
    simulation = simulated(replace(SMALL, faults=(fault,), end=End(versions=20)))
    check_invariants(simulation)
    versions = simulation.moment().versions
    assert versions[-1].version == 20
    gap = versions[4].seconds - versions[3].seconds
    assert gap >= 45.0


def test_an_aggregator_that_died_goes_on_from_its_ledger(tmp_path: Path) -> None:
    fault = Fault(kill="aggregator", after_version=3, restart_after_s=5.0)
    wanted = replace(SMALL, faults=(fault,), end=End(versions=20))
    folder = tmp_path / "aggregator"
    simulation = simulated(wanted, folder=folder)
    moment = simulation.moment()
    simulation.close()
    assert moment.version == 20
    assert moment.began == 0.0
    assert all(version.accuracy is not None for version in moment.versions)
    ledger = Ledger(folder / LEDGER, read_only=True)
    twice = ledger.db.execute("SELECT device, base FROM updates GROUP BY device, base HAVING count(*) > 1").fetchall()
    lost = ledger.db.execute(
        "SELECT version FROM versions v WHERE updates != (SELECT count(*) FROM updates WHERE merged = v.version)"
    ).fetchall()
    assert (twice, lost) == ([], [])
    assert vector_digest(ledger.vector(20)) == vector_digest(simulation.aggregator.core.model.published)
    ledger.close()


def test_without_a_ledger_an_aggregator_cannot_die() -> None:
    fault = Fault(kill="aggregator", after_version=3)
    with pytest.raises(ConfigError, match="--ledger"):
        simulated(replace(SMALL, faults=(fault,)))


def test_a_ledger_changes_nothing_but_the_keys(tmp_path: Path) -> None:
    wanted = replace(SMALL, simulate=Simulated(latency_s=0.01))
    kept = simulated(wanted, folder=tmp_path / "aggregator")
    plain = simulated(wanted)
    assert kept.aggregator.core.model.digest == plain.aggregator.core.model.digest
    assert [row["seconds"] for row in report(kept)["versions"]] == [row["seconds"] for row in report(plain)["versions"]]
    kept.close()


# --- scenario and command


def test_the_scenario_says_what_is_simulated() -> None:
    given = {"jitter": 0.2, "up_mbit_s": 1, "down_mbit_s": 4.0, "latency_s": 0.05, "evaluate_every": 3}
    assert scenario.parse({"simulate": given}).simulate == Simulated(
        jitter=0.2, up_mbit_s=1.0, down_mbit_s=4.0, latency_s=0.05, evaluate_every=3
    )


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"up_mbit_s": -1}, "simulate.up_mbit_s is -1"),
        ({"latency_s": math.nan}, "simulate.latency_s is nan"),
        ({"evaluate_every": 0}, "simulate.evaluate_every is 0"),
        ({"evaluate_every": 1.5}, "simulate.evaluate_every is 1.5"),
        ({"bandwidth": 1}, "unknown key 'simulate.bandwidth'"),
    ],
)
def test_what_cannot_be_simulated_is_refused_by_name(table: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        scenario.parse({"simulate": table})


def test_the_command_leaves_a_report_and_a_model(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ["--task", "digits-numpy", "--devices", "3", "--versions", "3", "--every", "2", "--ledger", "--json"]
    result = CliRunner().invoke(cli.app, ["simulate", *options, "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found == json.loads((tmp_path / "out" / "report.json").read_text())
    assert (found["virtual"], found["versions"][-1]["version"]) == (True, 3)
    assert [row["accuracy"] is None for row in found["versions"]] == [False, True, False, False]
    assert {each.name for each in (tmp_path / "out").iterdir()} >= {"aggregator", "model.safetensors", "report.png"}
    version, digest, _ = administration.tensors_of(tmp_path / "out" / "aggregator", None)
    assert version == 3
    assert digest


INTERRUPTING = """
import os, signal
from dataclasses import dataclass
from ternbus.edge.tasks.digits_numpy import DigitsNumpy

@dataclass(frozen=True, slots=True, kw_only=True)
class Interrupting(DigitsNumpy):
    after: int = 0

    def evaluator(self, *, data):
        judge, seen = DigitsNumpy.evaluator(self, data=data), []

        class Judge:
            samples = judge.samples

            def evaluate(self, tensors):
                seen.append(tensors)
                if len(seen) == after:  # of version 0 it is the first
                    os.kill(os.getpid(), signal.SIGINT)
                return judge.evaluate(tensors)

        after = self.after
        return Judge()

FIRST, THIRD = Interrupting(after=1), Interrupting(after=3)
"""


def test_a_simulation_that_is_interrupted_reports_the_versions_until_then(tmp_path: Path) -> None:
    (tmp_path / "ends_late.py").write_text(INTERRUPTING)
    line = "lab", "simulate", "--task", "ends_late:THIRD", "--devices", 3, "--versions", 500, "--out", "out", "--json"
    said = typed(tmp_path, *line, code=130)
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert f"{json.dumps(found)}\n" in said
    assert "ternbus: stopped by Ctrl-C; the report is of the versions until then\n" in said
    assert (found["interrupted"], 2 <= found["versions"][-1]["version"] < 10) == (True, True)
    assert load_metadata(tmp_path / "out" / "model.safetensors")["version"] == str(found["versions"][-1]["version"])
    finished = typed(tmp_path, *line[:3], "digits-numpy", *line[4:6], "--versions", 1, "--out", "out")
    assert "stopped" not in finished
    assert "interrupted" not in json.loads((tmp_path / "out" / "report.json").read_text())


def test_a_simulation_that_is_interrupted_before_its_first_version_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "ends_early.py").write_text(INTERRUPTING)
    said = typed(tmp_path, "lab", "simulate", "--task", "ends_early:FIRST", "--devices", 3, "--out", "out", code=130)
    assert said.endswith("ternbus: stopped by Ctrl-C; no report was written\n")
    assert [each.name for each in (tmp_path / "out").iterdir()] == [MARKER]


def test_a_record_that_only_a_restart_would_read_is_not_kept() -> None:
    ledger = MemoryLedger([("x", b"1"), ("y", b"2")])
    ledger.write([records.FramesRetained(frames=(("x", b"3"), ("y", b""))), records.SessionBegun(session=2)])
    assert (ledger.frame("x"), ledger.frame("y"), ledger.status()["state"]) == (b"3", b"", "open")


OWN = replace(
    SMALL, task="digits-numpy", partition="dirichlet:0.2", local=Local(hold_out=0.2, fine_tune=2.0), end=End(versions=8)
)


def test_devices_report_of_their_own_data_and_hostile_ones_do_not() -> None:
    wanted = replace(OWN, hostile=(Hostile(kind="free-rider", share=0.4),))
    found = report(simulated(wanted, digits_numpy.TASK))
    assert found["local"]["devices"] == 3
    assert (found["local"]["oldest"], found["local"]["newest"]) == (8, 8)
    assert found["local"]["fine_tuned"]["devices"] == 3
    tuned = found["local"]["fine_tuned"]["metrics"]["accuracy"]
    assert tuned["gain"]["median"] > 0  # each has few classes, and tunes to them
    assert sum(row["local"] is not None for row in found["versions"]) > 2
    assert found["accuracy"] == found["versions"][-1]["accuracy"] is not None  # the evaluator's, of all classes


def test_what_is_reported_is_what_was_held_out() -> None:
    simulation = simulated(OWN, digits_numpy.TASK)
    vector = to_tensors(simulation.schema, simulation.aggregator.core.model.published)
    accuracies = []
    for index in range(OWN.devices):
        trainer, held = halves_of(digits_numpy.TASK, None, [OWN.partition_of(index)], 0.2)[0]
        accuracies.append(held.evaluate(vector).values["accuracy"])
        samples = {row.samples for row in memory(simulation).contributions if row.device == f"device-{index}"}
        assert samples <= {trainer.samples}
    assert report(simulation)["local"]["metrics"]["accuracy"]["mean"] == pytest.approx(
        sum(accuracies) / len(accuracies), abs=1e-6
    )


def test_a_real_ledger_has_the_same_reports(tmp_path: Path) -> None:
    """Until the devices' last words: they come after the last version, which both have."""
    in_memory, on_disk = simulated(OWN, digits_numpy.TASK), simulated(OWN, digits_numpy.TASK, tmp_path / "agg")
    one, other = report(in_memory), report(on_disk)
    assert one["local"] == other["local"]
    assert [row["local"] for row in one["versions"]] == [row["local"] for row in other["versions"]]
    on_disk.close()


def test_under_a_sealing_plan_nothing_is_reported() -> None:
    assert report(simulated(replace(OWN, plan={"seal": True}), digits_numpy.TASK))["local"] is None
