"""Metrics of a task: a function of a whole split's outputs and targets, and the direction that is better."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ternbus.broker.protocol.direction import HIGHER, LOWER, Direction


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric with a direction.

    `compute` takes the outputs and the targets of all samples of a split, and returns one number. It never gets single
    batches, since F1 or AUC is no mean of batches.
    """

    compute: Callable[[Any, Any], Any]
    better: Direction = HIGHER


def higher(compute: Callable[[Any, Any], Any]) -> Metric:
    """A metric of which more is better, as of an accuracy."""
    return Metric(compute, HIGHER)


def lower(compute: Callable[[Any, Any], Any]) -> Metric:
    """A metric of which less is better, as of an error."""
    return Metric(compute, LOWER)
