"""The compiled loops of `aggregator/native` over vectors: the bits of their numpy counterparts, in fewer passes."""

from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import ternbus_vectors
except ModuleNotFoundError:  # they are optional
    ternbus_vectors = None

vectors: Any = ternbus_vectors  # None where they are not installed


def takes(*arrays: npt.NDArray[Any]) -> bool:
    """Whether the loops are installed and read these arrays: C-contiguous ones of float32, in the machine's order."""
    return vectors is not None and all(each.flags.c_contiguous and each.dtype == np.float32 for each in arrays)
