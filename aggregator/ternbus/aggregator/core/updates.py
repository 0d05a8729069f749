"""Updates and offers: each is validated, accepted or refused, and gets one final answer."""

from dataclasses import dataclass, field
from typing import Final

from ternbus.aggregator.core import records
from ternbus.aggregator.core.counters import Counters
from ternbus.aggregator.core.disk_guard import ENOUGH, FULL, RETRY_S, sentence, state_of
from ternbus.aggregator.core.events import Action, Log, Save
from ternbus.aggregator.core.frames import FrameWriter
from ternbus.aggregator.core.log_lines import refused_line
from ternbus.aggregator.core.places import Place, Places
from ternbus.aggregator.core.rate_limit import LogLimit
from ternbus.aggregator.core.registry import Answer, Member
from ternbus.aggregator.core.sets import Sets
from ternbus.aggregator.core.validation import Validation, ValidPrivate, ValidUpdate, Verdict
from ternbus.aggregator.core.work import WorkShares
from ternbus.aggregator.merge.accepted import Journal
from ternbus.aggregator.merge.influence import Measured
from ternbus.aggregator.merge.model import Model
from ternbus.aggregator.settings import Settings
from ternbus.broker.errors import ProtocolError
from ternbus.broker.log_levels import INFO, WARNING
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.messages import Grant, Receipt, Update

GRANT_S: Final = 60.0
BUSY_S: Final = 5.0
BUSY_MAX_S: Final = 60.0
MANY_WAIT: Final = "too many updates of this device wait to be merged"
TURN_S: Final = 30.0  # until a device that waits for its turn asks again; it is told of it before


