"""Values of differential privacy: the three kinds, the cost of a training, the budget spent, the owner's policy.

The mechanisms are in `learn/noise.py`, `torch/dp_sgd.py` and `learn/poisson_binomial.py`, the accounting is in
`learn/accountant.py`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, Final

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol import plan_keys
from ternbus.broker.sums.terms import Terms
from ternbus.edge.plan.plan import NO_DP, Plan

DEVICE: Final = plan_keys.DEVICE
SAMPLE: Final = plan_keys.SAMPLE
SUM: Final = plan_keys.SUM
KINDS: Final = (DEVICE, SAMPLE, SUM)
MECHANISMS_MAX: Final = 32  # in an account: each takes time in every computation of epsilon, and space on the disk
NOISE_TINY: Final = 1e-100  # with less, and with far more, a mechanism exceeds every budget; its square is no 0
PRIVACY_METRICS: Final = ("epsilon", "delta")  # metrics of an update that do not depend on the data


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """A number of steps of the Gaussian mechanism, each on a Poisson sample of this ``rate``.

    ``noise`` is the noise's standard deviation in units of the sensitivity.
    """

    kind: str
    noise: float
    rate: float
    steps: int

    def joined(self, other: "Cost") -> "Cost":
        """One mechanism that costs as much as both of the same kind together: exactly so without sampling, else more.

        The squares of 1 / noise of Gaussian mechanisms add up. A sampled one costs more with less noise, and more with
        a larger rate.
        """
        steps, noise = self.steps + other.steps, min(self.noise, other.noise)
        if self.rate == other.rate == 1:
            noise = math.sqrt(steps / (self.weight + other.weight))
        return Cost(kind=self.kind, noise=noise, rate=max(self.rate, other.rate), steps=steps)

    @property
    def weight(self) -> float:
        """About what it costs, to compare: steps · (rate / noise)², to which RDP is proportional with much noise."""
        return self.steps * (self.rate / max(self.noise, NOISE_TINY)) ** 2

    @property
    def order(self) -> tuple[float, ...]:
        """Alike mechanisms are neighbours in this order."""
        return self.rate, self.noise


@dataclass(frozen=True, slots=True, kw_only=True)
class SumCost:
    """A number of updates by the Poisson binomial mechanism, each in a sum with ``honest`` devices, itself included.

    ``levels`` is k, ``theta`` θ, and ``norm`` the largest L2 norm B of a change in units of the scales.
    """

    kind: str = SUM
    levels: int
    theta: float
    norm: float
    honest: int
    steps: int

    def joined(self, other: "SumCost") -> "SumCost":
        """One mechanism that costs at least as much as both: exactly as much where only norms differ.

        An update costs in proportion to the square of its norm, less with more honest devices, whose draws hide the
        others' too, and with a smaller θ less than in proportion to its square. Of unequal levels, what everybody sees
        alone costs more with more of them.
        """
        steps, theta = self.steps + other.steps, max(self.theta, other.theta)
        squares = math.fsum(each.steps * (each.norm * each.theta / theta) ** 2 for each in (self, other))
        honest = min(self.honest, other.honest) if self.levels == other.levels else 1
        levels, norm = max(self.levels, other.levels), math.sqrt(squares / steps)
        return SumCost(levels=levels, theta=theta, norm=norm, honest=honest, steps=steps)

    @property
    def weight(self) -> float:
        """About what it costs, to compare: that of a `Cost` with about its noise."""
        return self.steps * 8 * self.levels * (self.theta * self.norm) ** 2 / self.honest

    @property
    def order(self) -> tuple[float, ...]:
        """Alike mechanisms are neighbours in this order."""
        return self.levels, self.honest, self.theta * self.norm


Charge = Cost | SumCost


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The privacy budget that a device has spent, all kinds in one list.

    ``epsilon`` and ``delta`` are for the kind of the newest update, and include it.
    """

    spent: tuple[Charge, ...] = ()
    epsilon: float = 0.0
    delta: float = 0.0

    def covers(self, kind: str) -> bool:
        """Whether the releases so far have an epsilon of this kind.

        Trainings that protect samples have none for a device: their clipping bounds the part of each sample, but the
        part of all samples only by their number. Updates in sums have none for a sample: two updates with noise of
        unequal variance, which the draws have, are not compared.
        """
        unknown = (SUM,) if kind == SAMPLE else (SAMPLE,)
        return not any(cost.kind in unknown for cost in self.spent)

    def of(self, kind: str) -> tuple[Charge, ...]:
        """Every mechanism whose output depends on what this kind protects, as it counts there; see `covers`.

        An update that protects the device depends on each sample too. Its norm is at most `dp_clip` both with the
        sample and without it, so one sample changes it by up to twice as much: the noise counts half. `device` trusts
        nobody, so an update in a sum counts there as if everybody saw it alone.
        """
        counted = [cost for cost in self.spent if kind == SAMPLE or cost.kind != SAMPLE]
        return tuple(_counted(cost, kind) for cost in counted)

    def plus(self, cost: Charge) -> "Account":
        """The account with another cost. Equal mechanisms add up to one entry. The caller must update `epsilon`.

        Of more than `MECHANISMS_MAX`, those are joined that cost the least more by it. So an aggregator that changes
        the noise with each version cannot have the account grow for good, while epsilon stays small.
        """
        same = [each for each in self.spent if replace(each, steps=cost.steps) == cost]
        others = [each for each in self.spent if each not in same]
        steps = cost.steps + sum(each.steps for each in same)
        return replace(self, spent=_few([*others, replace(cost, steps=steps)]))

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> "Account":
        table = json.loads(text)
        spent = tuple((SumCost if each["kind"] == SUM else Cost)(**each) for each in table["spent"])
        return cls(**{**table, "spent": spent})


