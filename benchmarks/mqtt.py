"""The encoding of MQTT 3.1.1 packets, as far as the benchmarks need it."""

import struct


def packet(kind: int, body: bytes) -> bytes:
    """A packet; ``kind`` is its first byte."""
    length, rest = bytearray(), len(body)
    while True:
        rest, low = divmod(rest, 128)
        length.append(low | (0x80 if rest else 0))
        if not rest:
            return bytes((kind,)) + bytes(length) + body


def length(content: bytes, start: int) -> tuple[int, int] | None:
    """(remaining length, position after the length field), or None if the field is incomplete."""
    length = 0
    for position, byte in enumerate(content[start : start + 4]):
        length |= (byte & 0x7F) << (7 * position)
        if byte < 0x80:
            return length, start + position + 1
    return None


def binary(content: bytes) -> bytes:
    """The content with its length in front."""
    return struct.pack(">H", len(content)) + content


def text(text: str) -> bytes:
    return binary(text.encode())
