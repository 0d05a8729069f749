"""Frames: what is built is read again, and anything else is refused with a reason and never with a crash."""

import struct
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ternbus.broker.errors import ProtocolError
from ternbus.broker.protocol.frame import HEADER_BYTES_MAX, SIGNED_PREFIX, build, parse
from ternbus.broker.protocol.identity import Identity
from ternbus.broker.protocol.merge_log import Entry, unpack
from ternbus.broker.protocol.schema import Schema

PI = Identity(bytes(range(32)))
EVE = Identity(bytes(32))
ABOUT: dict[str, Any] = {"federation": "lab", "sender": "pi-01", "kind": "update", "seq": 7}

plain = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
msgpacked = st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(plain, inner), max_leaves=20)


def seal(header: bytes, body: bytes = b"", identity: Identity = PI) -> bytes:
    """A frame around any header, signed as it should be."""
    return b"".join((b"TBF1", struct.pack("<I", len(header)), header, identity.sign(SIGNED_PREFIX + header), body))


def header(**changes: object) -> dict[str, object]:
    fields: dict[str, object] = {
        "kind": "update",
        "federation": "lab",
        "sender": "pi-01",
        "key": bytes(PI.key_id),
        "seq": 7,
        "part": [0, 1],
        "digest": bytes(32),
        "meta": {},
    }
    return fields | changes


def reason(payload: bytes) -> str:
    with pytest.raises(ProtocolError) as error:
        parse(payload)
    return error.value.reason


def parsed_or_refused(payload: bytes) -> None:
    try:
        frame = parse(payload)
    except ProtocolError as error:
        assert error.reason
        return
    assert 0 <= frame.part < frame.parts <= 65_535
    assert 0 <= frame.seq <= 2**62
    assert (len(frame.key), len(frame.digest), len(frame.signature)) == (8, 32, 64)
    try:
        frame.check_authentic(PI.public)
    except ProtocolError as error:
        assert error.reason in {"bad-signature", "bad-digest"}


@given(body=st.binary(max_size=300), seq=st.integers(0, 2**62), parts=st.integers(1, 65_535), data=st.data())
@settings(max_examples=50)
def test_what_is_built_is_read_again(body: bytes, seq: int, parts: int, data: st.DataObject) -> None:
    part = data.draw(st.integers(0, parts - 1))
    meta = data.draw(st.dictionaries(st.text(max_size=5), st.integers(0, 9) | st.text(max_size=5), max_size=5))
    frame = parse(build(PI, **(ABOUT | {"seq": seq}), meta=meta, body=body, part=part, parts=parts))
    frame.check_authentic(PI.public)
    assert (frame.kind, frame.federation, frame.sender, frame.seq) == ("update", "lab", "pi-01", seq)
    assert (frame.part, frame.parts, frame.body, frame.meta) == (part, parts, body, meta)
    assert msgpack.unpackb(frame.meta_bytes) == meta
    assert frame.header.count(frame.meta_bytes) >= 1


@given(st.binary(max_size=400))
@settings(max_examples=200)
def test_any_bytes_are_read_or_refused(payload: bytes) -> None:
    parsed_or_refused(payload)
    parsed_or_refused(b"TBF1" + payload)


@given(st.binary(max_size=200))
@settings(max_examples=200)
def test_any_header_is_read_or_refused(content: bytes) -> None:
    parsed_or_refused(seal(content))


@given(msgpacked)
@settings(max_examples=200)
def test_any_msgpack_as_header_is_read_or_refused(value: object) -> None:
    parsed_or_refused(seal(msgpack.packb(value)))


@given(st.sampled_from(sorted(header())), msgpacked)
@settings(max_examples=150)
def test_any_value_in_a_header_is_read_or_refused(key: str, value: object) -> None:
    parsed_or_refused(seal(msgpack.packb(header(**{key: value}))))


@given(st.data())
@settings(max_examples=300)
def test_a_damaged_frame_is_never_authentic(data: st.DataObject) -> None:
    good = build(PI, **ABOUT, meta={"base": 3, "list": [1, [2, {"a": b"c"}]]}, body=b"the body")
    damaged = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    damaged = damaged[: data.draw(st.integers(0, len(good)))] if data.draw(st.booleans()) else damaged
    if bytes(damaged) == good:
        return
    with pytest.raises(ProtocolError):
        parse(bytes(damaged)).check_authentic(PI.public)


