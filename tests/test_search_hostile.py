"""What a search must outlive: absurd metrics, and arms of an earlier search."""

from dataclasses import replace

import numpy as np
import pytest

from support.searches import BUDGET, RATES, WIDTHS, judged, settings, state_of, update
from ternbus.aggregator.core.search import Search
from ternbus.aggregator.core.search_state import SearchState
from ternbus.aggregator.merge.exact import ExactSum
from ternbus.aggregator.merge.mean import Mean
from ternbus.aggregator.search_settings import FEDEX, HALVING
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import Block


@pytest.mark.parametrize("method", [HALVING, FEDEX])
@pytest.mark.parametrize("value", [1.7e308, -1.7e308, 1e200, 1e-161, 5e-324])
def test_an_evaluator_s_absurd_numbers_end_no_search(method: str, value: float) -> None:
    search = Search.of(settings(WIDTHS, method=method, metric="accuracy"), 0)
    for version in range(1, 8 * BUDGET):
        values = {"accuracy@0.25": value, "accuracy@0.5": value / 2, "accuracy@1": value}
        search.observe("judge", judged(version, accuracy=0.5, **values))
        search.made(version, [update(f"pi-{number}", number % len(WIDTHS)) for number in range(24)])
    assert all(sum(row) > 0 for step in state_of(search).steps for row in step.weights)


def test_what_no_measure_comes_to_is_not_judged() -> None:
    def steps(first: float) -> int:
        search = Search.of(settings(WIDTHS, metric="accuracy"), 0)
        for version in range(1, 4 * BUDGET):
            values = {"accuracy@0.25": first, "accuracy@0.5": 0.6, "accuracy@1": 0.7}
            search.observe("judge", judged(version, accuracy=0.7, **values))
            search.made(version, [update(f"pi-{number}", number % len(WIDTHS)) for number in range(24)])
        return len(state_of(search).steps)

    assert steps(0.5) > 1
    assert steps(1e101) == 1


def test_an_arm_of_an_earlier_search_counts_for_none() -> None:
    begun = SearchState.begun(settings(RATES[:2]), 5)
    before, unknown, own = (replace(update("pi", arm, 0.5), base=base) for arm, base in ((1, 4), (3, 5), (1, 5)))
    assert begun.with_version([before, unknown]).updates == ((0, 0),)
    assert begun.with_version([before, unknown, own]).updates == ((0, 1),)


def test_an_update_is_taken_out_of_a_mean_by_its_name() -> None:
    """The arm of one that waits may be forgotten meanwhile, as where the operator ends the search."""

    schema = Schema.of({"w": (300,)})
    block = Block.of_float32(schema, np.ones(300, np.float32))
    mean = Mean(ExactSum(schema))
    mean.add(update("a", 1, 0.5), block)
    mean.add(update("b", 0, 0.5), block)
    mean.remove([(update("a", None), block)])
    assert [each.device for each in mean.updates] == ["b"]
