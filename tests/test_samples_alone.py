"""A model for DP-SGD in which samples change each other's gradients is found without any data, and refused in words."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from ternbus.broker.errors import ConfigError
from ternbus.edge.learn.noise import RandomSource
from ternbus.edge.plan.plan import Plan
from ternbus.edge.torch.trainer import TorchTask

pytest.importorskip("opacus")

SAMPLES, FEATURES, WORDS = 12, 6, 9
PLAN: dict[str, object] = {
    "dp": "sample", "dp_clip": 1.0, "dp_noise": 1.0, "dp_epsilon": 1e6, "batch_size": 4, "local_steps": 2,
}  # fmt: skip
Step = Callable[[Tensor], Tensor]
LEGACY: Any = np.random  # the global source of numbers, which the code of a task may use


def same(values: Tensor) -> Tensor:
    return values


class Model(nn.Module):
    """Two layers; what is done to inputs, to hidden values and to outputs is a test's."""

    def __init__(
        self, before: Step = same, between: Step = same, after: Step = same, last: float | None = None
    ) -> None:
        super().__init__()
        self.before, self.between, self.after = before, between, after
        self.first, self.second = nn.Linear(FEATURES, 8), nn.Linear(8, 3)
        if last is not None:
            nn.init.constant_(self.second.weight, last)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.between(self.first(self.before(inputs)).relu())
        outputs: Tensor = self.after(self.second(hidden))
        return outputs


class Words(nn.Module):
    def __init__(self, before: Step = same, between: Step = same) -> None:
        super().__init__()
        self.before, self.between = before, between
        self.table, self.last = nn.Embedding(WORDS, 8), nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(self.between(self.table(self.before(inputs)).mean(1)))
        return outputs


def numbers(folder: Path | None, split: str) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(SAMPLES, FEATURES, generator=draw), torch.randint(0, 3, (SAMPLES,), generator=draw)


def words(folder: Path | None, split: str) -> tuple[Tensor, Tensor]:
    _, targets = numbers(folder, split)
    return torch.arange(SAMPLES * FEATURES).reshape(SAMPLES, FEATURES) % WORDS, targets


def trained(model: Callable[[], nn.Module], **task: Any) -> None:
    made = TorchTask(name="own", model=model, **{"data": numbers, **task})
    trainer = made.trainer(data=None, partition="all")
    source = RandomSource(np.random.default_rng(3).bytes)
    result = trainer.train_privately(made.initial(0), Plan.from_meta(PLAN), version=0, seed=1, random_source=source)
    assert result.metrics["steps"] == 2


def centred(values: Tensor) -> Tensor:
    return values - values.mean(0)


def centred_unseen_by_gradients(values: Tensor) -> Tensor:
    return values - values.detach().mean(0)


def by_the_first(values: Tensor) -> Tensor:
    return values - values[0]


def by_the_neighbour(values: Tensor) -> Tensor:
    return values * values.roll(1, 0)


def by_the_largest(values: Tensor) -> Tensor:
    return values / values.abs().max()


def normalized(values: Tensor) -> Tensor:
    """Batch norm as a function, which is no layer that could be recognised."""
    return functional.batch_norm(values, None, None, training=True)


def attending(values: Tensor) -> Tensor:
    """To the other samples, where the sequence should be."""
    return torch.softmax(values @ values.T, 1) @ values


MIXING = [centred, centred_unseen_by_gradients, by_the_first, by_the_neighbour, by_the_largest, normalized, attending]


@pytest.mark.parametrize("place", ["before", "between", "after"])
@pytest.mark.parametrize("step", MIXING)
def test_a_model_in_which_samples_mix_is_refused(step: Step, place: str) -> None:
    steps: dict[str, Any] = {place: step}
    with pytest.raises(ConfigError, match="of one sample depend on the other samples of its batch") as refusal:
        trained(lambda: Model(**steps))
    assert "treat each sample alone" in str(refusal.value)


