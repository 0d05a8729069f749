"""What devices measure on data that they hold out: reported, spread over devices, improved by fine-tuning."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from support.small_world import Bench, make_directory, ternary_block
from ternbus.aggregator.shell import cli as aggregator_cli
from ternbus.aggregator.store import status as statuses
from ternbus.aggregator.store.device_metrics import DeviceMetrics, Report, sentences, spread
from ternbus.aggregator.store.measurements import Measurements
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.direction import Direction
from ternbus.broker.protocol.invitation import Invitation
from ternbus.broker.protocol.schema import Schema, to_vector
from ternbus.edge.core.actions import StartFineTuning
from ternbus.edge.core.events import FineTuned, FineTuningFailed
from ternbus.edge.core.fine_tuning import plan_of
from ternbus.edge.learn.task import Task, Trainer, halves_of
from ternbus.edge.plan.plan import Plan
from ternbus.edge.shell import agent
from ternbus.edge.shell import cli as edge_cli
from ternbus.edge.shell.directory import DeviceDirectory
from ternbus.edge.shell.options import Options
from ternbus.edge.shell.worker import fine_tune
from ternbus.edge.tasks import digits_numpy


def report(device: str, version: int, accuracy: float, **more: float) -> Report:
    return Report(device=device, version=version, samples=9, values={"accuracy": accuracy, **more})


def collected(*reports: Report) -> Measurements:
    found = Measurements()
    for each in reports:
        found.add_local(each)
    return found


def summary_of(*reports: Report) -> dict[str, Any]:
    summary: dict[str, Any] = collected(*reports).common()["local"]
    return summary


def row(values: list[float], better: Direction = "higher") -> dict[str, Any]:
    return {"better": better, "devices": len(values), **spread(values, better)}


# --- the spread


@given(values=st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_the_spread_against_a_plain_second_reckoning(values: list[float]) -> None:
    found = spread(values)
    assert found["mean"] == pytest.approx(np.mean(values))
    assert found["median"] == pytest.approx(np.median(values))
    assert found["worst_decile"] == pytest.approx(np.mean(np.sort(values)[: -(-len(values) // 10)]))
    assert found["worst_decile"] <= found["median"] + 1e-12


def test_the_worst_tenth_of_devices_is_not_hidden_by_the_mean() -> None:
    found = spread([0.1, 0.2, *[0.95] * 18])
    assert found["worst_decile"] == pytest.approx(0.15)
    assert found["median"] == 0.95
    assert found["mean"] == pytest.approx(0.87)


def test_a_device_counts_once_with_its_newest_version_in_whichever_order_reports_come() -> None:
    reports = [report("a", 3, 0.3), report("a", 1, 0.1), report("b", 2, 0.5), report("b", 2, 0.7)]
    tests, summary = collected(*reports).devices, summary_of(*reports)
    assert (summary["devices"], summary["oldest"], summary["newest"]) == (2, 2, 3)
    assert summary["metrics"]["accuracy"]["mean"] == pytest.approx((0.3 + 0.7) / 2)
    assert tests.version(2, {}) == {"devices": 1, "metrics": {"accuracy": row([0.7])}}
    assert tests.version(0, {}) is None
    assert tests.device("a", {}) == {"version": 3, "samples": 9, "metrics": {"accuracy": 0.3}, "gain": {}}


def test_the_gain_of_own_models_is_spread_too_and_may_be_a_loss() -> None:
    summary = summary_of(
        report("a", 3, 0.5, personal_accuracy=0.75), report("b", 3, 0.9, personal_accuracy=0.8), report("c", 3, 0.4)
    )
    tuned = summary["fine_tuned"]["metrics"]["accuracy"]
    assert (summary["devices"], tuned["devices"], tuned["improved"]) == (3, 2, 1)
    assert tuned["gain"]["worst_decile"] == pytest.approx(-0.1)
    assert tuned["gain"]["mean"] == pytest.approx(0.075)
    lines = dict(sentences(summary))
    assert lines["local accuracy"] == "worst tenth 0.4000, median 0.5000, mean 0.6000 (3 devices, version 3)"
    assert lines["their gain"] == "worst tenth -0.1000, median +0.0750, mean +0.0750 (1 of 2 better)"


def test_without_reports_nothing_is_said() -> None:
    assert DeviceMetrics().summary(None, {}) is None
    assert sentences(None) == []


def test_what_no_metric_can_be_does_not_count() -> None:
    assert collected(report("a", 1, 1e308)).common()["local"] is None
    assert summary_of(report("b", 1, 0.5, personal_accuracy=-1e308))["fine_tuned"] is None
    assert summary_of(*(report(str(number), 1, 1e100) for number in range(9)))["metrics"]["accuracy"]["mean"] == 1e100


def test_the_loss_is_shown_where_there_is_no_metric() -> None:
    bare = [Report(device=name, version=1, samples=9, values={"loss": loss}) for name, loss in (("a", 0.5), ("b", 2.0))]
    assert dict(sentences(summary_of(*bare))) == {
        "local loss": "worst tenth 2.0000, median 1.2500, mean 1.2500 (2 devices, version 1; lower is better)"
    }
    assert [name for name, _ in sentences(summary_of(report("a", 1, 0.5, loss=1.0)))] == ["local accuracy"]


# --- the aggregator's status


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(make_directory(tmp_path / "aggregator", merge__buffer_size=2))
    made.start()
    yield made
    made.close()


def test_the_status_has_the_spread_by_version_and_of_each_devices_newest(bench: Bench) -> None:
    devices = [bench.join(f"pi-{number}") for number in range(3)]
    judge = bench.join("judge", evaluator=True)
    bench.receive(judge.topic("metrics"), judge.metrics(0, accuracy=0.99))
    for device, accuracy in zip(devices, (0.2, 0.6, 0.7), strict=True):
        bench.receive(device.topic("metrics"), device.metrics(0, "local", accuracy=accuracy))
    for device in devices[:2]:
        bench.send(device, ternary_block(bench.schema, 1), 0)
    values = {"accuracy": 0.9, "personal_accuracy": 0.95}
    bench.receive(devices[1].topic("metrics"), devices[1].metrics(1, "local", seq=None, **values))
    found = statuses.read(bench.directory)
    zero, one = found["versions"]
    assert zero["metrics"] == {"accuracy": 0.99}  # the evaluator's alone
    assert zero["local"] == {"devices": 3, "metrics": {"accuracy": row([0.2, 0.6, 0.7])}}
    assert one["local"] == {"devices": 1, "metrics": {"accuracy": row([0.9])}}
    assert found["local"]["metrics"]["accuracy"] == row([0.2, 0.9, 0.7])
    assert (found["local"]["oldest"], found["local"]["newest"]) == (0, 1)
    assert found["local"]["fine_tuned"]["metrics"]["accuracy"]["improved"] == 1
    gain = {"accuracy": pytest.approx(0.05)}
    assert found["devices"]["pi-1"]["local"] == {"version": 1, "samples": 100, "metrics": values, "gain": gain}
    assert found["devices"]["judge"]["local"] is None
    json.dumps(found, allow_nan=False)


def test_people_see_the_worst_tenth_and_the_median(bench: Bench) -> None:
    assert "worst tenth" not in status_text(bench)
    for number, accuracy in enumerate((0.25, 0.5, 0.75)):
        device = bench.join(f"pi-{number}")
        bench.receive(device.topic("metrics"), device.metrics(0, "local", accuracy=accuracy))
    text = status_text(bench)
    assert "local accuracy: worst tenth 0.2500, median 0.5000, mean 0.5000 (3 devices, version 0)" in text
    heading, last = text.rstrip().splitlines()[-2:]
    assert heading.split()[-4:] == ["worst", "tenth", "median", "devices"]
    assert last.split()[-3:] == ["0.2500", "0.5000", "3"]


def test_a_number_that_a_device_makes_up_does_not_tear_the_table(bench: Bench) -> None:
    """An epsilon of 308 digits, say."""
    pi = bench.join("pi")
    bench.send(pi, ternary_block(bench.schema, 1), base=0, metrics={"epsilon": 1e308})
    text = status_text(bench)
    assert "1e+308" in text
    assert max(map(len, text.splitlines())) < 250


def test_names_that_look_the_same_on_a_screen_have_a_column_each(bench: Bench) -> None:
    """An evaluator chose them, and ended the operator's `status` with a traceback."""
    judge = bench.join("judge", evaluator=True)
    values = {f"{'a' * 40}{number}": 0.1 * number for number in range(3)} | {"\x1b[2J": 0.5}
    meta = {"version": 0, "samples": 1, "split": "test", "values": values}
    bench.receive(judge.topic("metrics"), judge.frame("metrics", meta))
    heading, last = status_text(bench).rstrip().splitlines()[-2:]
    assert heading.count("a" * 40) == 3
    assert heading.split()[-3:] == ["by", "judge", "time"]
    assert last.split()[3:7] == ["0.0000", "0.1000", "0.2000", "0.5000"]


