"""A model by its tensors' names: what travels, in numpy arrays, whatever trains it."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Tensors = Mapping[str, FloatArray]
"""Name -> float32 array in the model's own shape; the order is the model's own."""
