"""What of a PyTorch model travels: each tensor is sent, stays on the device, or is refused with its name."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol.schema import Schema, to_tensors, to_vector
from ternbus.edge.learn.compress import compress
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import Tensors
from ternbus.edge.shell.preflight import check
from ternbus.edge.torch.trainer import TorchTask

PLAN = Plan(local_steps=3, batch_size=8, learning_rate=0.1)


def data(folder: Path | None, split: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(split))
    inputs = torch.randn(40, 6, generator=generator)
    return inputs, (inputs[:, 0] > 0).long()


def task_of(model: Callable[[], nn.Module]) -> TorchTask:
    return TorchTask(name="own", model=model, data=data, default_plan={"local_steps": 3, "batch_size": 8})


def trained(task: TorchTask, start: Tensors, plan: Plan = PLAN) -> Tensors:
    return task.trainer(data=None, partition="all").train(start, plan, version=0, seed=0).tensors


def wide_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 300), nn.BatchNorm1d(300), nn.ReLU(), nn.Linear(300, 2))


class Tied(nn.Module):
    """Its last layer is its first, the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.last = nn.Linear(6, 6, bias=False)
        self.last.weight = self.first.weight
        self.head = nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.head(self.last(torch.tanh(self.first(inputs))))
        return outputs


