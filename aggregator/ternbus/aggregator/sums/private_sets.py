"""Accepted private updates, and the sets in which they are summed."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

import numpy as np

from ternbus.aggregator.merge.accepted import AcceptedUpdate, BufferedUpdate
from ternbus.aggregator.sums.decode import SetSum
from ternbus.aggregator.sums.groups import Waiting
from ternbus.aggregator.sums.state import ContextOf
from ternbus.broker.protocol.identity import KeyId
from ternbus.broker.protocol.merge_log import REASON_BYTES_MAX, DroppedUpdate, MergedSet, PrivateMember
from ternbus.broker.protocol.ternary import FLOAT32, RAW
from ternbus.broker.sums import bfv
from ternbus.broker.sums.sets import Ask, SetMember, set_digest
from ternbus.broker.sums.terms import BFV, Terms
from ternbus.broker.sums.words import Words

# The states of a set in the ledger. Until it is asked to be opened anywhere it may be abandoned, and never after.
MADE: Final = "made"  # helpers are asked to prepare it
OPENING: Final = "opening"  # all are prepared; they are asked to open it
OPENED: Final = "opened"  # its sum is known; the next version has it
ABANDONED: Final = "abandoned"  # helpers are asked to give its updates free

Content = TypeVar("Content", Words, bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateUpdate:
    """An accepted update whose content nobody here can read."""

    update: AcceptedUpdate
    context: bytes
    min: int  # devices in its set, by its owner
    member: SetMember  # by which helpers are asked for it
    size_bytes: int  # of its words on disk
    words: Words | bytes | None = field(repr=False)  # as they came, masked or encrypted; None once they are added up

    @property
    def device(self) -> str:
        return self.update.device

    @property
    def waiting(self) -> Waiting:
        return Waiting(device=self.device, min=self.min)

    @property
    def named(self) -> PrivateMember:
        """As the log of merges names it."""
        update = self.update
        return PrivateMember(device=update.device, key=update.key, seq=update.seq, digest=update.digest)

    def dropped(self, reason: str) -> DroppedUpdate:
        """As the log of merges names it if no version contains it."""
        return DroppedUpdate(update=self.named, reason=short(reason))


def read_words(terms: Terms, body: bytes) -> Words | bytes:
    """The masked words of an update by these terms, or its ciphertexts; ProtocolError where it is neither."""
    if terms.kind == BFV:
        bfv.check(terms.key, terms.layout, body)
        return body
    return terms.layout.read(body)


def short(reason: str) -> str:
    """A reason as the log of merges can hold it."""
    return reason.encode()[:REASON_BYTES_MAX].decode(errors="ignore")


@dataclass(slots=True, kw_only=True)
class PrivateSet:
    """Updates of one context whose sum is asked for; ``staleness`` is that of all of them when the set was made."""

    about: ContextOf
    staleness: int
    members: tuple[PrivateUpdate, ...]
    state: str = MADE
    done: set[str] = field(default_factory=set)  # helpers that have answered to the present step
    # Less the masks of helpers that have opened it. Empty until it is opening: ValueError where masks come before.
    total: Words = field(default_factory=lambda: np.zeros(0, "<u8"), repr=False)
    encrypted: bytes = field(default=b"", repr=False)  # of the kind `bfv`, while it is opening: the blinded sum
    blind: bytes = field(default=b"", repr=False)  # by what it is blinded
    digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        headers = {each.device: each.member.digest for each in self.members}
        self.digest = set_digest(self.about.context, headers)

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(each.device for each in self.members)

    @property
    def helpers(self) -> tuple[str, ...]:
        """Those whose masks are in it, by name."""
        return tuple(each.card.helper for each in self.about.terms.helpers)

    @property
    def awaited(self) -> tuple[str, ...]:
        """The helpers that have not answered to the present step."""
        return tuple(name for name in self.helpers if name not in self.done)

    @property
    def ask(self) -> Ask:
        """What helpers are asked for, the same at each step."""
        about = self.about
        return Ask(
            version=about.base,
            model=about.model,
            plan=about.plan,
            terms=about.terms_bytes,
            members=tuple(each.member for each in self.members),
            sum=self.encrypted,
        )

    def begin_opening(self, secret: bytes) -> None:
        """All helpers are prepared: add up its words, which are then needed no more.

        Ciphertexts are blinded by the aggregator's ``secret``; ProtocolError where they cannot be added up.
        """
        terms = self.about.terms
        if terms.kind == BFV:
            bodies = self._contents(bytes)
            self.blind = bfv.blind_of(secret, self.digest)
            self.encrypted = bfv.blinded_sum(terms.key, terms.layout, bodies, self.blind)
        else:
            self.total = terms.layout.sum(self._contents(np.ndarray))
        self.state, self.done = OPENING, set()
        self.members = tuple(replace(each, words=None) for each in self.members)

    def _contents(self, kind: type[Content]) -> list[Content]:
        """What all members sent; ValueError where it is no longer here, since a sum of the rest would be wrong."""
        found = [each.words for each in self.members if isinstance(each.words, kind)]
        if len(found) < len(self.members):
            raise ValueError(f"{len(self.members) - len(found)} updates of a set have no content that can be added up")
        return found

    def take_answer(self, helper: str, body: bytes) -> None:
        """A helper's sum of masks, or the decrypted sum, once; ProtocolError where it is neither."""
        terms = self.about.terms
        if terms.kind == BFV:
            self.total = bfv.opened(terms.layout, body, self.blind)
        else:
            terms.layout.subtract(self.total, terms.layout.read(body))
        self.done.add(helper)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedSet:
    """A set whose sum is known, as a merge takes it: like one update that weighs as much as its devices."""

    about: ContextOf
    digest: bytes
    staleness: int
    discount: float
    members: tuple[PrivateUpdate, ...]  # without their words
    sum: SetSum

    @classmethod
    def of(cls, found: PrivateSet, discount: float, total: SetSum) -> "OpenedSet":
        return cls(
            about=found.about,
            digest=found.digest,
            staleness=found.staleness,
            discount=discount,
            members=found.members,
            sum=total,
        )

    @property
    def base(self) -> int:
        return self.about.base

    @property
    def buffered(self) -> BufferedUpdate:
        """What the mean takes: ``samples`` are the devices' weights, in steps of 1/255."""
        update = AcceptedUpdate(
            device="",
            key=KeyId(bytes(8)),
            seq=0,
            base=self.base,
            digest=self.digest,
            staleness=self.staleness,
            samples=self.sum.weight,
            discount=self.discount,
            codec=FLOAT32,
            encoding=RAW,
        )
        return update, self.sum.block

    def merged(self, weight: float) -> MergedSet:
        """Its line in the log of merges, with the factor of its block."""
        return MergedSet(
            digest=self.digest,
            context=self.about.context,
            base=self.base,
            weight=weight,
            members=tuple(each.named for each in self.members),
        )


def in_order(sets: Iterable[OpenedSet]) -> list[OpenedSet]:
    """The order in which a merge adds sets up and names them. A start takes it from the log of merges.

    It depends on devices, which are in one set of a base, and on nothing random, so a simulation can be repeated.
    """
    return sorted(sets, key=lambda each: (each.base, sorted(member.device for member in each.members)))
