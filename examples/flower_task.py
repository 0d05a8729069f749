"""A client that was written for Flower, as a task.

    ternbus lab run --task examples/flower_task.py:TASK

`DigitsClient`, `client_fn` and `evaluate` stand here as in an app of Flower; there `DigitsClient` is a
`flwr.client.NumPyClient`, and `Context` is imported from `flwr.common`. What is new is `TASK`.
"""

import numpy as np
import numpy.typing as npt

from ternbus.edge.adapters import Context, FlowerTask
from ternbus.edge.tasks.digits_data import CLASSES, PIXELS, load

Arrays = list[npt.NDArray[np.float32]]
Config = dict[str, bool | bytes | float | int | str]


class DigitsClient:
    """Softmax regression on a part of the digits; a tenth of the part is for validation."""

    def __init__(self, partition: int, partitions: int) -> None:
        images, labels = load("train")
        images, labels = images[partition::partitions], labels[partition::partitions]
        self.validation = images[::10], labels[::10]
        self.train = np.delete(images, np.s_[::10], 0), np.delete(labels, np.s_[::10])
        self.weights: Arrays = [np.zeros((PIXELS, CLASSES), np.float32), np.zeros(CLASSES, np.float32)]

    def get_parameters(self, config: Config) -> Arrays:  # noqa: ARG002 - Flower's signature
        return self.weights

    def fit(self, parameters: Arrays, config: Config) -> tuple[Arrays, int, Config]:
        self.weights = parameters
        images, labels = self.train
        random = np.random.default_rng(int(config["server_round"]))
        for _ in range(int(config["local_epochs"])):
            for rows in np.array_split(random.permutation(len(labels)), len(labels) // int(config["batch_size"])):
                errors = (_softmax(self.weights, images[rows]) - np.eye(CLASSES)[labels[rows]]) / len(rows)
                self.weights[0] -= float(config["lr"]) * images[rows].T @ errors
                self.weights[1] -= float(config["lr"]) * errors.sum(0)
        return self.weights, len(labels), {}

    def evaluate(self, parameters: Arrays, config: Config) -> tuple[float, int, Config]:  # noqa: ARG002 - Flower's
        loss, accuracy = _measures(parameters, *self.validation)
        return loss, len(self.validation[1]), {"accuracy": accuracy}


def client_fn(context: Context) -> DigitsClient:
    return DigitsClient(int(context.node_config["partition-id"]), int(context.node_config["num-partitions"]))


def evaluate(server_round: int, parameters: Arrays, config: Config) -> tuple[float, Config]:  # noqa: ARG001 - Flower's
    """The strategy's `evaluate_fn`, on test data."""
    images, labels = load("test")
    loss, accuracy = _measures(parameters, images, labels)
    return loss, {"accuracy": accuracy, "num_examples": len(labels)}


def _softmax(weights: Arrays, images: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    outputs = images @ weights[0] + weights[1]
    powers: npt.NDArray[np.float32] = np.exp(outputs - outputs.max(1, keepdims=True))
    powers /= powers.sum(1, keepdims=True)
    return powers


def _measures(weights: Arrays, images: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> tuple[float, float]:
    shares = _softmax(weights, images)
    loss = -np.log(shares[np.arange(len(labels)), labels] + 1e-12).mean()
    return float(loss), float((shares.argmax(1) == labels).mean())


TASK = FlowerTask(
    name="digits-flower",
    client_fn=client_fn,
    evaluate_fn=evaluate,
    default_plan={"local_epochs": 2, "batch_size": 16, "learning_rate": 0.2},
)
