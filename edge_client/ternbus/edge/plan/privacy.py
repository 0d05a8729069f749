"""Differential privacy as values: its two kinds, what a training costs, what was spent, what a device's owner allows.

Knows no mechanism (`noise.py` and `dp_sgd.py` do) and no theorem (`accountant.py`).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Final

from ternbus.broker.errors import ConfigError
from ternbus.broker.protocol import plan_keys
from ternbus.edge.plan.plan import Plan

DEVICE: Final = plan_keys.DEVICE
SAMPLE: Final = plan_keys.SAMPLE
TOLD: Final = ("epsilon", "delta")  # the metrics of an update that tell nothing of what is protected


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """So many steps of the Gaussian mechanism, each on a Poisson sample of this ``rate``.

    ``noise`` is the noise's standard deviation in units of the sensitivity.
    """

    kind: str
    noise: float
    rate: float
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What a device has spent, both kinds in one list; ``epsilon`` and ``delta`` are those of the newest update."""

    spent: tuple[Cost, ...] = ()
    epsilon: float = 0.0
    delta: float = 0.0

    def covers(self, kind: str) -> bool:
        """Whether what was released has a bound for this kind: a training that protects samples has none for a device.

        Its clipping bounds each sample's part, and all samples' together only by their number.
        """
        return kind == SAMPLE or not any(cost.kind == SAMPLE for cost in self.spent)

    def of(self, kind: str) -> tuple[Cost, ...]:
        """Every mechanism that tells of what this kind protects, as it counts there; see `covers`.

        An update that protects the device tells of a sample too. It is at most `dp_clip` long with the sample, and
        without it, so one sample moves it by twice as much: the noise counts half.
        """
        if kind == DEVICE:
            return tuple(cost for cost in self.spent if cost.kind == DEVICE)
        return tuple(replace(cost, noise=cost.noise / 2) if cost.kind == DEVICE else cost for cost in self.spent)

    def plus(self, cost: Cost) -> "Account":
        """The same mechanism is one entry however often it is used; `epsilon` is the caller's to bring up to date."""
        same = [each for each in self.spent if replace(each, steps=cost.steps) == cost]
        others = [each for each in self.spent if each not in same]
        steps = cost.steps + sum(each.steps for each in same)
        return replace(self, spent=(*others, replace(cost, steps=steps)))

    def dumps(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str) -> "Account":
        table = json.loads(text)
        return cls(**{**table, "spent": tuple(Cost(**each) for each in table["spent"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyPolicy:
    """What the device's owner insists on, whatever the federation's plan says."""

    kind: str
    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if self.kind not in (DEVICE, SAMPLE) or not self.epsilon > 0 or not 0 < self.delta < 1:
            takes = "--dp device or sample, --max-epsilon above 0, --max-delta between 0 and 1"
            raise ConfigError(f"a device's own privacy takes {takes}")

    def bound(self, plan: Plan) -> Plan | str:
        """The plan with no larger a budget than the owner's; or what the owner does not agree to, in words."""
        if plan.dp != self.kind or plan.dp_delta > self.delta:
            asked = f'dp = "{self.kind}" and dp_delta of at most {self.delta:g}'
            return f'its owner wants {asked}, the plan has dp = "{plan.dp}" and dp_delta {plan.dp_delta:g}'
        return replace(plan, dp_epsilon=min(plan.dp_epsilon, self.epsilon))


def cost(plan: Plan, samples: int) -> Cost:
    """What training by a plan with `dp` costs a device with so many samples."""
    if plan.dp == DEVICE:
        return Cost(kind=DEVICE, noise=plan.dp_noise, rate=1.0, steps=1)
    rate = min(1.0, plan.batch_size / samples)
    return Cost(kind=SAMPLE, noise=plan.dp_noise, rate=rate, steps=plan.steps(samples))


def told(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that may be sent where the others tell of the data."""
    return {name: metrics[name] for name in TOLD if name in metrics}
