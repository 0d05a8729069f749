"""Lightning's modules as tasks."""

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from support.simulated import simulated
from ternbus.broker.errors import ConfigError
from ternbus.edge.adapters import LightningTask
from ternbus.edge.learn.task import TrainingError
from ternbus.edge.plan.plan import Plan
from ternbus.edge.shell.preflight import check
from ternbus.edge.tasks.digits_data import load

LightningModule: Any = importlib.import_module("lightning").LightningModule  # after the adapter: see torchvision_ops


class Digits(LightningModule):  # type: ignore[misc]  # the library is read without types
    def __init__(self, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers = nn.Sequential(
            nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10)
        )

    def training_step(self, batch: Any, index: int) -> Any:
        inputs, labels = batch
        loss = functional.cross_entropy(self.layers(inputs), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        inputs, labels = batch
        outputs = self.layers(inputs)
        self.log("val_loss", functional.cross_entropy(outputs, labels))
        self.log("val_acc", (outputs.argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


def digits(folder: Any, split: str) -> tuple[Any, Any]:
    images, labels = load("test" if split == "test" else "train")
    return torch.from_numpy(images), torch.from_numpy(labels)


def task_of(module: Any = Digits, data: Any = digits, **arguments: Any) -> LightningTask:
    return LightningTask(name="lit", module=module, data=data, **arguments)


def plan_of(task: LightningTask, **keys: object) -> Plan:
    return Plan.from_meta({**task.default_plan, **keys})


def test_a_module_is_ready_and_the_same_seed_gives_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    report = check(task_of())
    assert not report.problems
    assert not [note for note in report.notes if "another" in note]
    assert report.facts["parameters"] == 64 * 32 + 32 + 4 * 32 + 32 * 10 + 10
    assert capfd.readouterr() == ("", "")  # nothing of Lightning's bars and advice


@pytest.mark.slow
def test_a_federation_learns_as_lightning_does_alone() -> None:
    task = task_of(default_plan={"local_epochs": 2})
    found = simulated(task, devices=4, versions=10)
    trainer = task.trainer(data=None, partition="all")
    alone = trainer.train(task.initial(0), plan_of(task, local_epochs=10, statistics_rate=1), version=0, seed=0)
    central = task.evaluator(data=None).evaluate(alone.tensors).values["accuracy"]
    assert found.evaluation.values.keys() == {"accuracy", "loss"}
    assert found.evaluation.values["accuracy"] > 0.92
    assert found.evaluation.values["accuracy"] > central - 0.05


def test_a_training_is_that_of_the_module_s_own_optimizer() -> None:
    """The weights are those of the same module after the same batches in a plain loop."""

    def module() -> Digits:
        net = Digits()
        dropout: Any = net.layers[3]
        dropout.p = 0.0  # the seeds differ
        return net

    task = task_of(module)
    start, plan = task.initial(0), plan_of(task, local_steps=5, statistics_rate=1)
    trained = task.trainer(data=None, partition="all").train(start, plan, version=0, seed=3)
    net = module()
    net.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in start.items()}, strict=False)
    inputs, labels = digits(None, "train")
    chosen = [torch.from_numpy(rows) for rows in plan.batches(len(labels), np.random.default_rng(3))]
    optimizer = net.configure_optimizers()
    net.train()
    for rows in chosen:
        optimizer.zero_grad()
        functional.cross_entropy(net.layers(inputs[rows]), labels[rows]).backward()
        optimizer.step()
    assert trained.metrics["steps"] == 5
    for name, value in net.state_dict().items():
        if name in start:
            np.testing.assert_allclose(trained.tensors[name], value.numpy(), rtol=1e-4, atol=1e-5)


def test_the_plan_s_rate_reaches_the_optimizer_and_defaults_to_the_module_s() -> None:
    rates: list[float] = []

    class Attribute(Digits):
        def __init__(self) -> None:
            super().__init__()
            self.learning_rate: Any = 0.125

        def configure_optimizers(self) -> Any:
            rates.append(self.learning_rate)
            return torch.optim.SGD(self.parameters(), lr=self.learning_rate)

    task = task_of(Attribute)
    assert task.default_plan == {"learning_rate": 0.125}
    assert task_of(default_plan={"learning_rate": 0.5}).default_plan == {"learning_rate": 0.5}
    assert task_of().default_plan == {"learning_rate": 0.01}
    trainer = task.trainer(data=None, partition="iid:0/8")
    plan = plan_of(task, local_steps=1, schedule="linear", schedule_versions=10)
    for version in (0, 5):
        trainer.train(task.initial(0), plan, version=version, seed=0)
    assert rates == [0.125, 0.0625]


def test_a_metric_of_the_module_keeps_its_name_and_its_direction() -> None:
    class Error(Digits):
        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", 0.5)
            self.log("mae", 2.0)

    task = task_of(Error, better={"mae": "lower"})
    found = task.evaluator(data=None).evaluate(task.initial(0))
    assert found.values == {"loss": 0.5, "mae": 2.0}
    assert found.better == {"mae": "lower"}
    assert found.samples == len(digits(None, "test")[1])


def test_the_mean_over_batches_counts_samples() -> None:
    class Halves(Digits):
        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_loss", batch[1].float().mean())

    task = task_of(Halves)
    found = task.evaluator(data=None).evaluate(task.initial(0))
    assert found.values["loss"] == pytest.approx(float(digits(None, "test")[1].float().mean()), rel=1e-5)


def test_two_optimizers_and_gradient_clipping_are_lightning_s() -> None:
    class Manual(Digits):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, index: int) -> None:
            loss = functional.cross_entropy(self.layers(batch[0]), batch[1])
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in optimizers:
                optimizer.step()

        def configure_optimizers(self) -> Any:
            first, *others = (list(layer.parameters()) for layer in (self.layers[0], self.layers[1], self.layers[4]))
            return [
                torch.optim.SGD(first, lr=0.1),
                torch.optim.Adam([each for part in others for each in part], lr=0.01),
            ]

    task = task_of(Manual)
    start = task.initial(0)
    trained = task.trainer(data=None, partition="all").train(start, plan_of(task, local_steps=3), version=0, seed=0)
    assert trained.metrics["steps"] == 3
    assert all(not np.array_equal(start[name], trained.tensors[name]) for name in start if name.endswith("weight"))
    clipped = task_of(trainer={"gradient_clip_val": 1e-12, "gradient_clip_algorithm": "value"}, module=Sgd)
    same = clipped.trainer(data=None, partition="all").train(start, plan_of(clipped, local_steps=3), version=0, seed=0)
    np.testing.assert_allclose(same.tensors["layers.0.weight"], start["layers.0.weight"], atol=1e-6)