def status_text(bench: Bench) -> str:
    done = CliRunner().invoke(aggregator_cli.app, ["status", str(bench.directory)])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_device_that_was_revoked_does_not_count(bench: Bench) -> None:
    for name, accuracy in (("good", 0.5), ("bad", 0.0)):
        device = bench.join(name)
        bench.receive(device.topic("metrics"), device.metrics(0, "local", accuracy=accuracy))
    bench.ledger.db.execute("UPDATE devices SET state = 'revoked' WHERE name = 'bad'")
    found = statuses.read(bench.directory)
    assert found["local"]["metrics"] == found["versions"][0]["local"]["metrics"] == {"accuracy": row([0.5])}


# --- the device


def halves(task: Task = digits_numpy.TASK, share: float = 0.2) -> tuple[Trainer, Trainer]:
    return halves_of(task, None, ["dirichlet:0.2:1/8:0"], share)[0]


def test_a_task_that_does_not_split_is_found_out() -> None:
    class Careless(digits_numpy.DigitsNumpy):
        def trainer(self, *, data: Path | None, partition: str) -> digits_numpy.NumpyTrainer:
            return super().trainer(data=data, partition=partition.partition(";")[0])

    with pytest.raises(ConfigError, match="the task digits-numpy holds no data out"):
        halves(Careless())


