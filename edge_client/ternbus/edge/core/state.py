"""The durable state of a device, as one value: counters, the outstanding update, the residual."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter, is_not
from typing import Final

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol import ternary
from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.messages import Update
from ternbus.broker.protocol.schema import Schema, Vector
from ternbus.broker.protocol.ternary import Block
from ternbus.edge.plan.privacy import SAMPLE, Account

SEQ_BLOCK = 64  # sequence numbers reserved by one write; a crash skips the rest of the block
FIRST_SEQ = 2  # 1 is the enrollment's, whose frame must be the same each time

OLD_HEAD = "old-head"  # the reason to drop a head below one that was accepted
TOO_MANY = "its owner allows no more requests a day than "  # begins a refusal
# Instead of an outcome, which no receipt has told:
RENUMBERED = "renumbered"  # the update was sent again with another number
UNANSWERED = "unanswered"  # the update was given up without a receipt
UNTOLD: Final = (RENUMBERED, UNANSWERED)

HEARD: Final = frozenset({"head_version", "head_seq", "head_digest", "receipt_seq"})  # of a `State`, by a message
ANSWERED: Final = frozenset({"outstanding", "residual", "answered_base", "accepted"})  # likewise, by a receipt

Seal = Callable[[bytes], bytes]  # plain bytes -> sealed box


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrivatePart:
    """What an update of a private sum has beside its words, which ``encoded`` has unmasked."""

    terms: bytes = field(repr=False)  # as encoded
    context: bytes
    min: int  # devices in the sum, by the device's owner
    seeds: tuple[bytes, ...] = field(repr=False)  # one for each helper, in the order of the terms
    boxes: tuple[bytes, ...] = field(default=(), repr=False)  # likewise, for the present key and number


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OutstandingUpdate:
    """An update without a receipt. It determines its frames, which are the same bytes each time."""

    seq: int
    base: int
    samples: int
    metrics: Mapping[str, float]
    codec: str
    encoding: str
    encoded: bytes = field(repr=False)  # the block's encoded content, or words
    sealed: bytes = field(default=b"", repr=False)  # the sealed box; empty without `seal` in the plan
    frame_bytes: int  # the limit for its frames
    private: PrivatePart | None = field(default=None, repr=False)  # of a private sum
    arm: int | None = None  # of a search

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
            context=self.private.context if self.private is not None else b"",
            min=self.private.min if self.private is not None else 0,
            boxes=self.private.boxes if self.private is not None else (),
            arm=self.arm,
        )

    def block(self, schema: Schema) -> Block:
        """The change of the model."""
        return Block.read(schema, self.codec, self.encoding, self.encoded)


def prepare(
    block: Block,
    *,
    seq: int,
    base: int,
    samples: int,
    metrics: Mapping[str, float],
    frame_bytes: int,
    arm: int | None = None,
) -> OutstandingUpdate:
    """The update of a block, ready to be sent; compressed if that makes it smaller."""
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
        arm=arm,
    )


def sealed(update: OutstandingUpdate, key: KeyId, seal: Seal, body: bytes | None = None) -> OutstandingUpdate:
    """The same update with ``body``, or else its content, in a sealed box that binds it to key and sequence number."""
    plain = update.encoded if body is None else body
    return replace(update, sealed=seal(key + update.seq.to_bytes(8, "little") + plain))


@dataclass(frozen=True, slots=True, kw_only=True)
class AnsweredUpdate:
    """The stored receipt of an update; or, with an outcome of ``UNTOLD``, what became of it without one."""

    seq: int
    base: int
    outcome: str
    version: int
    key: KeyId
    digest: bytes = field(repr=False)  # of the message, as in the aggregator's log of merges; empty: not kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request for statistics, for the owner's log: when it was answered, in Unix seconds, what it was for, and how.

    ``outcome`` is "answered", or why it was refused.
    """

    at: float
    kinds: str
    outcome: str

    @property
    def is_limit(self) -> bool:
        """Whether it was refused since the owner allows no more of them a day: nothing was looked at."""
        return self.outcome.startswith(TOO_MANY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """The newest request that is answered, the answer until its receipt, and the last requests, oldest first."""

    request: int = 0
    content: bytes = field(default=b"", repr=False)
    asked: tuple[Asked, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class State:
    """The durable state. Sequence numbers, session, enrollment and ``receipt_seq`` belong to ``key``."""

    key: KeyId
    enrolled: bool = False
    seq_limit: int = FIRST_SEQ  # sequence numbers from here on are unused
    session: int = 0
    head_version: int = 0  # of the newest accepted head
    head_seq: int = 0
    head_digest: bytes = b""  # of the model, in that head
    answered_base: int = -1  # updates on this version or an older one are answered
    evaluated: int = -1  # the newest evaluated version
    accepted: int = 0  # number of accepted updates
    receipt_seq: int = 0  # the aggregator's, of its newest receipt that knew the key; 0: an earlier version kept none
    schema: bytes = field(default=b"", repr=False)
    residual: Vector | None = field(default=None, repr=False)  # of compression, for the next update; None is zero
    outstanding: OutstandingUpdate | None = None
    local: bytes = field(default=b"", repr=False)  # the device's own tensors after its last training, packed
    protected: str = ""  # the plan's `dp` with which outstanding, residual and local were made
    account: Account = field(default_factory=Account)
    left: int = -1  # base of the newest private update of which a frame may have left the device
    cards: Mapping[bytes, int] = field(default_factory=dict)  # the highest box key seen, by a pinned helper's key
    refusal: str = ""  # why the device makes no update by the present plan; for its owner
    statistics: Statistics = field(default_factory=Statistics)

    def tells_more_than(self, before: "State") -> bool:
        """Whether it has what nobody would tell the device again, if only ``before`` were on disk.

        The aggregator sends its newest head again. It answers an update that is outstanding, by the same receipt.
        """
        answered = self.outstanding is None and before.outstanding is not None
        values = _not_heard_or_answered if answered else _not_heard
        return any(map(is_not, values(self), values(before)))

    @property
    def arm(self) -> int:
        """That of the outstanding update; -1 without one."""
        return -1 if self.outstanding is None or self.outstanding.arm is None else self.outstanding.arm

    def with_key(self, key: KeyId) -> "State":
        """The state with a new key, which must be enrolled and has its own counters."""
        return replace(self, key=key, enrolled=False, seq_limit=FIRST_SEQ, session=0, receipt_seq=0)

    def rejoined(self, key: KeyId) -> "State":
        """The state with a new key and without any counter that another could have raised.

        What the owner's budget and the device's own count rest on stays: ``account`` and ``accepted``; ``local`` and
        ``cards`` and
        the log of statistics, by which they are limited, too.
        The outstanding update is dropped, because its base may be a version that was never published.
        """
        new = State(key=key)
        return replace(
            new,
            accepted=self.accepted,
            schema=self.schema,
            account=self.account,
            local=self.local,
            protected=self.protected,
            cards=self.cards,
            statistics=Statistics(asked=self.statistics.asked),
        )

    def with_head(self, version: int, seq: int, digest: bytes) -> "State":
        """The state that has seen this head. Raises ProtocolError for a head below one that was accepted."""
        if version < self.head_version or seq < self.head_seq:
            raise ProtocolError(
                OLD_HEAD,
                f"version {version}, seq {seq}; this device has seen version {self.head_version}, seq {self.head_seq}; "
                "if this goes on, the aggregator's folder may have been copied back by hand: its operator stops it and "
                "runs `ternbus aggregator restored DIR`; only if that is not so, ask for an invitation and run "
                "`ternbus edge rejoin`",
            )
        if (version, seq) == (self.head_version, self.head_seq):
            return self
        return replace(self, head_version=version, head_seq=seq, head_digest=digest)

    def with_receipt(self, seq: int) -> "State":
        """The state after a receipt by which the aggregator knew the key, in a frame with this sequence number."""
        return self if seq <= self.receipt_seq else replace(self, receipt_seq=seq)

    def local_under(self, dp: str) -> bytes:
        """``local`` for a training with this `dp`: none under "sample" after one without it.

        Other trainings put no noise on them. Each sample in them would move the gradients of all others.
        """
        return b"" if dp == SAMPLE != self.protected else self.local

    def with_seq_limit(self, seq_limit: int) -> "State":
        return replace(self, seq_limit=seq_limit)


_Values = Callable[[State], tuple[object, ...]]
_NAMES: Final = frozenset(each.name for each in fields(State))
_not_heard: Final[_Values] = attrgetter(*_NAMES - HEARD)
_not_heard_or_answered: Final[_Values] = attrgetter(*_NAMES - HEARD - ANSWERED)
