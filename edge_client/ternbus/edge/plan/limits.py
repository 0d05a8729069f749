"""How long one training may last on a device, as its owner says, whatever the federation's plan asks."""

import math
from dataclasses import dataclass, replace

from ternbus.broker.errors import ConfigError
from ternbus.edge.plan.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingLimits:
    """The most seconds and steps of one training; None: as the plan says. Training stops there and sends what it has.

    The seconds end a training after the step that exceeds them, in a trainer that knows the plan's `local_seconds`.
    """

    seconds: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise ConfigError(f"max_seconds is {self.seconds:g}, but must be a number above 0")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"max_steps is {self.steps}, but must be at least 1")

    def bound(self, plan: Plan) -> Plan:
        """The plan with no more seconds and steps than the owner's."""
        seconds = [each for each in (plan.local_seconds, self.seconds) if each is not None]
        return replace(plan, local_seconds=min(seconds, default=None), steps_max=self.steps)
