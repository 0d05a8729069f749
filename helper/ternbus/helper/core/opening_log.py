"""The helper's log: one signed entry for each set that it opened, with the hash of the entry before it.

Beside the aggregator's log of merges it shows sets that were opened and merged nowhere.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final, Self

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import meta_fields
from ternbus.broker.protocol.frame import SIGNATURE_BYTES
from ternbus.broker.protocol.identity import Identity, is_device, verify
from ternbus.broker.sums import canonical
from ternbus.broker.sums.words import DEVICES_MAX

SIGNED_PREFIX: Final = b"ternbus/1 helper log\0"
FIRST: Final = bytes(32)  # the previous hash in the first entry
ENTRY_BYTES_MAX: Final = 1024 + 256 * DEVICES_MAX
_KEYS: Final = ("federation", "helper", "number", "count", "set", "context", "base", "members", "previous")


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """A set that was opened. ``members`` has the digest of part 0's header for each device name, in their order."""

    federation: str
    helper: str
    number: int  # of the entry, from 1
    count: int  # as in the answer
    digest: bytes  # of the set
    context: bytes
    base: int
    members: tuple[tuple[str, bytes], ...]
    previous: bytes

    def content(self) -> bytes:
        """The canonical encoding."""
        values = (
            self.federation, self.helper, self.number, self.count, self.digest, self.context, self.base,
            [list(member) for member in self.members], self.previous,
        )  # fmt: skip
        return canonical.pack(dict(zip(_KEYS, values, strict=True)))

    def signed(self, identity: Identity) -> "SignedOpening":
        content = self.content()
        return SignedOpening(content=content, signature=identity.sign(SIGNED_PREFIX + content))

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Decode an entry; ProtocolError for another form."""
        fields = canonical.unpack(content, _KEYS, "entry", ENTRY_BYTES_MAX)
        rows = fields["members"]
        if not isinstance(rows, list):
            raise ProtocolError("bad-entry", "'members' is not an array")
        return cls(
            federation=meta_fields.text(fields, "federation"),
            helper=meta_fields.text(fields, "helper"),
            number=meta_fields.counter(fields, "number", 1),
            count=meta_fields.counter(fields, "count"),
            digest=meta_fields.binary(fields, "set", 32),
            context=meta_fields.binary(fields, "context", 32),
            base=meta_fields.counter(fields, "base"),
            members=tuple(map(_member, rows)),
            previous=meta_fields.binary(fields, "previous", 32),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedOpening:
    """An entry's bytes and the helper's signature over them."""

    content: bytes = field(repr=False)
    signature: bytes = field(repr=False)

    @property
    def hash(self) -> bytes:
        """BLAKE2b-256 of the content, which the next entry contains as ``previous``."""
        return blake2b(self.content, digest_size=32).digest()

    def pack(self) -> bytes:
        return self.content + self.signature

    @classmethod
    def unpack(cls, packed: bytes) -> Self:
        return cls(content=packed[:-SIGNATURE_BYTES], signature=packed[-SIGNATURE_BYTES:])


def checked(packed: Iterable[bytes], public: bytes) -> Iterator[Opening]:
    """The entries of a whole log, in order; ProtocolError at the first that is not the helper's or not the next one."""
    previous = FIRST
    for number, each in enumerate(packed, 1):
        signed = SignedOpening.unpack(each)
        verify(public, SIGNED_PREFIX + signed.content, signed.signature)
        entry = Opening.parse(signed.content)
        if (entry.number, entry.previous) != (number, previous):
            raise ProtocolError("bad-chain", f"entry {entry.number} is not the one behind entry {number - 1}")
        previous = signed.hash
        yield entry


def _member(row: Any) -> tuple[str, bytes]:
    match row:
        case [str(device), bytes(digest)] if is_device(device) and len(digest) == 32:
            return device, digest
    raise ProtocolError("bad-entry", "a member is not [device, digest]")
