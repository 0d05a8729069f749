"""Maps of msgpack that are signed or hashed: read only where they are in the one encoding that they have."""

from collections.abc import Mapping
from typing import Any

import msgpack

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.packed import NO_EXTENSIONS, check_whole


def pack(fields: Mapping[str, Any]) -> bytes:
    """The encoding of a map: keys in the given order, the shortest form of each number, floats of 64 bits."""
    return bytes(msgpack.packb(dict(fields)))


def keys_in(content: bytes, keys: tuple[str, ...], last: str) -> tuple[str, ...]:
    """The keys that a map in ``content`` must have: ``keys``, and ``last`` where it says that it has one more."""
    return (*keys, last) if content[:1] == bytes([0x80 | (len(keys) + 1)]) else keys


def unpack(content: bytes, keys: tuple[str, ...], what: str, bytes_max: int) -> dict[str, Any]:
    """The map in ``content``, of exactly these keys in this order; ProtocolError for anything else."""
    reason = f"bad-{what}"
    if len(content) > bytes_max:
        raise ProtocolError(reason, f"{len(content)} bytes, at most {bytes_max}")
    try:
        check_whole(content)
        fields = msgpack.unpackb(content, strict_map_key=True, **NO_EXTENSIONS)
    except (msgpack.UnpackException, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ProtocolError(reason, "not one msgpack map") from error
    if not isinstance(fields, dict) or tuple(fields) != keys:
        raise ProtocolError(reason, f"not a map of {', '.join(keys)}")
    if pack(fields) != content:
        raise ProtocolError(reason, "the encoding is not canonical")
    return fields
