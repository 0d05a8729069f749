"""A helper's profile: identity, roster and minimum, constant while the process runs; it builds and checks frames."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame, build
from ternbus.broker.protocol.identity import Identity, enroll_proof, key_id
from ternbus.broker.protocol.messages import Enroll, Receipt, Status
from ternbus.broker.protocol.parts import cut
from ternbus.broker.protocol.topics import TO_HELPER_KINDS
from ternbus.broker.sums.bfv import SecretKey
from ternbus.broker.sums.sets import Answer
from ternbus.broker.sums.terms import BFV, MASK, Card, SignedCard, digest_of
from ternbus.helper.core.actions import Publish
from ternbus.helper.core.state import BoxKey, Random

ENROLL_SEQ: Final = 1
ONLINE, OFFLINE = "online", "offline"


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The identity, roster and minimum of a helper, and the aggregator whose asks it answers."""

    federation: str
    helper: str  # its name
    identity: Identity
    aggregator_public: bytes
    random: Random = field(repr=False)
    roster: str
    min: int  # the smallest set that it answers for
    code: str = field(default="", repr=False)  # of the invitation, until enrollment
    software: str = ""
    directory: str = "DIR"  # as commands take it
    bfv: SecretKey | None = None  # by which it decrypts sums, in place of opening masks

    @property
    def kind(self) -> str:
        """Of the sums that it opens."""
        return MASK if self.bfv is None else BFV

    @property
    def subscriptions(self) -> tuple[str, ...]:
        """The topic filters of every connection; the helper's own topics show what it published last."""
        own = (self._topic(kind) for kind in (*sorted(TO_HELPER_KINDS), Status.KIND, topics.CARD))
        return (topics.status(self.federation), *own)

    def checked(self, topic: str, frame: Frame) -> Frame:
        """A frame of the aggregator to all or to this helper, or one of this helper's own.

        Raises `ProtocolError` for any other frame, with the first of the protocol's checks that fails.
        """
        address = topics.parse(topic)
        topics.check(frame, address)
        if address.group not in {"all", "help"} or address.device not in {None, self.helper}:
            raise ProtocolError("not-ours", topic[:80])
        is_own = frame.sender == self.helper
        public = self.identity.public if is_own else self.aggregator_public
        if frame.key != key_id(public):
            raise ProtocolError("unknown-key", f"not the key of {'this helper' if is_own else 'the aggregator'}")
        frame.check_authentic(public)
        return frame

    def is_addressed(self, receipt: Receipt) -> bool:
        return receipt.device == self.helper and receipt.device_key == self.identity.key_id

    def card(self, key: BoxKey) -> SignedCard:
        public = b"" if self.bfv is None else self.bfv.public
        return Card(
            federation=self.federation,
            helper=self.helper,
            public=self.identity.public,
            box_key=key.public,
            number=key.number,
            roster=self.roster,
            min=self.min,
            bfv=digest_of(public) if public else b"",
        ).signed(self.identity, public)

    def publish_card(self, key: BoxKey, *, seq: int, count: int, retain: bool = True) -> Publish:
        """The card; ``count`` is in it for the helper itself, since a last will may replace a newer status."""
        return self._publish(topics.CARD, seq, {"count": count}, body=self.card(key).body, retain=retain)

    def status(self, state: str, *, seq: int, session: int, count: int) -> Publish:
        message = Status(state=state, session=session, software=self.software, count=count)
        return self._publish(Status.KIND, seq, message.meta(), retain=True)

    def enroll(self) -> Publish:
        """The enrollment; each call returns the same bytes."""
        public = self.identity.public
        proof = enroll_proof(self.code, self.federation, self.helper, public)
        return self._publish(Enroll.KIND, ENROLL_SEQ, Enroll(public_key=public).meta(), body=proof)

    def answer(self, answer: Answer, body: bytes, *, seq: int, frame_bytes: int) -> list[Publish]:
        """All parts of an answer. LinkError where the frames that the broker accepts are too small for the body."""
        frames = cut(
            self.identity,
            federation=self.federation,
            sender=self.helper,
            kind=Answer.KIND,
            seq=seq,
            meta=answer.meta(),
            body=body,
            frame_bytes=frame_bytes,
        )
        topic = self._topic(Answer.KIND)
        return [Publish(topic=topic, payload=frame, seq=seq) for frame in frames]

    def _publish(
        self, kind: str, seq: int, meta: Mapping[str, object], *, body: bytes = b"", retain: bool = False
    ) -> Publish:
        payload = build(
            self.identity, federation=self.federation, sender=self.helper, kind=kind, seq=seq, meta=meta, body=body
        )
        return Publish(topic=self._topic(kind), payload=payload, seq=seq, retain=retain)

    def _topic(self, kind: str) -> str:
        return topics.help_of(self.federation, self.helper, kind)
