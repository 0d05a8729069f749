"""The result of a training: no tensor of it may have a NaN or an infinity, whatever its type and layout are."""

import numpy as np
import pytest

from ternbus.edge.learn.task import Trained, TrainingError
from ternbus.edge.plan.tensors import FloatArray

LAYOUTS: dict[str, FloatArray] = {
    "rows": np.ones((3, 5), np.float32),
    "columns": np.ones((3, 5), np.float32).T,
    "every other": np.ones(9, np.float32)[::2],
    "one number": np.ones((), np.float32),
    "float16": np.ones((3, 5), np.float16),
    "float64": np.ones((3, 5), np.float64),
}


def trained(tensor: FloatArray) -> Trained:
    return Trained(tensors={"w": tensor}, samples=1, metrics={})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_pass_however_large(layout: str) -> None:
    tensor = LAYOUTS[layout]
    assert trained(tensor).tensors["w"] is tensor
    trained(np.full_like(tensor, np.finfo(tensor.dtype).max))
    trained(np.full_like(tensor, np.finfo(tensor.dtype).min))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_that_is_no_number_does_not(layout: str, wrong: float) -> None:
    tensor = LAYOUTS[layout].copy(order="K")
    tensor.flat[-1] = wrong
    with pytest.raises(TrainingError, match=r"training diverged \(w is not finite\)"):
        trained(tensor)


def test_no_numbers_pass() -> None:
    trained(np.zeros((0, 4), np.float32))
