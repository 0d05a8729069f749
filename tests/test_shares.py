"""How trainings that are computed at once are shared among processes."""

import itertools

import pytest

from ternbus.lab.virtual.shares import AT_ONCE, FOR_EACH, shares

UNEQUAL = [30, 8, 30, 16, 30, 38, 24, 9, 14, 24, 61, 28, 30, 30, 11, 9, 48, 63, 19, 17]


def time_of(share: list[list[int]], steps: list[int]) -> float:
    def of(group: list[int]) -> float:
        own = [steps[number] for number in group]
        return own[0] if len(own) == 1 else AT_ONCE * max(own) + FOR_EACH * sum(own)

    return sum(map(of, share))


@pytest.mark.parametrize("steps", [[5], [5, 5], [9] * 20, UNEQUAL, [1, 100], list(range(1, 40))])
@pytest.mark.parametrize(("most", "processes"), [(1, 1), (3, 2), (10, 2), (20, 2), (20, 1), (2, 4)])
def test_each_training_is_in_one_group_of_no_more_than_may_be(steps: list[int], most: int, processes: int) -> None:
    found = shares(steps, most, processes)
    groups = list(itertools.chain(*found))
    assert len(found) == processes
    assert found[0]
    assert time_of(found[0], steps) == min(time_of(share, steps) for share in found if share)
    assert sorted(itertools.chain(*groups)) == list(range(len(steps)))
    assert all(1 <= len(group) <= most for group in groups)
    assert shares(steps, most, processes) == found


def test_equal_trainings_are_stacked_in_each_process() -> None:
    assert sorted(len(group) for share in shares([27] * 20, 10, 2) for group in share) == [10, 10]


def test_the_longest_are_alone_where_that_is_quicker_than_any_two_stacks() -> None:
    found = shares(UNEQUAL, 20, 2)
    alone = [UNEQUAL[group[0]] for share in found for group in share if len(group) == 1]
    assert {61, 63} <= set(alone)
    assert len(alone) < 5
    halves = [[sorted(range(20), key=lambda number: -UNEQUAL[number])[part::2]] for part in range(2)]
    longest, of_halves = (max(time_of(share, UNEQUAL) for share in each) for each in (found, halves))
    assert longest < of_halves
