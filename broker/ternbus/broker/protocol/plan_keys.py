"""The keys of a plan, the valid values of each and of all together: for who writes a plan, and for devices.

A device follows a plan that `fault` finds nothing in, and ignores keys that it does not know. Whoever writes a plan
also refuses keys that nobody knows (`unknown`), since a misspelt key would be ignored without a word.
"""

import re
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ternbus.broker.protocol.messages import PRIVATE
from ternbus.broker.protocol.ternary import CODECS

NO_DP: Final = "none"
DEVICE: Final = "device"
SAMPLE: Final = "sample"
SUM: Final = "sum"  # of private sums: the draws of a set's devices are the noise (docs/privacy.md)
THETA_MAX: Final = 0.25  # of the Poisson binomial mechanism: no draw's probability is beyond 1/4 and 3/4


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """A finite number within bounds, both inclusive. If ``optional``, None is valid and means the key is absent."""

    low: float
    high: float
    whole: bool = False
    optional: bool = False

    def fault(self, value: object) -> str | None:
        """The reason why ``value`` is invalid, or None if it is valid."""
        if value is None and self.optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return f"not a {'whole ' if self.whole else ''}number"
        return None if self.low <= value <= self.high else f"not within {self.low:g} and {self.high:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One of several names."""

    names: tuple[str, ...]

    def fault(self, value: object) -> str | None:
        """The reason why ``value`` is invalid, or None if it is valid."""
        return None if value in self.names else f"not one of {', '.join(self.names)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """True or false."""

    def fault(self, value: object) -> str | None:
        """The reason why ``value`` is invalid, or None if it is valid."""
        return None if isinstance(value, bool) else "not true or false"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The name of a processor, as in PyTorch; `auto` leaves the choice to each device."""

    def fault(self, value: object) -> str | None:
        """The reason why ``value`` is invalid, or None if it is valid."""
        fits = isinstance(value, str) and re.fullmatch(r"auto|cpu|mps|cuda(:(0|[1-9][0-9]{0,2}))?", value)
        return None if fits else "not one of auto, cpu, cuda, cuda:N, mps"


Key = Number | Choice | Switch | Device
SCHEDULES: Final = ("constant", "linear", "cosine")

