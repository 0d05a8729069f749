"""Sums of encrypted updates, to compare with masks: the homomorphic scheme BFV, by TenSEAL (docs/protocol.md, 16.9).

Fan & Vercauteren 2012, "Somewhat practical fully homomorphic encryption". A ciphertext has 4,096 slots, numbers modulo
a prime; ciphertexts are added slot by slot. Several ternary values share a slot, as digits of a number.

This protects only where all parties follow the protocol. Whoever has the secret key cannot see of whom a ciphertext is
the sum, and a crafted one can give the key away. TenSEAL reads foreign bytes in C++, so nothing is given to it that
is not signed, and of exactly the length that it must have.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Final

import nacl.bindings
import numpy as np

from ternbus.broker.errors import ConfigError, ProtocolError
from ternbus.broker.sums.words import Integers, Layout, Words

SLOTS: Final = 4096  # of a ciphertext, the degree of its polynomials
MODULUS: Final = 1_032_193  # of a slot: a prime, 1 modulo 2 * SLOTS
# Bits of the primes of SEAL's coefficient modulus; the last one is for the keys only. At this degree 109 bits together
# are 128 bits of security (homomorphicencryption.org). A ciphertext's noise is at most 2,049 (what is left by the last
# prime), of 127 added ones 2^18; a sum is exact up to 2^40 / (2 * MODULUS), about 2^19.
PRIMES: Final = (40, 41)
CIPHERTEXT_BYTES: Final = 51_200  # SEAL compresses to about 49,300: all are filled up to one length
KEY_BYTES: Final = 98_304  # likewise, of a public key
ELEMENTS_MAX: Final = 100_000  # of a model: an update of ternary tensors then has at most 0.7 MB
BLIND_PREFIX: Final = b"ternbus/1 blind\0"
_HALF: Final = MODULUS // 2
_DIGIT: Final = 4096  # a plain value is two digits of this base, a slot each
_LENGTH_BYTES: Final = 4
_FAULTS: Final = (ValueError, RuntimeError, IndexError, OverflowError, MemoryError)  # what TenSEAL raises


def require() -> Any:
    """TenSEAL; ConfigError where it is not installed."""
    try:
        import tenseal  # noqa: PLC0415 - an extra, which only federations of this kind need
    except ImportError as error:
        raise ConfigError("private sums of the kind bfv need TenSEAL: run pip install 'ternbus[he]'") from error
    return tenseal


@dataclass(frozen=True, slots=True)
class Slots:
    """Where the values of words are in slots: first ternary ones, ``lanes`` in a slot, then two slots for each other.

    The lowest value of a slot comes first; digits are balanced, so that a sum of them is the sum's digit. Slots that
    hold no value are 0.
    """

    layout: Layout

    @property
    def lanes(self) -> int:
        """Ternary values in a slot: their sums, of magnitude below 2^(bits - 1), stay within its modulus."""
        return 20 // self.layout.bits

    @property
    def ternary(self) -> int:
        """Slots of ternary values."""
        return -(-self.layout.ternary // self.lanes)

    @property
    def ciphertexts(self) -> int:
        return -(-(self.ternary + 2 * self.layout.plain) // SLOTS)

    @property
    def body_bytes(self) -> int:
        """Of an update's ciphertexts, and of a sum's."""
        return self.ciphertexts * CIPHERTEXT_BYTES

    @property
    def answer_bytes(self) -> int:
        """Of a decrypted sum."""
        return 4 * self.ciphertexts * SLOTS

    def of_words(self, words: Words) -> Integers:
        """The slots of words, shape (ciphertexts, SLOTS), numbers around 0."""
        ternary, plain = self.layout.unpack(words)
        digits = np.zeros((self.ternary, self.lanes), np.int64)
        digits.reshape(-1)[: ternary.size] = ternary
        low = (plain + _DIGIT // 2) % _DIGIT - _DIGIT // 2
        slots = np.zeros((self.ciphertexts, SLOTS), np.int64)
        flat = slots.reshape(-1)
        flat[: self.ternary] = digits @ (2 ** (self.layout.bits * np.arange(self.lanes)))
        flat[self.ternary :][: 2 * plain.size] = np.stack([low, (plain - low) // _DIGIT], axis=1).reshape(-1)
        return slots

    def to_words(self, slots: Integers) -> Words:
        """The words of a sum's slots, shape (ciphertexts, SLOTS), numbers around 0; ProtocolError where it is none."""
        flat, base = slots.reshape(-1), 2**self.layout.bits
        rest, pairs = flat[: self.ternary].copy(), flat[self.ternary :][: 2 * self.layout.plain].reshape(-1, 2)
        digits = np.empty((self.ternary, self.lanes), np.int64)
        for lane in range(self.lanes):
            digits[:, lane] = (rest + base // 2) % base - base // 2
            rest = (rest - digits[:, lane]) // base
        ternary = digits.reshape(-1)
        spare = (rest, ternary[self.layout.ternary :], flat[self.ternary + 2 * self.layout.plain :])
        if any(each.any() for each in spare):
            raise ProtocolError("bad-words", "a slot has more than its values")
        return self.layout.pack(ternary[: self.layout.ternary], pairs[:, 0] + _DIGIT * pairs[:, 1])


@dataclass(frozen=True, slots=True)
class SecretKey:
    """A helper's key pair; ``content`` is what it keeps of it on disk.

    The public key is in it as it is given away: SEAL writes one key in other bytes at another time.
    """

    content: bytes = field(repr=False)

    @classmethod
    def generate(cls) -> "SecretKey":
        """ConfigError without TenSEAL."""
        context = _fresh_context()
        return cls(_padded(_serialized(context, secret=False), KEY_BYTES) + _serialized(context, secret=True))

    @property
    def public(self) -> bytes:
        """`KEY_BYTES` bytes, by which devices encrypt."""
        return self.content[:KEY_BYTES]

    def check(self) -> None:
        """ConfigError where ``content`` is no key, and without TenSEAL."""
        try:
            _public(self.public)
            is_whole = self._context.has_secret_key()
        except ProtocolError as error:
            raise ConfigError(f"the BFV key is not as it was written ({error}): make another helper") from error
        if not is_whole:
            raise ConfigError("the BFV key has no secret part: make another helper")

    @property
    def _context(self) -> Any:
        return _context(self.content[KEY_BYTES:])

    def decrypt(self, slots: Slots, body: bytes) -> bytes:
        """The slots of a sum as 32-bit numbers below MODULUS, little-endian; ProtocolError where it is none."""
        rows = []
        for vector in _vectors(self._context, slots, body):
            try:
                rows.append(np.array(vector.decrypt(), np.int64))
            except _FAULTS as error:
                raise ProtocolError("bad-sum", "a ciphertext cannot be decrypted") from error
        return (np.concatenate(rows) % MODULUS).astype("<u4").tobytes()


def check_key(public: bytes) -> None:
    """ProtocolError for what is no public key with the parameters of this module."""
    _public(public)


def encrypt(public: bytes, layout: Layout, words: Words) -> bytes:
    """The ciphertexts of an update's words under a helper's public key; other ones each time.

    ProtocolError for a wrong key.
    """
    context, tenseal = _public(public), require()
    rows = Slots(layout).of_words(words).tolist()
    return b"".join(_padded(tenseal.bfv_vector(context, row).serialize(), CIPHERTEXT_BYTES) for row in rows)


def check(public: bytes, layout: Layout, body: bytes) -> None:
    """ProtocolError for what is not an update's ciphertexts."""
    for _ in _vectors(_public(public), Slots(layout), body):
        pass


def blinded_sum(public: bytes, layout: Layout, bodies: Sequence[bytes], blind: bytes) -> bytes:
    """The ciphertexts of the sum of updates, and of a number in each slot that only who has ``blind`` knows.

    ProtocolError where an update is none.
    """
    context, slots = _public(public), Slots(layout)
    total = list(_vectors(context, slots, bodies[0]))
    try:
        for body in bodies[1:]:
            for vector, other in zip(total, _vectors(context, slots, body), strict=True):
                vector.add_(other)
        for vector, row in zip(total, _blinding(slots, blind).tolist(), strict=True):
            vector.add_(row)
    except _FAULTS as error:
        raise ProtocolError("bad-ciphertext", "the updates cannot be added up") from error
    return b"".join(_padded(each.serialize(), CIPHERTEXT_BYTES) for each in total)


def opened(layout: Layout, answer: bytes, blind: bytes) -> Words:
    """The words of the sum that a helper has decrypted; ProtocolError where its answer is none."""
    slots = Slots(layout)
    if len(answer) != slots.answer_bytes:
        raise ProtocolError("bad-length", f"{len(answer)} bytes of slots instead of {slots.answer_bytes}")
    found = np.frombuffer(answer, "<u4").astype(np.int64).reshape(slots.ciphertexts, SLOTS)
    if (found >= MODULUS).any():
        raise ProtocolError("bad-words", f"a slot is not below {MODULUS}")
    return slots.to_words((found - _blinding(slots, blind) + _HALF) % MODULUS - _HALF)


def blind_of(secret: bytes, digest: bytes) -> bytes:
    """The key of a set's blinding, the same after a restart: the set's digest, and with it its sum, is in it."""
    return blake2b(BLIND_PREFIX + digest, digest_size=32, key=secret).digest()


def _blinding(slots: Slots, blind: bytes) -> Integers:
    """A number below MODULUS for each slot: 8 bytes of ChaCha20's stream, whose bias is below 2^-43."""
    zeros = bytes(8 * slots.ciphertexts * SLOTS)
    nonce = bytes(nacl.bindings.crypto_aead_chacha20poly1305_ietf_NPUBBYTES)
    stream = nacl.bindings.crypto_aead_chacha20poly1305_ietf_encrypt(zeros, None, nonce, blind)[: len(zeros)]
    return (np.frombuffer(stream, "<u8") % MODULUS).astype(np.int64).reshape(slots.ciphertexts, SLOTS)


def _padded(content: bytes, size: int) -> bytes:
    """The length, the content, and zeros: how well it was compressed is chance, and shows nowhere."""
    assert len(content) <= size - _LENGTH_BYTES  # noqa: S101 - by 20 times the spread of what SEAL makes of it
    return (len(content).to_bytes(_LENGTH_BYTES, "little") + content).ljust(size, b"\0")


def _unpadded(padded: bytes) -> bytes:
    content = padded[_LENGTH_BYTES:][: int.from_bytes(padded[:_LENGTH_BYTES], "little")]
    if _padded(content, len(padded)) != padded:
        raise ProtocolError("bad-ciphertext", "not a length, a content and zeros")
    return content


def _vectors(context: Any, slots: Slots, body: bytes) -> Iterator[Any]:
    if len(body) != slots.body_bytes:
        raise ProtocolError("bad-length", f"{len(body)} bytes of ciphertexts instead of {slots.body_bytes}")
    for start in range(0, len(body), CIPHERTEXT_BYTES):
        try:
            vector = require().bfv_vector_from(context, _unpadded(body[start : start + CIPHERTEXT_BYTES]))
            is_whole = vector.size() == SLOTS and len(vector.ciphertext()) == 1
        except _FAULTS as error:
            raise ProtocolError("bad-ciphertext", "not a ciphertext under the helper's key") from error
        if not is_whole:
            raise ProtocolError("bad-ciphertext", f"not a ciphertext of {SLOTS} slots")
        yield vector


def _public(padded: bytes) -> Any:
    if len(padded) != KEY_BYTES:
        raise ProtocolError("bad-key", f"{len(padded)} bytes of a public key instead of {KEY_BYTES}")
    context = _context(_unpadded(padded))
    if context.has_secret_key() or context.has_galois_keys() or context.has_relin_keys():
        raise ProtocolError("bad-key", "it holds more than a public key")
    return context


@lru_cache(maxsize=4)
def _context(content: bytes) -> Any:
    """The keys in a serialized context, whose parameters must be those of this module."""
    try:
        found = require().context_from(content, n_threads=1)
        agrees = found.has_public_key() and _parameters_of(found) == _parameters_of(_reference())
    except _FAULTS as error:
        raise ProtocolError("bad-key", "not a serialized context") from error
    if not agrees:
        raise ProtocolError("bad-key", "a context with other parameters, or without a public key")
    return found


@lru_cache(maxsize=1)
def _reference() -> Any:
    return _fresh_context()


def _fresh_context() -> Any:
    tenseal = require()
    return tenseal.context(
        tenseal.SCHEME_TYPE.BFV,
        poly_modulus_degree=SLOTS,
        plain_modulus=MODULUS,
        coeff_mod_bit_sizes=list(PRIMES),
        n_threads=1,
    )


def _parameters_of(context: Any) -> list[int]:
    """SEAL's digest of the scheme, the degree and the moduli."""
    return list(context.seal_context().data.key_parms_id())


def _serialized(context: Any, *, secret: bool) -> bytes:
    return bytes(
        context.serialize(save_public_key=True, save_secret_key=secret, save_galois_keys=False, save_relin_keys=False)
    )
