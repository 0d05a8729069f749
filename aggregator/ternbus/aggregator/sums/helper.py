"""The aggregator's record of a helper: pinned key, newest card, and the number of steps that it has saved."""

from dataclasses import dataclass

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.identity import KeyId, key_id
from ternbus.broker.protocol.messages import Status, is_outdated
from ternbus.broker.sums.terms import SignedCard


@dataclass(slots=True, kw_only=True)
class Helper:
    """``public`` is the key in the settings; under any other this helper says nothing."""

    name: str
    public: bytes
    proof: bytes = b""  # of its enrolment; empty before it
    card: SignedCard | None = None  # the newest
    card_seq: int = -1  # of the frame that brought it, where that was in this process
    count: int = -1  # of sets, the highest that it has stated; -1: none yet
    count_seq: int = -1  # of the frame that stated it, where that was in this process
    status: Status | None = None
    status_seq: int = -1

    @property
    def key(self) -> KeyId:
        return key_id(self.public)

    @property
    def enrolled(self) -> bool:
        return bool(self.proof)

    @property
    def online(self) -> bool:
        return self.status is not None and self.status.online

    def observe(self, status: Status, seq: int) -> bool:
        """Take in a status; return whether it is news. ProtocolError for one of an earlier session: a replay."""
        if self.status is not None and is_outdated(status, seq, self.status, self.status_seq):
            return False
        is_news = (self.status, self.status_seq) != (status, seq)
        self.status, self.status_seq = status, seq
        return is_news

    def counted(self, count: int, seq: int) -> bool:
        """Take in a number of sets; return False where a frame signed before this one stated more.

        Such a helper has lost what it wrote: it may open updates twice. Frames may arrive in any order.
        """
        if count > self.count:
            self.count, self.count_seq = count, seq
        return count == self.count or seq < self.count_seq

    def take_card(self, signed: SignedCard, seq: int, federation: str) -> bool:
        """Take in a card; return whether it is new. ProtocolError where it is not this helper's, or an older one."""
        card, known = signed.card, self.card
        if (card.federation, card.helper, card.public) != (federation, self.name, self.public):
            raise ProtocolError("bad-card", f"a card of {card.helper} in {card.federation}, or of another key")
        if known is not None and card.number < known.card.number:
            raise ProtocolError("old-card", f"box key {card.number} of {self.name}; {known.card.number} is known")
        if known is not None and card.number == known.card.number:
            if card.box_key != known.card.box_key:
                raise ProtocolError("bad-card", f"a second box key {card.number} of {self.name}")
            if signed.content == known.content or seq <= self.card_seq:
                return False
        self.card, self.card_seq = signed, seq
        return True