def frozen_body() -> nn.Module:
    """As a checkpoint would be: the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(77)
        body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))
    return nn.Sequential(body.requires_grad_(False), nn.Linear(8, 2))


def test_batch_norms_statistics_travel_dense_however_many_they_are() -> None:
    """With trits a variance would go below zero, and evaluation end in NaN."""
    task = task_of(wide_norm)
    start = task.initial(0)
    schema = Schema.of({name: array.shape for name, array in start.items()})
    roles = {tensor.name: tensor.role for tensor in schema.tensors}
    assert (roles["1.running_mean"], roles["1.running_var"], roles["1.weight"]) == ("dense", "dense", "ternary")
    base = to_vector(schema, start)
    change = to_vector(schema, trained(task, start)) - base
    merged = to_tensors(schema, compress(schema, PLAN, change, None, 0).block.apply(base))
    np.testing.assert_allclose(merged["1.running_var"], trained(task, start)["1.running_var"], atol=1e-6)


def test_a_variance_below_zero_is_measured_as_it_is_and_training_brings_it_back() -> None:
    task = task_of(wide_norm)
    good, bad = task.initial(0), task.initial(0)
    good["1.running_var"][:] = 0
    bad["1.running_var"][:] = -0.25  # as an aggregator of an older version may make it
    net = wide_norm().eval()
    net.load_state_dict({name: torch.tensor(array) for name, array in bad.items()}, strict=False)
    inputs, targets = data(None, "test")
    found = task.evaluator(data=None).evaluate(bad)
    assert found.values["accuracy"] == pytest.approx(float((net(inputs).argmax(1) == targets).float().mean()))
    assert math.isnan(found.values["loss"])
    from_good, from_bad = trained(task, good), trained(task, bad)
    owed = 0.25 * Plan().statistics_rate
    np.testing.assert_allclose(
        from_bad["1.running_var"] - bad["1.running_var"], from_good["1.running_var"] + owed, atol=1e-6
    )


def test_statistics_settle_though_updates_come_late() -> None:
    """Several updates on the same version each bring them all the way: undamped, their sum swings ever wider."""
    task = task_of(wide_norm)
    trainer, delay = task.trainer(data=None, partition="all"), 4
    inputs, _ = data(None, "train")

    def after(versions: int, rate: float) -> tuple[Tensors, Tensors]:
        plan = Plan(local_steps=25, batch_size=40, learning_rate=0.0, statistics_rate=rate)
        history = [task.initial(0)]
        for version in range(versions):
            base = history[max(0, version - delay)]
            ours = trainer.train(base, plan, version=version, seed=version).tensors
            history.append({name: history[-1][name] + (ours[name] - base[name]) for name in base})
        return history[0], history[-1]

    start, settled = after(60, Plan().statistics_rate)
    layer = torch.nn.functional.linear(inputs, torch.tensor(start["0.weight"]), torch.tensor(start["0.bias"]))
    np.testing.assert_allclose(settled["1.running_mean"], layer.mean(0), atol=0.05)
    np.testing.assert_allclose(settled["1.running_var"], layer.var(0), atol=0.05)
    _, swinging = after(60, 1.0)
    assert np.abs(swinging["1.running_mean"] - layer.mean(0).numpy()).max() > 10


def test_a_counter_starts_again_so_that_training_twice_is_training_the_same() -> None:
    """Batch norm without momentum averages over all batches that it has counted."""
    task = task_of(lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 2)))
    start = task.initial(0)
    trainer = task.trainer(data=None, partition="all")
    one, two = (trainer.train(start, PLAN, version=0, seed=0).tensors for _ in range(2))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert not np.array_equal(one["1.running_mean"], start["1.running_mean"])


def test_tied_weights_travel_once_and_stay_tied() -> None:
    task = task_of(Tied)
    start = task.initial(0)
    assert list(start) == ["first.weight", "head.weight", "head.bias"]
    assert not check(task).problems
    model = Tied()
    model.load_state_dict({name: torch.tensor(array) for name, array in trained(task, start).items()}, strict=False)
    assert model.last.weight is model.first.weight


def test_of_a_frozen_body_nothing_travels_and_nothing_changes_and_its_dropout_is_off() -> None:
    task = task_of(frozen_body)
    start = task.initial(0)
    assert list(start) == ["1.weight", "1.bias"]
    model = frozen_body()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    one = TorchTask(name="own", model=lambda: model, data=data)
    ours = trained(one, start)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("0."))
    # a head alone on features computed once, by a second and plain implementation
    inputs, targets = data(None, "train")
    with torch.no_grad():
        features = frozen_body().get_submodule("0").eval()(inputs)
    head = nn.Linear(8, 2)
    head.load_state_dict({name: torch.tensor(start[f"1.{name}"]) for name in ("weight", "bias")})
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    for chosen in PLAN.batches(len(inputs), np.random.default_rng(0)):
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(head(features[chosen]), targets[chosen]))
        optimizer.step()
    np.testing.assert_allclose(ours["1.weight"], head.weight.detach().numpy(), atol=1e-6)


def test_a_frozen_parameter_of_a_layer_that_is_trained_stays_alone() -> None:
    def model() -> nn.Module:
        net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        net[1].bias.requires_grad_(False)  # zeros, the same everywhere
        return net

    start = task_of(model).initial(0)
    assert "1.bias" not in start
    assert {"1.weight", "1.running_mean", "1.running_var"} <= set(start)
    assert not check(task_of(model)).problems


def test_a_frozen_body_that_every_device_draws_anew_is_refused() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8).requires_grad_(False), nn.Linear(8, 2))

    with pytest.raises(ConfigError, match=r"0\.weight is frozen .* checkpoint"):
        task_of(model).initial(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_dtype_trains_and_what_rounding_took_is_not_sent(dtype: torch.dtype) -> None:
    task = task_of(lambda: nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 2)).to(dtype))
    plain = task_of(lambda: nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 2)))
    report = check(task)
    assert not report.problems, report.problems
    start = plain.initial(0)  # a version of the federation: float32, which bfloat16 cannot hold
    idle = Plan(local_steps=1, learning_rate=0.0)
    assert all(np.array_equal(array, start[name]) for name, array in trained(task, start, idle).items())
    ours, expected = trained(task, start), trained(plain, start)
    rough = 0.03 if dtype == torch.bfloat16 else 1e-6
    for name in start:
        assert ours[name].dtype == np.float32
        np.testing.assert_allclose(ours[name], expected[name], atol=rough)
    assert max(np.abs(expected[name] - start[name]).max() for name in start) > 3 * 0.01


def test_ten_million_parameters_are_checked_trained_and_sent() -> None:
    task = task_of(lambda: nn.Sequential(nn.Linear(6, 3200), nn.ReLU(), nn.Linear(3200, 3200), nn.Linear(3200, 2)))
    report = check(task)
    assert not report.problems
    assert int(report.facts["parameters"]) > 10**7
    assert int(report.facts["update_ternary_bytes"]) < int(report.facts["parameters"]) * 1.65 / 8
    assert report.facts["parts"] == -(-int(report.facts["update_ternary_bytes"]) // (120 * 1024))


class Holding(nn.Module):
    """A linear layer, and something that a model seldom has."""

    def __init__(self, **held: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 2)
        for name, tensor in held.items():
            if isinstance(tensor, nn.Parameter):
                setattr(self, name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layer(inputs)
        return outputs


def shared() -> nn.Module:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = nn.Parameter(first.weight.data)
    return nn.Sequential(first, second)


def as_published(start: Tensors) -> None:
    to_vector(Schema.of({name: array.shape for name, array in start.items()}), start)


REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 2)), "0.weight has no shape yet"),
    (lambda: Holding(extra=nn.Parameter(torch.zeros(3, dtype=torch.complex64))), "extra is complex64"),
    (lambda: Holding(extra=torch.zeros(3).expand(3, 3)[:, :1].expand(3, 4)), "extra repeats its own memory"),
    (lambda: Holding(extra=nn.Parameter(torch.zeros(0))), "extra is empty"),
    (lambda: Holding(extra=torch.full((2,), 1e300, dtype=torch.float64)), "extra has a value that float32, .*persist"),
    (lambda: Holding(extra=torch.full((2,), torch.finfo().min)), r"'extra' has a value beyond 2\^40 .*persist"),
    (lambda: nn.Linear(6, 2).requires_grad_(False), "no trained parameter"),
    (lambda: nn.Sequential(nn.Flatten()), "no trained parameter"),
    (lambda: nn.Linear(6, 2, device="meta"), "has no values"),
    (shared, "0.weight and 1.weight share memory"),
]


@pytest.mark.parametrize(("model", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_what_cannot_travel_is_refused_by_name(model: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        as_published(task_of(model).initial(0))
    assert any(re.search(says, problem) for problem in check(task_of(model)).problems)


def test_buffers_that_do_not_count_as_model_are_left_alone() -> None:
    model = Holding(counter=torch.tensor(3), mask=torch.ones(4, dtype=torch.bool), table=torch.arange(5.0))
    model.register_buffer("scratch", torch.zeros(9), persistent=False)
    start = task_of(lambda: model).initial(0)
    assert set(start) == {"table", "layer.weight", "layer.bias"}
    assert not check(task_of(lambda: model)).problems


def with_buffer(values: Callable[[], Tensor], name: str = "mask") -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        made = nn.Linear(6, 2)
        made.register_buffer(name, values())
        return made

    return model


def causal() -> Tensor:
    return torch.triu(torch.full((4, 4), float("-inf")), 1)


def test_buffers_that_are_not_finite_stay_on_the_device_and_a_check_names_them() -> None:
    task = task_of(with_buffer(causal))
    assert set(task.initial(0)) == {"weight", "bias"}
    found = check(task)
    assert found.problems == []
    assert [note for note in found.notes if note.startswith("mask: a buffer that is not finite: stays on the device")]
    trainer = task.trainer(data=None, partition="all")
    trainer.train(task.initial(0), PLAN, version=0, seed=0)
    assert torch.equal(dict(trainer._model.named_buffers())["mask"], causal())


def quantizing() -> nn.Module:
    tools = torch.ao.quantization
    model = nn.Sequential(tools.QuantStub(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2), tools.DeQuantStub()).train()
    model.qconfig = tools.get_default_qat_qconfig("qnnpack")
    made: nn.Module = tools.prepare_qat(model)
    return made


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_is_trained_for_quantization_is_trained_in_a_federation() -> None:
    """Its observers begin with an infinite range, which each training finds anew."""
    task = task_of(quantizing)
    start = task.initial(0)
    assert not [name for name in start if name.endswith(("min_val", "max_val"))]
    assert [name for name in start if name.endswith("scale")]
    trainer = task.trainer(data=None, partition="all")
    first = trainer.train(start, PLAN, version=0, seed=0).tensors
    second = trainer.train(start, PLAN, version=0, seed=0).tensors
    assert all(np.array_equal(first[name], second[name]) for name in start)
    assert math.isfinite(task.evaluator(data=None).evaluate(first).values["loss"])


def test_a_buffer_that_is_finite_by_chance_is_refused() -> None:
    """Devices would not agree on what travels."""
    drawn = iter([torch.inf, 1.0])
    task = task_of(with_buffer(lambda: torch.full((3,), next(drawn))))
    with pytest.raises(ConfigError, match="the buffer mask is finite in one call of model"):
        task.initial(0)


def test_a_parameter_that_is_not_finite_is_named() -> None:
    def model() -> nn.Module:
        made = nn.Linear(6, 2)
        with torch.no_grad():
            made.bias.fill_(torch.nan)
        return made

    with pytest.raises(ConfigError, match=r"the model's bias is not finite as model\(\) makes it"):
        task_of(model).initial(0)


def test_statistics_are_the_buffers_and_a_variance_is_never_negative() -> None:
    found = task_of(wide_norm).tensor_kinds()
    assert sorted(found.statistics) == ["1.running_mean", "1.running_var"]
    assert sorted(found.nonnegative) == ["1.running_var"]
    averaged = task_of(with_buffer(lambda: torch.zeros(3), "center")).tensor_kinds()
    assert sorted(averaged.statistics) == ["center"]
    assert not averaged.nonnegative
