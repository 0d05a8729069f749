"""Fuzz target: what TenSEAL is given of other parties' bytes in encrypted sums.

An input says how valid bytes are changed: nothing else gets as far as the code that reads them.
"""

import struct
from functools import cache
from typing import Final

import numpy as np

from ternbus.broker.sums import bfv
from ternbus.broker.sums.words import Layout

LAYOUT: Final = Layout(bits=6, ternary=35, dense=2, tensors=1)
BLIND: Final = bytes(32)
EDIT: Final = struct.Struct("<IB")  # place, byte


@cache
def _made() -> tuple[bfv.SecretKey, bytes, bytes]:
    """A key, an update's ciphertexts, and the decrypted sum of that update alone."""
    key = bfv.SecretKey.generate()
    body = bfv.encrypt(key.public, LAYOUT, LAYOUT.zeros())
    return key, body, key.decrypt(bfv.Slots(LAYOUT), bfv.blinded_sum(key.public, LAYOUT, [body], BLIND))


def ciphertext(data: bytes) -> None:
    """[which] and edits of five bytes: of a public key, of ciphertexts, or of a decrypted sum."""
    key, body, answer = _made()
    which, edits = data[:1], data[1:][: (len(data) - 1) // EDIT.size * EDIT.size]
    changed = bytearray({b"\0": body, b"\1": key.public}.get(which, answer))
    for place, byte in EDIT.iter_unpack(edits):
        changed[place % len(changed)] = byte
    content = bytes(changed)
    if which == b"\1":
        bfv.check_key(content)
    elif which == b"\0":
        bfv.check(key.public, LAYOUT, content)
        total = bfv.blinded_sum(key.public, LAYOUT, [body, content], BLIND)
        assert len(key.decrypt(bfv.Slots(LAYOUT), total)) == len(answer)
    else:
        words = bfv.opened(LAYOUT, content, BLIND)
        assert np.array_equal(LAYOUT.read(words.tobytes()), words)
