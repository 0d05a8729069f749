"""A check of msgpack from a peer before it is decoded."""

import msgpack


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
