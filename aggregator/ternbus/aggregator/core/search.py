"""A search in the federation: by which arms devices train, and which of them are better (docs/search.md).

Nothing but a new version changes the weights of arms, so what a device has to take follows from its key and its base.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, fsum, log, sqrt
from typing import Any, Final

from ternbus.aggregator.core.registry import Member
from ternbus.aggregator.core.search_state import Effects, SearchState, Step
from ternbus.aggregator.merge.accepted import AcceptedUpdate
from ternbus.aggregator.search_settings import HALVING, SearchSettings
from ternbus.broker.protocol.arms import WIDTH
from ternbus.broker.protocol.direction import GAIN, LOSS, direction_of, primary_of, sign_of, width_metric
from ternbus.broker.protocol.messages import Metrics, Update

UPDATES_MIN: Final = 8  # in a rung, for each arm that is left: that one has none is then no accident
KEPT: Final = 4  # budgets: of so many versions an evaluator's metrics are kept
SCALE: Final = 1000  # of the weights of `fedex`
ODDS_MIN: Final = 1e-6  # so that a few steps can bring back what many have made rare
TEST: Final = "test"
NEVER: Final = float("-inf")
LARGEST: Final = 1e100  # of a metric that counts
ROUNDING: Final = 1e-24  # of the square of an effect: below it arms are equal


@dataclass(slots=True, kw_only=True)
class Search:
    """The search of a federation, if it has one. ``found`` are evaluators' metrics, by name and version."""

    state: SearchState | None = None
    found: dict[str, dict[int, Metrics]] = field(default_factory=lambda: defaultdict(dict))

    @classmethod
    def of(
        cls,
        settings: SearchSettings | None,
        version: int,
        recalled: SearchState | None = None,
        found: Sequence[tuple[str, Metrics]] = (),
    ) -> "Search":
        """As a start at a version finds it. Other settings begin another search, whose arms the next version has.

        By those of this version devices may have trained already.
        """
        if settings is None:
            return cls()
        if recalled is None or recalled.settings != settings:
            return cls(state=SearchState.begun(settings, 0 if version == 0 and recalled is None else version + 1))
        search = cls(state=recalled)
        for name, metrics in found:
            search.observe(name, metrics)
        return search

    def plan(self, version: int) -> Mapping[str, Any]:
        """What the plan of a version's head has of the search."""
        return {} if self.state is None else self.state.plan(version)

    def claimed(self, member: Member, update: Update) -> dict[str, Any]:
        """What is kept of an update for the search, as fields of an `AcceptedUpdate`.

        A wrong claim counts for no arm; the update itself is as good as any.
        """
        arm = None if self.state is None else self.state.claimed(member.name, member.public, update.base, update.arm)
        if self.state is None or arm is None:
            return {}
        gains = {name.removeprefix(GAIN): each for name, each in update.metrics.items() if name.startswith(GAIN)}
        usual = LOSS if LOSS in gains else primary_of(gains) or ""  # few samples give an accuracy few values
        gain = gains.get(self.state.settings.metric or usual)
        return {"arm": arm, "seconds": update.metrics.get("seconds"), "gain": gain}

    def observe(self, evaluator: str, metrics: Metrics) -> None:
        """Take in metrics of a published version, on an evaluator's data: those of its sub-networks judge widths."""
        state = self.state
        if state is None or not state.settings.is_of_widths or metrics.split != TEST or metrics.version <= state.since:
            return
        known = self.found[evaluator]
        known[metrics.version] = metrics
        if len(known) > KEPT * state.settings.budget:
            del known[min(known)]

    def leapt(self, version: int) -> SearchState | None:
        """The version follows from none of before, as after a rollback."""
        if self.state is not None:
            self.state = self.state.restarted(version)
            self.found.clear()
        return self.state

    def made(self, version: int, updates: Sequence[AcceptedUpdate]) -> SearchState | None:
        """A version is made of updates; the state to be saved with it, which the version's head follows."""
        if self.state is not None and version > self.state.since:
            self.state = self._stepped(self.state.with_version(updates), version)
        return self.state

    def _stepped(self, state: SearchState, version: int) -> SearchState:
        """The state after a step, if enough versions and updates have been judged.

        Classes that have sent too little go on as they are, and count on.
        """
        classes = range(len(state.settings.names))
        ready = [number for number in classes if not state.is_done(number) and _has_enough(state, number)]
        if not ready:
            return state
        judged, effects = self._of_widths(state) if state.settings.is_of_widths else (state.ranked_in, state.effects())
        if judged < state.settings.budget:
            return state
        rows = [
            _next(state, number, effects[number]) if number in ready else _Row.of(state, number) for number in classes
        ]
        step = Step(since=version, weights=tuple(row.weights for row in rows), effects=effects, judged=judged)
        self.found.clear()
        return replace(
            state,
            steps=(*state.steps, step),
            odds=tuple(row.odds for row in rows),
            squares=tuple(row.squares for row in rows),
        ).restarted(version, ready)

    def _of_widths(self, state: SearchState) -> tuple[int, Effects]:
        """How many versions evaluators have judged, and what their sub-networks are worth, in the mean of all."""
        widths = [arm[WIDTH] for arm in state.settings.arms]
        judged, worth = set[int](), list[list[float]]()
        for number, metrics in (each for name in sorted(self.found) for each in sorted(self.found[name].items())):
            values = _of_sub_networks(metrics, state.settings.metric, widths)
            if len(values) == len(widths):
                judged.add(number)
                worth.append(values)
        row = tuple(fsum(column) / len(worth) for column in zip(*worth, strict=True))
        return len(judged), (row,) * len(state.settings.names)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """What a step comes to for a class."""

    weights: tuple[int, ...]
    odds: tuple[float, ...]
    squares: float

    @classmethod
    def of(cls, state: SearchState, number: int) -> "_Row":
        """As it was."""
        return cls(weights=state.weights[number], odds=state.odds[number], squares=state.squares[number])


