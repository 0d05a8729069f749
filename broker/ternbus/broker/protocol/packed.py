"""What is refused of msgpack from a peer before or while it is decoded."""

from typing import Any, Final, NoReturn

import msgpack


def _refuse_extension(code: int, data: bytes) -> NoReturn:
    """Raise ValueError: the decoder calls it for an extension of no bytes, which ``max_ext_len`` lets pass."""
    raise ValueError(f"an extension of type {code} with {len(data)} bytes")


# For a decoder of what a peer wrote: the protocol has no extension types, timestamps among them, and each would cost as
# much as a map while nothing counts it.
NO_EXTENSIONS: Final[dict[str, Any]] = {"max_ext_len": 0, "ext_hook": _refuse_extension}


def check_whole(content: bytes) -> None:
    """Check that ``content`` is exactly one complete object, else raise an exception of msgpack or ValueError.

    The decoder allocates as many elements as an array states. A thousand nested incomplete arrays, in the 16 KB of a
    header, would allocate a hundred megabytes.
    """
    walker = msgpack.Unpacker(max_buffer_size=max(1, len(content)))
    walker.feed(content)
    walker.skip()
    if walker.tell() != len(content):
        raise ValueError("bytes after the object")
