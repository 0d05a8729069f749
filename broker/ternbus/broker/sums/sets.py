"""What the aggregator asks helpers, and what they answer: the sum of the masks of one set of updates."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Final, Self

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import meta_fields
from ternbus.broker.protocol.frame import HEADER_BYTES_MAX, MAGIC, SIGNATURE_BYTES, Frame, parse
from ternbus.broker.protocol.identity import is_device, key_id
from ternbus.broker.protocol.messages import Update
from ternbus.broker.protocol.parts import header_digest
from ternbus.broker.sums import canonical
from ternbus.broker.sums.terms import TERMS_BYTES_MAX, Terms, context, digest_of
from ternbus.broker.sums.words import DEVICES_MAX

SET_PREFIX: Final = b"ternbus/1 set\0"
PREPARE, OPEN, ABANDON = "prepare", "open", "abandon"
STEPS: Final = (PREPARE, OPEN, ABANDON)
PREPARED, OPENED, ABANDONED, REFUSED = "prepared", "opened", "abandoned", "refused"
ANSWERS: Final = (PREPARED, OPENED, ABANDONED, REFUSED)
NAMED_MAX: Final = 50  # updates that a refusal names
REASON_BYTES_MAX: Final = 200
ASK_BYTES_MAX: Final = TERMS_BYTES_MAX + 1024 + DEVICES_MAX * (HEADER_BYTES_MAX + 128)
_ASK_KEYS: Final = ("version", "model", "plan", "terms", "members")


@dataclass(frozen=True, slots=True, kw_only=True)
class SetMember:
    """An update of a set as the helper sees it: the device's public key, and part 0's signed header."""

    public: bytes
    header: bytes
    signature: bytes

    @classmethod
    def of(cls, public: bytes, first_part: Frame) -> Self:
        return cls(public=public, header=first_part.header, signature=first_part.signature)

    @property
    def digest(self) -> bytes:
        """Of the header."""
        return header_digest(self.header)

    def frame(self) -> Frame:
        """The frame without its body; ProtocolError for a malformed header. Its signature is not verified."""
        return parse(b"".join((MAGIC, struct.pack("<I", len(self.header)), self.header, self.signature)))


@dataclass(frozen=True, kw_only=True)
class Ask:
    """The body of the message `ask`, the same for `prepare` and `open`; of `abandon` it is empty.

    ``plan`` is the digest of the plan's bytes in the head of ``version``, ``model`` that of its vector. With terms of
    the kind `bfv` that of `open` has a ``sum``: ciphertexts, blinded.
    """

    version: int
    model: bytes
    plan: bytes
    terms: bytes  # as encoded
    members: tuple[SetMember, ...]
    sum: bytes = field(default=b"", repr=False)

    @cached_property
    def context(self) -> bytes:
        return context(version=self.version, model=self.model, plan=self.plan, terms=digest_of(self.terms))

    @cached_property
    def parsed_terms(self) -> Terms:
        """ProtocolError where they are not valid."""
        return Terms.parse(self.terms)

    def content(self) -> bytes:
        """The canonical encoding."""
        rows = [[each.public, each.header, each.signature] for each in self.members]
        values = (self.version, self.model, self.plan, self.terms, rows)
        return canonical.pack(dict(zip(_ASK_KEYS, values, strict=True)) | ({"sum": self.sum} if self.sum else {}))

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Decode an ask; ProtocolError for another form. What the headers and the terms say is not looked at."""
        fields = canonical.unpack(content, canonical.keys_in(content, _ASK_KEYS, "sum"), "ask", ASK_BYTES_MAX)
        rows = fields["members"]
        if not isinstance(rows, list) or not 1 <= len(rows) <= DEVICES_MAX:
            raise ProtocolError("bad-ask", f"'members' is not 1 to {DEVICES_MAX} updates")
        if not isinstance(fields["terms"], bytes):
            raise ProtocolError("bad-ask", "'terms' is not bytes")
        if "sum" in fields and not (isinstance(fields["sum"], bytes) and fields["sum"]):
            raise ProtocolError("bad-ask", "'sum' is not bytes")
        return cls(
            version=meta_fields.counter(fields, "version"),
            model=meta_fields.binary(fields, "model", 32),
            plan=meta_fields.binary(fields, "plan", 32),
            terms=fields["terms"],
            members=tuple(map(_member, rows)),
            sum=fields.get("sum", b""),
        )


