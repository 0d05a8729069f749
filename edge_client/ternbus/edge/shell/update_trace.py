"""What a device's own store says of one of its updates, by its number."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ternbus.broker.protocol.identity import KeyId
from ternbus.edge.core.state import RENUMBERED, UNANSWERED, UNTOLD, AnsweredUpdate, State

OUTSTANDING = "outstanding"  # in place of an outcome: it has no receipt yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """An update under one of the device's keys; ``version`` is the newest that its receipt named (None: no receipt).

    ``renumbered`` is the number under which it was sent again, if it was.
    """

    key: str
    base: int
    outcome: str
    version: int | None = None
    digest: str | None = None  # of the message, as in the aggregator's log of merges
    renumbered: int | None = None

    def facts(self) -> dict[str, object]:
        return asdict(self)

    def sentence(self) -> str:
        """What follows the update's name."""
        about = f"(key {self.key}) was trained on version {self.base}; "
        if self.outcome == OUTSTANDING:
            return f"{about}it has no receipt yet"
        if self.outcome == RENUMBERED:
            again = "" if self.renumbered is None else f", {self.renumbered}"
            return f"{about}it was sent again with another number{again}"
        if self.outcome == UNANSWERED:
            return f"{about}it had no receipt when the device gave it up; the log of merges says if a version has it"
        return f"{about}its receipt says {self.outcome}, at version {self.version}"


def find(state: State, answers: Sequence[AnsweredUpdate], seq: int) -> list[Trace]:
    """The updates with this number, one for each key that had one; ``answers`` are the receipts, newest first."""
    found = [
        Trace(
            key=each.key.hex(),
            base=each.base,
            outcome=each.outcome,
            version=None if each.outcome in UNTOLD else each.version,
            digest=each.digest.hex() or None,
            renumbered=_again(state, answers, each.key, each.base, seq) if each.outcome == RENUMBERED else None,
        )
        for each in answers
        if each.seq == seq
    ]
    waiting = state.outstanding
    if waiting is not None and waiting.seq == seq:
        found.append(Trace(key=state.key.hex(), base=waiting.base, outcome=OUTSTANDING))
    return found


def _again(state: State, answers: Sequence[AnsweredUpdate], key: KeyId, base: int, seq: int) -> int | None:
    """The number after ``seq`` that the update on this base had."""
    numbers = [each.seq for each in answers if (each.key, each.base) == (key, base) and each.seq > seq]
    if state.outstanding is not None and (state.key, state.outstanding.base) == (key, base):
        numbers.append(state.outstanding.seq)
    return min(numbers, default=None)
