"""Values of differential privacy: the two kinds, the cost of a training, the budget spent, the owner's policy.

The mechanisms are in `learn/noise.py` and `torch/dp_sgd.py`, the accounting is in `learn/accountant.py`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Final

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol import plan_keys
from ternbus.edge.plan.plan import NO_DP, Plan

DEVICE: Final = plan_keys.DEVICE
SAMPLE: Final = plan_keys.SAMPLE
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """The privacy budget that a device has spent, both kinds in one list.

    ``epsilon`` and ``delta`` are for the kind of the newest update, and include it.
    """

    spent: tuple[Cost, ...] = ()
    epsilon: float = 0.0
    delta: float = 0.0

    def covers(self, kind: str) -> bool:
        """Whether the releases so far have an epsilon of this kind.

        Trainings that protect samples have none for a device: their clipping bounds the part of each sample, but the
        part of all samples only by their number.
        """
        return kind == SAMPLE or not any(cost.kind == SAMPLE for cost in self.spent)

    def of(self, kind: str) -> tuple[Cost, ...]:
        """Every mechanism whose output depends on what this kind protects, as it counts there; see `covers`.

        An update that protects the device depends on each sample too. Its norm is at most `dp_clip` both with the
        sample and without it, so one sample changes it by up to twice as much: the noise counts half.
        """
        if kind == DEVICE:
            return tuple(cost for cost in self.spent if cost.kind == DEVICE)
        return tuple(replace(cost, noise=cost.noise / 2) if cost.kind == DEVICE else cost for cost in self.spent)

    def plus(self, cost: Cost) -> "Account":
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
        return cls(**{**table, "spent": tuple(Cost(**each) for each in table["spent"])})


def _few(spent: list[Cost]) -> tuple[Cost, ...]:
    """At most `MECHANISMS_MAX` mechanisms that cost at least as much; `spent` itself if it has no more."""
    while len(spent) > MECHANISMS_MAX:
        spent.sort(key=lambda cost: (cost.kind, cost.rate, cost.noise))
        pairs = [(one, other) for one, other in pairwise(spent) if one.kind == other.kind]
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
        if self.kind not in (DEVICE, SAMPLE) or not self.epsilon > 0 or not 0 < self.delta < 1:
            raise ConfigError(
                f"invalid privacy policy (dp {self.kind!r}, epsilon {self.epsilon:g}, delta {self.delta:g}): "
                "give --dp device or sample, --max-epsilon above 0, --max-delta between 0 and 1"
            )

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


def cost(plan: Plan, samples: int) -> Cost:
    """The cost of one training of a device with this many samples, by a plan with `dp`."""
    if plan.dp == DEVICE:
        return Cost(kind=DEVICE, noise=plan.dp_noise, rate=1.0, steps=1)
    rate = min(1.0, plan.batch_size / samples)
    return Cost(kind=SAMPLE, noise=plan.dp_noise, rate=rate, steps=plan.steps(samples))


def privacy_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that may be sent even if the others must stay private."""
    return {name: metrics[name] for name in PRIVACY_METRICS if name in metrics}