def _few(spent: list[Charge]) -> tuple[Charge, ...]:
    """At most `MECHANISMS_MAX` mechanisms that cost at least as much; `spent` itself if it has no more."""
    while len(spent) > MECHANISMS_MAX:
        spent.sort(key=lambda cost: (cost.kind, cost.order))
        pairs: list[tuple[Any, Any]] = [(one, other) for one, other in pairwise(spent) if one.kind == other.kind]
        one, other = min(pairs, key=lambda pair: pair[0].joined(pair[1]).weight - pair[0].weight - pair[1].weight)
        spent = [*(each for each in spent if each not in (one, other)), one.joined(other)]
    return tuple(spent)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyPolicy:
    """The differential privacy that the device's owner requires, whatever the federation's plan is."""

    kind: str
    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        check_budget(self.kind, self.epsilon, self.delta, largest="max-")

    @classmethod
    def of(cls, plan: Plan) -> "PrivacyPolicy | None":
        """The plan's own budget as an owner's, for devices without an owner; None without privacy."""
        return None if plan.dp == NO_DP else cls(kind=plan.dp, epsilon=plan.dp_epsilon, delta=plan.dp_delta)

    def bound(self, plan: Plan) -> Plan | str:
        """The plan with at most the owner's budget; or, if the policy forbids the plan, a text that says why."""
        if plan.dp != self.kind or plan.dp_delta > self.delta:
            required = f'dp = "{self.kind}" and dp_delta of at most {self.delta:g}'
            return f'its owner requires {required}, the plan has dp = "{plan.dp}" and dp_delta {plan.dp_delta:g}'
        return replace(plan, dp_epsilon=min(plan.dp_epsilon, self.epsilon))


def check_budget(kind: str, epsilon: float, delta: float, largest: str = "") -> None:
    """Raises `ConfigError`, which names the first option that is wrong; ``largest`` is within the names of two."""
    if kind not in KINDS:
        raise ConfigError(f"--dp is {kind!r}: give {', '.join(KINDS[:-1])} or {KINDS[-1]}")
    if not epsilon > 0:
        raise ConfigError(f"--{largest}epsilon is {epsilon:g}: give a number above 0")
    if not 0 < delta < 1:
        raise ConfigError(f"--{largest}delta is {delta:g}: give a number between 0 and 1, such as 1e-5")


def cost(plan: Plan, samples: int) -> Cost:
    """The cost of one training of a device with this many samples, by a plan with `dp`."""
    if plan.dp == DEVICE:
        return Cost(kind=DEVICE, noise=plan.dp_noise, rate=1.0, steps=1)
    rate = min(1.0, plan.batch_size / samples)
    return Cost(kind=SAMPLE, noise=plan.dp_noise, rate=rate, steps=plan.steps(samples))


def sum_cost(terms: Terms, honest: int) -> SumCost:
    """The cost of one update by these terms, whether it is opened or not, with so many honest devices in each sum."""
    return SumCost(levels=terms.levels, theta=terms.theta, norm=terms.norm, honest=honest, steps=1)


def privacy_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that may be sent even if the others must stay private."""
    return {name: metrics[name] for name in PRIVACY_METRICS if name in metrics}


def _counted(cost: Charge, kind: str) -> Charge:
    if isinstance(cost, SumCost):
        return replace(cost, honest=1) if kind == DEVICE else cost
    return replace(cost, noise=cost.noise / 2) if (kind, cost.kind) == (SAMPLE, DEVICE) else cost
