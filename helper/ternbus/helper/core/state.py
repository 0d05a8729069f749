"""The durable state of a helper beside its records, as one value: box keys, counters, the end of the log."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final, Self

from ternbus.broker.protocol.frame import COUNTER_MAX
from ternbus.broker.protocol.messages import RESTORE_LEAP
from ternbus.broker.sums.masks import SEED_BYTES, box_public
from ternbus.helper.core.opening_log import FIRST

SEQ_BLOCK: Final = 64  # sequence numbers reserved by one write; a crash skips the rest of the block
FIRST_SEQ: Final = 2  # 1 is the enrollment's, whose frame must be the same each time
MONTH_S: Final = 30 * 86400.0  # a box key is the card's so long, and is kept so long after that
Random = Callable[[int], bytes]  # number of bytes -> as many random ones


@dataclass(frozen=True, slots=True, kw_only=True)
class BoxKey:
    """An X25519 key that opens the boxes of devices; ``retired_s`` is the time since which a card has a newer one."""

    number: int
    secret: bytes = field(repr=False)
    made_s: float
    retired_s: float | None = None

    @property
    def public(self) -> bytes:
        return box_public(self.secret)


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """The durable state. ``count`` is the number of steps written down; others have seen it, so it must not go back."""

    box_keys: tuple[BoxKey, ...]  # by number; the last is the card's
    enrolled: bool = False
    seq_limit: int = FIRST_SEQ  # sequence numbers from here on are unused
    session: int = 0
    receipt_seq: int = 0  # the aggregator's, of its newest receipt
    count: int = 0
    seen_count: int = 0  # the highest that others have shown
    seen_number: int = 0  # likewise, of a box key
    log_length: int = 0
    log_hash: bytes = FIRST  # of the newest entry

    @classmethod
    def new(cls, random: Random, unix_s: float) -> Self:
        """Of a new helper, with its first box key."""
        return cls(box_keys=(BoxKey(number=1, secret=random(SEED_BYTES), made_s=unix_s),))

    @property
    def box_key(self) -> BoxKey:
        return self.box_keys[-1]

    @property
    def is_behind(self) -> bool:
        """Whether others have seen more than this state knows: it is an old copy."""
        return self.seen_count > self.count or self.seen_number > self.box_key.number

    def seen(self, *, count: int = 0, number: int = 0) -> Self:
        """The state that knows what others have shown."""
        if count <= self.seen_count and number <= self.seen_number:
            return self
        return replace(self, seen_count=max(count, self.seen_count), seen_number=max(number, self.seen_number))

    def rotated(self, random: Random, unix_s: float) -> Self:
        """With a new box key once a month, and without those that were retired a month ago."""
        kept = tuple(key for key in self.box_keys if key.retired_s is None or unix_s - key.retired_s < MONTH_S)
        newest = self.box_key
        if unix_s - newest.made_s < MONTH_S:
            return self if len(kept) == len(self.box_keys) else replace(self, box_keys=kept)
        fresh = BoxKey(number=newest.number + 1, secret=random(SEED_BYTES), made_s=unix_s)
        return replace(self, box_keys=(*kept[:-1], replace(newest, retired_s=unix_s), fresh))

    def restored(self, random: Random, unix_s: float) -> Self:
        """After a loss of what was written: no box made before opens any more; all counters are above the lost ones.

        The number of the new box key is at least the time in seconds, since nobody may know how many there were.
        """
        number = min(max(self.box_key.number, self.seen_number, int(unix_s)) + 1, COUNTER_MAX)
        count = min(max(self.count, self.seen_count) + RESTORE_LEAP, COUNTER_MAX)
        return replace(
            self,
            box_keys=(BoxKey(number=number, secret=random(SEED_BYTES), made_s=unix_s),),
            count=count,
            seq_limit=self.seq_limit + RESTORE_LEAP,
            session=self.session + RESTORE_LEAP,
        )
