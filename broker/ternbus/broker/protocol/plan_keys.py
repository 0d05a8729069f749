"""The keys of a plan and the valid values of each, for the aggregator that writes it and devices that follow it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ternbus.broker.protocol.ternary import CODECS

NO_DP: Final = "none"
DEVICE: Final = "device"
SAMPLE: Final = "sample"


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


Key = Number | Choice | Switch

# Keys that every device follows (docs/protocol.md, section 11.1), and error_feedback.
SHARED: Final[Mapping[str, Key]] = {
    "local_epochs": Number(low=0, high=1e4),
    "local_steps": Number(low=1, high=1e9, whole=True, optional=True),
    "batch_size": Number(low=1, high=1e6, whole=True),
    "learning_rate": Number(low=0, high=1e3),
    "momentum": Number(low=0, high=1),
    "weight_decay": Number(low=0, high=1e3),
    "proximal_mu": Number(low=0, high=1e6),
    "clip_sigma": Number(low=0, high=1e6),
    "codec": Choice(names=CODECS),
    "seal": Switch(),
    "error_feedback": Switch(),
    "seed": Number(low=-(2**63), high=2**64 - 1, whole=True),
}
# Further keys that Ternbus devices follow; the aggregator forwards them unchanged.
OWN: Final[Mapping[str, Key]] = {
    "local_seconds": Number(low=0, high=1e7, optional=True),
    "optimizer": Choice(names=("sgd", "adam", "adamw")),
    "beta1": Number(low=0, high=1 - 1e-9),
    "beta2": Number(low=0, high=1 - 1e-9),
    "schedule": Choice(names=("constant", "linear", "cosine")),
    "warmup_versions": Number(low=0, high=1e9, whole=True),
    "schedule_versions": Number(low=0, high=1e9, whole=True),
    "final_rate": Number(low=0, high=1),
    "statistics_rate": Number(low=0, high=1),
    "precision": Choice(names=("float32", "bfloat16", "auto")),
    "memory_format": Choice(names=("contiguous", "channels-last", "auto")),
    "dp": Choice(names=(NO_DP, DEVICE, SAMPLE)),
    "dp_clip": Number(low=0, high=1e6),
    "dp_noise": Number(low=0, high=1e6),
    "dp_epsilon": Number(low=0, high=1e6),
    "dp_delta": Number(low=1e-30, high=0.1),
    "participation": Number(low=1e-6, high=1),
    "turn_s": Number(low=1e-3, high=1e7),
}
KEYS: Final[Mapping[str, Key]] = {**SHARED, **OWN}
