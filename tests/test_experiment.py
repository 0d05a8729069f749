"""Experiments: what its files may say, what it measures, and that nothing is made twice."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stranger.house import until
from ternbus.broker.errors import ConfigError
from ternbus.lab.experiment import experiment, shown
from ternbus.lab.experiment.experiment import Experiment, Goal, judged, measures

SMALL = """
title = "Two devices"
seeds = 2
[scenario]
task = "digits-numpy"
devices = 2
partition = "iid"
end = { versions = 2 }
aggregator = { merge = { buffer_size = 2 } }
[axes.codec]
ternary = {}
float32 = { plan = { codec = "float32" } }
[axes.steps]
few = { plan = { local_epochs = 1 } }
more = { plan = { local_epochs = 2 } }
[beside]
alone = { devices = 1, partition = "all", aggregator = { merge = { buffer_size = 1 } } }
[[goal]]
measure = "accuracy"
least = 0.05
[[goal]]
measure = "up_share"
most = 0.5
of = { codec = "float32" }
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def run(file: Path, *arguments: str) -> tuple[int, str, str]:
    command = [
        sys.executable,
        "-m",
        "ternbus.lab.experiment.experiment",
        str(file),
        "--out",
        str(file.parent / "out"),
        *arguments,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", experiment.names())
def test_what_ships_can_be_read(name: str) -> None:
    found = Experiment.load(name)
    assert found.title
    assert found.x in found.axes


def test_the_example_of_the_documentation_is_right_and_names_every_measure(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "experiments.md").read_text(encoding="utf-8")
    example = text.partition("```toml\n")[2].partition("```")[0]
    (tmp_path / "mine.toml").write_text(example, encoding="utf-8")
    found = Experiment.load(str(tmp_path / "mine.toml"))
    assert len([*found.combinations()]) == 5
    assert {goal.measure for goal in found.goals} | {*found.y} <= {*shown.MEASURES}
    cells = re.findall(r"^\| (`.+?`) \|", text.partition("| measure | |")[2], re.MULTILINE)
    assert {*re.findall(r"\w+", " ".join(cells))} == {*shown.MEASURES}


def test_a_combination_has_the_changes_of_all_its_labels(file: Path) -> None:
    found = {tuple(labels.values()): table for labels, table in Experiment.load(str(file)).combinations()}
    assert len(found) == 5
    assert found["float32", "more"]["plan"] == {"codec": "float32", "local_epochs": 2}
    assert found["ternary", "few"]["plan"] == {"local_epochs": 1}
    alone = found["alone",]
    assert (alone["devices"], alone["aggregator"]["merge"]["buffer_size"]) == (1, 1)
    assert alone["task"] == "digits-numpy"


@pytest.mark.parametrize(
    ("before", "after", "what"),
    [
        ("seeds = 2", "sedes = 2", "sedes"),
        ('codec = "float32"', "nothing = 1.5.2", "small.toml"),
        ('task = "digits-numpy"', 'tusk = "digits-numpy"', "tusk"),
        ("least = 0.05", "least = 0.05\nmost = 1.0", "either least or most"),
    ],
)
def test_a_wrong_file_is_refused_by_name(file: Path, before: str, after: str, what: str) -> None:
    file.write_text(SMALL.replace(before, after))
    with pytest.raises(ConfigError, match=what):
        Experiment.load(str(file))


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(ConfigError, match="writers"):
        Experiment.load("nonesuch")


@pytest.mark.slow
def test_it_runs_all_once_and_says_which_goals_are_met(file: Path) -> None:
    code, table, said = run(file)
    assert "10 runs, 0 of them known" in said
    assert code == 1, said  # float32 up is far more than half of float32
    lines = table.splitlines()
    assert lines[0].startswith("| codec | steps | test accuracy |")
    assert sum(line.startswith("| ") for line in lines) == 1 + 1 + 5
    assert "accuracy ≥ 0.05: met" in table
    assert "up_share (float32) ≤ 0.5: MISSED" in table
    out = file.parent / "out" / "small"
    assert (out / "result.png").read_bytes().startswith(b"\x89PNG")
    first = json.loads((out / "result.json").read_text())["result"]
    assert all(len(row["measures"]["accuracy"]) == 2 for row in first["rows"])

    file.write_text(SMALL.replace('most = 0.5\nof = { codec = "float32" }', 'most = 0.5\nof = { codec = "ternary" }'))
    code, again, said = run(file, "--json")
    assert (code, said.count("runs,")) == (0, 0), said  # all known
    assert json.loads(again)["result"]["rows"] == first["rows"]

    file.write_text(SMALL.replace("local_epochs = 2", "local_epochs = 3"))
    assert "10 runs, 6 of them known" in run(file)[2]  # those whose scenario has changed


@pytest.mark.slow
def test_a_killed_one_leaves_no_process(file: Path) -> None:
    file.write_text(SMALL.replace("end = { versions = 2 }", "end = { versions = 1000000 }"))
    log = file.parent / "out" / "small" / "ternary-few-0" / "log"
    command = [sys.executable, "-m", "ternbus.lab.experiment.experiment", str(file), "--out", str(file.parent / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            until(lambda: log.exists() and "version" in log.read_text(), 60.0, "a run is under way")
        finally:
            process.kill()
        process.communicate(timeout=30)  # the pipe ends when the last that holds it does


def report(**changes: Any) -> dict[str, Any]:
    versions = [
        {"updates": count, "accuracy": accuracy, "delta_bytes": down, "snapshot_bytes": 10}
        for count, accuracy, down in ((0, 0.1, 0), (5, 0.5, 40), (5, None, 80), (4, 0.8, 120))
    ]
    rows = [{"version": number, **row} for number, row in enumerate(versions)]
    counts = {"stale": 6}
    return {
        "versions": rows,
        "devices": {"device-0": {"updates": 9, "epsilon": 1.5}, "device-1": {"updates": 5, "epsilon": 2.5}},
        "updates": 14,
        "counts": counts,
        "parameters": 10,
        "bytes_up": 56,
        "wall_seconds": 1.0,
        **changes,
    }


def test_the_measures_of_a_run() -> None:
    found = measures(report(), last=2, updates=10)
    assert found["accuracy"] == 0.8  # the version before was not tried
    assert found["accuracy_at_updates"] == 0.5  # of those until the tenth update
    assert found["stale"] == 6 / 20
    assert found["up_share"] == 56 / (4 * 10 * 14)
    assert (found["most_updates"], found["epsilon"]) == (9, 2.5)
    without = {"device-0": {"updates": 14, "epsilon": 0.0}}
    assert measures(report(devices=without), last=2, updates=None)["epsilon"] is None
    assert found["both_share"] == (56 + 130) / (2 * 4 * 10 * 14)
    assert measures(report(), last=3, updates=None)["accuracy"] == pytest.approx((0.5 + 0.8) / 2)
    assert measures(report(), last=2, updates=15)["accuracy_at_updates"] is None  # it never came so far


def test_a_goal_is_about_the_worst_of_what_it_names() -> None:
    rows = [
        {"labels": {"codec": codec, "speeds": speeds}, "measures": {"accuracy": [value, value + 0.02]}}
        for codec, speeds, value in (("ternary", "a", 0.9), ("ternary", "b", 0.8), ("float32", "a", 0.1))
    ]
    goal = Goal(measure="accuracy", least=0.81, most=None, of={"codec": "ternary"})
    assert judged(goal, rows)["found"] == pytest.approx(0.81)
    assert judged(goal, rows)["met"]
    assert not judged(Goal(measure="accuracy", least=0.82, most=None, of={"codec": "ternary"}), rows)["met"]
    assert not judged(Goal(measure="accuracy", least=None, most=0.5), rows)["met"]
    assert not judged(Goal(measure="accuracy", least=0.0, most=None, of={"codec": "nothing"}), rows)["met"]


def test_a_goal_may_be_about_how_far_one_is_from_another() -> None:
    rows = [
        {"labels": {"training": "federated"}, "measures": {"accuracy": [0.88, 0.9]}},
        {"labels": {"beside": "centralized"}, "measures": {"accuracy": [0.91, 0.91]}},
    ]
    of, than = {"training": "federated"}, {"beside": "centralized"}
    goal = judged(Goal(measure="accuracy", least=-0.021, most=None, of=of, than=than), rows)
    assert goal["found"] == pytest.approx(-0.02)
    assert goal["met"]
    lines = shown.table({"rows": rows, "goals": [goal]}).splitlines()
    assert lines[-1] == "Goal: accuracy (federated) less that of centralized ≥ -0.021: met, -0.02."
    assert not judged(Goal(measure="accuracy", least=-0.01, most=None, of=of, than=than), rows)["met"]
    assert not judged(Goal(measure="accuracy", least=-1.0, most=None, of=of, than={"beside": "no"}), rows)["met"]


def test_a_table_shows_what_was_measured_and_nothing_where_it_was_not() -> None:
    rows = [
        {"labels": {"privacy": "none"}, "measures": {"accuracy": [0.5, 0.6], "updates": [1200]}},
        {"labels": {"privacy": "some"}, "measures": {"accuracy": [0.4, 0.4], "updates": [7], "epsilon": [7.996, 7.0]}},
    ]
    lines = shown.table({"rows": rows, "goals": []}).splitlines()
    assert lines[0] == "| privacy | test accuracy | updates | epsilon of a device, at most |"
    assert lines[2:] == ["| none | 55.0 % ± 7.1 | 1,200 |  |", "| some | 40.0 % ± 0.0 | 7 | 7.50 |"]
