"""The memory in use: what will be kept, what has been saved already, and the sequence numbers that it vouches for."""

from dataclasses import dataclass, field

from ternbus.edge.core.actions import Save
from ternbus.edge.core.state import SEQ_BLOCK, AnsweredUpdate, State


@dataclass(slots=True)
class PendingState:
    """Changes gather in ``kept`` until ``save`` makes one durable write of them."""

    kept: State
    _saved: State = field(init=False)
    _next_seq: int = field(init=False)
    _answered: AnsweredUpdate | None = None

    def __post_init__(self) -> None:
        self._saved = self.kept
        self._next_seq = self.kept.seq_limit  # what an earlier life left of its numbers may have been used

    def number(self) -> int:
        """A sequence number that no crash will give out again."""
        seq = self._next_seq
        self._next_seq += 1
        self._reserve(seq)
        return seq

    def skip(self, seq: int) -> None:
        """Go on above this number."""
        self._next_seq = max(self._next_seq, seq + 1)

    def replaced(self, kept: State, answered: AnsweredUpdate | None = None) -> None:
        """Keep this from now on; with it the receipt that was the reason."""
        if kept.key != self.kept.key:
            self._next_seq = kept.seq_limit
        self.kept = kept
        self._answered = answered or self._answered

    def save(self) -> list[Save]:
        """The write that is due, if any."""
        if self.kept is self._saved:
            return []
        action = Save(kept=self.kept, answered=self._answered)
        self._saved, self._answered = self.kept, None
        return [action]

    def _reserve(self, seq: int) -> None:
        if seq >= self.kept.seq_limit:
            self.kept = self.kept.with_seq_limit(seq + SEQ_BLOCK)
