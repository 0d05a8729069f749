"""The state in memory: changes since the last `Save`, and the sequence numbers in use."""

from dataclasses import dataclass, field

from ternbus.edge.core.actions import Save
from ternbus.edge.core.state import SEQ_BLOCK, AnsweredUpdate, State


@dataclass(slots=True)
class PendingState:
    """Collects changes in ``state`` until ``save`` returns them as one durable write."""

    state: State
    _saved: State = field(init=False)
    _next_seq: int = field(init=False)
    _answered: AnsweredUpdate | None = None

    def __post_init__(self) -> None:
        self._saved = self.state
        self._next_seq = self.state.seq_limit  # an earlier process may have used all numbers below it

    def next_seq(self) -> int:
        """A sequence number that is never used again, also after a crash: the next save reserves its block."""
        seq = self._next_seq
        self._next_seq += 1
        if seq >= self.state.seq_limit:
            self.state = self.state.with_seq_limit(seq + SEQ_BLOCK)
        return seq

    def may_have_used(self, seq: int) -> bool:
        """Whether this process, or an earlier one with the same state, may have used the number."""
        return seq < self._next_seq

    def skip_past(self, seq: int) -> None:
        """Make the next sequence number greater than this one."""
        self._next_seq = max(self._next_seq, seq + 1)

    def put(self, state: State, answered: AnsweredUpdate | None = None) -> None:
        """Replace the state; ``answered`` is the receipt that caused the change, for the same save."""
        if state.key != self.state.key:
            self._next_seq = state.seq_limit
        self.state = state
        self._answered = answered or self._answered

    def save(self) -> list[Save]:
        """The pending write, if the state has changed."""
        if self.state is self._saved:
            return []
        durable = self.state.tells_more_than(self._saved)
        action = Save(state=self.state, answered=self._answered, durable=durable)
        self._saved, self._answered = self.state, None
        return [action]
