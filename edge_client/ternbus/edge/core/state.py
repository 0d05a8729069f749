"""What a device keeps over a power loss, as one value: counters, the update without an answer, the residual."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ternbus.broker.protocol import ternary
from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.messages import Update
from ternbus.broker.protocol.schema import Schema, Vector
from ternbus.broker.protocol.ternary import Block
from ternbus.edge.plan.privacy import Account

SEQ_BLOCK = 64  # sequence numbers reserved by one write; a crash skips what is left of them
FIRST_SEQ = 2  # 1 is the enrolment's, so that it is the same frame however often it is sent

RENUMBERED = "renumbered"  # in place of an outcome, of a number that will not be used again

Seal = Callable[[bytes], bytes]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OutstandingUpdate:
    """An update that has no receipt yet; everything that makes its frames the same bytes each time."""

    seq: int
    base: int
    samples: int
    metrics: Mapping[str, float]
    codec: str
    encoding: str
    encoded: bytes = field(repr=False)  # the block's content as encoded
    sealed: bytes = field(default=b"", repr=False)  # the sealed box; empty if the plan asks for none
    frame_bytes: int  # it is cut for frames of at most so many

    @property
    def body(self) -> bytes:
        return self.sealed or self.encoded

    @property
    def message(self) -> Update:
        return Update(
            base=self.base,
            samples=self.samples,
            codec=self.codec,
            encoding=self.encoding,
            sealed=bool(self.sealed),
            metrics=self.metrics,
        )

    def block(self, schema: Schema) -> Block:
        """The change that it carries."""
        return Block.read(schema, self.codec, self.encoding, self.encoded)


def prepare(  # what an update is, all of it named at the call
    block: Block,
    *,
    seq: int,
    base: int,
    samples: int,
    metrics: Mapping[str, float],
    frame_bytes: int,
) -> OutstandingUpdate:
    """An update ready to be sent, compressed where that makes it smaller."""
    compressed = ternary.encode(block.content, ternary.ZSTD)
    smaller = len(compressed) < len(block.content)
    return OutstandingUpdate(
        seq=seq,
        base=base,
        samples=samples,
        metrics=metrics,
        codec=block.codec,
        encoding=ternary.ZSTD if smaller else ternary.RAW,
        encoded=compressed if smaller else block.content,
        frame_bytes=frame_bytes,
    )


def sealed(update: OutstandingUpdate, key: KeyId, seal: Seal) -> OutstandingUpdate:
    """The same with its body in a sealed box that binds it to key and sequence number."""
    return replace(update, sealed=seal(key + update.seq.to_bytes(8, "little") + update.encoded))


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredUpdate:
    """A receipt for an update, as it is remembered; or that it was given another number."""

    seq: int
    base: int
    outcome: str
    version: int
    key: KeyId
    digest: bytes = field(repr=False)  # of the message, as the aggregator's log of merges has it


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class State:
    """The device's memory. ``key`` owns the sequence numbers, the session and the enrolment."""

    key: KeyId
    enrolled: bool = False
    seq_limit: int = FIRST_SEQ  # no number from here on has been used
    session: int = 0
    head_version: int = 0  # the highest head that was accepted
    head_seq: int = 0
    head_digest: bytes = b""  # the model's, in that head
    answered_base: int = -1  # no update on this version or an older one is wanted any more
    evaluated: int = -1
    accepted: int = 0  # how many updates were
    schema: bytes = field(default=b"", repr=False)
    residual: Vector | None = field(default=None, repr=False)  # what updates have not carried yet; None is zero
    outstanding: OutstandingUpdate | None = None
    protected: str = ""  # the kind of privacy that outstanding and residual were made under
    account: Account = field(default_factory=Account)

    def under(self, key: KeyId) -> "State":
        """The same for a device that has this key: a new key counts anew and must be enrolled."""
        if key == self.key:
            return self
        return replace(self, key=key, enrolled=False, seq_limit=FIRST_SEQ, session=0)

    def with_seq_limit(self, seq_limit: int) -> "State":
        return replace(self, seq_limit=seq_limit)
