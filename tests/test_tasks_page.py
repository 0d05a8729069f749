"""The tasks in docs/tasks.md work as they are printed there, and its table has every argument."""

import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest

from ternbus.edge import TorchTask, load_task
from ternbus.edge.plan.plan import Plan
from ternbus.edge.shell.preflight import Conditions, check

PAGE = Path(__file__).parent.parent / "docs" / "tasks.md"
TASKS = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE))
PLANS: dict[str, dict[str, object]] = {
    "gan": {"local_epochs": 80},
    "readings": {"local_epochs": 4, "learning_rate": 0.5},
}  # its epochs start processes


def write_data(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        inputs = rng.normal(size=(300, 20)).astype(np.float32)
        person = np.array(["Ann", "Zoe"])[np.arange(300) % 2]
        np.savez(folder / f"{split}.npz", inputs=inputs, targets=inputs[:, :3].argmax(1), person=person)
        np.save(folder / f"{split}.npy", rng.normal((3, -2), 0.5, (300, 2)))
        price = inputs[:, :4] @ [1, 2, 0.5, -1]
        rows = [",".join(map(str, [*values[:4], cost])) for values, cost in zip(inputs, price, strict=True)]
        (folder / f"{split}.csv").write_text("\n".join(["rooms,area,floor,age,price", *rows]))
        states = inputs[:, :3].argmax(1)
        rows = [",".join(map(str, [*values[:4], state])) for values, state in zip(inputs, states, strict=True)]
        (folder / f"{split}.lines").write_text("\n".join(rows))
        words = [rng.integers(0, 20, rng.integers(1, 9)).tolist() for _ in range(300)]
        (folder / f"{split}.json").write_text(json.dumps([[each, int(np.mean(each) > 10)] for each in words]))


# The metric that improves, and what it must reach.
REACHED = {
    "sensors": ("accuracy", 0.8, 1.0),
    "houses": ("mae", 0.0, 0.3),
    "readings": ("accuracy", 0.8, 1.0),
    "sentences": ("loss", 0.0, 0.5),
    "gan": ("distance", 0.0, 1.5),
    "softmax": ("accuracy", 0.8, 1.0),
}


def test_the_page_has_a_task_of_each_kind() -> None:
    assert set(TASKS) == set(REACHED)


STARTING = pytest.param("readings", marks=pytest.mark.slow)  # its data are read by processes


@pytest.mark.parametrize("name", [STARTING if name == "readings" else name for name in REACHED])
def test_a_task_of_the_page_is_ready_and_learns(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "import pandas" in TASKS[name]:
        pytest.importorskip("pandas")
    write_data(tmp_path)
    (tmp_path / f"{name}.py").write_text(TASKS[name])
    monkeypatch.chdir(tmp_path)
    task = load_task(f"{name}:TASK")
    report = check(task, Conditions(data=tmp_path))
    assert [problem for problem in report.problems if "no finite 'accuracy'" not in problem] == []
    plan = Plan.from_meta({**task.default_plan, "local_epochs": 20, **PLANS.get(name, {})})
    start, evaluator = task.initial(0), task.evaluator(data=tmp_path)
    found = task.trainer(data=tmp_path, partition="all").train(start, plan, version=0, seed=1)
    metric, low, high = REACHED[name]
    before, after = (evaluator.evaluate(tensors).values[metric] for tensors in (start, found.tensors))
    assert low <= after <= high
    assert not low <= before <= high
    if name == "sensors":
        people = [task.trainer(data=tmp_path, partition=f"natural:{number}").samples for number in (0, 1)]
        assert people == [150, 150]


def test_every_argument_and_every_method_for_a_subclass_is_in_the_table() -> None:
    rows = re.findall(r"^\|(.*?)\|(.*?)\|", PAGE.read_text(), flags=re.MULTILINE)
    arguments = {name for first, _ in rows for name in re.findall(r"`(\w+)`", first)}
    methods = {name for _, second in rows for name in re.findall(r"`(\w+)", second)}
    assert set(inspect.signature(TorchTask).parameters) <= arguments
    source = inspect.getsource(TorchTask)
    own = source[source.index("# -- what a subclass") : source.index("# -- what a federation")]
    assert set(re.findall(r"def (\w+)\(self", own)) <= methods
