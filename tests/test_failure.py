"""What a device says of a training that failed: the data, the learning rate, a bug, a file or the memory."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from ternbus.broker.protocol.schema import Schema, to_vector
from ternbus.edge.core.actions import StartEvaluation, StartFineTuning, StartTraining
from ternbus.edge.core.events import EvaluationFailed, FineTuningFailed, TrainingFailed
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.plan import Plan
from ternbus.edge.shell.worker import evaluate, fine_tune, train
from ternbus.edge.torch.objective import default_loss

IN_BATCH = " (in batch 1 of 3)"
TASK = """
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ternbus.edge import TorchTask, TrainingError

INPUTS, TARGETS = torch.linspace(0, 1, 90 * 8).reshape(90, 8), torch.arange(90) % 3


def data(folder, split):
    {data}
    return INPUTS, TARGETS


def loss(outputs, targets):
    {loss}
    return functional.cross_entropy(outputs, targets)


def metric(outputs, targets):
    return outputs.mean()


TASK = TorchTask(name="mine", model=lambda: nn.Linear(8, 3), data=data, loss=loss, metric=metric)
"""
LINE_OF_LOSS = 1 + TASK[: TASK.index("{loss}")].count("\n")
NUMBERS = itertools.count()
PLAN = Plan.from_meta({"batch_size": 30, "learning_rate": 0.1})


def failed(folder: Path, *, data: str = "pass", loss: str = "pass") -> TrainingFailed:
    """What comes of a training by a task of one's own, with one more statement in one of its functions."""
    path = folder / f"mine_{next(NUMBERS)}.py"  # a module of this name is imported once
    path.write_text(TASK.format(data=data, loss=loss))
    task = load_task(f"{path}:TASK")
    model = task.initial(1)
    schema = Schema.of({name: tensor.shape for name, tensor in model.items()})
    job = StartTraining(base=4, schema=schema, vector=to_vector(schema, model), residual=None, plan=PLAN, seed=1)
    trainer = task.trainer(data=None, partition="all")
    result = train(trainer, job)
    assert isinstance(result, TrainingFailed)
    evaluated = evaluate(trainer, StartEvaluation(version=4, schema=schema, vector=job.vector))
    tuned = fine_tune(trainer, trainer, StartFineTuning(version=4, schema=schema, vector=job.vector, plan=PLAN, seed=1))
    assert isinstance(tuned, FineTuningFailed)
    if loss != "pass":
        assert isinstance(evaluated, EvaluationFailed)
        assert evaluated.reason == tuned.reason == result.reason.removesuffix(IN_BATCH)
    return result


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("INPUTS[::2] = torch.nan", "45 of 90 samples have inputs that are not finite (NaN or infinity)"),
        ("INPUTS[89, 7] = -torch.inf", "1 of 90 samples have inputs that are not finite (NaN or infinity)"),
        ("return INPUTS, torch.full((90, 3), torch.nan)", "90 of 90 samples have targets that are not finite"),
    ],
)
def test_data_that_are_not_finite_are_told_from_a_training_that_diverged(
    tmp_path: Path, data: str, reason: str
) -> None:
    found = failed(tmp_path, data=data)
    assert found.reason.startswith(reason)
    assert "learning_rate" not in found.reason
    assert found.trace == ""


def test_a_training_that_diverged_says_that_the_data_are_finite(tmp_path: Path) -> None:
    assert failed(tmp_path, data="return INPUTS * 1e38, TARGETS").reason == (
        "training diverged (the data are finite, the model is not): lower the plan's learning_rate"
    )


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("raise ValueError('odd')", "ValueError: odd"),
        ("[][3]", "IndexError: list index out of range"),
        ("sys.exit('enough')", "sys.exit('enough')"),
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("raise OSError('no file')", "OSError: no file"),
        ("raise ValueError('two\\nlines \\x1b[2J')", "ValueError: two lines ?[2J"),
    ],
)
def test_a_bug_is_named_with_file_and_line_of_the_task(tmp_path: Path, statement: str, said: str) -> None:
    found = failed(tmp_path, loss=statement)
    (file,) = tmp_path.glob("mine_*.py")
    assert found.reason == f"a bug in the task: {file.name}, line {LINE_OF_LOSS}: {said}{IN_BATCH}"
    assert found.reason.isprintable()


def test_a_bug_comes_with_its_traceback_for_the_log(tmp_path: Path) -> None:
    trace = failed(tmp_path, loss="raise ValueError('odd')").trace
    assert trace.startswith("Traceback (most recent call last):")
    assert "raise ValueError('odd')" in trace


def test_a_bug_below_the_tasks_own_code_is_named_too(tmp_path: Path) -> None:
    """A label that the model has no output for, and inputs that its layer does not take: no line is the task's."""
    assert "IndexError: Target 3 is out of bounds" in failed(tmp_path, data="return INPUTS, TARGETS + 1").reason
    with pytest.raises(IndexError, match="out of bounds"):  # one row of scores, where there should be several
        default_loss(torch.zeros(3), torch.tensor(7))
    found = failed(tmp_path, data="return INPUTS[:, :7], TARGETS")
    said = "RuntimeError: mat1 and mat2 shapes cannot be multiplied (30x7 and 8x3)"
    assert found.reason == f"a bug in the task: {said}{IN_BATCH}; look at the task's model, loss and data"


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("Path('/no/such/data').stat()", "missing data: /no/such/data: No such file or directory"),
        ("np.load('/etc/passwd/train.npz')", "missing data: /etc/passwd/train.npz: Not a directory"),
        ("raise PermissionError(13, 'Permission denied', '/srv')", "cannot read data: /srv: Permission denied"),
        ("raise TrainingError('too few:\\n put more there')", "too few: put more there"),
        ("torch.empty(2**50)", "out of memory ("),
        ("np.empty(2**55)", "out of memory ("),
        ("raise MemoryError", "out of memory (MemoryError): lower the plan's batch_size"),
    ],
)
def test_what_is_no_bug_has_no_traceback(tmp_path: Path, statement: str, reason: str) -> None:
    found = failed(tmp_path, loss=statement)
    assert found.reason.startswith(reason)
    assert found.trace == ""


def test_a_trainer_without_torch_is_asked_to_look_at_both(tmp_path: Path) -> None:
    """Only a trainer knows its data; what a trained model is worth is checked for every kind."""
    task = load_task("digits-numpy")
    model = task.initial(1)
    schema = Schema.of({name: tensor.shape for name, tensor in model.items()})
    plan = Plan.from_meta({"learning_rate": 1000, "batch_size": 1, "momentum": 0.99, "weight_decay": 1.0})
    vector = to_vector(schema, model)
    job = StartTraining(base=4, schema=schema, vector=vector, residual=None, plan=plan, seed=1)
    with np.errstate(all="ignore"):
        result = train(task.trainer(data=tmp_path, partition="all"), job)
    assert isinstance(result, TrainingFailed)
    assert "lower the plan's learning_rate, or remove NaN from the data" in result.reason
