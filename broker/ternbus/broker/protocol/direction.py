"""The direction of a metric, and which of several metrics is the primary one (docs/protocol.md, `metrics`)."""

from collections.abc import Collection, Mapping
from typing import Final, Literal

Direction = Literal["higher", "lower"]
HIGHER: Final = "higher"
LOWER: Final = "lower"
DIRECTIONS: Final = (HIGHER, LOWER)
ACCURACY: Final = "accuracy"
LOSS: Final = "loss"
OF_WIDTH: Final = "@"  # between the name of a metric and the width of the sub-network that was measured
GAIN: Final = "gain_"  # before the name of a metric: by how much a training has made it better, on held-out data
PERSONAL: Final = "personal_"  # before the name of a metric of the model that a device has made for itself


def direction_of(name: str, better: Mapping[str, Direction]) -> Direction:
    """The stated direction; without one, lower for `loss`, and higher for everything else, as for an accuracy.

    `personal_NAME` has the direction of NAME.
    """
    if name in better:
        return better[name]
    own = name.removeprefix(PERSONAL)
    return better.get(own, LOWER if own == LOSS else HIGHER)


def primary_of(names: Collection[str]) -> str | None:
    """The metric to show where there is room for one: `accuracy`, else the first but `loss`, else `loss`.

    `personal_NAME` beside NAME is never it. None without metrics.
    """
    own = [name for name in names if not is_personal(name, names)]
    first = next((name for name in own if name != LOSS), None)
    return ACCURACY if ACCURACY in own else first or next(iter(own), None)


def for_people(names: Collection[str], primary: str | None) -> list[str]:
    """The metrics to show: the primary one first, then the others, but the loss only where there is no other.

    Those of sub-networks are left out.
    """
    whole = [name for name in names if OF_WIDTH not in name]
    chosen = [name for name in whole if name != LOSS] or whole
    return sorted(chosen, key=lambda name: name != primary)


def is_personal(name: str, names: Collection[str]) -> bool:
    """Whether it is a metric of a device's own model, beside the same metric of the federation's."""
    return name.startswith(PERSONAL) and name.removeprefix(PERSONAL) in names


def width_metric(name: str, width: float) -> str:
    """The name of a metric of the sub-network of this width."""
    return f"{name}{OF_WIDTH}{width:g}"


def sign_of(direction: Direction) -> int:
    """The factor that makes more of a metric better: 1, or -1 for one of which less is better."""
    return 1 if direction == HIGHER else -1
