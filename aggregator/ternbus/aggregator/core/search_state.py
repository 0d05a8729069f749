"""The state of a search: what each step decided, and what has come of the rung since. It is durable with each version.

Cells are the pairs of a class of devices and an arm: a table has a row for each class, an entry for each arm.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median_low
from typing import Any, Final, Self, TypeVar

from ternbus.aggregator.merge.accepted import AcceptedUpdate
from ternbus.aggregator.search_settings import HALVING, SearchSettings
from ternbus.broker.protocol.arms import drawn

SECONDS_KEPT: Final = 15  # the newest trainings of each cell
LATENCIES_MIN: Final = 3  # trainings before an arm may be too slow
BESIDE: Final = 4  # updates of rank 0 beside an arm's own: one of which little is known is held to be like most

N = TypeVar("N", int, float)
Table = tuple[tuple[float, ...], ...]
Weights = tuple[tuple[int, ...], ...]
Effects = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Bases from ``since`` on have these weights.

    ``effects`` are what the rung before found; ``judged`` counts its versions.
    """

    since: int
    weights: Weights
    effects: Effects = ()  # of each arm, the higher the better; None: not known
    judged: int = 0  # versions


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchState:
    """``steps`` are all of them; the rest is of the rung since version ``since``."""

    settings: SearchSettings
    steps: tuple[Step, ...]
    since: int
    updates: Weights = ()  # in the rung, by cell
    ranks: Table = ()  # of the gains of its updates, added up, by cell
    ranked: Weights = ()  # updates with a gain, by cell
    ranked_in: int = 0  # versions
    odds: Table = ()  # of `fedex`: what weights are rounded from
    squares: tuple[float, ...] = ()  # of `fedex`: by class, of the largest effect of each step, added up
    seconds: tuple[tuple[tuple[float, ...], ...], ...] = field(default=(), repr=False)  # by cell, the newest trainings

    @classmethod
    def begun(cls, settings: SearchSettings, since: int) -> Self:
        """A search whose first arms are those of version ``since``, each as frequent as any other."""
        classes, arms = len(settings.names), len(settings.arms)
        return cls(
            settings=settings,
            steps=(Step(since=since, weights=((1,) * arms,) * classes),),
            since=since,
            updates=((0,) * arms,) * classes,
            ranks=((0.0,) * arms,) * classes,
            ranked=((0,) * arms,) * classes,
            odds=((1.0 / arms,) * arms,) * classes,
            squares=(0.0,) * classes,
            seconds=(((),) * arms,) * classes,
        )

    @property
    def weights(self) -> Weights:
        """Those of the newest step."""
        return self.steps[-1].weights

    def step_of(self, base: int) -> Step | None:
        """The step whose weights a base has; None for one from before the search."""
        return next((step for step in reversed(self.steps) if step.since <= base), None)

    def plan(self, version: int) -> Mapping[str, Any]:
        """What the plan of a version's head has of the search."""
        step = self.step_of(version)
        return {} if step is None else self.settings.with_weights(step.weights).meta()

    def class_of(self, device: str) -> int:
        return next(number for number, name in enumerate(self.settings.names) if device.startswith(name))

    def claimed(self, device: str, public: bytes, base: int, arm: int | None) -> int | None:
        """The arm that an update says, if it is the one that its device had to take; else None."""
        step = None if arm is None else self.step_of(base)
        if step is None or drawn(step.weights[self.class_of(device)], public, base) != arm:
            return None
        return arm

    def left(self, number: int) -> list[int]:
        """The arms of a class that are drawn."""
        return [arm for arm, weight in enumerate(self.weights[number]) if weight > 0]

    def with_version(self, updates: Sequence[AcceptedUpdate]) -> "SearchState":
        """The state with one more version in its rung, made of these updates."""
        counts, ranked = [list(row) for row in self.updates], [list(row) for row in self.ranked]
        ranks, seconds = [list(row) for row in self.ranks], [[*row] for row in self.seconds]
        # an update that waited since before the search may have an arm of an earlier one
        counted = [
            (each, each.arm)
            for each in updates
            if each.arm is not None and each.arm < len(self.settings.arms) and self.step_of(each.base) is not None
        ]
        gains = [each.gain for each, _ in counted if each.gain is not None]
        for update, arm in counted:
            number = self.class_of(update.device)
            counts[number][arm] += 1
            if update.seconds is not None:
                seconds[number][arm] = (*seconds[number][arm], update.seconds)[-SECONDS_KEPT:]
            if update.gain is not None and len(gains) > 1:
                ranks[number][arm] += rank(update.gain, gains)
                ranked[number][arm] += 1
        return replace(
            self,
            updates=tuple(map(tuple, counts)),
            ranks=tuple(map(tuple, ranks)),
            ranked=tuple(map(tuple, ranked)),
            ranked_in=self.ranked_in + (len(gains) > 1),
            seconds=tuple(map(tuple, seconds)),
        )

    def effects(self) -> Effects:
        """The mean rank of each arm in this rung, with ``BESIDE`` updates of rank 0; None where none has a gain."""
        return tuple(
            tuple(found / (count + BESIDE) if count else None for found, count in zip(ranks, counts, strict=True))
            for ranks, counts in zip(self.ranks, self.ranked, strict=True)
        )

    def latency_s(self, number: int, arm: int) -> float | None:
        """The median time of the newest trainings by an arm of a class, as its devices measured it, in seconds."""
        found = self.seconds[number][arm]
        return median_low(found) if len(found) >= LATENCIES_MIN else None

    def is_done(self, number: int) -> bool:
        """Whether a class has one arm left."""
        return self.settings.method == HALVING and sum(weight > 0 for weight in self.weights[number]) == 1

    def restarted(self, version: int, classes: Collection[int] | None = None) -> "SearchState":
        """The same with a rung that begins at a version; what was counted is forgotten for some classes, or all."""

        def cleared(table: tuple[tuple[N, ...], ...], zero: N) -> tuple[tuple[N, ...], ...]:
            forgotten = range(len(table)) if classes is None else classes
            return tuple((zero,) * len(row) if number in forgotten else row for number, row in enumerate(table))

        return replace(
            self,
            since=version,
            updates=cleared(self.updates, 0),
            ranks=cleared(self.ranks, 0.0),
            ranked=cleared(self.ranked, 0),
            ranked_in=0,
        )

    def status(self) -> dict[str, Any]:
        """As JSON values, for people and programs; lists by class and arm."""
        about = self.settings
        return {
            "method": about.method,
            "metric": about.metric or None,
            "budget": about.budget,
            "classes": list(about.names),
            "arms": [dict(arm) for arm in about.arms],
            "best": [self._best(number) for number in range(len(about.names))],
            "done": [self.is_done(number) for number in range(len(about.names))],
            "since": self.since,
            "judged": None if about.is_of_widths else self.ranked_in,
            "updates": [list(row) for row in self.updates],
            "latency_s": [
                [self.latency_s(number, arm) for arm in range(len(about.arms))] for number in range(len(about.names))
            ],
            "steps": [
                {
                    "version": step.since,
                    "judged": step.judged,
                    "weights": [list(row) for row in step.weights],
                    "effects": [list(row) for row in step.effects] or None,
                }
                for step in self.steps
            ],
        }

    def _best(self, number: int) -> int | None:
        """The most frequent arm of a class, of equals the one with the best effect; None before its first step."""
        step = self.steps[-1]
        if step.weights[number] == self.steps[0].weights[number]:
            return None
        worth = [
            (weight, _known(effect)) for weight, effect in zip(step.weights[number], step.effects[number], strict=True)
        ]
        return worth.index(max(worth))

    def as_json(self) -> dict[str, Any]:
        """All but the steps."""
        return {name: value for name, value in asdict(replace(self, steps=())).items() if name != "steps"}

    @classmethod
    def from_json(cls, table: Mapping[str, Any], steps: tuple[Mapping[str, Any], ...]) -> Self:
        """What ``as_json`` and each step's ``asdict`` gave."""
        about = table["settings"]
        settings = SearchSettings(
            **{**about, "arms": tuple(map(dict, about["arms"])), "classes": tuple(about["classes"])}
        )
        return cls(
            settings=settings,
            steps=tuple(Step(**{name: _tuples(value) for name, value in step.items()}) for step in steps),
            **{name: _tuples(value) for name, value in table.items() if name != "settings"},
        )


def rank(gain: float, gains: Sequence[float]) -> float:
    """The share of a version's other gains that are lower, equal ones counting half, less 1/2; from -1/2 to 1/2.

    It needs no unit, and whatever a device says is not worth more than the best of its version.
    """
    lower, equal = sum(each < gain for each in gains), sum(each == gain for each in gains) - 1
    return (lower + equal / 2) / (len(gains) - 1) - 0.5


def _known(effect: float | None) -> float:
    return float("-inf") if effect is None else effect


def _tuples(value: Any) -> Any:
    """The value with tuples for the lists that JSON made of them."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
