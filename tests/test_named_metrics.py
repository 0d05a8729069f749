"""Metrics with names and directions: what a regression shows, what ends it, and what a hostile device cannot change."""

import io
import json
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from support.small_world import Bench, Device, make_directory, refusals, saved, ternary_block
from ternbus.aggregator.core import events, records
from ternbus.aggregator.shell import administration, repairing
from ternbus.aggregator.shell import cli as aggregator_cli
from ternbus.aggregator.store import status as statuses
from ternbus.aggregator.store.ledger import LEDGER
from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.direction import direction_of, primary_of
from ternbus.broker.protocol.messages import Metrics
from ternbus.edge.learn.class_counts import class_counts_of, counted
from ternbus.edge.learn.task import Evaluation
from ternbus.edge.tasks import digits_numpy
from ternbus.lab.report import plots, progress, report
from ternbus.lab.scenario.end import End, MetricLimit
from ternbus.lab.scenario.scenario import Hostile, Scenario
from ternbus.lab.virtual.simulate import Simulation

TASK = '''
"""Linear regression: the target is a sum of three inputs, with noise; each device has its own offset."""
import numpy as np
from ternbus.edge import Evaluation, Trained, select

class Regression:
    name = "sums"
    default_plan = {"local_epochs": 1, "batch_size": 8, "learning_rate": 0.02}

    def initial(self, seed):
        return {"w": np.zeros(3, np.float32), "b": np.zeros(1, np.float32)}

    def trainer(self, *, data, partition):
        x, y = drawn(0, 400)
        chosen = select(partition, np.zeros(400, np.int64))
        number = int(partition.partition(":")[2].partition("/")[0] or 0)  # none of "all", which `lab run` tries first
        return Trainer(x[chosen], y[chosen] + 0.3 * number)

    def evaluator(self, *, data):
        x, y = drawn(1, 100)
        return Trainer(x, y + 0.45)

def drawn(seed, rows):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3)).astype(np.float32)
    return x, x @ np.float32([1, -2, 0.5]) + rng.normal(0, 0.05, rows).astype(np.float32)

class Trainer:
    def __init__(self, x, y):
        self.x, self.y = x, y

    @property
    def samples(self):
        return len(self.y)

    def train(self, start, plan, *, version, seed):
        w, b = start["w"].copy(), start["b"].copy()
        for rows in plan.batches(self.samples, np.random.default_rng(seed)):
            error = self.x[rows] @ w + b - self.y[rows]
            w -= plan.rate(version) * 2 * error @ self.x[rows] / len(rows)
            b -= plan.rate(version) * 2 * error.mean()
        return Trained(tensors={"w": w, "b": b}, samples=self.samples, metrics={"loss": float((error**2).mean())})

    def evaluate(self, tensors):
        error = self.x @ tensors["w"] + tensors["b"] - self.y
        loss = float((error**2).mean())
        values = {"loss": loss, "mae": float(abs(error).mean()), "r2": 1 - loss / float(self.y.var())}
        return Evaluation(samples=self.samples, values=values, better={"mae": "lower", "r2": "higher"})

TASK = Regression()
'''
SCENARIO = """
task = "sums_task:TASK"
devices = 4
partition = "iid"
end = { versions = 200, metric = { %s } }
local = { hold_out = 0.2, fine_tune = 5 }
aggregator.merge.buffer_size = 2
"""
LIMIT = 'name = "mae", at_most = 0.5'