# Keys that every device follows (docs/protocol.md, section 11.1), and error_feedback.
SHARED: Final[Mapping[str, Key]] = {
    "local_epochs": Number(low=0, high=1e4),  # passes over the device's data in one training; fractions too
    "local_steps": Number(low=1, high=1e9, whole=True, optional=True),  # steps of one training, for local_epochs
    "batch_size": Number(low=1, high=1e6, whole=True),  # samples in a step; a device with fewer takes all it has
    "learning_rate": Number(low=0, high=1e3),  # of the device's optimizer, before the schedules
    "momentum": Number(low=0, high=1),  # of sgd
    "weight_decay": Number(low=0, high=1e3),  # L2 penalty, or decoupled decay with adamw
    "proximal_mu": Number(low=0, high=1e6),  # µ of FedProx; 0 = none
    "clip_sigma": Number(low=0, high=1e6),  # c of TernGrad's clipping, in standard deviations of a tensor; 0 = none
    "codec": Choice(names=(*CODECS, PRIVATE)),  # of updates; private is for private sums
    "seal": Switch(),  # updates are encrypted to the aggregator, so no broker reads them
    "error_feedback": Switch(),  # what the codec left out of an update is added to the next one
    "seed": Number(low=-(2**63), high=2**64 - 1, whole=True),  # of what a device draws, except for privacy
}
# Further keys that Ternbus devices follow; the aggregator forwards them unchanged.
OWN: Final[Mapping[str, Key]] = {
    "local_seconds": Number(low=0, high=1e7, optional=True),  # no step begins after this time, in s
    "optimizer": Choice(names=("sgd", "adam", "adamw", "rmsprop")),  # of the device's training
    "nesterov": Switch(),  # Nesterov's form of the momentum
    "beta1": Number(low=0, high=1 - 1e-9),  # decay of the first moment (adam, adamw)
    "beta2": Number(low=0, high=1 - 1e-9),  # decay of the second moment (adam, adamw)
    "rmsprop_alpha": Number(low=0, high=1 - 1e-9),  # decay of the mean of squared gradients (rmsprop)
    "grad_clip": Number(low=0, high=1e6),  # largest L2 norm of a step's gradient; 0 = no limit
    "schedule": Choice(names=SCHEDULES),  # of the learning rate, by the version's number
    "warmup_versions": Number(low=0, high=1e9, whole=True),  # versions over which the rate rises
    "schedule_versions": Number(low=0, high=1e9, whole=True),  # version at which the schedule ends
    "final_rate": Number(low=0, high=1),  # share of learning_rate at the schedule's end
    "step_schedule": Choice(names=SCHEDULES),  # of the learning rate, by the step within a training
    "warmup_steps": Number(low=0, high=1e9, whole=True),  # steps over which the rate rises within a training
    "final_step_rate": Number(low=0, high=1),  # share of the version's rate at a training's last step
    "statistics_rate": Number(low=0, high=1),  # share of the change of batch norm's statistics that is sent
    "device": Device(),  # processor that trains
    "evaluation_batch_size": Number(low=1, high=1e6, whole=True, optional=True),  # samples evaluated at a time
    "precision": Choice(names=("float32", "bfloat16", "auto")),  # of the arithmetic of a training
    "memory_format": Choice(names=("contiguous", "channels-last", "auto")),  # of images in memory
    "dp": Choice(names=(NO_DP, DEVICE, SAMPLE, SUM)),  # kind of differential privacy
    "dp_clip": Number(low=0, high=1e6),  # largest L2 norm of what one device or sample adds
    "dp_noise": Number(low=0, high=1e6),  # noise, in multiples of dp_clip
    "dp_theta": Number(low=0, high=THETA_MAX),  # θ of the Poisson binomial mechanism (dp = "sum")
    "dp_norm": Number(low=0, high=1e6),  # largest L2 norm of a change (dp = "sum")
    "dp_epsilon": Number(low=0, high=1e6),  # budget of a device; it stops when it is spent
    "dp_delta": Number(low=1e-30, high=0.1),  # δ at which epsilon is accounted
    "participation": Number(low=1e-6, high=1),  # share of the versions on which a device trains, in turns
    "turn_s": Number(low=1e-3, high=1e7),  # seconds without a new version until the next devices have their turn
}
KEYS: Final[Mapping[str, Key]] = {**SHARED, **OWN}


def fault(plan: Mapping[str, Any]) -> str | None:
    """The reason why a device does not train by this plan, or None if it does. Unknown keys are not looked at.

    The text begins with the name of a key.
    """
    for name, key in KEYS.items():
        if name in plan and (reason := key.fault(plan[name])):
            return f"{name} is {reprlib.repr(plan[name])}, {reason}"  # a peer may have chosen a long value
    schedule, ends, warm = (
        plan.get("schedule", "constant"),
        plan.get("schedule_versions", 0),
        plan.get("warmup_versions", 0),
    )
    if schedule != "constant" and ends <= warm:
        return (
            f"schedule_versions is {ends}: {schedule} must end after the warm-up; set schedule_versions to the version "
            f"at which the schedule ends, above {warm}"
        )
    if (kind := plan.get("dp", NO_DP)) != NO_DP:
        needed = ("dp_theta", "dp_norm", "dp_epsilon") if kind == SUM else ("dp_clip", "dp_noise", "dp_epsilon")
        if missing := [name for name in needed if not plan.get(name)]:
            listed = f"{needed[0]}, {needed[1]} and {needed[2]}"
            return f"dp is {kind!r}: {listed} must be above 0; set {', '.join(missing)}"
        if kind == SUM and plan.get("codec", PRIVATE) != PRIVATE:
            return f"dp is {SUM!r}: only sums of many devices have its noise; set codec to {PRIVATE!r} (private sums)"
    return None


def unknown(plan: Mapping[str, object], own: Collection[str]) -> list[str]:
    """A sentence about each key that is neither in `KEYS` nor in ``own``, which names the closest known one.

    The text begins with the name of the key.
    """
    import difflib  # noqa: PLC0415 - for an error only: a device that runs has no memory for it

    known = [*KEYS, *own]
    found = []
    for name in plan:
        if name not in known:
            closest = difflib.get_close_matches(name, known, n=1)
            found.append(f"{name} is an unknown key{f': do you mean {closest[0]}?' if closest else '.'}")
    return found
