"""The devices of a run that fail, in words, and whether any is left that could make a version."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ternbus.broker.errors import FederationError

GIVEN_UP_AFTER: Final = 2  # failed trainings, with no accepted update between
NAMES_MAX: Final = 8


@dataclass(slots=True)
class FailingDevices:
    """The reasons of the devices that cannot train, as far as known; a device may recover."""

    reasons: dict[str, str] = field(default_factory=dict)
    _since: dict[str, tuple[int, int]] = field(default_factory=dict)  # accepted updates, and failures by then

    def look(self, device: str, *, accepted: int, failures: int, reason: str) -> bool:
        """Take in a device's numbers of accepted updates and failed trainings. Returns whether it is given up now."""
        known, before = self._since.get(device, (0, 0))
        if known != accepted:
            self._since[device] = accepted, failures
            self.reasons.pop(device, None)
        elif failures - before >= GIVEN_UP_AFTER and device not in self.reasons:
            self.reasons[device] = reason
            return True
        return False

    def check(self, training: Collection[str]) -> None:
        """Raises `FederationError`, with names and reasons, if all devices that still train are given up."""
        if self.reasons and self.reasons.keys() >= set(training):
            raise FederationError("no device can train\n" + "\n".join(named(self.reasons)))


def named(reasons: Mapping[str, str], what: str = " cannot train") -> list[str]:
    """A line for each reason, with the devices that have it."""
    devices: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        devices.setdefault(reason, []).append(name)
    return [f"{_listed(names)}{what}: {reason}" for reason, names in devices.items()]


def nothing_made(when: str, counts: Mapping[str, Any], reasons: Mapping[str, str]) -> FederationError:
    """The error of a run that made no version ``when``: what became of the updates, and what each device last said."""
    return FederationError("\n".join([f"no version was made {when}: {answers(counts)}", *named(reasons, "")]))


def answers(counts: Mapping[str, Any]) -> str:
    """How the aggregator answered updates, by the ``counts`` of its status: "2 updates accepted, 3 refused (norm)"."""
    return ", ".join(_answers(counts))


def _answers(counts: Mapping[str, Any]) -> Iterator[str]:
    accepted = counts["accepted"]
    yield f"{accepted or 'no'} update{'s' if accepted != 1 else ''} accepted"
    for outcome in ("stale", "busy"):
        if counts[outcome]:
            yield f"{counts[outcome]} {outcome}"
    if invalid := counts["invalid"]:
        yield f"{sum(invalid.values())} refused ({', '.join(invalid)})"


def _listed(names: list[str]) -> str:
    more = len(names) - NAMES_MAX
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:NAMES_MAX])} and {more} more"
