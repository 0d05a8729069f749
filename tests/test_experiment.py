"""`ternbus lab experiment`: what its files may have, what it measures, that it continues, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stranger.servers import until
from ternbus.broker.errors import ConfigError
from ternbus.lab.experiment import experiment, runner
from ternbus.lab.experiment.goals import Goal
from ternbus.lab.experiment.measures import MEASURES, OF_FLEET, measure
from ternbus.lab.experiment.result import collect
from ternbus.lab.experiment.runner import Run
from ternbus.lab.experiment.table import table

ROOT = Path(__file__).parent.parent
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
ENDLESS = "end = { versions = 1000000 }"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "ternbus", "lab", "experiment", *arguments]


def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    return done.returncode, done.stdout, done.stderr


def holder(file: Path) -> int:
    """The process that has the file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.readlink() == file:
                return int(link.parts[2])
        except OSError:
            continue  # the process has ended, or is somebody else's
    raise AssertionError(f"no process has {file} open")


@pytest.mark.parametrize("name", experiment.names())
def test_what_ships_can_be_read(name: str) -> None:
    found = experiment.load(name)
    assert found.title
    assert found.x in found.grid.axes


def test_what_ships_is_in_the_wheel() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert "ternbus.lab.experiment" in setuptools["packages"]
    room = experiment.FOLDER.parent
    packed = {path for glob in setuptools["package-data"]["ternbus.lab.experiment"] for path in room.glob(glob)}
    assert packed == {path for path in room.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert len(packed) == len(experiment.names()) > 5


def test_the_example_of_the_documentation_is_right_and_names_every_measure(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    example = text.partition("```toml\n")[2].partition("```")[0]
    (tmp_path / "mine.toml").write_text(example, encoding="utf-8")
    found = experiment.load(str(tmp_path / "mine.toml"))
    assert len([*found.grid.combinations()]) == 5
    cells = re.findall(r"^\| (`.+?`) \|", text.partition("| measure | |")[2], re.MULTILINE)
    assert {*re.findall(r"\w+", " ".join(cells))} == {*MEASURES}


def test_relative_paths_count_from_the_folder_of_the_experiment(tmp_path: Path) -> None:
    (tmp_path / "own_task.py").write_text("")
    (tmp_path / "mine.toml").write_text(
        '[scenario]\ntask = "own_task:TASK"\ndata = "kept"\n'
        '[axes.task]\nown = {}\nother = { task = "./inner/other.py", data = "/data" }\n'
        '[beside.alone]\ntask = "digits-numpy"\n'
    )
    combinations = experiment.load(str(tmp_path / "mine.toml")).grid.combinations()
    found = [(each.scenario["task"], each.scenario["data"]) for each in combinations]
    assert found == [
        (f"{tmp_path}/own_task:TASK", f"{tmp_path}/kept"),
        (f"{tmp_path}/inner/other.py", "/data"),
        ("digits-numpy", f"{tmp_path}/kept"),
    ]


def test_a_combination_has_the_changes_of_all_its_labels(file: Path) -> None:
    combinations = experiment.load(str(file)).grid.combinations()
    found = {tuple(combination.labels.values()): combination.scenario for combination in combinations}
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
        ("seeds = 2", "seeds = 0", "seeds is 0"),
        ("seeds = 2", "last = -1", "last is -1"),
        ('codec = "float32"', "nothing = 1.5.2", "is not valid TOML"),
        ('task = "digits-numpy"', 'tusk = "digits-numpy"', "ternary, few: .*tusk"),
        ('task = "digits-numpy"', "seed = 3", "ternary, few: the scenario sets seed"),
        ("ternary = {}", "ternary = 3", "axes.codec.ternary is 3, but must be a table"),
        ("[axes.codec]", "[axes]\nnumber = 3\n[axes.codec]", "axes.number is 3, but must be a table"),
        ("[axes.codec]", "[axes.none]\n[axes.codec]", "axes.none.* has no label"),
        ("[axes.codec]", "[axes.beside]", "axes.beside.* rename the axis"),
        ("[beside]", "[beside]\nnone = 1", "beside.none is 1"),
        ("least = 0.05", "least = 0.05\nmost = 1.0", "exactly one of the keys least and most"),
        ("least = 0.05", "", "exactly one of the keys least and most"),
        ('measure = "accuracy"', "", r"\[\[goal\]\] lacks the key measure"),
        ('measure = "accuracy"', 'measure = "acuracy"', "'acuracy': choose one of accuracy"),
        ('of = { codec = "float32" }', 'of = { codec = "float23" }', "no combination .*these labels"),
        ('of = { codec = "float32" }', 'of = { codec = "ternary" }\nthan = { kodec = "ternary" }', 'kodec = "ternary"'),
        ("[beside]", '[plot]\nx = "stepps"\n[beside]', "plot.x is 'stepps': choose one of codec, steps"),
        ("[beside]", '[plot]\ny = "accuracy up"\n[beside]', "plot.y is 'up': choose one of accuracy"),
        ("[beside]", "[plot]\nz = 1\n[beside]", "plot.z"),
    ],
)
def test_a_wrong_file_is_refused_by_name(file: Path, before: str, after: str, what: str) -> None:
    assert before in SMALL
    file.write_text(SMALL.replace(before, after))
    with pytest.raises(ConfigError, match=f"small.toml.*{what}"):
        experiment.load(str(file))