@pytest.mark.parametrize("step", MIXING)
def test_weights_of_the_aggregator_hide_no_mixing(step: Step) -> None:
    """With those of 0 in the last layer the outputs do not depend on the inputs at all."""
    with pytest.raises(ConfigError, match="of one sample depend on the other samples"):
        trained(lambda: Model(between=step, last=0.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_mixing_is_found_in_other_precisions(dtype: torch.dtype) -> None:
    trained(lambda: Model().to(dtype))
    with pytest.raises(ConfigError, match="of one sample depend on the other samples"):
        trained(lambda: Model(between=centred).to(dtype))


def shuffled_words(values: Tensor) -> Tensor:
    """Of no gradient: the numbers of words, before they are looked up."""
    return (values + values.roll(1, 0)) % WORDS


@pytest.mark.parametrize("steps", [{"between": centred}, {"before": shuffled_words}])
def test_mixing_is_found_where_inputs_are_integers(steps: dict[str, Step]) -> None:
    trained(Words, data=words)
    with pytest.raises(ConfigError, match="of one sample depend on the other samples"):
        trained(lambda: Words(**steps), data=words)


def contrastive(outputs: Tensor, targets: Tensor) -> Tensor:
    likeness = functional.normalize(outputs) @ functional.normalize(outputs).T
    return functional.cross_entropy(likeness, torch.arange(len(outputs)))


def mixup(inputs: Tensor) -> Tensor:
    return 0.7 * inputs + 0.3 * inputs[torch.from_numpy(np.roll(np.arange(len(inputs)), LEGACY.randint(1, 3)))]


@pytest.mark.parametrize("task", [{"loss": contrastive}, {"augment": mixup}])
def test_mixing_is_found_in_loss_and_augmentation(task: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="of one sample depend on the other samples"):
        trained(Model, **task)


# -- what must not be refused


class Noisy(nn.Module):
    """Draws from a source of its own, which nobody can set back."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.source = nn.Linear(FEATURES, 3), np.random.default_rng()

    def forward(self, inputs: Tensor) -> Tensor:
        noise = torch.from_numpy(self.source.normal(size=tuple(inputs.shape)).astype(np.float32))
        outputs: Tensor = self.linear(inputs + noise)
        return outputs


def within_one(values: Tensor) -> Tensor:
    if ((values < 0) | (values > 1)).any():
        raise ValueError("values are from 0 to 1")
    return values


def flipped(inputs: Tensor) -> Tensor:
    return inputs.flip(1) if random.random() < 0.5 else inputs


def jittered(inputs: Tensor) -> Tensor:
    return inputs + torch.from_numpy(LEGACY.normal(size=tuple(inputs.shape)).astype(np.float32))


IMAGE = nn.Unflatten(1, (2, FEATURES // 2))
ALONE: dict[str, Callable[[], nn.Module]] = {
    "layer norm": lambda: nn.Sequential(nn.LayerNorm(FEATURES), nn.Linear(FEATURES, 3)),
    "group norm": lambda: nn.Sequential(IMAGE, nn.Conv1d(2, 4, 2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(8, 3)),
    "instance norm": lambda: nn.Sequential(
        IMAGE, nn.Conv1d(2, 4, 2), nn.InstanceNorm1d(4, affine=True), nn.Flatten(), nn.Linear(8, 3)
    ),
    "dropout": lambda: nn.Sequential(nn.Linear(FEATURES, 8), nn.Dropout(), nn.Linear(8, 3)),
    "softmax": lambda: Model(between=lambda values: values.softmax(1)),
    "statistics of a sample": lambda: Model(before=lambda values: values - values.mean(1, keepdim=True)),
    "noise of its own": Noisy,
    "logarithms of inputs": lambda: Model(before=lambda values: values.abs().log()),
    "roots of negative numbers": lambda: Model(before=lambda values: (-1 - values.abs()).sqrt().nan_to_num()),
    "outputs of one dimension": lambda: nn.Sequential(nn.Linear(FEATURES, 1), nn.Flatten(0)),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_model_that_treats_each_sample_alone_is_trained(name: str) -> None:
    one = name == "outputs of one dimension"
    trained(ALONE[name], **({"loss": lambda outputs, targets: (outputs - targets).square().mean()} if one else {}))


def bounded(folder: Path | None, split: str) -> tuple[Tensor, Tensor]:
    inputs, targets = numbers(folder, split)
    return inputs.sigmoid(), targets


def test_a_model_that_takes_only_some_inputs_is_trained_and_checked() -> None:
    trained(lambda: Model(before=within_one), data=bounded)
    with pytest.raises(ConfigError, match="of one sample depend on the other samples"):
        trained(lambda: Model(before=within_one, between=centred), data=bounded)


@pytest.mark.parametrize("augment", [flipped, jittered, functional.dropout])
def test_augmentation_by_chance_is_no_mixing(augment: Step) -> None:
    trained(Model, augment=augment)


def test_the_check_leaves_all_random_numbers_as_they_were() -> None:
    """Of the task's own code; those of training are the device's secret."""
    random.seed(5)
    LEGACY.seed(5)
    wanted = random.random(), LEGACY.random()
    random.seed(5)
    LEGACY.seed(5)
    trained(Model)
    assert (random.random(), LEGACY.random()) == wanted


# -- a loss that divides by what the whole batch has


def gradient_of_the_first(loss: Callable[..., Any] | None, second: int) -> Tensor:
    """What the first of two samples adds to a step, beside a second one with this target, which has no gradient."""
    inputs, targets = torch.zeros(2, FEATURES), torch.tensor([1, second])
    inputs[0] = torch.arange(FEATURES)  # so that only the first moves the weights
    made = TorchTask(
        name="own",
        model=lambda: nn.Linear(FEATURES, 3),
        data=lambda folder, split: (inputs, targets),
        loss=loss,
    )
    plan = Plan.from_meta({
        **PLAN, "batch_size": 2, "local_steps": 1, "dp_clip": 1e3, "dp_noise": 1e-12, "momentum": 0.0,
    })  # fmt: skip
    trainer, start = made.trainer(data=None, partition="all"), made.initial(0)
    source = RandomSource(np.random.default_rng(3).bytes)
    after = trainer.train_privately(start, plan, version=0, seed=1, random_source=source)
    return torch.from_numpy(after.tensors["weight"] - start["weight"])


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, weight=torch.tensor([1.0, 1.0, 1000.0]))


def with_a_decision(outputs: Tensor, targets: Tensor) -> Tensor:
    """By values, so that all samples cannot be computed at once."""
    if (targets >= 0).any():
        return weighted(outputs, targets)
    return outputs.sum() * 0


IGNORED = -100  # the target for which cross entropy computes no loss


@pytest.mark.parametrize(
    ("loss", "second"),
    [(None, IGNORED), (functional.cross_entropy, IGNORED), (weighted, 2), (with_a_decision, 2), (weighted, IGNORED)],
)
def test_no_target_of_a_sample_scales_the_gradients_of_others(loss: Callable[..., Any] | None, second: int) -> None:
    """Of two samples, one without a loss doubled the other's part, by the mean over those that have one."""
    assert gradient_of_the_first(loss, second).any()
    torch.testing.assert_close(gradient_of_the_first(loss, second), gradient_of_the_first(loss, 0))
