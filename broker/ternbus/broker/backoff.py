"""Exponential backoff with jitter, so that a thousand devices do not reconnect at once; arithmetic without a clock."""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

FIRST_S: Final = 0.2
LONGEST_S: Final = 30.0
RETRY_FIRST_S: Final = 1.0
RETRY_LONGEST_S: Final = 300.0
# Only a connection that lasted this long resets the backoff. Two clients of one name end each other's connections after
# at most LONGEST_S, so it is longer: otherwise they would begin again with short waits.
STEADY_S: Final = 2 * LONGEST_S
SHORT_S: Final = 10.0  # a connection that ended sooner was cut short
CUT_SHORT: Final = 5  # such connections in a row, after which another client of the same name is likely


def fraction(*about: object) -> float:
    """A pseudo-random number in [0, 1) that depends on the arguments only."""
    text = "/".join(str(part) for part in about)
    return int.from_bytes(blake2b(text.encode(), digest_size=7).digest()) / 2**56


@dataclass(slots=True, kw_only=True)
class Retry:
    """The time of the next attempt at work that failed, `due_s`; each failure in a row doubles the wait."""

    salt: str
    due_s: float = 0.0
    _failures: int = 0

    def failed(self, now: float) -> None:
        wait_s = min(RETRY_FIRST_S * 2.0 ** min(self._failures, 20), RETRY_LONGEST_S)
        self._failures += 1
        self.due_s = now + wait_s * (1 + fraction(self.salt, self._failures)) / 2

    def succeeded(self) -> None:
        self.due_s, self._failures = 0.0, 0


@dataclass(slots=True, kw_only=True)
class Reconnect:
    """The time of the next attempt to connect, `due_s`, on the clock of the ``now`` arguments."""

    salt: str
    due_s: float = 0.0
    _attempts: int = 0
    _since_s: float | None = None
    _cut_short: int = 0  # connections in a row, without a failed attempt between them

    def connected(self, now: float) -> None:
        self._since_s = now

    def failed(self, now: float) -> bool:
        """Record that an attempt failed or a connection ended, and set the time of the next attempt.

        Returns whether this was, once in a row, the connection after which `contested` should be logged.
        """
        lasted_s = -1.0 if self._since_s is None else now - self._since_s
        if lasted_s >= STEADY_S:
            self._attempts = 0
        self._cut_short = self._cut_short + 1 if 0 <= lasted_s < SHORT_S else 0
        self._since_s = None
        wait_s = min(FIRST_S * 2.0 ** min(self._attempts, 20), LONGEST_S)
        self._attempts += 1
        self.due_s = now + wait_s * (1 + fraction(self.salt, self._attempts)) / 2
        return self._cut_short == CUT_SHORT


def contested(name: str) -> str:
    """What to look for after `CUT_SHORT` connections of the client ``name`` were cut short."""
    return (
        f"{CUT_SHORT} connections in a row ended within {SHORT_S:.0f} s: is there another client with this name, "
        f"{name!r}, for example a copy of this folder on another machine? A broker keeps only one of them connected. "
        "Stop one, or let it join under a name of its own; if there is none, see the broker's log"
    )
