"""What the code of a task reports: numbers of numpy are taken, what is no number is refused with the task's line."""

from typing import Any

import numpy as np
import pytest

from ternbus.edge import Evaluation, Trained

TENSORS = {"w": np.zeros(2, np.float32)}
THREE: Any = np.int64(3)
HALF: Any = np.float32(0.5)


def test_numbers_of_numpy_become_those_of_python() -> None:
    trained = Trained(tensors=TENSORS, samples=THREE, metrics={"loss": HALF})
    assert (type(trained.samples), type(trained.metrics["loss"])) == (int, float)
    assert type(Evaluation(samples=THREE, values={}).samples) is int


@pytest.mark.parametrize("value", ["low", None, [0.5, 0.25], 10**400, np.zeros(2)])
def test_a_metric_is_one_number(value: Any) -> None:
    with pytest.raises(TypeError, match=r"the metric 'loss' is of the type .*: it must be one number"):
        Trained(tensors=TENSORS, samples=3, metrics={"loss": value})


def test_samples_are_whole() -> None:
    some: Any = 2.5
    with pytest.raises(TypeError, match=r"samples is 2\.5, of the type float: it must be a whole number"):
        Trained(tensors=TENSORS, samples=some, metrics={})