def simulated(folder: Path, limit: str, *options: str, kind: str = "simulate") -> subprocess.CompletedProcess[str]:
    (folder / "sums_task.py").write_text(TASK)
    (folder / "sums.toml").write_text(SCENARIO % limit)
    command = [sys.executable, "-m", "ternbus", "lab", kind, str(folder / "sums.toml"), *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A simulation that ended by its mean absolute error: the folder, the report, and what people saw."""
    folder = tmp_path_factory.mktemp("sums")
    done = simulated(folder, LIMIT, "--ledger", "--json")
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), done.stderr


def test_a_regression_ends_when_its_error_is_low_enough(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, found, _ = finished
    errors = [row["evaluations"]["evaluator"]["mae"] for row in found["versions"]]
    assert 3 < len(errors) < 200
    assert errors[-1] <= 0.5 < min(errors[:-1])
    assert found["scenario"]["end"]["metric"] == {"name": "mae", "at_least": None, "at_most": 0.5}


def test_the_report_has_all_metrics_and_their_directions(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, found, seen = finished
    assert (found["metric"], found["accuracy"]) == ("mae", None)
    assert found["better"] == {"loss": "lower", "mae": "lower", "r2": "higher"}
    assert found["metrics"] == found["versions"][-1]["evaluations"]["evaluator"]
    assert found["best"]["mae"] == {"value": found["metrics"]["mae"], "version": len(found["versions"]) - 1}
    best = max(row["evaluations"]["evaluator"]["r2"] for row in found["versions"])
    assert found["best"]["r2"]["value"] == best > found["versions"][0]["evaluations"]["evaluator"]["r2"]
    assert f"test mae         {found['metrics']['mae']:.4f} (lower is better)" in seen
    assert f"test r2          {found['metrics']['r2']:.4f}" in seen
    assert "test loss" not in seen  # there are other metrics
    assert "  mae 1" in seen.splitlines()[1]  # progress


def test_the_worst_tenth_of_an_error_is_the_largest(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, found, seen = finished
    own = {name: row["local"]["metrics"] for name, row in found["devices"].items()}
    assert len(own) == 4
    spread = found["local"]["metrics"]
    assert spread["mae"]["worst_decile"] == max(values["mae"] for values in own.values()) > spread["mae"]["mean"]
    assert spread["r2"]["worst_decile"] == min(values["r2"] for values in own.values())
    assert (spread["mae"]["better"], spread["r2"]["better"]) == ("lower", "higher")
    table = [line for line in seen.splitlines() if line.startswith("device-")]
    shown = [float(line.split()[4]) for line in table]
    assert shown == sorted(shown, reverse=True)
    assert len(shown) == 4


def test_a_gain_is_above_zero_when_an_error_becomes_less(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, found, _ = finished
    for row in found["devices"].values():
        values, gain = row["local"]["metrics"], row["local"]["gain"]
        assert gain["mae"] == pytest.approx(values["mae"] - values["personal_mae"], abs=2e-6)
        assert gain["r2"] == pytest.approx(values["personal_r2"] - values["r2"], abs=2e-6)
        assert gain["mae"] > 0  # its offset is its own
        assert (row["samples"], row["local"]["samples"]) == (80, 20)
        assert row["classes"] is None  # a regression has none
    assert found["local"]["fine_tuned"]["metrics"]["mae"]["improved"] == 4


def test_the_plot_has_a_panel_for_each_metric(finished: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    _, found, _ = finished
    assert len(plots.panels(found, "virtual seconds")) == 6  # mae twice, r2, staleness, own data, samples
    if find_spec("matplotlib"):
        formula = json.loads(json.dumps(found).replace('"r2"', '"$r^{$"'))
        assert report.plot(formula, tmp_path / "report.png") is None
        assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_aggregators_status_says_the_same(finished: tuple[Path, dict[str, Any], str]) -> None:
    folder, found, _ = finished
    home = folder / "ternbus-lab" / "aggregator"
    kept = statuses.read(home)
    assert (kept["metric"], kept["better"]) == ("mae", found["better"])
    assert kept["local"]["metrics"]["mae"]["worst_decile"] == pytest.approx(
        found["local"]["metrics"]["mae"]["worst_decile"], abs=1e-6
    )
    text = CliRunner().invoke(aggregator_cli.app, ["status", str(home)]).stdout
    assert "metrics: mae (lower is better), r2 (higher is better)" in text
    assert "mae by evaluator" in text
    assert "r2 by evaluator" in text
    assert "; lower is better)" in next(line for line in text.splitlines() if line.startswith("local mae: worst tenth"))
    heading = next(line for line in text.splitlines() if line.startswith("device "))
    assert heading.split()[-4:] == ["out", "own", "mae", "gain"]


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ('name = "mea", at_most = 0.3', "[end] the evaluation has no mea: it has loss, mae, r2"),
        ('name = "mae", at_least = 0.3', "[end] mae is better when lower: set at_most"),
        ('name = "r2", at_most = 0.3', "[end] r2 is better when higher: set at_least"),
        ('name = "mae", at_most = 1000', "[end] mae: the initial model already has "),
        ('name = "mae"', "end.metric needs exactly one of the keys at_least and at_most"),
        ("at_most = 0.3", "end.metric lacks the key name"),
        ('name = "mae", at_most = nan', "end.metric.at_most is nan"),
        ('name = "mae", most = 1', "unknown key 'end.metric.most'"),
    ],
)
def test_a_limit_that_is_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, limit: str, message: str) -> None:
    done = simulated(tmp_path, limit)
    assert done.returncode == 2, done.stdout
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_limit_is_reached_in_its_direction() -> None:
    low, high = MetricLimit(name="mae", at_most=0.0), MetricLimit(name="r2", at_least=0.5)
    assert [low.reached({"mae": value}) for value in (0.1, 0.0, -1.0, float("nan"))] == [False, True, True, False]
    assert [high.reached({"r2": value}) for value in (0.4, 0.5)] == [False, True]
    assert not low.reached({"r2": 0.0})
    both = End(accuracy=0.9, metric=low)
    assert both.reached(version=0, seconds=0, evaluations=[{"accuracy": 0.9}])
    assert both.reached(version=0, seconds=0, evaluations=[{"accuracy": 0.1}, {"mae": 0.0}])
    assert not both.reached(version=0, seconds=0, evaluations=[{"accuracy": 0.1, "mae": 1.0}])


def test_a_limit_that_the_initial_model_reaches_is_refused() -> None:
    end = End(metric=MetricLimit(name="mae", at_most=0.5))
    end.refuse_start({"accuracy": 0.1, "mae": 0.6})
    end.refuse_start({})  # not evaluated yet
    with pytest.raises(ConfigError, match=r"\[end\] mae: the initial model already has 0.5, .*: .* that is lower$"):
        end.refuse_start({"mae": 0.5})


# --- which metric is the primary one, and its direction


@pytest.mark.parametrize(
    ("names", "primary"),
    [
        (["loss", "f1", "accuracy"], "accuracy"),
        (["loss", "mae", "r2"], "mae"),
        (["loss", "personal_loss"], "loss"),
        (["personal_x"], "personal_x"),  # of no metric x: only a name
        (["personal_mae", "mae"], "mae"),
        ([], None),
    ],
)
def test_the_primary_metric_is_the_accuracy_or_the_tasks_first_but_the_loss(names: list[str], primary: str) -> None:
    assert primary_of(names) == primary


def test_a_personal_metric_has_the_direction_of_the_other() -> None:
    assert direction_of("personal_mae", {"mae": "lower"}) == "lower"
    assert direction_of("personal_loss", {}) == "lower"
    assert direction_of("personal_mae", {"personal_mae": "higher", "mae": "lower"}) == "higher"
    assert direction_of("accuracy", {}) == "higher"


def test_a_direction_that_is_none_is_the_tasks_mistake() -> None:
    with pytest.raises(ConfigError, match="mae is better when 'down': write one of higher, lower"):
        Evaluation(samples=1, values={"mae": 1.0}, better={"mae": "down"})  # type: ignore[dict-item]


# --- what peers state


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    made = Bench(make_directory(tmp_path / "aggregator", merge__buffer_size=2))
    made.start()
    return made


def tell(bench: Bench, device: Device, split: str = "local", version: int = 0, **about: Any) -> list[Any]:
    meta = {"version": version, "samples": 100, "split": split, **about}
    return bench.receive(device.topic("metrics"), device.frame("metrics", meta))


def test_directions_and_classes_outlive_a_restart_and_are_kept_once(bench: Bench) -> None:
    pi, judge = bench.join("pi"), bench.join("judge", evaluator=True)
    tell(bench, judge, "test", values={"mae": 0.5, "loss": 0.25}, better={"mae": "lower"})
    tell(bench, pi, values={"mae": 0.75}, better={"mae": "lower"}, classes={"cat": 3, "dog": 0})
    bench.send(pi, ternary_block(bench.schema, 1), 0)
    before = statuses.read(bench.directory)
    assert (before["metric"], before["better"]) == ("mae", {"mae": "lower", "loss": "lower"})
    assert before["devices"]["pi"]["classes"] == {"cat": 3, "dog": 0}
    assert before["devices"]["pi"]["samples"] == 10
    assert before["devices"]["judge"]["classes"] is None
    bench.restart()
    bench.start()
    assert statuses.read(bench.directory)["better"] == before["better"]
    tell(bench, pi, values={"mae": 0.5}, better={"mae": "lower"}, classes={"cat": 3, "dog": 0})
    rows = bench.ledger.db.execute("SELECT device, version, split FROM metrics ORDER BY device, split").fetchall()
    assert rows == [("judge", 0, "stated"), ("judge", 0, "test"), ("pi", 0, "local"), ("pi", 0, "stated")]
    tell(bench, pi, values={"mae": 0.5})  # as an earlier program says it
    assert statuses.read(bench.directory)["devices"]["pi"]["classes"] is None


def test_a_ledger_and_a_stranger_without_directions_are_read_as_before(bench: Bench) -> None:
    judge = bench.join("judge", evaluator=True)
    bench.receive(judge.topic("metrics"), judge.metrics(0, loss=2.0, accuracy=0.5))
    assert bench.ledger.db.execute("SELECT split FROM metrics").fetchall() == [("test",)]
    found = statuses.read(bench.directory)
    assert (found["metric"], found["better"]) == ("accuracy", {"loss": "lower", "accuracy": "higher"})


HOSTILE: list[Mapping[str, Any]] = [
    {"better": {"r2": "lower"}},
    {"better": {"mae": "LOWER"}},
    {"better": {"mae": ["lower"]}},
    {"better": {"mae": None}},
    {"better": {f"m{number}": "lower" for number in range(33)}},
    {"better": "lower"},
    {"better": {0: "lower"}},
    {"classes": {"a": -1}},
    {"classes": {"a": 2**32}},
    {"classes": {"a": True}},
    {"classes": {str(number): 1 for number in range(257)}},
    {"classes": [1, 2]},
]


@pytest.mark.parametrize("about", HOSTILE)
def test_a_wrong_map_is_refused_and_nothing_of_it_kept(bench: Bench, about: Mapping[str, Any]) -> None:
    pi = bench.join("pi")
    assert saved(tell(bench, pi, values={"mae": 0.5}, **about), records.MetricsReceived) == []
    assert refusals(bench.tick(1.0)) == {"bad-meta": 1}
    assert statuses.read(bench.directory)["local"] is None
    assert saved(tell(bench, pi, values={"mae": 0.5}, better={"mae": "lower"}), records.MetricsReceived)


def test_one_device_turns_no_metric_around(bench: Bench) -> None:
    for number in range(3):
        tell(bench, bench.join(f"pi-{number}"), values={"mae": float(number)}, better={"mae": "lower"})
    values = {"accuracy": 1.0, "mae": 9.0, "\x1b[2Jclear": 1.0}
    tell(bench, bench.join("bad"), values=values, better={"mae": "higher", "accuracy": "lower"})
    found = statuses.read(bench.directory)
    assert (found["metric"], found["better"]["mae"], found["local"]["metric"]) == ("mae", "lower", "mae")
    assert found["local"]["metrics"]["mae"]["worst_decile"] == 9.0
    text = CliRunner().invoke(aggregator_cli.app, ["status", str(bench.directory)]).stdout
    assert "local accuracy" not in text  # of less than half of the devices
    assert "\x1b" not in text
    judge = bench.join("judge", evaluator=True)
    tell(bench, judge, "test", values={"mae": 1.0, "\x1b[2J": 0.0}, better={"mae": "higher"})
    found = statuses.read(bench.directory)
    assert found["better"]["mae"] == "higher"  # the operator's evaluator counts before devices
    text = CliRunner().invoke(aggregator_cli.app, ["status", str(bench.directory)]).stdout
    assert "?[2J by judge" in text
    assert "\x1b" not in text


def test_of_several_evaluators_each_has_its_metrics_and_the_first_one_the_directions(bench: Bench) -> None:
    for name, better in (("zoe", "higher"), ("ann", "lower")):
        judge = bench.join(name, evaluator=True)
        tell(bench, judge, "test", values={"mae": 0.5, f"of {name}": 1.0}, better={"mae": better})
    found = statuses.read(bench.directory)
    assert found["better"] == {"mae": "lower", "of ann": "higher", "of zoe": "higher"}
    text = CliRunner().invoke(aggregator_cli.app, ["status", str(bench.directory)]).stdout
    heading = next(line for line in text.splitlines() if line.startswith("version"))
    columns = ["mae by ann", "of ann by ann", "mae by zoe", "of zoe by zoe"]
    assert [heading.index(each) for each in columns] == sorted(heading.index(each) for each in columns)


def test_what_is_stated_outlives_a_prune_and_a_repair(tmp_path: Path) -> None:
    bench = Bench(make_directory(tmp_path / "a", merge__buffer_size=2, staleness__max=4, downlink__slots=4))
    bench.start()
    pi, other = bench.join("pi"), bench.join("other")
    for version in range(40):
        tell(bench, pi, version=version, values={"mae": 0.5}, better={"mae": "lower"}, classes={"a": 1})
        for device in (pi, other):
            bench.send(device, ternary_block(bench.schema, version), version)
    bench.handle(events.StopRequested())
    bench.close()
    administration.prune(bench.directory, 1)
    with closing(sqlite3.connect(bench.directory / LEDGER)) as db, db:
        kept = [split for (split,) in db.execute("SELECT split FROM metrics ORDER BY split")]
        assert kept[-1] == "stated"
        assert 0 < kept.count("local") < 40
        db.execute("UPDATE counts SET value = value + 1")
        db.execute("UPDATE updates SET samples = samples + 1 WHERE id = (SELECT max(id) FROM updates)")
    assert repairing.repair(bench.directory, clock_s=0.0).aside is not None
    found = statuses.read(bench.directory)
    assert (found["better"], found["devices"]["pi"]["classes"]) == ({"mae": "lower"}, {"a": 1})


# --- classes


class Counting:
    """A trainer as far as classes go."""

    samples = 3

    def __init__(self, counts: Mapping[Any, int]) -> None:
        self.class_counts = counts


def test_classes_are_counted_by_name_and_too_many_left_out() -> None:
    assert counted(np.array([3, 1, 3])) == {"1": 1, "3": 2}
    assert class_counts_of(Counting({1: 2, "b": 0})) == {"1": 2, "b": 0}  # type: ignore[arg-type]
    assert class_counts_of(Counting(dict.fromkeys(range(257), 1))) == {}  # type: ignore[arg-type]
    long = {f"{number}-{'x' * 100}": 1 for number in range(256)}  # more than the header of a message has room for
    assert class_counts_of(Counting(long)) == {}  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="-1 samples of the class a"):
        class_counts_of(Counting({"a": -1}))  # type: ignore[arg-type]
    assert Metrics(version=0, samples=1, split="local", values={}).meta().keys() == {
        "version", "samples", "split", "values",
    }  # fmt: skip


def test_a_long_table_of_devices_is_cut_and_says_so(finished: tuple[Path, dict[str, Any], str]) -> None:
    _, found, _ = finished
    lines = report.device_table(found, 2)
    assert (len(lines), lines[-2]) == (5, "and 2 more, in report.json")
    assert "test mae" in progress.closing_table(found, ["report.json"])


def test_the_lab_knows_the_classes_of_all_devices_also_of_those_that_report_nothing() -> None:
    hostile = (Hostile(kind="free-rider", share=0.4, samples=9),)
    wanted = Scenario(task="digits-numpy", devices=3, end=End(versions=1), hostile=hostile)
    simulation = Simulation(wanted, digits_numpy.TASK, progress.Lines(io.StringIO()))
    simulation.run()
    found = simulation.report(1.0)["devices"]
    assert [sum(row["classes"].values()) for row in found.values()] == [row["samples"] for row in found.values()]
    assert sum(row["samples"] for row in found.values()) > 1000
    assert all(row["local"] is None for row in found.values())


@pytest.mark.slow
def test_real_processes_end_by_an_error_too_and_report_it(tmp_path: Path) -> None:
    done = simulated(tmp_path, LIMIT, "--versions", "1000000", "--json", kind="run")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["metrics"]["mae"] <= 0.5  # an evaluator that is late looks at no early version
    assert found["scenario"]["end"]["versions"] == 1_000_000 > found["versions"][-1]["version"] > 1
    assert (found["metric"], found["better"]["mae"]) == ("mae", "lower")
    assert found["local"]["metrics"]["mae"]["devices"] == found["local"]["fine_tuned"]["metrics"]["mae"]["devices"] == 4
    # a device that is late may have sent nothing by the end
    assert {row["samples"] for row in found["devices"].values() if row["updates"]} == {80}
