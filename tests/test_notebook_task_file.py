"""A federation as a task's file: what it holds, what it refuses, and that it is the same task."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from support.arrays import CLIENTS, TEST, classes, linear
from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.metric import lower
from ternbus.edge.learn.task_loader import load_task
from ternbus.edge.plan.plan import Plan
from ternbus.edge.shell.preflight import Conditions, check
from ternbus.lab import Federation, iid

WIDTH = 6


class Block(nn.Module):
    """A class of the test's own, which the file imports from here."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.relu(self.layer(inputs))


def federation(**changes: Any) -> Federation:
    return Federation(**{"model": linear, "loss": "mse", "clients": CLIENTS, "test": TEST, **changes})


def loaded(path: Path) -> Any:
    return load_task(f"{path}:TASK")


def test_the_file_is_the_same_task_on_each_device_s_own_arrays(tmp_path: Path) -> None:
    scale = 0.5
    fed = federation(
        model=lambda: nn.Sequential(nn.Linear(10, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1)),
        metrics={"error": lower(lambda outputs, targets: scale * (outputs - targets).abs().mean())},
        plan={"learning_rate": 0.02},
    )  # fmt: skip
    path = fed.to_task(tmp_path / "first_task.py", data=tmp_path / "data")
    task = loaded(path)
    plan = Plan.from_meta(task.default_plan)
    assert plan.learning_rate == 0.02
    for number, name in enumerate(fed.devices):
        folder = tmp_path / "data" / name
        assert not check(task, Conditions(data=folder)).problems
        one = task.trainer(data=folder, partition="all").train(task.initial(3), plan, version=1, seed=2)
        other = fed.trainer(number).train(fed.task.initial(3), plan, version=1, seed=2)
        assert all(np.array_equal(one.tensors[key], other.tensors[key]) for key in other.tensors)
        found = task.evaluator(data=folder).evaluate(task.initial(0))
        assert found == fed.initial_evaluation()


def test_classes_losses_and_augmentation_are_written_with_the_names_that_they_need(tmp_path: Path) -> None:
    inputs, labels = classes(60)

    def noisy(batch: Tensor) -> Tensor:
        return batch + torch.randn_like(batch) * WIDTH

    fed = Federation(
        lambda: nn.Sequential(Block(), nn.Linear(WIDTH, 3)), loss=nn.CrossEntropyLoss(), augment=noisy,
        data=(inputs, labels), partition=iid(3), test=0.2, stays_local=("1.*",), name="three classes",
    )  # fmt: skip
    text = fed.to_task(tmp_path / "second_task.py").read_text()
    assert f"WIDTH = {WIDTH}" in text
    assert "loss=nn.CrossEntropyLoss()" in text
    assert "def noisy(batch: Tensor)" in text
    assert "stays_local=('1.*',)" in text
    assert not (tmp_path / "three classes").exists()
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(Path(__file__).parent))
        task = loaded(tmp_path / "second_task.py")
    assert task.name == "three classes"
    assert sum(array.size for array in task.initial(0).values()) == 4 * WIDTH + WIDTH
    with pytest.raises(ConfigError, match="name the folder"):
        task.trainer(data=None, partition="all")


