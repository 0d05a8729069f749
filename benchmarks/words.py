"""Tables and numbers as the figures have them."""

import math
import statistics
from collections.abc import Iterable


def table_of(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *body])


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def seeds_of(count: int) -> str:
    return "one seed" if count == 1 else f"{count} seeds"


def standard_error(values: list[float]) -> float:
    """The standard error of the mean."""
    return statistics.stdev(values) / math.sqrt(len(values))
