"""Tasks in PyTorch: as a class or by functions, batches and outputs of any form, metrics, sizes of evaluations."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from support.linear_task import DRAW, INPUTS, TARGETS, Subclass, data, evaluated, linear, same, trained
from ternbus.broker.errors import ConfigError
from ternbus.edge import Metric, Plan, TorchTask, TrainingError, higher, lower
from ternbus.edge.learn.task import evaluated_by
from ternbus.edge.shell.preflight import check
from ternbus.edge.torch import torchvision_ops  # noqa: F401 - must come before torchvision

# -- functions, or a class


class WithLoss(Subclass):
    name = "mine"

    def loss(self, net: nn.Module, batch: Any, plan: Plan) -> Any:
        outputs = net(batch[0])
        return functional.cross_entropy(outputs, batch[1]), outputs


class LossAlone(Subclass):
    def loss(self, net: nn.Module, batch: Any, plan: Plan) -> Any:
        return functional.cross_entropy(net(batch[0]), batch[1])

    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        return float((outputs.argmax(1) == targets).float().mean())


class ByMethods(Subclass):
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:  # type: ignore[override]  # the simple form
        return functional.cross_entropy(outputs, targets)

    def metrics(self) -> Mapping[str, Any]:
        return {"accuracy": lambda outputs, targets: np.mean(outputs.numpy().argmax(1) == targets.numpy())}


class OwnStep(Subclass):
    def train_step(self, net: nn.Module, batch: Any, plan: Plan, optimizers: Any) -> Any:
        return super().train_step(net, batch, plan, optimizers)


class InTorchsManner(Subclass):
    def train_step(self, net: nn.Module, batch: Any, plan: Plan, optimizers: Any) -> Any:
        optimizers.zero_grad()
        loss = functional.cross_entropy(net(batch[0]), batch[1])
        loss.backward()
        optimizers.step()
        return {"loss": loss.item(), "largest": np.float32(1.5)}


PLAIN = TorchTask(name="own", model=linear, data=data)


@pytest.mark.parametrize(
    "made",
    [
        Subclass(),
        WithLoss(),
        LossAlone(),
        ByMethods(),
        OwnStep(),
        InTorchsManner(),
        TorchTask(name="own", model=linear, data=data, loss=nn.CrossEntropyLoss()),
        TorchTask(
            name="own",
            model=linear,
            data=data,
            loss=lambda net, batch, plan: {"loss": LossAlone().loss(net, batch, plan)},
        ),
        Subclass(loss=functional.cross_entropy, metric=lambda o, t: float((o.argmax(1) == t).float().mean())),
    ],
    ids=lambda made: type(made).__name__,
)
def test_a_class_and_functions_make_the_same_task(made: TorchTask) -> None:
    assert same(made.initial(0), PLAIN.initial(0))
    one, other = trained(made), trained(PLAIN)
    assert same(one.tensors, other.tensors)
    assert one.metrics["loss"] == pytest.approx(other.metrics["loss"])
    found, expected = evaluated(made, one.tensors), evaluated(PLAIN, one.tensors)
    assert found.values["loss"] == pytest.approx(expected.values["loss"])
    if "accuracy" in found.values:
        assert found.values["accuracy"] == pytest.approx(expected.values["accuracy"])
    assert check(made).problems in ([], ["evaluate() returned no finite 'accuracy' in its values"])


def test_a_subclass_has_the_name_of_its_class_unless_it_has_its_own() -> None:
    assert (Subclass().name, WithLoss().name, Subclass(name="other").name) == ("Subclass", "mine", "other")
    assert WithLoss().replaced(name="new").name == "new"


def test_a_subclass_has_a_name_though_its_constructor_does_not_call_ours() -> None:
    class Own(TorchTask):
        def __init__(self, width: int) -> None:
            self.width = width

        def model(self) -> nn.Module:
            return nn.Linear(self.width, 3)

    assert Own(8).name == "Own"
    assert Own(8).replaced(workers=1).name == "Own"


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        ("model", nn.Linear(8, 3), "model is a Linear: give a function that makes one, as lambda: Linear(…)"),
        ("data", (INPUTS, TARGETS), "data is tuple, but must be a function"),
        ("loss", "mse", "loss is str, but must be a function"),
        ("collate", True, "collate is bool, but must be a function"),
    ],
)
def test_what_is_no_function_is_refused_where_one_is_needed(argument: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TorchTask(name="own", **{argument: value})
    assert str(caught.value) == f"the task own: {said}"


def test_a_task_without_a_model_or_data_says_so() -> None:
    with pytest.raises(ConfigError, match="the task own has no model"):
        TorchTask(name="own", data=data).initial(0)
    with pytest.raises(ConfigError, match="the task own has no data"):
        TorchTask(name="own", model=linear).evaluator(data=None)


def test_data_of_other_arguments_are_said_with_their_place_and_errors_within_stay_what_they_are() -> None:
    one: Any = lambda folder: (INPUTS, TARGETS)  # noqa: E731 - it stands for a user's
    with pytest.raises(ConfigError, match=r"^test_torch_task.py, line \d+: this is called as data\(folder, split\): "):
        TorchTask(name="own", model=linear, data=one).evaluator(data=None)

    def failing(folder: Path | None, split: str) -> Any:
        return len(split) + len(folder)  # type: ignore[arg-type]  # the fault in the user's own code

    with pytest.raises(TypeError, match="has no len"):
        TorchTask(name="own", model=linear, data=failing).evaluator(data=None)


# -- what models take and give


@dataclass
class Out:
    logits: Tensor
    loss: Tensor | None = None
    cache: Any = None


class Forms(nn.Module):
    def __init__(self, takes: str, gives: str) -> None:
        super().__init__()
        self.layer, self.takes, self.gives = nn.Linear(8, 3), takes, gives

    def forward(self, inputs: Any) -> Any:
        inputs = inputs if self.takes == "tensor" else inputs["x" if self.takes == "dict" else 1]
        logits = self.layer(inputs)
        given = {"tensor": logits, "tuple": (logits, logits.detach()), "dict": {"logits": logits}}
        return given.get(self.gives, Out(logits, cache="a cache"))


def logits_of(outputs: Any) -> Any:
    if isinstance(outputs, tuple):
        return outputs[0]
    return outputs["logits"] if isinstance(outputs, dict) else getattr(outputs, "logits", outputs)


def of_forms(takes: str, gives: str) -> TorchTask:
    def own(folder: Path | None, split: str) -> Any:
        inputs, targets = data(folder, split)
        return {"tensor": inputs, "dict": {"x": inputs, "mask": targets > 0}, "list": [targets, inputs]}[takes], targets

    return TorchTask(
        name="own",
        model=lambda: Forms(takes, gives),
        data=own,
        loss=lambda outputs, targets: functional.cross_entropy(logits_of(outputs), targets),
        metric=lambda outputs, targets: (logits_of(outputs).argmax(1) == targets).float().mean(),
    )


FORMS = [(takes, gives) for takes in ("tensor", "dict", "list") for gives in ("tensor", "tuple", "dict", "object")]


@pytest.mark.parametrize(("takes", "gives"), FORMS)
def test_a_model_takes_and_gives_what_it_likes(takes: str, gives: str) -> None:
    task = of_forms(takes, gives)
    one, other = trained(task), trained(PLAIN)
    assert all(np.array_equal(one.tensors[f"layer.{name}"], other.tensors[name]) for name in other.tensors)
    assert one.metrics["accuracy"] == pytest.approx(other.metrics["accuracy"])
    found, expected = evaluated(task, one.tensors), evaluated(PLAIN, other.tensors)
    assert found.values == pytest.approx(expected.values)
    auto = Plan(local_steps=2, batch_size=10, precision="bfloat16")
    assert trained(task, auto).metrics["bfloat16"] == 1


class LikeTransformers(nn.Module):
    """Takes named arguments, and computes its loss where it has labels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, values: Tensor, labels: Tensor | None = None) -> Out:
        logits = self.layer(values)
        return Out(logits, None if labels is None else functional.cross_entropy(logits, labels))


