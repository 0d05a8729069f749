"""The outstanding update: it is stored, sent or offered, granted, answered, and renumbered if necessary."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.frame import FRAME_BYTES, Frame, header_of
from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.messages import SAMPLES_MAX, Grant, Offer, Receipt
from ternbus.broker.protocol.meta_fields import ENTRIES_MAX
from ternbus.broker.protocol.model_messages import Head
from ternbus.broker.protocol.parts import message_digest
from ternbus.broker.protocol.schema import Schema
from ternbus.edge.core.actions import Action, Log, Publish, StartTraining
from ternbus.edge.core.events import Connected, Refused, TrainingFinished
from ternbus.edge.core.masking import masked, prepare_private
from ternbus.edge.core.pending_state import PendingState
from ternbus.edge.core.profile import Profile
from ternbus.edge.core.receipts import after_receipt, counter_is_behind, describe, fate, is_out, settled
from ternbus.edge.core.resend import Resend
from ternbus.edge.core.state import RENUMBERED, UNANSWERED, AnsweredUpdate, OutstandingUpdate, prepare, sealed
from ternbus.edge.learn.sum_content import SumContent
from ternbus.edge.plan.plan import NO_DP
from ternbus.edge.plan.privacy import privacy_metrics

FIRST_RESEND_S: Final = 60.0
Frames = tuple[OutstandingUpdate | None, KeyId, list[Publish]]
NO_FRAMES: Final[Frames] = (None, KeyId(bytes(8)), [])
# connections in a row with larger frames than usual under way, or attempts without an answer, until none are sent
LOST_MAX: Final = 2
TOO_LARGE: Final = "Packet too large"
IN_TRANSIT: Final = 64  # frames that wait for the broker, or twice those of the update: then nothing is sent again


@dataclass(slots=True, kw_only=True)
class Uplink:
    """Sends the outstanding update of ``pending``. The caller decides whether a message may be sent."""

    profile: Profile
    pending: PendingState
    frame_bytes: int = FRAME_BYTES  # of frames at most
    resend: Resend = field(init=False)
    _grant_seq: int = 0
    _connected: Connected = field(default_factory=lambda: Connected(frame_bytes=FRAME_BYTES, most_bytes=FRAME_BYTES))
    _lost: int = 0  # connections in a row, see LOST_MAX
    _asked_bytes: int = 0  # by the head, for ``frame_bytes``
    _waits: int = 0  # the number of an update that was answered `busy`
    _frames: Frames = NO_FRAMES  # those made last, and by which key
    _in_transit: Counter[int] = field(default_factory=Counter)  # frames on this connection, by the update's number

    def __post_init__(self) -> None:
        self.resend = Resend(salt=self.profile.key.hex(), first_s=FIRST_RESEND_S)

    def started(self) -> None:
        """Adapt the state of a process that had another key, or did not take part in private sums."""
        state = self.pending.state
        if self.profile.sums is not None and state.outstanding is not None and state.outstanding.private is None:
            self.give_up(state.outstanding)  # a private device sends no other updates
        if state.key != self.profile.key:
            self.pending.put(self.pending.state.with_key(self.profile.key))
            self.key_changed()

    def key_changed(self) -> None:
        """Renumber the outstanding update, which was signed with the device's former key."""
        update = self.pending.state.outstanding
        if update is not None:
            self._replace_outstanding(self._renumbered(update))

    def connected(self, event: Connected, now: float) -> list[Log]:
        """Send again on the new connection, in smaller parts where the broker does not take those that there are.

        Not every broker says what it takes, and on MQTT 3.1.1 it can refuse a message only by ending the connection.
        """
        update = self.pending.state.outstanding
        if self._lost < LOST_MAX and update is not None and self._in_transit[update.seq]:
            self._lost += self._has_part_above(event.frame_bytes, update)
        self._in_transit.clear()
        self._connected = event
        return self._use_limits(now)

    def refused(self, event: Refused, now: float) -> list[Log]:
        """The broker refused a message: where that was too large a frame, send no larger ones than usual."""
        update, usual = self.pending.state.outstanding, self._connected.frame_bytes
        is_ours = update is not None and event.seq == update.seq and self._has_part_above(usual, update)
        if event.reason != TOO_LARGE or not is_ours:
            return []
        self._lost = LOST_MAX
        return self._use_limits(now)

    @property
    def usual_bytes(self) -> int:
        """The largest frame without regard to the head: for what cannot be cut anew."""
        return self._connected.frame_bytes

    def _use_limits(self, now: float) -> list[Log]:
        """Cut the outstanding update anew where it does not fit, and send it."""
        usual, most = self._connected.frame_bytes, self._connected.most_bytes
        goes_back = self._lost == LOST_MAX and most != usual
        if goes_back:
            most = usual
        self._connected = replace(self._connected, most_bytes=most or usual)
        self._set_frame_bytes()
        is_cut = self._cut_anew(self._connected.most_bytes)
        self.restart(now)
        if not (goes_back and is_cut):
            return []
        text = f"the broker, or the line to it, takes no larger frames: from here on they have at most {usual} bytes"
        return [Log(event="smaller-frames", text=text, fields={"frame_bytes": usual})]

    def _has_part_above(self, frame_bytes: int, update: OutstandingUpdate) -> bool:
        return any(len(part.payload) > frame_bytes for part in self._frames_of(update))

    def head_accepted(self, head: Head, now: float) -> list[Log]:
        """Make frames as large as the head asks for; give up an update that is too late for it, as `withdraw` says.

        Larger frames that an earlier head asked for may never get through, and no broker need say so.
        """
        self._asked_bytes = head.frame_bytes
        self._set_frame_bytes()
        withdrawn = self.withdraw(head)
        if self._cut_anew(self.frame_bytes):
            self.resend.restart(now)
        return withdrawn

    def _cut_anew(self, most_bytes: int) -> bool:
        """Cut the outstanding update, under a new number, if a part has more than ``most_bytes``; whether one had.

        Its parts are as large as they are unasked, so no sequence of heads makes a device do so for each of them.
        """
        update = self.pending.state.outstanding
        if update is None or not self._has_part_above(most_bytes, update):
            return False
        # The update may have been accepted under the old number, with a receipt that was lost.
        before = self._answered_update(update, RENUMBERED, self.pending.state.head_version)
        self._replace_outstanding(self._renumbered(update, self._connected.frame_bytes), before)
        return True

    def _set_frame_bytes(self) -> None:
        usual = self._connected.frame_bytes
        self.frame_bytes = min(max(usual, self._asked_bytes), self._connected.most_bytes)

    def restart(self, now: float) -> None:
        """Send at once, on a new connection or to an aggregator that came online."""
        self._waits = 0
        self.resend.restart(now)

    def store(self, finished: TrainingFinished, job: StartTraining, now: float) -> int:
        """Make the result of a job the outstanding update, with residual, local tensors and privacy cost; its number.

        All of it is one durable write, before any part of the update is sent.
        """
        plan = job.plan
        update = self._prepared(finished, job)
        state = self.pending.state  # with the update's number reserved
        self.pending.put(
            replace(
                state,
                outstanding=update,
                residual=finished.residual,
                protected=plan.dp,
                account=finished.account or state.account,
                local=state.local_under(plan.dp) if finished.local is None else finished.local,
            )
        )
        self.resend.restart(now)
        return update.seq

    def _prepared(self, finished: TrainingFinished, job: StartTraining) -> OutstandingUpdate:
        # metrics are in the header, in the clear, and depend on the data
        hidden = job.plan.seal or job.plan.dp != NO_DP or job.sums is not None
        account = {} if job.plan.dp == NO_DP else privacy_metrics(finished.metrics)  # without one a task's by that name
        metrics = account if hidden else _sendable(finished.metrics)
        seq = self.pending.next_seq()
        if job.sums is not None:
            assert isinstance(finished.content, SumContent)  # noqa: S101 - the worker encodes by the job
            return prepare_private(
                finished.content,
                job.sums,
                self.profile,
                seq=seq,
                base=finished.base,
                metrics=metrics,
                frame_bytes=self.frame_bytes,
            )
        update = prepare(
            finished.block,
            seq=seq,
            base=finished.base,
            samples=min(max(finished.samples, 1), SAMPLES_MAX),
            metrics=metrics,
            frame_bytes=self.frame_bytes,
            arm=job.arm,
        )
        return sealed(update, self.profile.key, self.profile.seal) if job.plan.seal else update

    def withdraw(self, head: Head | None) -> list[Log]:
        """Give up a private update that is too late before a frame of it has left: no sum takes it any more."""
        state, update = self.pending.state, self.pending.state.outstanding
        if head is None or update is None or update.private is None or is_out(state, update):
            return []
        if update.base >= head.version - head.max_staleness:
            return []
        self.pending.put(settled(state, update))
        text = (
            f"the update on version {update.base} is too late (the head is {head.version}), and nothing of it was "
            f"sent; {fate(update)}"
        )
        return [Log(event="withdrawn", text=text, fields={"base": update.base, "version": head.version})]

    def give_up(self, update: OutstandingUpdate) -> None:
        """Forget an update that has no receipt, but for its digest: a version may have it all the same."""
        is_known = self.pending.state.key == self.profile.key  # else its frames would get another signature
        answered = self._answered_update(update, UNANSWERED, self.pending.state.head_version) if is_known else None
        self._replace_outstanding(None, answered)

    def send(self, update: OutstandingUpdate, direct_parts: int, now: float) -> list[Action]:
        """Send the update, or offer it if it has more parts than the head's `direct_parts`.

        An update of several parts that waits for its turn is offered, too: to ask again costs no copy of it.
        """
        told: list[Log] = []
        if self._lost < LOST_MAX <= self.resend.in_vain and self._has_part_above(self.usual_bytes, update):
            self._lost = LOST_MAX  # a broker may acknowledge what it drops
            told = self._use_limits(now)
            update = self.pending.state.outstanding or update
        parts = self._frames_of(update)
        if self._is_congested(len(parts)):
            self.resend.sent(len(parts), now)  # the next attempt is by the backoff
            return [*told]
        offered = len(parts) > (1 if self._waits == update.seq else direct_parts)
        if offered:
            parts = [self.profile.message(Offer.KIND, update.seq, Offer(base=update.base, parts=len(parts)).meta())]
        else:
            self._leaves(update)
        self.resend.sent(len(parts), now)
        self._in_transit[update.seq] += len(parts)
        size = sum(len(part.payload) for part in parts)
        fields = {"seq": update.seq, "base": update.base, "parts": len(parts), "bytes": size, "offered": offered}
        verb = "offered" if offered else "sent"
        log = Log(event=verb, text=f"{verb} the update on version {update.base} ({size} bytes)", fields=fields)
        return [*told, *parts, log]

    def grant_arrived(self, frame: Frame, now: float, *, may_send: bool) -> list[Publish]:
        """The parts that a grant requests; none for a grant that was handled already, or an older one.

        Raises `ProtocolError` for one of another device, or of an update that is not outstanding.
        """
        grant, update = Grant.from_meta(frame.meta), self.pending.state.outstanding
        if not self.profile.is_addressed(grant) or update is None or grant.seq != update.seq:
            raise ProtocolError("not-outstanding", "a grant for no outstanding update of this device")
        if not may_send or frame.seq <= self._grant_seq:
            return []
        self._grant_seq = frame.seq
        parts = self._frames_of(update)
        wanted = {part for first, last in grant.parts for part in range(first, min(last + 1, len(parts)))}
        self.resend.granted(grant.deadline_s, now)
        if self._is_congested(len(parts)):
            return []
        if wanted:
            self._leaves(update)
        self._in_transit[update.seq] += len(wanted)
        return [parts[part] for part in sorted(wanted)]

    def _leaves(self, update: OutstandingUpdate) -> None:
        """Note, before a frame of a private update leaves, that one may have."""
        state = self.pending.state
        if update.private is not None and not is_out(state, update):
            self.pending.put(replace(state, left=update.base))

    def acknowledged(self, seq: int, now: float) -> None:
        """The broker has taken, or refused, a frame with this number."""
        if self._in_transit[seq] > 1:
            self._in_transit[seq] -= 1
        else:
            self._in_transit.pop(seq, None)
        if self.pending.state.outstanding is not None and seq == self.pending.state.outstanding.seq:
            self.resend.acknowledged(now)

    def _is_congested(self, parts: int) -> bool:
        """Whether so much is in transit that nothing is sent again: small messages of an aggregator ask for it all."""
        return self._in_transit.total() >= max(IN_TRANSIT, 2 * parts)

    def answered(self, update: OutstandingUpdate, receipt: Receipt, schema: Schema | None, now: float) -> list[Action]:
        """Handle a receipt: wait, renumber the update, or remove it."""
        fields = {"seq": update.seq, "base": update.base, "outcome": receipt.outcome, "version": receipt.version}
        if receipt.outcome == "busy":
            self._waits = update.seq
            self.resend.busy(receipt.retry_after_s, now)
            text = f"the aggregator is busy; the update on version {update.base} waits"
            return [Log(event="busy", text=text, fields=fields)]
        if counter_is_behind(update, receipt):
            if self._is_congested(len(self._frames_of(update))):
                return []  # the number is the next attempt's concern: each new one is a write of the whole update
            self.pending.skip_past(receipt.highest_seq)
            self._replace_outstanding(self._renumbered(update))
            self.resend.restart(now)
            return [
                Log(
                    event="renumbered",
                    text="the sequence number was used before; sending with a new one",
                    fields=fields,
                )
            ]
        self._in_transit.pop(update.seq, None)  # a last answer: it has arrived
        self._lost = self._lost if self._lost == LOST_MAX else 0
        answered = self._answered_update(update, receipt.outcome, receipt.version)
        self._frames = NO_FRAMES
        state = self.pending.state
        self.pending.put(after_receipt(state, update, receipt, schema or Schema.parse(state.schema)), answered)
        text = describe(receipt, update)
        return [Log(event=receipt.outcome, text=text, fields={**fields, "reason": receipt.reason})]

    def _frames_of(self, update: OutstandingUpdate) -> list[Publish]:
        """All parts of the update. They are asked for when it is sent and when it is answered, and signed once."""
        known, key, frames = self._frames
        if known is not update or key != self.profile.key:
            frames = self.profile.update(update)
            self._frames = update, self.profile.key, frames
        return frames

    def _answered_update(self, update: OutstandingUpdate, outcome: str, version: int) -> AnsweredUpdate:
        digest = message_digest(header_of(frame.payload) for frame in self._frames_of(update))
        key = self.profile.key
        return AnsweredUpdate(
            seq=update.seq, base=update.base, outcome=outcome, version=version, key=key, digest=digest
        )

    def _replace_outstanding(self, update: OutstandingUpdate | None, answered: AnsweredUpdate | None = None) -> None:
        self.pending.put(replace(self.pending.state, outstanding=update), answered)

    def _renumbered(self, update: OutstandingUpdate, frame_bytes: int = 0) -> OutstandingUpdate:
        """The update with a new sequence number, in new parts, sealed and signed again, and masked if it is private."""
        fresh = replace(update, seq=self.pending.next_seq(), frame_bytes=frame_bytes or self.frame_bytes, sealed=b"")
        if update.private is not None:
            return masked(fresh, self.profile)
        return sealed(fresh, self.profile.key, self.profile.seal) if update.sealed else fresh


def _sendable(metrics: Mapping[str, float]) -> dict[str, float]:
    finite = [(name, float(value)) for name, value in metrics.items() if math.isfinite(value)]
    return dict(finite[:ENTRIES_MAX])
