"""Where updates are handed in: each is judged, collected, accepted or refused, and answered once and for all."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from ternbus.aggregator.core import events, records
from ternbus.aggregator.core.counters import Counters
from ternbus.aggregator.core.frames import FrameWriter
from ternbus.aggregator.core.grants import GRANT_S, Grants
from ternbus.aggregator.core.registry import Answer, Member
from ternbus.aggregator.core.validation import Validation, ValidUpdate, Verdict
from ternbus.aggregator.merge.accepted import BufferedUpdate
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.settings import Settings
from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import topics
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.messages import Grant, Receipt
from ternbus.broker.protocol.ternary import Block

BUSY_S: Final = 5.0


@dataclass(slots=True, kw_only=True)
class Updates:
    """Takes in updates and offers of authenticated members; ``do`` takes the actions that follow, in order."""

    settings: Settings
    model: Model
    intake: Validation
    outlet: FrameWriter
    tally: Counters
    do: Callable[[events.Action], None]
    closed: bool = False
    stopping: bool = False
    merge_by: float | None = None  # when what the buffer holds must be merged
    _grants: Grants = field(init=False)

    def __post_init__(self) -> None:
        self._grants = Grants(self.settings.limits.broker_queue_messages // 2)

    def offer(self, member: Member, frame: Frame, now: float) -> None:
        """Answer an offer at once where nothing of the update is wanted; else ask for what there is room for."""
        self.afford(member, now)
        if frame.seq <= member.answer.seq:
            self._answer_again(member, frame.seq, now)
            return
        offer = self.intake.judge_offer(member, frame, self.model.version, closed=self.closed)
        if isinstance(offer, Verdict):
            self._answer(member, frame.seq, offer)
            return
        missing = member.collector.missing("update", frame.seq) if member.collector is not None else []
        granted = self._grants.grant(member.name, missing or list(range(offer.parts)), now)
        if not granted or self.stopping:
            self._busy(member, frame.seq, now)
            return
        member.granted = frame.seq
        grant = Grant(device=member.name, device_key=member.key, seq=frame.seq, parts=granted, deadline_s=GRANT_S)
        topic = topics.down(self.settings.federation, member.name, grant.KIND)
        self.do(events.Publish(topic=topic, payload=self.outlet.frame(grant.KIND, grant.meta())))

    def update(self, member: Member, frame: Frame, now: float, ahead: Block | None = None) -> None:
        """Take in a part of an update; ``ahead`` is the block of a single part, if it was read already."""
        if frame.seq <= member.answer.seq:
            if frame.part == 0:  # once a message, not once a part
                self.afford(member, now)
                self._answer_again(member, frame.seq, now)
            return
        verdict = self.intake.judge(member, frame, self.model.version, closed=self.closed)
        if verdict is not None:
            self.afford(member, now)
            self._answer(member, frame.seq, verdict)
        elif self.stopping:
            self.afford(member, now)
            self._busy(member, frame.seq, now)
        elif frame.parts > self.outlet.direct_parts and member.granted != frame.seq:
            raise ProtocolError("not-granted", f"{frame.parts} parts, unasked")
        else:
            self._collect(member, frame, now, ahead)

    def _collect(self, member: Member, frame: Frame, now: float, ahead: Block | None) -> None:
        if self.intake.is_last(member, frame):
            self.afford(member, now)  # before it is decompressed and read
        valid = self.intake.collect(member, frame, self.model.version, ahead)
        for reason in self.intake.take_drops().elements():
            self.tally.refuse(reason, now)
        if valid is None:
            return
        if isinstance(valid, Verdict):
            self._answer(member, frame.seq, valid)
        elif member.waiting_bytes and member.waiting_bytes + len(valid.body) > self.settings.limits.journal_bytes:
            self._busy(member, frame.seq, now, "too many updates of this device wait to be merged")
        else:
            self._accept(member, valid, now)

    def _accept(self, member: Member, valid: ValidUpdate, now: float) -> None:
        """Put an update into the buffer; its record stands before its receipt."""
        self._grants.close(member.name)
        update = valid.update
        self._save(records.UpdateAccepted(update=update, body=valid.body))
        member.accept(update.base, self.intake.oldest(self.model.version))
        member.answer = Answer(seq=update.seq, outcome="accepted")
        member.evaluates = False
        member.waiting_bytes += len(valid.body)
        self.model.accept(update, valid.block)
        if self.merge_by is None:
            self.merge_by = now + self.settings.merge.max_wait_s
        self.receipt(member.name, member.key, update.seq, Verdict("accepted"))

    def _answer(self, member: Member, seq: int, verdict: Verdict) -> None:
        """Answer an update that will not be merged, for good."""
        self._grants.close(member.name)
        member.answer = Answer(seq=seq, outcome=verdict.outcome, reason=verdict.reason)
        self._save(
            records.UpdateAnswered(
                device=member.name,
                key=member.key,
                seq=seq,
                outcome=verdict.outcome,
                reason=verdict.reason,
            )
        )
        self.receipt(member.name, member.key, seq, verdict)

    def _busy(self, member: Member, seq: int, now: float, why: str = "too much is on its way already") -> None:
        """Not now; which is no answer."""
        self.tally.answer("busy", now)
        if self.stopping:
            why = "the aggregator is stopping"
        self.receipt(member.name, member.key, seq, Verdict("busy", why, retry_after_s=BUSY_S))

    def _answer_again(self, member: Member, seq: int, now: float) -> None:
        """The same answer for the same number; a lower one is told how far this key has come."""
        answer = member.answer
        if seq == 0:
            raise ProtocolError("bad-seq", "sequence numbers start at 1")
        if seq == answer.seq:
            verdict = Verdict(answer.outcome, answer.reason)
        else:
            verdict = Verdict("duplicate", "a lower sequence number", highest_seq=answer.seq)
            self.tally.answer("duplicate", now)
        self.receipt(member.name, member.key, seq, verdict)

    def afford(self, member: Member, now: float) -> None:
        """Raise ProtocolError where a device has had its receipts, before any work is done for another."""
        member.take_receipt(now, self.settings.limits.receipts_per_s)

    def forget(self, member: Member) -> None:
        """Drop what a device has begun to send."""
        self._grants.close(member.name)
        self.intake.forget(member)

    def drop(self, member: Member, buffer: Iterable[BufferedUpdate]) -> bool:
        """Take a device's updates out of the buffer, the whole of which is ``buffer``; whether there were any."""
        left = sum(update.device != member.name for update in self.model.buffer)
        if left == len(self.model.buffer):
            return False
        self.model.refill(update for update in buffer if update[0].device != member.name)
        assert len(self.model.buffer) == left  # noqa: S101 - nothing that was accepted may be lost with them
        member.waiting_bytes = 0
        if not left:
            self.merge_by = None
        return True

    def receipt(self, device: str, key: KeyId, seq: int, verdict: Verdict) -> None:
        receipt = Receipt(
            device=device,
            device_key=key,
            seq=seq,
            outcome=verdict.outcome,
            version=self.model.version,
            reason=verdict.reason,
            retry_after_s=verdict.retry_after_s,
            highest_seq=verdict.highest_seq,
        )
        topic, payload = self.outlet.receipt(receipt)
        self.do(events.Publish(topic=topic, payload=payload))

    def _save(self, record: records.Record) -> None:
        self.do(events.Save(record=record))