def test_somebody_else_s_signature_does_not_verify() -> None:
    frame = parse(build(EVE, **ABOUT, meta={}))
    with pytest.raises(ProtocolError, match="bad-signature"):
        frame.check_authentic(PI.public)
    frame.check_authentic(EVE.public)


def test_a_public_key_that_is_none_verifies_nothing() -> None:
    frame = parse(build(PI, **ABOUT, meta={}))
    for public in (b"", bytes(31), bytes(33), b"\xff" * 32):
        with pytest.raises(ProtocolError, match="bad-signature"):
            frame.check_authentic(public)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kind": 3}, "bad-header"),
        ({"kind": b"update"}, "bad-header"),
        ({"federation": "Lab"}, "bad-header"),
        ({"federation": "-lab"}, "bad-header"),
        ({"federation": "l" * 33}, "bad-header"),
        ({"sender": "pi/01"}, "bad-header"),
        ({"sender": "aggregator-2"}, "bad-header"),
        ({"sender": "p" * 65}, "bad-header"),
        ({"sender": "pi\n"}, "bad-header"),
        ({"key": bytes(7)}, "bad-header"),
        ({"key": "12345678"}, "bad-header"),
        ({"seq": -1}, "bad-header"),
        ({"seq": True}, "bad-header"),
        ({"seq": 7.0}, "bad-header"),
        ({"seq": 2**62 + 1}, "bad-header"),
        ({"seq": 2**64 - 1}, "bad-header"),
        ({"part": [1, 1]}, "bad-header"),
        ({"part": [0, 0]}, "bad-header"),
        ({"part": [7, 3]}, "bad-header"),
        ({"part": [0, 65_536]}, "bad-header"),
        ({"part": [False, True]}, "bad-header"),
        ({"part": [0]}, "bad-header"),
        ({"part": {0: 1}}, "bad-header"),
        ({"digest": bytes(31)}, "bad-header"),
        ({"meta": []}, "bad-header"),
        ({"meta": {"deep": [[[[[[[]]]]]]]}}, "bad-header"),
    ],
    ids=str,
)
def test_a_header_of_wrong_types_or_ranges_is_refused(changes: dict[str, object], expected: str) -> None:
    assert reason(seal(msgpack.packb(header(**changes)))) == expected


@pytest.mark.parametrize("missing", sorted(header()))
def test_a_header_without_one_of_its_keys_is_refused(missing: str) -> None:
    fields = header()
    del fields[missing]
    assert reason(seal(msgpack.packb(fields))) == "bad-header"


def test_unknown_keys_are_ignored_in_header_and_meta() -> None:
    fields = header(extra=[1, {"a": 2}], meta={"base": 1, "later": {"x": b"\0"}})
    frame = parse(seal(msgpack.packb(fields)))
    assert frame.meta["base"] == 1


def test_eight_levels_of_nesting_and_no_more() -> None:
    eight: dict[str, Any] = {"deep": [[[[[[]]]]]]}  # the header is the first level, meta the second
    assert parse(seal(msgpack.packb(header(meta=eight)))).meta == eight
    assert reason(seal(msgpack.packb(header(meta={"deep": [eight["deep"]]})))) == "bad-header"
    assert reason(seal(b"\x91" * 10_000)) == "bad-header"
    assert reason(seal(msgpack.packb(header())[:-1] + b"\x81\xa1x" + b"\x91" * 10_000 + b"\xc0")) == "bad-header"


def test_2048_containers_and_no_more() -> None:
    """The header's map, its `part`, `meta` and the array in it are four of them."""
    empties: tuple[object, ...] = ([], {})
    for empty in empties:
        fits, more = (msgpack.packb(header(meta={"later": [empty] * (count - 4)})) for count in (2048, 2049))
        assert parse(seal(fits)).meta["later"][-1] == empty
        assert reason(seal(more)) == "bad-header"


