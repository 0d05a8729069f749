"""The digits in plain numpy, without PyTorch: a multilayer perceptron, for devices with little memory; a linear model.

They are also an example of a trainer without a framework.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ternbus.edge.learn import local_optimizer
from ternbus.edge.learn.class_counts import counted
from ternbus.edge.learn.partition import select
from ternbus.edge.learn.subnetwork import channels
from ternbus.edge.learn.task import Evaluation, Trained
from ternbus.edge.plan.plan import Plan
from ternbus.edge.plan.tensors import FloatArray, Tensors
from ternbus.edge.tasks import digits_data

Labels = npt.NDArray[np.int64]

HIDDEN = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitsNumpy:
    """64 pixels → hidden units with ReLU → 10 classes, softmax cross-entropy."""

    name: str = "digits-numpy"
    hidden: int = HIDDEN
    default_plan: Mapping[str, object] = field(
        default_factory=lambda: {"local_epochs": 6, "batch_size": 16, "learning_rate": 0.15, "momentum": 0.9}
    )

    def initial(self, seed: int) -> dict[str, FloatArray]:
        """He et al. 2015: weights of variance 2 / inputs, biases 0."""
        rng = np.random.default_rng(seed)
        return {
            "hidden.weight": _weights(rng, digits_data.PIXELS, self.hidden),
            "hidden.bias": np.zeros(self.hidden, np.float32),
            "output.weight": _weights(rng, self.hidden, digits_data.CLASSES),
            "output.bias": np.zeros(digits_data.CLASSES, np.float32),
        }

    def narrowed(self, width: float) -> "DigitsNumpy":
        return replace(self, hidden=channels(self.hidden, width))

    def trainer(self, *, data: Path | None, partition: str) -> "NumpyTrainer":  # noqa: ARG002 - it is in the package
        images, labels = digits_data.load("train")
        chosen = select(partition, labels)
        return NumpyTrainer(images[chosen], labels[chosen])

    def evaluator(self, *, data: Path | None) -> "NumpyTrainer":  # noqa: ARG002 - likewise
        return NumpyTrainer(*digits_data.load("test"))


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitsLinear:
    """64 pixels → 10 classes, softmax cross-entropy: 650 parameters, few enough for much noise (docs/privacy.md)."""

    name: str = "digits-linear"
    default_plan: Mapping[str, object] = field(
        default_factory=lambda: {"local_epochs": 6, "batch_size": 16, "learning_rate": 0.15, "momentum": 0.9}
    )

    def initial(self, seed: int) -> dict[str, FloatArray]:  # noqa: ARG002 - without hidden units nothing is drawn
        """Zeros."""
        pixels, classes = digits_data.PIXELS, digits_data.CLASSES
        return {
            "output.weight": np.zeros((classes, pixels), np.float32),
            "output.bias": np.zeros(classes, np.float32),
        }

    def trainer(self, *, data: Path | None, partition: str) -> "NumpyTrainer":
        return TASK.trainer(data=data, partition=partition)

    def evaluator(self, *, data: Path | None) -> "NumpyTrainer":
        return TASK.evaluator(data=data)


class NumpyTrainer:
    """One device's share of the digits."""

    def __init__(self, images: FloatArray, labels: Labels) -> None:
        self._images = images
        self._labels = labels

    @property
    def samples(self) -> int:
        return len(self._labels)

    @property
    def class_counts(self) -> dict[str, int]:
        return counted(self._labels)

    def measured_inputs(self) -> Iterator[FloatArray]:
        yield self._images

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:
        began = time.perf_counter()
        weights = {name: np.array(tensor) for name, tensor in start.items()}
        optimizer = local_optimizer.begin(plan, list(weights.values()))
        batches = plan.batches(self.samples, np.random.default_rng(seed), time.perf_counter)
        losses, hits, seen, steps = 0.0, 0.0, 0, 0
        with np.errstate(over="ignore", invalid="ignore"):  # `Trained` refuses what diverges
            for chosen, rate in zip(batches, plan.rates(version, self.samples), strict=False):
                loss, hit, gradients = _backward(weights, self._images[chosen], self._labels[chosen])
                optimizer.step([gradients[name] for name in weights], rate)
                losses, hits, seen, steps = losses + loss, hits + hit, seen + len(chosen), steps + 1
        seconds = time.perf_counter() - began
        metrics = {"loss": losses / seen, "accuracy": hits / seen, "seconds": seconds, "steps": steps}
        return Trained(tensors=weights, samples=self.samples, metrics=metrics)

    def evaluate(self, tensors: Tensors) -> Evaluation:
        _, outputs = _forward(tensors, self._images)
        loss, hits, _ = _cross_entropy(outputs, self._labels)
        return Evaluation(samples=self.samples, values={"accuracy": hits / self.samples, "loss": loss / self.samples})


def _weights(rng: np.random.Generator, inputs: int, outputs: int) -> FloatArray:
    return rng.normal(0, np.sqrt(2 / inputs), (outputs, inputs)).astype(np.float32)


def _forward(weights: Tensors, images: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The output layer's inputs, which are the hidden units' values if there are some; the outputs before softmax."""
    if "hidden.weight" not in weights:
        return images, images @ weights["output.weight"].T + weights["output.bias"]
    hidden = np.maximum(images @ weights["hidden.weight"].T + weights["hidden.bias"], 0)
    return hidden, hidden @ weights["output.weight"].T + weights["output.bias"]


def _cross_entropy(outputs: FloatArray, labels: Labels) -> tuple[float, float, FloatArray]:
    """The loss and the hits, summed over the samples; and the gradient of the loss by the outputs, a row per sample."""
    rows = np.arange(len(labels))
    powers = np.exp(outputs - outputs.max(1, keepdims=True))
    shares = powers / powers.sum(1, keepdims=True)
    loss = -float(np.log(np.maximum(shares[rows, labels], np.finfo(np.float32).tiny)).sum())
    hits = float((outputs.argmax(1) == labels).sum())
    shares[rows, labels] -= 1
    return loss, hits, shares


def _backward(weights: Tensors, images: FloatArray, labels: Labels) -> tuple[float, float, dict[str, FloatArray]]:
    """The loss and the hits, summed over the batch; and the gradients of the batch's mean loss."""
    hidden, outputs = _forward(weights, images)
    loss, hits, errors = _cross_entropy(outputs, labels)
    errors /= len(labels)
    gradients = {"output.weight": errors.T @ hidden, "output.bias": errors.sum(0)}
    if "hidden.weight" in weights:
        behind = (errors @ weights["output.weight"]) * (hidden > 0)
        gradients |= {"hidden.weight": behind.T @ images, "hidden.bias": behind.sum(0)}
    return loss, hits, gradients


TASK = DigitsNumpy()
LINEAR_TASK = DigitsLinear()