def job(plan: Plan) -> StartFineTuning:
    tensors = digits_numpy.TASK.initial(0)
    schema = Schema.of({name: tensor.shape for name, tensor in tensors.items()})
    return StartFineTuning(version=4, schema=schema, vector=to_vector(schema, tensors), plan=plan, seed=1)


def test_fine_tuning_trains_on_the_rest_and_measures_on_what_is_held_out() -> None:
    trainer, held = halves()
    plan = plan_of(Plan.from_meta(digits_numpy.TASK.default_plan), 4.0)
    found = fine_tune(trainer, held, job(plan))
    assert isinstance(found, FineTuned)
    assert (found.version, found.samples) == (4, held.samples)
    assert found.before == held.evaluate(digits_numpy.TASK.initial(0)).values
    assert found.after == held.evaluate(found.tensors).values
    assert found.after["accuracy"] > found.before["accuracy"] + 0.3  # skewed classes, from a model that knows nothing
    again = trainer.train(digits_numpy.TASK.initial(0), plan, version=4, seed=1)
    assert all(np.array_equal(again.tensors[name], found.tensors[name]) for name in again.tensors)


def test_fine_tuning_that_diverges_is_no_model() -> None:
    plan = replace(plan_of(Plan.from_meta(digits_numpy.TASK.default_plan), 4.0), learning_rate=1e3, weight_decay=1e3)
    found = fine_tune(*halves(), job(plan))
    assert isinstance(found, FineTuningFailed)
    assert "diverged" in found.reason


def test_the_plan_of_ones_own_model_does_not_stand_still_where_the_schedule_has_ended() -> None:
    asked = {
        "schedule": "linear",
        "schedule_versions": 10,
        "warmup_versions": 2,
        "local_steps": 7,
        "local_seconds": 1.0,
    }
    plan = Plan.from_meta({**asked, "learning_rate": 0.1, "proximal_mu": 0.5})
    assert plan.rate(100) == 0
    own = plan_of(plan, 3.0)
    assert own.rate(100) == own.rate(0) == 0.1
    assert own.steps(64) == 6
    assert (own.local_seconds, own.statistics_rate, own.proximal_mu) == (None, 1.0, 0.5)


def prepared(folder: Path, **about: Any) -> DeviceDirectory:
    invitation = Invitation(
        federation="fed", device="pi", broker="mqtt://127.0.0.1:9", aggregator_key="ab" * 32, code="c" * 32
    )
    home = DeviceDirectory(folder)
    home.prepare(invitation, task="digits-numpy", data=None, partition="iid:0/4", **about)
    return home


def test_the_share_is_kept_with_the_device_and_without_one_nothing_can_be_measured(tmp_path: Path) -> None:
    settings = prepared(tmp_path / "a", hold_out=0.25).settings()
    assert settings.hold_out == "0.25"
    agent.check(settings, Options(reports=True, fine_tune=1.0))
    without = prepared(tmp_path / "b").settings()
    agent.check(without, Options())
    for options in (Options(reports=True), Options(fine_tune=1.0)):
        with pytest.raises(ConfigError, match=r"--hold-out 0\.2"):
            agent.check(without, options)
    with pytest.raises(ConfigError, match=r"held-out share of the data is 0\.9"):
        replace(settings, hold_out="0.9")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hold-out", "0.6"], "the held-out share of the data is 0.6: it must be above 0 and at most 0.4"),
        (["--hold-out", "0.2", "--report-metrics"], "add --run"),
        (["--fine-tune", "2"], "add --run"),
        (["--report-metrics", "--run"], "needs held-out data, and this device has none"),
        (["--fine-tune", "2", "--evaluate"], "add --run"),
        (["--run", "--evaluate"], "leave out one of them"),
        (["--stay"], "add --run or --evaluate"),
    ],
)
def test_join_says_what_is_wrong_before_anything_is_sent(tmp_path: Path, options: list[str], message: str) -> None:
    invitation = tmp_path / "pi.toml"
    text = Invitation(
        federation="fed", device="pi", broker="mqtt://127.0.0.1:9", aggregator_key="ab" * 32, code="c" * 32
    ).dumps()
    invitation.write_text(text)
    invitation.chmod(0o600)
    arguments = ["join", str(invitation), str(tmp_path / "pi"), "--task", "digits-numpy", *options]
    done = CliRunner().invoke(edge_cli.app, arguments)
    assert isinstance(done.exception, ConfigError)
    assert message in str(done.exception)