@pytest.mark.parametrize(
    "extension",
    [b"\xd4\x05a", b"\xc7\x00\x05", b"\xd6\xff\0\0\0\1", b"\xd7\xff" + bytes(8), b"\xc7\x0c\xff" + bytes(12)],
    ids=["fixext 1", "ext of no bytes", "timestamp 32", "timestamp 64", "timestamp 96"],
)
@pytest.mark.parametrize("where", ["list", "map", "key"])
def test_there_are_no_extension_types(extension: bytes, where: str) -> None:
    """Each costs its reader as much as a map, and nobody would count them."""
    of = {"list": b"\x91" + extension, "map": b"\x81\xa1a" + extension, "key": b"\x81" + extension + b"\xc0"}
    content = msgpack.packb(header(meta={"later": None}))
    assert parse(seal(content)).meta == {"later": None}
    assert content.endswith(b"\xc0")
    assert reason(seal(content[:-1] + of[where])) == "bad-header"
    with pytest.raises(ProtocolError, match="bad-schema"):
        Schema.parse(of["list"])
    with pytest.raises(ProtocolError, match="not msgpack"):
        Entry.parse(of[where])
    with pytest.raises(ProtocolError, match="bad-log"):
        unpack(of["list"])


def test_arrays_that_only_claim_to_be_long_are_refused_before_there_is_room_made_for_them() -> None:
    """A thousand arrays, each in the one before, that state 16,383 elements: 128 MB, were they believed."""
    content = b"\x81\xa1x" + b"\xdc\x3f\xff" * 1000
    tracemalloc.start()
    try:
        assert reason(seal(content)) == "bad-header"
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_no_key_stands_twice() -> None:
    packed = msgpack.packb(header())
    twice = bytes([packed[0] + 1]) + packed[1:] + msgpack.packb("seq") + msgpack.packb(8)
    assert reason(seal(twice)) == "bad-header"
    inner = msgpack.packb(header(meta={"base": 1}))
    at = inner.index(b"\x81\xa4base")
    assert reason(seal(inner[:at] + b"\x82\xa4base\x01\xa4base\x02")) == "bad-header"


def test_a_key_that_cannot_be_one_is_refused() -> None:
    assert reason(seal(b"\x81\x90\x01")) == "bad-header"
    inner = msgpack.packb(header(meta={"base": 1}))
    at = inner.index(b"\x81\xa4base")
    assert reason(seal(inner[:at] + b"\x81\x90\x01")) == "bad-header"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xc0",
        b"\x90",
        b"\xc1",  # never used
        b"\xdf\xff\xff\xff\xff",  # a map of four thousand million entries
        b"\x81\xa1a\xdd\xff\xff\xff\xff",  # a list of as many
        b"\x81\xa1a\xdb\xff\xff\xff\xff",  # a string of as many bytes
        b"\x81\xa1a\xc6\xff\xff\xff\xff",
        b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
        b"\x81\xa2\xff\xff\x01",  # no UTF-8
        b"\x81\xa1a\xd6\xff" + b"\xff" * 4,  # a timestamp
        b"\x81\xa1a\xd7\xff" + b"\xff" * 8,  # a timestamp of more nanoseconds than there are
        b"\x81\xa1a\xc7\x0c\xff" + b"\xff" * 12,
        b"\x81\xa1a\xc7\x03\xff" + b"\xff" * 3,
    ],
    ids=lambda content: content.hex()[:20],
)
def test_odd_msgpack_is_refused(content: bytes) -> None:
    assert reason(seal(content)) == "bad-header"


def test_exactly_one_map_and_nothing_after_it() -> None:
    assert reason(seal(msgpack.packb(header()) + b"\xc0")) == "bad-header"


def test_lengths_are_checked_before_anything_is_read() -> None:
    good = build(PI, **ABOUT, meta={})
    assert reason(b"") == reason(good[:71]) == reason(b"TBF2" + good[4:]) == "not-a-frame"
    length = int.from_bytes(good[4:8], "little")
    assert reason(good[: 8 + length + 63]) == "not-a-frame"
    assert reason(good[:4] + struct.pack("<I", len(good)) + good[8:]) == "not-a-frame"
    for long in (HEADER_BYTES_MAX + 1, 2**32 - 1):
        assert reason(good[:4] + struct.pack("<I", long) + good[8:]) == "header-too-long"


def test_a_header_of_20_kb_is_neither_built_nor_read() -> None:
    with pytest.raises(ProtocolError, match="header-too-long"):
        build(PI, **ABOUT, meta={"long": "x" * 20_000})
    assert reason(seal(msgpack.packb(header(meta={"long": "x" * 20_000})))) == "header-too-long"
    fits = header(meta={"long": "x" * 16_000})
    assert parse(seal(msgpack.packb(fits))).meta["long"] == "x" * 16_000
