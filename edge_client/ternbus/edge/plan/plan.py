"""The training plan: the federation's parameters of local training, checked when the value is made."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Final

import numpy as np
import numpy.typing as npt

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import plan_keys
from ternbus.broker.protocol.messages import PRIVATE
from ternbus.edge.plan.schedule import share

NO_DP: Final = plan_keys.NO_DP


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The parameters of local training: the keys of the protocol's `plan`, and Ternbus' own.

    `local_steps`, if given, replaces `local_epochs`. `local_seconds` ends either early, so that a slow device does
    less. The learning rate follows `schedule` (see `ternbus.edge.plan.schedule`), which ends at `schedule_versions`
    with the share `final_rate`; within a training it follows `step_schedule` in the same way. `statistics_rate` is the
    share of the change of batch norm's statistics that is sent. `beta1` and `beta2` are Adam's, `momentum` and
    `nesterov` are SGD's, `rmsprop_alpha` is RMSprop's. `grad_clip` is the largest L2 norm of a step's gradient over all
    parameters (Pascanu et al. 2013, algorithm 1; 0 = no clipping). `device`, `precision` and `memory_format` are for
    trainers that support them; "auto" takes what is faster. `evaluation_batch_size` is the number of samples that are
    evaluated at a time; without it, the trainer chooses. `proximal_mu` is FedProx's µ (Li et al. 2020, eq. 2),
    `clip_sigma` TernGrad's c (Wen et al. 2017; 0 = no clipping). `dp` is the kind of differential privacy
    (docs/privacy.md), with `dp_clip` and `dp_noise`, or `dp_theta` and `dp_norm` for "sum", until `dp_epsilon` at
    `dp_delta` is spent. A device trains on the share `participation` of the versions, in turns; each `turn_s` seconds
    without a new version count as one more version. Unknown keys are in `extra`, unchanged. Raises `ProtocolError`
    ("bad-plan") for a value out of range, and for keys that do not fit together.
    """

    local_epochs: float = 1.0
    local_steps: int | None = None
    batch_size: int = 32
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0
    proximal_mu: float = 0.0
    clip_sigma: float = 2.5
    codec: str = "ternary"
    seal: bool = False
    seed: int = 0
    error_feedback: bool = False
    local_seconds: float | None = None
    optimizer: str = "sgd"
    nesterov: bool = False
    beta1: float = 0.9
    beta2: float = 0.999
    rmsprop_alpha: float = 0.99
    grad_clip: float = 0.0
    schedule: str = "constant"
    warmup_versions: int = 0
    schedule_versions: int = 0
    final_rate: float = 0.0
    step_schedule: str = "constant"
    warmup_steps: int = 0
    final_step_rate: float = 0.0
    statistics_rate: float = 0.25
    device: str = "auto"
    evaluation_batch_size: int | None = None
    precision: str = "float32"
    memory_format: str = "contiguous"
    dp: str = NO_DP
    dp_clip: float = 0.0
    dp_noise: float = 0.0
    dp_theta: float = 0.0
    dp_norm: float = 0.0
    dp_epsilon: float = 0.0
    dp_delta: float = 1e-5
    participation: float = 1.0
    turn_s: float = 600.0
    steps_max: int | None = None  # the limit of the device's owner; not a key of a head's plan
    width: float = 1.0  # of an arm of a search; likewise
    extra: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if fault := plan_keys.fault({name: getattr(self, name) for name in plan_keys.KEYS}):
            raise ProtocolError("bad-plan", fault)

    @classmethod
    def from_meta(cls, meta: Mapping[str, object]) -> "Plan":
        """The plan of a head's `plan`, or of a task's `default_plan`. Raises `ProtocolError` for an invalid value."""
        extra = {name: value for name, value in meta.items() if name not in plan_keys.KEYS}
        given = {name: value for name, value in meta.items() if name in plan_keys.KEYS}
        return cls(**given, extra=extra)  # type: ignore[arg-type]  # __post_init__ checks every value

    @property
    def hides_failures(self) -> bool:
        """Whether nobody else may see that a training failed, since that may depend on the data."""
        return self.dp != NO_DP or self.codec == PRIVATE

    @property
    def seconds(self) -> float:
        """`local_seconds`; infinite without it."""
        return math.inf if self.local_seconds is None else self.local_seconds

    def after(self, seconds: float) -> "Plan":
        """The plan for what is left of a training that has taken this long, by measurements before its first step."""
        if self.local_seconds is None:
            return self
        return replace(self, local_seconds=max(0.0, self.local_seconds - seconds))

    def steps(self, samples: int) -> int:
        """The number of training steps of a device with this many samples; at least 1, at most `steps_max`."""
        steps = self.local_steps
        if steps is None:
            steps = max(1, round(self.local_epochs * samples / min(self.batch_size, samples)))
        return steps if self.steps_max is None else min(steps, self.steps_max)

    def rate(self, version: int) -> float:
        """The learning rate for training on a version, of which each step has a share: see `rates`."""
        factor = share(
            self.schedule,
            version,
            warmup=self.warmup_versions,
            total=self.schedule_versions,
            final=self.final_rate,
        )
        return self.learning_rate * factor

    def step_share(self, step: int, steps: int) -> float:
        """The share of `rate` for a step, counted from 0, of a training of ``steps`` steps; 0 to 1."""
        return share(self.step_schedule, step, warmup=self.warmup_steps, total=steps, final=self.final_step_rate)

    def rates(self, version: int, samples: int) -> Iterator[float]:
        """The learning rate of each step, one for each of `batches`."""
        rate, steps = self.rate(version), self.steps(samples)
        if self.step_schedule == "constant" and not self.warmup_steps:
            return repeat(rate, steps)
        return (rate * self.step_share(step, steps) for step in range(steps))

    def batches(
        self, samples: int, rng: np.random.Generator, clock: Callable[[], float] | None = None
    ) -> Iterator[npt.NDArray[np.int64]]:
        """The sample indices of each step. All batches have the same size, and no sample repeats before all were used.

        Yields at least one batch, and none after `local_seconds` have passed on the `clock`, which is in seconds.
        """
        size = min(self.batch_size, samples)
        order = np.empty(0, np.int64)
        ends = math.inf if clock is None else clock() + self.seconds
        for step in range(self.steps(samples)):
            if step and clock is not None and clock() >= ends:
                return
            if len(order) < size:
                order = np.concatenate([order, rng.permutation(samples)])
            yield order[:size]
            order = order[size:]
