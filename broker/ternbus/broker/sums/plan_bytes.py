"""The plan in a head as it was signed: by its bytes all who make and open sums know that they follow one plan."""

import msgpack

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.packed import NO_EXTENSIONS


def plan_bytes(meta_bytes: bytes) -> bytes:
    """The msgpack bytes of the value of ``plan`` in the encoded meta of a head (`Frame.meta_bytes`).

    ProtocolError where there is none.
    """
    unpacker = msgpack.Unpacker(max_buffer_size=max(1, len(meta_bytes)), **NO_EXTENSIONS)
    unpacker.feed(meta_bytes)
    try:
        for _ in range(unpacker.read_map_header()):
            key = unpacker.unpack()
            start = unpacker.tell()
            unpacker.skip()
            if key == "plan":
                return meta_bytes[start : unpacker.tell()]
    except (msgpack.UnpackException, ValueError, TypeError, RecursionError) as error:
        raise ProtocolError("bad-meta", "the meta of a head is not one msgpack map") from error
    raise ProtocolError("bad-meta", "the head has no plan")
