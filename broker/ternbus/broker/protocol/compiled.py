"""The compiled loops of `aggregator/native` over vectors: the bits of their numpy counterparts, in fewer passes."""

from typing import Any, Final

import numpy as np
import numpy.typing as npt

try:
    import ternbus_vectors
except ModuleNotFoundError:  # they are optional
    ternbus_vectors = None

FLOAT32: Final = np.dtype(np.float32)
LOOPS: Final = ("add_rows", "apply", "change", "draw_packed", "keep", "mean", "moments", "pack")
# None where they are not installed, or are of an earlier version
vectors: Any = ternbus_vectors if all(hasattr(ternbus_vectors, loop) for loop in LOOPS) else None


def takes(*arrays: npt.NDArray[Any]) -> bool:
    """Whether the loops are installed and read these arrays: aligned C-contiguous float32, in the machine's order."""
    if vectors is None:
        return False
    for each in arrays:  # not all(): this is asked of each tensor several times an update
        flags = each.flags
        if not (flags.c_contiguous and flags.aligned and each.dtype == FLOAT32):
            return False
    return True