def test_a_file_without_axes_is_refused(file: Path) -> None:
    file.write_text('[scenario]\ntask = "digits-numpy"\n')
    with pytest.raises(ConfigError, match="has no axis"):
        experiment.load(str(file))


def test_a_file_that_is_no_text_or_no_file_is_refused(file: Path) -> None:
    file.write_bytes(b'title = "\xff"')
    with pytest.raises(ConfigError, match=r"small\.toml is not valid TOML"):
        experiment.load(str(file))
    file.unlink()
    with pytest.raises(ConfigError, match=r"small\.toml: No such file"):
        experiment.load(str(file))
    file.mkdir()
    with pytest.raises(ConfigError, match=r"small\.toml: it is a folder"):
        experiment.load(str(file))


def test_runs_that_would_share_a_folder_are_refused(file: Path) -> None:
    file.write_text(SMALL.replace("more = {", '"FEW" = {'))
    grid = experiment.load(str(file)).grid
    with pytest.raises(ConfigError, match="'ternary, few' and 'ternary, FEW'"):
        runner.plan(grid, seeds=1, data=None, folder=file.parent)


def test_labels_in_any_script_have_folders_of_their_own(file: Path) -> None:
    file.write_text(SMALL.replace("more = {", '"плюс" = {').replace("few = {", '"минус" = {'))
    runs = runner.plan(experiment.load(str(file)).grid, seeds=2, data=None, folder=file.parent)
    assert len({each.folder for each in runs}) == len(runs) == 10


def test_a_report_that_cannot_be_read_is_no_report(file: Path) -> None:
    first = runner.plan(experiment.load(str(file)).grid, seeds=1, data=None, folder=file.parent)[0]
    assert first.report() is None
    first.folder.mkdir()
    kept = {"table": first.table, "made_by": first.made_by, "report": {"metric": None}}
    first.path.write_text(json.dumps(kept))
    assert first.report() == {"metric": None}
    for other in ({}, {**first.made_by, "task": "0"}, {**first.made_by, "software": "ternbus 0.0.1"}):
        first.path.write_text(json.dumps({**kept, "made_by": other}))
        assert first.report() is None
    first.path.write_text(json.dumps({"table": first.table, "report": {"metric": None}}))  # of an earlier version
    assert first.report() is None
    for text in ("", "[]", "{}", json.dumps({**kept, "table": {}})):
        first.path.write_text(text)
        assert first.report() is None


def test_without_a_name_it_lists_what_there_is(tmp_path: Path) -> None:
    code, listed, _ = run(tmp_path)
    assert code == 0
    assert [line.split()[0] for line in listed.splitlines()] == experiment.names()
    assert f"  {experiment.load('staleness').title}\n" in listed
    rows = json.loads(run(tmp_path, "--json")[1])
    assert [row["name"] for row in rows] == experiment.names()
    assert all(row["title"] and row["about"] for row in rows)


@pytest.mark.parametrize(
    ("name", "what"),
    [("stalness", "do you mean staleness?"), ("nonesuch", "writers, or a file"), ("small.toml", "small.toml: seeds")],
)
def test_the_operators_mistake_is_one_line_and_exit_code_2(file: Path, name: str, what: str) -> None:
    file.write_text(SMALL.replace("seeds = 2", 'seeds = "two"'))
    code, printed, said = run(file.parent, "hapt", name)  # before anything runs
    assert (code, printed, said.count("\n")) == (2, "", 1), said
    assert what in said
    assert not (file.parent / "ternbus-experiments").exists()