@pytest.mark.slow
def test_a_script_s_own_functions_are_written_and_the_command_accepts_the_file(tmp_path: Path) -> None:
    (tmp_path / "notebook.py").write_text(
        "import numpy as np\n"
        "from torch import nn\n"
        "from ternbus.lab import Federation\n"
        "HIDDEN = 4\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layers = nn.Sequential(nn.Linear(3, HIDDEN), activation(), nn.Linear(HIDDEN, 2))\n"
        "    def forward(self, inputs):\n"
        "        return self.layers(inputs)\n"
        "def activation():\n"
        "    return nn.ReLU()\n"
        "data = np.random.default_rng(0).normal(size=(40, 3)).astype('f4'), np.arange(40) % 2\n"
        "fed = Federation(Net, clients={'a': data, 'b': data}, test=data)\n"
        "for turn in range(2):\n"
        "    fed.to_task('my_task.py', data='data')\n"
    )
    subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, check=True, timeout=120)
    ran = subprocess.run(
        [sys.executable, "-m", "ternbus", "edge", "check", "my_task:TASK", "--data", "data/b"],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "ready" in ran.stdout


NOTEBOOK = """
import numpy as np
from torch import nn
from ternbus.lab import Federation
HIDDEN = 4
def same(made):
    return made
@same
class Net(nn.Module):
    units = HIDDEN
    @staticmethod
    def activation():
        return nn.ReLU()
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, self.units), self.activation(), nn.Linear(self.units, 2))
    def forward(self, inputs):
        return self.layers(inputs)
class Bare(nn.Identity):
    pass
data = np.ones((40, 3), np.float32), np.arange(40) % 2
Federation(Net, clients={'a': data, 'b': data}, test=data).to_task('cell_task.py')
try:
    Federation(lambda: nn.Sequential(nn.Linear(3, 2), Bare()), clients={'a': data}, test=data).to_task('bare_task.py')
except Exception as error:
    print(error)
"""


@pytest.mark.slow
def test_a_class_of_a_notebook_s_cell_is_written(tmp_path: Path) -> None:
    cell = [sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor", "-c", NOTEBOOK]
    environment = {**os.environ, "IPYTHONDIR": str(tmp_path)}
    ran = subprocess.run(cell, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=True)
    text = (tmp_path / "cell_task.py").read_text()
    assert "@same\nclass Net(nn.Module):" in text
    assert "HIDDEN = 4" in text
    assert sum(array.size for array in loaded(tmp_path / "cell_task.py").initial(0).values()) == 3 * 4 + 4 + 4 * 2 + 2
    assert "Bare has no source that Python knows: define it in a file" in ran.stdout  # a class without a method


@pytest.mark.slow
def test_arguments_and_variables_are_not_taken_for_the_notebook_s_names(tmp_path: Path) -> None:
    (tmp_path / "notebook.py").write_text(
        "import numpy as np\n"
        "from torch import nn\n"
        "from ternbus.lab import Federation\n"
        "X, y = np.random.default_rng(0).normal(size=(40, 3)).astype('f4'), np.arange(40) % 2\n"
        "net, HIDDEN = nn.Linear(3, 2), 4\n"
        "def model(units=HIDDEN):\n"
        "    net = nn.Sequential(nn.Linear(3, units), nn.Linear(units, 2))\n"
        "    return net\n"
        "right = {'right': lambda X, y: (X.argmax(1) == y).float().mean()}\n"
        "fed = Federation(model, clients={'a': (X, y), 'b': (X, y)}, test=(X, y), metrics=right)\n"
        "fed.to_task('shadowed_task.py')\n"
    )
    subprocess.run([sys.executable, "notebook.py"], cwd=tmp_path, check=True, timeout=120)
    text = (tmp_path / "shadowed_task.py").read_text()
    assert "HIDDEN = 4" in text
    assert len(list(loaded(tmp_path / "shadowed_task.py").initial(0))) == 4


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, path = linear(), tmp_path / "refused_task.py"
    weighted = nn.CrossEntropyLoss(weight=torch.ones(3))
    inputs, labels = classes(30)
    both = {name: TensorDataset(*map(torch.from_numpy, pair)) for name, pair in CLIENTS.items()}
    bad = [
        (federation(model=lambda: net), "model uses net, Linear, which cannot be written"),
        (federation(model=type("Odd", (), {"__call__": lambda _: linear()})()), "model is Odd, whose source"),
        (Federation(linear, loss=weighted, data=(inputs, labels), test=0.2), "has settings of its own"),
        (federation(clients={n: [*zip(*p, strict=True)] for n, p in CLIENTS.items()}), "no pair of arrays"),
        (Federation(task="digits-numpy"), "is of the task digits-numpy already: name it with --task"),
    ]
    for fed, message in bad:
        with pytest.raises(ConfigError, match=message):
            fed.to_task(path)
    assert not path.exists()
    with pytest.raises(ConfigError, match=r"my-task.py is no name of a module"):
        federation().to_task(tmp_path / "my-task.py")
    for name in ("torch", "random"):
        with pytest.raises(ConfigError, match=f"{name} is another module, found in place of the file"):
            federation().to_task(tmp_path / f"{name}.py")
    installed = tmp_path / "dist-packages"  # Debian's name for site-packages
    installed.mkdir()
    (installed / "packaged_here.py").touch()
    monkeypatch.syspath_prepend(installed)
    with pytest.raises(ConfigError, match="packaged_here is another module, found in place of the file"):
        federation().to_task(tmp_path / "packaged_here.py")
    with pytest.raises(ConfigError, match=r"cannot write .*refused_task.py: there is no folder .*nowhere; make it"):
        federation().to_task(tmp_path / "nowhere" / "refused_task.py")
    path.write_text("mine = 1\n")
    with pytest.raises(ConfigError, match="is a file of yours"):
        federation().to_task(path)
    with pytest.raises(ConfigError, match=r"cannot write .*refused_task.py"):
        federation().to_task(tmp_path / "other_task.py", data=path)
    assert federation(clients=both).to_task(tmp_path / "tensors_task.py").exists()  # its tensors are known
    assert importlib.util.find_spec("refused_task") is None
