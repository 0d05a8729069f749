"""Who may act: the token in the aggregator's directory, and the sessions of browsers that have shown it."""

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ternbus.aggregator.core.rate_limit import TokenBucket
from ternbus.aggregator.shell import dashboard_token

LIFE_S: Final = 12 * 3600.0
SESSIONS_MAX: Final = 100  # the oldest one ends
TRIES: Final = 5  # of one address at once, then one every `TRY_EVERY_S`
TRY_EVERY_S: Final = 12.0
ALL_TRIES: Final = 30  # of all addresses together
ALL_EVERY_S: Final = 2.0
PEERS_MAX: Final = 1000  # addresses that are remembered
TOKEN_CHARS_MAX: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A browser that is logged in; ``name`` is shown in the audit, ``csrf`` stands in every request that acts."""

    name: str
    csrf: str
    ends_at: float  # of the monotonic clock
    token: bytes  # the hash of the token that began it: another one ends it

    def is_csrf(self, shown: str) -> bool:
        return hmac.compare_digest(_hash(shown), _hash(self.csrf))


class TooManyError(Exception):
    """Somebody tries tokens faster than a person does."""


@dataclass(slots=True)
class Sessions:
    """Sessions in memory; a restart of the dashboard ends all of them."""

    directory: Path
    clock: Callable[[], float] = time.monotonic
    _sessions: dict[bytes, Session] = field(default_factory=dict)  # by the hash of the cookie
    _peers: dict[str, TokenBucket] = field(default_factory=dict)
    _all: TokenBucket = field(default_factory=TokenBucket)

    def is_token(self, shown: str, peer: str) -> bool:
        """Whether this is the token, in a time that does not tell how much of it is right. TooManyError."""
        self._count(peer)
        return self._is_right(shown)

    def is_bearer(self, shown: str, peer: str) -> bool:
        """Whether a program shows the token: only wrong ones are counted, since it shows it with each request."""
        if self._is_right(shown):
            return True
        self._count(peer)
        return False

    def begin(self) -> tuple[str, Session]:
        """A new session, and the cookie that names it."""
        while len(self._sessions) >= SESSIONS_MAX:
            del self._sessions[next(iter(self._sessions))]
        cookie = secrets.token_urlsafe(32)
        session = Session(
            name=secrets.token_hex(3),
            csrf=secrets.token_urlsafe(32),
            ends_at=self.clock() + LIFE_S,
            token=self._token(),
        )
        self._sessions[_hash(cookie)] = session
        return cookie, session

    def find(self, cookie: str) -> Session | None:
        """The session that a cookie names, if it has not ended."""
        session = self._sessions.get(_hash(cookie)) if cookie else None
        if session is None:
            return None
        if self.clock() >= session.ends_at or not hmac.compare_digest(session.token, self._token()):
            self.end(cookie)
            return None
        return session

    def end(self, cookie: str) -> None:
        self._sessions.pop(_hash(cookie), None)

    def _is_right(self, shown: str) -> bool:
        return hmac.compare_digest(_hash(shown[:TOKEN_CHARS_MAX]), self._token())

    def _token(self) -> bytes:
        """Read each time: a new one counts at once."""
        return _hash(dashboard_token.read(self.directory))

    def _count(self, peer: str) -> None:
        while len(self._peers) >= PEERS_MAX and peer not in self._peers:
            del self._peers[next(iter(self._peers))]
        bucket, now = self._peers.setdefault(peer, TokenBucket()), self.clock()
        if not (bucket.take(now, 1 / TRY_EVERY_S, TRIES) and self._all.take(now, 1 / ALL_EVERY_S, ALL_TRIES)):
            raise TooManyError


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
