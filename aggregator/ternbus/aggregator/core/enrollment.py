"""The keys of devices: invitations, enrolments and revocations."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from ternbus.aggregator.core import records
from ternbus.aggregator.core.events import Action, Log, RevokeRequested, Save
from ternbus.aggregator.core.rate_limit import BURST_S, MINUTE_S, TokenBucket
from ternbus.aggregator.core.refusals import Refusals
from ternbus.aggregator.core.registry import ACTIVE, EVALUATOR, REVOKED, UNKNOWN, Invited, Member, Registry
from ternbus.aggregator.core.updates import Updates
from ternbus.aggregator.core.validation import Verdict
from ternbus.aggregator.core.work import LARGE_BODY_BYTES, LARGE_HEADER_BYTES
from ternbus.aggregator.settings import Settings
from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.broker.protocol.frame import Frame, header_bytes
from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.messages import Status, Update
from ternbus.broker.protocol.model_messages import Delta, Head, Snapshot
from ternbus.broker.protocol.topics import TERMS
from ternbus.broker.spelling import meant

NOT_KNOWN: Final = "this aggregator does not know this key: it may have been restored from before the device joined"


@dataclass(slots=True, kw_only=True)
class Enrollment:
    """Decides by the registry, and returns the actions that follow, in order."""

    settings: Settings
    registry: Registry
    updates: Updates
    refusals: Refusals
    _tries: dict[str, TokenBucket] = field(default_factory=dict)  # of names that are invited or have a key
    _guests: dict[str, TokenBucket] = field(default_factory=dict)  # of frames, for invited names without a key
    _strangers: TokenBucket = field(default_factory=TokenBucket)
    _own: TokenBucket = field(default_factory=TokenBucket)  # of frames on the aggregator's own topics
    _answers: TokenBucket = field(default_factory=TokenBucket)  # to keys that are not known

    def take_frame(self, name: str, now: float) -> None:
        """Count one more frame on a topic of this name; ProtocolError if the name has sent too many.

        A device with a valid key has the rate of the protocol. A revoked device and an invited one have a low rate
        each. All other names together have one low rate.
        """
        limits, member = self.settings.limits, self.registry.members.get(name)
        if member is not None:
            member.take_frame(now, limits.refusals_per_s if member.revoked else limits.frames_per_s)
        elif name in self.registry.codes:
            guest = self._guests.setdefault(name, TokenBucket())
            if not guest.take(now, limits.refusals_per_s, limits.refusals_per_s * BURST_S):
                raise ProtocolError("too-fast", f"{name} sends more than {limits.refusals_per_s} frames a second")
        elif not self._strangers.take(now, limits.refusals_per_s, limits.refusals_per_s):
            raise ProtocolError("too-fast", f"unknown names send more than {limits.refusals_per_s} frames a second")

    def take_own(self, kind: str, payload: bytes, now: float) -> None:
        """Count one more frame on the aggregator's own topics; ProtocolError if it is not to be read.

        Without an access list anybody may write there. All of it has the rate of a device, but for parts of snapshots,
        deltas and terms: they come as fast as they are asked for, and of others few are read (`Retained`). Only a head,
        with its plan, has a large header; it is read for a moment after a connect.
        """
        per_s = self.settings.limits.frames_per_s
        if kind not in {Snapshot.KIND, Delta.KIND, TERMS} and not self._own.take(now, per_s, per_s * BURST_S):
            raise ProtocolError("too-fast", f"more than {per_s} frames a second on the aggregator's own topics")
        if kind != Head.KIND and header_bytes(payload) > LARGE_HEADER_BYTES:
            raise ProtocolError("header-too-long", f"{header_bytes(payload)} bytes, in a {kind} of the aggregator")

    def authenticate(
        self, frame: Frame, verified: bytes, now: float, *, is_late: bool = False
    ) -> Member | list[Action]:
        """The member whose present key signed this frame; ProtocolError with the reason for anybody else.

        ``verified`` is a public key under which the frame was found authentic already. A revoked key is told so, as
        often as its device may have receipts, once its signature verifies. A key that is not known is told so at a low
        rate. In both cases the answer is what is returned. So is `busy` where messages are late, for a large body of a
        device with a debt of work, which is not hashed.
        """
        member = self.registry.members.get(frame.sender)
        if member is None:
            return self._unknown(frame, ProtocolError("unknown-device", frame.sender), now)
        public, state = member.standing(frame.key)
        if state == ACTIVE:
            if public != verified:
                frame.check_signature(public)
                if is_late and len(frame.body) > LARGE_BODY_BYTES and self.updates.owes(member, frame, now):
                    return self._shed(member, frame, now)
            if frame.body:  # its work is that of the key's owner from here on, also if the digest is wrong
                self.updates.work.charge(member.name, len(frame.body), now)
            if public != verified:
                frame.check_digest()
            return member
        error = ProtocolError(f"{state}-key", f"{frame.sender} signs with a key that is not its present one")
        if state == UNKNOWN:
            return self._unknown(frame, error, now)
        if state != REVOKED:
            raise error
        self.updates.afford(member, now)
        frame.check_authentic(public)
        receipt = self._tell_revoked(member, frame.key, frame.seq)
        return [*receipt, *self.refusals.drop(f"{frame.kind} of {frame.sender}", error, now)]

    def _unknown(self, frame: Frame, error: ProtocolError, now: float) -> list[Action]:
        """Tell the holder of a key that it is not known here, as after a restore from before it joined.

        Whether the frame is authentic nobody here can tell, so all of them together have a low rate of answers, and a
        device believes one only for a number that it has used under this key. An invited device may say who it is
        before it is enrolled; what only members send is answered.
        """
        per_s = self.settings.limits.refusals_per_s
        joins = frame.kind == Status.KIND and frame.sender in self.registry.codes
        if joins or frame.part > 0 or not self._answers.take(now, per_s, per_s):
            raise error
        receipt = self.updates.receipt(frame.sender, frame.key, frame.seq, Verdict("unknown", NOT_KNOWN))
        return [*receipt, *self.refusals.drop(f"{frame.kind} of {frame.sender}", error, now)]

    def _shed(self, member: Member, frame: Frame, now: float) -> list[Action]:
        """Answer an update once, and drop the rest."""
        if frame.kind != Update.KIND or frame.part > 0:
            raise ProtocolError(
                "too-much-work", f"{member.name} has used its share of the work, and sends large bodies"
            )
        self.updates.afford(member, now)
        return self.updates.shed(member, frame.seq, now)

    def enroll(self, frame: Frame, now: float, clock_s: float) -> list[Action]:
        """Admit a key, or answer why not. ``clock_s`` is the time of day, in Unix seconds."""
        self._limit(frame.sender, now)
        try:
            public, is_new = self.registry.admit(frame, clock_s)
        except ProtocolError as error:
            if error.reason != "refused":
                raise
            refused = self.refusals.refuse("refused-enroll", f"{frame.sender} may not enroll: {error.detail}", now)
            return [
                *refused,
                *self.updates.receipt(frame.sender, frame.key, frame.seq, Verdict("refused", error.detail)),
            ]
        admitted = self._admit(frame, public) if is_new else []
        return [*admitted, *self.updates.receipt(frame.sender, frame.key, frame.seq, Verdict("enrolled"))]

    def _admit(self, frame: Frame, public: bytes) -> list[Action]:
        before = self.registry.members.get(frame.sender)
        if before is not None:
            self.updates.forget(before)
        member = self.registry.enroll(frame.sender, public, frame.body)
        how = " as an evaluator" if member.role == EVALUATOR else ""
        return [
            Save(record=records.DeviceEnrolled(device=member.name, public=public, proof=frame.body, role=member.role)),
            Log(
                text=f"{member.name} enrolled{how}{'' if before is None else ' with a new key'}",
                event="enrolled",
                fields={"device": member.name, "role": member.role},
            ),
        ]

    def _limit(self, name: str, now: float) -> None:
        """Limit enrollment attempts: one bucket per known name; `take_frame` limits all other names."""
        if name not in self.registry.members and name not in self.registry.codes:
            return
        per_minute = self.settings.limits.enrolments_per_minute
        if not self._tries.setdefault(name, TokenBucket()).take(now, per_minute / MINUTE_S, per_minute):
            raise ProtocolError("too-many-enrolments", f"{name} tries too often")

    def invite(self, codes: Mapping[str, Invited]) -> None:
        """These are the open invitations now."""
        registry = self.registry
        registry.codes = dict(codes)
        self._guests = {name: bucket for name, bucket in self._guests.items() if name in codes}
        self._tries = {
            name: bucket for name, bucket in self._tries.items() if name in registry.members or name in codes
        }

    def cancel(self, device: str) -> list[Action]:
        """Make an invitation void; ConfigError where there is none."""
        if device not in self.registry.codes:
            raise ConfigError(
                f"{device} has no open invitation: see `ternbus aggregator invitations`, and `devices` if it joined"
            )
        self.registry.close(device)
        return [
            Save(record=records.InvitationCancelled(device=device)),
            Log(text=f"the invitation of {device} is cancelled"),
        ]

    def revoke(self, event: RevokeRequested) -> list[Action]:
        """Take a device's key from it, from this frame on; ConfigError where it has none."""
        member = self.registry.members.get(event.device)
        if member is None:
            raise ConfigError(
                f"{event.device} has not joined{meant(event.device, self.registry.members)}; an invitation is "
                "cancelled with `ternbus aggregator invitations`"
            )
        is_told = member.online and not member.revoked  # at once: in a paused federation it says nothing itself
        self.registry.revoke(member, event.why)
        self.updates.forget(member)
        dropped = not event.keep and self.updates.drop(member, event.buffer)
        return [
            Save(record=records.DeviceRevoked(device=member.name, why=event.why, drop=dropped)),
            Log(
                text=f"{member.name} is revoked{f': {event.why}' if event.why else ''}",
                event="revoked",
                fields={"device": member.name},
            ),
            *(self._tell_revoked(member, member.key, member.status_seq) if is_told else []),
        ]

    def _tell_revoked(self, member: Member, key: KeyId, seq: int) -> list[Action]:
        """The answer to the message with this number under a key that was revoked."""
        why = member.revoked_why or "this key was revoked"
        return self.updates.receipt(member.name, key, seq, Verdict("revoked", why))
