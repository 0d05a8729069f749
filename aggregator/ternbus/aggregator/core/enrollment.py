"""The door: who comes in, under which key, and who is put out; invitations, enrolments, revocations."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ternbus.aggregator.core import events, records
from ternbus.aggregator.core.rate_limit import MINUTE_S, TokenBucket
from ternbus.aggregator.core.registry import ACTIVE, REVOKED, Invited, Member, Registry
from ternbus.aggregator.core.updates import Updates
from ternbus.aggregator.core.validation import Verdict
from ternbus.aggregator.settings import Settings
from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.frame import Frame


@dataclass(slots=True, kw_only=True)
class Enrollment:
    """Decides by the registry; ``do`` takes the actions that follow, ``refuse`` a reason and a line about it."""

    settings: Settings
    registry: Registry
    desk: Updates
    do: Callable[[events.Action], None]
    refuse: Callable[[str, str], None]
    _tries: dict[str, TokenBucket] = field(default_factory=dict)  # of names that are invited or have a key
    _strangers: TokenBucket = field(default_factory=TokenBucket)

    def authenticate(self, frame: Frame, verified: bytes, now: float) -> Member:
        """The member whose present key signed this frame; ProtocolError with the reason for anybody else.

        ``verified`` is a public key under which the frame was found authentic already. A revoked key is told so, as
        often as its device may have receipts, once its signature verifies.
        """
        member = self.registry.members.get(frame.sender)
        if member is None:
            raise ProtocolError("unknown-device", frame.sender)
        public, state = member.standing(frame.key)
        if state == REVOKED:
            self.desk.afford(member, now)
            frame.check_authentic(public)
            why = member.revoked_why or "this key was revoked"
            self.desk.receipt(frame.sender, frame.key, frame.seq, Verdict("revoked", why))
        if state != ACTIVE:
            raise ProtocolError(f"{state}-key", f"{frame.sender} signs with a key that is not its present one")
        if public != verified:
            frame.check_authentic(public)
        return member

    def enroll(self, frame: Frame, now: float, clock_s: float) -> None:
        """Admit a key, or say why not. ``clock_s`` is the time of day, in Unix seconds."""
        self._pace(frame.sender, now)
        try:
            public, is_new = self.registry.admit(frame, clock_s)
        except ProtocolError as error:
            if error.reason != "refused":
                raise
            self.refuse("refused-enroll", f"{frame.sender} may not enroll: {error.detail}")
            self.desk.receipt(frame.sender, frame.key, frame.seq, Verdict("refused", error.detail))
            return
        if is_new:
            self._admit(frame, public)
        self.desk.receipt(frame.sender, frame.key, frame.seq, Verdict("enrolled"))

    def _admit(self, frame: Frame, public: bytes) -> None:
        before = self.registry.members.get(frame.sender)
        if before is not None:
            self.desk.forget(before)
        self.registry.enroll(frame.sender, public, frame.body)
        self.do(events.Save(record=records.DeviceEnrolled(device=frame.sender, public=public, proof=frame.body)))
        self.do(events.Log(text=f"{frame.sender} enrolled{'' if before is None else ' with a new key'}"))

    def _pace(self, name: str, now: float) -> None:
        """Each name that is expected has a bucket of its own, so that strangers, who share one, cannot empty it."""
        limits = self.settings.limits
        if name in self.registry.members or name in self.registry.codes:
            per_minute = limits.enrolments_per_minute
            passes = self._tries.setdefault(name, TokenBucket()).take(now, per_minute / MINUTE_S, per_minute)
        else:
            passes = self._strangers.take(now, limits.refusals_per_s, limits.refusals_per_s)
        if not passes:
            raise ProtocolError("too-many-enrolments", f"{name} tries too often")

    def invite(self, codes: Mapping[str, Invited]) -> None:
        """These are the open invitations now."""
        registry = self.registry
        registry.codes = dict(codes)
        self._tries = {
            name: bucket for name, bucket in self._tries.items() if name in registry.members or name in codes
        }

    def cancel(self, device: str) -> str:
        """Make an invitation void; what stands against it, in one line."""
        if device not in self.registry.codes:
            return f"{device} has no open invitation: see `ternbus aggregator invitations`, and `devices` if it joined"
        self.registry.close(device)
        self.do(events.Save(record=records.InvitationCancelled(device=device)))
        self.do(events.Log(text=f"the invitation of {device} is cancelled"))
        return ""

    def revoke(self, event: events.RevokeRequested) -> str:
        """Put a device out, from this frame on; what stands against it, in one line."""
        member = self.registry.members.get(event.device)
        if member is None:
            return f"{event.device} has not joined; an invitation is cancelled with `ternbus aggregator invitations`"
        self.registry.revoke(member, event.why)
        self.desk.forget(member)
        dropped = not event.keep and self.desk.drop(member, event.buffer)
        self.do(events.Save(record=records.DeviceRevoked(device=member.name, why=event.why, drop=dropped)))
        self.do(events.Log(text=f"{member.name} is revoked{f': {event.why}' if event.why else ''}"))
        return ""
