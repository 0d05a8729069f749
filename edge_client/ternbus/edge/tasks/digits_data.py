"""The 1,797 handwritten digits that ship with the package (UCI optdigits test part, CC BY 4.0), read with numpy alone.

A fixed stratified fifth is the test set: no device trains on it.
"""

import gzip
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

PIXELS = 64  # in 8 rows, 0 to 16 each
CLASSES = 10

_FILE = Path(__file__).with_name("digits.csv.gz")


def load(split: Literal["train", "test"]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """(images in 0…1, shape [samples, 64]; labels) of the 80 % for training, or of the other 20 %."""
    images, labels = _read(split)
    return images.copy(), labels.copy()


@cache  # a simulation asks once for each device
def _read(split: Literal["train", "test"]) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    with gzip.open(_FILE, "rt") as lines:
        table = np.loadtxt(lines, dtype=np.uint8, delimiter=",")
    labels = table[:, PIXELS].astype(np.int64)
    test = _is_test(labels)
    chosen = test if split == "test" else ~test
    return table[chosen, :PIXELS].astype(np.float32) / np.float32(16), labels[chosen]


def _is_test(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    # Every machine must choose the same samples, with any version of numpy: this generator's stream is frozen (NEP 19).
    generator = np.random.RandomState(0)
    test = np.zeros(labels.shape, np.bool_)
    for label in range(CLASSES):
        members = np.flatnonzero(labels == label)
        test[generator.permutation(members)[: round(len(members) / 5)]] = True
    return test
