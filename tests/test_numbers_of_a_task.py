"""What the code of a task reports: numbers of numpy are taken, what is no number is refused with the task's line."""

import numpy as np
import pytest

from ternbus.edge import Evaluation, Trained

TENSORS = {"w": np.zeros(2, np.float32)}


def test_numbers_of_numpy_become_those_of_python() -> None:
    trained = Trained(tensors=TENSORS, samples=np.int64(3), metrics={"loss": np.float32(0.5)})  # type: ignore[arg-type, dict-item]
    assert (type(trained.samples), type(trained.metrics["loss"])) == (int, float)
    assert type(Evaluation(samples=np.int64(3), values={}).samples) is int  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["low", None, [0.5, 0.25], 10**400, np.zeros(2)])
def test_a_metric_is_one_number(value: object) -> None:
    with pytest.raises(TypeError, match=r"the metric 'loss' is of the type .*: it must be one number"):
        Trained(tensors=TENSORS, samples=3, metrics={"loss": value})  # type: ignore[dict-item]


def test_samples_are_whole() -> None:
    with pytest.raises(TypeError, match=r"samples is 2\.5, of the type float: it must be a whole number"):
        Trained(tensors=TENSORS, samples=2.5, metrics={})  # type: ignore[arg-type]
