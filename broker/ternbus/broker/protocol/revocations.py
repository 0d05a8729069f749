"""The list of revoked keys as the aggregator publishes it for itself: pages, each a signed message of its own."""

from collections.abc import Iterable, Iterator
from typing import Final

import msgpack

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.identity import is_device
from ternbus.broker.protocol.packed import check_whole

KIND: Final = "revocations"
KEY_BYTES: Final = 32
PAGE_KEYS_MAX: Final = 1000  # a page is then below 105 KB, and fits into a frame of the usual size

Key = tuple[str, bytes]  # a device's name, and a public key that is void for it for good


def pages(keys: Iterable[Key]) -> Iterator[bytes]:
    """The bodies of all pages, in order of the keys."""
    ordered = sorted(keys)
    for first in range(0, len(ordered), PAGE_KEYS_MAX):
        yield bytes(msgpack.packb([[device, public] for device, public in ordered[first : first + PAGE_KEYS_MAX]]))


def read(body: bytes) -> frozenset[Key]:
    """The keys in a page; ProtocolError for anything that is none."""
    try:
        check_whole(body)
        rows = msgpack.unpackb(body, use_list=True, max_array_len=PAGE_KEYS_MAX, max_map_len=0, max_ext_len=0)
    except (msgpack.UnpackException, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ProtocolError("bad-revocations", "the page is not a msgpack array") from error
    if not isinstance(rows, list):
        raise ProtocolError("bad-revocations", "the page is not a msgpack array")
    return frozenset(map(_key, rows))


def _key(row: object) -> Key:
    match row:
        case [str(device), bytes(public)] if is_device(device) and len(public) == KEY_BYTES:
            return device, public
        case _:
            raise ProtocolError("bad-revocations", "an entry is not [device, public key]")
