"""Exponential backoff with jitter, so that a thousand devices do not come back at once. Arithmetic only: no clock."""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

FIRST_S: Final = 0.2
LONGEST_S: Final = 30.0
STEADY_S: Final = 30.0  # a connection that lasted this long was a good one; one that is cut sooner is not tried faster


def fraction(*about: object) -> float:
    """A number in [0, 1) that looks random and is the same for the same arguments: jitter without a generator."""
    text = "/".join(str(part) for part in about)
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest()) / 2**56


@dataclass(slots=True, kw_only=True)
class Reconnect:
    """The time of the next attempt to connect: `due_s`, in the seconds of the `now` that each call is given."""

    salt: str
    due_s: float = 0.0
    _attempts: int = 0
    _since_s: float | None = None

    def connected(self, now: float) -> None:
        self._since_s = now

    def failed(self, now: float) -> None:
        """There is no connection, or no longer."""
        if self._since_s is not None and now - self._since_s >= STEADY_S:
            self._attempts = 0
        self._since_s = None
        wait_s = min(FIRST_S * 2.0 ** min(self._attempts, 20), LONGEST_S)
        self._attempts += 1
        self.due_s = now + wait_s * (1 + fraction(self.salt, self._attempts)) / 2
