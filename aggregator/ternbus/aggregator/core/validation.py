"""Validation of updates: the protocol's checks in their order, from the parts to the decoded block."""

from dataclasses import dataclass, field
from typing import Final, NamedTuple

from ternbus.aggregator.core.registry import EVALUATOR, Member
from ternbus.aggregator.core.search import Search
from ternbus.aggregator.core.versions import PublishedState
from ternbus.aggregator.merge.accepted import AcceptedUpdate
from ternbus.aggregator.merge.influence import Influence, Measured, norm_at_most
from ternbus.aggregator.merge.mean import clip_factor, norm
from ternbus.aggregator.merge.staleness import discount
from ternbus.aggregator.settings import Settings
from ternbus.aggregator.sums import private_header as private
from ternbus.aggregator.sums.private_header import body_bytes_max
from ternbus.aggregator.sums.private_sets import PrivateUpdate, read_words
from ternbus.aggregator.sums.state import PrivateSums
from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.frame import Frame
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.messages import Offer, Update
from ternbus.broker.protocol.meta_fields import counter
from ternbus.broker.protocol.parts import Collector, Whole, encoded_bytes_max, parts_max, whole
from ternbus.broker.protocol.schema import Schema
from ternbus.broker.protocol.ternary import CODECS, FLOAT32, TERNARY, Block, content_bytes
from ternbus.broker.sums.sets import SetMember

SEAL_BYTES: Final = 64  # key id, seq and what a libsodium sealed box adds


@dataclass(frozen=True, slots=True)
class Verdict:
    """An answer other than a stored update."""

    outcome: str
    reason: str = ""
    retry_after_s: float = 0.0
    highest_seq: int = 0


class _Counted(NamedTuple):
    """How much an update counts: ``samples`` and ``discount`` follow from it."""

    samples: int
    factor: float
    norm: float | None = None
    stated: int | None = None
    bounded: str = ""


@dataclass(frozen=True, slots=True)
class ValidUpdate:
    """A whole update that may be accepted: ``body`` is its block as it is encoded, unsealed."""

    update: AcceptedUpdate
    block: Block
    body: bytes
    bounded: str = ""  # what the operator is told where it counts for less than it says


@dataclass(frozen=True, slots=True)
class ValidPrivate:
    """A whole private update that may be accepted: ``body`` are its words as they came, unsealed."""

    private: PrivateUpdate
    body: bytes


