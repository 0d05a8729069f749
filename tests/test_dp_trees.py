"""DP-SGD on batches and outputs that are trees of tensors; what could let a sample do more than its part is refused."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import IterableDataset

from ternbus.broker.errors import ConfigError
from ternbus.edge import Plan, RandomSource, TorchTask
from ternbus.edge.plan.tensors import FloatArray

pytest.importorskip("opacus")

SAMPLES = 24
CLIP = 2.0
PLAN = Plan.from_meta({
    "dp": "sample", "dp_clip": CLIP, "dp_noise": 1e-9, "dp_epsilon": 1e6, "batch_size": SAMPLES, "local_steps": 1,
    "learning_rate": 1.0, "momentum": 0.0,
})  # fmt: skip
DRAW = torch.Generator().manual_seed(1)
INPUTS = torch.randn(SAMPLES, 6, generator=DRAW)
WORDS = torch.randint(0, 9, (SAMPLES, 5), generator=DRAW)
TARGETS = torch.randint(0, 3, (SAMPLES,), generator=DRAW)


class Both(nn.Module):
    """Of numbers and words; gives its outputs in some form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.embedding, self.last = form, nn.Embedding(9, 4), nn.Linear(10, 3)

    def forward(self, inputs: Any) -> Any:
        numbers, words = (inputs["numbers"], inputs["words"]) if isinstance(inputs, dict) else inputs
        hidden = torch.cat([numbers, self.embedding(words).mean(1)], 1)
        logits = self.last(hidden)
        return {
            "tensor": lambda: logits,
            "tuple": lambda: (logits, hidden),
            "dict": lambda: {"logits": logits, "name": "a"},
            "mean": lambda: {"logits": logits, "mean": logits.mean()},
            "detached": lambda: {"logits": logits, "mean": logits.detach().mean(0)},
            "nothing": logits.detach,
        }[self.form]()


def logits_of(outputs: Any) -> Tensor:
    found: Tensor = (
        outputs["logits"] if isinstance(outputs, dict) else outputs[0] if isinstance(outputs, tuple) else outputs
    )
    return found


def loss(outputs: Any, targets: Any) -> Tensor:
    return functional.cross_entropy(logits_of(outputs), targets["class"])


def task_of(form: str, first: float | None = None, as_dict: bool = True, **arguments: Any) -> TorchTask:
    def data(folder: Path | None, split: str) -> Any:
        numbers = INPUTS.clone()
        if first is not None:
            numbers[0] = first
        return {"numbers": numbers, "words": WORDS} if as_dict else (numbers, WORDS), {"class": TARGETS}

    return TorchTask(**{"name": "own", "model": lambda: Both(form), "data": data, "loss": loss, **arguments})


def change(task: TorchTask, plan: Plan = PLAN) -> FloatArray:
    start = task.initial(0)
    source = RandomSource(np.random.default_rng(3).bytes)
    trainer = task.trainer(data=None, partition="all")
    trained = trainer.train_privately(start, plan, version=0, seed=1, random_source=source)
    return np.concatenate([(trained.tensors[name] - start[name]).reshape(-1) for name in start])


def plain() -> list[FloatArray]:
    """Each sample's gradient, one at a time."""
    task = task_of("tensor")
    net = task.model()
    net.load_state_dict({name: torch.tensor(array) for name, array in task.initial(0).items()})
    found = []
    for row in range(SAMPLES):
        one = slice(row, row + 1)
        value = functional.cross_entropy(net((INPUTS[one], WORDS[one])), TARGETS[one])
        found.append(
            np.concatenate([g.numpy().reshape(-1) for g in torch.autograd.grad(value, list(net.parameters()))])
        )
    return found


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
@pytest.mark.parametrize("as_dict", [True, False])
def test_a_step_on_trees_is_the_mean_of_each_samples_clipped_gradient(form: str, as_dict: bool) -> None:
    own = plain()
    lengths = [float(np.linalg.norm(g)) for g in own]
    assert min(lengths) < CLIP < max(lengths)
    clipped = sum(g * min(1.0, CLIP / length) for g, length in zip(own, lengths, strict=True)) / SAMPLES
    np.testing.assert_allclose(change(task_of(form, as_dict=as_dict)), -clipped, atol=2e-5)


def odd(outputs: Any, targets: Any) -> Tensor:
    """A loss that a sample can stop."""
    logits = logits_of(outputs)
    if (logits.abs().sum(1) > 1e30).any() or logits.isnan().any():
        raise ValueError("a sample that no loss is known for")
    return loss(outputs, targets)


@pytest.mark.parametrize("value", [math.nan, math.inf, 3e38, 1e30])
@pytest.mark.parametrize("own_loss", [loss, odd])
@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_one_sample_moves_a_step_by_its_clip_whatever_it_holds(value: float, own_loss: Any, form: str) -> None:
    absent, there = (change(task_of(form, first, loss=own_loss)) for first in (0.0, value))
    assert np.isfinite(there).all()
    assert there.any()
    assert np.linalg.norm((there - absent).astype(float)) <= 2 * CLIP / SAMPLES * (1 + 1e-4)


class OwnStep(TorchTask):
    def train_step(self, net: nn.Module, batch: Any, plan: Plan, optimizers: Any) -> Any:
        return super().train_step(net, batch, plan, optimizers)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from zip(INPUTS, TARGETS, strict=True)


LINEAR: dict[str, Any] = {"model": lambda: nn.Linear(6, 3), "loss": functional.cross_entropy}


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (task_of("mean"), r"one of its outputs has the shape \(\) for 2 samples; let each output have a row"),
        (task_of("detached"), r"one of its outputs has the shape \(3,\) for 2 samples"),
        (task_of("nothing"), "its outputs do not depend on its parameters"),
        (task_of("tensor", loss=lambda net, batch, plan: net(batch[0]).sum()), r"its loss takes \(net, batch, plan\)"),
        (OwnStep(**vars(task_of("tensor"))), "it has a train_step of its own"),
        (
            task_of("tensor", data=lambda f, s: [*zip(INPUTS, TARGETS, strict=True)], **LINEAR),
            "must be tensors or arrays",
        ),
        (task_of("tensor", data=lambda f, s: Stream(), **LINEAR), "must be tensors or arrays"),
    ],
)
def test_what_could_make_a_sample_count_more_is_refused(task: TorchTask, said: str) -> None:
    with pytest.raises(ConfigError, match=rf'dp = "sample" cannot train .*{said}'):
        change(task)


def test_each_sample_is_augmented_under_privacy_too() -> None:
    class Shifted(TorchTask):
        def augment(self, inputs: Any) -> Any:
            assert inputs["words"].shape == (5,)
            return {**inputs, "numbers": inputs["numbers"] + torch.randn(6)}

    arguments = vars(task_of("tensor"))
    assert not np.allclose(change(Shifted(**arguments)), change(TorchTask(**arguments)), atol=1e-4)
    assert np.array_equal(change(Shifted(**arguments)), change(Shifted(**arguments)))
