"""The members of the federation: devices, their keys past and present, their invitations, their last answers."""

import hmac
import math
from dataclasses import dataclass, field
from typing import Final

from ternbus.aggregator.core.pace import Pace
from ternbus.aggregator.core.rate_limit import BURST_S, TokenBucket
from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.identity import KeyId, enroll_proof, key_id
from ternbus.broker.protocol.messages import Enroll, Status, is_outdated

ACTIVE, REPLACED, REVOKED = "active", "replaced", "revoked"
UNKNOWN: Final = "unknown"
DEVICE, EVALUATOR = "device", "evaluator"  # roles: who trains, and who measures what versions are worth
HELPER: Final = "helper"  # of private sums: it is no member, and has a name space of its own
ANY: Final = ""  # the role of members from before there were roles: both


@dataclass(frozen=True, slots=True, kw_only=True)
class Invited:
    """An invitation that nobody has used yet."""

    code: str = field(repr=False)
    role: str = DEVICE
    expires_at: float = math.inf  # Unix seconds, by the aggregator's clock


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
    revoked_why: str = ""  # in the operator's words
    bases: set[int] = field(default_factory=set)  # accepted ones that could still be sent again and not be stale
    highest_base: int = -1
    answer: Answer = field(default_factory=Answer)
    role: str = DEVICE
    evaluates: bool = False  # an evaluator, or published test metrics and no update: nobody waits for its updates
    status: Status | None = None
    status_seq: int = -1
    metrics_seq: int = 0
    metrics_bytes: int = 0  # of its evaluations on disk
    metrics_stated: int = 0  # hash of what it last stated beside its metrics' values; 0: not known
    waiting_bytes: int = 0  # of its updates in the buffer, on disk
    update_bytes: int = 0  # PUBLISH packets since the last count was written
    loss: float | None = None  # of its last training, as it says; None: it does not, or not since the start
    epsilon: float | None = None  # that it has spent, as its last update says
    metric: tuple[str, float] | None = None  # the primary one of its last metrics, and its value
    seen_at: float | None = None  # when it was heard, in Unix seconds
    pace: Pace = field(default_factory=Pace)
    frames: TokenBucket = field(default_factory=TokenBucket)
    receipts: TokenBucket = field(default_factory=TokenBucket)
    key: KeyId = field(init=False)

    def __post_init__(self) -> None:
        self.key = key_id(self.public)
        self.evaluates = self.evaluates or self.role == EVALUATOR

    @property
    def online(self) -> bool:
        return self.status is not None and self.status.online

    def heard(self, now: float, clock_s: float) -> None:
        """It has said something; ``clock_s`` is the time of day in Unix seconds, 0 if it is not known."""
        self.pace.heard(now)
        self.seen_at = clock_s or self.seen_at

    @property
    def contributes(self) -> bool:
        """Whether an update may be expected, as far as the device says: it trains, and its training does not fail."""
        return not (self.evaluates or (self.status is not None and self.status.failing))

    @property
    def is_flooding(self) -> bool:
        """Whether the last that was heard of it exceeded its frames; also looked at from another thread, as a hint."""
        return self.frames.is_empty

    @property
    def has_had_receipts(self) -> bool:
        """Whether the last that it sent took the last of its receipts; a hint, too."""
        return self.receipts.is_empty

    def has_accepted(self, base: int, oldest: int) -> bool:
        """Whether an update on ``base`` was accepted from this device before.

        Below ``oldest``, the oldest base that is not stale, single bases are not remembered: whatever is not above
        the highest accepted one counts as accepted. A device makes its next update on a higher version always, so
        only one that came back from an old copy of its disk asks, and it must not put that work in twice.
        """
        return base in self.bases or (base < oldest and base <= self.highest_base)

    def accept(self, base: int, oldest: int) -> None:
        self.bases = {each for each in self.bases if each >= oldest} | {base}
        self.highest_base = max(self.highest_base, base)

    def take_frame(self, now: float, per_s: int) -> None:
        """Let one more frame pass, or raise ProtocolError."""
        if not self.frames.take(now, per_s, per_s * BURST_S):
            raise ProtocolError("too-fast", f"{self.name} sends more than {per_s} frames a second")

    def take_receipt(self, now: float, per_s: int) -> None:
        """Let one more frame be answered, or raise ProtocolError."""
        if not self.receipts.take(now, per_s, per_s * BURST_S):
            raise ProtocolError("too-many-receipts", f"{self.name} asks for more than {per_s} receipts a second")

    def standing(self, key: KeyId) -> tuple[bytes, str]:
        """The public key of a key id that this device has or had, and whether it is active, replaced or revoked."""
        if key == self.key:
            return self.public, REVOKED if self.revoked else ACTIVE
        return self.old_keys.get(key, (b"", UNKNOWN))

    def observe(self, status: Status, seq: int) -> bool:
        """Take in a status; return whether it is news. ProtocolError for one of an earlier session: a replay."""
        known = self.status
        if known is not None:
            if is_outdated(status, seq, known, self.status_seq):
                return False
            same_offline = known.state == status.state == "offline"
            if status.session == known.session and (same_offline or (status.online and seq == self.status_seq)):
                return False  # it was heard before
        self.status, self.status_seq = status, seq
        return True


