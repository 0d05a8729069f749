"""A task in plain numpy from a classifier in scikit-learn's style, for devices without torch.

    python examples/numpy_task.py
    ternbus lab run --task examples/numpy_task.py:TASK

Softmax regression on the digits that ship with Ternbus. The classifier is independent of Ternbus: `DigitsTrainer` sets
its coefficients to those of the version, fits it, and returns the new ones. Any estimator with `warm_start` and a few
arrays can be wrapped in the same way.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from ternbus.edge import Evaluation, FloatArray, Plan, Tensors, Trained, select
from ternbus.edge.tasks.digits_data import CLASSES, PIXELS, load

Labels = npt.NDArray[np.int64]


class SoftmaxRegression:
    """Multinomial logistic regression by gradient descent on all samples; `fit` continues from the coefficients."""

    def __init__(
        self, features: int, classes: int, *, steps: int = 100, learning_rate: float = 0.5, alpha: float = 1e-4
    ) -> None:
        self.coef_: FloatArray = np.zeros((classes, features), np.float32)
        self.intercept_: FloatArray = np.zeros(classes, np.float32)
        self.steps, self.learning_rate, self.alpha = steps, learning_rate, alpha

    def fit(self, inputs: FloatArray, labels: Labels) -> Self:
        wanted = np.eye(len(self.intercept_), dtype=np.float32)[labels]
        for _ in range(self.steps):
            errors = (self.predict_proba(inputs) - wanted) / len(labels)
            self.coef_ -= self.learning_rate * (errors.T @ inputs + self.alpha * self.coef_)
            self.intercept_ -= self.learning_rate * errors.sum(0)
        return self

    def predict_proba(self, inputs: FloatArray) -> FloatArray:
        outputs: FloatArray = inputs @ self.coef_.T + self.intercept_
        powers: FloatArray = np.exp(outputs - outputs.max(1, keepdims=True))
        powers /= powers.sum(1, keepdims=True)
        return powers

    def predict(self, inputs: FloatArray) -> Labels:
        classes: Labels = self.predict_proba(inputs).argmax(1)
        return classes

    def loss(self, inputs: FloatArray, labels: Labels) -> float:
        return float(-np.log(self.predict_proba(inputs)[np.arange(len(labels)), labels] + 1e-12).mean())

    def score(self, inputs: FloatArray, labels: Labels) -> float:
        return float((self.predict(inputs) == labels).mean())


class DigitsTrainer:
    """The classifier with one device's digits."""

    def __init__(self, inputs: FloatArray, labels: Labels) -> None:
        self.inputs, self.labels = inputs, labels
        self.classifier = SoftmaxRegression(PIXELS, CLASSES)

    @property
    def samples(self) -> int:
        return len(self.labels)

    def train(self, start: Tensors, plan: Plan, *, version: int, seed: int) -> Trained:  # noqa: ARG002 - nothing is random
        began = time.perf_counter()
        self._set(start)
        self.classifier.learning_rate = plan.learning_rate
        self.classifier.steps = plan.steps(self.samples)
        self.classifier.fit(self.inputs, self.labels)
        tensors = {"coef": self.classifier.coef_.copy(), "intercept": self.classifier.intercept_.copy()}
        metrics = {**self._measures(), "seconds": time.perf_counter() - began}
        return Trained(tensors=tensors, samples=self.samples, metrics=metrics)

    def evaluate(self, tensors: Tensors) -> Evaluation:
        self._set(tensors)
        return Evaluation(samples=self.samples, values=self._measures())

    def _set(self, tensors: Tensors) -> None:
        self.classifier.coef_ = np.array(tensors["coef"])  # copies: `tensors` must not be modified
        self.classifier.intercept_ = np.array(tensors["intercept"])

    def _measures(self) -> dict[str, float]:
        score, loss = self.classifier.score(self.inputs, self.labels), self.classifier.loss(self.inputs, self.labels)
        return {"accuracy": score, "loss": loss}


@dataclass(frozen=True, kw_only=True)
class DigitsTask:
    """The task that `--task` selects."""

    name: str = "digits-softmax"
    default_plan: Mapping[str, object] = field(default_factory=lambda: {"local_steps": 20, "learning_rate": 0.5})

    def initial(self, seed: int) -> dict[str, FloatArray]:  # noqa: ARG002 - starts at zero; the loss is convex
        fresh = SoftmaxRegression(PIXELS, CLASSES)
        return {"coef": fresh.coef_, "intercept": fresh.intercept_}

    def trainer(self, *, data: Path | None, partition: str) -> DigitsTrainer:  # noqa: ARG002 - in the package
        inputs, labels = load("train")
        chosen = select(partition, labels)
        return DigitsTrainer(inputs[chosen], labels[chosen])

    def evaluator(self, *, data: Path | None) -> DigitsTrainer:  # noqa: ARG002 - likewise
        return DigitsTrainer(*load("test"))


TASK = DigitsTask()

if __name__ == "__main__":
    print(f"accuracy {SoftmaxRegression(PIXELS, CLASSES).fit(*load('train')).score(*load('test')):.3f}")
