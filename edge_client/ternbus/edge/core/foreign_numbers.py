"""Sequence numbers under this device's key that this device never used: another machine has a copy of its key.

A device whose folder was restored from an old copy sees such numbers too, its own of before: at first those of answers
that waited at the broker, and the one that its counter is raised to. From then on all numbers are its own.
"""

from dataclasses import dataclass
from typing import Final

from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.messages import Receipt
from ternbus.edge.core.actions import Log
from ternbus.edge.core.pending_state import PendingState
from ternbus.edge.core.profile import Profile

CERTAIN: Final = 3  # such numbers, each higher than those before; a restored folder explains two
CLONED: Final = "cloned"  # the event of the log line


def cloned_counter(key: KeyId) -> str:
    """The name of the counter of processes that found another machine to use this key."""
    return f"{CLONED}.{key.hex()}"


@dataclass(slots=True, kw_only=True)
class ForeignNumbers:
    """Counts them while the process runs."""

    profile: Profile
    pending: PendingState
    _highest: int = 0
    _count: int = 0
    _told: bool = False

    def observe(self, receipt: Receipt) -> None:
        """Take in any receipt: with ``duplicate`` it names the highest number that the aggregator has answered.

        Only "unknown" says nothing: before the key is enrolled, a stranger can have it for any number.
        """
        number = 0 if receipt.outcome == "unknown" else max(receipt.seq, receipt.highest_seq)
        if self.profile.is_addressed(receipt) and number > self._highest and not self.pending.may_have_used(number):
            self._highest = number
            self._count += 1

    def tell(self) -> list[Log]:
        """The log line, once, when there is no other explanation."""
        if self._told or self._count < CERTAIN:
            return []
        self._told = True
        device = self.profile.device
        text = (
            f"another machine uses the key of {device}: the aggregator answered sequence number {self._highest}, which "
            "this device never used; stop one of the two, let the other join under a name of its own, and give this "
            f"one a fresh key by a new invitation, since both can sign as {device}"
        )
        return [Log(event=CLONED, text=text, fields={"seq": self._highest, "device": device})]
