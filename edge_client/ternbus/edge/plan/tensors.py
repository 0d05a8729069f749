"""The types of a model's tensors: numpy arrays by name, for every framework."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Tensors = Mapping[str, FloatArray]
"""Name -> float32 array in the tensor's shape, in the model's order."""