@dataclass(slots=True)
class Validation:
    """Judges updates by what their device may send."""

    settings: Settings
    identity: Identity
    schema: Schema
    influence: Influence = field(default_factory=Influence)
    sums: PrivateSums | None = None  # of a federation whose updates are private
    published: PublishedState | None = None  # it says which versions were withdrawn; None: none were
    search: Search = field(default_factory=Search)
    update_bytes_max: int = field(init=False)
    parts_max: int = field(init=False)

    def __post_init__(self) -> None:
        content_bytes_max = max(content_bytes(self.schema, codec) for codec in CODECS)
        if self.sums is not None:
            content_bytes_max = max(content_bytes_max, body_bytes_max(self.schema, self.sums.settings.kind))
        self.update_bytes_max = encoded_bytes_max(content_bytes_max)
        self.parts_max = parts_max(content_bytes_max)

    def oldest(self, version: int) -> int:
        """The oldest base that is not stale at this version."""
        return max(version - self.settings.staleness.max, 0 if self.published is None else self.published.floor)

    def _counted(self, content: Measured, samples: int) -> "_Counted":
        """What is left of an update whose norm, or whose claim, is too large.

        All of it is recorded with the update: no later merge and no other machine computes it again.
        """
        about = self.settings.merge
        factor = clip_factor(content.block, about.max_update_norm if about.on_large == "clip" else 0)
        norm, bound = content.norm, self.influence.bound
        if norm is None:
            return _Counted(samples, factor)
        if bound is None or (norm <= bound.norm and samples <= bound.samples):
            return _Counted(samples, factor, norm, samples)
        bounded = (
            f"counts less: norm {norm:.4g} (at most {bound.norm:.4g}), {samples} samples (at most {bound.samples}), "
            "by what was merged of late"
        )
        kept, factor = min(samples, bound.samples), min(factor, bound.factor(norm))
        return _Counted(kept, factor, min(norm, bound.norm), samples, bounded)

    def judge_base(self, member: Member, base: int, version: int, *, closed: bool) -> Verdict | None:
        """The checks that need only (device, base): duplicate, then stale, then what cannot be."""
        if member.has_accepted(base, self.oldest(version)):
            return Verdict("duplicate", f"an update on version {base} was accepted before")
        if self.published is not None and base < self.published.floor:
            return Verdict("stale", f"version {base} was withdrawn")
        if base < self.oldest(version):
            return Verdict("stale", f"base {base} is more than {self.settings.staleness.max} behind {version}")
        if base > version:
            return Verdict("invalid", "base-in-future")
        if closed:
            return Verdict("invalid", "closed")
        if member.role == EVALUATOR:
            why = "a member that was invited as an evaluator sends no updates: run `ternbus edge evaluate`"
            return Verdict("invalid", f"evaluator: {why}")
        return None

    def judge(
        self, member: Member, frame: Frame, version: int, *, closed: bool, ahead: Measured | None = None
    ) -> Update | Verdict:
        """The update as its header states it, or what can be answered before it is whole."""
        try:
            verdict = self.judge_base(member, counter(frame.meta, "base"), version, closed=closed)
            if verdict is not None:
                return verdict
            update = Update.from_meta(frame.meta) if ahead is None else ahead.update
            if self.sums is not None or update.is_private:
                private.check_header(self.sums, update)
        except ProtocolError as error:
            return Verdict("invalid", str(error))
        return self._judge_parts(frame.parts) or update

    def judge_offer(self, member: Member, frame: Frame, version: int, *, closed: bool) -> Offer | Verdict:
        """The offer, or what is to be answered in place of a grant."""
        try:
            frame.check_bodiless()
            offer = Offer.from_meta(frame.meta)
        except ProtocolError as error:
            return Verdict("invalid", str(error))
        return self.judge_base(member, offer.base, version, closed=closed) or self._judge_parts(offer.parts) or offer

    def _judge_parts(self, parts: int) -> Verdict | None:
        return Verdict("invalid", "too-long") if parts > self.parts_max else None

    def collect(
        self,
        member: Member,
        frame: Frame,
        update: Update,
        version: int,
        *,
        collector: Collector | None = None,
        ahead: Measured | None = None,
    ) -> ValidUpdate | ValidPrivate | Verdict | None:
        """Take in a part of an update; None while parts are missing.

        ``update`` is what `judge` made of the header, of which a message's parts have the same fields. ``version`` is
        the model's, by which the update is stale. ``collector``: where an update of several parts has its place.
        ``ahead`` is the content of a single part, if it was read.
        """
        if collector is None:
            return self._read(member, whole(frame), update, version, ahead)
        message = collector.add(frame)
        if message is not None:
            return self._read(member, message, update, version)
        return None if len(collector) else Verdict("invalid", "too-long")

    def work_bytes(self, frame: Frame) -> int:
        """The bytes to decode for the content of the update of which this is a part, according to its meta."""
        if self.sums is not None:
            return body_bytes_max(self.schema, self.sums.settings.kind)
        return content_bytes(self.schema, FLOAT32 if frame.meta["codec"] == FLOAT32 else TERNARY)

    @property
    def largest_bytes(self) -> int:
        """The largest body of an update."""
        return self.update_bytes_max + SEAL_BYTES

    def body_bytes_max(self, frame: Frame) -> int:
        """The largest body of the update of which this is a part, according to its meta."""
        return encoded_bytes_max(self.work_bytes(frame)) + SEAL_BYTES

    def _read(
        self, member: Member, message: Whole, update: Update, version: int, ahead: Measured | None = None
    ) -> ValidUpdate | ValidPrivate | Verdict:
        try:
            body = self._unseal(message) if update.sealed else message.body
            if self.sums is not None:
                return self._private(member, message, update, body, version - update.base)
            content = self.measured(update, body) if ahead is None else ahead
            self._check_norm(content.block)
        except ProtocolError as error:
            return Verdict("invalid", str(error))
        staleness, counted = version - update.base, self._counted(content, update.samples)
        accepted = AcceptedUpdate(
            device=member.name,
            key=member.key,
            seq=message.seq,
            base=update.base,
            digest=message.digest,
            staleness=staleness,
            samples=counted.samples,
            discount=discount(self.settings.staleness, staleness) * counted.factor,
            codec=update.codec,
            encoding=update.encoding,
            epsilon=update.metrics.get("epsilon"),
            norm=counted.norm,
            stated=counted.stated,
            loss=None if self.settings.is_dp else update.metrics.get("loss"),
            **self.search.claimed(member, update),
        )
        return ValidUpdate(accepted, content.block, body, counted.bounded)

    def _private(self, member: Member, message: Whole, update: Update, body: bytes, staleness: int) -> ValidPrivate:
        """Read the words of a private update; ProtocolError where they are not those of its base's terms."""
        about = private.check_header(self.sums, update)  # again: the first part may have come long ago
        accepted = AcceptedUpdate(
            device=member.name,
            key=member.key,
            seq=message.seq,
            base=update.base,
            digest=message.digest,
            staleness=staleness,
            samples=update.samples,
            discount=1.0,  # that of its set counts
            codec=update.codec,
            encoding=update.encoding,
            epsilon=update.metrics.get("epsilon"),
        )
        held = PrivateUpdate(
            update=accepted,
            context=update.context,
            min=update.min,
            member=SetMember(public=member.public, header=message.first_header, signature=message.first_signature),
            size_bytes=len(body),
            words=read_words(about.terms, body),
        )
        return ValidPrivate(held, body)

    def measured(self, update: Update, body: bytes) -> Measured:
        """Read the content of an update; ProtocolError where it is not valid. It uses no state: any thread may."""
        block = Block.read(self.schema, update.codec, update.encoding, body)
        return Measured(update, block, norm_at_most(block) if self.settings.merge.is_bounded else None)

    def _check_norm(self, block: Block) -> None:
        about = self.settings.merge
        if about.on_large == "refuse" and (length := norm(block)) > about.max_update_norm:
            raise ProtocolError("too-large", f"an L2 norm of {length:.4g}, at most {about.max_update_norm:g}")

    def _unseal(self, message: Whole) -> bytes:
        if len(message.body) > self.largest_bytes:
            raise ProtocolError("bad-length", "a sealed body longer than any update")
        plain = self.identity.unseal(message.body)
        if plain[:16] != bytes(message.key) + message.seq.to_bytes(8, "little"):
            raise ProtocolError("bad-seal", "sealed for another update than this")
        return plain[16:]
