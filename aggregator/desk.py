"""Where updates are handed in: each is judged, collected, accepted or refused, and answered once and for all."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from aggregator import events, records
from aggregator.grants import GRANT_S, Grants
from aggregator.intake import Intake, Ready, Verdict
from aggregator.model import Accepted, Model
from aggregator.outlet import Outlet
from aggregator.registry import Answer, Member
from aggregator.settings import Settings
from aggregator.tally import Tally
from broker import topics
from broker.errors import ProtocolError
from broker.frame import Frame
from broker.identity import KeyId
from broker.messages import Grant, Receipt

BUSY_S: Final = 5.0


@dataclass(slots=True, kw_only=True)
class Desk:
    """Takes in updates and offers of authenticated members; ``do`` takes the actions that follow, in order."""

    settings: Settings
    model: Model
    intake: Intake
    outlet: Outlet
    tally: Tally
    do: Callable[[events.Action], None]
    closed: bool = False
    stopping: bool = False
    merge_by: float | None = None  # when what the buffer holds must be merged
    _grants: Grants = field(init=False)

    def __post_init__(self) -> None:
        self._grants = Grants(self.settings.limits.broker_queue_messages // 2)

    def offer(self, member: Member, frame: Frame, now: float) -> None:
        """Answer an offer at once where nothing of the update is wanted; else ask for what there is room for."""
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

    def update(self, member: Member, frame: Frame, now: float) -> None:
        if frame.seq <= member.answer.seq:
            if frame.part == 0:  # once a message, not once a part
                self._answer_again(member, frame.seq, now)
            return
        verdict = self.intake.judge(member, frame, self.model.version, closed=self.closed)
        if verdict is not None:
            self._answer(member, frame.seq, verdict)
        elif self.stopping:
            self._busy(member, frame.seq, now)
        elif frame.parts > self.outlet.direct_parts and member.granted != frame.seq:
            raise ProtocolError("not-granted", f"{frame.parts} parts, unasked")
        else:
            self._collect(member, frame, now)

    def _collect(self, member: Member, frame: Frame, now: float) -> None:
        ready = self.intake.collect(member, frame)
        for reason in self.intake.take_drops().elements():
            self.tally.refuse(reason, now)
        if ready is None:
            return
        if isinstance(ready, Verdict):
            self._answer(member, frame.seq, ready)
        else:
            self._accept(member, frame.seq, ready, now)

    def _accept(self, member: Member, seq: int, ready: Ready, now: float) -> None:
        """Put an update into the buffer; its record stands before its receipt."""
        self._grants.close(member.name)
        update, staleness = ready.update, self.model.version - ready.update.base
        worth = self.intake.worth(ready.block, staleness)
        self._save(
            records.UpdateAccepted(
                device=member.name,
                key=member.key,
                seq=seq,
                base=update.base,
                staleness=staleness,
                samples=update.samples,
                discount=worth,
                codec=update.codec,
                encoding=update.encoding,
                body=ready.body,
            )
        )
        member.accept(update.base, self.intake.oldest(self.model.version))
        member.answer = Answer(seq=seq, outcome="accepted")
        member.evaluates = False
        accepted = Accepted(device=member.name, staleness=staleness, samples=update.samples)
        self.model.accept(accepted, ready.block, worth)
        if self.merge_by is None:
            self.merge_by = now + self.settings.merge.max_wait_s
        self.receipt(member.name, member.key, seq, Verdict("accepted"))

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

    def _busy(self, member: Member, seq: int, now: float) -> None:
        """Not now; which is no answer."""
        self.tally.answer("busy", now)
        why = "the aggregator is stopping" if self.stopping else "too much is on its way already"
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