def _of_sub_networks(metrics: Metrics, metric: str, widths: Sequence[float]) -> list[float]:
    """What an evaluator says of each width, the higher the better; without those that it has not measured.

    What no measure comes to is none: sums and squares of what is left are finite.
    """
    name = metric or primary_of(metrics.values) or ""
    sign, names = sign_of(direction_of(name, metrics.better)), [width_metric(name, width) for width in widths]
    return [sign * metrics.values[each] for each in names if abs(metrics.values.get(each, NEVER)) <= LARGEST]


def _has_enough(state: SearchState, number: int) -> bool:
    counts, left = state.updates if state.settings.is_of_widths else state.ranked, state.left(number)
    return sum(counts[number][arm] for arm in left) >= UPDATES_MIN * len(left)


def _next(state: SearchState, number: int, effects: Sequence[float | None]) -> _Row:
    """The class after a step; an arm that no update has is the worst, since trainings by it fail."""
    left = _fast_enough(state, number)
    worth = {arm: NEVER if (each := effects[arm]) is None else each for arm in left}
    if state.settings.method == HALVING:
        best = sorted(left, key=lambda arm: (-worth[arm], arm))[: -(-len(left) // 2)]
        weights = tuple(int(arm in best) for arm in range(len(effects)))
        return replace(_Row.of(state, number), weights=weights)
    return _exponentiated(_Row.of(state, number), worth)


def _fast_enough(state: SearchState, number: int) -> list[int]:
    """The arms left that a class trains in time, as its devices measured it; the fastest where none does.

    A width that none of them has trained takes no less time than a narrower one.
    """
    about, left = state.settings, state.left(number)
    latency = {arm: each for arm in left if (each := state.latency_s(number, arm)) is not None}
    slow = {arm: each for arm, each in latency.items() if about.latency_s and each > about.latency_s}
    fast = [arm for arm in left if arm not in slow]
    if about.is_of_widths and slow:
        least = min(about.arms[arm][WIDTH] for arm in slow)
        fast = [arm for arm in fast if arm in latency or about.arms[arm][WIDTH] < least]
    return fast or [min(slow, key=lambda arm: (slow[arm], arm))]


def _exponentiated(row: _Row, worth: Mapping[int, float]) -> _Row:
    """FedEx (Khodak et al. 2021, algorithm 2): theta <- theta * exp(eta * effect), divided by its sum.

    eta = sqrt(2 ln k / sum over steps of the largest effect squared), so the unit of the effects does not matter.
    """
    known = [each for each in worth.values() if each > NEVER] or [0.0]
    mean = fsum(known) / len(known)
    effects = {arm: max(each, min(known)) - mean for arm, each in worth.items()}
    squares = row.squares + max(map(abs, effects.values())) ** 2
    rate = sqrt(2 * log(len(row.odds)) / squares) if squares > ROUNDING else 0.0
    grown = [odds * exp(rate * effects[arm]) if arm in worth else 0.0 for arm, odds in enumerate(row.odds)]
    made = [max(each / fsum(grown), ODDS_MIN) if arm in worth else 0.0 for arm, each in enumerate(grown)]
    # each arm that is left is still drawn, so that it can show that it is better
    weights = tuple(max(1, round(SCALE * each)) if arm in worth else 0 for arm, each in enumerate(made))
    return _Row(weights=weights, odds=tuple(made), squares=squares)
