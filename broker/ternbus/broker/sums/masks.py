"""Masks of private updates: seed, box, key and stream (docs/protocol.md, section 16).

A device adds one mask for each helper to its words. A helper that has the seed makes the same mask; it learns the
seed from a box that only it can open.
"""

from collections.abc import Iterable
from hashlib import blake2b
from typing import Final

import nacl.bindings
import nacl.exceptions
import nacl.public

from ternbus.broker.errors import ProtocolError
from ternbus.broker.sums.words import Layout, Words

SEED_BYTES: Final = 32
BOX_PREFIX: Final = b"ternbus/1 box\0"
MASK_PREFIX: Final = b"ternbus/1 mask\0"
BOX_BYTES: Final = len(BOX_PREFIX) + 3 * 32 + 8 + SEED_BYTES + nacl.bindings.crypto_box_SEALBYTES
_NONCE: Final = bytes(nacl.bindings.crypto_aead_chacha20poly1305_ietf_NPUBBYTES)
_TAG_BYTES: Final = nacl.bindings.crypto_aead_chacha20poly1305_ietf_ABYTES


def seed_of(words: Words, fresh: bytes) -> bytes:
    """BLAKE2b-256 of the unmasked words, keyed with 32 ``fresh`` random bytes.

    A random state that repeats itself, as after a restored snapshot of a machine, masks no two contents alike.
    """
    return blake2b(words.tobytes(), digest_size=SEED_BYTES, key=fresh).digest()


def mask(layout: Layout, seed: bytes, *, context: bytes, device: bytes, helper: bytes) -> Words:
    """The mask of a device's update for one helper; ``device`` and ``helper`` are their Ed25519 public keys.

    The stream is that of ChaCha20 (RFC 8439) with a nonce of zeros, from block 1, as long as all words.
    """
    key = blake2b(MASK_PREFIX + context + device + helper, digest_size=32, key=seed).digest()
    zeros = bytes(8 * layout.words)
    stream = nacl.bindings.crypto_aead_chacha20poly1305_ietf_encrypt(zeros, None, _NONCE, key)
    return layout.of_stream(stream[:-_TAG_BYTES])


def masked(
    layout: Layout, words: Words, seeds: Iterable[tuple[bytes, bytes]], *, context: bytes, device: bytes
) -> Words:
    """The words plus one mask for each pair of a helper's public key and the seed for it."""
    total = words.copy()
    for helper, seed in seeds:
        layout.add(total, mask(layout, seed, context=context, device=device, helper=helper))
    return total


def box_public(box_secret: bytes) -> bytes:
    """The X25519 public key of a helper's 32-byte secret."""
    return bytes(nacl.public.PrivateKey(box_secret).public_key)


def box(box_key: bytes, seed: bytes, *, context: bytes, device: bytes, helper: bytes, seq: int) -> bytes:
    """The seed, sealed to a helper's X25519 ``box_key`` and bound to the update that it masks."""
    plain = _bound(context, device, helper, seq) + seed
    return nacl.public.SealedBox(nacl.public.PublicKey(box_key)).encrypt(plain)


def open_box(box_secret: bytes, sealed: bytes, *, context: bytes, device: bytes, helper: bytes, seq: int) -> bytes:
    """The seed in a box; ProtocolError if the box is not for this key and this update."""
    try:
        plain = nacl.public.SealedBox(nacl.public.PrivateKey(box_secret)).decrypt(sealed)
    except (nacl.exceptions.CryptoError, ValueError, TypeError) as error:
        raise ProtocolError("bad-box", "the helper's key does not open the box") from error
    bound = _bound(context, device, helper, seq)
    if len(plain) != len(bound) + SEED_BYTES or plain[: len(bound)] != bound:
        raise ProtocolError("bad-box", "the box was made for another update")
    return plain[len(bound) :]


def _bound(context: bytes, device: bytes, helper: bytes, seq: int) -> bytes:
    return BOX_PREFIX + context + device + helper + seq.to_bytes(8, "little")
