"""Dropped frames: all are counted, and some are logged."""

from dataclasses import dataclass
from typing import Final

from ternbus.aggregator.core.counters import Counters
from ternbus.aggregator.core.events import Action, Log
from ternbus.aggregator.core.rate_limit import LogLimit
from ternbus.aggregator.core.versions import LEAPS_MAX
from ternbus.broker.errors import ProtocolError
from ternbus.broker.log_levels import WARNING
from ternbus.broker.protocol.frame import COUNTER_MAX
from ternbus.broker.protocol.messages import RESTORE_LEAP

VERSION_MAX: Final = RESTORE_LEAP * 2 * LEAPS_MAX  # far above what restored folders come to by any clock


def advice(version: int, directory: str) -> str:
    """What the operator may do where one device names a version that is not here; ``directory`` as commands take it."""
    if version > VERSION_MAX:
        return "no aggregator comes to so high a number, so the device lies or errs; revoke it if you do not trust it"
    return (
        "one device's word, which may be a lie; only if this directory was copied back from a backup, stop the "
        f"process, and run: ternbus aggregator restored {directory}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusals:
    """Every refusal is counted; of those for one reason only a few are logged."""

    counters: Counters
    log_limit: LogLimit
    directory: str = "DIR"  # as commands take it

    def refuse(self, reason: str, text: str, now: float, count: int = 1) -> list[Action]:
        self.counters.refuse(reason, now, count)
        line = self.log_limit.write(reason, text, now)
        return [Log(text=line, level=WARNING, event="refused", fields={"reason": reason})] if line else []

    def drop(self, what: str, error: ProtocolError, now: float) -> list[Action]:
        return self.refuse(error.reason, f"dropped {what}: {error}", now)

    def claim(self, device: str, version: object, newest: int, now: float) -> list[Action]:
        """Note that a device names a version that is not here: a sign that this state is an older copy, and no more."""
        if not isinstance(version, int) or not newest < version <= COUNTER_MAX:
            return []
        self.counters.claim(device, version, now)
        text = f"{device} names version {version}, and the newest here is {newest}: {advice(version, self.directory)}"
        line = self.log_limit.write("newer-version", text, now)
        fields = {"device": device, "version": version}
        return [Log(text=line, level=WARNING, event="newer-version", fields=fields)] if line else []