@dataclass(slots=True, kw_only=True)
class Updates:
    """Takes in updates and offers of authenticated members, and returns the actions that follow, in order."""

    settings: Settings
    model: Model
    validation: Validation
    frames: FrameWriter
    counters: Counters
    log_limit: LogLimit
    work: WorkShares
    closed: bool = False
    stopping: bool = False
    disk: str = ENOUGH  # in a state of `disk_guard`
    sets: Sets | None = None  # of a federation whose updates are private
    places: Places = field(init=False)

    def __post_init__(self) -> None:
        limits = self.settings.limits
        self.places = Places(self.validation.largest_bytes, limits.assembly_bytes, limits.broker_queue_messages // 2)

    def offer(self, member: Member, frame: Frame, now: float) -> list[Action]:
        """Answer an offer at once where nothing of the update is wanted; else ask for what there is room for."""
        self.afford(member, now)
        if frame.seq <= member.answer.seq:
            return self._answer_again(member, frame.seq, now)
        offer = self.validation.judge_offer(member, frame, self.model.version, closed=self.closed)
        if isinstance(offer, Verdict):
            return self._answer(member, frame.seq, offer, now)
        if self._accepts_nothing:
            return self._busy(member, frame.seq, now)
        if self._is_full(member, self.validation.largest_bytes):  # before it is sent, which may take minutes each time
            return self._busy(member, frame.seq, now, MANY_WAIT)
        place = self._asks(member, frame, offer.parts, now)
        answer = self._grant(place) if place.has_room else self._busy(member, frame.seq, now, retry_after_s=TURN_S)
        return [*answer, *self._turns(now)]

    def _grant(self, place: Place) -> list[Action]:
        """Ask for parts of an update that has room."""
        return self.frames.to_device(
            Grant(device=place.device, device_key=place.key, seq=place.seq, parts=place.ask(), deadline_s=GRANT_S)
        )

    def _turns(self, now: float) -> list[Action]:
        """Ask those for their parts whose turn has come."""
        actions: list[Action] = []
        for place in self.places.turns(now):
            actions += self._grant(place)
        if unfinished := self.places.take_unfinished():
            self.counters.refuse("unfinished", now, unfinished)
        return actions

    def _asks(self, member: Member, frame: Frame, parts: int, now: float, size_bytes: int | None = None) -> Place:
        place = self.places.ask(member.name, member.key, now, seq=frame.seq, parts=parts, size_bytes=size_bytes)
        if place is None:
            raise ProtocolError("old-update", f"an update before the one that {member.name} is sending")
        return place

    def update(
        self, member: Member, frame: Frame, now: float, ahead: Measured | None = None, *, is_late: bool = False
    ) -> list[Action]:
        """Take in a part of an update; ``ahead`` is the content of a single part, if it was read already.

        If messages are late, a device that has used its share of the work is answered `busy`; nothing is decoded.
        """
        if frame.seq <= member.answer.seq:
            if frame.part > 0:  # once a message, not once a part
                return []
            self.afford(member, now)
            return self._answer_again(member, frame.seq, now)
        judged = self.validation.judge(member, frame, self.model.version, closed=self.closed, ahead=ahead)
        if isinstance(judged, Verdict):
            self.afford(member, now)
            return self._answer(member, frame.seq, judged, now)
        if self._accepts_nothing:
            return self._no_room(member, frame, now, BUSY_S)
        place = self._place(member, frame, now) if frame.parts > 1 else None
        if place is not None:
            if not place.has_room:
                return [*self._no_room(member, frame, now, TURN_S), *self._turns(now)]
            place.heard = now
        if place is None or place.collector.lacks_only(frame):
            self.afford(member, now)  # before it is decompressed and read
            if is_late and ahead is None and self.owes(member, frame, now):
                return self.shed(member, frame.seq, now)
            if ahead is None:  # what was read ahead is charged already
                self.work.charge(member.name, self.validation.work_bytes(frame), now)
        return [*self._collect(member, frame, judged, place, now, ahead=ahead), *self._turns(now)]

    def _place(self, member: Member, frame: Frame, now: float) -> Place:
        """The place of an update of several parts; one that comes unasked asks by its parts."""
        size_bytes = self.validation.body_bytes_max(frame)
        place = self.places.of(member.name)
        if place is not None and not place.is_for(frame.seq, frame.parts, size_bytes):
            place = None
        if frame.parts > self.frames.direct_parts and not (place is not None and place.has_room):
            raise ProtocolError("not-granted", f"{frame.parts} parts, unasked")
        if place is None:
            self.afford(member, now)
        return self._asks(member, frame, frame.parts, now, size_bytes)

    def _no_room(self, member: Member, frame: Frame, now: float, retry_after_s: float) -> list[Action]:
        """Answer a part of an update that has to wait: once a message, not once a part."""
        if frame.part > 0:
            return []
        self.afford(member, now)
        return self._busy(member, frame.seq, now, retry_after_s=retry_after_s)

    def _collect(
        self, member: Member, frame: Frame, update: Update, place: Place | None, now: float, *, ahead: Measured | None
    ) -> list[Action]:
        collector = None if place is None else place.collector
        valid = self.validation.collect(member, frame, update, self.model.version, collector=collector, ahead=ahead)
        if valid is None:
            return self._grant(place) if place is not None and place.has_sent else []
        self.places.leave(member.name)
        if isinstance(valid, Verdict):
            return self._answer(member, frame.seq, valid, now)
        if self._is_full(member, len(valid.body)):
            return self._busy(member, frame.seq, now, MANY_WAIT)
        if isinstance(valid, ValidPrivate):
            return self._accept_private(member, valid, now)
        return self._accept(member, valid, now)

    def _is_full(self, member: Member, size_bytes: int) -> bool:
        """Whether one more update of this size is too much beside those of its device that wait for a merge."""
        waiting_bytes = member.waiting_bytes
        return waiting_bytes > 0 and waiting_bytes + size_bytes > self.settings.limits.journal_bytes

    @property
    def _accepts_nothing(self) -> bool:
        return self.stopping or self.disk == FULL

    def disk_checked(self, free: float) -> list[Action]:
        """Accept nothing while too little of the disk is free; tell the operator of each change."""
        before, self.disk = self.disk, state_of(free)
        if self.disk == before:
            return []
        return [Log(text=sentence(free), level=INFO if self.disk == ENOUGH else WARNING, event="disk")]

    def _accept(self, member: Member, valid: ValidUpdate, now: float) -> list[Action]:
        """Put an update into the buffer."""
        actions = self._accepted(member, records.UpdateAccepted(update=valid.update, body=valid.body), now)
        self.model.accept(valid.update, valid.block)
        return [*actions, *self._bounded(valid, now)]

    def _accept_private(self, member: Member, valid: ValidPrivate, now: float) -> list[Action]:
        """Put a private update into its group."""
        assert self.sets is not None  # noqa: S101 - or it would not be valid
        self.sets.accept(valid.private, now)
        record = records.UpdateAccepted(update=valid.private.update, body=valid.body, private=valid.private)
        return self._accepted(member, record, now)

    def _accepted(self, member: Member, record: records.UpdateAccepted, now: float) -> list[Action]:
        """The record of an update stands before its receipt."""
        update = record.update
        member.accept(update.base, self.validation.oldest(self.model.version))
        member.answer = Answer(seq=update.seq, outcome="accepted")
        member.evaluates = False
        member.pace.updated(now)
        member.waiting_bytes += len(record.body)
        member.loss, member.epsilon = update.loss, update.epsilon
        return [Save(record=record), *self.receipt(member.name, member.key, update.seq, Verdict("accepted"))]

    def _bounded(self, valid: ValidUpdate, now: float) -> list[Action]:
        """Count an update that the bound on influence acted on, and tell the operator of some."""
        if not valid.bounded:
            return []
        self.counters.answer("bounded", now)
        line = self.log_limit.write("bounded", f"an update of {valid.update.device} {valid.bounded}", now)
        return [Log(text=line, event="bounded", fields={"device": valid.update.device})] if line else []

    def _answer(self, member: Member, seq: int, verdict: Verdict, now: float) -> list[Action]:
        """Answer an update that will not be merged, for good."""
        self.places.leave(member.name)
        after_accepted = member.answer.outcome == "accepted"
        self.counters.refuse_update(member.name, verdict.outcome, now, after_accepted=after_accepted)
        member.answer = Answer(seq=seq, outcome=verdict.outcome, reason=verdict.reason)
        record = records.UpdateAnswered(
            device=member.name,
            key=member.key,
            seq=seq,
            outcome=verdict.outcome,
            reason=verdict.reason,
        )
        answered = [Save(record=record), *self.receipt(member.name, member.key, seq, verdict)]
        return [*answered, *refused_line(self.log_limit, member.name, seq, verdict, now)]

    def owes(self, member: Member, frame: Frame, now: float) -> bool:
        """Whether a device has used its share of the work; the parts of what it is sending are left out."""
        place = self.places.of(member.name)
        held = 0 if place is None else place.collector.size_bytes
        return self.work.owes(member.name, now, held + len(frame.body))

    def shed(self, member: Member, seq: int, now: float) -> list[Action]:
        """Answer `busy`: other devices wait, and this one has used more than its share of the work."""
        wait_s = min(max(BUSY_S, self.work.wait_s(member.name, now)), BUSY_MAX_S)
        return self._busy(member, seq, now, "this device has used its share of the work", wait_s)

    def _busy(
        self,
        member: Member,
        seq: int,
        now: float,
        why: str = "too much is on its way already",
        retry_after_s: float = BUSY_S,
    ) -> list[Action]:
        """Not now; which is no answer."""
        self.counters.answer("busy", now)
        if self.stopping:
            why = "the aggregator is stopping"
        elif self.disk == FULL:
            why, retry_after_s = "the aggregator's disk is almost full", RETRY_S
        return self.receipt(member.name, member.key, seq, Verdict("busy", why, retry_after_s=retry_after_s))

    def _answer_again(self, member: Member, seq: int, now: float) -> list[Action]:
        """The same answer for the same number; a lower one is told how far this key has come."""
        answer = member.answer
        if seq == 0:
            raise ProtocolError("bad-seq", "sequence numbers start at 1")
        if seq == answer.seq:
            verdict = Verdict(answer.outcome, answer.reason)
        else:
            verdict = Verdict("duplicate", "a lower sequence number", highest_seq=answer.seq)
            self.counters.answer("duplicate", now)
        return self.receipt(member.name, member.key, seq, verdict)

    def afford(self, member: Member, now: float) -> None:
        """Raise ProtocolError where a device has had its receipts, before any work is done for another."""
        member.take_receipt(now, self.settings.limits.receipts_per_s)

    def forget(self, member: Member) -> None:
        """Drop what a device has begun to send."""
        self.places.leave(member.name)

    def drop(self, member: Member, journal: Journal) -> bool:
        """Take a device's updates out of the buffer, the whole of which is in the journal; whether there were any."""
        if all(update.device != member.name for update in self.model.buffer):
            return False
        self.model.drop(member.name, journal)
        member.waiting_bytes = 0
        return True

    def receipt(self, device: str, key: KeyId, seq: int, verdict: Verdict) -> list[Action]:
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
        return self.frames.to_device(receipt)
