"""Arms of a search: variants of a plan, of which each training takes one, by its device's key and its base.

A plan has them in `arms` and `arm_weights` (docs/protocol.md, section 11.1). So whoever knows a device's public key
and the plan of a version knows by which arm the device trains on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, Final, Self

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import plan_keys
from ternbus.broker.protocol.messages import ARMS_MAX

ARMS, WEIGHTS = "arms", "arm_weights"  # keys of a plan
DEVICE_CLASSES_MAX: Final = 8
PREFIX_BYTES_MAX: Final = 64
WEIGHT_MAX: Final = 65_535
DOMAIN: Final = b"ternbus/1 arm\x00"
WIDTH: Final = "width"
WIDTH_MIN: Final = 0.05
OVERRIDES: Final = ("learning_rate", "local_epochs", "local_steps", "proximal_mu", "clip_sigma", "grad_clip")
KEYS: Final[Mapping[str, plan_keys.Key]] = {
    **{name: plan_keys.KEYS[name] for name in OVERRIDES},
    "local_steps": plan_keys.Number(low=1, high=1e9, whole=True),  # one of a plan may be absent, one of an arm not
    WIDTH: plan_keys.Number(low=WIDTH_MIN, high=1),  # share of the channels of each layer that is trained
}

Weights = tuple[tuple[str, tuple[int, ...]], ...]  # by the beginning of a device's name; the first that fits counts


def number(public: bytes, base: int) -> int:
    """The 64-bit number by which a device with this public key draws its arm for a training on version ``base``."""
    content = DOMAIN + public + base.to_bytes(8, "little")
    return int.from_bytes(blake2b(content, digest_size=32).digest()[:8], "little")


def drawn(weights: tuple[int, ...], public: bytes, base: int) -> int:
    """The arm of a device for a version: arm a has the share weights[a] / sum(weights), which is above 0."""
    left = number(public, base) % sum(weights)
    for arm, weight in enumerate(weights):
        if left < weight:
            return arm
        left -= weight
    raise AssertionError("a remainder is below the sum")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arms:
    """The arms of a plan, and how often each is drawn, by class of devices."""

    arms: tuple[Mapping[str, Any], ...]
    weights: Weights

    def __post_init__(self) -> None:
        if reason := _fault(self.arms) or _weights_fault(self.weights, len(self.arms)):
            raise ProtocolError("bad-plan", reason)

    def meta(self) -> dict[str, Any]:
        """The two keys of a plan."""
        return {
            ARMS: [dict(arm) for arm in self.arms],
            WEIGHTS: [[prefix, list(weights)] for prefix, weights in self.weights],
        }

    @classmethod
    def from_plan(cls, plan: Mapping[str, Any]) -> Self | None:
        """The arms in a head's `plan`; None if it has none. Raises `ProtocolError` where they are malformed."""
        if ARMS not in plan:
            return None
        arms = plan[ARMS]
        if not isinstance(arms, list) or not all(isinstance(arm, dict) for arm in arms):
            raise ProtocolError("bad-plan", f"{ARMS} is not an array of maps")
        rows = plan.get(WEIGHTS, [["", [1] * len(arms)]])
        if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == 2 for row in rows):
            raise ProtocolError("bad-plan", f"{WEIGHTS} is not an array of [beginning of a name, weights]")
        if not all(isinstance(prefix, str) and isinstance(weights, list) for prefix, weights in rows):
            raise ProtocolError("bad-plan", f"{WEIGHTS} is not an array of [beginning of a name, weights]")
        return cls(
            arms=tuple(MappingProxyType(arm) for arm in arms),
            weights=tuple((prefix, tuple(weights)) for prefix, weights in rows),
        )

    def class_of(self, device: str) -> int | None:
        """The class of a device: the first whose prefix its name begins with; None if there is none."""
        return next((number for number, (prefix, _) in enumerate(self.weights) if device.startswith(prefix)), None)

    def drawn(self, device: str, public: bytes, base: int) -> int | None:
        """The arm by which a device trains on version ``base``; None: it trains by the plan without arms."""
        found = self.class_of(device)
        return None if found is None else drawn(self.weights[found][1], public, base)


def _fault(arms: tuple[Mapping[str, Any], ...]) -> str | None:
    """The reason why a device does not train by these arms; keys that it does not know are no reason."""
    if not 1 <= len(arms) <= ARMS_MAX:
        return f"{ARMS} has {len(arms)} maps, not 1 to {ARMS_MAX}"
    for place, arm in enumerate(arms):
        for name, key in KEYS.items():
            if name in arm and (reason := key.fault(arm[name])):
                return f"{ARMS}[{place}].{name} is {arm[name]!r}, {reason}"
    return None


def _weights_fault(rows: Weights, arms: int) -> str | None:
    if not 1 <= len(rows) <= DEVICE_CLASSES_MAX:
        return f"{WEIGHTS} has {len(rows)} entries, not 1 to {DEVICE_CLASSES_MAX}"
    for prefix, weights in rows:
        if len(prefix.encode("utf-8", "surrogatepass")) > PREFIX_BYTES_MAX:
            return f"{WEIGHTS} has a beginning of more than {PREFIX_BYTES_MAX} bytes"
        if len(weights) != arms:
            return f"{WEIGHTS} has {len(weights)} weights in an entry for {arms} arms"
        if not all(type(weight) is int and 0 <= weight <= WEIGHT_MAX for weight in weights) or not any(weights):
            return f"{WEIGHTS} has weights that are not whole numbers from 0 to {WEIGHT_MAX}, one of them above 0"
    return None
