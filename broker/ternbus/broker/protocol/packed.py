"""msgpack from a peer, looked at before anything is made of it."""

import msgpack


def check_whole(content: bytes) -> None:
    """Walk over one object; raise what msgpack raises where it is none, ValueError where something follows it.

    An array takes room for as many elements as it states, so a thousand arrays, each within the one before and none
    whole, would take a hundred megabytes for a header's 16 KB.
    """
    walker = msgpack.Unpacker(max_buffer_size=max(1, len(content)))
    walker.feed(content)
    walker.skip()
    if walker.tell() != len(content):
        raise ValueError("bytes after the object")
