"""`ternbus edge check` says of a task what a federation would find out, in words that say where to look."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.task import Evaluation, Trained
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.shell.cli import app
from ternbus.edge.shell.preflight import Conditions, check

GOOD = {"w": np.ones((20, 20), np.float32), "b": np.zeros(3, np.float32)}


def step(start: Mapping[str, Any]) -> dict[str, Any]:
    return {name: array + np.float32(0.01) for name, array in start.items()}


def into_the_start(start: dict[str, Any]) -> dict[str, Any]:
    start["w"] += 1
    return start


def raising(start: Mapping[str, Any]) -> dict[str, Any]:
    raise IndexError("too few of them")


def leaving(*_: object, **__: object) -> Any:
    sys.exit(0)


@dataclass(frozen=True, kw_only=True)
class Odd:
    """A task and its trainer in one, of which each test bends a part."""

    name: str = "odd"
    default_plan: Mapping[str, object] = field(default_factory=dict)
    plan_keys: Any = ()
    made: Callable[[], Any] = lambda: {name: array.copy() for name, array in GOOD.items()}
    trains: Callable[[Any], Any] = step
    samples: int = 10
    metrics: Mapping[str, float] = field(default_factory=lambda: {"loss": 1.0})
    values: Mapping[str, float] = field(default_factory=lambda: {"accuracy": 0.5, "loss": 1.0})

    def initial(self, seed: int) -> Any:
        return self.made()

    def trainer(self, *, data: Path | None, partition: str) -> "Odd":
        return self

    evaluator: Any = field(default=lambda **_: None)

    def train(self, start: Any, plan: object, *, version: int, seed: int) -> Any:
        tensors = self.trains(start)
        return Trained(tensors=tensors, samples=self.samples, metrics=self.metrics) if tensors else "nothing"

    def evaluate(self, tensors: object) -> Evaluation:
        return Evaluation(samples=self.samples, values=self.values)


def found(**bent: Any) -> tuple[str, str]:
    """(problems, notes) of a task with these parts."""
    task = Odd(**bent)
    object.__setattr__(task, "evaluator", lambda *, data: task)
    report = check(task)
    return "\n".join(report.problems), "\n".join(report.notes)


def test_a_good_task_has_no_problem_and_no_note() -> None:
    assert found() == ("", "")
    assert found(default_plan={"flavour": 1}, plan_keys=["flavour"]) == ("", "")
    assert found(samples=np.int64(10), metrics={"loss": np.float32(1)}) == ("", "")


draws = np.random.default_rng(0)
NAN = {"w": np.full(3, np.nan, np.float32)}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"made": dict}, "initial() returned no tensors"),
    ({"made": lambda: {"w": np.zeros(3)}}, "'w' as float64: it must be a float32 numpy array"),
    ({"made": lambda: {"w": [1.0]}}, "'w' as list"),
    ({"made": lambda: {"w": np.zeros((0, 3), np.float32)}}, "'w' without elements"),
    ({"made": lambda: NAN}, "'w' with a NaN"),
    ({"default_plan": {"batch_size": "many"}}, "batch_size"),
    ({"default_plan": {"schedule": "cosine"}}, "default_plan: schedule_versions is 0: cosine must end"),
    ({"default_plan": {"gradclip": 1}}, "gradclip is an unknown key: do you mean grad_clip? A task"),
    ({"plan_keys": "flavour"}, "plan_keys is 'flavour': it must be a list of names"),
    ({"plan_keys": [1]}, "plan_keys has 1, which is no name of a plan key"),
    ({"trains": raising}, "train() raised IndexError: too few of them (test_check.py, line "),
    ({"trains": leaving}, "train() raised sys.exit(0) (test_check.py, line "),
    ({"trains": into_the_start}, "`start` is read-only: work on a copy"),
    ({"trains": dict}, "changed nothing"),
    ({"trains": lambda _: None}, "train() returned str: it must return Trained"),
    ({"trains": lambda start: {"w": start["w"] + 1}}, "train() returned no 'b'"),
    ({"trains": lambda start: {**step(start), "b": np.zeros(4)}}, "with shape (4,): it must have initial()'s, (3,)"),
    ({"trains": lambda start: {name: array * np.float32(np.inf) for name, array in start.items()}}, "diverged"),
    ({"samples": 0}, "the trainer has 0 samples"),
    ({"values": {}}, "evaluate() returned no metric"),
    ({"values": {f"f1 of {number}": 0.5 for number in range(33)}}, "33 metrics: at most 32 can be sent"),
    ({"values": {"accuracy": float("nan"), "loss": 1.0}}, "no finite 'accuracy'"),
    ({"made": lambda: {"w": np.full(3, 2.0**41, np.float32)}}, "beyond 2^40"),
    ({"default_plan": 7}, "default_plan raised "),
    ({"samples": "many"}, "the trainer has many samples"),
    ({"metrics": {"loss": "low"}}, "TypeError: the metric 'loss' is of the type str: it must be one number"),
]  # fmt: skip
NOTED: list[tuple[dict[str, Any], str]] = [
    ({"made": lambda: {"w": draws.normal(size=300).astype(np.float32)}}, "another model for the same seed"),
    ({"trains": lambda start: {**step(start), "b": draws.normal(size=3)}}, "another result for the same seed"),
    ({"trains": lambda start: {**step(start), "b": start["b"]}}, "did not change 1 of 2 tensors, for example 'b'"),
    ({"trains": lambda start: {**step(start), "c": start["b"]}}, "'c', which initial() does not have"),
    ({"metrics": {"loss": float("nan")}}, "reported 'loss' as nan"),
]  # fmt: skip


@pytest.mark.parametrize(("bent", "says"), WRONG, ids=[says for _, says in WRONG])
def test_what_is_wrong_is_said_in_words(bent: dict[str, Any], says: str) -> None:
    with np.errstate(invalid="ignore"):  # 0 times infinity, of the one that diverges
        problems, _ = found(**bent)
    assert says in problems


@pytest.mark.parametrize(("bent", "says"), NOTED, ids=[says for _, says in NOTED])
def test_what_is_only_odd_is_a_note(bent: dict[str, Any], says: str) -> None:
    problems, notes = found(**bent)
    assert says in notes
    assert not problems


def test_the_figures_are_those_of_the_model() -> None:
    facts = check(load_task("digits-numpy"), Conditions(partition="iid:0/8")).facts
    assert (facts["parameters"], facts["tensors"], facts["samples"]) == (9610, 4, 180)
    assert 9610 * 1.0 / 8 < int(facts["update_ternary_bytes"]) < 9610 * 1.7 / 8
    assert 9610 * 1.7 / 8 < int(facts["update_float32_bytes"]) <= 9610 * 4


def test_what_is_sent_as_float32_is_not_said_to_be_ternary() -> None:
    small = Odd(made=lambda: {"w": np.zeros(3, np.float32)})
    object.__setattr__(small, "evaluator", lambda *, data: small)
    sent = {}
    for name, task in (("small", small), ("digits", load_task("digits-numpy"))):
        (sent[name],) = [line.strip() for line in check(task).lines() if "sent as" in line]
    assert sent["small"].startswith("sent as float32, for want of a tensor large enough for ternary, in 1 part; ")
    assert sent["digits"].startswith("sent as ternary, but 138 parameters as float32, in 1 part; ")


def test_the_command_prints_and_its_exit_code_says_whether_the_task_is_ready(tmp_path: Path) -> None:
    run = CliRunner().invoke
    ready = run(app, ["check", "digits-numpy", "--json"])
    assert ready.exit_code == 0
    assert json.loads(ready.stdout)["ok"] is True
    text = run(app, ["check", "digits-numpy"])
    assert "9,610 parameters" in text.stdout
    assert text.stdout.endswith("ready\n")
    wrong = run(app, ["check", "fashion-mnist", "--data", str(tmp_path)])
    assert wrong.exit_code == 2
    assert f"{tmp_path}/FashionMNIST/raw" in wrong.stdout
    assert json.loads(run(app, ["check", "fashion-mnist", "--json"]).stdout)["ok"] is False
    assert isinstance(run(app, ["check", "no-such-task"]).exception, ConfigError)
