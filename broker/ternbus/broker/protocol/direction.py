"""The direction of a metric: whether higher or lower values are better (docs/protocol.md, `metrics`)."""

from collections.abc import Mapping
from typing import Final, Literal

Direction = Literal["higher", "lower"]
HIGHER: Final = "higher"
LOWER: Final = "lower"
DIRECTIONS: Final = (HIGHER, LOWER)


def direction_of(name: str, better: Mapping[str, Direction]) -> Direction:
    """The stated direction; without one, lower for `loss`, and higher for everything else, as for an accuracy."""
    return better.get(name, LOWER if name == "loss" else HIGHER)
