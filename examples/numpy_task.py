"""A classifier in scikit-learn's style, plain numpy, and the same as a task: no torch on the device.

    python examples/numpy_task.py
    ternbus lab run --task examples.numpy_task:TASK

Softmax regression on the digits that ship with Ternbus. The classifier knows nothing of federations: `DigitsTask` sets
its coefficients to those of the version, lets it fit, and hands them back. Any estimator with `warm_start`
and a few arrays can be wrapped in the same way.
"""

import time
from dataclasses import dataclass, field

import numpy as np

from ternbus.edge import Evaluation, Trained, select
from ternbus.edge.tasks.digits_data import CLASSES, PIXELS, load


class SoftmaxRegression:
    """Multinomial logistic regression by gradient descent on all samples; `fit` goes on from where it is."""

    def __init__(self, features, classes, *, steps=100, learning_rate=0.5, alpha=1e-4):
        self.coef_ = np.zeros((classes, features), np.float32)
        self.intercept_ = np.zeros(classes, np.float32)
        self.steps, self.learning_rate, self.alpha = steps, learning_rate, alpha

    def fit(self, inputs, labels):
        wanted = np.eye(len(self.intercept_), dtype=np.float32)[labels]
        for _ in range(self.steps):
            errors = (self.predict_proba(inputs) - wanted) / len(labels)
            self.coef_ -= self.learning_rate * (errors.T @ inputs + self.alpha * self.coef_)
            self.intercept_ -= self.learning_rate * errors.sum(0)
        return self

    def predict_proba(self, inputs):
        outputs = inputs @ self.coef_.T + self.intercept_
        powers = np.exp(outputs - outputs.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    def predict(self, inputs):
        return self.predict_proba(inputs).argmax(1)

    def loss(self, inputs, labels):
        return float(-np.log(self.predict_proba(inputs)[np.arange(len(labels)), labels] + 1e-12).mean())

    def score(self, inputs, labels):
        return float((self.predict(inputs) == labels).mean())


class DigitsTrainer:
    """The classifier with one device's digits."""

    def __init__(self, inputs, labels):
        self.inputs, self.labels = inputs, labels
        self.classifier = SoftmaxRegression(PIXELS, CLASSES)

    @property
    def samples(self):
        return len(self.labels)

    def train(self, start, plan, *, version, seed):  # noqa: ARG002  # nothing here is drawn
        began = time.perf_counter()
        self._set(start)
        self.classifier.learning_rate = plan.learning_rate
        self.classifier.steps = plan.steps(self.samples)
        self.classifier.fit(self.inputs, self.labels)
        tensors = {"coef": self.classifier.coef_.copy(), "intercept": self.classifier.intercept_.copy()}
        metrics = {**self._measures(), "seconds": time.perf_counter() - began}
        return Trained(tensors=tensors, samples=self.samples, metrics=metrics)

    def evaluate(self, tensors):
        self._set(tensors)
        return Evaluation(samples=self.samples, values=self._measures())

    def _set(self, tensors):
        self.classifier.coef_ = np.array(tensors["coef"])  # copies: what we are given must stay as it is
        self.classifier.intercept_ = np.array(tensors["intercept"])

    def _measures(self):
        score, loss = self.classifier.score(self.inputs, self.labels), self.classifier.loss(self.inputs, self.labels)
        return {"accuracy": score, "loss": loss}


@dataclass(frozen=True, kw_only=True)
class DigitsTask:
    """What `--task` names."""

    name: str = "digits-softmax"
    default_plan: dict = field(default_factory=lambda: {"local_steps": 20, "learning_rate": 0.5})

    def initial(self, seed):  # noqa: ARG002  # it starts at zero, and its loss is convex
        fresh = SoftmaxRegression(PIXELS, CLASSES)
        return {"coef": fresh.coef_, "intercept": fresh.intercept_}

    def trainer(self, *, data, partition):  # noqa: ARG002  # they ship with Ternbus
        inputs, labels = load("train")
        chosen = select(partition, labels)
        return DigitsTrainer(inputs[chosen], labels[chosen])

    def evaluator(self, *, data):  # noqa: ARG002  # likewise
        return DigitsTrainer(*load("test"))


TASK = DigitsTask()

if __name__ == "__main__":
    print(f"accuracy {SoftmaxRegression(PIXELS, CLASSES).fit(*load('train')).score(*load('test')):.3f}")