@pytest.mark.slow
def test_it_runs_all_once_and_says_which_goals_are_met(file: Path) -> None:
    code, printed, said = run(file.parent, "small.toml", "--keep", "kept/here")
    assert "10 of 10 runs to do" in said
    assert code == 1, said  # float32 up is far more than half of float32
    lines = printed.splitlines()
    assert lines[0].startswith("| codec | steps | test accuracy |")
    assert sum(line.startswith("| ") for line in lines) == 1 + 1 + 5
    assert "accuracy ≥ 0.05: met" in printed
    assert "up_share (float32) ≤ 0.5: MISSED" in printed
    out, keep = file.parent / "ternbus-experiments" / "small", file.parent / "kept" / "here"
    assert (out / "table.md").read_text() == printed
    assert (out / "result.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "result.png").read_bytes() == (keep / "small.png").read_bytes()
    assert (out / "result.json").read_text() == (keep / "small.json").read_text()
    kept = json.loads((out / "result.json").read_text())
    assert kept["command"] == "ternbus lab experiment small.toml"
    assert str(file.parent) not in json.dumps(kept)
    first = kept["result"]
    assert all(len(row["measures"]["accuracy"]) == 2 for row in first["rows"])

    file.write_text(SMALL.replace('most = 0.5\nof = { codec = "float32" }', 'most = 0.5\nof = { codec = "ternary" }'))
    code, again, said = run(file.parent, "small.toml", "--json")
    assert (code, said.count("runs to do")) == (0, 0), said  # all are done
    assert json.loads(again)["result"]["rows"] == first["rows"]

    file.write_text(SMALL.replace("local_epochs = 2", "local_epochs = 3"))
    said = run(file.parent, "small.toml")[2]
    assert "4 finished runs have another scenario" in said
    assert "4 of 10 runs to do" in said  # those whose scenario has changed
    assert "10 of 10 runs to do" in run(file.parent, "small.toml", "--fresh")[2]


@pytest.mark.slow
def test_ctrl_c_ends_it_with_130_and_the_same_command_continues(file: Path) -> None:
    folder = file.parent / "ternbus-experiments" / "small"
    report = folder / "ternary-few-0" / "report.json"
    log = folder / "ternary-more-0" / "log"
    file.write_text(SMALL.replace("local_epochs = 2 }", f"local_epochs = 2 }}, {ENDLESS}"))
    arguments = command("small.toml", "--jobs", "1", "--seeds", "1")
    with subprocess.Popen(
        arguments, cwd=file.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        try:
            until(lambda: report.exists() and log.exists() and "version" in log.read_text(), 60.0, "the second run")
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of its processes
            printed, said = process.communicate(timeout=30)  # the pipes end when the last that holds them does
        finally:
            process.kill()
    assert (process.returncode, printed) == (130, ""), said
    assert (
        said.splitlines()[-1] == "ternbus: stopped by Ctrl-C; to continue with the remaining runs, repeat the command"
    )
    assert "Traceback" not in said

    file.write_text(SMALL)
    _, printed, said = run(file.parent, "small.toml", "--seeds", "1")
    assert "4 of 5 runs to do" in said
    assert "| ternary | few |" in printed


@pytest.mark.slow
def test_ctrl_c_while_its_processes_start_leaves_no_traceback(file: Path) -> None:
    arguments = command("small.toml", "--jobs", "2")
    with subprocess.Popen(arguments, cwd=file.parent, stderr=subprocess.PIPE, text=True, process_group=0) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        try:
            until(
                lambda: len(children.read_text().split()) > 2, 60.0, "both processes, and what tracks their resources"
            )
            os.killpg(process.pid, signal.SIGINT)
            said = process.communicate(timeout=30)[1]
        finally:
            process.kill()
    assert process.returncode == 130
    assert said.endswith("ternbus: stopped by Ctrl-C; to continue with the remaining runs, repeat the command\n")
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_killed_one_leaves_no_process(file: Path) -> None:
    file.write_text(SMALL.replace("end = { versions = 2 }", ENDLESS))
    log = file.parent / "ternbus-experiments" / "small" / "ternary-few-0" / "log"
    with subprocess.Popen(command("small.toml"), cwd=file.parent, stderr=subprocess.PIPE, text=True) as process:
        try:
            until(lambda: log.exists() and "version" in log.read_text(), 60.0, "a run is under way")
        finally:
            process.kill()
        process.communicate(timeout=30)  # the pipe ends when the last that holds it does


@pytest.mark.slow
def test_a_killed_run_is_one_line_and_exit_code_1(file: Path) -> None:
    file.write_text(SMALL.replace("end = { versions = 2 }", ENDLESS))
    log = file.parent / "ternbus-experiments" / "small" / "ternary-few-0" / "log"
    arguments = command("small.toml", "--jobs", "1")
    with subprocess.Popen(arguments, cwd=file.parent, stderr=subprocess.PIPE, text=True) as process:
        try:
            until(lambda: log.exists() and "version" in log.read_text(), 60.0, "a run is under way")
            os.kill(holder(log), signal.SIGKILL)  # as a kernel without memory does
            said = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 1
    assert said.splitlines()[-1].startswith(
        "ternbus: a simulation process has ended unexpectedly, perhaps out of memory"
    )
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_task_without_its_data_is_one_line_and_exit_code_2(file: Path) -> None:
    file.write_text(SMALL.replace('task = "digits-numpy"', 'task = "fashion-mnist"\ndata = "nowhere"'))
    code, printed, said = run(file.parent, "small.toml")
    assert (code, printed) == (2, ""), said
    assert re.fullmatch(r"ternbus: no Fashion-MNIST in .*nowhere/FashionMNIST/raw: put .*", said.splitlines()[-1])
    assert "Traceback" not in said
    assert "elsewhere does not exist" in run(file.parent, "small.toml", "--data", "elsewhere")[2]


def report(**changes: Any) -> dict[str, Any]:
    versions: list[dict[str, Any]] = [
        {
            "updates": count,
            "staleness": 2.0 * number if count else None,
            "accuracy": accuracy,
            "evaluations": {"evaluator": {}}
            if accuracy is None
            else {"evaluator": {"accuracy": accuracy, "loss": 0.5}},
            "delta_bytes": down,
            "snapshot_bytes": 10,
        }
        for number, (count, accuracy, down) in enumerate(((0, 0.1, 0), (5, 0.5, 40), (5, None, 80), (4, 0.8, 120)))
    ]
    rows = [{"version": number, **row} for number, row in enumerate(versions)]
    counts = {"stale": 6}
    return {
        "versions": rows,
        "metric": "accuracy",
        "metrics": {"accuracy": 0.8, "loss": 0.5},
        "local": None,
        "devices": {"device-0": {"updates": 9, "epsilon": 1.5}, "device-1": {"updates": 5, "epsilon": 2.5}},
        "updates": 14,
        "counts": counts,
        "parameters": 10,
        "bytes_up": 56,
        "wall_seconds": 1.0,
        **changes,
    }


def test_the_measures_of_a_run() -> None:
    found = measure(report(), last=2, updates=10)
    assert {*found} == {*MEASURES}
    assert found["accuracy"] == 0.8  # the version before was not tried
    assert found["accuracy_at_updates"] == 0.5  # of those until the tenth update
    assert found["stale"] == 6 / 20
    assert found["staleness"] == (2 * 5 + 4 * 5 + 6 * 4) / 14
    assert found["update_kb"] == 0.056 / 20
    assert found["up_share"] == 56 / (4 * 10 * 14)
    assert (found["most_updates"], found["epsilon"]) == (9, 2.5)
    without = {"device-0": {"updates": 14, "epsilon": 0.0}}
    assert measure(report(devices=without), last=2, updates=None)["epsilon"] is None
    assert found["both_share"] == (56 + 130) / (2 * 4 * 10 * 14)
    assert measure(report(), last=3, updates=None)["accuracy"] == pytest.approx((0.5 + 0.8) / 2)
    assert measure(report(), last=2, updates=15)["accuracy_at_updates"] is None  # it never came so far


def test_the_measures_of_a_fleet() -> None:
    rows = [{**row, "seconds": 1800.0 * number} for number, row in enumerate(report()["versions"])]
    devices = {
        f"device-{index}": {"updates": 7, "epsilon": 0.0, "trainings": 10, "online_s": 3600.0} for index in range(2)
    }
    found = measure(report(versions=rows, devices=devices, staleness={"p95": 3.0}), 2, None, reach=0.5)
    assert found["wasted"] == 1 - 14 / 20
    assert (found["up_kb_hour"], found["down_kb_hour"]) == (0.056 / 2, 0.13 / 2)
    assert (found["versions_hour"], found["hours_to_reach"], found["staleness_p95"]) == (3 / 1.5, 0.5, 3.0)
    assert measure(report(versions=rows), 2, None, reach=0.9)["hours_to_reach"] is None
    assert measure(report(), 2, None)["wasted"] is None  # a report of before has no trainings


def test_a_scenario_of_ones_own_takes_the_place_of_the_experiment_s(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('task = "digits-numpy"\ndata = "here"\ndevices = 7\nseed = 3\n')
    found = experiment.load("fleet", tmp_path / "mine.toml")
    tables = [combination.scenario for combination in found.grid.combinations()]
    assert len(tables) == 18
    assert {(table["data"], table["devices"], "seed" in table) for table in tables} == {
        (str(tmp_path / "here"), 7, False)
    }
    assert {table["aggregator"]["staleness"]["max"] for table in tables} == {0, 4, 32}
    assert found.replaced
    assert not experiment.load("fleet").replaced


def test_a_table_has_the_columns_that_are_named_and_those_of_a_fleet_only_then() -> None:
    plain = experiment.load("staleness")
    run = Run(combination=next(plain.grid.combinations()), seed=0, data=None, folder=Path())
    names = collect(replace(plain, goals=()), [run], [report()])["rows"][0]["measures"]
    assert "megabytes" in names
    assert not {*OF_FLEET} & {*names}
    fleet = experiment.load("fleet")
    assert {*collect(fleet, [run], [report()])["rows"][0]["measures"]} == {*fleet.columns, *fleet.y}
    with pytest.raises(ConfigError, match="columns is 'speed'"):
        replace(fleet, columns=("speed",))


def test_a_goal_is_about_the_worst_of_what_it_names() -> None:
    rows = [
        {"labels": {"codec": codec, "speeds": speeds}, "measures": {"accuracy": [value, value + 0.02]}}
        for codec, speeds, value in (("ternary", "a", 0.9), ("ternary", "b", 0.8), ("float32", "a", 0.1))
    ]
    judged = Goal(measure="accuracy", least=0.81, of={"codec": "ternary"}).judge(rows)
    assert judged["found"] == pytest.approx(0.81)
    assert judged["met"]
    assert not Goal(measure="accuracy", least=0.82, of={"codec": "ternary"}).judge(rows)["met"]
    assert not Goal(measure="accuracy", most=0.5).judge(rows)["met"]
    assert not Goal(measure="accuracy", least=0.0, of={"codec": "nothing"}).judge(rows)["met"]
    rows[0]["measures"] = {"accuracy": [None, 0.9]}  # a seed that was never measured counts for nothing
    assert Goal(measure="accuracy", most=0.82, of={"codec": "ternary"}).judge(rows)["found"] == pytest.approx(0.81)


def test_a_goal_may_be_about_how_far_one_is_from_another() -> None:
    rows = [
        {"labels": {"training": "federated"}, "measures": {"accuracy": [0.88, 0.9]}},
        {"labels": {"beside": "centralized"}, "measures": {"accuracy": [0.91, 0.91]}},
    ]
    of, than = {"training": "federated"}, {"beside": "centralized"}
    judged = Goal(measure="accuracy", least=-0.021, of=of, than=than).judge(rows)
    assert judged["found"] == pytest.approx(-0.02)
    assert judged["met"]
    lines = table({"rows": rows, "goals": [judged]}).splitlines()
    assert lines[-1] == "Goal: accuracy (federated) less that of centralized ≥ -0.021: met, -0.02."
    assert not Goal(measure="accuracy", least=-0.01, of=of, than=than).judge(rows)["met"]
    assert not Goal(measure="accuracy", least=-1.0, of=of, than={"beside": "no"}).judge(rows)["met"]


def test_a_table_shows_what_was_measured_and_nothing_where_it_was_not() -> None:
    rows = [
        {"labels": {"privacy": "none"}, "measures": {"accuracy": [0.5, 0.6], "updates": [1200]}},
        {"labels": {"privacy": "some"}, "measures": {"accuracy": [0.4, 0.4], "updates": [7], "epsilon": [7.996, 7.0]}},
    ]
    lines = table({"rows": rows, "goals": []}).splitlines()
    assert lines[0] == "| privacy | test accuracy | updates | epsilon of a device, at most |"
    assert lines[2:] == ["| none | 55.0 % ± 7.1 | 1,200 |  |", "| some | 40.0 % ± 0.0 | 7 | 7.50 |"]