def set_digest(context: bytes, headers: Mapping[str, bytes]) -> bytes:
    """The name of a set: BLAKE2b-256 over its context and the digests of part 0's headers, by device name."""
    return digest_of(SET_PREFIX + context + b"".join(headers[device] for device in sorted(headers)))


def _member(row: Any) -> SetMember:
    match row:
        case [bytes(public), bytes(header), bytes(signature)] if (
            len(public) == 32 and len(header) <= HEADER_BYTES_MAX and len(signature) == SIGNATURE_BYTES
        ):
            return SetMember(public=public, header=header, signature=signature)
    raise ProtocolError("bad-ask", "a member is not [public, header, signature]")


@dataclass(frozen=True, slots=True, kw_only=True)
class AskStep:
    """What a helper is asked to do with a set; ``count`` is the highest that the aggregator has seen of it."""

    KIND: ClassVar[str] = "ask"
    step: str
    set: bytes  # digest
    count: int

    def meta(self) -> dict[str, Any]:
        return {"step": self.step, "set": self.set, "count": self.count}

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Self:
        return cls(
            step=meta_fields.one_of(meta, "step", STEPS),
            set=meta_fields.binary(meta, "set", 32),
            count=meta_fields.counter(meta, "count"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A helper's answer; with the outcome `opened` the body is the sum of the masks, else there is none.

    ``count`` is the number of steps that the helper has written down: sets prepared, opened, abandoned. It only grows.
    ``updates`` are devices whose update was refused.
    """

    KIND: ClassVar[str] = "answer"
    outcome: str
    set: bytes
    count: int
    reason: str = ""
    updates: tuple[str, ...] = field(default=())

    def meta(self) -> dict[str, Any]:
        meta: dict[str, Any] = {"outcome": self.outcome, "set": self.set, "count": self.count}
        meta |= {"reason": self.reason} if self.reason else {}
        return meta | ({"updates": list(self.updates)} if self.updates else {})

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> Self:
        return cls(
            outcome=meta_fields.one_of(meta, "outcome", ANSWERS),
            set=meta_fields.binary(meta, "set", 32),
            count=meta_fields.counter(meta, "count"),
            reason=meta_fields.line(meta, "reason", REASON_BYTES_MAX) if "reason" in meta else "",
            updates=_names(meta["updates"]) if "updates" in meta else (),
        )


def _names(value: Any) -> tuple[str, ...]:
    names = value if isinstance(value, list) and len(value) <= NAMED_MAX else None
    if names is None or not all(isinstance(each, str) and is_device(each) for each in names):
        raise ProtocolError("bad-meta", f"'updates' is not at most {NAMED_MAX} names of devices")
    return tuple(names)


def first_part(member: SetMember, federation: str) -> tuple[Frame, Update]:
    """The header of a member, authentic under the public key that comes with it, and the update that it announces.

    ProtocolError for anything but part 0 of a private update of a device in this federation.
    """
    frame = member.frame()
    if frame.federation != federation or frame.kind != Update.KIND or frame.part != 0 or not is_device(frame.sender):
        raise ProtocolError("bad-ask", "a member is not part 0 of a device's update in this federation")
    if frame.key != key_id(member.public):
        raise ProtocolError("unknown-key", f"the header of {frame.sender} names another key than the one beside it")
    frame.check_signature(member.public)
    update = Update.from_meta(frame.meta)
    if not update.is_private:
        raise ProtocolError("bad-ask", f"the update of {frame.sender} is not private")
    return frame, update
