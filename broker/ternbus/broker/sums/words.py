"""Words of 64 bits that hold the values of a private update, added lane by lane without unpacking.

Ternary values are numbers modulo 2^bits, ``64 // bits`` of them in a word, the lowest bits first. Behind them come
numbers modulo 2^32, two in a word: the dense elements, one weight, and for each tensor a one-hot of `BUCKETS`. Bits
that hold no value are 0, in masks too.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ternbus.broker.errors import ProtocolError

BITS: Final = (4, 5, 6, 8)  # of a lane
BUCKETS: Final = 7  # of a tensor's scale relative to the terms': -3 to 3 octaves
DENSE_FACTOR: Final = 8.0  # the range of a dense tensor, by its reference
DENSE_STEPS: Final = 2**20  # from 0 to the range of a dense tensor
WEIGHT_STEPS: Final = 255  # a device's weight is a multiple of 1/255
WEIGHT_MIN: Final = 64  # the smallest one, 1/4 rounded up
DEVICES_MAX: Final = 2000  # of a set: sums of dense elements stay below 2^31

Words = npt.NDArray[np.uint64]  # shape (words,), little-endian
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How many values there are, and where in the words they lie."""

    bits: int
    ternary: int  # elements of ternary tensors
    dense: int  # elements of dense tensors
    tensors: int

    @property
    def lanes(self) -> int:
        """Ternary values in a word."""
        return 64 // self.bits

    @property
    def ternary_words(self) -> int:
        return -(-self.ternary // self.lanes)

    @property
    def plain(self) -> int:
        """Numbers modulo 2^32: dense elements, one weight, buckets."""
        return self.dense + 1 + BUCKETS * self.tensors

    @property
    def words(self) -> int:
        return self.ternary_words + -(-self.plain // 2)

    def _used_in(self, lanes: int) -> np.uint64:
        """The bits of a ternary word that hold its first ``lanes`` values."""
        return np.uint64(sum((2**self.bits - 1) << (self.bits * each) for each in range(lanes)))

    @cached_property
    def _used(self) -> np.uint64:
        """The bits of a ternary word that hold a value; in the last one perhaps fewer do."""
        return self._used_in(self.lanes)

    @cached_property
    def _used_last(self) -> np.uint64:
        return self._used_in(self.ternary % self.lanes or self.lanes)

    @cached_property
    def _even(self) -> np.uint64:
        """The bits of every other lane, from the lowest."""
        return np.uint64(sum((2**self.bits - 1) << (self.bits * each) for each in range(0, self.lanes, 2)))

    @cached_property
    def _top(self) -> np.uint64:
        """The highest bit of each lane."""
        return np.uint64(sum(1 << (self.bits * each + self.bits - 1) for each in range(self.lanes)))

    def sum_max(self, levels: int) -> int:
        """The largest number of devices in a set whose values, from -levels to levels, cannot wrap."""
        return min(DEVICES_MAX, ((1 << (self.bits - 1)) - 1) // levels)

    def zeros(self) -> Words:
        """The words of nothing, to which others are added."""
        return np.zeros(self.words, "<u8")

    def pack(self, ternary: npt.NDArray[np.signedinteger[Any]], plain: Integers) -> Words:
        """The words of values: shapes (ternary,), signed, and (plain,)."""
        lanes = np.zeros(self.ternary_words * self.lanes, np.uint8)  # no lane is wider
        lanes[: self.ternary] = ternary.astype(np.int8).view(np.uint8) & np.uint8(2**self.bits - 1)
        by_word = lanes.reshape(self.ternary_words, self.lanes)
        words = self.zeros()
        for lane in range(self.lanes):
            words[: self.ternary_words] |= by_word[:, lane].astype("<u8") << np.uint64(self.bits * lane)
        self._plain_of(words)[: self.plain] = (plain & 0xFFFFFFFF).astype(np.uint32)
        return words

    def unpack(self, words: Words) -> tuple[npt.NDArray[np.int8], Integers]:
        """The signed values of words, shapes (ternary,) and (plain,)."""
        lanes = np.empty((self.ternary_words, self.lanes), np.uint8)  # no lane is wider
        for lane in range(self.lanes):
            lanes[:, lane] = (words[: self.ternary_words] >> np.uint64(self.bits * lane)).astype(np.uint8)
        spare = 8 - self.bits  # what is above a lane is shifted out, and its sign in
        signed = (lanes.reshape(-1)[: self.ternary] << spare).view(np.int8) >> spare
        return signed, self._plain_of(words)[: self.plain].astype(np.int32).astype(np.int64)

    def add(self, total: Words, words: Words) -> None:
        """Add words to ``total`` in place, lane by lane."""
        own, other = total[: self.ternary_words], words[: self.ternary_words]
        top = (own ^ other) & self._top
        own &= ~self._top
        own += other & ~self._top
        own ^= top
        self._plain_of(total)[:] += self._plain_of(words)

    def sum(self, many: Iterable[Words]) -> Words:
        """The sum of at most 2^bits words, lane by lane.

        Lanes whose neighbours are masked away have twice the room, so nothing overflows, and no carry is looked for.
        The other lanes are what is left of a sum modulo 2^64 of whole words.
        """
        total, even, own = self.zeros(), np.zeros(self.ternary_words, "<u8"), np.empty(self.ternary_words, "<u8")
        whole, plain = total[: self.ternary_words], self._plain_of(total)
        for words in many:
            whole += words[: self.ternary_words]
            np.bitwise_and(words[: self.ternary_words], self._even, out=own)
            even += own
            plain += self._plain_of(words)
        whole -= even
        whole &= self._used & ~self._even
        even &= self._even
        whole |= even
        return total

    def subtract(self, total: Words, words: Words) -> None:
        """Subtract words from ``total`` in place, lane by lane."""
        own, other = total[: self.ternary_words], words[: self.ternary_words]
        top = ~(own ^ other) & self._top
        own |= self._top
        own -= other & ~self._top
        own ^= top
        self._clear(own)
        self._plain_of(total)[:] -= self._plain_of(words)

    def of_stream(self, stream: bytes) -> Words:
        """A mask of ``8 * words`` random bytes, in which the bits that hold no value are 0."""
        words = np.frombuffer(stream, "<u8").copy()
        self._clear(words[: self.ternary_words])
        self._plain_of(words)[self.plain :] = 0
        return words

    def read(self, body: bytes) -> Words:
        """Words as they travel, read-only; ProtocolError for a wrong length, or a bit set that holds no value."""
        if len(body) != 8 * self.words:
            raise ProtocolError("bad-length", f"{len(body)} bytes of words instead of {8 * self.words}")
        words = np.frombuffer(body, "<u8")
        ternary = words[: self.ternary_words]
        stray = np.bitwise_or.reduce(ternary) & ~self._used
        stray |= np.bitwise_or.reduce(ternary[-1:]) & ~self._used_last
        if stray or self._plain_of(words)[self.plain :].any():
            raise ProtocolError("bad-words", "a bit is set that holds no value")
        return words

    def _clear(self, ternary: Words) -> None:
        """Set the bits that hold no value to 0."""
        ternary &= self._used
        ternary[-1:] &= self._used_last

    def _plain_of(self, words: Words) -> npt.NDArray[np.uint32]:
        return words[self.ternary_words :].view("<u4")