class Sgd(Digits):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_what_is_no_lightning_module_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Linear has no training_step\(\): it must be a LightningModule"):
        task_of(lambda: nn.Linear(2, 2))


def test_a_module_that_logs_nothing_cannot_be_evaluated() -> None:
    class Silent(Digits):
        def validation_step(self, batch: Any, index: int) -> None:
            pass

    task = task_of(Silent)
    with pytest.raises(
        ConfigError, match=r'Silent.validation_step\(\) logged nothing: call self.log\("val_loss", loss\)'
    ):
        task.evaluator(data=None).evaluate(task.initial(0))


def test_data_that_are_not_finite_are_told() -> None:
    inputs, labels = digits(None, "train")
    inputs[3] = torch.nan
    task = task_of(data=lambda folder, split: (inputs, labels))
    trainer, plan = task.trainer(data=None, partition="all"), plan_of(task)
    with pytest.raises(TrainingError, match="1 of 1438 samples have inputs that are not finite"):
        trainer.train(task.initial(0), plan, version=0, seed=0)
    private = replace(plan, dp="device", dp_clip=1.0, dp_noise=1.0, dp_epsilon=8.0)
    with pytest.raises(TrainingError, match="diverged"):  # the search takes time, which others see
        trainer.train(task.initial(0), private, version=0, seed=0)


def test_an_exception_of_the_module_names_its_own_line() -> None:
    class Broken(Digits):
        def training_step(self, batch: Any, index: int) -> Any:
            raise KeyError("layer")

    problems = check(task_of(Broken)).problems
    assert "KeyError: 'layer' (test_lightning_adapter.py, line" in problems[0]


class Ranged(Digits):
    """It assigns its buffers anew: one that travels, and one that is not finite before its first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.center: torch.Tensor
        self.lowest: torch.Tensor
        self.register_buffer("center", torch.zeros(64))
        self.register_buffer("lowest", torch.full((64,), torch.inf))

    def training_step(self, batch: Any, index: int) -> Any:
        self.center = 0.5 * self.center + 0.5 * batch[0].mean(0)
        self.lowest = torch.minimum(self.lowest, batch[0].min(0).values)
        return super().training_step(batch, index)


def test_a_buffer_that_is_assigned_anew_travels() -> None:
    task = task_of(Ranged)
    start = task.initial(0)
    assert "center" in start
    assert "lowest" not in start
    trained = task.trainer(data=None, partition="all").train(
        start, plan_of(task, local_steps=2, statistics_rate=1.0), version=0, seed=0
    )
    assert trained.tensors.keys() == start.keys()
    assert trained.tensors["center"].any()