def test_a_model_with_a_loss_of_its_own_needs_no_other() -> None:
    def own(folder: Path | None, split: str) -> Any:
        inputs, targets = data(folder, split)
        return {"values": inputs, "labels": targets.to(torch.int32)}

    task = TorchTask(name="own", model=LikeTransformers, data=own)
    one, other = trained(task), trained(PLAIN)
    assert all(np.array_equal(one.tensors[f"layer.{name}"], other.tensors[name]) for name in other.tensors)
    assert evaluated(task, one.tensors).values == pytest.approx(evaluated(PLAIN, other.tensors).values)


class Named(nn.Module):
    """Takes its inputs by name, and no targets."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 3)

    def forward(self, values: Tensor) -> Any:
        return {"logits": self.layer(values), "loss": None}


@pytest.mark.parametrize("key", ["labels", "y"])
def test_a_model_that_takes_no_targets_gets_none_and_its_logits_are_scored(key: str) -> None:
    def own(folder: Path | None, split: str) -> Any:
        inputs, targets = data(folder, split)
        return {"values": inputs, key: targets}

    task = TorchTask(name="own", model=Named, data=own)
    one, other = trained(task), trained(PLAIN)
    assert all(np.array_equal(one.tensors[f"layer.{name}"], other.tensors[name]) for name in other.tensors)
    assert evaluated(task, one.tensors) == evaluated(PLAIN, other.tensors)


def test_what_cross_entropy_does_not_take_is_refused_in_words() -> None:
    pairs = TorchTask(name="own", model=lambda: nn.LSTM(8, 3), data=data)  # its outputs are a pair, and no loss
    numbers = TorchTask(name="own", model=linear, data=lambda folder, split: (INPUTS, INPUTS[:, :3]))
    floats = numbers.replaced(data=lambda folder, split: (INPUTS, TARGETS.float()))
    column = numbers.replaced(data=lambda folder, split: (INPUTS, TARGETS[:, None]))
    bools = numbers.replaced(data=lambda folder, split: (INPUTS, TARGETS == 1))
    one_hot = numbers.replaced(data=lambda folder, split: (INPUTS, functional.one_hot(TARGETS.long(), 3)))
    alone = TorchTask(name="own", model=Named, data=lambda folder, split: {"values": INPUTS})
    several = TorchTask(name="own", model=lambda: nn.ModuleDict({"a": nn.Linear(8, 3)}), data=data)
    for task, said in (
        (several, r"the model is a ModuleDict, which has no forward\(\): give the task predict"),
        (pairs, "the model returns tuple, which cross entropy does not take: give the task a loss"),
        (numbers, "the targets are numbers with a fraction, and cross entropy needs classes"),
        (floats, r"the targets are torch.float32, and .*: convert them, as in y.astype"),
        (column, r"the targets have shape \(\d+, 1\), and .*: flatten them"),
        (bools, r"the targets are True and False, .*: convert them, as in y.astype\(int\)"),
        (one_hot, r"the targets have shape \(\d+, 3\), a number for each class, .*y.argmax\(1\)"),
        (numbers.replaced(model=lambda: None), r"the task own: model\(\) returned NoneType: it must return a module"),
        (alone, "the targets are NoneType"),
    ):
        for use in (trained, evaluated):
            with pytest.raises(ConfigError, match=said):
                use(task)


def test_a_loss_of_float_targets_says_so_of_whole_numbers() -> None:
    task = TorchTask(
        name="own",
        model=lambda: nn.Sequential(nn.Linear(8, 1), nn.Flatten(0)),
        data=lambda folder, split: (INPUTS, (TARGETS == 1).long()),
        loss=nn.BCEWithLogitsLoss(),
    )
    for use in (trained, evaluated):
        with pytest.raises(RuntimeError, match=r'targets are whole numbers: .*astype\("float32"\)'):
            use(task)


def test_targets_may_be_the_probability_of_each_class() -> None:
    soft = functional.one_hot(TARGETS.long(), 3) * 0.9 + 0.1 / 3
    found = evaluated(TorchTask(name="own", model=linear, data=lambda folder, split: (INPUTS, soft)))
    assert set(found.values) == {"loss"}


def test_images_are_segmented() -> None:
    images = torch.randint(0, 256, (30, 1, 12, 12), dtype=torch.uint8, generator=DRAW)
    masks = (images[:, 0] > 127).to(torch.uint8)

    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))

    task = TorchTask(name="own", model=net, data=lambda folder, split: (images.numpy(), masks.numpy()))
    found = trained(task, Plan(local_epochs=30, batch_size=10, optimizer="adam", learning_rate=0.02))
    assert found.metrics["accuracy"] > 0.7
    assert evaluated(task, found.tensors).values["accuracy"] > 0.9


def test_several_numbers_are_predicted_and_an_error_is_better_lower() -> None:
    weights = torch.randn(8, 2, generator=DRAW)
    task = TorchTask(
        name="own",
        model=lambda: nn.Linear(8, 2),
        data=lambda folder, split: (INPUTS.double().numpy(), (INPUTS @ weights).double().numpy()),
        loss=nn.MSELoss(),
        metrics={
            "mae": lower(lambda o, t: (o - t).abs().mean()),
            "r2": lambda o, t: float(1 - (o - t).var() / t.var()),
        },
    )
    found = trained(task, Plan(local_epochs=20, batch_size=10))
    result = evaluated(task, found.tensors)
    assert set(result.values) == {"mae", "r2", "loss"}
    assert result.better == {"mae": "lower"}
    assert result.values["mae"] < 0.1 < found.metrics["mae"]
    assert result.values["r2"] > 0.99


def test_several_labels_are_predicted() -> None:
    labels = (INPUTS[:, :4] > 0).float()
    task = TorchTask(
        name="own",
        model=lambda: nn.Linear(8, 4),
        data=lambda folder, split: (INPUTS, labels),
        loss=functional.binary_cross_entropy_with_logits,
        metrics={"exact": lambda o, t: ((o > 0) == t.bool()).all(1).float().mean()},
    )
    found = trained(task, Plan(local_epochs=40, batch_size=10, learning_rate=0.5))
    assert evaluated(task, found.tensors).values["exact"] > 0.9


def test_an_autoencoder_has_its_inputs_as_its_targets() -> None:
    task = TorchTask(
        name="own", model=lambda: nn.Linear(8, 8), data=lambda folder, split: INPUTS, loss=nn.MSELoss(),
        metrics={"mse": lower(functional.mse_loss)},
    )  # fmt: skip
    values = evaluated(task, trained(task).tensors).values
    assert values["mse"] == pytest.approx(values["loss"], rel=1e-5)


def test_regression_without_a_metric_reports_its_loss_alone() -> None:
    task = TorchTask(name="own", model=lambda: nn.Linear(8, 8), data=lambda folder, split: (INPUTS, INPUTS),
                     loss=nn.MSELoss())  # fmt: skip
    assert set(evaluated(task).values) == {"loss"}
    assert set(trained(task).metrics) == {"loss", "steps", "seconds"}


# -- metrics of the whole split


def f1(outputs: Tensor, targets: Tensor) -> Tensor:
    found = outputs.argmax(1)
    return 2 * ((found == 1) & (targets == 1)).sum() / ((found == 1).sum() + (targets == 1).sum())


def auc(outputs: Tensor, targets: Tensor) -> float:
    """As of scikit-learn: it fails where there is only one class."""
    scores = outputs[:, 1] - outputs[:, 0]
    if len(targets.unique()) < 2:
        raise ValueError("only one class present in y_true")
    return float((scores[targets == 1][:, None] > scores[targets != 1][None]).float().mean())


def test_a_metric_is_of_the_whole_split_and_no_mean_of_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ternbus.edge.torch.evaluation.BATCH", 7)
    inputs, targets = data(None, "train")
    order = targets.argsort()  # as folders of classes are: a batch has one class
    task = TorchTask(
        name="own", model=linear, data=lambda folder, split: (inputs[order], targets[order]),
        metrics={"f1": f1, "auc": auc},
    )  # fmt: skip
    start = task.initial(0)
    net = linear()
    net.load_state_dict({name: torch.tensor(tensor) for name, tensor in start.items()})
    with torch.no_grad():
        outputs = net(inputs)
    result = evaluated(task)
    assert result.values == pytest.approx({
        "f1": f1(outputs, targets).item(), "auc": auc(outputs, targets),
        "loss": functional.cross_entropy(outputs, targets).item(),
    })  # fmt: skip


def test_a_metric_that_fails_in_training_is_left_out_there_and_named_in_an_evaluation() -> None:
    ones = TorchTask(
        name="own", model=linear, data=lambda folder, split: (INPUTS, TARGETS * 0), metrics={"auc": auc, "f1": f1}
    )
    assert set(trained(ones).metrics) == {"loss", "f1", "steps", "seconds"}
    with pytest.raises(ValueError, match="only one class present"):
        evaluated(ones)


def test_a_training_reports_the_metrics_of_its_own_outputs() -> None:
    seen: list[int] = []

    def counted(outputs: Tensor, targets: Tensor) -> float:
        seen.append(len(targets))
        return 0.25

    task = TorchTask(name="own", model=linear, data=data, metrics={"counted": counted})
    assert trained(task).metrics["counted"] == 0.25
    assert seen == [270]  # three epochs of 90


def test_a_training_keeps_no_more_outputs_for_its_metrics_than_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ternbus.edge.torch.scoring.TRAINING_BYTES", 3 * 10 * (3 * 4 + 8))  # three batches
    task = TorchTask(name="own", model=linear, data=data, metrics={"counted": lambda o, t: len(t)})
    assert trained(task).metrics["counted"] == 30


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"loss": f1}, "'loss' is no name for a metric"),
        ({"": f1}, "'' is no name for a metric"),
        ({"a\nb": f1}, "is no name for a metric"),
        ({3: f1}, "3 is no name for a metric"),
        ({"f1": 0.5}, "the metric 'f1' is float: it must be a function"),
        ([f1], "metrics is list: it must be a dict"),
    ],
)
def test_metrics_that_are_none_are_refused(metrics: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        TorchTask(name="own", model=linear, data=data, metrics=metrics)


def test_a_metric_that_gives_no_number_is_named() -> None:
    task = TorchTask(name="own", model=linear, data=data, metrics={"odd": lambda o, t: o > 0, "text": lambda o, t: 1})
    with pytest.raises(ConfigError, match=r"the metric 'odd' returned Tensor of shape \(30, 3\): .* one number"):
        evaluated(task)


def test_a_direction_is_stated_where_the_name_does_not_tell_it() -> None:
    task = TorchTask(
        name="own", model=linear, data=data, metric=Metric(f1), metrics={"f1": higher(f1), "error": lower(f1)}
    )
    assert set(evaluated(task).values) == {"accuracy", "f1", "error", "loss"}
    assert evaluated(task).better == {"error": "lower"}


# -- the size of an evaluation's batches


class Counting(nn.Linear):
    """Records the number of samples of each forward pass; more than `room` are too many for the memory."""

    seen: ClassVar[list[int]] = []
    room = 10**9

    def forward(self, inputs: Tensor) -> Tensor:
        if len(inputs) > self.room:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        self.seen.append(len(inputs))
        return super().forward(inputs)


def counting(monkeypatch: pytest.MonkeyPatch, room: int = 10**9) -> list[int]:
    monkeypatch.setattr(Counting, "seen", [])
    monkeypatch.setattr(Counting, "room", room)
    return Counting.seen


def test_an_evaluation_takes_as_many_samples_at_a_time_as_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = counting(monkeypatch)
    wide = TorchTask(name="own", model=lambda: Counting(30_000, 2), data=lambda folder, split: (torch.zeros(50, 30_000),
                     torch.zeros(50).long()), default_plan={"batch_size": 20})  # fmt: skip
    assert evaluated(wide).samples == sum(seen) == 50
    assert max(seen) == 20
    seen.clear()
    assert evaluated(wide.replaced(default_plan={"evaluation_batch_size": 30})).samples == sum(seen)
    assert max(seen) == 30
    seen.clear()
    evaluated_by(wide.evaluator(data=None), wide.initial(0), Plan(evaluation_batch_size=40))  # the federation's
    assert max(seen) == 40
    small = TorchTask(name="own", model=lambda: Counting(8, 3), data=lambda folder, split: (INPUTS.repeat(20, 1),
                      TARGETS.repeat(20)))  # fmt: skip
    seen.clear()
    assert evaluated(small).samples == sum(seen) == 2400
    assert max(seen) == 500
    images = TorchTask(name="own", model=lambda: Counting(784, 2), data=lambda folder, split: (torch.zeros(200, 784),
                       torch.zeros(200).long()), default_plan={"batch_size": 20})  # fmt: skip
    seen.clear()
    evaluated(images)
    assert max(seen) == 2**18 // (4 * 784)  # on a processor 256 KiB


def test_an_evaluation_that_is_too_large_for_the_memory_goes_on_in_smaller_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = counting(monkeypatch, room=11)
    task = TorchTask(
        name="own", model=lambda: Counting(8, 3), data=lambda folder, split: (INPUTS, TARGETS), metrics={"f1": f1}
    )
    evaluator, start = task.evaluator(data=None), task.initial(0)
    found = evaluator.evaluate(start)
    assert sum(seen) == 120
    assert max(seen) <= 11
    tries = len(seen)
    seen.clear()
    assert evaluator.evaluate(start).values == pytest.approx(found.values)
    assert len(seen) <= tries  # it has learned what fits
    monkeypatch.setattr(Counting, "room", 10**9)
    assert evaluated(task).values == pytest.approx(found.values)
    monkeypatch.setattr(Counting, "room", 0)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        evaluated(task)


# -- losses that are none


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda o, t: 0.5, "loss() returned float: in training it must return a tensor"),
        (lambda o, t: functional.cross_entropy(o, t, reduction="none"), "of shape (10,): it must return the"),
        (lambda o, t: functional.cross_entropy(o.detach(), t), "does not depend on the model's parameters"),
        (lambda net, batch, plan: None, "loss() returned NoneType"),
    ],
)  # fmt: skip
def test_a_loss_that_is_none_is_refused_in_words(loss: Callable[..., Any], said: str) -> None:
    with pytest.raises(TrainingError) as caught:
        trained(TorchTask(name="own", model=linear, data=data, loss=loss))
    assert said in str(caught.value)


def test_a_loss_of_an_evaluation_may_be_a_python_number() -> None:
    task = TorchTask(name="own", model=linear, data=data, loss=lambda o, t: 0.5)
    assert evaluated(task).values["loss"] == 0.5


def test_more_than_a_pair_needs_a_loss_that_knows_its_parts() -> None:
    three = TorchTask(name="own", model=linear, data=lambda folder, split: (INPUTS, TARGETS, TARGETS))
    with pytest.raises(ConfigError, match=r"the data have 3 parts: nest them as \(inputs, targets\)"):
        trained(three)
    own = three.replaced(loss=lambda net, batch, plan: functional.cross_entropy(net(batch[0]), batch[2].long()))
    assert set(trained(own).metrics) == {"loss", "steps", "seconds"}
