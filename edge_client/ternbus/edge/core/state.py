"""What a device keeps over a power loss, as one value: counters, the outstanding update, the residual."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from ternbus.broker.protocol import ternary
from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.messages import Update
from ternbus.broker.protocol.schema import Schema, Vector
from ternbus.broker.protocol.ternary import Block
from ternbus.edge.plan.privacy import Account

SEQ_BLOCK = 64  # sequence numbers reserved by one write; a crash skips what is left of them
FIRST_SEQ = 2  # 1 is the enrollment's, so that it is the same frame however often it is sent

RENUMBERED = "renumbered"  # in place of an outcome: the update was sent again under another number

Seal = Callable[[bytes], bytes]  # plain bytes to a sealed box


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OutstandingUpdate:
    """An update without a receipt: all that its frames are made of, so that they are the same bytes each time."""

    seq: int
    base: int
    samples: int
    metrics: Mapping[str, float]
    codec: str
    encoding: str
    encoded: bytes = field(repr=False)  # the block's content as encoded
    sealed: bytes = field(default=b"", repr=False)  # the sealed box; empty without `seal` in the plan
    frame_bytes: int  # the largest frame that it is cut for

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
        """The change to the model that it carries."""
        return Block.read(schema, self.codec, self.encoding, self.encoded)


def prepare(
    block: Block,
    *,
    seq: int,
    base: int,
    samples: int,
    metrics: Mapping[str, float],
    frame_bytes: int,
) -> OutstandingUpdate:
    """An update ready to be sent; its content compressed, where that makes it smaller."""
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
    """An update's receipt, as the device keeps it; or that the update was sent again under another number."""

    seq: int
    base: int
    outcome: str
    version: int
    key: KeyId
    digest: bytes = field(repr=False)  # of the message, as in the aggregator's log of merges; empty: not kept


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class State:
    """What is on the disk. Sequence numbers, session and enrollment belong to ``key``."""

    key: KeyId
    enrolled: bool = False
    seq_limit: int = FIRST_SEQ  # no sequence number from here on has been used
    session: int = 0
    head_version: int = 0  # the highest head that was accepted
    head_seq: int = 0
    head_digest: bytes = b""  # the model's, in that head
    answered_base: int = -1  # updates on this version or an older one are answered
    evaluated: int = -1  # the newest version that was
    accepted: int = 0  # how many updates were
    schema: bytes = field(default=b"", repr=False)
    residual: Vector | None = field(default=None, repr=False)  # of compression, for the next update; None is zero
    outstanding: OutstandingUpdate | None = None
    protected: str = ""  # the plan's `dp`, under which outstanding and residual were made
    account: Account = field(default_factory=Account)

    def with_key(self, key: KeyId) -> "State":
        """The state under this key: a new one counts anew, and must be enrolled."""
        return replace(self, key=key, enrolled=False, seq_limit=FIRST_SEQ, session=0)

    def with_seq_limit(self, seq_limit: int) -> "State":
        return replace(self, seq_limit=seq_limit)