def key_in(frame: Frame) -> bytes:
    """The public key in an enroll, which it is signed by; ProtocolError where it is not."""
    public = Enroll.from_meta(frame.meta).public_key
    if key_id(public) != frame.key:
        raise ProtocolError("unknown-key", "an enroll signed by another key than the one in it")
    frame.check_authentic(public)
    return public


def check_code(invited: Invited | None, frame: Frame, federation: str, public: bytes, clock_s: float) -> None:
    """Raise ProtocolError('refused', why) unless an enroll proves that its sender has the code of the invitation."""
    if invited is None:
        raise ProtocolError("refused", "no open invitation for this device: spent, cancelled or never made")
    if clock_s >= invited.expires_at:
        raise ProtocolError("refused", "the invitation has expired")
    if not hmac.compare_digest(enroll_proof(invited.code, federation, frame.sender, public), frame.body):
        raise ProtocolError("refused", "the code is not the invitation's")


@dataclass(slots=True)
class Registry:
    """All members by name, and the codes of invitations that are open."""

    federation: str
    members: dict[str, Member] = field(default_factory=dict)
    codes: dict[str, Invited] = field(default_factory=dict)
    retired: set[bytes] = field(default_factory=set)  # public keys, replaced or revoked, that never return to anybody
    # Kept apart from ``members``: it is looked at after each event, when most of a large fleet may be offline.
    online: dict[str, Member] = field(default_factory=dict)

    def admit(self, frame: Frame, clock_s: float) -> tuple[bytes, bool]:
        """Check an enroll; return (public key, whether it is new). ProtocolError('refused', why) to be answered.

        ``clock_s`` is the time by which invitations end, in Unix seconds.
        """
        public = key_in(frame)
        member = self.members.get(frame.sender)
        if member is not None and member.public == public and not member.revoked:
            if member.proof and hmac.compare_digest(member.proof, frame.body):
                return public, False
            raise ProtocolError("refused", "this key is enrolled; its invitation is spent")
        if public in self.retired:
            raise ProtocolError("refused", "a key that was replaced or revoked does not return")
        check_code(self.codes.get(frame.sender), frame, self.federation, public, clock_s)
        return public, True

    def observe(self, member: Member, status: Status, seq: int) -> bool:
        """Take in a member's status; return whether it is news."""
        if not member.observe(status, seq):
            return False
        if member.online:
            self.online[member.name] = member
        else:
            self.online.pop(member.name, None)
        return True

    def enroll(self, device: str, public: bytes, proof: bytes) -> Member:
        """Make ``public`` the device's key; what belonged to the key before is forgotten, its bases are not.

        Its role is what its open invitation says.
        """
        before = self.members.get(device)
        member = Member(name=device, public=public, proof=proof, role=self.codes[device].role)
        if before is not None:
            state = REVOKED if before.revoked else REPLACED
            member.old_keys = before.old_keys | {before.key: (before.public, state)}
            member.bases, member.highest_base = before.bases, before.highest_base
            member.waiting_bytes, member.metrics_bytes = before.waiting_bytes, before.metrics_bytes
            self.retired.add(before.public)
        self.members[device] = member
        self.online.pop(device, None)
        self.close(device)
        return member

    def revoke(self, member: Member, why: str) -> None:
        """Take the device's key from it, and an invitation that it might use to come back."""
        member.revoked, member.revoked_why = True, why
        self.retired.add(member.public)
        self.online.pop(member.name, None)
        self.close(member.name)

    def revoked_keys(self) -> frozenset[tuple[str, bytes]]:
        """(device, public key) of all that are void for good; those that were only replaced are not among them."""
        old = {
            (member.name, public)
            for member in self.members.values()
            for public, state in member.old_keys.values()
            if state == REVOKED
        }
        return frozenset(old | {(member.name, member.public) for member in self.members.values() if member.revoked})

    def revoke_key(self, device: str, public: bytes) -> None:
        """Take a key from a device, whether it is the present one, an older one, or not known here at all."""
        member = self.members.get(device)
        if member is None:
            member = self.members[device] = Member(name=device, public=public)
        if member.public == public:
            self.revoke(member, "")
        else:
            member.old_keys[key_id(public)] = (public, REVOKED)
            self.retired.add(public)

    def close(self, device: str) -> None:
        """A device's invitation is spent, or is no longer wanted."""
        self.codes.pop(device, None)
