"""Count, mean and variance of features, joined without loss of digits, and which values count at all."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
LARGEST: Final = 1e100  # a value beyond it counts as one that is not finite: squares and their sums stay finite


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moments:
    """Of each feature: how many values, their mean, and the sum of squared deviations from it; arrays [features]."""

    count: Floats
    mean: Floats
    squares: Floats

    @classmethod
    def none(cls, features: int) -> Self:
        """Of no values."""
        return cls(count=np.zeros(features), mean=np.zeros(features), squares=np.zeros(features))

    @classmethod
    def of(cls, values: npt.NDArray[Any]) -> Self:
        """Of an array [values, features], by two passes; what is not finite, or beyond `LARGEST`, is left out."""
        found, fits = usable(values)
        count = fits.sum(0, dtype=np.float64)
        safe = np.maximum(count, 1)
        mean = found.sum(0) / safe
        deviations = np.where(fits, found - mean, 0.0)
        squares = np.square(deviations).sum(0) - np.square(deviations.sum(0)) / safe
        return cls(count=count, mean=mean, squares=np.maximum(squares, 0.0))

    def joined(self, other: "Moments") -> "Moments":
        """Of the values of both.

        Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances", eq. 2.1:
        sums of squares would lose all digits where the mean is far from 0.
        """
        count = self.count + other.count
        share = other.count / np.maximum(count, 1)
        apart = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + apart * share,
            squares=self.squares + other.squares + np.square(apart) * self.count * share,
        )

    @property
    def variance(self) -> Floats:
        """The population's: divided by the count. 0 without values."""
        return self.squares / np.maximum(self.count, 1)


def usable(values: npt.NDArray[Any]) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """The values as float64, with 0 in place of those that do not count, and which of them count."""
    found = np.asarray(values, dtype=np.float64)
    fits = np.abs(found) <= LARGEST  # false for a NaN
    return np.where(fits, found, 0.0), fits


def total(parts: Iterable[Moments], features: int) -> Moments:
    """Of all parts together."""
    found = Moments.none(features)
    for part in parts:
        found = found.joined(part)
    return found
