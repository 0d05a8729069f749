"""Dropped frames: all are counted, and some are logged."""

from dataclasses import dataclass

from ternbus.aggregator.core.counters import Counters
from ternbus.aggregator.core.events import Action, Log
from ternbus.aggregator.core.rate_limit import LogLimit
from ternbus.broker.errors import ProtocolError
from ternbus.broker.log_levels import WARNING
from ternbus.broker.protocol.frame import COUNTER_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusals:
    """Every refusal is counted; of those for one reason only a few are logged."""

    counters: Counters
    log_limit: LogLimit

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
        text = (
            f"{device} names version {version}, and the newest here is {newest}: "
            "if this folder was copied back from a backup, stop and run: ternbus aggregator restored DIR"
        )
        line = self.log_limit.write("newer-version", text, now)
        fields = {"device": device, "version": version}
        return [Log(text=line, level=WARNING, event="newer-version", fields=fields)] if line else []
