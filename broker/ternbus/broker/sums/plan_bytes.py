"""The exact bytes of a head's plan, whose digest is in the context of every update that was made by it.

A plan that is encoded again may have other bytes: msgpack has several forms for one number, and maps have an order.
"""

from typing import Final

import msgpack

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.packed import NO_EXTENSIONS, check_whole

PLAN: Final = b"plan"  # the key, in ``meta``


def plan_bytes(meta_bytes: bytes) -> bytes:
    """The encoded value of ``plan`` in the encoded ``meta`` of a head (`Frame.meta_bytes`).

    ProtocolError unless that is one msgpack map with this key once, and a map as its value.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=max(1, len(meta_bytes)), raw=True, **NO_EXTENSIONS)
    unpacker.feed(meta_bytes)
    found: list[bytes] = []
    try:
        check_whole(meta_bytes)
        for _ in range(unpacker.read_map_header()):
            key = unpacker.unpack()
            start = unpacker.tell()
            unpacker.skip()
            if key == PLAN:
                found.append(meta_bytes[start : unpacker.tell()])
    except (msgpack.UnpackException, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ProtocolError("bad-meta", "not one msgpack map") from error
    if len(found) != 1 or not _is_map(found[0]):
        raise ProtocolError("bad-meta", "'plan' is not one map")
    return found[0]


def _is_map(value: bytes) -> bool:
    return 0x80 <= value[0] <= 0x8F or value[0] in (0xDE, 0xDF)
