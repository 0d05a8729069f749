"""Quantization-aware training: its observers stay on the device, also those that have a scale for each channel."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization

from support.simulated import simulated
from ternbus.edge.plan.plan import Plan
from ternbus.edge.shell.preflight import check
from ternbus.edge.torch.torch_task import TorchTask

PLAN = Plan(local_steps=20, batch_size=16, learning_rate=0.1)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


def data(folder: Path | None, split: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(split))
    inputs = torch.randn(120, 8, generator=generator)
    return inputs, (inputs[:, 0] > 0).long()


def quantized(engine: str) -> nn.Module:
    net = nn.Sequential(
        quantization.QuantStub(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2), quantization.DeQuantStub()
    ).train()
    net.qconfig = quantization.get_default_qat_qconfig(engine)
    prepared: nn.Module = quantization.prepare_qat(net)
    return prepared


def task_of(engine: str) -> TorchTask:
    plan = {"local_steps": 20, "batch_size": 16, "learning_rate": 0.1}
    return TorchTask(name="quantized", model=lambda: quantized(engine), data=data, default_plan=plan)


@pytest.mark.parametrize("engine", ["fbgemm", "qnnpack"])
def test_each_training_begins_with_new_observers(engine: str) -> None:
    task = task_of(engine)
    assert not check(task).problems
    start = task.initial(0)
    assert not [name for name in start if "min_val" in name]
    trainer = task.trainer(data=None, partition="all")
    first = trainer.train(start, PLAN, version=0, seed=0).tensors
    trainer.evaluate(first)
    again = trainer.train(start, PLAN, version=0, seed=0).tensors
    assert all(np.array_equal(first[name], again[name]) for name in start)


def test_scales_of_each_channel_stay_and_the_check_names_them() -> None:
    notes = [note for note in check(task_of("fbgemm")).notes if "training gives its size" in note]
    assert [note.partition(" and ")[0] for note in notes] == ["1.weight_fake_quant.scale"]
    assert "1.weight_fake_quant.scale" not in task_of("fbgemm").initial(0)
    assert "1.weight_fake_quant.scale" in task_of("qnnpack").initial(0)


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="PyTorch has it for x86 only")
def test_a_federation_s_model_can_be_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/tasks.md says: after a batch, since the observers did not travel."""
    task = task_of("fbgemm")
    found = simulated(task, devices=3, versions=20)
    assert found.evaluation.values["accuracy"] > 0.85
    net = quantized("fbgemm")
    net.load_state_dict({name: torch.tensor(array) for name, array in found.tensors.items()}, strict=False)
    inputs, targets = data(None, "test")
    net(inputs)
    monkeypatch.setattr(torch.backends.quantized, "engine", "fbgemm")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        converted = quantization.convert(net.eval())
    assert float((converted(inputs).argmax(1) == targets).float().mean()) > 0.85


def test_an_empty_buffer_of_a_model_does_not_keep_others_at_home() -> None:
    class Holding(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 2)
            self.register_buffer("queue", torch.zeros(0, 8))
            self.register_buffer("scale", torch.ones(1))

    task = TorchTask(name="own", model=Holding, data=data)
    assert list(task.initial(0)) == ["weight", "bias", "scale"]
    assert not check(task).problems
