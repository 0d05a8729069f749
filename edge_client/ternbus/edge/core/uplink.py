"""The one update without an answer: prepared, sent or offered, granted, answered, numbered anew where it must be."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from ternbus.broker.protocol.frame import FRAME_BYTES
from ternbus.broker.protocol.messages import SAMPLES_MAX, Grant, Offer, Receipt
from ternbus.broker.protocol.meta_fields import ENTRIES_MAX
from ternbus.broker.protocol.schema import Schema
from ternbus.edge.core.actions import Action, Log, Publish
from ternbus.edge.core.events import TrainingFinished
from ternbus.edge.core.pending_state import PendingState
from ternbus.edge.core.profile import Profile
from ternbus.edge.core.receipts import is_behind, sentence, settled
from ternbus.edge.core.resend import Resend
from ternbus.edge.core.state import RENUMBERED, AnsweredUpdate, OutstandingUpdate, prepare, sealed
from ternbus.edge.plan.plan import NO_DP, Plan
from ternbus.edge.plan.privacy import told

FIRST_RESEND_S: Final = 60.0


@dataclass(slots=True, kw_only=True)
class Uplink:
    """Sends what is outstanding in ``memory``; whether anything may be sent is for its owner to know."""

    member: Profile
    memory: PendingState
    frame_bytes: int = FRAME_BYTES
    sending: Resend = field(init=False)
    _grant_seq: int = 0

    def __post_init__(self) -> None:
        self.sending = Resend(salt=self.member.key.hex(), first_s=FIRST_RESEND_S)

    def renewed(self) -> None:
        """The device has another key than the outstanding update was signed with."""
        update = self.memory.kept.outstanding
        if update is not None:
            self._keep(self._renumbered(update))

    def connected(self, frame_bytes: int, now: float) -> None:
        """Send again on the new connection; cut anew what no longer fits."""
        self.frame_bytes = frame_bytes
        update = self.memory.kept.outstanding
        if update is not None and any(len(part.payload) > frame_bytes for part in self.member.update(update)):
            # the old number may have been accepted, and its receipt lost
            before = self._noted(update, RENUMBERED, self.memory.kept.head_version)
            self._keep(self._renumbered(update), before)
        self.sending.wanted(now)

    def put(self, finished: TrainingFinished, plan: Plan, now: float) -> None:
        """Keep the result of training as the outstanding update, what it does not carry, and what it cost of privacy.

        All of it is one durable write, made before anything of the update is sent.
        """
        hidden = plan.seal or plan.dp != NO_DP  # metrics travel in the header, and tell of the data
        kept = self.memory.kept
        update = prepare(
            finished.block,
            seq=self.memory.number(),
            base=finished.base,
            samples=min(max(finished.samples, 1), SAMPLES_MAX),
            metrics=told(finished.metrics) if hidden else _sendable(finished.metrics),
            frame_bytes=self.frame_bytes,
        )
        if plan.seal:
            update = sealed(update, self.member.key, self.member.seal)
        self.memory.replaced(
            replace(
                kept,
                outstanding=update,
                residual=finished.residual,
                protected=plan.dp,
                account=finished.account or kept.account,
            )
        )
        self.sending.wanted(now)

    def send(self, direct_parts: int, now: float) -> list[Action]:
        """Send the update, or offer it if it has more parts than the head lets through unasked."""
        update = self.memory.kept.outstanding
        if update is None:
            return []
        parts = self.member.update(update)
        offered = len(parts) > direct_parts
        if offered:
            parts = [self.member.message(Offer.KIND, update.seq, Offer(base=update.base, parts=len(parts)).meta())]
        self.sending.sent(len(parts), now)
        size = sum(len(part.payload) for part in parts)
        fields = {"seq": update.seq, "base": update.base, "parts": len(parts), "bytes": size, "offered": offered}
        verb = "offered" if offered else "sent"
        log = Log(event=verb, text=f"{verb} the update on version {update.base} ({size} bytes)", fields=fields)
        return [*parts, log]

    def granted(self, grant: Grant, grant_seq: int, now: float) -> list[Publish]:
        """The parts that are asked for; a grant that was answered already, or an older one, asks for none."""
        update = self.memory.kept.outstanding
        if update is None or grant_seq <= self._grant_seq:
            return []
        self._grant_seq = grant_seq
        parts = self.member.update(update)
        wanted = {part for first, last in grant.parts for part in range(first, min(last + 1, len(parts)))}
        self.sending.granted(grant.deadline_s, now)
        return [parts[part] for part in sorted(wanted)]

    def answered(self, receipt: Receipt, schema: Schema, now: float) -> list[Action]:
        """Do what the aggregator's answer asks for."""
        kept = self.memory.kept
        update = kept.outstanding
        if update is None:
            return []
        fields = {"seq": update.seq, "base": update.base, "outcome": receipt.outcome, "version": receipt.version}
        if receipt.outcome == "busy":
            self.sending.busy(receipt.retry_after_s, now)
            text = f"the aggregator is busy; the update on version {update.base} waits"
            return [Log(event="busy", text=text, fields=fields)]
        if is_behind(update, receipt):
            self.memory.skip(receipt.highest_seq)
            self._keep(self._renumbered(update))
            self.sending.wanted(now)
            return [
                Log(event="renumbered", text="the sequence numbers were behind; sent under a new one", fields=fields)
            ]
        answered = self._noted(update, receipt.outcome, receipt.version)
        self.memory.replaced(settled(kept, update, receipt, schema), answered)
        return [Log(event=receipt.outcome, text=sentence(receipt, update), fields={**fields, "reason": receipt.reason})]

    def _noted(self, update: OutstandingUpdate, outcome: str, version: int) -> AnsweredUpdate:
        digest = self.member.digest(update)
        key = self.member.key
        return AnsweredUpdate(
            seq=update.seq, base=update.base, outcome=outcome, version=version, key=key, digest=digest
        )

    def _keep(self, update: OutstandingUpdate, answered: AnsweredUpdate | None = None) -> None:
        self.memory.replaced(replace(self.memory.kept, outstanding=update), answered)

    def _renumbered(self, update: OutstandingUpdate) -> OutstandingUpdate:
        """The same update to be cut, sealed and signed anew under a new sequence number."""
        fresh = replace(update, seq=self.memory.number(), frame_bytes=self.frame_bytes, sealed=b"")
        return sealed(fresh, self.member.key, self.member.seal) if update.sealed else fresh


def _sendable(metrics: Mapping[str, float]) -> dict[str, float]:
    finite = [(name, float(value)) for name, value in metrics.items() if math.isfinite(value)]
    return dict(finite[:ENTRIES_MAX])
