"""Candidates: versions that are not published yet. This device evaluates one of them, and never trains on it.

The follower's vector is of published versions only, and a training begins from it. A candidate's vector is made from it
for one evaluation, and is kept nowhere.
"""

from dataclasses import dataclass, field
from typing import Final

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.messages import Metrics
from ternbus.broker.protocol.model_messages import Candidate
from ternbus.broker.protocol.parts import Collector
from ternbus.broker.protocol.schema import Vector, vector_digest
from ternbus.broker.protocol.ternary import Block
from ternbus.edge.core.follower import BYTES_MAX, Follower, check_parts

ROUNDS_MAX: Final = 4  # candidates for one version that are evaluated: more would be questions about the data
MESSAGES_MAX: Final = 2


@dataclass(slots=True, kw_only=True)
class Candidates:
    """The newest candidate that was not evaluated, and what the last one was found to be worth."""

    judged: tuple[bytes, Metrics] | None = None  # the digest of the last one that was evaluated
    _waiting: tuple[Candidate, bytes] | None = None
    _seq: int = 0  # of the newest one
    _rounds: tuple[int, int] = (0, 0)  # the version, and how many candidates for it were evaluated
    _collector: Collector = field(default_factory=lambda: Collector(MESSAGES_MAX, BYTES_MAX))

    def part_arrived(self, frame: Frame, follower: Follower) -> Candidate | None:
        """Handle a part; the candidate if it is complete. Raises `ProtocolError` for one that is malformed."""
        candidate, head = Candidate.from_meta(frame.meta), follower.head
        if head is None or frame.seq < self._seq:
            return None
        check_parts(frame, head)
        self._collector.bytes_max = max(BYTES_MAX, 2 * head.snapshot.content_bytes + 2**20)
        whole = self._collector.add(frame)
        if whole is None:
            return None
        self._seq = whole.seq
        if self.judged is None or self.judged[0] != candidate.digest:
            self._waiting = candidate, whole.body
        return candidate

    def take(self, follower: Follower) -> tuple[Candidate, Vector] | None:
        """The candidate to evaluate now, with its vector, if the follower has the version before it.

        Raises `ProtocolError` if it is not what it says.
        """
        if self._waiting is None or follower.version is None or follower.vector is None or follower.schema is None:
            return None
        candidate, body = self._waiting
        if candidate.version != follower.version + 1:
            if candidate.version <= follower.version:
                self._waiting = None
            return None
        self._waiting = None
        version, rounds = self._rounds
        self._rounds = candidate.version, 1 if candidate.version != version else rounds + 1
        if self._rounds[1] > ROUNDS_MAX:
            raise ProtocolError("too-many-candidates", f"more than {ROUNDS_MAX} for version {candidate.version}")
        vector = Block.read(follower.schema, candidate.codec, candidate.encoding, body).apply(follower.vector)
        if vector_digest(vector) != candidate.digest:
            raise ProtocolError(
                "bad-candidate", f"the digest of candidate {candidate.version} is not that of its block"
            )
        return candidate, vector
