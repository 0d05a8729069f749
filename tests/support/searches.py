"""Searches without a federation: settings, updates with what they gain, versions that are made of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from support.small_world import accepted_update
from ternbus.aggregator.core.search import Search
from ternbus.aggregator.core.search_state import SearchState
from ternbus.aggregator.merge.accepted import AcceptedUpdate
from ternbus.aggregator.search_settings import SearchSettings
from ternbus.broker.protocol.messages import Metrics

RATES = ({"learning_rate": 0.01}, {"learning_rate": 0.1}, {"learning_rate": 1.0}, {"learning_rate": 10.0})
WIDTHS = ({"width": 0.25}, {"width": 0.5}, {"width": 1.0})
BUDGET = 4


def settings(arms: Sequence[Mapping[str, Any]] = RATES, **changes: Any) -> SearchSettings:
    return replace(SearchSettings(arms=tuple(arms), budget=BUDGET), **changes)


def update(device: str, arm: int | None, gain: float | None = None, seconds: float | None = None) -> AcceptedUpdate:
    return accepted_update(device, arm=arm, gain=gain, seconds=seconds)


def ranked(search: Search, gains: Sequence[float | None], versions: int, first: int = 1, device: str = "pi") -> None:
    """Versions of one update by each arm, whose gain is the arm's; None: no update."""
    made = [update(device, arm, gain) for arm, gain in enumerate(gains) if gain is not None]
    for version in range(first, first + versions):
        search.made(version, made)


def judged(version: int, **values: float) -> Metrics:
    return Metrics(version=version, samples=10, split="test", values=values)


def state_of(search: Search) -> SearchState:
    assert search.state is not None
    return search.state
