"""The examples run as they stand there, alone and as tasks, and a script becomes a task by less than 15 lines."""

import contextlib
import difflib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn import task_folder
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.plan import Plan
from ternbus.edge.shell.preflight import Conditions, check

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
DATA = ROOT / "edge_client" / "ternbus" / "edge" / "tasks"


@pytest.fixture(autouse=True)
def beside_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_a_plain_script_becomes_a_task_by_less_than_15_lines() -> None:
    plain, task = ((EXAMPLES / name).read_text().splitlines() for name in ("plain_torch.py", "torch_task.py"))
    changed = [line for line in difflib.unified_diff(plain, task, n=0, lineterm="") if line[:3] not in ("---", "+++")]
    changed = [line for line in changed if line[0] in "+-"]
    assert 0 < len(changed) < 15
    assert [line for line in changed if line[0] == "-"] == [f"-{plain[0]}"]  # its title: all that it was it still is


@pytest.mark.slow
def test_the_plain_script_and_the_task_run_alone_and_learn() -> None:
    for name in ("plain_torch.py", "torch_task.py"):
        command = [
            sys.executable,
            "-W",
            "error",
            str(EXAMPLES / name),
            str(DATA),
            "6",
        ]  # unseeded, as a script is: enough epochs that luck does not matter
        ran = subprocess.run(
            command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=True
        )
        assert float(ran.stdout.split()[1]) > 0.85


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["plain_torch", "torch_task", "sklearn_task", "from_tff", "from_fate", "from_secretflow"]
)
def test_an_example_knows_its_options_and_needs_no_folder_around_it(name: str, tmp_path: Path) -> None:
    script = tmp_path / f"{name}.py"
    script.write_bytes((EXAMPLES / script.name).read_bytes())

    def ran(option: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(script), option]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)

    shown = ran("--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"usage: {name}.py [-h]")
    assert "accuracy" not in shown.stdout  # nothing was trained
    refused = ran("--data")
    assert refused.returncode == 2
    takes_data = name in ("from_tff", "from_fate")
    says = "argument --data: expected one argument" if takes_data else "unrecognized arguments: --data"
    assert refused.stderr.endswith(f"{name}.py: error: {says}\n")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain_torch", "torch_task"])
def test_a_copy_of_a_script_finds_the_digits_that_come_with_ternbus(name: str, tmp_path: Path) -> None:
    script = tmp_path / f"{name}.py"
    script.write_bytes((EXAMPLES / script.name).read_bytes())
    inputs, labels = runpy.run_path(str(script))["data"](None, "test")
    assert inputs.shape == (len(labels), 1, 8, 8)


def test_the_classifier_in_scikit_style_fits_and_predicts_without_a_federation() -> None:
    module = task_folder.import_from(EXAMPLES, "numpy_task")  # whatever was loaded as a task before
    inputs, labels = module.load("train")
    found = module.SoftmaxRegression(64, 10, steps=60).fit(inputs, labels)
    test_inputs, test_labels = module.load("test")
    assert (found.predict(test_inputs) == test_labels).mean() == found.score(test_inputs, test_labels) > 0.85


@pytest.mark.parametrize(
    ("name", "epochs", "least"),
    [
        ("torch_task", 1, 0.75),
        ("numpy_task", 1, 0.7),
        ("sensor_task", 4, 0.8),
        ("sklearn_task", 1, 0.85),
        ("flower_task", 1, 0.8),
    ],
)
def test_an_example_is_a_task_that_is_ready_and_learns(name: str, epochs: int, least: float) -> None:
    task = load_task(f"{EXAMPLES / name}.py:TASK")
    data = DATA if name == "torch_task" else None
    report = check(task, Conditions(data=data))
    assert not report.problems
    alone = {"local_epochs": epochs, "statistics_rate": 1}  # one device, one training: nothing to overshoot
    plan = Plan.from_meta({**task.default_plan, **alone})
    start = task.initial(0)
    trained = task.trainer(data=data, partition="iid:0/2").train(start, plan, version=0, seed=0)
    assert task.evaluator(data=data).evaluate(trained.tensors).values["accuracy"] > least


@pytest.mark.slow
def test_the_documents_command_checks_an_example_whatever_is_installed() -> None:
    """As the installed command is started: opacus has a package `examples`, and no PYTHONPATH helps."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = ["edge", "check", "examples/sensor_task.py:TASK"]
    assert f"ternbus {' '.join(command)}\n" in (ROOT / "docs" / "tasks.md").read_text(encoding="utf-8")
    ran = subprocess.run(
        [sys.executable, "-P", "-m", "ternbus", *command],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.endswith("ready\n")


@pytest.mark.slow
def test_the_scikit_learn_example_tests_the_model_that_a_federation_of_processes_made(tmp_path: Path) -> None:
    def printed(*arguments: str) -> float:
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(said):
            patched.setattr(sys, "argv", ["sklearn_task.py", *arguments])
            runpy.run_path(str(EXAMPLES / "sklearn_task.py"), run_name="__main__")
        return float(said.getvalue().split()[1])

    alone = printed()
    scenario = tmp_path / "scenario.toml"
    scenario.write_text('partition = "iid"\ndevices = 2\nend = { versions = 8 }\n')
    out = tmp_path / "out"
    lab = [sys.executable, "-m", "ternbus", "lab", "run", str(scenario), "--task", "examples/sklearn_task.py:TASK"]
    ran = subprocess.run([*lab, "--out", str(out)], cwd=ROOT, capture_output=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr.decode()
    federated = printed(str(out / "model.safetensors"))
    assert federated > 0.88
    assert federated > alone - 0.08


def test_the_sensor_task_reads_recordings_of_ones_own_and_says_where_it_looks_for_them(tmp_path: Path) -> None:
    module = task_folder.import_from(EXAMPLES, "sensor_task")
    table = module.recording(seed=3, minutes=1)
    np.savetxt(tmp_path / "train.csv", table, delimiter=",", header="x,y,z,state", comments="")
    inputs, labels = module.data(tmp_path, "train")
    expected, states = module.windows(table)
    np.testing.assert_allclose(inputs, expected, atol=1e-5)
    assert labels.tolist() == states.tolist()
    with pytest.raises(ConfigError, match=f"{tmp_path}/test.csv"):
        module.data(tmp_path, "test")


def test_the_sensor_task_trains_in_no_window_in_which_the_state_changes() -> None:
    module = task_folder.import_from(EXAMPLES, "sensor_task")
    table = np.zeros((250, 4))
    table[:, 0] = np.arange(250)
    table[120:, 3] = 2
    inputs, labels = module.windows(table)
    assert labels.tolist() == [0, 2]  # from 0 and from 150: those from 50 and 100 see both
    assert inputs.shape == (2, 3, 100)
