"""Who belongs: devices, their keys past and present, their invitations, and what each was last told."""

import hmac
import math
from dataclasses import dataclass, field
from typing import Final

from broker.errors import ProtocolError
from broker.frame import Frame
from broker.identity import KeyId, enroll_proof, key_id
from broker.messages import Enroll, Status
from broker.parts import Collector

ACTIVE, REPLACED, REVOKED = "active", "replaced", "revoked"
BURST_S: Final = 2.0  # a device may send so many seconds' worth of frames at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The highest sequence number answered under a key, and the answer, which the same number gets again."""

    seq: int = 0
    outcome: str = ""
    reason: str = ""


@dataclass(slots=True, kw_only=True)
class Member:
    """One device: what survives a key change, what belongs to its present key, and what is only a hint."""

    name: str
    public: bytes
    proof: bytes = b""
    old_keys: dict[KeyId, tuple[bytes, str]] = field(default_factory=dict)  # key id -> (public, replaced|revoked)
    revoked: bool = False
    bases: set[int] = field(default_factory=set)  # accepted ones that could still be sent again and not be stale
    highest_base: int = -1
    answer: Answer = field(default_factory=Answer)
    granted: int = -1  # the seq whose parts were asked for
    evaluates: bool = False  # it published test metrics and no update: nobody waits for its updates
    status: Status | None = None
    status_seq: int = -1
    metrics_seq: int = 0
    update_bytes: int = 0  # PUBLISH packets since the last count was written
    collector: Collector | None = None
    tokens: float = 0.0
    tokens_at: float = -math.inf
    key: KeyId = field(init=False)

    def __post_init__(self) -> None:
        self.key = key_id(self.public)

    @property
    def online(self) -> bool:
        return self.status is not None and self.status.state != "offline"

    def has_accepted(self, base: int, oldest: int) -> bool:
        """Whether an update on ``base`` was accepted from this device before.

        Below ``oldest``, the oldest base that is not stale, single bases are not remembered: whatever is not above
        the highest accepted one counts as accepted. A device makes its next update on a higher version always, so
        only one that came back from an old copy of its disk asks, and it must not put that work in twice.
        """
        return base in self.bases or (base < oldest and base <= self.highest_base)

    def accept(self, base: int, oldest: int) -> None:
        self.bases = {kept for kept in self.bases if kept >= oldest} | {base}
        self.highest_base = max(self.highest_base, base)

    def take_token(self, now: float, per_s: int) -> None:
        """Let one more frame pass, or raise ProtocolError: a token bucket."""
        self.tokens = min(per_s * BURST_S, self.tokens + (now - self.tokens_at) * per_s)
        self.tokens_at = now
        if self.tokens < 1:
            raise ProtocolError("too-fast", f"{self.name} sends more than {per_s} frames a second")
        self.tokens -= 1

    def observe(self, status: Status, seq: int) -> bool:
        """Take in a status unless it is older than what is known; return whether it is news."""
        known = self.status
        if known is not None:
            if status.session < known.session:
                return False
            if status.session == known.session and (
                known.state == "offline" or (status.state != "offline" and seq <= self.status_seq)
            ):
                return False
        self.status, self.status_seq = status, seq
        return True


@dataclass(slots=True)
class Registry:
    """All members by name, and the codes of invitations that are open."""

    federation: str
    members: dict[str, Member] = field(default_factory=dict)
    codes: dict[str, str] = field(default_factory=dict)
    online: set[str] = field(default_factory=set)  # asked for at each event, when most of a large fleet may be asleep

    def authenticate(self, frame: Frame, verified: bytes = b"") -> Member:
        """The member whose present key signed this frame; ProtocolError with the reason for anybody else.

        ``verified`` is a public key under which the frame was found authentic already.
        ``revoked-key`` is raised only once the signature verifies under a key that was revoked for this device.
        """
        member = self.members.get(frame.sender)
        if member is None:
            raise ProtocolError("unknown-device", frame.sender)
        if frame.key == member.key and not member.revoked:
            if member.public != verified:
                frame.check_authentic(member.public)
            return member
        public, state = (
            (member.public, REVOKED) if frame.key == member.key else member.old_keys.get(frame.key, (b"", "unknown"))
        )
        if state == REVOKED:
            frame.check_authentic(public)
            raise ProtocolError("revoked-key", frame.sender)
        raise ProtocolError(f"{state}-key", f"{frame.sender} signs with a key that is not its present one")

    def admit(self, frame: Frame) -> tuple[bytes, bool]:
        """Check an enroll; return (public key, whether it is new). ProtocolError('refused', why) to be answered."""
        public = Enroll.from_meta(frame.meta).public_key
        if key_id(public) != frame.key:
            raise ProtocolError("unknown-key", "an enroll signed by another key than the one in it")
        frame.check_authentic(public)
        member = self.members.get(frame.sender)
        if member is not None and member.public == public and not member.revoked:
            if member.proof and hmac.compare_digest(member.proof, frame.body):
                return public, False
            raise ProtocolError("refused", "this key is enrolled; its invitation is spent")
        if member is not None and (member.public == public or key_id(public) in member.old_keys):
            raise ProtocolError("refused", "a key that was replaced or revoked does not return")
        code = self.codes.get(frame.sender)
        if code is None:
            raise ProtocolError("refused", "no open invitation for this device: spent, expired or never made")
        if not hmac.compare_digest(enroll_proof(code, self.federation, frame.sender, public), frame.body):
            raise ProtocolError("refused", "the code is not the invitation's")
        return public, True

    def observe(self, member: Member, status: Status, seq: int) -> bool:
        """Take in a member's status; return whether it is news."""
        if not member.observe(status, seq):
            return False
        if member.online:
            self.online.add(member.name)
        else:
            self.online.discard(member.name)
        return True

    def enroll(self, device: str, public: bytes, proof: bytes) -> Member:
        """Make ``public`` the device's key; what belonged to the key before is forgotten, its bases are not."""
        before = self.members.get(device)
        member = Member(name=device, public=public, proof=proof)
        if before is not None:
            state = REVOKED if before.revoked else REPLACED
            member.old_keys = before.old_keys | {before.key: (before.public, state)}
            member.bases, member.highest_base = before.bases, before.highest_base
        self.members[device] = member
        self.online.discard(device)
        self.codes.pop(device, None)
        return member
