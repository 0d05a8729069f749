"""How trainings that are computed at once are shared among processes: some stacked, the longest alone.

A step of several models at once costs a little more for each of them, and more than a step of one. Whoever has many
more steps than the others would have a stack of one in the end: the stack is quicker without it.
"""

from collections.abc import Iterator, Sequence
from typing import Final

# The time of a step of small models, where that of one alone is 1. Processors differ: these lie between two of them.
AT_ONCE: Final = 2.0
FOR_EACH: Final = 0.2

Share = list[list[int]]
"""What one process computes: groups of numbers of trainings, each at once, one after the other."""


def shares(steps: Sequence[int], most: int, processes: int) -> list[Share]:
    """Shares for so many processes, of trainings with so many ``steps``; at most ``most`` are in a group.

    The first share, of a process that has other work beside it, takes the least time of those that are not empty.
    """
    order = sorted(range(len(steps)), key=lambda number: -steps[number])
    candidates = (
        _spread([*([number] for number in order[:alone]), *stacks], steps, processes)
        for alone in range(min(len(order), 2 * processes) + 1)
        for stacks in _stacked(order[alone:], most, processes)
    )
    return min(candidates, key=lambda candidate: candidate[0])[1]


def _stacked(order: Sequence[int], most: int, processes: int) -> Iterator[list[list[int]]]:
    """The ways to make stacks of these, of equal sizes: one for each process at most, if ``most`` are enough."""
    least = -(-len(order) // most)
    for count in range(max(1, least), max(processes, least) + 1):
        yield [list(order[place::count]) for place in range(min(count, len(order)))]


def _spread(groups: Sequence[list[int]], steps: Sequence[int], processes: int) -> tuple[float, list[Share]]:
    """The time of the busiest process, and the groups of each: the longest group goes first (LPT; Graham 1969)."""
    busy, found = [0.0] * processes, [list[list[int]]() for _ in range(processes)]
    for group in sorted(groups, key=lambda group: -_time(group, steps)):
        place = busy.index(min(busy))
        busy[place] += _time(group, steps)
        found[place].append(group)
    order = sorted(range(processes), key=lambda place: (not found[place], busy[place]))
    return max(busy), [found[place] for place in order]


def _time(group: Sequence[int], steps: Sequence[int]) -> float:
    if len(group) == 1:
        return steps[group[0]]
    return AT_ONCE * max(steps[number] for number in group) + FOR_EACH * sum(steps[number] for number in group)
