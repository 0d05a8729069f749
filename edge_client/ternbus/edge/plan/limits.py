"""The limits of a device's owner on the duration of one training, whatever the federation's plan asks for."""

import math
from dataclasses import dataclass, replace

from ternbus.broker.errors import ConfigError
from ternbus.edge.plan.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingLimits:
    """The largest seconds and steps of one training; None for no limit.

    At a limit, training stops, and the device sends the change so far. A trainer that supports the plan's
    `local_seconds` stops after the step that exceeds the seconds; under `dp = "sample"` it chooses a number of steps
    before.
    """

    seconds: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ConfigError(f"max_seconds is {self.seconds:g}, but must be a number above 0")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"max_steps is {self.steps}, but must be at least 1")

    def bound(self, plan: Plan) -> Plan:
        """The plan with at most the owner's seconds and steps."""
        if self.seconds is None and self.steps is plan.steps_max:
            return plan
        seconds = [each for each in (plan.local_seconds, self.seconds) if each is not None]
        return replace(plan, local_seconds=min(seconds, default=None), steps_max=self.steps)
